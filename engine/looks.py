"""One look: while it lasts, the same question about code, settings and files is answered once."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ANSWERS: ContextVar[dict | None] = ContextVar("answers", default=None)


class Changed(RuntimeError):
    """What something is made from is no longer what it was at the beginning."""


@contextmanager
def one_look(fresh: bool = False) -> Iterator[dict]:
    """Within, and within all that it calls, `once` answers as it did the first time: a catalogue
    has 84,916 pictures, and asking the system about each takes a second, or minutes over a network.

    A look within a look is the same one, unless it is to be a `fresh` one.
    """
    token = _ANSWERS.set({}) if fresh or _ANSWERS.get() is None else None
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


def refuse_changed(find: Callable, *arguments: object) -> None:
    """Changed if `find(*arguments)` no longer answers as it did in this look."""
    with one_look(fresh=True):
        now = find(*arguments)
    if now != once(find, *arguments):
        raise Changed("the catalogue, or a file that a setting names, was changed while something "
                      "was made from it, which is not kept; start again")
