"""Splits: parts disjoint, whole, of the right size, stratified, and the same for the same seed."""
import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

import helpers as h
from engine.catalogue import CLASSES

SIZES = {3: 31, 7: 120, 12: 260, 18: 77, 26: 49}  # rows of five classes


@pytest.fixture
def products():
    labels = [label for label, size in SIZES.items() for _ in range(size)]
    ids = [(i * 7919) % 100_003 for i in range(len(labels))]
    table = pd.DataFrame({"label_id": labels, "product_id": ids})
    return table.sample(frac=1, random_state=1, ignore_index=True)


def ids(table: pd.DataFrame, part: str) -> set[int]:
    return set(table.loc[table["part"] == part, "product_id"])


def labels_of(table: pd.DataFrame) -> dict[int, int]:
    return dict(zip(table["product_id"], table["label_id"]))


@pytest.mark.parametrize("seed", [0, 1, 17])
@pytest.mark.parametrize("split, share", [("90-10", 0.10), ("80-20", 0.20)])
def test_parts_are_disjoint_whole_of_size_and_stratified(products, split, share, seed):
    table, n = h.make_split(products, split, seed), len(products)
    train, val, test = (ids(table, part) for part in ("train", "val", "test"))
    assert not train & val and not train & test and not val & test
    assert train | val | test == set(products["product_id"]) and len(table) == n
    assert abs(len(test) - share * n) <= 1 and abs(len(val) - 0.1 * (1 - share) * n) <= 2
    assert labels_of(table) == labels_of(products)
    for label, size in SIZES.items():
        of_class = table[table["label_id"] == label]["part"].value_counts()
        assert abs(of_class["test"] - share * size) <= 1
        assert abs(of_class["val"] - 0.1 * (1 - share) * size) <= 1


def test_held_out_rows_come_from_the_training_part_alone(products):
    plain = h.make_split(products, "90-10", 0)
    table = h.make_split(products, "90-10", 0, held_out=0.2)
    for part in ("val", "test"):
        assert ids(table, part) == ids(plain, part)
    train, fusion = ids(table, "train"), ids(table, "fusion")
    assert not train & fusion and train | fusion == ids(plain, "train")
    in_training = plain[plain["part"] == "train"]["label_id"].value_counts()
    for label, rows in in_training.items():
        held_out = ((table["label_id"] == label) & (table["part"] == "fusion")).sum()
        assert abs(held_out - 0.2 * rows) <= 1
    groups = products["product_id"].to_numpy() // 700
    table = h.make_split(products, "90-10", 0, groups, held_out=0.2)
    assert (table.groupby(table["product_id"] // 700)["part"].nunique() == 1).all()
    assert 0.1 < (table["part"] == "fusion").sum() / len(table) < 0.2
    few = pd.DataFrame({"label_id": [0] * 3 + [1] * 40, "product_id": range(43)})
    with pytest.raises(ValueError, match="needs 4 rows of each class.*10: 3"):
        h.make_split(few, "90-10", 0, held_out=0.2, codes=[10, 2280])


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
    with pytest.raises(ValueError, match=r"needs 3 rows of each class.* \{1301: 2\}.*rows='all'"):
        h.make_split(few, "90-10", 0, codes=pd.read_csv(CLASSES)["prdtypecode"])


def test_unknown_split_is_refused():
    table = pd.DataFrame({"product_id": range(30), "label_id": [0, 1, 2] * 10})
    with pytest.raises((ValueError, KeyError), match="70-30"):
        h.make_split(table, "70-30", 0)


def test_stage_keeps_the_rows_that_the_protocol_names(make_run, tiny_ens):
    described, everything = make_run(), make_run(rows="all", split="80-20")
    products = h.load_catalogue(tiny_ens)
    with_description = products[products["description"] != ""]
    for run, rows in ((described, with_description), (everything, products)):
        h.stage(run, "splits")
        assert set(h.read_split(run)["product_id"]) == set(rows["product_id"])
        metrics = h.read_manifest(run, "splits")["metrics"]
        assert metrics == h.read_split(run)["part"].value_counts().to_dict()
    assert len(h.read_split(described)) == 55 and len(h.read_split(everything)) == 60


# --- limit ----------------------------------------------------------------------------------------
@pytest.fixture
def described(products):
    return products.assign(description="x")


def test_limit_keeps_class_shares_and_three_rows_of_each_class(described):
    for limit in (60, 100, 333):
        kept = h.select_rows(described, "all", limit, seed=0)
        counts = kept["label_id"].value_counts()
        assert len(kept) == limit and counts.min() >= 3 and set(counts.index) == set(SIZES)
        for label, size in SIZES.items():
            assert abs(counts[label] - limit * size / len(described)) <= 1
        assert set(kept["product_id"]) <= set(described["product_id"])
        assert kept["product_id"].is_unique


def test_rare_class_keeps_its_three_rows():
    labels = [0] * 500 + [1] * 500 + [2] * 4
    table = pd.DataFrame({"label_id": labels, "product_id": range(1004)})
    counts = h.select_rows(table, "all", 60)["label_id"].value_counts()
    assert counts[2] == 3 and abs(counts[0] - counts[1]) <= 1 and counts.sum() == 60


def test_limit_follows_the_seed_and_not_the_order_of_the_file(described):
    first = h.select_rows(described, "all", 80, seed=4)
    again = h.select_rows(described[::-1], "all", 80, seed=4)
    other = h.select_rows(described, "all", 80, seed=5)
    assert set(first["product_id"]) == set(again["product_id"])
    assert set(first["product_id"]) != set(other["product_id"])
    places = described.set_index("product_id").index.get_indexer(first["product_id"])
    assert (places[1:] > places[:-1]).all()  # in the order of the file


def test_limit_above_the_rows_keeps_them_all(described):
    for limit in (0, len(described), 10_000):
        assert_frame_equal(h.select_rows(described, "all", limit), described)


@pytest.fixture
def of_all_classes():
    labels = [i % 27 for i in range(5400)]
    return pd.DataFrame({"label_id": labels, "product_id": range(5400)})


@pytest.mark.parametrize("split", h.SPLITS)
@pytest.mark.parametrize("limit", [81, 300])
def test_a_small_choice_has_as_many_validation_and_test_rows_as_classes(
        of_all_classes, split, limit):
    chosen = h.select_rows(of_all_classes, "all", limit)
    parts = h.make_split(chosen, split, 0).groupby("part")["label_id"]
    assert parts.size().sum() == limit and parts.size().min() >= 27
    assert parts.nunique().eq(27).all()


def test_limit_that_no_split_can_use_names_the_smallest_that_works(of_all_classes):
    said = "limit=80 is too small for 27 classes; set it to at least 81"
    with pytest.raises(ValueError, match=said):
        h.select_rows(of_all_classes, "all", 80)


def test_stage_reads_limit_and_grouped(make_run):
    """By the rows and the groups that these settings choose, not by the settings' names."""
    plain, limited, grouped = make_run(), make_run(limit=50), make_run(grouped=True)
    for run in (plain, limited, grouped):
        h.stage(run, "splits")
        assert not {"rows", "limit", "grouped"} & set(h.read_manifest(run, "splits")["settings"])
    assert len(h.read_split(limited)) == 50 and len(h.read_split(grouped)) == 55
    contents = [h.read_manifest(run, "splits")["contents"] for run in (plain, limited, grouped)]
    assert contents[0]["chosen_labels"] != contents[1]["chosen_labels"]
    assert contents[0]["chosen_groups"] != contents[2]["chosen_groups"]
    assert contents[0]["chosen_labels"] == contents[2]["chosen_labels"]


# --- duplicates kept together ---------------------------------------------------------------------
def test_groups_are_in_one_part_and_shares_are_close(products):
    places = pd.Series(range(len(products))).sample(frac=1, random_state=2).to_numpy()
    groups = places // 3 % 150  # about 150 groups of 3 or 4 rows, of any classes
    for split, share in h.SPLITS.items():
        table = h.make_split(products, split, 0, groups)
        group_of = pd.Series(groups, index=products["product_id"])
        group = group_of[table["product_id"]].to_numpy()
        assert (table.groupby(group)["part"].nunique() == 1).all()
        assert set(table["product_id"]) == set(products["product_id"])
        for label, size in SIZES.items():
            test = ((table["label_id"] == label) & (table["part"] == "test")).sum()
            assert abs(test - share * size) <= 0.05 * size + 2
        assert_frame_equal(table, h.make_split(products[::-1], split, 0, groups[::-1]))


def test_class_whose_rows_are_all_copies_is_kept_for_training_or_named(products):
    one = products["label_id"].where(products["label_id"] == 26, products["product_id"])
    table = h.make_split(products, "80-20", 0, one)
    # The fold of fair counts is another.
    assert set(table.loc[table["label_id"] == 26, "part"]) == {"train"}
    labels = [i % 20 for i in range(300)]
    copies = pd.DataFrame({"label_id": labels, "product_id": range(300)})
    with pytest.raises(ValueError, match=r"code \d+ has no training row.*grouped=False"):
        h.make_split(copies, "80-20", 0, copies["label_id"])
    places = [place % 4 for place in range(len(products))]
    with pytest.raises(ValueError, match="4 groups of duplicates.*5 folds.*grouped=False"):
        h.make_split(products, "80-20", 0, places)


def test_the_seed_decides_a_grouped_split(products):
    groups = products["product_id"].to_numpy() // 2
    first, second = (h.make_split(products, "80-20", seed, groups) for seed in (0, 1))
    assert (first["part"] != second["part"]).any()


# --- any catalogue --------------------------------------------------------------------------------
@given(st.lists(st.integers(3, 60), min_size=2, max_size=12), st.sampled_from(list(h.SPLITS)),
       st.integers(0, 2 ** 32 - 1), st.sampled_from([0, 1, 3]), st.randoms(use_true_random=False))
def test_any_catalogue_is_cut_into_parts_that_add_up(sizes, split, seed, copies, order):
    """Rows of each class; `copies` rows share a group, 0 for no groups."""
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    order.shuffle(labels)
    products = pd.DataFrame({"label_id": labels, "product_id": range(100, 100 + len(labels))})
    groups = products["product_id"].to_numpy() // copies if copies else None
    try:
        table = h.make_split(products, split, seed, groups)
    except ValueError as error:  # of groups alone: three rows of each class are enough
        assert copies and "grouped=False" in str(error)
        return
    assert_frame_equal(table.drop(columns="part"), products[["product_id", "label_id"]])
    assert set(table.loc[table["part"] == "train", "label_id"]) == set(labels)
    counts = table["part"].value_counts()
    if groups is None:
        test = max(math.ceil(h.SPLITS[split] * len(labels)), len(sizes))
        val = max(math.ceil(0.1 * (len(labels) - test)), len(sizes))
        assert counts.to_dict() == {"train": len(labels) - test - val, "val": val, "test": test}
    else:
        assert set(counts.index) == {"train", "val", "test"}
        assert (table.groupby(groups)["part"].nunique() == 1).all()
    shuffled = products.sample(frac=1, random_state=1)
    again = shuffled["product_id"].to_numpy() // copies if copies else None
    assert_frame_equal(h.make_split(shuffled, split, seed, again), table)
