"""The processes that make one stage together, and the threads of each."""
from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from threadpoolctl import threadpool_limits

from engine import runs, settings
from engine.files import read_json, temporary_folder
from engine.progress import Progress, cores
from engine.runs import Run
from engine.settings import Profile

# cuBLAS sums in one order (the setting `deterministic`) only if this is there when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def open_run(profile: str, split: str, seed: int, changes: dict | str | None = None) -> Run:
    """`runs.open_run`, and its threads for all that this process computes from here on: in cells of
    a notebook too, which say the same whether a stage was made there or was found.
    """
    run = runs.open_run(profile, split, seed, changes)
    use_threads(run.profile)
    return run


def use_threads(profile: Profile) -> None:
    """Let PyTorch, NumPy and scikit-learn compute on as many threads as the profile says, where it
    says so: on another number sums are rounded otherwise.
    """
    if profile.threads:
        torch.set_num_threads(profile.threads)
        threadpool_limits(profile.threads)  # of BLAS, which logistic regressions call


def group() -> PartialState:
    """The processes that make a stage together: this one alone, or all that torchrun started."""
    meeting = {}
    if "STUDY_STORE" in os.environ:  # of `launch`
        meeting = {"init_method": f"file://{os.environ['STUDY_STORE']}",
                   "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6), **meeting)


def device() -> torch.device:
    """This process's GPU where there is one, else the CPU."""
    return group().device


def processor() -> str:
    """The processor's name and the instructions of it that PyTorch uses: results depend on both."""
    listed = Path("/proc/cpuinfo")  # on Linux; elsewhere Python knows the name
    said = listed.read_text(errors="replace") if listed.exists() else ""
    named = re.search(r"model name\s*: (.+)", said)
    name = named[1] if named else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def processes_for(profile: Profile) -> int:
    """How many processes make one stage together: the setting, or one for each GPU.

    As many at most as can share both batches alike. ValueError for more processes than GPUs.
    """
    gpus = torch.cuda.device_count()
    if gpus and profile.processes > gpus:
        raise ValueError(f"processes={profile.processes}, but this machine has {gpus} GPU(s); "
                         "each process needs one")
    if profile.processes:
        return profile.processes
    both = math.gcd(profile.text_batch, profile.image_batch)
    return max(n for n in range(1, max(gpus, 1) + 1) if both % n == 0)


def agreed(value: object) -> object:
    """The main process's `value`, in every process."""
    return broadcast_object_list([value])[0] if group().num_processes > 1 else value


def wait_for_file(path: Path, holds: dict | None = None, seconds: float = 120) -> None:
    """Wait until all processes are here and see the file `path`; if JSON, that it `holds` that.

    On another machine a shared folder may show a new file late: TimeoutError after `seconds`.
    """
    group().wait_for_everyone()
    end = time.monotonic() + seconds
    while not _is_there(path, holds):
        if time.monotonic() > end:
            raise TimeoutError(f"{path} has not appeared within {seconds:.0f} s; is the folder "
                               "shared by all machines?")
        time.sleep(0.5)


def _is_there(path: Path, holds: dict | None) -> bool:
    if holds is None:
        return path.exists()
    return holds.items() <= (read_json(path) or {}).items()


def launch(run: Run, name: str, processes: int) -> None:
    """Make a stage in `processes` new processes of this machine, one for each GPU.

    New ones, because a notebook's own process may hold a GPU already, and then cannot be forked
    ("CUDA already initialised"). They are started by a command line, `torchrun run.py stage`: the
    one place where the engine points up, to run.py. They meet by a file, and what listens does so
    on this machine's loopback alone. ChildProcessError with the first that failed.
    """
    with temporary_folder() as place:
        events, log = place / "events", place / "log"
        events.touch()
        share = str(max(1, cores() // processes))
        environment = {
            "OMP_NUM_THREADS": share, **os.environ, "STUDY_CORES": share, "TMPDIR": str(place),
            "STUDY_EVENTS": str(events), "STUDY_PARENT": str(os.getpid()),
            "TORCHELASTIC_ERROR_FILE": str(place / "error.json"),
            "STUDY_STORE": str(place / "processes"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "GLOO_SOCKET_IFNAME": _loopback(), "NCCL_SOCKET_IFNAME": _loopback()}
        command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d",
                   "--rdzv-conf=store_type=file", f"--rdzv-endpoint={place / 'agent'}",
                   f"--nproc-per-node={processes}", str(settings.ROOT / "run.py"), "stage", name,
                   *run.options]
        line = Progress(f"{name} in {processes} processes", 0)
        with log.open("w") as output:
            child = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            try:
                _follow(child, events, line)
            finally:
                child.terminate()  # torchrun ends its processes; nothing happens if it has ended
                child.wait()
                line.close()
        if child.returncode:
            raise ChildProcessError(f"stage {name} failed in {processes} processes: "
                                    + _what_failed(place / "error.json", log))


def _loopback() -> str:
    """The name of the network interface that reaches this machine alone."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return name
    raise OSError("this machine has no network interface of address 127.0.0.1")


def _follow(child: subprocess.Popen, events: Path, line: Progress) -> None:
    """Show what the processes report, until they end."""
    with events.open(encoding="utf-8") as lines:
        while child.poll() is None:
            time.sleep(0.5)
            for event in map(json.loads, lines):
                if "text" in event:
                    line.show(event["text"])


def _what_failed(error: Path, log: Path) -> str:
    """The error of the process that failed first, as torchrun keeps it, or else the last words."""
    kept = (read_json(error) or {}).get("message")
    if isinstance(kept, dict):
        kind, _, said = kept["message"].partition(": ")
        if kind in ("ValueError", "OSError", "FileNotFoundError"):  # ours say where and what to do
            return f"error: {said}"
        return "\n".join(kept["extraInfo"]["py_callstack"].strip().splitlines()[-20:])
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(said[-20:])


def end_with_parent() -> None:
    """End this process when the one that started it (STUDY_PARENT) is gone."""
    def watch(parent: int) -> None:
        while _lives(parent):
            time.sleep(1)
        os._exit(1)

    if "STUDY_PARENT" in os.environ:
        parent = int(os.environ["STUDY_PARENT"])
        threading.Thread(target=watch, args=[parent], daemon=True).start()


def _lives(pid: int) -> bool:
    """Whether a process works: one that was killed stays listed until its parent asks after it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in GB (10^9 bytes)."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
