"""The paper's claims, tested on one split, and the model that the validation part recommends."""
from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from engine.scores import Resamples, contrast, holm
from engine.settings import TABLE_FUSIONS, TEXT_STAGES

PAIRS = TABLE_FUSIONS[:4]
TWO = ("average-average", "concat-concat")
TEXT_ALONE = tuple(f"{pair}-text" for pair in TWO)
SINGLE = "best single encoder"  # by macro-F1 of the validation part
# What is said to be better, and than what: the means of two groups of models.
CLAIMS = {
    "text says more than the picture": (TEXT_STAGES, ["seresnext"]),
    "titles say more than descriptions": (
        ["camembert_title", "flaubert_title"], ["camembert_description", "flaubert_description"]),
    "FlauBERT reads titles better than CamemBERT": (["flaubert_title"], ["camembert_title"]),
    "fusion is better than the best single encoder": (PAIRS, [SINGLE]),
    "text and picture are better than text alone": (TWO, TEXT_ALONE),
    "average is better than concatenation": (["average-average"], ["concat-concat"]),
    "two levels are better than one": (TWO, [f"{pair}-flat" for pair in TWO]),
    "more layers in the classifier hurt": (["average-average"], ["average-average-layers"]),
}


def claims_table(found: Resamples, single: str) -> pd.DataFrame:
    """A row for each of CLAIMS: claim, first and second (the groups), what `contrast` gives, p_holm
    (corrected for the number of claims) and the verdict. `single` is the best single encoder.
    """
    rows = []
    for claim, groups in CLAIMS.items():
        first, second = groups[0], [single] if groups[1] == [SINGLE] else groups[1]
        rows.append({"claim": claim, "first": " ".join(first), "second": " ".join(second),
                     **contrast(found, first, second)})
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"])
    return table.assign(verdict=[verdict(row) for row in table.to_dict("records")])


def verdict(row: dict, level: float = 0.05) -> str:
    """What a row of `claims_table` says of its claim."""
    if row["p_holm"] >= level:
        return f"cannot be told with n = {row['n']}"
    return "holds" if row["effect"] > 0 else "does not hold: the other way round"


AS_GOOD = 1.0  # points: who loses no more is as good


def compare_splits(found: Resamples) -> dict:
    """A row like those of `claims_table`: whether the fusions learn as well from 80% of the rows as
    from 90%, by the products that both splits test; `found` holds "80-20 <model>" and
    "90-10 <model>". It holds if the whole interval lies above a loss of AS_GOOD points.
    """
    first, second = [f"80-20 {pair}" for pair in PAIRS], [f"90-10 {pair}" for pair in PAIRS]
    row = {"claim": "80/20 is as good as 90/10", "first": "80-20", "second": "90-10",
           **contrast(found, first, second)}
    if row["low"] > -AS_GOOD:
        return row | {"verdict": "holds"}
    return row | {"verdict": "does not hold" if row["high"] < -AS_GOOD
                  else f"cannot be told with n = {found.n}"}


def recommend(val: Resamples, models: Sequence[str]) -> str:
    """The model to use, by the validation part alone: the best of `models` if it is ahead of the
    best model of text alone by more than one standard error, else that one.
    """
    def value(model: str) -> float:
        return val.value[model].mean()

    text, best = max(TEXT_ALONE, key=value), max(models, key=value)
    gain = contrast(val, [best], [text])
    return best if gain["effect"] > gain["error"] else text
