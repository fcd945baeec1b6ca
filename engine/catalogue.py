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
from engine.files import file_stats, hash_file, lock_of, one_line, read_json
from engine.fingerprint import content
from engine.runs import Run, cache_folder, from_root
from engine.settings import FIELDS

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


@content(lambda run: hash_file(CLASSES))
def load_classes() -> pd.DataFrame:
    """The 27 classes: label_id, prdtypecode, domain, name_fr, name_en, train_rows, and
    rows_with_description.
    """
    return pd.read_csv(CLASSES)


@content(lambda run: hash_file(PUBLISHED))
def load_published() -> pd.DataFrame:
    """The figures of the paper and of its published code, each with its source."""
    return pd.read_csv(PUBLISHED)


# --- where it lies --------------------------------------------------------------------------------
def catalogue_folder(run: Run) -> Path:
    """Where the run's catalogue lies; makes the sample if it is missing or of other sources.

    The sample lies beside the cache, data/cache unless STUDY_CACHE names another. RAKUTEN_DATA
    replaces `data/raw`. FileNotFoundError says what to do if there is no catalogue.
    """
    if run.synthetic:
        return _current_sample(cache_folder().with_name("sample"))
    folder = from_root(os.environ.get("RAKUTEN_DATA") or run.profile.data)
    find_layout(folder)
    return folder


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
        written = read_json(folder / "sample.json") or {}
        return written.get("source_sha256") == generator.source_hash()

    if not is_current():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock_of(folder.with_suffix(".lock")):
            if not is_current():  # another process may have made it meanwhile
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
    label_id (0 to 26, the order of data/rakuten_classes.csv), picture (path). ValueError for a
    column, code or id that does not fit. Shown in 01.
    """
    layout = LAYOUTS[find_layout(folder)]
    x = read_products(folder, layout["x"], layout["images"])
    y = read_table(folder, layout["y"], [layout["label"]])
    if not x.index.equals(y.index):
        raise ValueError(f"{layout['x']} ({len(x)} rows) and {layout['y']} ({len(y)} rows) in "
                         f"{folder} do not list the same products in the same order; download "
                         "both again")
    products = x.drop(columns="picture").assign(prdtypecode=y[layout["label"]])
    products = products.assign(label_id=encode_labels(products["prdtypecode"]))
    return products.assign(picture=x["picture"]).reset_index(drop=True)


def load_test_products(folder: Path) -> pd.DataFrame:
    """The challenge's unlabelled products, with the file's own index and without label columns.

    FileNotFoundError names the files that would do. SIGIR's second phase goes before its first.
    """
    name = test_table(folder)
    return read_products(folder, name, LAYOUTS[find_layout(folder)]["test"][name])


def test_table(folder: Path) -> str:
    """The name of the file that lists the challenge's unlabelled products; FileNotFoundError."""
    tables = LAYOUTS[find_layout(folder)]["test"]
    for name in tables:
        if (folder / name).exists():
            return name
    raise FileNotFoundError(f"no unlabelled products in {folder}: it needs {' or '.join(tables)} "
                            "(see data/README.md)")


def read_products(folder: Path, file: str, images: Sequence[str]) -> pd.DataFrame:
    """[product_id, image_id, title, description, picture] of one table, with its index."""
    columns = LAYOUTS[find_layout(folder)]["columns"]
    x = read_table(folder, file, list(columns))[list(columns)].rename(columns=columns)
    for name in ("product_id", "image_id"):
        odd = x[name][~x[name].astype(str).str.fullmatch(r"\d{1,18}")]
        if len(odd):
            raise ValueError(f"{folder / file}: {name} {str(odd.iloc[0])!r} is no whole number of "
                             "at most 18 digits; get the file again")
    if not x["product_id"].is_unique:
        twice = x["product_id"][x["product_id"].duplicated()].iloc[0]
        raise ValueError(f"product ids in {folder / file} are not unique: {twice} occurs twice")
    place = next((folder / name for name in images if (folder / name).is_dir()),
                 folder / images[0])
    x["picture"] = [str(place / f"image_{image}_product_{product}.jpg")
                    for image, product in zip(x["image_id"], x["product_id"])]
    return x


def read_table(folder: Path, file: str, columns: Sequence[str]) -> pd.DataFrame:
    """A table of the catalogue as it is, "" for a missing text; ValueError names a lost column."""
    layout, path = LAYOUTS[find_layout(folder)], folder / file
    text = {theirs: str for theirs, ours in layout["columns"].items() if ours in FIELDS}
    try:
        table = pd.read_csv(path, sep=layout["separator"], index_col=0, keep_default_na=False,
                            dtype=text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a table in UTF-8 ({one_line(error)}); get it "
                         "again") from error
    refuse_odd_rows(path, table, [*layout["columns"], layout["label"]])
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; found: {', '.join(table)}")
    return table


def refuse_odd_rows(path: Path, table: pd.DataFrame, columns: Sequence[str]) -> None:
    """ValueError if the table's first column does not number its rows."""
    if table.index.name in columns:
        raise ValueError(f"{path} was saved without its row numbers: its first column is "
                         f"{table.index.name!r}; save it with them, or get it again")
    numbers = table.index.astype(str)
    odd = numbers[~numbers.str.fullmatch(r"\d{1,18}")]
    if len(odd):
        raise ValueError(f"{path}: its first column holds {odd[0]!r}, which is no row number; get "
                         "it again")
    if numbers.has_duplicates:
        twice = numbers[numbers.duplicated()][0]
        raise ValueError(f"{path}: the row number {twice} occurs twice; get it again")


def encode_labels(codes: pd.Series) -> pd.Series:
    """Label ids 0 to 26 of Rakuten's type codes; ValueError names codes that are not known."""
    label_of = load_classes().set_index("prdtypecode")["label_id"]
    labels = pd.to_numeric(codes, errors="coerce").map(label_of)
    if labels.isna().any():
        unknown = codes[labels.isna()].drop_duplicates().head(5).tolist()
        raise ValueError(f"unknown product type codes {unknown}; data/rakuten_classes.csv lists "
                         "the 27 known ones")
    return labels.astype("int64")


# --- pictures -------------------------------------------------------------------------------------
def absent_pictures(products: pd.DataFrame) -> list[str]:
    """The paths of these products' pictures that are not there, or are empty files."""
    about = file_stats(products["picture"])
    return [path for path in products["picture"] if path not in about or not about[path].st_size]


def check_pictures(products: pd.DataFrame, todo: str = "") -> None:
    """ValueError that counts the absent pictures and names the first of them."""
    if absent := absent_pictures(products):
        names = ", ".join(Path(path).name for path in absent[:3]) + ", ..." * (len(absent) > 3)
        raise ValueError(f"{len(absent):,} of {len(products):,} pictures are absent or empty in "
                         f"{Path(absent[0]).parent}: {names}; "
                         f"{todo or '`run.py doctor` lists them all'}")
