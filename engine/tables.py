"""A table of the catalogue as text, refused by line where it is not what it should be."""
from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from engine.files import one_line

CONTROL = r"[\x00-\x1f\x7f-\x9f]"
WHOLE = r"(?:0|[1-9][0-9]{0,17})"  # an id, or a row's number
CODE = rf"{WHOLE}(?:\.0+)?"  # a product type code, also as pandas saves it beside a missing one
OTHER_FILES = {b"\x1f\x8b": "compressed by gzip: unpack it", b"PK\x03\x04": "a zip or Excel file: "
               "unpack it, or save it as text", b"\xd0\xcf\x11\xe0": "an Excel file: save it as "
               "text", b"\xff\xfe": "in UTF-16: save it in UTF-8", b"\xfe\xff": "in UTF-16: save "
               "it in UTF-8"}


def read_table(path: Path, separator: str, columns: Sequence[str],
               known: Sequence[str]) -> pd.DataFrame:
    """A table's columns as texts, "" for a missing one, indexed by its row numbers (texts too).

    ValueError names the line, the row or the column that does not fit. `known` are columns: a file
    that begins with one of them has lost its row numbers.
    """
    header, rows = split_rows(path, text_of(path), separator)
    refuse_odd_columns(path, header, separator, columns, known)
    table = pd.DataFrame(rows, columns=header, dtype=str).set_index(header[0])
    refuse_odd_rows(path, table)
    return table[list(columns)]


def read_classes(path: Path) -> pd.DataFrame:
    """A class table; names are texts, also those like None, NA, True or 007. ValueError for one
    with a control character, which would steer a terminal, or break a line of a table.
    """
    texts = ("domain", "name_fr", "name_en")
    table = pd.read_csv(path, keep_default_na=False, dtype=dict.fromkeys(texts, str))
    for column in table.columns.intersection(texts):
        odd = table.loc[table[column].str.contains(CONTROL), column]
        if len(odd):
            raise ValueError(f"{path}: the {column} {odd.iloc[0]!r} holds a control character; "
                             "correct it")
    return table


def split_rows(path: Path, text: str, separator: str) -> tuple[list[str], list[list[str]]]:
    """The fields of a table's first line, and those of each other row; ValueError with the line."""
    csv.field_size_limit(len(text) + 1)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = next(lines, [])
        rows = [row for row in lines if row]
    except csv.Error as error:
        raise ValueError(f"{path}: line {lines.line_num}: {error}; a quotation mark there or above "
                         "is not closed, or not doubled within a text; get the file again") \
            from error
    if not rows:
        raise ValueError(f"{path} holds no rows; get it again")
    odd = next((row for row in rows if len(row) != len(header)), None)
    if odd is not None:
        raise ValueError(f"{path}: the row that begins with {odd[0][:40]!r} has {len(odd)} fields, "
                         f"the first line {len(header)}; get the file again")
    return header, rows


def text_of(path: Path) -> str:
    """A file's text; ValueError if its bytes are not text in UTF-8, with the line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({one_line(error)})") from error
    for mark, kind in OTHER_FILES.items():
        if content.startswith(mark):
            raise ValueError(f"{path} is {kind}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} is no text in UTF-8: line {line} holds the byte "
                         f"{error.object[error.start]:#x}; get it again, or save it in UTF-8 (from "
                         "Windows-1252: iconv -f WINDOWS-1252 -t UTF-8)") from error


def refuse_odd_columns(path: Path, header: Sequence[str], separator: str, columns: Sequence[str],
                       known: Sequence[str]) -> None:
    """ValueError if a table lacks one of the columns, or begins with one that is `known`."""
    first = header[0]
    if first in known:
        raise ValueError(f"{path} was saved without its row numbers: its first column is "
                         f"{first!r}; save it with them, or get it again")
    if missing := [column for column in columns if column not in header]:
        others = [other for other in ",;\t|" if other in first]
        hint = f"; is it separated by {others[0]!r} instead of {separator!r}?" if others else ""
        raise ValueError(f"{path} has no column {', '.join(missing)}; found: "
                         f"{', '.join(header)}{hint}")
    if twice := [column for column in columns if header.count(column) > 1]:
        raise ValueError(f"{path} has more than one column {', '.join(twice)}; keep one, or get it "
                         "again")


def refuse_odd_rows(path: Path, table: pd.DataFrame) -> None:
    """ValueError if the table's first column does not number its rows."""
    odd = table.index[~table.index.str.fullmatch(WHOLE)]
    if len(odd):
        raise ValueError(f"{path}: its first column holds {odd[0]!r}, which is no row number; get "
                         "it again")
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()][0]
        raise ValueError(f"{path}: the row number {twice} occurs twice; get it again")
