"""The sample: layout, words, class sizes, texts, pictures, seeds, whole or not at all."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import helpers as h

ROOT = Path(__file__).resolve().parents[1]
ROWS, TEST_ROWS = 600, 30
SMALL = {"rows": 440, "test_rows": 4}  # 27 classes of at least 16 rows need 432


sc = h.sample_generator()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("with a space") / "sample"
    sc.write_catalogue(path, rows=ROWS, test_rows=TEST_ROWS, seed=3)
    return path


@pytest.fixture(scope="module")
def table(folder):
    features = pd.read_csv(folder / "X_train_update.csv", index_col=0)
    return features.join(pd.read_csv(folder / "Y_train_CVw08PX.csv", index_col=0))


@pytest.fixture(scope="module")
def real():
    return pd.read_csv(ROOT / "data" / "rakuten_classes.csv", index_col="prdtypecode")


@pytest.fixture(scope="module")
def full_size():
    """The products of the default size, without pictures: (train, test) frames."""
    parts = sc.make_products(1800, 120, 0)
    return [pd.DataFrame([vars(product) for product in part]) for part in parts]


@pytest.fixture
def quick(monkeypatch):
    """Replace drawing by a plain square, where a test is not about pictures."""
    monkeypatch.setattr(sc, "draw_picture", lambda code, seed, index: Image.new("RGB", (500, 500)))


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def is_padded(pixels, tolerance=14):
    """True if the outer rows, or columns, are all white or all black, up to JPEG's rounding."""
    for first, last in ((pixels[:15], pixels[-15:]), (pixels[:, :15], pixels[:, -15:])):
        band = np.concatenate([first.ravel(), last.ravel()]).astype(int)
        if (band >= 255 - tolerance).all() or (band <= tolerance).all():
            return True
    return False


def test_files_and_columns_follow_the_ens_layout(folder, table):
    assert sorted(path.name for path in folder.iterdir()) == [
        "X_test_update.csv", "X_train_update.csv", "Y_train_CVw08PX.csv", "images", "sample.json"]
    for name in ("X_train_update.csv", "X_test_update.csv"):
        with open(folder / name, encoding="utf-8") as file:
            assert file.readline() == ",designation,description,productid,imageid\n"
    assert (folder / "Y_train_CVw08PX.csv").read_text().startswith(",prdtypecode\n0,")
    test = pd.read_csv(folder / "X_test_update.csv", index_col=0)
    assert list(table.index) == list(range(ROWS))
    assert list(test.index) == list(range(ROWS, ROWS + TEST_ROWS))
    for name, part in (("image_train", table), ("image_test", test)):
        expected = {f"image_{row.imageid}_product_{row.productid}.jpg" for row in part.itertuples()}
        assert {path.name for path in (folder / "images" / name).iterdir()} == expected
        assert len(expected) == len(part)


def test_sample_json_says_what_was_written(folder):
    written = json.loads((folder / "sample.json").read_text())
    assert written == sc.describe_sample(ROWS, TEST_ROWS, 3)
    assert written["seed"] == 3 and written["rows"] == ROWS and len(written["source_sha256"]) == 64


def test_the_hash_covers_the_generator_and_the_words(tmp_path, monkeypatch):
    hashes = {sc.source_hash()}
    for name, path in (("WORDS_FILE", sc.WORDS_FILE), ("__file__", Path(sc.__file__))):
        edited = tmp_path / path.name
        edited.write_bytes(path.read_bytes() + b"\n")
        monkeypatch.setattr(sc, name, edited)
        hashes.add(sc.source_hash())
    assert len(hashes) == 3


@pytest.mark.parametrize("old, new, fault", [
    ("\n[colours]\n", "\n[couleurs]\n", "colours is missing"),
    ("[classes.10]\n", "[classes.11]\n", "classes.10 is missing"),
    ('scene = "home"\n\n[classes.2705]', "[classes.2705]", "classes.10.scene is missing"),
    ('"{book} ({publisher})"', '"{boook}"', "groups.books.titles uses {boook}, which is neither"),
    ('"{book} ({publisher})"', '"{book"', "groups.books.titles uses {book, which is neither"),
    ('"used paperback"', '"used {thing}"', "classes.10.noun.en uses {thing}, which is neither"),
    ('"Verdon"', '"{author}"', "words.surname leads to a word that holds itself"),
    ('"Verdon"', '" "', "words.surname holds an empty text"),
    ("num = [13, 980]", "num = [980, 13]", "numbers.num must be [smallest, largest]"),
    ("num = [13, 980]", "num = [13, 98.0]", "numbers.num must be a list of whole numbers"),
    ('objects = ["stack"', 'objects = ["stock"', "classes.2403.objects names 'stock', which"),
    ('objects = ["cards"]', 'objects = "cards"', "classes.1160.objects must be a list of texts"),
    ("classes = [40, ", "classes = [10, 40, ",
     "class 10 must be listed in one of [groups], not in 2"),
    ("classes = [40, ", "classes = [", "class 40 must be listed in one of [groups], not in 0"),
    ("classes = [40, ", "classes = [41, 40, ", "class 41 is not in rakuten_classes.csv"),
    ('scene = "home"\n\n[classes.2705]', 'scene = "beach"\n\n[classes.2705]',
     "classes.10.scene is 'beach'; choose from: home, garden, shop"),
    ('"e w 42 42 58 58"', '"z w 42 42 58 58"', "objects.ball holds 'z w 42 42 58 58', which is no"),
    ('"e w 42 42 58 58"', '"e x 42 42 58 58"', "objects.ball holds 'e x 42 42 58 58', which is no"),
    ("[numbers]\n", "[numbers\n", "sample_words.toml is not written as TOML"),
])
def test_a_wrong_entry_of_the_words_is_named(tmp_path, old, new, fault):
    text = sc.WORDS_FILE.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path = tmp_path / sc.WORDS_FILE.name
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(fault)):
        sc.load_words(path)


def test_a_letter_without_a_named_entity_is_written_by_its_number():
    assert sc.encode("Škoda été", np.random.default_rng(0)) == "&Scaron;koda &eacute;t&eacute;"
    assert sc.encode("Łódź", np.random.default_rng(0)) == "&#321;&oacute;d&#378;"


def test_product_and_image_numbers_are_unique_with_7_to_10_digits(full_size):
    both = pd.concat(full_size)
    numbers = pd.concat([both.productid, both.imageid])
    assert numbers.is_unique
    assert set(numbers.astype(str).str.len()) == {7, 8, 9, 10}


def test_classes_are_as_unequal_as_the_real_ones(full_size, real):
    counts = full_size[0].code.value_counts()
    assert set(counts.index) == set(real.index) and len(counts) == 27
    assert counts.sum() == 1800 and counts.min() >= sc.MIN_ROWS
    expected = real.train_rows / real.train_rows.sum() * 1800
    assert (counts - expected).abs().max() <= 1


def test_small_classes_are_raised_and_the_total_kept(table, real):
    counts = table.prdtypecode.value_counts()
    assert counts.sum() == ROWS and counts.min() == sc.MIN_ROWS and len(counts) == 27
    large = counts[counts > sc.MIN_ROWS]
    ratio = large / real.train_rows[large.index]
    assert ratio.max() / ratio.min() < 1.15


def test_too_few_rows_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="at least 432"):
        sc.class_counts(431, sc.MIN_ROWS)
    assert set(sc.class_counts(432, sc.MIN_ROWS).values()) == {16}


def test_rows_are_shuffled(table):
    neighbours_alike = (table.prdtypecode.diff() == 0).mean()
    assert neighbours_alike < 0.15  # sorted by class it would be 0.96


def test_missing_descriptions_per_class(full_size, real):
    train = full_size[0]
    described = train.groupby("code").description.apply(lambda texts: (texts != "").sum())
    total = train.code.value_counts()
    expected = (real.rows_with_description / real.train_rows * total).clip(lower=sc.MIN_DESCRIBED)
    assert (described - expected).abs().max() <= 0.5
    assert described.min() >= 12
    assert 0.6 < described.sum() / len(train) < 0.7


def test_missing_descriptions_are_empty_fields(folder, table):
    text = (folder / "X_train_update.csv").read_text(encoding="utf-8")
    row = table[table.description.isna()].iloc[0]
    assert f",,{row.productid},{row.imageid}\n" in text
    assert table.designation.notna().all()
    assert table.dropna(subset="description").groupby("prdtypecode").size().min() >= 12


def test_shares_of_duplicates(full_size):
    train = full_size[0]
    texts = train.description[train.description != ""]
    assert train.title.duplicated().mean() == pytest.approx(0.031, abs=0.001)
    assert texts.duplicated().mean() == pytest.approx(0.138, abs=0.001)


def test_copies_come_mostly_from_the_same_class_and_never_from_afar(full_size):
    described = full_size[0][full_size[0].description != ""]
    groups = [part.code for _, part in described.groupby("description") if len(part) > 1]
    assert all(len({sc.group_of(code) for code in codes}) == 1 for codes in groups)
    assert 0.6 < np.mean([codes.nunique() == 1 for codes in groups]) < 1


def test_texts_are_unique_apart_from_the_copies():
    codes = [10, 2705, 1160, 2522] * 400
    products = [sc.Product(index, code, True) for index, code in enumerate(codes)]
    sc.add_texts(products, seed=1)
    assert len({product.title for product in products}) == len(products)
    assert len({product.description for product in products}) == len(products)


def test_lengths(full_size):
    train = full_size[0]
    titles, texts = train.title.str.split().str.len(), train.description.str.split().str.len()
    assert 10 <= titles.median() <= 12 and titles.min() >= 2 and 35 < titles.max() <= sc.TITLE_MAX
    assert 28 <= texts.median() <= 42
    assert texts[texts > 0].median() > texts.median() and 250 < texts.max() <= sc.MAX_WORDS


def test_html_entities_capitals_and_foreign_rows(full_size):
    train = full_size[0]
    texts = train.description[train.description != ""]
    assert 0.35 < texts.str.contains("<").mean() < 0.55
    marks = ("<br />", "<b>", "<p>", "<ul><li>", "<div>")
    for part in (*marks, "&eacute;", "&#39;", "&amp;", "&nbsp;", "é"):
        assert texts.str.contains(part, regex=False).any(), part
    assert 0.01 < train.title.str.contains(r"&\w+;").mean() < 0.06
    assert 0.05 < train.title.str.isupper().mean() < 0.2
    english = texts.str.contains(r"\b(?:the|your|This|Size|Package)\b").mean()
    assert 0.01 < english < 0.06


def test_templates_leave_no_gap(full_size):
    both = pd.concat(full_size)
    assert not (both.title + both.description).str.contains(r"[{}@|]").any()


def test_every_class_has_texts_and_objects(real):
    assert set(real.index) == set(sc.CLASSES) == set(sc.NEIGHBOURHOOD)
    shown = {name for row in sc.CLASSES.values() for name in row["objects"]}
    assert shown | {"parcel"} == set(sc.OBJECTS)


def test_each_modality_misses_some_products():
    rng = np.random.default_rng(0)
    shown = [sc.choose_object(10, rng) for _ in range(2000)]
    assert np.mean([name == "parcel" for name in shown]) == pytest.approx(sc.P_PARCEL, abs=0.02)
    assert np.mean([name == "book" for name in shown]) < 0.97
    pools = [sc.sentence_pools(10, "fr", rng) for _ in range(2000)]
    own = sc.CLASSES[10]["sentences"]
    clear = 1 - sc.P_BOILERPLATE - sc.P_VAGUE_DESCRIPTION
    assert np.mean([own in pool for pool in pools]) == pytest.approx(clear, abs=0.04)


def test_pictures_decode_with_their_border(folder):
    files = sorted((folder / "images").rglob("*.jpg"))
    assert len(files) == ROWS + TEST_ROWS
    for file in files[::5]:
        with Image.open(file) as picture:
            assert picture.format == "JPEG" and picture.size == (500, 500) and picture.mode == "RGB"
            assert is_padded(np.asarray(picture)), file.name
    assert 8_000 < np.median([file.stat().st_size for file in files]) < 25_000


def test_the_border_check_refuses_an_unpadded_picture():
    pixels = np.asarray(sc.draw_picture(10, 0, 1)).copy()
    pixels[:20, 200:300] = 120
    pixels[200:300, :20] = 120
    assert not is_padded(pixels)


def test_pictures_of_a_class_differ():
    pictures = {sc.draw_picture(10, 0, index).tobytes() for index in range(10)}
    assert len(pictures) == 10


def test_same_seed_same_pictures_whatever_the_number_of_workers(tmp_path):
    train, test = sc.make_products(440, 4, 5)
    for workers in (1, 2, 3):
        sc.write_pictures(tmp_path / str(workers), train[:25], test, 5, workers)
    one, two, three = (files_of(tmp_path / str(workers)) for workers in (1, 2, 3))
    assert len(one) == 29 and one == two == three


def test_same_seed_same_tables(folder, tmp_path, quick):
    sc.write_catalogue(tmp_path / "again", rows=ROWS, test_rows=TEST_ROWS, seed=3, workers=1)
    for name in ("X_train_update.csv", "Y_train_CVw08PX.csv", "X_test_update.csv", "sample.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_other_seed_other_files(tmp_path, quick):
    for seed in (5, 6):
        sc.write_catalogue(tmp_path / str(seed), seed=seed, workers=1, **SMALL)
    first, second = files_of(tmp_path / "5"), files_of(tmp_path / "6")
    assert first["X_train_update.csv"] != second["X_train_update.csv"]
    assert first["Y_train_CVw08PX.csv"] != second["Y_train_CVw08PX.csv"]


def test_other_seed_other_picture():
    assert sc.draw_picture(10, 5, 1).tobytes() == sc.draw_picture(10, 5, 1).tobytes()
    assert sc.draw_picture(10, 5, 1).tobytes() != sc.draw_picture(10, 6, 1).tobytes()


def test_a_failure_leaves_nothing_half_written(tmp_path, quick, monkeypatch):
    sc.write_catalogue(tmp_path / "sample", seed=1, workers=1, **SMALL)
    before = files_of(tmp_path)
    calls = []

    def fail_late(code, seed, index):
        calls.append(index)
        if len(calls) > 20:
            raise OSError("disk full")
        return Image.new("RGB", (500, 500))

    monkeypatch.setattr(sc, "draw_picture", fail_late)
    for name in ("sample", "fresh"):
        with pytest.raises(OSError, match="disk full"):
            sc.write_catalogue(tmp_path / name, seed=2, workers=1, **SMALL)
    assert len(calls) > 20
    assert files_of(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]


def test_a_failing_worker_is_reported(tmp_path):
    missing = str(tmp_path / "absent" / "a.jpg")
    with pytest.raises(RuntimeError, match="FileNotFoundError"):
        sc.draw_in_processes([[missing, 10, 0, 0]], 2)


def test_an_old_sample_is_replaced(tmp_path, quick):
    sc.write_catalogue(tmp_path / "sample", seed=1, workers=1, **SMALL)
    sc.write_catalogue(tmp_path / "sample", seed=2, workers=1, **SMALL)
    assert json.loads((tmp_path / "sample" / "sample.json").read_text())["seed"] == 2
    assert len(list((tmp_path / "sample" / "images" / "image_train").iterdir())) == SMALL["rows"]
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]


def test_a_folder_that_is_not_a_sample_is_left_alone(tmp_path, quick):
    (tmp_path / "X_train_update.csv").write_text("real data")
    with pytest.raises(ValueError, match="not a generated sample"):
        sc.write_catalogue(tmp_path, seed=1, workers=1, **SMALL)
    assert files_of(tmp_path) == {"X_train_update.csv": b"real data"}


def test_the_word_list_for_readers_holds_words_of_the_sample_each_once():
    listed = pd.read_csv(ROOT / "data" / "sample_gloss.csv", keep_default_na=False)["french"]
    said = sc.WORDS_FILE.read_text(encoding="utf-8").lower()
    assert listed.is_unique and (listed == listed.str.lower()).all()
    assert [word for word in listed if not re.search(rf"\b{re.escape(word)}\b", said)] == []
