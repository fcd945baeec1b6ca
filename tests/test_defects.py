"""Notebook 12: each defect gives another number than its fix, in the direction that the notebook
says, and each check fails on the defect and passes on the fix.
"""
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

from commands.plan import NOTEBOOKS, Step
from conftest import ROOT
from engine.runs import open_run

BOOK = ROOT / "notebooks" / "12_defects_of_real_code.ipynb"
CELLS = {cell["id"]: cell for cell in json.loads(BOOK.read_text(encoding="utf-8"))["cells"]}
NUMBERS = range(1, 11)
TOO_GOOD = ["4  stack on its own rows", "5  modalities split apart", "8  source changed in place",
            "9  test part chose the epoch", "10  selection on all rows"]
TOO_LOW = ["1  best score reset", "2  frozen, in train mode", "3  fusion on memorised rows",
           "6  features out of order", "7  tuples added"]
NO_EFFECT = "10  scaling on all rows"


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """The names that the notebook's cells make, exercises apart, executed one after another."""
    patch = pytest.MonkeyPatch()
    patch.setenv("STUDY_RUNS", str(tmp_path_factory.mktemp("runs")))
    names = {}
    for name, cell in CELLS.items():
        if cell["cell_type"] == "code" and not name.startswith("ex"):
            exec("".join(cell["source"]), names)
    plt.close("all")
    yield names
    patch.undo()


def effect(book: dict, name: str) -> tuple[float, float]:
    """Wrong minus right in points, and half the width of its 95% interval."""
    wrong, right = book["found"][name]
    half = 1.96 * np.std(wrong - right, ddof=1) / len(wrong) ** 0.5
    return np.mean(wrong - right), half


def test_each_section_has_the_defect_a_check_and_a_fix():
    for number in NUMBERS:
        assert {f"d{number:02}-{piece}" for piece in ("text", "wrong", "check", "fix")} <= {*CELLS}
    headings = re.findall(r"^## (\d+)  ", "\n".join(
        "".join(cell["source"]) for cell in CELLS.values()), re.M)
    assert headings == [str(number) for number in NUMBERS]


def test_all_ten_are_told(book):
    assert sorted(book["found"]) == sorted([*TOO_GOOD, *TOO_LOW, NO_EFFECT])


@pytest.mark.parametrize("name", TOO_GOOD)
def test_a_flattering_defect_gives_a_number_that_is_too_good(book, name):
    mean, half = effect(book, name)
    assert mean > 1 and mean > 1.5 * half


@pytest.mark.parametrize("name", TOO_LOW)
def test_a_costly_defect_gives_a_number_that_is_too_low(book, name):
    mean, half = effect(book, name)
    assert mean < -1 and mean < -1.5 * half


def test_scaling_on_all_rows_does_next_to_nothing_and_the_notebook_says_so(book):
    mean, _ = effect(book, NO_EFFECT)
    assert abs(mean) < 1
    assert book["table"].set_index("defect")["effect"]["scaling on all rows"] == "none shown"


def test_the_figure_and_its_table_hold_every_number(book):
    table = book["table"].set_index("number")
    assert list(table.index) == [*NUMBERS, 10]
    for name, (wrong, right) in book["found"].items():
        row = book["table"].set_index("defect").loc[name.split(maxsplit=1)[1]]
        assert row["wrong"] == pytest.approx(wrong.mean())
        assert row["right"] == pytest.approx(right.mean())
    assert (book["run"].folder / "figures" / "12_defects.png").stat().st_size > 10_000


def cases(book: dict) -> dict:
    """{number: (check, what it is given with the defect, and with the fix)}."""
    rng = np.random.default_rng(7)
    _, title, picture = book["make_products"](rng, 60)
    encoder, (x, y), _ = book["trained_encoder"](rng)
    labels, titles, _ = book["make_products"](rng, 600 + 1000)
    first, second, unseen = slice(0, 300), slice(300, 600), slice(600, None)
    nearest = book["neighbors"].KNeighborsClassifier(1).fit(titles[first], labels[first])
    pictures = book["torch"].tensor(book["make_products"](rng, 200)[2])
    curve = np.array([50.0, 70.0, 60.0]), np.array([55.0, 60.0, 65.0])
    votes = book["make_votes"](rng)
    ids = rng.permutation(500)
    kept, fits = curve[0], rng.normal(size=(100, 3))

    def both(check: str, wrong: str, right: str, *given: object) -> tuple:
        return book[check], (book[wrong], *given), (book[right], *given)

    return {
        1: both("check_kept", "keep_reset", "keep_best", kept),
        2: both("check_frozen", "everything_in_train_mode", "only_the_head_in_train_mode",
                encoder, x, y),
        3: (book["check_not_memorised"], (nearest, titles, labels, first, unseen),
            (nearest, titles, labels, second, unseen)),
        4: both("check_chance", "score_on_fitted_rows", "score_cross_fitted", *votes),
        5: (book["check_parts"], book["split_apart"](ids), book["split_once"](ids)),
        6: both("check_order", "save_shuffled", "save_in_order", pictures),
        7: both("check_each_counts", "fuse_tuples", "fuse_vectors", title, picture),
        8: both("check_source_unchanged", "fuse_in_place", "fuse_vectors", title, picture),
        9: both("check_blind", "choose_by_test", "choose_by_validation", *curve),
        10: both("check_fit", "scaler_of_all", "scaler_of_training", fits)}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_check_fails_on_the_defect_and_passes_on_the_fix(book, number):
    check, defect, fix = cases(book)[number]
    check(*fix)
    with pytest.raises(AssertionError):
        check(*defect)
    assert book["tried"](check, *fix) == "passes"
    assert book["tried"](check, *defect).startswith("fails: ")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_check_has_at_most_five_lines(number):
    source = "".join(CELLS[f"d{number:02}-check"]["source"])
    (check,) = re.findall(r"^def check_\w+\(.*\):\n((?:    .*\n?)+)", source, re.M)
    assert len(check.splitlines()) <= 5


def test_what_is_kept_reported_and_selected_is_right_by_hand(book):
    scores = np.array([40.0, 80.0, 70.0])
    assert book["keep_reset"](scores) == 2 and book["keep_best"](scores) == 1
    assert book["fuse_vectors"](np.array([1.0, 2.0]), np.array([10.0, 20.0])).tolist() == [11, 22]
    assert book["fuse_tuples"](np.array([1.0]), np.array([10.0])).tolist() == [1]
    mean, half = book["interval"](np.array([1.0, 2.0, 3.0]))
    assert mean == 2 and half == pytest.approx(4.3027 / 3 ** 0.5, rel=1e-4)  # t with 2 degrees


def test_the_points_that_are_said_to_be_released_code_are_about_that(book):
    said = {1: "epoch loop", 2: "model.train()", 5: "training pictures", 7: "tuples",
            9: "no third part"}
    assert book["POINTS"].keys() == said.keys()
    for defect, point in book["POINTS"].items():
        assert said[defect] in book["released"][point]


def test_only_the_notebooks_that_compare_splits_read_other_runs():
    run = open_run("sample", "90-10", 0)
    several = [name[:2] for name in NOTEBOOKS if len(Step(name, run).runs) > 1]
    assert several == ["08", "09", "10"]
    assert Step(BOOK.stem, run).runs == [run]
