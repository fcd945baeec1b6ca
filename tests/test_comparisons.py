"""Comparisons: intervals and p-values against simulations whose truth is known, and cases worked by
hand.
"""
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from sklearn.metrics import accuracy_score, f1_score

import helpers as h
from engine.claims import (
    CLAIMS,
    PAIRS,
    SINGLE,
    TEXT_ALONE,
    claims_table,
    compare_splits,
    recommend,
    verdict,
)
from engine.scores import (
    Resamples,
    compare_all,
    confusion_cells,
    contrast,
    holm,
    resample,
    rows_to_separate,
    scores_of_cells,
    seed_variance,
    who_beats_whom,
)

CLASSES = 27


def simulated(rng: np.random.Generator, n: int, skills: dict[str, np.ndarray],
              shared: float = 0.6) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Truth and labels [n, seeds] of models of these accuracies; `shared` is how far what is hard
    for one is hard for all.

    Classes are equal and errors fall on all others alike, so that macro-F1 is the accuracy, too.
    """
    truth, common = rng.permutation(np.arange(n) % CLASSES), rng.normal(size=(n, 1))
    labels = {}
    for model, accuracy in skills.items():
        own = rng.normal(size=(n, len(accuracy)))
        ease = scipy.stats.norm.cdf(np.sqrt(shared) * common + np.sqrt(1 - shared) * own)
        wrong = (truth[:, None] + rng.integers(1, CLASSES, size=own.shape)) % CLASSES
        labels[model] = np.where(ease < accuracy, truth[:, None], wrong)
    return truth, labels


# --- scores of many seeds -------------------------------------------------------------------------
def test_scores_of_cells_are_scikit_learns_for_each_seed():
    rng = np.random.default_rng(0)
    truth, labels = simulated(rng, 120, {"a": np.array([0.5, 0.7, 0.9])})
    truth, labels = truth[truth < 20], labels["a"][truth < 20]  # others are predicted, never true
    found = scores_of_cells(confusion_cells(truth, labels, CLASSES), CLASSES)
    for seed, scores in zip(labels.T, found, strict=True):
        f1 = [f1_score(truth, seed, average=kind, labels=np.unique(truth))
              for kind in ("macro", "weighted")]
        assert scores == pytest.approx([accuracy_score(truth, seed), *f1])


def test_a_table_row_is_the_mean_of_its_seeds(run):
    truth, labels = simulated(np.random.default_rng(1), 200, {"a": np.array([0.5, 0.7, 0.9])})
    row = h.score_row("a", truth, labels["a"], run)
    single = [h.score(truth, seed)["macro_f1"] for seed in labels["a"].T]
    assert row["seeds"] == 3 and row["macro_f1"] == pytest.approx(100 * np.mean(single))
    assert row["macro_f1_low"] < row["macro_f1"] < row["macro_f1_high"]
    alone = h.score_row("a", truth, labels["a"][:, 0], run)
    assert alone["seeds"] == 1
    spread, narrow = (each["macro_f1_high"] - each["macro_f1_low"] for each in (row, alone))
    assert spread > 1.5 * narrow  # seeds that differ by 20 points count


# --- contrasts ------------------------------------------------------------------------------------
def test_the_standard_error_of_an_accuracy_is_that_of_the_paired_differences():
    truth, labels = simulated(np.random.default_rng(2), 500,
                              {"a": np.array([0.8]), "b": np.array([0.7])})
    found = contrast(resample(truth, labels, "accuracy", 4000), ["a"], ["b"])
    differences = np.subtract(*((labels[name][:, 0] == truth).astype(float) for name in "ab"))
    error = differences.std(ddof=1) / np.sqrt(500)
    assert found["effect"] == pytest.approx(100 * differences.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 196 * error, rel=0.05)
    z = differences.mean() / error
    assert scipy.stats.norm.isf(found["p"] / 2) == pytest.approx(z, rel=0.05)
    assert found["n"] == 500 and found["ahead"] == 1


def test_groups_and_shares_of_seeds_as_worked_by_hand():
    value = {"a": np.array([0.5, 0.75]), "b": np.array([1.0, 1.0]), "c": np.array([0.75])}
    drawn = {model: np.tile(each, (10, 1)) for model, each in value.items()}  # rows change nothing
    found = contrast(Resamples(9, value, drawn), ["a", "b"], ["c"])
    assert found["effect"] == pytest.approx(100 * (0.8125 - 0.75))
    assert found["ahead"] == 0.75  # (0.5 + 1) / 2 is as good as 0.75, (0.75 + 1) / 2 better
    # Seeds of "a" alone, the error known from two: variance 0.03125 / 2 of their mean, and a
    # quarter of it in the groups' mean.
    error, t = math.sqrt(0.03125 / 2 / 4), scipy.stats.t(1)
    assert found["high"] - found["effect"] == pytest.approx(100 * error * t.ppf(0.975))
    assert found["p"] == pytest.approx(2 * t.sf(0.0625 / error))


def test_models_that_never_differ_are_not_told_apart():
    value = {name: np.array([0.75]) for name in "ab"}
    found = Resamples(9, value, {name: np.full((10, 1), 0.75) for name in "ab"})
    same = contrast(found, ["a"], ["b"])
    assert (same["effect"], same["p"], same["ahead"]) == (0, 1, 0.5)


def test_the_seeds_part_of_a_variance_is_found_again():
    rng, n, seeds, found = np.random.default_rng(6), 300, 5, []
    for _ in range(300):  # score = row + seed + row x seed, of deviations 1, 0.1, 1
        seed = 0.1 * rng.normal(size=seeds)
        rows = rng.normal(size=(n, 1)) + rng.normal(size=(n, seeds)) + seed
        drawn = np.array([rows[rng.integers(n, size=n)].mean(0) for _ in range(100)])
        found.append(seed_variance(rows.mean(0), drawn))
    assert np.mean(found) == pytest.approx(0.1 ** 2 / seeds, rel=0.1)
    assert seed_variance(np.array([0.7]), np.random.rand(9, 1)) == 0


def test_holm_as_worked_by_hand():
    # in order .01 x 3, .03 x 2, .04 x 1, and none below the one before
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_who_beats_whom_is_two_sided_and_silent_where_nothing_is_shown():
    table = pd.DataFrame({"first": ["a", "a", "b"], "second": ["b", "c", "c"],
                          "effect": [2.0, -3.0, 1.0], "p_holm": [0.01, 0.04, 0.2]})
    square = who_beats_whom(table)
    assert square.loc["a"].tolist() == [0, 1, -1] and square.loc["b"].tolist() == [-1, 0, 0]
    assert square.loc["c"].tolist() == [1, 0, 0]


def test_rows_to_separate_give_the_power_that_they_promise():
    rng, points, apart = np.random.default_rng(3), 5, 0.2
    shares = [apart / 2 + points / 200, apart / 2 - points / 200]  # only the one, only the other
    example = rng.choice(3, size=200_000, p=[*shares, 1 - apart])
    truth, first, second = np.zeros(200_000, int), (example == 1) * 1, (example == 0) * 1
    n = rows_to_separate(truth, first, second, points)
    found = [scipy.stats.binomtest(k, k + m).pvalue < 0.05 for k, m, _ in
             rng.multinomial(n, [*shares, 1 - apart], size=2000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)
    assert rows_to_separate(truth, first, second, points / 2) > 3.5 * n
    # Two models that are right on the same rows cannot differ by less than their gain.
    assert rows_to_separate(truth, first, first, 0.5) == rows_to_separate(
        np.zeros(1000), np.arange(1000) < 5, np.zeros(1000), 0.5) > 1000


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(1, 1), (5, 1), (5, 5)])
def test_intervals_hold_the_true_difference_in_95_of_100_draws(seeds):
    rng, held = np.random.default_rng(14), []
    for draw in range(500):
        # Another training gives another skill; of one training alone nobody can tell by how much.
        skills = {name: skill + 0.01 * rng.normal(size=n) * (n > 1)
                  for name, skill, n in zip("ab", (0.80, 0.76), seeds)}
        found = contrast(resample(*simulated(rng, 400, skills), "macro_f1", 200, seed=draw),
                         ["a"], ["b"])
        held.append(found["low"] <= 4 <= found["high"])
    # With few seeds the tails are long, for the sake of small p-values: about 98 of 100.
    assert 0.93 <= np.mean(held) <= (0.97 if seeds == (1, 1) else 0.99)


@pytest.mark.slow
def test_where_nothing_differs_at_most_5_of_100_studies_find_something():
    rng, found = np.random.default_rng(5), []
    for draw in range(500):
        skills = {name: 0.8 + 0.01 * rng.normal(size=3) for name in "abcdef"}
        resamples = resample(*simulated(rng, 300, skills), "macro_f1", 200, seed=draw)
        found.append((compare_all(resamples, "abcdef")["p_holm"] < 0.05).any())
    assert np.mean(found) <= 0.05


# --- the paper's claims ---------------------------------------------------------------------------
def resamples_of(seed: int = 0, n: int = 2000, **accuracies: float) -> Resamples:
    """Of simulated models of the claims, all of accuracy 0.8 but for those named."""
    rng = np.random.default_rng(seed)
    names = {name for groups in CLAIMS.values() for group in groups for name in group}
    names = sorted(names - {SINGLE})
    skills = {name: np.full(1 if name in ENCODERS else 3, accuracies.get(name, 0.8))
              for name in names}
    return resample(*simulated(rng, n, skills), "macro_f1", 100)


ENCODERS = (*h.TEXT_STAGES, "seresnext")


def test_a_claim_holds_is_refuted_or_cannot_be_told():
    found = resamples_of(seresnext=0.5, **{"average-average-layers": 0.9})
    table = claims_table(found, "flaubert_title").set_index("claim")
    assert list(table.index) == list(CLAIMS)
    assert table.loc["text says more than the picture", "verdict"] == "holds"
    assert table.loc["text says more than the picture", "effect"] == pytest.approx(30, abs=3)
    against = table.loc["more layers in the classifier hurt"]
    assert against["verdict"] == "does not hold: the other way round" and against["effect"] < 0
    rest = table.drop(["text says more than the picture", "more layers in the classifier hurt"])
    assert set(rest["verdict"]) == {"cannot be told with n = 2000"}
    assert table.loc["fusion is better than the best single encoder", "second"] == "flaubert_title"
    assert (table["p_holm"] >= table["p"]).all()


def test_a_claims_verdict_stands_on_the_corrected_p():
    row = {"n": 50, "effect": 3.0, "p": 0.01}
    assert verdict(row | {"p_holm": 0.049}) == "holds"
    assert verdict(row | {"p_holm": 0.05}) == "cannot be told with n = 50"
    assert verdict(row | {"p_holm": 0.01, "effect": -3.0}) == "does not hold: the other way round"


def test_a_fusion_is_recommended_if_it_is_ahead_by_more_than_a_standard_error():
    value = {name: np.array([0.80]) for name in TEXT_ALONE} | {"concat-concat": np.array([0.82])}
    for spread, expected in ((0.005, "concat-concat"), (0.1, TEXT_ALONE[0])):
        rng = np.random.default_rng(0)
        drawn = {name: mean + rng.normal(scale=spread, size=(200, 1))
                 for name, mean in value.items()}
        assert recommend(Resamples(100, value, drawn), list(value)) == expected


def test_a_name_of_a_claims_group_is_that_of_a_scored_model(run):
    names = {name for groups in CLAIMS.values() for group in groups for name in group} - {SINGLE}
    assert names <= {*h.model_order(run)} and {*h.COMPARED} <= {*h.model_order(run)}


@pytest.mark.parametrize("less, verdict", [
    (0.80, "holds"), (0.85, "holds"), (0.70, "does not hold"),
    (0.79, "cannot be told with n = 20000")])
def test_a_split_is_as_good_if_it_loses_less_than_a_point(less, verdict):
    skills = {f"{split} {pair}": np.full(3, accuracy) for pair in PAIRS
              for split, accuracy in (("80-20", less), ("90-10", 0.80))}
    found = resample(*simulated(np.random.default_rng(7), 20_000, skills), "macro_f1", 50)
    row = compare_splits(found)
    assert row["verdict"] == verdict
    assert row["effect"] == pytest.approx(100 * (less - 0.80), abs=0.7)


@pytest.mark.parametrize("n", [500, 2000, 10_000])
def test_the_recommended_model_is_right_on_made_catalogues(n):
    """With a useful picture its fusion, with a weak or useless one never less than text alone
    beyond chance; by validation parts of a tenth of these catalogues.
    """
    gain = {"strong": 0.10, "weak": 0.01, "useless": -0.03}
    for kind, points in gain.items():
        skill, lost = {"average-average-text": 0.80, "concat-concat-text": 0.79,
                       "average-average": 0.80 + points, "concat-concat": 0.79 + points}, []
        for draw in range(20):
            rng = np.random.default_rng(draw)
            skills = {name: accuracy + 0.003 * rng.normal(size=3)
                      for name, accuracy in skill.items()}
            val = resample(*simulated(rng, n // 10, skills), "macro_f1", 100, seed=draw)
            lost.append(max(skill.values()) - skill[recommend(val, list(skill))])
        allowed = {"strong": 0.02, "weak": 0.015, "useless": 0.015}[kind]
        assert np.mean(lost) <= allowed * (1 if n > 500 else 2), (kind, n)


def test_the_test_part_decides_neither_the_recommended_model_nor_the_best_encoder(
        run, tmp_path, monkeypatch):
    rng, chosen, tables = np.random.default_rng(8), [], []
    skills = {name: rng.uniform(0.5, 0.9, size=2) for name in h.model_order(run)}
    parts = {"val": simulated(rng, 200, skills)}
    monkeypatch.setattr(h, "read_predictions", lambda run, part="test": parts[part])
    for _ in range(2):
        others = {name: rng.uniform(0.5, 0.9, size=2) for name in h.model_order(run)}
        parts["test"] = simulated(rng, 300, others)
        metrics = h.build_claims(run, "claims", tmp_path)
        chosen.append((metrics["recommended"], metrics["best single encoder"]))
        tables.append((tmp_path / "claims.csv").read_text())
    assert chosen[0] == chosen[1] and tables[0] != tables[1]
    assert chosen[0][1] == max(h.ENCODER_MODELS, key=lambda name: h.score(
        parts["val"][0], parts["val"][1][name][:, 0])["macro_f1"] + h.score(
        parts["val"][0], parts["val"][1][name][:, 1])["macro_f1"])
