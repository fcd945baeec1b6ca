"""Splits: parts disjoint, whole, of the right size, stratified, and the same for the same seed."""
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

import helpers as h

SIZES = {3: 31, 7: 120, 12: 260, 18: 77, 26: 49}  # rows of five classes


@pytest.fixture
def products():
    labels = [label for label, size in SIZES.items() for _ in range(size)]
    table = pd.DataFrame({"label_id": labels, "product_id": [(i * 7919) % 100_003 for i in range(len(labels))]})
    return table.sample(frac=1, random_state=1, ignore_index=True)


def ids(table: pd.DataFrame, part: str) -> set[int]:
    return set(table.loc[table["part"] == part, "product_id"])


@pytest.mark.parametrize("seed", [0, 1, 17])
@pytest.mark.parametrize("split, share", [("90-10", 0.10), ("80-20", 0.20)])
def test_parts_are_disjoint_whole_of_size_and_stratified(products, split, share, seed):
    table, n = h.make_split(products, split, seed), len(products)
    train, val, test = (ids(table, part) for part in ("train", "val", "test"))
    assert not train & val and not train & test and not val & test
    assert train | val | test == set(products["product_id"]) and len(table) == n
    assert abs(len(test) - share * n) <= 1 and abs(len(val) - 0.1 * (1 - share) * n) <= 2
    assert dict(zip(table["product_id"], table["label_id"])) == dict(zip(products["product_id"], products["label_id"]))
    for label, size in SIZES.items():
        of_class = table[table["label_id"] == label]["part"].value_counts()
        assert abs(of_class["test"] - share * size) <= 1
        assert abs(of_class["val"] - 0.1 * (1 - share) * size) <= 1


def test_rows_are_in_order_of_product_id(products):
    assert h.make_split(products, "90-10", 0)["product_id"].is_monotonic_increasing


def test_same_seed_same_split_other_seed_other_split(products):
    first = h.make_split(products, "90-10", 0)
    assert_frame_equal(first, h.make_split(products, "90-10", 0))
    for seed in (1, 2):
        assert ids(h.make_split(products, "90-10", seed), "test") != ids(first, "test")


def test_split_does_not_depend_on_the_order_of_the_file(products):
    """Two downloads that list the same products in another order are the same data."""
    other = products.sort_values("product_id", ascending=False, ignore_index=True)
    assert_frame_equal(h.make_split(products, "90-10", 0), h.make_split(other, "90-10", 0))


def test_input_is_not_changed(products):
    before = products.copy()
    h.make_split(products, "80-20", 3)
    assert_frame_equal(products, before)


def test_class_with_too_few_rows_is_named(products):
    few = products.drop(products[products["label_id"] == 26].index[2:])
    with pytest.raises(ValueError, match="class 26 has 2 rows.*rows='all'"):
        h.make_split(few, "90-10", 0)


def test_unknown_split_is_refused(run):
    with pytest.raises((ValueError, KeyError), match="70-30"):
        h.make_split(pd.DataFrame({"product_id": range(30), "label_id": [0, 1, 2] * 10}), "70-30", 0)


def test_stage_keeps_the_rows_that_the_protocol_names(make_run, tiny_ens):
    described, everything = make_run(), make_run(rows="all", split="80-20")
    products = h.load_catalogue(tiny_ens)
    for run, rows in ((described, products[products["description"] != ""]), (everything, products)):
        h.split_stage(run)
        assert set(h.read_split(run)["product_id"]) == set(rows["product_id"])
        metrics = h.read_manifest(run, "splits")["metrics"]
        assert metrics == h.read_split(run)["part"].value_counts().to_dict()
    assert len(h.read_split(described)) == 55 and len(h.read_split(everything)) == 60
