"""The challenge's file: the unlabelled products, predicted."""
from __future__ import annotations

from pathlib import Path

import pandas as pd

import helpers as h
from engine.catalogue import (
    LAYOUTS,
    catalogue_folder,
    check_pictures,
    find_layout,
    load_test_products,
    test_table,
)
from engine.files import put_in_place
from engine.runs import Run


def write_submission(run: Run, variant: str) -> Path:
    """Predict the challenge's unlabelled products; the path of the file to submit.

    ENS: comma-separated, header `,prdtypecode`; SIGIR: tab-separated, header `Integer_id`,
    `Prdtypecode`. The first column is the test table's index.
    """
    folder = catalogue_folder(run)
    layout, products = LAYOUTS[find_layout(folder)], load_test_products(folder)
    check_pictures(products, "unpack those of the unlabelled products there")
    classifier = h.load_classifier(run, variant)
    labels = classifier.probabilities(products).argmax(-1).numpy()
    codes = classifier.classes["prdtypecode"].to_numpy()[labels]
    table = pd.DataFrame({layout["label"]: codes}, index=products.index)
    name = Path(test_table(folder))
    path = run.folder / "submissions" / variant
    path = path / f"y{name.stem[1:]}_pred{name.suffix}"  # SIGIR's naming
    path.parent.mkdir(parents=True, exist_ok=True)
    with put_in_place(path) as partial:
        table.to_csv(partial, sep=layout["separator"])
    return path
