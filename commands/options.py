"""The words of the command line that commands share, and the plan that they ask for."""
from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from commands import plan as plans
from engine.settings import PROFILES, SPLITS, about, parse_settings, setting_names


def grid_options() -> argparse.ArgumentParser:
    """The options that say which runs, for the commands that share them."""
    grid = argparse.ArgumentParser(add_help=False)
    add = grid.add_argument_group("which runs").add_argument
    add("--profile", default="sample", help=" | ".join(PROFILES))
    add("--split", action="append", default=[], help="90-10 | 80-20; may be repeated")
    add("--seed", action="append", type=int, default=[], help="may be repeated")
    add("--rows", help="described | all")
    add("--grouped", action="store_true", help="duplicates stay on one side of a split")
    add("--limit", type=int, help="a stratified choice of this many rows")
    add("--config", metavar="FILE", help="settings from a TOML file: name = value, a line each")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="override a setting")
    return grid


def study_options(add: Callable) -> None:
    """What `study` is told besides the runs."""
    add("--from", dest="first", metavar="NN", help="execute this notebook and all after it again")
    add("--only", action="append", default=[], metavar="NN", help="execute only this notebook")
    add("--notebooks", type=int, metavar="N", help="notebooks executed at a time, of several "
        "splits and seeds (default: on the sample as many as there are cores, else 1)")
    add("--workers", type=int, default=1, metavar="N", help="stages made at a time, one GPU each")
    add("--on", default="here", help="here | ray: where stages are made side by side")
    add("--dry-run", action="store_true", help="only print what the study would cost")


def import_options(add: Callable) -> None:
    """What `import` has to know of a table."""
    add("table", type=Path, help="CSV, TSV or Parquet, a product a row")
    add("--to", type=Path, required=True, metavar="FOLDER", help="the catalogue's new folder")
    for column, needed in (("title", True), ("label", True), ("description", False),
                           ("image", False)):
        add(f"--{column}", required=needed, default="", metavar="COLUMN", help="the column's name")
    add("--images", type=Path, metavar="FOLDER", help="where pictures lie (default: by the table)")
    add("--encoding", default="utf-8-sig", help="of a text table, such as cp1252")
    add("--blank", action="store_true", help="a white picture stands for a missing one")


def predict_options(add: Callable) -> None:
    """What `predict` has to know besides the run."""
    add("file", type=Path, metavar="CSV", help="columns title, description, image")
    add("--to", type=Path, metavar="FILE", help="where predictions go; without it to the console")
    add("--from-folder", type=Path, metavar="FOLDER", help="what `export` has written, not a run")
    add("--variant", help="fusion, such as average-average (default: concat-add, or the folder's)")
    add("--probabilities", action="store_true", help="of all classes too")


def export_options(add: Callable) -> None:
    """What `export` has to know besides the run."""
    add("folder", type=Path, metavar="FOLDER", help="a new one")
    add("--variant", default="concat-add", help="fusion, such as average-average")


def make_plan(words: argparse.Namespace) -> list[plans.Step]:
    """The plan that the options over a grid ask for; ValueError for what is not allowed."""
    changes = {}
    if words.config:
        try:
            changes |= tomllib.loads(Path(words.config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--config {words.config} cannot be read as TOML ({error})") from error
    changes |= parse_settings(words.set)
    protocol = {"rows": words.rows, "grouped": words.grouped or None, "limit": words.limit}
    changes |= {name: value for name, value in protocol.items() if value is not None}
    return plans.make_plan(words.profile, words.split or list(SPLITS), words.seed or [0], changes)


def print_settings(console: Console) -> None:
    """Every setting with its default in each profile, its unit and its source, as a table."""
    table = Table("setting", *PROFILES, "unit", "what it is", "source")
    for name in setting_names():
        defaults = [str(getattr(profile, name)) for profile in PROFILES.values()]
        meaning, unit, source = about(name)
        table.add_row(name, *defaults, unit, meaning, source)
    console.print(table)
