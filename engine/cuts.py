"""Cutting rows in two, stratified by class: single rows, or whole groups of duplicates."""
from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, train_test_split


def cut_rows(rows: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(the rest, a stratified random share of the rows, at least one row for each class)."""
    labels = rows["label_id"]
    size = max(math.ceil(share * len(rows)), labels.nunique())
    return tuple(train_test_split(rows, test_size=size, stratify=labels, random_state=seed))


def cut_groups(rows: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(the rest, a share of the rows), no group in both: the fold with the fairest class counts."""
    labels = rows["label_id"].to_numpy()
    fair = share * np.bincount(labels)
    groups, largest, n = rows["group"].nunique(), np.bincount(labels).max(), round(1 / share)
    if min(groups, largest) < n:
        raise ValueError(f"{groups} groups of duplicates, and at most {largest} rows of a class, "
                         f"cannot be cut into {n} folds; use grouped=False or more rows")

    def unfairness(cut: tuple[np.ndarray, np.ndarray]) -> float:
        return np.abs(np.bincount(labels[cut[1]], minlength=len(fair)) - fair).sum()

    folds = StratifiedGroupKFold(n, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class has fewer rows than folds: fine
        rest, part = min(folds.split(rows, labels, rows["group"]), key=unfairness)
    return rows.iloc[rest], rows.iloc[part]
