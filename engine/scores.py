"""Scores with their intervals, and what can be told apart by them."""
from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import scipy.stats
from sklearn.metrics import accuracy_score, f1_score

from engine.runs import Run
from engine.variants import display_name

METRICS = ("accuracy", "macro_f1", "weighted_f1")


def score(truth: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """Accuracy, macro-F1 and weighted-F1 in [0, 1]; macro-F1 over the classes in `truth`.

    Shown in 02 and 08.
    """
    f1 = partial(f1_score, truth, predicted, labels=np.unique(truth), zero_division=0)
    return {"accuracy": float(accuracy_score(truth, predicted)),
            "macro_f1": float(f1(average="macro")),
            "weighted_f1": float(f1(average="weighted"))}


def mean_score(truth: Sequence[int], predicted: np.ndarray) -> dict[str, float]:
    """The mean over the seeds of `score`; `predicted` is [N], or [N, seeds]."""
    seeds = np.reshape(predicted, (len(truth), -1)).T
    return pd.DataFrame([score(truth, labels) for labels in seeds]).mean().to_dict()


def bootstrap(truth: Sequence[int], predicted: Sequence[int], resamples: int,
              seed: int = 0) -> dict[str, tuple]:
    """95% bootstrap interval of each metric: rows are drawn again `resamples` times. Where
    `predicted` is [N, seeds], of the seeds' mean, wider by what the choice of seeds adds.

    With few rows a resample misses whole classes and macro-F1 comes out too high; the BCa interval
    corrects such a bias. Above 2,000 rows, where its cost grows with their square and the bias is
    gone, it is the percentile interval. Shown in 08.
    """
    classes = count_classes(truth, predicted)
    cells = confusion_cells(truth, predicted, classes)

    def metrics(rows: np.ndarray) -> np.ndarray:
        scores = scores_of_cells(cells[rows], classes)
        return np.concatenate([scores.mean(0, keepdims=True), scores])

    rows = np.arange(len(cells))
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        # No spread at all gives NaN, handled below.
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        found = scipy.stats.bootstrap(
            (rows,), metrics, vectorized=False, rng=seed, n_resamples=resamples,
            method="BCa" if len(rows) <= 2000 else "percentile")
    value, drawn, intervals = metrics(rows), found.bootstrap_distribution, {}
    low, high = (np.where(np.isnan(end), value, end)[0] for end in found.confidence_interval)
    for i, metric in enumerate(METRICS):
        seeds = 1.96 * math.sqrt(seed_variance(value[1:, i], drawn[1:, i].T))
        below, above = (math.hypot(end[i] - value[0, i], seeds) for end in (low, high))
        ends = np.clip([value[0, i] - below, value[0, i] + above], 0, 1)
        intervals[metric] = tuple(map(float, ends))
    return intervals


def seed_variance(value: np.ndarray, drawn: np.ndarray) -> float:
    """What the choice of seeds adds to the variance of their mean: how far their scores, [seeds],
    lie apart, without what the choice of rows has to do with it, by their scores on rows drawn
    again, [resamples, seeds]. 0 for a single seed, which cannot tell.

    The components of a two-way layout: resampling both, rows and seeds, would count what they have
    to do with each other three times. Shown in 08.
    """
    seeds = len(value)
    if seeds == 1:
        return 0.0
    alone, together = drawn.var(0, ddof=1).mean(), drawn.mean(1).var(ddof=1)
    of_rows = (alone - together) * seeds / (seeds - 1)
    return max(0.0, value.var(ddof=1) - of_rows) / seeds


def count_classes(*labels: Sequence[int]) -> int:
    """How many classes there are at least, by the largest label of all; arrays or tensors."""
    return 1 + max(int(np.max(np.asarray(each))) for each in labels)


def confusion_cells(truth: Sequence[int], predicted: np.ndarray, classes: int) -> np.ndarray:
    """The cell of the confusion matrix, true * classes + predicted, of each row and seed, [N,
    seeds].
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    return truth[:, None] * classes + predicted.reshape(len(truth), -1)


def scores_of_cells(cells: np.ndarray, classes: int) -> np.ndarray:
    """The three metrics of each seed, [seeds, 3], from cells [N, seeds]."""
    seeds = cells.shape[1]
    places = cells + classes ** 2 * np.arange(seeds)
    counts = np.bincount(places.ravel(), minlength=seeds * classes ** 2)
    counts = counts.reshape(seeds, classes, classes)
    true, hits = counts.sum(2), np.diagonal(counts, axis1=1, axis2=2)
    f1 = 2 * hits / np.maximum(true + counts.sum(1), 1)
    macro = f1.sum(1) / (true > 0).sum(1)  # a class that is not there has an F1 of 0
    return np.stack([hits.sum(1) / len(cells), macro, (f1 * true).sum(1) / len(cells)], 1)


def score_row(model: str, truth: Sequence[int], predicted: Sequence[int], run: Run) -> dict:
    """A table's row: model, n, seeds, each metric in percent, its interval as <metric>_low and
    _high. `predicted` is [N], or [N, seeds].
    """
    predicted = np.asarray(predicted)
    row = {"model": model, "n": len(truth), "seeds": predicted.size // len(truth)}
    intervals = bootstrap(truth, predicted, run.profile.bootstrap)
    for metric, value in mean_score(truth, predicted).items():
        low, high = intervals[metric]
        row |= {metric: 100 * value, f"{metric}_low": 100 * low, f"{metric}_high": 100 * high}
    return row


def metric_name(metric: str) -> str:
    """How tables and figures call a metric: "macro-F1" for macro_f1."""
    return metric.replace("_f1", "-F1")


def score_table(rows: list[dict]) -> pd.DataFrame:
    """Rows of `score_row` for reading: model, n, seeds, and "value [low, high]" in percent per
    metric.
    """
    table = []
    for row in rows:
        cells = {"model": display_name(row["model"]), "n": row["n"], "seeds": row["seeds"]}
        for metric in METRICS:
            low, high = row[f"{metric}_low"], row[f"{metric}_high"]
            cells[metric_name(metric)] = f"{row[metric]:.1f} [{low:.1f}, {high:.1f}]"
        table.append(cells)
    return pd.DataFrame(table)


def mcnemar(truth: Sequence[int], first: Sequence[int],
            second: Sequence[int]) -> tuple[int, int, float]:
    """Rows only the first has right, rows only the second has right, the exact two-sided p."""
    truth, first, second = map(np.asarray, (truth, first, second))
    only_first = int(((first == truth) & (second != truth)).sum())
    only_second = int(((first != truth) & (second == truth)).sum())
    trials = only_first + only_second
    p = float(scipy.stats.binomtest(only_first, trials).pvalue) if trials else 1.0
    return only_first, only_second, p


# --- comparisons ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Resamples:
    """A metric of several models on the rows that are there, {model: [seeds]}, and on rows drawn
    again, the same rows for all models, {model: [resamples, seeds]}.
    """
    n: int
    value: dict[str, np.ndarray]
    drawn: dict[str, np.ndarray]


def resample(truth: Sequence[int], predicted: dict[str, np.ndarray], metric: str,
             resamples: int, seed: int = 0) -> Resamples:
    """`metric` of models whose labels are [N] or [N, seeds], on `resamples` draws of rows."""
    place, rng = METRICS.index(metric), np.random.default_rng(seed)
    classes = count_classes(truth, *predicted.values())
    rows = rng.integers(len(truth), size=(resamples, len(truth)))
    value, drawn = {}, {}
    for model, labels in predicted.items():
        cells = confusion_cells(truth, labels, classes)
        value[model] = scores_of_cells(cells, classes)[:, place]
        drawn[model] = np.array([scores_of_cells(cells[draw], classes)[:, place] for draw in rows])
    return Resamples(len(truth), value, drawn)


def contrast(found: Resamples, first: Sequence[str], second: Sequence[str]) -> dict:
    """The mean of the `first` models minus that of the `second`: effect in points, its 95% interval
    and two-sided p by the standard error over products (paired) and seeds together, and the share
    of the seeds in which the first are ahead. Of models with a single seed it says what these
    trained models do, not what others of their kind would. Shown in 08.
    """
    sides = {**{model: 1 / len(first) for model in first},
             **{model: -1 / len(second) for model in second}}
    ours = sum(found.value[model] for model in first) / len(first)
    theirs = sum(found.value[model] for model in second) / len(second)
    ahead = (ours > theirs).mean() + (ours == theirs).mean() / 2
    return {"n": found.n, **interval(found, sides), "ahead": float(ahead)}


def interval(found: Resamples, shares: dict[str, float]) -> dict:
    """Effect in points, its standard error, 95% interval and two-sided p of a sum of scores, each
    {model: its share in the sum}.
    """
    effect = sum(share * found.value[model].mean() for model, share in shares.items())
    rows = sum(share * found.drawn[model].mean(1) for model, share in shares.items())
    variance, doubt = rows.var(ddof=1), 0.0
    for model, share in shares.items():
        seeds = found.value[model]
        variance += share ** 2 * seed_variance(seeds, found.drawn[model])
        if len(seeds) > 1:
            spread = share ** 2 * seeds.var(ddof=1) / len(seeds)
            doubt += spread ** 2 / (len(seeds) - 1)
    # Satterthwaite: the fewer seeds the error is known from, the longer the tails.
    tails, error = scipy.stats.t(variance ** 2 / doubt if doubt else math.inf), math.sqrt(variance)
    half = tails.ppf(0.975) * error
    p = 2 * tails.sf(abs(effect) / error) if error > 0 else float(effect == 0)
    return {"effect": 100 * effect, "error": 100 * error, "low": 100 * (effect - half),
            "high": 100 * (effect + half), "p": float(p)}


def holm(p: Sequence[float]) -> np.ndarray:
    """p-values corrected for their number by Holm's procedure."""
    from statsmodels.stats.multitest import multipletests  # takes a second to import

    return multipletests(p, method="holm")[1]


def compare_all(found: Resamples, models: Sequence[str]) -> pd.DataFrame:
    """Each pair of models once: first, second, and what `contrast` gives; p_holm is corrected for
    the number of pairs.
    """
    rows = [{"first": first, "second": second, **contrast(found, [first], [second])}
            for first, second in itertools.combinations(models, 2)]
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p"]))


def who_beats_whom(comparisons: pd.DataFrame, level: float = 0.05) -> pd.DataFrame:
    """A square of models: 1 where the row's is better than the column's by the corrected test, -1
    where it is worse, 0 where nothing is shown.
    """
    models = list(dict.fromkeys([*comparisons["first"], *comparisons["second"]]))
    square = pd.DataFrame(0, index=models, columns=models)
    for row in comparisons[comparisons["p_holm"] < level].itertuples():
        sign = 1 if row.effect > 0 else -1
        square.loc[row.first, row.second], square.loc[row.second, row.first] = sign, -sign
    return square


def rows_to_separate(truth: Sequence[int], first: Sequence[int], second: Sequence[int],
                     points: float = 0.5, power: float = 0.8) -> int:
    """How many rows it needs to tell an accuracy from another one `points` higher, by McNemar's
    test at the 5% level, where the two models disagree as often as these (Connor 1987).
    """
    truth, first, second = map(np.asarray, (truth, first, second))
    gain = points / 100
    apart = max(np.mean((first == truth) != (second == truth)), gain)
    level, chance = scipy.stats.norm.ppf([0.975, power])
    spread = level * np.sqrt(apart) + chance * np.sqrt(max(apart - gain ** 2, 0))
    return math.ceil(spread ** 2 / gain ** 2)
