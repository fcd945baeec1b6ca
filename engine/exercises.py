"""Exercises that answer: `h.check.<name>(answer)` says what is right, what is missing, and, when it
refuses a second time, a hint. A missing answer is said so and stops nothing.

The exercises stand in the rooms `checks_<subject>`, the answer key in notebooks/solutions.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


class NotYet(Exception):
    """What is wrong with an answer, in a sentence for the student."""


class Unanswered(Exception):
    """There is nothing to check: the answer, or what it returns, is still None."""


@dataclass
class Exercise:
    """One exercise; calling it with an answer prints what is to be said about it.

    An exercise that needs the notebook's own tables takes them after the answer. `refused` counts
    the refusals in this kernel.
    """
    name: str
    task: str
    check: Callable[..., None]
    hint: str
    insight: str
    refused: int = 0

    def __call__(self, answer: object = None, *given: object) -> None:
        try:
            if answer is None:
                raise Unanswered
            self.check(answered(answer), *given)
        except Unanswered:
            self.say(f"no answer yet. {self.task}")
        except NotYet as missing:
            self.refuse(str(missing))
        except Exception as error:  # a student's code: whatever it raises is an answer
            self.refuse(f"Your answer stops with {type(error).__name__}: {error}")
        else:
            self.say(f"right. {self.insight}")

    def refuse(self, missing: str) -> None:
        """Say what is missing, from the second time on with the hint."""
        self.refused += 1
        self.say(f"not yet. {missing}" + (f"\nHint: {self.hint}" if self.refused > 1 else ""))

    def say(self, text: str) -> None:
        """One line, with the exercise's name before it."""
        print(f"{self.name}: {text}".strip())


class Checks:
    """The exercises by name, as `h.check.<name>`."""

    def __init__(self) -> None:
        self.exercises: dict[str, Exercise] = {}

    def __getattr__(self, name: str) -> Exercise:
        if name.startswith("__") or name not in self.exercises:
            raise AttributeError(f"there is no exercise {name!r}; choose from: "
                                 f"{', '.join(self.exercises)}")
        return self.exercises[name]

    def __dir__(self) -> list[str]:
        return list(self.exercises)


check = Checks()


def exercise(hint: str, insight: str = "") -> Callable:
    """Mark `check(answer, ...)` as an exercise of its own name: it raises NotYet, by `expect` or
    `same`, where an answer is wrong. The task is the first sentence of its docstring.
    """
    def mark(function: Callable[..., None]) -> Callable[..., None]:
        task = " ".join(function.__doc__.split("\n\n")[0].split())
        name = function.__name__
        if name in check.exercises:
            raise ValueError(f"there is an exercise {name} already")
        check.exercises[name] = Exercise(name, task, function, hint, insight)
        return function

    return mark


def answered(answer: object) -> object:
    """The answer; of a function one that raises Unanswered where it still returns None."""
    if not callable(answer):
        return answer

    def asked(*given: object, **named: object) -> object:
        returned = answer(*given, **named)
        if returned is None:
            raise Unanswered
        return returned

    return asked


def expect(condition: bool, missing: str) -> None:
    """NotYet with the sentence `missing` unless the condition holds."""
    if not condition:
        raise NotYet(missing)


def same(found: object, wanted: object, missing: str, tolerance: float = 1e-5) -> None:
    """NotYet unless two numbers or arrays (NumPy's or PyTorch's) agree, in shape too; the
    sentence `missing` comes first.
    """
    try:
        found, wanted = (np.asarray(x, dtype=float) for x in (found, wanted))
    except (TypeError, ValueError):
        raise NotYet(f"{missing} It should be numbers, not {type(found).__name__}.") from None
    expect(found.shape == wanted.shape,
           f"{missing} Its shape is {list(found.shape)} and should be {list(wanted.shape)}.")
    expect(np.allclose(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True), missing)
