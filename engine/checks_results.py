"""The exercises of the notebooks 08 to 10."""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import scipy.optimize
from sklearn.metrics import f1_score

from engine.exercises import exercise, expect, same


# --- 08 Result tables -----------------------------------------------------------------------------
@exercise(hint="For each class: F1 = 2 * right / (rows of the class + rows called the class). Then "
               "take the plain mean of these.",
          insight="A class of two rows weighs as much as one of two thousand: that is why macro-F1 "
                  "moves more than accuracy, and why its intervals are wider.")
def macro_f1(answer: Callable) -> None:
    """Write a function of a confusion matrix [true, predicted] of counts that returns macro-F1, in
    [0, 1].

    Every class has rows.
    """
    same(answer(np.array([[8, 2], [2, 8]])), 0.8,
         "In [[8, 2], [2, 8]] each class has 8 of 10 right, and 10 rows are called it.")
    same(answer(np.array([[3, 1, 0], [1, 1, 0], [1, 0, 1]])), (2 / 3 + 1 / 2 + 2 / 3) / 3,
         "The F1 of the three classes of [[3, 1, 0], [1, 1, 0], [1, 0, 1]] are 2/3, 1/2 and 2/3.")
    found = answer(np.array([[90, 0], [10, 0]]))
    expect(math.isfinite(found), "No row is called the second class in [[90, 0], [10, 0]]: its F1 "
                                 "is 0, and no division by zero.")
    same(found, (180 / 190 + 0) / 2, "No row is called the second class in [[90, 0], [10, 0]]: its "
                                     "F1 is 0 and counts in the mean.")
    counts = np.random.default_rng(0).integers(1, 20, (5, 5))
    cells = np.indices((5, 5)).reshape(2, -1)
    truth, guess = (np.repeat(places, counts.ravel()) for places in cells)
    same(answer(counts), f1_score(truth, guess, average="macro"),
         "Five classes of different sizes come out wrong: each class counts alike.")


@exercise(hint="rows = rng.integers(n, size=n) once for each draw; both models are looked at on "
               "these very rows; np.percentile with 2.5 and 97.5.",
          insight="What both models have right or wrong cancels. Only rows on which they differ "
                  "make the interval wide, so a paired comparison needs fewer rows.")
def paired_interval(answer: Callable) -> None:
    """Write a function of two arrays [N] (1 where the first, the second model is right, else 0) and
    a generator rng that returns the 95% bootstrap interval (low, high) of the difference of their
    accuracies, from 2,000 draws of N rows.
    """
    rng = np.random.default_rng(1)
    right = (np.arange(400) < 300).astype(int)
    low, high = answer(right, right, rng)
    expect(low == high == 0, "Two models that are right on the same rows differ by nothing, "
                             f"whichever rows are drawn; yours: {low:.3f} to {high:.3f}. Look at "
                             "both on the same draw.")
    second = right.copy()
    second[:40], second[300:320] = 0, 1  # 40 rows are lost and 20 won
    low, high = answer(right, second, rng)
    half = 1.96 * math.sqrt(60 / 400 - (20 / 400) ** 2) / math.sqrt(400)
    expect(abs((low + high) / 2 - 20 / 400) < 0.2 * half,
           "The first model has 20 more of 400 rows right, so the interval lies around 0.05; yours "
           f"around {(low + high) / 2:.3f}.")
    wide = (high - low) / (2 * half)
    expect(0.9 < wide < 1.1, f"The interval is {wide:.2f} times as wide as it should be. Draw N "
                               "rows with replacement, and cut off 2.5% at each end.")


@exercise(hint="Sort; multiply the smallest by m, the next by m - 1, and so on; a corrected value "
               "is never below the one before it (np.maximum.accumulate) nor above 1; put them "
               "back in their order.",
          insight="Holm's procedure keeps the chance of one false finding at 5%, as Bonferroni's "
                  "does, and rejects at least as much.")
def holm_correction(answer: Callable) -> None:
    """Write a function of m p-values that returns them corrected by Holm's procedure, as an array
    in the same order.
    """
    found = np.asarray(answer([0.01, 0.02, 0.3]), dtype=float)
    expect(not np.allclose(found, [0.03, 0.06, 0.9]),
           "That is Bonferroni's correction: all by m. Holm's takes the smallest by m, the next by "
           "m - 1, the last by 1.")
    same(found, [0.03, 0.04, 0.3], "0.01, 0.02 and 0.3 become 0.01 x 3, 0.02 x 2 and 0.3 x 1.")
    same(answer([0.3, 0.01, 0.02]), [0.3, 0.03, 0.04],
         "The corrected values should come in the order of the given ones, not sorted.")
    same(answer([0.01, 0.02, 0.021]), [0.03, 0.04, 0.04],
         "Of 0.01, 0.02 and 0.021 the last would become 0.021, less than the 0.04 before it: it "
         "has to be at least as large.")
    same(answer([0.7, 0.8]), [1, 1], "No p-value is above 1.")


# --- 09 Analysis ----------------------------------------------------------------------------------
@exercise(hint="np.array_split(rng.permutation(N), folds) gives the folds; for each, fit on the "
               "rows of the others and write its predictions to its own places.",
          insight="Each score is then one of rows that the fit has not seen, and every row is used "
                  "for both.")
def cross_fit(answer: Callable) -> None:
    """Write a function of (fit, features [N, d], labels [N], folds) that returns a prediction for
    each row, [N], by a fit on the rows of the other folds.

    `fit(features, labels)` returns a function that predicts the labels of features.
    """
    rng = np.random.default_rng(2)
    for n, folds in ((20, 5), (23, 4)):  # 23 rows are not cut into 4 equal folds
        number, seen = rng.permutation(n), []
        features = np.stack([number, rng.normal(size=n)], 1)
        found = np.asarray(answer(_watched_fit(seen), features, 7 * number, folds))
        expect(found.shape == (n,), f"{n} rows want {n} predictions; yours: {list(found.shape)}.")
        leaked = int((found == -1).sum())
        expect(leaked == 0, f"{leaked} of {n} rows are predicted by a fit that has seen them.")
        lost = int((found != 7 * number).sum())
        expect(lost == 0, f"With {n} rows in {folds} folds {lost} rows get no prediction, or that "
                          "of another row.")
        expect(len(seen) == folds, f"{folds} folds are {folds} fits; yours: {len(seen)}.")
        expect(min(seen) >= n - math.ceil(n / folds),
               f"A fit has {min(seen)} of {n} rows. With {folds} folds it has those of all others.")


def _watched_fit(seen: list[int]) -> Callable:
    """A `fit` that notes how many rows it is given, and predicts -1 for a row that it has seen;
    the first feature is a row's number, and its label is 7 times that.
    """
    def fit(features: np.ndarray, labels: np.ndarray) -> Callable:
        known = np.asarray(features)[:, 0]
        expect(bool(np.array_equal(7 * known, labels)), "The labels that a fit is given are not "
                                                        "those of its rows.")
        seen.append(len(known))
        return lambda asked: np.where(np.isin(asked[:, 0], known), -1, 7 * asked[:, 0])

    return fit


@exercise(hint="order = np.argsort(confidence); in each of np.array_split(order, bins) take the "
               "means of confidence and right, and of the distances the mean over all rows.",
          insight="The distance is taken of each bin's means: rows are right or wrong, never 80% "
                  "right, so a distance of single rows says nothing of how honest 80% is.")
def expected_calibration_error(answer: Callable) -> None:
    """Write a function of confidence [N], right [N] (1 or 0) and bins that returns the expected
    calibration error over bins of as many rows each, sorted by confidence.
    """
    honest = np.repeat([0.5, 0.75], 4) + np.linspace(-1e-6, 1e-6, 8)
    right = np.array([1, 0, 1, 0, 1, 1, 0, 1])
    same(answer(honest, right, 2), 0,
         "Four rows of confidence 0.5 with two right, and four of 0.75 with three right, are "
         "calibrated.")
    same(answer(honest, 1 - right, 2), 0.25,
         "Four rows of confidence 0.5 with two right and four of 0.75 with one right are off by 0 "
         "and by 0.5.")
    crossed = np.array([1, 1, 1, 0, 1, 0, 1, 0])
    same(answer(honest, crossed, 2), 0.25,
         "One bin too careful and one too sure do not make up for each other.")
    rng = np.random.default_rng(3)
    confidence = rng.uniform(0.3, 1, 200)
    right = (rng.random(200) < confidence).astype(int)
    order = confidence.argsort().reshape(10, 20)
    wanted = np.abs(confidence[order].mean(1) - right[order].mean(1)).mean()
    same(answer(confidence, right, 10), wanted,
         "200 rows in another order come out wrong: sort them by confidence, right along with it, "
         "and put as many rows into each bin.")


@exercise(hint="A grid of T will do, such as np.geomspace(0.1, 10, 400): for each the mean of -log "
               "softmax(log p / T) at the label, and the T where it is lowest.",
          insight="A temperature changes no prediction, only how sure it is: accuracy cannot "
                  "choose it. It is fitted on rows that are not scored afterwards.")
def temperature(answer: Callable) -> None:
    """Write a function of validation probabilities [N, classes] and labels [N] that returns the T
    for which softmax(log p / T) has the lowest mean negative log-likelihood.
    """
    for seed, sure in enumerate((2.0, 0.5, 1.3)):
        rng = np.random.default_rng(seed)
        true = rng.dirichlet(np.ones(5), size=2000) + 1e-4
        labels = np.array([rng.choice(5, p=row / row.sum()) for row in true])
        said = _tempered(np.log(true), 1 / sure)
        found = float(answer(said, labels))
        wanted = _best_temperature(np.log(said), labels)
        state = "too sure" if wanted > 1 else "not sure enough"
        expect(math.isfinite(found) and found > 0, f"T is a number above 0, not {found}.")
        expect(abs(math.log(found / wanted)) < 0.03,
               f"For a model that is {state} T is {wanted:.2f}; yours: {found:.2f}."
               + (" That is 1 / T." if abs(math.log(found * wanted)) < 0.03 else ""))


def _tempered(logits: np.ndarray, t: float) -> np.ndarray:
    """softmax(logits / T), [N, classes]."""
    raised = np.exp(logits / t - (logits / t).max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def _best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T of the lowest mean negative log-likelihood, between 0.1 and 10."""
    def loss(log_t: float) -> float:
        return -np.log(_tempered(logits, math.exp(log_t))[range(len(labels)), labels]).mean()

    return math.exp(scipy.optimize.minimize_scalar(loss, bounds=(-2.3, 2.3), method="bounded").x)


@exercise(hint="The logit is w . mean(v) + b. Only one of the v in the mean changes: by how much?",
          insight="White is no zero: a white tile has a vector of its own, and a part in the logit "
                  "too. The change is known before the picture is painted.")
def painted_white(answer: Callable) -> None:
    """Write a function of tiles [tiles, d] (their vectors), white [d] (that of a white tile) and
    weight [d] (the head's, of one class) that returns how much the logit changes if this one tile
    is painted white, for each tile, [tiles].

    P is the mean of the tiles' vectors.
    """
    rng = np.random.default_rng(4)
    for count, width in ((4, 3), (9, 5)):
        tiles, white = rng.normal(size=(count, width)), rng.normal(size=width)
        weight = rng.normal(size=width)
        found = np.asarray(answer(tiles, white, weight))
        painted = np.repeat(tiles[None], count, 0)  # one picture for each tile that is painted
        painted[range(count), range(count)] = white
        wanted = painted.mean(1) @ weight - tiles.mean(0) @ weight
        expect(found.shape != wanted.shape or not np.allclose(found, -wanted),
               "The sign is turned: after minus before.")
        expect(found.shape != wanted.shape or not np.allclose(found, -tiles @ weight / count),
               "A white tile does not drop out: its own vector comes in.")
        same(found, wanted, f"Compared with painting each of {count} tiles and averaging again, "
                            "the change is another.")


# --- 10 The paper and its code --------------------------------------------------------------------
STATED = ["source", "split", "rows", "evaluated_on", "n"]


@exercise(hint="Five columns have to agree (source, split, rows, evaluated_on, n); then ask what "
               '"unstated" and "random" mean when they stand twice.',
          insight="Of all pairs few are left. What is not stated is not the same, and a random cut "
                  "is another one in each work.")
def comparable(answer: Callable, published: pd.DataFrame) -> None:
    """Write a function of two rows of the table of published figures that says (True or False)
    whether, by what they state, they stand on the same products.

    That is: the same source, split, rows, part (evaluated_on) and n; what is unstated does not
    count as the same; and a split that is called random is the same only within one reference.
    """
    for (_, first), (_, second) in itertools.combinations(published.iterrows(), 2):
        stated = first["rows"] != "unstated" and second["rows"] != "unstated"
        differ = [column for column in STATED if first[column] != second[column]]
        random = "random" in first["split"] and first["reference"] != second["reference"]
        names = " and ".join(f'"{row["model"]}" ({row["source"]}, {row["reference"]})'
                             for row in (first, second))
        found = bool(answer(first, second))
        if found:
            expect(stated, f"{names} do not state their rows, so nobody knows.")
            expect(not differ, f"{names} differ in {', '.join(differ)}.")
            expect(not random, f"{names} cut at random, each for itself.")
        expect(found or not stated or bool(differ) or random,
               f"{names} state the same source, split, rows, part and n.")


@exercise(hint="The variance of the difference is the sum of both: half = 1.96 * "
               "sqrt(a (100 - a) / n + b (100 - b) / n), in points.",
          insight="Two intervals may overlap and the difference still be told; one score may lie "
                  "outside of the other's interval and it may not.")
def scores_apart(answer: Callable) -> None:
    """Write a function of two accuracies in percent and n that says (True or False) whether they
    can be told apart at the 5% level, by the normal approximation, if each was measured on n test
    products of its own.
    """
    cases = [(93.20, 92.75, 5503), (92.75, 93.20, 5503), (93.0, 92.2, 5503), (93.0, 91.9, 5503),
             (91.9, 93.0, 5503), (50.0, 54.0, 1000), (50.0, 55.0, 1000), (93.20, 92.75, 60000)]
    for first, second, n in cases:
        halves = [1.96 * math.sqrt(a * (100 - a) / n) for a in (first, second)]
        told = abs(first - second) > math.hypot(*halves)
        if bool(answer(first, second, n)) == told:
            continue
        found = (f"{first} and {second} with n = {n:,} are {abs(first - second):.2f} points apart; "
                 f"the half-widths are {halves[0]:.2f} and {halves[1]:.2f} points, that of the "
                 f"difference {math.hypot(*halves):.2f}.")
        expect(told, f"{found} They cannot be told apart: the difference is less sure than each.")
        expect(not told, f"{found} They can be told apart, whether or not the intervals overlap.")


@exercise(hint="One model alone is right on b products, the other alone on c: b + c = share * n, "
               "b - c = gain * n / 100, and z = (b - c) / sqrt(b + c). Solve z = 1.96.",
          insight="So the paper's order could be told, if its fusions are right and wrong together "
                  "nearly always. That can be looked up in predictions, not in a table of scores.")
def most_disagreement(answer: Callable) -> None:
    """Write a function of a gain in points of accuracy and of n that returns the largest share of
    the n test products, in [0, 1], on which exactly one of two models may be right for McNemar's
    test (z = 1.96) to tell them apart.
    """
    for gain, n in ((0.45, 5503), (1.0, 5503), (0.5, 1100), (2.0, 1000)):
        found = float(answer(gain, n))
        wanted = n * (gain / 100) ** 2 / 1.96 ** 2
        for factor, what in ((100, "percent"), (n, "a number of them")):
            expect(not math.isclose(found, factor * wanted, rel_tol=0.01),
                   f"A share of the products, not {what}.")
        same(found / wanted, 1, f"With a gain of {gain} points and n = {n:,} b - c is "
                                f"{gain * n / 100:.1f}; with your share z is "
                                f"{_mcnemar_z(gain, n, found):.2f} and not 1.96.", 0.01)


def _mcnemar_z(gain: float, n: int, share: float) -> float:
    """McNemar's z where exactly one of two models is right on this share of n products."""
    return gain / 100 * n / math.sqrt(share * n) if share > 0 else math.inf
