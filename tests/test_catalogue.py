"""Catalogue: both public layouts give the same frame; what does not fit is refused by name."""
from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

import helpers as h
from conftest import tiny_products

COLUMNS = ["title", "description", "product_id", "image_id", "prdtypecode", "label_id", "picture"]


def edit(path: Path, change) -> None:
    """Rewrite a table of a catalogue with `change(frame)`."""
    separator = "\t" if path.suffix == ".tsv" else ","
    table = change(pd.read_csv(path, sep=separator, index_col=0, keep_default_na=False))
    table.to_csv(path, sep=separator)


def test_both_layouts_load_to_equal_frames(tiny_ens, tiny_sigir):
    ens, sigir = h.load_catalogue(tiny_ens), h.load_catalogue(tiny_sigir)
    assert (h.find_layout(tiny_ens), h.find_layout(tiny_sigir)) == ("ENS", "SIGIR")
    assert sorted(ens) == sorted(COLUMNS)
    assert_frame_equal(ens.drop(columns="picture"), sigir.drop(columns="picture"), check_like=True)
    assert [Path(path).name for path in ens["picture"]] == [Path(path).name for path in sigir["picture"]]


@pytest.mark.parametrize("layout", ["tiny_ens", "tiny_sigir"])
def test_texts_arrive_unchanged_in_file_order(request, layout):
    found, written = h.load_catalogue(request.getfixturevalue(layout)), tiny_products()
    for column in ("title", "description", "product_id", "image_id"):
        assert found[column].tolist() == written[column].tolist()
    texts = [*found["title"], *found["description"]]
    assert "" in texts and "NA" in texts and "null" in texts and any("\t" in text for text in texts)
    assert found["product_id"].dtype == found["image_id"].dtype == found["label_id"].dtype == "int64"


@pytest.mark.parametrize("layout", ["tiny_ens", "tiny_sigir"])
def test_picture_paths_exist(request, layout):
    pictures = h.load_catalogue(request.getfixturevalue(layout))["picture"]
    assert pictures.is_unique and all(Path(path).is_file() for path in pictures)


def test_texts_that_look_like_numbers_stay_texts(tiny_ens):
    edit(tiny_ens / "X_train_update.csv", lambda x: x.assign(designation="1984", description="007"))
    products = h.load_catalogue(tiny_ens)
    assert set(products["title"]) == {"1984"} and set(products["description"]) == {"007"}


def test_labels_follow_the_table_of_classes(tiny_ens):
    products = h.load_catalogue(tiny_ens)
    by_hand = {10: 0, 1280: 3, 1560: 7, 2583: 12, 40: 18}  # line numbers of data/rakuten_classes.csv
    assert dict(zip(products["prdtypecode"], products["label_id"])) == by_hand
    assert products["label_id"].tolist() == [by_hand[code] for code in tiny_products()["code"]]


def test_classes_are_27_with_the_published_row_counts():
    classes = h.load_classes()
    assert classes["label_id"].tolist() == list(range(27)) and classes["prdtypecode"].is_unique
    assert classes["train_rows"].sum() == 84_916
    assert classes["rows_with_description"].sum() == 11_005 / 0.2  # the released code's 20% part
    assert sorted(classes["domain"].value_counts()) == [5, 6, 8, 8]


@pytest.mark.parametrize("file", ["X_train_update.csv", "Y_train_CVw08PX.csv"])
def test_missing_table_is_named_with_the_remedy(tiny_ens, file):
    (tiny_ens / file).unlink()
    with pytest.raises(FileNotFoundError) as error:
        h.load_catalogue(tiny_ens)
    assert file in str(error.value) and str(tiny_ens) in str(error.value) and "RAKUTEN_DATA" in str(error.value)


@pytest.mark.parametrize("layout, file, column", [
    ("tiny_ens", "X_train_update.csv", "imageid"), ("tiny_ens", "Y_train_CVw08PX.csv", "prdtypecode"),
    ("tiny_sigir", "X_train.tsv", "Description"), ("tiny_sigir", "Y_train.tsv", "Prdtypecode")])
def test_missing_column_is_named_with_its_file(request, layout, file, column):
    folder = request.getfixturevalue(layout)
    edit(folder / file, lambda table: table.rename(columns={column: "other"}))
    with pytest.raises(ValueError) as error:
        h.load_catalogue(folder)
    assert column in str(error.value) and file in str(error.value) and "other" in str(error.value)


@pytest.mark.parametrize("code, named", [(41, r"\[41\]"), ("abc", r"\['abc'\]"), ("", r"\[''\]")])
def test_unknown_code_is_named(tiny_ens, code, named):
    edit(tiny_ens / "Y_train_CVw08PX.csv", lambda y: y.astype(object).replace({40: code}))
    with pytest.raises(ValueError, match=named + ".*rakuten_classes"):
        h.load_catalogue(tiny_ens)


@pytest.mark.parametrize("column, value", [("productid", "abc"), ("imageid", ""), ("productid", "9" * 20)])
def test_id_that_is_no_whole_number_is_named(tiny_ens, column, value):
    edit(tiny_ens / "X_train_update.csv", lambda x: x.assign(**{column: [*x[column][:-1].astype(object), value]}))
    with pytest.raises(ValueError, match=f"X_train_update.csv: .*_id '{value}' is no whole number"):
        h.load_catalogue(tiny_ens)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe,\n", b',designation\n0,"open', b"a,b\n1,2\n1,2,3,4\n"])
def test_file_that_is_no_table_is_named(tiny_ens, content):
    (tiny_ens / "X_train_update.csv").write_bytes(content)
    with pytest.raises(ValueError, match="X_train_update.csv cannot be read as a table in UTF-8 .*; get it again"):
        h.load_catalogue(tiny_ens)


def test_duplicate_product_id_is_named(tiny_ens):
    twice = tiny_products()["product_id"][0]
    edit(tiny_ens / "X_train_update.csv", lambda x: x.assign(productid=[*x["productid"][:-1], twice]))
    with pytest.raises(ValueError, match=rf"not unique.*{twice}"):
        h.load_catalogue(tiny_ens)


@pytest.mark.parametrize("change", [lambda y: y[:-1], lambda y: y[::-1], lambda y: y.set_axis(y.index + 1)])
def test_tables_that_list_other_products_are_refused(tiny_ens, change):
    edit(tiny_ens / "Y_train_CVw08PX.csv", change)
    with pytest.raises(ValueError, match="X_train_update.csv.*Y_train_CVw08PX.csv.*same order"):
        h.load_catalogue(tiny_ens)


def test_described_rows_are_those_with_a_description_that_is_not_blank(tiny_ens):
    edit(tiny_ens / "X_train_update.csv", lambda x: x.assign(description=[" \n", *x["description"][1:]]))
    products = h.load_catalogue(tiny_ens)
    before = products.copy()
    described = h.select_rows(products, "described")
    expected = [row.product_id for row in products.itertuples() if row.description.strip()]
    assert described["product_id"].tolist() == expected and len(expected) < 60
    assert described.index.tolist() == list(range(len(expected)))
    assert_frame_equal(h.select_rows(products, "all"), before)
    assert_frame_equal(products, before)  # the caller's frame is not touched
    with pytest.raises(ValueError, match="'some'.*described, all"):
        h.select_rows(products, "some")


def test_hash_changes_with_each_table_and_with_a_pictures_size(tiny_ens):
    hashes = [h.catalogue_hash(tiny_ens)]
    assert h.catalogue_hash(tiny_ens) == hashes[0]
    for file in ("X_train_update.csv", "Y_train_CVw08PX.csv"):
        (tiny_ens / file).write_bytes((tiny_ens / file).read_bytes().replace(b"0", b"1", 1))
        hashes.append(h.catalogue_hash(tiny_ens))
    picture = next((tiny_ens / "images" / "image_train").iterdir())
    picture.write_bytes(picture.read_bytes() + b"\0")
    hashes.append(h.catalogue_hash(tiny_ens))
    picture.rename(picture.with_name("image_1_product_1.jpg"))
    hashes.append(h.catalogue_hash(tiny_ens))
    assert len(set(hashes)) == 5


def test_folder_named_in_the_environment_is_the_catalogue(run, tiny_ens, tmp_path, monkeypatch):
    assert h.catalogue_folder(run) == tiny_ens
    monkeypatch.setenv("RAKUTEN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere.*X_train_update.csv.*X_train.tsv.*RAKUTEN_DATA"):
        h.catalogue_folder(run)
