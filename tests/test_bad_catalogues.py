"""A catalogue that nobody has cleaned: each defect works as documented, or is named by row."""
import gzip
import re
import shutil
import time
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from PIL import Image

import helpers as h
from commands.doctor import refuse_fatal
from commands.inputs import check_catalogue
from conftest import tiny_products
from engine.catalogue import read_catalogue
from engine.rows import chosen_products

X, Y = "X_train_update.csv", "Y_train_CVw08PX.csv"


def rewrite(path: Path, change) -> None:
    """Rewrite a file's bytes."""
    path.write_bytes(change(path.read_bytes()))


def put(folder: Path, column: str, row: int, text: str) -> None:
    """Put a text into a cell of the products' table."""
    set_cells(folder / X, {row: text}, column)


def set_cells(path: Path, texts: dict[int, str], column: str) -> None:
    table = pd.read_csv(path, keep_default_na=False, dtype=str)
    for row, text in texts.items():
        table.loc[row, column] = text
    table.to_csv(path, index=False, header=["", *table.columns[1:]])


def picture_of(folder: Path, row: int) -> Path:
    product = tiny_products().loc[row]
    name = f"image_{product['image_id']}_product_{product['product_id']}.jpg"
    return folder / "images" / "image_train" / name


# --- files ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("change", [
    lambda data: b"\xef\xbb\xbf" + data,
    lambda data: re.sub(rb"\n(?=\d+,)", b"\r\n", data)], ids=["byte order mark", "CRLF"])
def test_other_programs_ways_of_writing_the_same_table_are_read(tiny_ens, change):
    before = h.load_catalogue(tiny_ens)
    for file in (X, Y):
        rewrite(tiny_ens / file, change)
    assert_frame_equal(h.load_catalogue(tiny_ens), before)


@pytest.mark.parametrize("change, said", [
    (lambda data: data.decode().encode("latin-1", "replace"),
     r"no text in UTF-8: line \d+ holds the byte 0x\w\w; .*iconv -f WINDOWS-1252 -t UTF-8"),
    (lambda data: data.decode().encode("utf-16"), "is in UTF-16: save it in UTF-8"),
    (gzip.compress, "is compressed by gzip: unpack it"),
    (lambda data: b"PK\x03\x04" + data, "is a zip or Excel file: unpack it, or save it as text"),
    (lambda data: data.replace(b",designation", b";designation", 1), r"60 .*fields|\d fields"),
    (lambda data: "\n".join(line.replace(",", ";") for line in data.decode().split("\n")).encode(),
     "has no column .*; is it separated by ';' instead of ','\\?"),
    (lambda data: data[:-1] + b'\n60,"never closed,,1,1\n', r"line \d\d: unexpected end of data"),
    (lambda data: data.replace(b"\n7,", b'\n7,"', 1), "line 10: ',' expected after '\"'; a quot"),
    (lambda data: data.replace(b"\n7,", b"\n7,,", 1), "row that begins with '7' has 6 fields"),
    (lambda data: b"", "holds no rows"), (lambda data: data.split(b"\n")[0], "holds no rows"),
])
def test_a_file_that_is_not_the_table_is_named_with_the_remedy(tiny_ens, change, said):
    rewrite(tiny_ens / X, change)
    with pytest.raises(ValueError, match=said) as error:
        h.load_catalogue(tiny_ens)
    assert X in str(error.value)


@pytest.mark.parametrize("file, column", [(X, "designation"), (X, "imageid"), (Y, "prdtypecode")])
def test_a_column_that_occurs_twice_is_named(tiny_ens, file, column):
    table = pd.read_csv(tiny_ens / file, index_col=0, dtype=str)
    pd.concat([table, table[[column]]], axis=1).to_csv(tiny_ens / file)
    with pytest.raises(ValueError, match=f"{file} has more than one column {column}; keep one"):
        h.load_catalogue(tiny_ens)


@pytest.mark.parametrize("code", ["1e1", "+10", " 10", "10.0000000000000001", "10.5", "0x0a", "١٠"])
def test_a_code_that_is_no_whole_number_is_refused(tiny_ens, code):
    set_cells(tiny_ens / Y, {2: code}, "prdtypecode")
    with pytest.raises(ValueError, match=f"row 2: the product type code {re.escape(repr(code))}"):
        h.load_catalogue(tiny_ens)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_line_that_is_not_utf8_is_the_one_that_is_named(tiny_ens, mark):
    rewrite(tiny_ens / Y, lambda data: mark + data.replace(b"\n5,", b"\n5,\xe9", 1))
    with pytest.raises(ValueError, match="Y_train_CVw08PX.csv is no text in UTF-8: line 7 holds "
                                         "the byte 0xe9"):
        h.load_catalogue(tiny_ens)


# --- texts ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", [
    "NA", "null", "None", "nan", "1e5", "007", "True", "🎁 cadeau 👨‍👩‍👧", "كتاب للأطفال",
    'dit "oui", puis', "a\r\nb", "a\tb", "=1+1", "x" * 5_000_000], ids=lambda text: repr(text)[:12])
def test_an_odd_text_arrives_as_it_is(tiny_ens, text):
    for column in ("designation", "description"):
        put(tiny_ens, column, 3, text)
    product = h.load_catalogue(tiny_ens).loc[3]
    assert product["title"] == product["description"] == text


@pytest.mark.parametrize("text, cleaned", [
    ("<div>" * 10_000 + "mot" + "</div>" * 10_000, "mot"),
    ("<div>" * 200_000 + "mot", "mot"), ("mot " * 1_250_000, ("mot " * 1_250_000).strip())],
    ids=["10,000 nested tags", "200,000 open tags", "5 MB"])
def test_huge_texts_are_cleaned_in_seconds(text, cleaned):
    start = time.process_time()
    assert h.clean_text(text, "light") == cleaned
    assert time.process_time() - start < 5  # today under one; nested tags once took 100


@pytest.mark.parametrize("titles", [["00046", "7"], ["True", "False"], ["1e5", "0x1F"]])
def test_titles_that_look_like_numbers_stay_texts(make_run, tiny_ens, titles):
    """Read back as numbers, 00046 would be 46, and no tokenizer would take it."""
    set_cells(tiny_ens / X, {row: titles[row % 2] for row in range(60)}, "designation")
    run = make_run()
    for name in ("splits", "text"):
        h.stage(run, name)
    assert set(h.read_cleaned(run)["title"]) == set(map(str.lower, titles))
    h.stage(run, "baselines")


# --- rows -----------------------------------------------------------------------------------------
def spoil(folder: Path) -> dict[int, str]:
    """Damage eleven rows in eleven ways; {row: what is said of it}."""
    put(folder, "productid", 3, "abc")
    put(folder, "productid", 5, str(tiny_products()["product_id"][6]))
    put(folder, "imageid", 8, "12.0")
    put(folder, "designation", 11, "<br /> ")
    put(folder, "description", 13, "un\0deux")
    set_cells(folder / Y, {17: "41", 19: ""}, "prdtypecode")
    picture_of(folder, 23).unlink()
    picture_of(folder, 29).write_bytes(b"")
    picture_of(folder, 31).write_bytes(picture_of(folder, 31).read_bytes()[:300])
    shutil.move(picture_of(folder, 37), folder.parent / "elsewhere.jpg")
    picture_of(folder, 37).symlink_to(folder.parent / "elsewhere.jpg")
    return {3: "product_id 'abc' is no whole number", 5: "occurs twice", 6: "occurs twice",
            8: "image_id '12.0' is no whole number", 11: "its title is empty",
            13: "its description holds a null byte", 17: "product type code '41'",
            19: "product type code ''", 23: "is absent", 29: "cannot be read",
            31: "cannot be read", 37: "a link out of its folder"}


def test_bad_rows_stop_a_study_before_anything_starts(make_run, tiny_ens):
    spoil(tiny_ens)
    with pytest.raises(ValueError, match="8 rows cannot be used .row 3: product_id 'abc' is no "
                                         "whole number of at most 18 digits; row 5: .*; ....; "
                                         "correct them, or set bad_rows=set_aside"):
        refuse_fatal(make_run())


def test_what_is_set_aside_is_listed_and_counts_add_up(make_run, tiny_ens):
    before = h.load_catalogue(tiny_ens)
    said = spoil(tiny_ens)
    run = make_run(bad_rows="set_aside", rows="all")
    refuse_fatal(run)
    aside, kept = h.set_aside(run), h.usable_products(run)
    assert dict.fromkeys(aside["row"]) == dict.fromkeys(sorted(said))
    for row, why in zip(aside["row"], aside["why"]):
        assert said[row] in why
    assert len(kept) + len(aside) == len(before) == 60
    fine = before.drop(index=list(said)).reset_index(drop=True)
    assert_frame_equal(kept, fine)
    assert len(chosen_products(run)) == len(kept)
    listed = pd.read_csv(h.stage(run, "splits") / "set_aside.csv")
    assert listed["row"].tolist() == sorted(said)
    assert len(h.read_split(run)) == len(kept)


def test_nothing_set_aside_changes_no_stage(make_run):
    strict, mild = make_run(), make_run(bad_rows="set_aside")
    assert h.stage(strict, "splits") == h.stage(mild, "splits")
    assert pd.read_csv(h.stage(mild, "splits") / "set_aside.csv").empty


def test_a_picture_that_is_mended_comes_back(make_run, tiny_ens):
    run, path = make_run(bad_rows="set_aside"), picture_of(tiny_ens, 31)
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    assert h.set_aside(run)["row"].tolist() == [31]
    path.write_bytes(whole)
    assert h.set_aside(run).empty


def test_too_small_classes_are_named_by_rakutens_code(make_run, tiny_ens):
    labels = pd.read_csv(tiny_ens / Y, index_col=0)
    rows = labels.index[labels["prdtypecode"] == 2583]
    labels.loc[rows[2:], "prdtypecode"] = 10
    labels.to_csv(tiny_ens / Y)
    with pytest.raises(ValueError, match=r"needs 3 rows of each class.*: \{2583: 2\}"):
        refuse_fatal(make_run(rows="all"))


def test_codes_that_the_chosen_rows_lack_are_told(make_run, tiny_ens):
    labels = pd.read_csv(tiny_ens / Y, index_col=0)["prdtypecode"]
    set_cells(tiny_ens / X, dict.fromkeys(labels.index[labels == 2583], ""), "description")
    found = {check.name: check for check in check_catalogue(make_run())}
    assert found["codes of these rows"].state == "warning"
    assert "none of 2583, which the catalogue has" in found["codes of these rows"].found
    assert any("none of 2583, which the" in warning for warning in refuse_fatal(make_run()))
    assert "codes of these rows" not in {check.name for check in
                                         check_catalogue(make_run(rows="all"))}
    refuse_fatal(make_run())


# --- pictures -------------------------------------------------------------------------------------
def test_pictures_are_found_where_they_plainly_are(tiny_ens):
    names = [Path(path).name for path in h.load_catalogue(tiny_ens)["picture"]]
    own = tiny_ens / "images" / "image_train"

    def found() -> list[Path]:
        products = h.load_catalogue(tiny_ens)
        assert h.absent_pictures(products) == []
        return list(map(Path, products["picture"]))

    shutil.move(own, tiny_ens / "image_train")  # the other place, an empty folder beside it
    own.mkdir()
    assert [path.name for path in found()] == names
    deeper = own / "image_train"
    shutil.move(tiny_ens / "image_train", deeper)  # an archive unpacked into a folder of its name
    assert {path.parent for path in found()} == {deeper}
    for path in deeper.iterdir():
        path.rename(path.with_suffix(".JPG"))
    assert [path.name for path in found()] == [f"{name[:-4]}.JPG" for name in names]


def test_links_within_the_folder_and_a_linked_folder_are_fine(tiny_ens):
    own = tiny_ens / "images" / "image_train"
    shutil.move(own, tiny_ens.parent / "disk")
    own.symlink_to(tiny_ens.parent / "disk")
    first, second = picture_of(tiny_ens, 0), picture_of(tiny_ens, 1)
    first.unlink()
    first.symlink_to(second.name)
    assert h.absent_pictures(h.load_catalogue(tiny_ens)) == []


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (640, 480)])
def test_pictures_of_any_shape_serve(make_run, tiny_ens, size):
    path = picture_of(tiny_ens, 2)
    Image.new("RGB", size, "red").save(path)
    refuse_fatal(make_run(bad_rows="set_aside"))
    assert h.set_aside(make_run(bad_rows="set_aside")).empty
    assert h.decode_picture(path, 64).shape == (3, 64, 64)


# --- any table ------------------------------------------------------------------------------------
TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\r"),
               max_size=30)
ROW = st.tuples(TEXT, TEXT, st.sampled_from(["10", "40", "2583.0", "7", "", "x"]),
                st.sampled_from(["5", "05", "6", "٦", "77", "8.0", "", "-1"]))


@given(st.lists(ROW, min_size=1, max_size=25))
def test_rows_kept_and_rows_set_aside_add_up_to_the_table(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    titles, descriptions, codes, ids = zip(*rows)
    x = pd.DataFrame({"designation": titles, "description": descriptions, "productid": ids,
                      "imageid": range(len(rows))})
    x.to_csv(folder / X)
    pd.DataFrame({"prdtypecode": codes}).to_csv(folder / Y)
    products, bad = read_catalogue(folder)
    assert sorted([*products.index, *bad["row"]]) == list(range(len(rows)))
    assert products["title"].tolist() == [titles[row] for row in products.index]
    assert products["description"].tolist() == [descriptions[row] for row in products.index]
    assert products["product_id"].is_unique and products["label_id"].between(0, 26).all()
    for row, why in zip(bad["row"], bad["why"]):
        good_id = ids[row] in ("5", "6", "77") and ids.count(ids[row]) == 1
        good = good_id and codes[row] in ("10", "40", "2583.0") and h.strip_html(titles[row])
        assert why and not good
