"""A run's catalogue and pictures, looked at; the list of all checks is in commands/doctor.py."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track

import helpers as h
from engine import catalogue
from engine.pictures import decode_picture
from engine.progress import in_threads
from engine.rows import chosen_labels, chosen_products, set_aside, usable_products
from engine.runs import Run, runs_folder
from engine.settings import PROFILES


@dataclass(frozen=True)
class Check:
    """One thing that a run needs: "ok", "warning" or "fatal"; what was found; what to do."""
    name: str
    state: str
    found: str
    todo: str = ""


def judge(name: str, found: str, wrong: str, todo: str = "", state: str = "fatal") -> Check:
    """ok with what was found; or, if there is something wrong, that and what to do."""
    return Check(name, state, wrong, todo) if wrong else Check(name, "ok", found)


def fault(call: Callable, *arguments: object) -> str:
    """What a call says against its arguments; "" if nothing."""
    try:
        call(*arguments)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


# --- the catalogue and its pictures ---------------------------------------------------------------
LABELLED = 84_916                        # rows of the public table
NOT_MISSING, NOT_BLANK = 55_116, 55_025  # descriptions: cells not missing, the class table's sum
UNLABELLED = {"X_test_update.csv": 13_812, "x_test_task1_phase1.tsv": 937,
              "x_test_task1_phase2.tsv": 8_435}
PICTURES_DECODED, NAMES_SHOWN = 500, 10
SUBSET = "fine for a subset; otherwise get the files again"


def check_catalogue(run: Run) -> list[Check]:
    """Whether there is a catalogue, can be read, and has rows that can be split."""
    if wrong := fault(catalogue.catalogue_folder, run):
        return [Check("catalogue", "fatal", wrong)]
    folder = catalogue.catalogue_folder(run)
    checks = [Check("catalogue", "ok", f"{catalogue.find_layout(folder)} layout in {folder}")]
    if wrong := fault(usable_products, run):
        return [*checks, Check("tables", "fatal", wrong)]
    if len(rows := set_aside(run)):
        found = f"{len(rows):,} are set aside: {catalogue.told_rows(rows)}"
        checks += [Check("bad rows", "warning", found, "`set_aside.csv` of stage splits has all")]
    held_out = h.held_out_share(run.profile)
    known = catalogue.load_classes(run)["prdtypecode"]
    wrong = fault(lambda: h.make_split(chosen_labels(run), run.split, run.seed, held_out=held_out,
                                       codes=known))
    checks += [judge("rows", f"the {run.protocol} rows can be split {run.split}", wrong,
                     "choose other rows, or get the tables again")]
    codes = usable_products(run)["prdtypecode"].drop_duplicates().sort_values()
    if not wrong and (lost := absent_codes(codes, chosen_products(run))):
        checks += [Check("codes of these rows", "warning", f"none of {', '.join(lost)}, which the "
                         "catalogue has", "use rows='all', or read the scores as of fewer classes")]
    return checks


def absent_codes(codes: pd.Series, products: pd.DataFrame) -> list[str]:
    """Those of these product type codes of which there is no product."""
    return codes[~codes.isin(products["prdtypecode"])].astype(str).tolist()


def chosen_rows(run: Run) -> pd.DataFrame:
    """The run's rows; none, where `check_catalogue` says why."""
    wrong = fault(chosen_products, run)
    return pd.DataFrame() if wrong else chosen_products(run)


def check_counts(run: Run) -> list[Check]:
    """The tables beside what the public ones hold."""
    if chosen_rows(run).empty:
        return []
    folder = catalogue.catalogue_folder(run)
    public = run.profile.data == PROFILES["paper"].data and not run.own_catalogue
    checks = check_rows(usable_products(run), catalogue.load_classes(run), public)
    return [*checks, check_unlabelled(folder)] if public else checks


def check_rows(products: pd.DataFrame, classes: pd.DataFrame, public: bool) -> list[Check]:
    """Row counts, for Rakuten's files beside the public ones, and the codes of the class table."""
    rows, texts = len(products), products["description"]
    filled, described = int((texts != "").sum()), int(texts.map(h.has_words).sum())
    tables, told = f"{rows:,} labelled rows", f"{filled:,} not missing, {described:,} with words"
    if public:
        tables += f" (public: {LABELLED:,})"
        told += (f" (public: {NOT_MISSING:,}; data/rakuten_classes.csv sums to {NOT_BLANK:,}; "
                 "which rows the difference is, is an open question)")
    other_texts = public and filled != NOT_MISSING and described != NOT_BLANK
    absent, known = absent_codes(classes["prdtypecode"], products), len(classes)
    lacks = f"{known - len(absent)} of {known}; without a row: {', '.join(absent)}"
    return [judge("tables", tables, tables * (public and rows != LABELLED), SUBSET, "warning"),
            judge("descriptions", told, told * other_texts, SUBSET, "warning"),
            judge("codes", f"all {known}", lacks * bool(absent), SUBSET, "warning")]


def check_unlabelled(folder: Path) -> Check:
    """The challenge's test table, which only a submission needs."""
    name = "unlabelled table"
    if wrong := fault(catalogue.load_test_products, folder):
        return Check(name, "warning", wrong, "only a submission file needs it")
    table, products = catalogue.test_table(folder), catalogue.load_test_products(folder)
    rows, absent = len(products), len(catalogue.absent_pictures(products))
    found = f"{table}: {rows:,} rows (public: {UNLABELLED[table]:,}), {rows - absent:,} pictures"
    if absent:
        return Check(name, "warning", found, "a submission needs all of their pictures")
    return judge(name, found, found * (rows != UNLABELLED[table]), SUBSET, "warning")


def check_pictures(run: Run) -> list[Check]:
    """Whether each picture of the run's rows is there and not empty."""
    products = chosen_rows(run)
    if products.empty:
        return []
    absent, rows = catalogue.absent_pictures(products), f"{len(products):,}"
    folder = Path(products["picture"].iloc[0]).parent
    wrong = f"{len(absent):,} of {rows} pictures are absent, empty or links out of {folder}: "
    todo = "get them again, or remove their rows from both tables"
    if len(absent) == len(products):
        places = catalogue.LAYOUTS[catalogue.find_layout(catalogue.catalogue_folder(run))]["images"]
        todo = f"unpack them into one of {', '.join(places)}"
    return [judge("pictures", f"{rows} of {rows} in {folder}",
                  wrong + listed(absent, "absent") if absent else "", todo)]


def listed(paths: list[str], what: str) -> str:
    """The names of some files; where they are many, of the first ten, and a file that has all."""
    names = ", ".join(Path(path).name for path in paths[:NAMES_SHOWN])
    if len(paths) <= NAMES_SHOWN:
        return names
    listing = runs_folder() / f"pictures-{what}.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    return f"{names} ...; all of them: {listing}"


def decode_some(run: Run, most: int = 0) -> list[Check]:
    """Whether pictures can be decoded; a random choice, where they are many."""
    products = chosen_rows(run)
    if products.empty:
        return []
    present = sorted(set(products["picture"]) - set(catalogue.absent_pictures(products)))
    most = min(most or PICTURES_DECODED, len(present))
    some = np.random.default_rng(0).choice(present, most, replace=False).tolist()
    size, bar = run.profile.image_size, Console(stderr=True)
    faults = in_threads(lambda path: fault(decode_picture, path, size), some)
    faults = list(track(faults, "decoding pictures", most, console=bar, transient=True))
    unreadable = sorted(path for path, wrong in zip(some, faults) if wrong)
    found = f"{most - len(unreadable):,} of {most:,} decode"
    if most < len(present):
        found += f" (a random choice of {len(present):,}; --all-pictures: all)"
    wrong = f"{found}; {len(unreadable):,} unreadable: {listed(unreadable, 'unreadable')}"
    return [judge("decoding", found, wrong if unreadable else "",
                  "get them again, or remove their rows")]


def decode_all(run: Run) -> list[Check]:
    """Whether all pictures can be decoded."""
    return decode_some(run, len(chosen_rows(run)))
