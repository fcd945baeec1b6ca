"""Functions of tests in processes of their own, which a test may kill."""
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

# A clean process imports the study once, and splits itself for each that is asked for.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["helpers"])


def start(function: Callable, *arguments: object) -> BaseProcess:
    """A new process that calls a function at the top of a test's file, in today's environment."""
    process = SERVER.Process(target=_call, args=(dict(os.environ), function, arguments),
                             daemon=True)
    process.start()
    return process


def _call(environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)


def wait_for(condition: Callable, process: BaseProcess, seconds: float = 120) -> object:
    """What `condition()` gives, once it is true; the process must not end before."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert process.is_alive(), f"the process has ended with exit code {process.exitcode}"
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.01)
    return value


def ended(process: BaseProcess, seconds: float = 120) -> int | None:
    """The exit code of a process; None if it does not end in time."""
    process.join(seconds)
    return process.exitcode
