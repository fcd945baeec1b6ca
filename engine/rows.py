"""The rows of its catalogue that a run is about: labels, texts, pictures, each with its digest."""
from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from engine.catalogue import (
    LAYOUTS,
    catalogue_folder,
    classes_file,
    find_layout,
    read_catalogue,
    refuse_bad_rows,
)
from engine.files import file_state, hash_files, hash_json
from engine.fingerprint import content
from engine.pictures import picture_faults
from engine.runs import Run
from engine.settings import FIELDS, choices, one_of
from engine.texts import has_words

LABELS, TEXTS = ("product_id", "label_id"), ("product_id", *FIELDS)


def select_rows(products: pd.DataFrame, rows: str, limit: int = 0, seed: int = 0) -> pd.DataFrame:
    """The rows that a protocol keeps: "described" (by a word, not by `<br />` alone) or "all".

    Under "all" a missing description is the empty text. The encoders read it as `<s></s>` and
    learn during fine-tuning what a missing text means; its vector is theirs, and so within the
    distribution that standardising sees, as a vector of zeros would not be. To TF-IDF it is an
    empty document.

    `limit` above 0 keeps so many of them: at least 3 of each class (or all, if it has fewer), and
    class shares as close as whole rows allow (Sainte-Lague's method). `seed` chooses, the order of
    the file does not. ValueError, with the smallest limit that works, if no split could be made.
    """
    if one_of("rows", rows, choices("rows")) == "described":
        products = products[products["description"].map(has_words)]
    products = products.reset_index(drop=True)
    if products.empty:
        raise ValueError(f"no row is left by rows={rows!r}; use rows='all', or get the tables "
                         "again")
    if not limit or limit >= len(products):
        return products
    classes = products["label_id"].nunique()
    if limit < 3 * classes:
        raise ValueError(f"limit={limit} is too small for {classes} classes; set it to at least "
                         f"{3 * classes}")
    labels = products.sort_values("product_id")["label_id"].sample(frac=1, random_state=seed)
    turn = labels.groupby(labels).cumcount()  # 0 for a class's first row
    claim = (labels.map(labels.value_counts()) / (turn + 0.5)).mask(turn < 3, np.inf)
    kept = claim.sort_values(ascending=False, kind="stable").index[:limit]
    return products.loc[kept.sort_values()].reset_index(drop=True)


def usable_products(run: Run) -> pd.DataFrame:
    """The products of the run's catalogue, as `load_catalogue` gives them.

    Under bad_rows="stop" all, or ValueError; under "set_aside" those without a fault.
    """
    return _usable(*_source(run)).copy()


def _source(run: Run) -> tuple:
    """What decides which products can be used: folder, state of its tables, policy, and, where rows
    may be set aside, (path, what is wrong) of pictures.
    """
    folder = catalogue_folder(run)
    layout = LAYOUTS[find_layout(folder)]
    tables = [folder / layout["x"], folder / layout["y"], classes_file(folder)]
    state = tuple(map(file_state, tables))
    if run.profile.bad_rows == "stop":
        return folder, state, "stop", ()
    paths = _read(folder, state)[0]["picture"].tolist()
    faults = tuple(pair for pair in zip(paths, picture_faults(paths)) if pair[1])
    return folder, state, "set_aside", faults


@lru_cache(maxsize=2)
def _read(folder: Path, state: tuple) -> tuple[pd.DataFrame, pd.DataFrame]:
    return read_catalogue(folder)


@lru_cache(maxsize=4)
def _usable(folder: Path, state: tuple, bad_rows: str, faults: tuple) -> pd.DataFrame:
    products, bad = _read(folder, state)
    if bad_rows == "stop":
        refuse_bad_rows(folder, bad)
    return products[~products["picture"].isin(dict(faults))].reset_index(drop=True)


def _set_aside(folder: Path, state: tuple, bad_rows: str, faults: tuple) -> pd.DataFrame:
    products, bad = _read(folder, state)
    why = products["picture"].map(dict(faults)).dropna()
    unseen = products.loc[why.index, ["product_id"]].assign(why=why).rename_axis("row")
    return pd.concat([bad, unseen.reset_index()]).sort_values("row", ignore_index=True)


def chosen_products(run: Run) -> pd.DataFrame:
    """The run's rows of its catalogue, as `load_catalogue` gives them, in order of product id."""
    return _chosen(*_choice(run)).copy()


def _choice(run: Run) -> tuple:
    """What decides which rows are chosen, and what they hold."""
    seed = run.seed if run.profile.limit else 0
    return run.profile.rows, run.profile.limit, seed, *_source(run)


@lru_cache(maxsize=4)
def _chosen(rows: str, limit: int, seed: int, *source: object) -> pd.DataFrame:
    products = select_rows(_usable(*source), rows, limit, seed)
    return products.sort_values("product_id", ignore_index=True)


@lru_cache(maxsize=16)
def _digest(columns: tuple[str, ...], *choice: object) -> str:
    return hash_json(_chosen(*choice)[list(columns)].to_dict("list"))


def labels_digest(run: Run) -> str:
    """The hash of what `chosen_labels` gives."""
    return _digest(LABELS, *_choice(run))


def set_aside_digest(run: Run) -> str:
    """The hash of what `set_aside` gives."""
    return hash_json(set_aside(run).astype(str).to_dict("list"))


@content(set_aside_digest)
def set_aside(run: Run) -> pd.DataFrame:
    """[row, product_id, why] of the labelled rows that the run goes on without, by row number."""
    return _set_aside(*_source(run)).copy()


@content(labels_digest)
def chosen_labels(run: Run) -> pd.DataFrame:
    """[product_id, label_id] of the run's rows, in order of product id."""
    return chosen_products(run)[list(LABELS)]


def texts_digest(run: Run) -> str:
    """The hash of what `chosen_texts` gives."""
    return _digest(TEXTS, *_choice(run))


@content(texts_digest)
def chosen_texts(run: Run) -> pd.DataFrame:
    """[product_id, title, description] of the run's rows as they are, in order of product id."""
    return chosen_products(run)[list(TEXTS)]


def pictures_digest(run: Run) -> str:
    """The hash of the run's product ids and of what their pictures' files hold."""
    products = chosen_products(run)
    return hash_json([products["product_id"].tolist(), hash_files(products["picture"].tolist())])


@content(pictures_digest)
def chosen_pictures(run: Run) -> pd.DataFrame:
    """[product_id, picture (path)] of the run's rows, in order of product id."""
    return chosen_products(run)[["product_id", "picture"]]
