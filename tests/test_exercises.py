"""The exercises: each is asked once, has an answer key, and refuses what students would answer."""
import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT
from engine.checks import check
from engine.exercises import NotYet, exercise, expect, same
from test_style import CELL_LINES, NOTEBOOKS, WIDTH, source_of, tags

SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))


def asked_in(path: Path) -> list[tuple[str, str, dict]]:
    """(exercise, what its cell printed, cell) for each call of h.check in a notebook."""
    calls = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        names = re.findall(r"\bh\.check\.(\w+)\(", source_of(cell))
        calls += [(name, printed, cell) for name in names]
    return calls


ASKED = [(name, path) for path in NOTEBOOKS for name, _, _ in asked_in(path)]


def test_each_exercise_is_asked_in_one_notebook():
    assert sorted(name for name, _ in ASKED) == sorted(check.exercises)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_an_empty_answer_is_committed_and_said_to_be_none(path):
    for name, printed, cell in asked_in(path):
        assert f"{name}: no answer yet." in printed
        assert "nbval-check-output" in tags(cell), name


@pytest.mark.parametrize("name, path", ASKED, ids=[name for name, _ in ASKED])
def test_the_answer_key_has_a_right_answer_and_two_wrong_ones(name, path):
    key = ROOT / "notebooks" / "solutions" / path.name
    printed = "".join(text for found, text, _ in asked_in(key) if found == name)
    assert len(re.findall(rf"^{name}: right\.", printed, re.M)) >= 1
    refusals = re.findall(rf"^{name}: not yet\. (.+)$", printed, re.M)
    assert len(set(refusals)) >= 2 or len(refusals) > 2, refusals
    assert "\nHint: " in printed


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem[:2])
def test_the_answer_key_is_executed_checked_and_in_style(path):
    assert path.name in {notebook.name for notebook in NOTEBOOKS}
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
             if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        source = source_of(cell)
        ast.parse(source)
        assert len(source.splitlines()) <= CELL_LINES
        assert all(len(line) <= WIDTH or "# " in line for line in source.splitlines())
        if "h.check." in source:
            assert "nbval-check-output" in tags(cell), source
        assert not any(output["output_type"] == "error" for output in cell["outputs"])


def asked(hint: str = "count the fingers", insight: str = "Five."):
    """A fresh exercise outside of `h.check`."""
    @exercise(hint, insight)
    def fingers_of_a_hand(answer):
        """How many fingers has a hand?

        More is not asked.
        """
        expect(answer == 5, "A hand has other fingers.")

    return check.exercises.pop("fingers_of_a_hand")


def test_an_exercise_says_nothing_missing_right_and_hints_the_second_time(capsys):
    fingers = asked()
    for answer in (None, 4, 6, 5):
        fingers(answer)
    assert capsys.readouterr().out.splitlines() == [
        "fingers_of_a_hand: no answer yet. How many fingers has a hand?",
        "fingers_of_a_hand: not yet. A hand has other fingers.",
        "fingers_of_a_hand: not yet. A hand has other fingers.",
        "Hint: count the fingers",
        "fingers_of_a_hand: right. Five."]


def test_a_function_that_returns_nothing_is_no_answer_and_one_that_raises_is_refused(capsys):
    @exercise("add")
    def sum_of_two(answer):
        """Write a function that adds."""
        same(answer(1, 2), 3, "It does not add.")

    adds = check.exercises.pop("sum_of_two")
    adds(lambda a, b: None)
    adds(lambda a, b: a / 0)
    adds(lambda a, b: a + b)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("sum_of_two: no answer yet.")
    assert said[1] == ("sum_of_two: not yet. Your answer stops with ZeroDivisionError: "
                       "division by zero")
    assert said[2] == "sum_of_two: right."


@pytest.mark.parametrize("found, wanted, said", [
    ([1.0, 2.0], [1.0, 2.1], "^No.$"), ([[1.0]], [1.0], r"shape is \[1, 1\] and should be \[1\]"),
    ("many", 3, "should be numbers, not str"), (float("nan"), 1.0, "^No.$")])
def test_what_differs_is_refused(found, wanted, said):
    with pytest.raises(NotYet, match=said):
        same(found, wanted, "No.")


def test_what_agrees_passes_whatever_holds_it():
    same(torch.tensor([1, 2]), [1.0, 2.0], "No.")
    same(np.float32(0.1), 0.1, "No.")


def test_two_exercises_cannot_have_one_name():
    asked()
    first = check.exercises["masked_mean"]
    with pytest.raises(ValueError, match="there is an exercise masked_mean already"):
        exercise("hint")(first.check)
    assert check.masked_mean is first


def test_an_unknown_exercise_is_answered_with_those_that_there_are():
    with pytest.raises(AttributeError, match="no exercise 'masked_men'; choose from: "):
        check.masked_men  # noqa: B018
