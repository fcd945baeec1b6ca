"""`run.py import`: a catalogue of one's own, from one table, in the layout that the study reads."""
from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image
from rich.console import Console

from engine.catalogue import LAYOUTS, first_fault, refuse_bad_rows
from engine.files import one_line, put_in_place
from engine.pictures import picture_faults
from engine.runs import OWN_CLASSES
from engine.settings import FIELDS
from engine.tables import CONTROL, WHOLE, split_rows
from engine.texts import has_words

LAYOUT = LAYOUTS["ENS"]
NO_PICTURE = ("", "-")  # how a table says that a product has none
SEPARATORS = {".tsv": "\t", ".tab": "\t"}
BLANK_SIDE = 224  # pixels of the white picture that stands for a missing one


@dataclass(frozen=True)
class Columns:
    """The names that the table's columns have; "" for a description or an image it lacks."""
    title: str
    label: str
    description: str = ""
    image: str = ""

    @property
    def named(self) -> dict[str, str]:
        """{our name: the table's} of those that are there."""
        return {name: column for name, column in vars(self).items() if column}


def import_catalogue(table: Path, folder: Path, columns: Columns, images: Path | None = None,
                     encoding: str = "utf-8-sig", blank: bool = False) -> dict[str, int]:
    """Write the products of a CSV, TSV or Parquet file into `folder` as an ENS catalogue, with its
    class table beside it; returns how many rows, classes, descriptions and pictures there are.

    Pictures are named by path, absolute or from `images` (default: the table's folder), and
    copied. A row without one is refused; with `blank` a white picture stands for it. A product's id
    is the number of its row, from 1. ValueError, with the rows, for what does not fit; then
    nothing is written.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; name another folder, or remove it")
    rows = read_rows(table, columns, encoding)
    rows["picture"] = find_pictures(rows["image"], images or table.parent)
    refuse_bad_rows(table, faults_of(rows, blank), "correct them")
    classes = class_table(rows)
    with put_in_place(folder) as partial:
        write_tables(partial, rows, classes)
        copy_pictures(partial / LAYOUT["images"][0], rows)
    return {"rows": len(rows), "classes": len(classes),
            "with a description": int(rows["description"].map(has_words).sum()),
            "with a picture": int((rows["picture"] != "").sum())}


def read_rows(path: Path, columns: Columns, encoding: str) -> pd.DataFrame:
    """[title, description, image, label] as texts, "" for a missing one, by row number from 1."""
    if path.suffix == ".parquet":
        table = read_parquet(path)
    else:
        table = read_text_table(path, columns.title, encoding)
    if missing := [column for column in columns.named.values() if column not in table]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; found: "
                         f"{', '.join(map(str, table))}")
    rows = pd.DataFrame("", table.index, ["title", "description", "image", "label"])
    for name, column in columns.named.items():
        rows[name] = table[column].astype(object).where(table[column].notna(), "").map(as_text)
    return rows.set_axis(range(1, len(rows) + 1))


def as_text(value: object) -> str:
    """A cell as text; a whole number without the ".0" that an absent neighbour gives it."""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value).strip()


def read_parquet(path: Path) -> pd.DataFrame:
    """A Parquet file's table; ValueError if it cannot be read."""
    try:
        return pd.read_parquet(path)
    except ImportError as error:
        raise ValueError(f"to read {path}, install pyarrow: .venv/bin/python -m pip install "
                         "pyarrow; or save the table as CSV") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({one_line(error)})") from error


def read_text_table(path: Path, title: str, encoding: str) -> pd.DataFrame:
    """A CSV's or TSV's table as texts. Of a CSV the separator is the one of , ; tab and | that
    gives its first line the most columns, the title's among them.
    """
    try:
        text = path.read_bytes().decode(encoding)
    except (OSError, UnicodeError, LookupError) as error:
        raise ValueError(f"{path} cannot be read as text in {encoding} ({one_line(error)}); "
                         "name another with --encoding, such as cp1252") from error
    first = text.partition("\n")[0]
    separator = SEPARATORS.get(path.suffix) or max(
        ",;\t|", key=lambda mark: (title in split_line(first, mark), first.count(mark)))
    header, rows = split_rows(path, text, separator)
    if twice := {column for column in header if header.count(column) > 1}:
        raise ValueError(f"{path} has the column {', '.join(sorted(twice))} more than once")
    return pd.DataFrame(rows, columns=header, dtype=str)


def split_line(line: str, mark: str) -> list[str]:
    """The fields of a first line, without their quotation marks."""
    return [field.strip().strip('"') for field in line.split(mark)]


def find_pictures(names: Sequence[str], folder: Path) -> list[str]:
    """The path of each picture, "" for a product without one."""
    return ["" if name in NO_PICTURE else os.path.join(folder, name) for name in names]


def faults_of(rows: pd.DataFrame, blank: bool) -> pd.DataFrame:
    """[row, why] of the rows that cannot be used."""
    shown = rows["picture"].where(rows["picture"] != "").dropna()
    unreadable = pd.Series(picture_faults(shown.tolist()), shown.index, dtype=object)
    unreadable = unreadable.reindex(rows.index, fill_value="")
    absent = (rows["picture"] == "") & (not blank)
    words = [(~rows["title"].map(has_words), "its title is empty", rows["title"]),
             (rows["label"] == "", "its label is empty", rows["label"]),
             (rows["label"].str.contains(CONTROL), "its label {!r} holds a control character",
              rows["label"]),
             (absent, "it names no picture (--blank puts a white one there)", rows["image"]),
             (unreadable != "", "{}", unreadable)]
    words += [(rows[field].str.contains("\0", regex=False), f"its {field} holds a null byte",
               rows[field]) for field in FIELDS]
    why = first_fault(words)
    return pd.DataFrame({"row": rows.index, "why": why})[(why != "").to_numpy()]


def class_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The classes in the order of their names: label_id, prdtypecode, domain, name_fr, name_en,
    train_rows and rows_with_description. The code is the label where all labels are whole numbers,
    else its place from 1.
    """
    labels = rows["label"]
    names = sorted(labels.unique())
    if labels.str.fullmatch(WHOLE).all():
        names = sorted(names, key=int)
        codes = [int(name) for name in names]
    else:
        codes = list(range(1, len(names) + 1))
    if len(names) < 2:
        raise ValueError(f"all rows have the label {names[0]!r}; a classifier needs two or more")
    described = rows["description"].map(has_words).groupby(labels).sum()
    return pd.DataFrame({
        "label_id": range(len(names)), "prdtypecode": codes, "domain": "all", "name_fr": names,
        "name_en": names, "train_rows": labels.value_counts().loc[names].to_numpy(),
        "rows_with_description": described.loc[names].to_numpy()})


def write_tables(folder: Path, rows: pd.DataFrame, classes: pd.DataFrame) -> None:
    """The two tables of the ENS layout, and the class table."""
    folder.mkdir(parents=True)
    code = dict(zip(classes["name_en"], classes["prdtypecode"]))
    x = pd.DataFrame({"designation": rows["title"], "description": rows["description"],
                      "productid": rows.index, "imageid": rows.index})
    x.reset_index(drop=True).to_csv(folder / LAYOUT["x"])
    y = pd.DataFrame({LAYOUT["label"]: rows["label"].map(code)})
    y.reset_index(drop=True).to_csv(folder / LAYOUT["y"])
    classes.to_csv(folder / OWN_CLASSES, index=False)


def copy_pictures(folder: Path, rows: pd.DataFrame) -> None:
    """Each product's picture under the name that the layout gives it, or a white one."""
    folder.mkdir(parents=True)
    for row, picture in rows["picture"].items():
        target = folder / f"image_{row}_product_{row}.jpg"  # read by content, whatever its name
        if picture:
            shutil.copyfile(picture, target)
        else:
            Image.new("RGB", (BLANK_SIDE, BLANK_SIDE), "white").save(target)


def print_import(console: Console, folder: Path, counts: dict[str, int]) -> None:
    """What was written, and the commands that go on with it."""
    told = ", ".join(f"{number:,} {name}" for name, number in counts.items())
    console.print(f"{folder}: {told}", highlight=False, soft_wrap=True)
    more = " --rows all" if counts["with a description"] < counts["rows"] else ""
    for profile, what in (("sample", "small encoders, in minutes"), ("paper", "full size")):
        console.print(f"  python run.py study --profile {profile} --set data={folder}{more}"
                      f"   # {what}", highlight=False, soft_wrap=True)
