"""Both public layouts as one table, checked."""
from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pandas as pd

from engine import settings
from engine.files import file_stats, full_disk_explained, hash_file, lock_of, make_folder, read_json
from engine.fingerprint import content
from engine.runs import OWN_CLASSES, SAMPLE_MARK, Run, cache_folder
from engine.settings import FIELDS
from engine.tables import CODE, WHOLE, read_classes, read_table
from engine.texts import strip_html

LAYOUTS = {
    "ENS": {
        "x": "X_train_update.csv", "y": "Y_train_CVw08PX.csv", "separator": ",",
        "columns": {"designation": "title", "description": "description",
                    "productid": "product_id", "imageid": "image_id"},
        "label": "prdtypecode", "images": ("images/image_train", "image_train"),
        # Unlabelled products, and the folders of their pictures.
        "test": {"X_test_update.csv": ("images/image_test", "image_test")}},
    "SIGIR": {
        "x": "X_train.tsv", "y": "Y_train.tsv", "separator": "\t",
        "columns": {"Title": "title", "Description": "description",
                    "Product_id": "product_id", "Image_id": "image_id"},
        "label": "Prdtypecode", "images": ("image_training", "images/image_training", "images"),
        "test": {
            "x_test_task1_phase2.tsv": ("image_test/image_test_task1_phase2", "image_test",
                                        "images"),
            "x_test_task1_phase1.tsv": ("image_test/image_test_task1_phase1", "image_test",
                                        "images")}},
}
CLASSES = settings.ROOT / "data" / "rakuten_classes.csv"
PUBLISHED = settings.ROOT / "data" / "published_results.csv"
RELEASED = settings.ROOT / "data" / "released_code.csv"


def classes_file(folder: Path) -> Path:
    """The class table of the catalogue in `folder`: its own classes.csv, or Rakuten's."""
    own = folder / OWN_CLASSES
    return own if own.exists() else CLASSES


@content(lambda run: hash_file(classes_file(catalogue_folder(run))))
def load_classes(run: Run) -> pd.DataFrame:
    """The classes of the run's catalogue: label_id, prdtypecode, domain, name_fr, name_en, and how
    many rows each has in the whole table, train_rows, of these rows_with_description.
    """
    return read_classes(classes_file(catalogue_folder(run)))


def load_rakuten_classes() -> pd.DataFrame:
    """Rakuten's 27 classes with the public tables' row counts, whatever a run is about."""
    return read_classes(CLASSES)


@content(lambda run: hash_file(PUBLISHED))
def load_published() -> pd.DataFrame:
    """The figures of the paper, of its published code, of the challenge and of later public work,
    each with its source, rows, part and n.
    """
    return pd.read_csv(PUBLISHED)


def load_released() -> pd.DataFrame:
    """What the paper says and what its released notebooks do, point by point, with the place."""
    return pd.read_csv(RELEASED)


def load_text_lengths() -> pd.DataFrame:
    """How long some real product texts are in tokens, as data/README.md says they were measured."""
    return pd.read_csv(RELEASED.with_name("real_text_lengths.csv"), index_col="texts")


# --- where it lies --------------------------------------------------------------------------------
def catalogue_folder(run: Run) -> Path:
    """Where the run's catalogue lies; makes the sample if it is missing or of other sources.

    The sample lies beside the cache, data/cache unless STUDY_CACHE names another. RAKUTEN_DATA
    replaces `data/raw`. FileNotFoundError says what to do if there is no catalogue.
    """
    if run.profile.data == settings.PROFILES["sample"].data:
        return _current_sample(cache_folder().with_name("sample"))
    find_layout(run.data_folder)
    return run.data_folder


def sample_generator() -> ModuleType:
    """The module data/sample_catalogue.py, loaded again once it or its words have changed."""
    path = CLASSES.with_name("sample_catalogue.py")
    return _load_generator(path, hash_file(path), hash_file(path.with_name("sample_words.toml")))


@lru_cache(maxsize=1)
def _load_generator(path: Path, *state: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("sample_catalogue", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _current_sample(folder: Path) -> Path:
    generator = sample_generator()

    def is_current() -> bool:
        written = read_json(folder / SAMPLE_MARK) or {}
        return written.get("source_sha256") == generator.source_hash()

    if not is_current():
        make_folder(folder.parent, "STUDY_CACHE")
        with lock_of(folder.with_suffix(".lock")):
            if not is_current():  # another process may have made it meanwhile
                with full_disk_explained(folder.parent):
                    generator.write_catalogue(folder)
    return folder


def find_layout(folder: Path) -> str:
    """"ENS" or "SIGIR", by the files in `folder`; FileNotFoundError names those that lack."""
    for name, layout in LAYOUTS.items():
        if (folder / layout["x"]).exists() and (folder / layout["y"]).exists():
            return name
    wanted = " or ".join(f"{layout['x']} and {layout['y']} ({name})"
                         for name, layout in LAYOUTS.items())
    raise FileNotFoundError(f"no catalogue in {folder}: it needs {wanted}. Put the files there or "
                            "name their folder in RAKUTEN_DATA (see data/README.md)")


# --- tables ---------------------------------------------------------------------------------------
def load_catalogue(folder: Path) -> pd.DataFrame:
    """The labelled products of a folder in ENS or SIGIR layout, in file order.

    Columns: product_id, image_id (int64), title, description (str, "" if missing), prdtypecode,
    label_id (from 0, the order of the class table), picture (path). ValueError for a
    file, a column or a row that does not fit. Shown in 01.
    """
    products, bad = read_catalogue(folder)
    refuse_bad_rows(folder, bad)
    return products.reset_index(drop=True)


def read_catalogue(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The products whose rows fit, as `load_catalogue` gives them but by row number; and the other
    rows, as [row, product_id (text), why].
    """
    layout = LAYOUTS[find_layout(folder)]
    x = read_products(folder, layout["x"], layout["images"])
    y = read_rows(folder, layout["y"], [layout["label"]])
    refuse_other_rows(folder, x, y)
    codes = y[layout["label"]].loc[x.index]
    x["prdtypecode"] = pd.to_numeric(codes.where(codes.str.fullmatch(CODE)))
    table = classes_file(folder)
    classes = read_classes(table)
    x["label_id"] = x["prdtypecode"].map(classes.set_index("prdtypecode")["label_id"])
    place = "data/rakuten_classes.csv" if table == CLASSES else OWN_CLASSES
    unknown = f"the product type code {{!r}} is none of the {len(classes)} of {place}"
    x["why"] = first_fault([(x["why"] != "", "{}", x["why"]),
                            (x["title"].map(strip_html) == "", "its title is empty", codes),
                            (x["label_id"].isna(), unknown, codes)])
    fits = x["why"] == ""
    bad = x.loc[~fits, ["product_id", "why"]].rename_axis("row").reset_index()
    return with_numbers(x[fits]), bad


def load_test_products(folder: Path) -> pd.DataFrame:
    """The challenge's unlabelled products, with the file's own index and without label columns.

    FileNotFoundError names the files that would do. SIGIR's second phase goes before its first.
    ValueError for any row that does not fit: each must get its label.
    """
    name = test_table(folder)
    x = read_products(folder, name, LAYOUTS[find_layout(folder)]["test"][name])
    bad = x.loc[x["why"] != "", ["why"]].rename_axis("row").reset_index()
    refuse_bad_rows(folder / name, bad, "correct them")
    return with_numbers(x)


def test_table(folder: Path) -> str:
    """The name of the file that lists the challenge's unlabelled products; FileNotFoundError."""
    tables = LAYOUTS[find_layout(folder)]["test"]
    for name in tables:
        if (folder / name).exists():
            return name
    raise FileNotFoundError(f"no unlabelled products in {folder}: it needs {' or '.join(tables)} "
                            "(see data/README.md)")


def read_products(folder: Path, file: str, images: Sequence[str]) -> pd.DataFrame:
    """[product_id, image_id, title, description, picture, why] of one table, all as texts, by row
    number. `why` says what is wrong with a row, "" if nothing.
    """
    columns = LAYOUTS[find_layout(folder)]["columns"]
    x = read_rows(folder, file, list(columns)).rename(columns=columns)
    ids, odd = x["product_id"], "{!r} is no whole number of at most 18 digits"
    faults = [(~x[name].str.fullmatch(WHOLE), f"{name} {odd}", x[name])
              for name in ("product_id", "image_id")]
    faults += [(ids.duplicated(keep=False), "product_id {} occurs twice", ids)]
    faults += [(x[name].str.contains("\0", regex=False), f"its {name} holds a null byte", ids)
               for name in FIELDS]
    x["why"] = first_fault(faults)
    names = [f"image_{image}_product_{product}"
             for image, product in zip(x["image_id"], x["product_id"])]
    x["picture"] = picture_paths([folder / place for place in images], names)
    return x


def read_rows(folder: Path, file: str, columns: Sequence[str]) -> pd.DataFrame:
    """The columns of one of the catalogue's tables, as texts, by row number (int64)."""
    layout = LAYOUTS[find_layout(folder)]
    known = [*layout["columns"], layout["label"]]
    table = read_table(folder / file, layout["separator"], columns, known)
    return table.set_axis(table.index.astype("int64"))


def first_fault(faults: Sequence[tuple[pd.Series, str, pd.Series]]) -> pd.Series:
    """For each row the words of the first of these that is true, (where, words, of what values);
    "" if none is.
    """
    why = pd.Series("", faults[0][0].index)
    for wrong, words, values in faults:
        rows = why.index[wrong & (why == "")]
        why.loc[rows] = [words.format(value) for value in values.loc[rows]]
    return why


def with_numbers(x: pd.DataFrame) -> pd.DataFrame:
    """Rows that fit, without `why`, their numbers as int64."""
    numbers = {"product_id", "image_id", "prdtypecode", "label_id"}
    return x.drop(columns="why").astype({name: "int64" for name in x if name in numbers})


def refuse_other_rows(folder: Path, x: pd.DataFrame, y: pd.DataFrame) -> None:
    """ValueError with the first row number that only one of the two labelled tables has."""
    layout = LAYOUTS[find_layout(folder)]
    for one, other, name in ((x, y, "x"), (y, x, "y")):
        alone = one.index.difference(other.index)
        if len(alone):
            raise ValueError(
                f"{layout['x']} ({len(x):,} rows) and {layout['y']} ({len(y):,} rows) in {folder} "
                f"do not list the same rows: {alone[0]} is in {layout[name]} alone, as are "
                f"{len(alone) - 1:,} others (a quotation mark that is not closed swallows the "
                "rows that follow); get both again")


def refuse_bad_rows(place: Path, bad: pd.DataFrame,
                    todo: str = "correct them, or set bad_rows=set_aside: it goes on without them "
                                "and lists them") -> None:
    """ValueError that counts the rows [row, why] that cannot be used, and names the first three."""
    if len(bad):
        raise ValueError(f"{place}: {len(bad):,} rows cannot be used ({told_rows(bad)}); {todo}")


def told_rows(bad: pd.DataFrame) -> str:
    """What is wrong with the first three rows [row, why]."""
    some = [f"row {row}: {why}" for row, why in zip(bad["row"][:3], bad["why"])]
    return "; ".join(some + ["..."] * (len(bad) > 3))


# --- pictures -------------------------------------------------------------------------------------
def picture_paths(places: Sequence[Path], names: Sequence[str]) -> list[str]:
    """The path of each picture, in that of the places which holds most of them.

    A place may hold one more folder of its name in which they lie, and .JPG or .jpeg is as good as
    .jpg. Of an absent one it is the path where it should be.
    """
    folders = [folder for place in places for folder in (place, place / place.name)]
    best, there = next((folder for folder in folders if folder.is_dir()), places[0]), {}
    for folder in filter(Path.is_dir, folders):
        files = {file.rpartition(".")[0].lower(): file for file in sorted(os.listdir(folder))
                 if file.lower().endswith((".jpg", ".jpeg"))}
        found = {name: files[name] for name in names if name in files}
        if len(found) > len(there):
            best, there = folder, found
    return [f"{best}{os.sep}{there.get(name, f'{name}.jpg')}" for name in names]


def absent_pictures(products: pd.DataFrame) -> list[str]:
    """The paths of these products' pictures that are not there, are empty, or are links that lead
    out of their folder.
    """
    about = file_stats(products["picture"])
    return [path for path in products["picture"] if path not in about or not about[path].st_size]


def check_pictures(products: pd.DataFrame, todo: str = "") -> None:
    """ValueError that counts the absent pictures and names the first of them."""
    if absent := absent_pictures(products):
        names = ", ".join(Path(path).name for path in absent[:3]) + ", ..." * (len(absent) > 3)
        raise ValueError(f"{len(absent):,} of {len(products):,} pictures are absent, empty, or "
                         f"links out of {Path(absent[0]).parent}: {names}; "
                         f"{todo or '`run.py doctor` lists them all'}")
