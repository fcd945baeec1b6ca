"""Catalogue: both public layouts give the same frame; what does not fit is refused by name; each
stage depends on what it is given of the catalogue, and on nothing else there.
"""
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from PIL import Image

import helpers as h
from conftest import tiny_products
from engine import catalogue, files, fingerprint, keys
from engine.catalogue import CLASSES
from engine.looks import Changed, one_look
from engine.rows import chosen_products
from engine.runs import runs_folder
from engine.settings import FROZEN_STAGES, STAGES

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
    names = [[Path(path).name for path in table["picture"]] for table in (ens, sigir)]
    assert names[0] == names[1]


@pytest.mark.parametrize("layout", ["tiny_ens", "tiny_sigir"])
def test_texts_arrive_unchanged_in_file_order(request, layout):
    products, written = h.load_catalogue(request.getfixturevalue(layout)), tiny_products()
    for column in ("title", "description", "product_id", "image_id"):
        assert products[column].tolist() == written[column].tolist()
    texts = [*products["title"], *products["description"]]
    assert {"", "NA", "null"} <= set(texts) and any("\t" in text for text in texts)
    for column in ("product_id", "image_id", "label_id"):
        assert products[column].dtype == "int64"


@pytest.mark.parametrize("layout", ["tiny_ens", "tiny_sigir"])
def test_picture_paths_exist(request, layout):
    pictures = h.load_catalogue(request.getfixturevalue(layout))["picture"]
    assert pictures.is_unique and all(Path(path).is_file() for path in pictures)


def test_texts_that_look_like_numbers_stay_texts(tiny_ens):
    numbers = {"designation": "1984", "description": "007"}
    edit(tiny_ens / "X_train_update.csv", lambda x: x.assign(**numbers))
    products = h.load_catalogue(tiny_ens)
    assert set(products["title"]) == {"1984"} and set(products["description"]) == {"007"}


def test_labels_follow_the_table_of_classes(tiny_ens):
    products = h.load_catalogue(tiny_ens)
    # Line numbers of data/rakuten_classes.csv.
    by_hand = {10: 0, 1280: 3, 1560: 7, 2583: 12, 40: 18}
    assert dict(zip(products["prdtypecode"], products["label_id"])) == by_hand
    assert products["label_id"].tolist() == [by_hand[code] for code in tiny_products()["code"]]


def test_classes_are_27_with_the_published_row_counts():
    classes = pd.read_csv(CLASSES)
    assert classes["label_id"].tolist() == list(range(27)) and classes["prdtypecode"].is_unique
    assert classes["train_rows"].sum() == 84_916
    # The released code's 20% part.
    assert classes["rows_with_description"].sum() == 11_005 / 0.2
    assert sorted(classes["domain"].value_counts()) == [5, 6, 8, 8]


@pytest.mark.parametrize("file", ["X_train_update.csv", "Y_train_CVw08PX.csv"])
def test_missing_table_is_named_with_the_remedy(tiny_ens, file):
    (tiny_ens / file).unlink()
    with pytest.raises(FileNotFoundError) as error:
        h.load_catalogue(tiny_ens)
    for word in (file, str(tiny_ens), "RAKUTEN_DATA"):
        assert word in str(error.value)


@pytest.mark.parametrize("layout, file, column", [
    ("tiny_ens", "X_train_update.csv", "imageid"),
    ("tiny_ens", "Y_train_CVw08PX.csv", "prdtypecode"),
    ("tiny_sigir", "X_train.tsv", "Description"),
    ("tiny_sigir", "Y_train.tsv", "Prdtypecode"),
])
def test_missing_column_is_named_with_its_file(request, layout, file, column):
    folder = request.getfixturevalue(layout)
    edit(folder / file, lambda table: table.rename(columns={column: "other"}))
    with pytest.raises(ValueError) as error:
        h.load_catalogue(folder)
    for word in (column, file, "other"):
        assert word in str(error.value)


@pytest.mark.parametrize("code", ["41", "abc", "", "nan"])
def test_unknown_code_is_named(tiny_ens, code):
    edit(tiny_ens / "Y_train_CVw08PX.csv", lambda y: y.astype(object).replace({40: code}))
    with pytest.raises(ValueError, match=f"12 rows cannot be used .row .*: the product type code "
                                         f"'{code}' is none of the 27"):
        h.load_catalogue(tiny_ens)


@pytest.mark.parametrize("column, value", [
    ("productid", "abc"), ("imageid", ""), ("productid", "9" * 20)])
def test_id_that_is_no_whole_number_is_named(tiny_ens, column, value):
    ours = {"productid": "product_id", "imageid": "image_id"}[column]

    def change(x: pd.DataFrame) -> pd.DataFrame:
        return x.assign(**{column: [*x[column][:-1].astype(object), value]})

    edit(tiny_ens / "X_train_update.csv", change)
    with pytest.raises(ValueError, match=f"1 rows cannot be used .row 59: {ours} '{value}' is no "
                                         "whole number of at most 18 digits.; correct them, or"):
        h.load_catalogue(tiny_ens)


def test_duplicate_product_id_is_named(tiny_ens):
    twice = tiny_products()["product_id"][0]
    edit(tiny_ens / "X_train_update.csv",
         lambda x: x.assign(productid=[*x["productid"][:-1], twice]))
    with pytest.raises(ValueError, match=f"2 rows cannot be used .row 0: product_id {twice} occurs "
                                         f"twice; row 59: product_id {twice} occurs twice"):
        h.load_catalogue(tiny_ens)


@pytest.mark.parametrize("file, change, alone", [
    ("Y_train_CVw08PX.csv", lambda y: y[:-1], "59 is in X_train_update.csv alone, as are 0 others"),
    ("Y_train_CVw08PX.csv", lambda y: y.set_axis(y.index + 1), "0 is in X_train_update.csv alone"),
    ("X_train_update.csv", lambda x: x[2:], "0 is in Y_train_CVw08PX.csv alone, as are 1 others")])
def test_tables_that_list_other_products_are_refused(tiny_ens, file, change, alone):
    edit(tiny_ens / file, change)
    with pytest.raises(ValueError, match=f"do not list the same rows: {alone}"):
        h.load_catalogue(tiny_ens)


def test_the_two_tables_are_joined_by_row_number(tiny_ens):
    before = h.load_catalogue(tiny_ens)
    edit(tiny_ens / "Y_train_CVw08PX.csv", lambda y: y.sample(frac=1, random_state=0))
    assert_frame_equal(h.load_catalogue(tiny_ens), before)


def test_described_rows_are_those_whose_description_has_a_word(tiny_ens):
    silent = [" \n", "<br />", "<p>&nbsp;</p>", "..."]
    edit(tiny_ens / "X_train_update.csv",
         lambda x: x.assign(description=[*silent, *x["description"][4:]]))
    products = h.load_catalogue(tiny_ens)
    before = products.copy()
    described = h.select_rows(products, "described")
    expected = [row.product_id for row in products.itertuples()
                if row.description not in ("", *silent)]
    assert described["product_id"].tolist() == expected and len(expected) < 60
    assert described.index.tolist() == list(range(len(expected)))
    assert_frame_equal(h.select_rows(products, "all"), before)
    assert_frame_equal(products, before)  # the caller's frame is not touched
    with pytest.raises(ValueError, match="'some'.*described, all"):
        h.select_rows(products, "some")


def test_folder_named_in_the_environment_is_the_catalogue(run, tiny_ens, tmp_path, monkeypatch):
    assert h.catalogue_folder(run) == tiny_ens
    monkeypatch.setenv("RAKUTEN_DATA", str(tmp_path / "nowhere"))
    said = "nowhere.*X_train_update.csv.*X_train.tsv.*RAKUTEN_DATA"
    with pytest.raises(FileNotFoundError, match=said):
        h.catalogue_folder(run)


# --- what a stage is given of it ------------------------------------------------------------------
IMAGES = {"seresnext", "image_regions", "image_whole"}
TEXTS = {"text", "baselines", *h.TEXT_STAGES}
ENDS = {"fusion-concat-add", "scores", "claims"}  # they stand on everything
PLAIN = {name for name in STAGES if name != "fusion"} | {"fusion-concat-add"}
FROZEN = {"freeze_encoders": True, "camembert": "nobody/a", "flaubert": "nobody/b"}


def keys_of(run: h.Run) -> dict[str, str]:
    """The key of each stage of a run; nothing is made."""
    names = PLAIN | (set(FROZEN_STAGES) if run.profile.freeze_encoders else set())
    with one_look():
        return {name: keys.key_of(run, name) for name in names}


def stale(run: h.Run, change) -> set[str]:
    """The stages whose keys `change()` changes."""
    before = keys_of(run)
    change()
    after = keys_of(run)
    return {name for name in before if before[name] != after[name]}


def product(run: h.Run, place: int) -> pd.Series:
    """One of the run's products."""
    return chosen_products(run).iloc[place]


def rewrite(path: Path, old: str, new: str) -> None:
    """Put `new` in the place of `old`, which stands once in a file."""
    text = path.read_bytes().decode()
    assert len(re.findall(rf"\b{re.escape(old)}\b", text)) == 1
    path.write_bytes(re.sub(rf"\b{re.escape(old)}\b", new, text).encode())


def draw_again(path: str) -> None:
    """Another picture, of another size, in a picture's place."""
    Image.new("RGB", (90, 70), (255, 0, 255)).save(path)


def test_a_letter_of_a_title_changes_the_text_and_not_splits_and_images(run, tiny_ens):
    changed = stale(run, lambda: rewrite(tiny_ens / "X_train_update.csv", "Skimmer", "Skimmez"))
    assert changed == TEXTS | ENDS


def test_a_letter_of_a_title_changes_no_image_vectors_of_frozen_encoders(make_run, tiny_ens):
    run = make_run(**FROZEN)
    changed = stale(run, lambda: rewrite(tiny_ens / "X_train_update.csv", "Skimmer", "Skimmez"))
    assert changed == TEXTS | ENDS | {f"vectors-{name}" for name in h.TEXT_STAGES}


def test_a_label_changes_the_splits_and_what_stands_on_them(run, tiny_ens):
    def relabel(y: pd.DataFrame) -> pd.DataFrame:
        return y.assign(prdtypecode=[1560 if y["prdtypecode"][0] != 1560 else 10,
                                     *y["prdtypecode"][1:]])

    table = tiny_ens / "Y_train_CVw08PX.csv"
    assert h.load_catalogue(tiny_ens)["description"][0]  # one of the run's rows
    assert stale(run, lambda: edit(table, relabel)) == PLAIN - {"text"}


def test_a_product_id_changes_everything(run, tiny_ens):
    old = str(product(run, 7)["product_id"])
    table = tiny_ens / "X_train_update.csv"
    assert stale(run, lambda: rewrite(table, old, "4999999")) == PLAIN


def test_order_of_the_files_changes_nothing(run, tiny_ens):
    def turn() -> None:
        for file in ("X_train_update.csv", "Y_train_CVw08PX.csv"):
            edit(tiny_ens / file, lambda table: table[::-1])

    assert stale(run, turn) == set()


@pytest.mark.parametrize("settings", [{}, FROZEN, {"grouped": True}])
def test_other_files_beside_the_pictures_change_nothing(make_run, tiny_ens, settings):
    pictures = tiny_ens / "images" / "image_train"

    def add() -> None:
        (pictures / "Thumbs.db").write_bytes(b"thumbs")
        (pictures / "image_1_product_1.jpg").write_bytes(b"of a product that is not listed")
        (pictures / ".cache").mkdir()
        (tiny_ens / "X_test_update.csv").write_text("of the challenge")

    assert stale(make_run(**settings), add) == set()


@pytest.mark.parametrize("change", [draw_again, lambda path: Path(path).unlink()])
def test_a_picture_changes_the_image_stages_and_not_text(run, change):
    path = product(run, 7)["picture"]
    assert stale(run, lambda: change(path)) == IMAGES | ENDS


def test_a_picture_changes_no_text_vectors_of_frozen_encoders(make_run):
    run = make_run(**FROZEN)
    vectors = {"vectors-image_whole", "vectors-image_regions"}
    path = product(run, 7)["picture"]
    assert stale(run, lambda: draw_again(path)) == IMAGES | ENDS | vectors


def test_pictures_and_texts_decide_a_grouped_split_by_the_groups_alone(make_run, tiny_ens):
    run = make_run(grouped=True)
    table = tiny_ens / "X_train_update.csv"
    first, second, third = (product(run, place) for place in (7, 8, 9))
    # A plain picture is near nothing, nor is another title.
    assert stale(run, lambda: draw_again(first["picture"])) == IMAGES | ENDS
    assert stale(run, lambda: rewrite(table, "Skimmer", "Skimmez")) == TEXTS | ENDS

    def copy_title() -> None:
        edit(table, lambda x: x.assign(
            designation=x["designation"].replace(second["title"], third["title"])))

    assert stale(run, copy_title) == PLAIN  # the two stay on one side of the split


@pytest.fixture
def asked(monkeypatch):
    """The questions to the system about all pictures, as they are put."""
    questions, ask = [], files._ask_about
    monkeypatch.setattr(files, "_ask_about", lambda paths: questions.append(paths) or ask(paths))
    return questions


def test_one_look_asks_about_the_pictures_once_for_all_runs_on_them(make_run, asked):
    with one_look():
        first, again = keys_of(make_run()), keys_of(make_run(fusion_epochs=7))
    assert len(asked) == 1 and first["image_whole"] == again["image_whole"]
    assert first["scores"] != again["scores"]


def test_a_stage_that_is_missing_is_told_in_one_look(make_run, asked):
    for name in ("splits", "text", "baselines"):
        h.stage(make_run(), name)
    asked.clear()
    with pytest.raises(FileNotFoundError, match="image_whole"):
        h.read_stage(make_run(), "image_whole")
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["text", "seresnext"])
def test_what_changes_while_a_stage_is_made_is_not_kept(run, tiny_ens, monkeypatch, name):
    """Else a stage of other texts or pictures would lie under the key of these."""
    make, code_of = keys.MAKERS[name], fingerprint.code_of
    path, table = Path(product(run, 7)["picture"]), tiny_ens / "X_train_update.csv"

    def meanwhile(*args):
        draw_again(path) if name == "seresnext" else rewrite(table, "Skimmer", "Skimmez")
        return make(*args)

    h.stage(run, "splits")
    monkeypatch.setitem(keys.MAKERS, name, meanwhile)
    monkeypatch.setattr(fingerprint, "code_of",
                        lambda function: code_of(make if function is meanwhile else function))
    with pytest.raises(Changed, match="the catalogue, or a file that a setting names, was changed"):
        h.stage(run, name)
    assert not list(runs_folder().glob(f"stages/{name}*"))


def test_the_next_look_asks_again(run, asked):
    """A picture that changes between two cells of a notebook is seen."""
    before = keys.key_of(run, "seresnext")
    draw_again(product(run, 7)["picture"])
    assert keys.key_of(run, "seresnext") != before and len(asked) == 2


@pytest.mark.parametrize("settings", [{}, {"rows": "all", "limit": 50}, FROZEN])
def test_what_a_run_leaves_out_changes_none_of_its_stages(make_run, tiny_ens, settings):
    run = make_run(**settings)
    products = h.load_catalogue(tiny_ens)
    left_out = products[~products["product_id"].isin(chosen_products(run)["product_id"])]
    assert len(left_out) in (5, 10)

    def change() -> None:
        for path in left_out["picture"]:
            draw_again(path)
        old = left_out["title"].iloc[0]
        edit(tiny_ens / "X_train_update.csv", lambda x: x.assign(
            designation=x["designation"].replace(old, "un autre titre")))

    assert stale(run, change) == set()
    assert (h.load_catalogue(tiny_ens)["title"] == "un autre titre").sum() == 1


def test_two_who_need_the_sample_at_once_make_it_once_beside_the_cache(monkeypatch, tmp_path):
    made = []

    def write_catalogue(folder):
        made.append(folder)
        time.sleep(0.2)
        folder.mkdir()
        (folder / "sample.json").write_text('{"source_sha256": "now"}')

    sample = SimpleNamespace(source_hash=lambda: "now", write_catalogue=write_catalogue)
    monkeypatch.setattr(catalogue, "sample_generator", lambda: sample)
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    run = h.open_run("sample", "90-10", 0)
    with ThreadPoolExecutor(2) as pool:
        found = set(pool.map(h.catalogue_folder, [run, run]))
    assert found == {tmp_path / "sample"} == set(made) and len(made) == 1


@pytest.mark.parametrize("change, said", [
    (lambda x: x.set_axis([*x.index[:-1], x.index[0]]), r"the row number 0 occurs twice"),
    (lambda x: x.set_axis(x.index + 0.0), r"holds '0\.0', which is no row number"),
    (lambda x: x.set_axis([*x.index[:-1], None]), r"which is no row number"),
    (lambda x: x.set_index("designation"), "was saved without its row numbers: its first column is "
                                           "'designation'")])
def test_a_table_whose_rows_are_not_numbered_is_refused(tiny_ens, change, said):
    """Else a submission would name other products."""
    table = change(pd.read_csv(tiny_ens / "X_train_update.csv", index_col=0))
    for name in ("X_train_update.csv", "X_test_update.csv"):
        table.to_csv(tiny_ens / name)
    for load in (h.load_catalogue, catalogue.load_test_products):
        with pytest.raises(ValueError, match=f"_update.csv.* {said}"):
            load(tiny_ens)


def test_a_limit_gives_seats_by_sainte_lague():
    """By hand: of 60, 25 and 15 rows 15 are kept, 3 of each and then by the largest quotients. The
    last is 25/3.5 = 7.14, before 60/8.5 = 7.06; D'Hondt's would be 60/9, before 25/4.
    """
    products = pd.DataFrame({"product_id": range(100), "description": "mot",
                             "label_id": [0] * 60 + [1] * 25 + [2] * 15})
    for limit, expected in ((11, [5, 3, 3]), (15, [8, 4, 3]), (22, [13, 6, 3])):
        kept = h.select_rows(products, "all", limit)["label_id"].value_counts().sort_index()
        assert kept.tolist() == expected, limit


def test_the_folder_with_most_of_the_pictures_is_theirs(tiny_ens):
    other = tiny_ens / "image_train"
    shutil.copytree(tiny_ens / "images" / "image_train", other)
    for path in sorted((tiny_ens / "images" / "image_train").iterdir())[1:]:
        path.unlink()
    assert {Path(path).parent for path in h.load_catalogue(tiny_ens)["picture"]} == {other}
