"""Notebooks through papermill, in kernels of their own; one loop over futures."""
from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from graphlib import TopologicalSorter

import psutil
from filelock import Timeout
from rich.console import Console

from commands.plan import Step, step_key
from engine.files import lock_of, make_folder, printable, temporary_folder, write_json
from engine.progress import cores
from engine.runs import Run

LOG_SECONDS = 15  # a log gets a line so often, a terminal one line that moves
# A kernel's first: what it is told by the environment, and which process it is. Each has its own.
# Python would look for garbage all the while it imports; helpers.py lets it begin after that.
FIRST_LINE = ("import gc, os; gc.disable(); os.environ.update({given!r}); "
              "open({path!r}, 'a').write('{{\"pid\": %d}}\\n' % os.getpid()); del gc, os")


class StepFailed(Exception):
    """A notebook or a stage that ended with an error; the text says where."""


def run_graph(graph: dict, submit: Callable[[object], Future],
              tell: Callable[[object, object], None], look: Callable[[], None] = bool) -> None:
    """`submit` each thing of the graph once those it waits for are done, and `tell` its result.

    The first error ends it: nothing more is started.
    """
    order, running = TopologicalSorter(graph), {}
    order.prepare()
    while order.is_active():
        running |= {submit(thing): thing for thing in order.get_ready()}
        ended, _ = concurrent.futures.wait(running, 0.5, "FIRST_COMPLETED")
        look()
        for future in ended:
            thing = running.pop(future)
            tell(thing, future.result())
            order.done(thing)


@contextlib.contextmanager
def side_by_side(number: int):
    """Gives `submit(function, *words)`: calls in threads, `number` at a time, for work that is done
    in processes of their own.

    After an error nothing more is started, and what runs goes on to its end. At Ctrl-C the
    processes are killed: what they make goes on from its last checkpoint at the next start.
    """
    futures = []
    with ThreadPoolExecutor(number) as pool:
        def submit(function: Callable, *words: object) -> Future:
            futures.append(pool.submit(function, *words))
            return futures[-1]

        try:
            yield submit
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                kill_until_done(futures)
            elif not all(future.done() for future in futures):
                said = printable(f"{error}\nnothing more is started; what runs goes on to its end")
                print(said, file=sys.stderr)
            raise


def kill_until_done(futures: list[Future]) -> None:
    """Kill all processes below this one, also those that start meanwhile, until no call waits."""
    while not all(future.done() for future in futures):
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.1)


@contextlib.contextmanager
def at_work(runs: Iterable[Run]):
    """Within, no other process makes a study of these runs: both would write the same notebooks.
    What killed children leave in their temporary folder goes at the end.

    StepFailed if another study is at work. Stages are shared all the same, each made once.
    """
    with contextlib.ExitStack() as stack:
        for run in runs:
            make_folder(run.folder, "STUDY_RUNS")
            try:
                stack.enter_context(lock_of(run.folder / ".study.lock").acquire(timeout=0))
            except Timeout as error:
                raise StepFailed(f"another process is at work on {run.folder}: wait for its end, "
                                 "or choose another split, seed or setting") from error
        folder = stack.enter_context(temporary_folder())
        # Ray's sockets need a short path.
        stack.enter_context(environment(
            TMPDIR=folder, RAY_TMPDIR=os.environ.get("RAY_TMPDIR", folder.parent)))
        stack.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
        tempfile.tempdir = str(folder)
        yield


@contextlib.contextmanager
def environment(**values: object):
    """Within, these variables are set for processes that are started."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name)
        os.environ.update({name: value for name, value in before.items() if value is not None})


# --- notebooks ------------------------------------------------------------------------------------
class Board:
    """What the notebooks that are being executed say, as one line that moves or lines of a log."""

    def __init__(self, console: Console):
        self.console, self.events, self.peaks = console, {}, {}
        self.last = time.monotonic()

    def look(self, status) -> None:
        """Read what has been added to each notebook's file of events, and show it."""
        texts = []
        for label, (lines, events) in list(self.events.items()):
            events += map(json.loads, lines)
            memory = sum(memory_of(event["pid"]) for event in events if "pid" in event)
            self.peaks[label] = max(self.peaks.get(label, 0), memory)
            said = [event["text"] for event in events if "text" in event]
            texts += [f"{label}  {said[-1]}"] if said else []
        status.update("   ".join(texts) or "starting")
        if not self.console.is_terminal and time.monotonic() - self.last > LOG_SECONDS:
            self.last = time.monotonic()
            for text in texts:
                self.console.print(f"        {text}", highlight=False)


def execute(steps: dict[Step, list[Step]], labels: dict[Step, str], at_a_time: int,
            console: Console) -> None:
    """Execute notebooks, some at a time, each in a kernel of its own; StepFailed names the cell."""
    board = Board(console)
    share = str(max(1, cores() // at_a_time))

    def tell(step: Step, result: dict) -> None:
        console.print(f"{labels[step]}  {result['seconds']:.0f} s, peak "
                      f"{result['peak_memory_gb']:.1f} GB", highlight=False)

    with (own_kernel(), console.status("starting") as status,
          side_by_side(at_a_time) as start):
        def submit(step: Step) -> Future:
            key = step_key(step)  # before it runs: an edit meanwhile is seen
            return start(execute_one, step, key, labels[step], share, board)

        run_graph(steps, submit, tell, lambda: board.look(status))


def execute_one(step: Step, key: str, label: str, share: str, board: Board) -> dict:
    """Execute one notebook; its manifest: {key, seconds, peak_memory_gb, stages: {key: name}}."""
    import papermill

    make_folder(step.output.parent, "STUDY_RUNS")
    step.manifest.unlink(missing_ok=True)
    start = time.perf_counter()
    with temporary_folder() as folder:
        path = folder / "events"
        path.touch()
        with path.open(encoding="utf-8") as lines:
            board.events[label] = (lines, events := [])
            given = {"STUDY_EVENTS": str(path), "STUDY_CORES": share, "OMP_NUM_THREADS": share,
                     "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
            first = FIRST_LINE.format(given=given, path=str(path))
            try:
                book = papermill.execute_notebook(
                    step.source, step.output, step.parameters, cwd=step.source.parent,
                    progress_bar=False, extra_arguments=[
                        "--IPKernelApp.log_level=50", f"--IPKernelApp.exec_lines={first}"])
            except Exception as error:
                raise StepFailed(describe_failure(step, error, board.peaks.get(label, 0))) \
                    from error
            finally:
                del board.events[label]
            events += map(json.loads, lines)
    if lacking := cells_without_figure(book):
        raise StepFailed(f"{step} failed: cell(s) {lacking} of {step.output} show no figure")
    made = {event["key"]: event["stage"] for event in events if "stage" in event}
    result = {"key": key, "seconds": round(time.perf_counter() - start, 1),
              "peak_memory_gb": round(board.peaks.get(label, 0) / 1e9, 2), "stages": made}
    write_json(step.manifest, result)
    return result


def cells_without_figure(book: dict) -> str:
    """The numbers of an executed notebook's cells that should show a figure and do not."""
    lacking = []
    for cell in book["cells"]:
        due = cell["cell_type"] == "code" and "plt.show()" in "".join(cell["source"])
        if due and not any("image/png" in output.get("data", {}) for output in cell["outputs"]):
            lacking.append(str(cell["execution_count"]))
    return ", ".join(lacking)


@contextlib.contextmanager
def own_kernel():
    """Within, the kernel `python3` is this very Python, whatever else is installed as that, and
    without the user's own settings of IPython and Matplotlib.
    """
    with temporary_folder() as folder:
        place = folder / "kernels" / "python3"
        place.mkdir(parents=True)
        words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        write_json(place / "kernel.json", {"argv": words, "display_name": "Python 3",
                                           "language": "python"})
        others = os.environ.get("JUPYTER_PATH")
        (folder / "matplotlibrc").touch()  # no settings of the user's
        with environment(JUPYTER_PATH=os.pathsep.join(filter(None, (str(folder), others))),
                         IPYTHONDIR=folder / "ipython", MATPLOTLIBRC=folder / "matplotlibrc"):
            yield


def memory_of(pid: int) -> int:
    """Resident memory of a process and of all below it, in bytes."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family)
    return 0


def describe_failure(step: Step, error: Exception, peak: int) -> str:
    """Which notebook, which cell, what it says, and where the executed notebook is."""
    where, what = "", f"{type(error).__name__}: {error}"
    if type(error).__name__ == "DeadKernelError":  # nbclient's
        what = (f"its process was killed, as the system does when memory runs out; it had taken "
                f"{peak / 1e9:.1f} GB. Close other programs, use --notebooks 1, or set "
                "device_batch or limit to less")
    if hasattr(error, "exec_count"):  # papermill's
        where, what = f" in cell [{error.exec_count}]", f"{error.ename}: {error.evalue}"
    return f"{step} failed{where}\n  {what}\n  executed notebook: {step.output}"
