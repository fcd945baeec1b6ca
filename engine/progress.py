"""One line that moves, in Jupyter, a terminal or a log; what run.py is told; cores and threads."""
from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

BATCH = 64  # things given to threads at a time, for each core: they wait for the slowest


def report_event(**event: object) -> None:
    """Tell run.py, which reads the file named by STUDY_EVENTS, what happens in this notebook."""
    if path := os.environ.get("STUDY_EVENTS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def cores() -> int:
    """Processor cores for this process: STUDY_CORES, or its share of those it may use."""
    import joblib  # it knows the limits of containers; not needed for a command's first second

    share = joblib.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(os.environ.get("STUDY_CORES") or max(1, share))


def in_threads(function: Callable, things: Iterable) -> Iterator:
    """`function(thing)` of all things, in their order, on all cores: for functions whose work is
    done outside the interpreter's lock, as Pillow's and zlib's is.

    At most BATCH a core are given to threads ahead of the caller: what waits for it fills no
    memory, and Ctrl-C waits for no more than these.
    """
    rest, threads = iter(things), cores()
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(rest, BATCH * threads)):
            yield from pool.map(function, batch)


def _notebook_line(text: str):
    """A handle on a line of this notebook's output; None outside of a notebook."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython
    from IPython.display import Markdown, display

    return display(Markdown(text), display_id=True) if get_ipython() else None


class Progress:
    """One line for `total` steps of work, in the notebook while it runs, gone when it is done."""

    def __init__(self, label: str, total: int, unit: str = "steps", every: float = 0.5):
        self.label, self.total, self.unit, self.every = label, total, unit, every
        self.done, self.start, self.shown = 0, time.perf_counter(), 0.0
        self.handle = _notebook_line(f"{label} ...")

    def advance(self, steps: int = 1) -> None:
        """Count `steps` as done; the line changes at most every half second."""
        self.done += steps
        now = time.perf_counter()
        if now - self.shown < self.every:
            return
        self.shown = now
        rate = self.done / (now - self.start)
        left = (self.total - self.done) / rate
        self.show(f"{self.label}: {self.done} of {self.total} {self.unit}, {rate:.1f} a second, "
                  f"{left:.0f} s left")

    def track(self, things: Iterable) -> Iterator:
        """The things one by one, each counted as a step."""
        for thing in things:
            yield thing
            self.advance()

    def close(self) -> None:
        """Leave nothing behind in the notebook's output."""
        self._put("")

    def show(self, text: str) -> None:
        """Put `text` in the line's place."""
        self._put(text)
        if os.environ.get("RANK", "0") == "0":  # of the processes that make a stage, one speaks
            report_event(text=text)

    def _put(self, text: str) -> None:
        if self.handle is not None:
            from IPython.display import Markdown

            self.handle.update(Markdown(text))
