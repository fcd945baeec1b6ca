"""Tables of new products: what they hold, what stands for what is missing, a CSV file's rows."""
from __future__ import annotations

from pathlib import Path

import pandas as pd

from engine.catalogue import refuse_bad_rows
from engine.pictures import decode_picture
from engine.settings import FIELDS
from engine.tables import split_rows, text_of
from engine.texts import clean_texts

PRODUCT_COLUMNS = (*FIELDS, "picture")
FILE_COLUMNS = {"title": "title", "description": "description", "image": "picture"}
STAND_INS = {"title": "no title: read as an empty text",
             "description": "no description: read as an empty text",
             "picture": "no picture: the training rows' mean stands for it"}


def whole_products(products: pd.DataFrame) -> pd.DataFrame:
    """[title, description, picture] as texts, "" for what is missing, by the table's own index.

    ValueError for columns that lack, for a table without rows, and for a row that holds nothing.
    """
    if lacking := [name for name in PRODUCT_COLUMNS if name not in products]:
        raise ValueError(f"the table of products has no column {', '.join(lacking)}; it needs "
                         f"{', '.join(PRODUCT_COLUMNS)}, and may leave a cell empty")
    if products.empty:
        raise ValueError("the table of products holds no row; give it at least one product")
    whole = products[list(PRODUCT_COLUMNS)].astype(object).fillna("").map(str)
    nothing = whole.index[(whole == "").all(axis=1)]
    if len(nothing):
        raise ValueError(f"row {nothing[0]} of the products has neither title, description nor "
                         "picture; give it one of them, or leave the row out")
    return whole


def cleaned_products(products: pd.DataFrame, clean: str) -> pd.DataFrame:
    """`whole_products` with their texts as the encoders read them, by the setting `clean`."""
    whole = whole_products(products)
    for field in FIELDS:
        whole[field] = clean_texts(whole[field], clean, f"cleaning each {field}")
    return whole


def missing_notes(products: pd.DataFrame) -> list[str]:
    """For each product a sentence on what is missing, and what stands for it; "" if nothing is."""
    missing = whole_products(products) == ""
    return ["; ".join(words for name, words in STAND_INS.items() if row[name])
            for row in missing.to_dict("records")]


# --- a CSV file -----------------------------------------------------------------------------------
def read_product_file(path: Path) -> pd.DataFrame:
    """[title, description, picture] of a CSV file with the columns title, description and image,
    in any order, by row number from 1. "-" and nothing mean that there is no such thing; an image's
    path counts from the file's folder.

    ValueError for a file that is no such table, with its line or columns, and for rows that cannot
    be used, by their numbers.
    """
    header, rows = split_rows(path, text_of(path), ",")
    header = [name.strip() for name in header]
    refuse_other_columns(path, header)
    table = pd.DataFrame(rows, range(1, len(rows) + 1), header, dtype=str)
    table = table[list(FILE_COLUMNS)].rename(columns=FILE_COLUMNS).map(str.strip).replace("-", "")
    table["picture"] = [str(path.parent / name) if name else "" for name in table["picture"]]
    bad = pd.DataFrame({"row": table.index, "why": list(map(row_fault, table.itertuples()))})
    refuse_bad_rows(path, bad[bad["why"] != ""], "correct them, or leave them out")
    return table


def refuse_other_columns(path: Path, header: list[str]) -> None:
    """ValueError that names the columns that a file of products lacks, or has besides."""
    lacking = [name for name in FILE_COLUMNS if name not in header]
    others = [name or "(unnamed)" for name in header if name not in FILE_COLUMNS]
    twice = [name for name in FILE_COLUMNS if header.count(name) > 1]
    found = {"lacks the column": lacking, "has the unknown column": others, "has twice": twice}
    if told := [f"{words} {', '.join(names)}" for words, names in found.items() if names]:
        raise ValueError(f"{path} {' and '.join(told)}: its columns must be "
                         f"{', '.join(FILE_COLUMNS)}, separated by commas")


def row_fault(row: tuple) -> str:
    """What is wrong with one product of a file, "" if nothing; its picture is decoded once."""
    if not (row.title or row.description or row.picture):
        return "it has neither title, description nor image"
    if row.picture:
        try:
            decode_picture(row.picture, 64)
        except ValueError as error:
            return str(error)
    return ""
