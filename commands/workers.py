"""Stages in processes of their own, side by side: on this machine, or on a Ray cluster."""
from __future__ import annotations

import contextlib
import os
import subprocess
import time
from concurrent.futures import Future

from rich.console import Console

from commands.execute import StepFailed, run_graph, side_by_side
from commands.plan import Job
from engine.files import one_line
from engine.progress import cores


def make_stages(graph: dict[Job, list[Job]], workers: int, on: str, console: Console) -> None:
    """Make stages in processes of their own, on this machine or on a Ray cluster.

    StepFailed says what went wrong.
    """
    def tell(job: Job, result: tuple[float, str]) -> None:
        seconds, failure = result
        if failure:
            raise StepFailed(failure)
        console.print(f"        {job}  {seconds:.0f} s", highlight=False)

    with (on_ray() if on == "ray" else on_this_machine(workers)) as submit:
        run_graph(graph, submit, tell)


@contextlib.contextmanager
def on_this_machine(workers: int):
    """Gives `submit(job)`: jobs on this machine, `workers` at a time, one GPU each."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = [name for name in visible if name] or list(map(str, range(torch.cuda.device_count())))
    share, free = str(max(1, cores() // workers)), list(range(workers))

    def make(job: Job) -> tuple[float, str]:
        worker = free.pop()
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if gpus else {}
        try:
            return run_job(job, {"OMP_NUM_THREADS": share, **os.environ, "STUDY_CORES": share,
                                 **gpu})
        finally:
            free.append(worker)

    with side_by_side(workers) as start:
        yield lambda job: start(make, job)


@contextlib.contextmanager
def on_ray():
    """Gives `submit(job)`: jobs on the Ray cluster of RAY_ADDRESS, or on one that Ray starts here.

    Its machines share this project's folder and the runs folder. Ray decides what runs where.
    """
    try:
        import ray  # an extra: requirements-ray.txt
    except ImportError as error:
        raise ValueError("--on ray needs Ray: `make ray` installs it") from error
    ray.init(log_to_driver=False, configure_logging=False)
    prefixes = ("STUDY_", "RAKUTEN_", "HF_", "TORCH_HOME", "XDG_CACHE_HOME", "OMP_NUM_THREADS")
    ours = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    share = max(1, cpus // gpus) if gpus else 1  # cores beside each GPU

    @ray.remote(max_retries=0, num_cpus=share)
    def make(job: Job) -> tuple[float, str]:
        return run_job(job, {**os.environ, **ours, "STUDY_CORES": str(share)})

    def submit(job: Job) -> Future:
        on_gpu = gpus and job.name not in ("splits", "text", "baselines")
        return make.options(num_gpus=1 if on_gpu else 0).remote(job).future()

    try:
        yield submit
    except ray.exceptions.RayError as error:  # of a worker that was killed, or a lost machine
        raise StepFailed(f"Ray could not end a stage: {one_line(error)} Start again: it goes on "
                         "from its last checkpoint") from error
    finally:
        ray.shutdown()


def run_job(job: Job, environment: dict[str, str]) -> tuple[float, str]:
    """Run the job's command to its end: its seconds, and what went wrong, "" if nothing did."""
    start = time.perf_counter()
    ended = subprocess.run(job.command, env={**environment, "STUDY_PARENT": str(os.getpid())},
                           text=True, capture_output=True)
    seconds = time.perf_counter() - start
    if not ended.returncode:
        return seconds, ""
    last = ended.stderr.splitlines()[-20:]
    return seconds, "\n  ".join([f"{job} failed, exit code {ended.returncode}", *last])
