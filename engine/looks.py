"""One look: while it lasts, the same question about code, settings and files is answered once."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ANSWERS: ContextVar[dict | None] = ContextVar("answers", default=None)


@contextmanager
def one_look() -> Iterator[dict]:
    """Within, and within all that it calls, `once` answers as it did the first time: a catalogue
    has 84,916 pictures, and asking the system about each takes a second, or minutes over a network.
    """
    token = _ANSWERS.set({}) if _ANSWERS.get() is None else None
    try:
        yield _ANSWERS.get()
    finally:
        if token:
            _ANSWERS.reset(token)


def once(find: Callable, *arguments: object) -> object:
    """`find(*arguments)`, worked out once in one look."""
    with one_look() as known:
        if (find, *arguments) not in known:
            known[find, *arguments] = find(*arguments)
        return known[find, *arguments]
