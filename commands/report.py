"""The result tables, and what of the default run stands in the repository."""
from __future__ import annotations

import shutil

import nbformat
import pandas as pd
import rich.box
from rich.console import Console
from rich.table import Table

import helpers as h
from commands.plan import Step, make_plan, runs_of, state
from engine import settings
from engine.paper_tables import over_seeds, row_ahead
from engine.runs import Run
from engine.stages import is_made


def read_tables(plan: list[Step]) -> list[tuple[str, Run, pd.DataFrame | None]]:
    """(title, run, table) of Tables I to V for each seed, of exactly these runs and from checked
    files; None where a split has not been scored.
    """
    tables = []
    for seed in sorted({step.run.seed for step in plan}):
        for number, split in h.TABLES.items():
            run = h.Run(plan[0].run.profile, split, seed)
            title = f"Table {number}, split {split}, seed {seed}"
            try:
                table = pd.read_csv(h.read_stage(run, "scores") / f"table_{number}.csv")
                tables.append((f"{title}, {h.rows_note(run)}", run, table))
            except FileNotFoundError:
                tables.append((f"{title}: not scored yet; run `{run.command}`", run, None))
    return tables


def read_claims(plan: list[Step]) -> list[tuple[str, pd.DataFrame]]:
    """(title, table) of the paper's claims, tested, for each seed whose splits have been scored."""
    tables = []
    for seed in sorted({step.run.seed for step in plan}):
        runs = [run for run in runs_of(plan) if run.seed == seed and is_made(run, "claims")]
        if not runs:
            continue
        table = h.read_claims(runs)[["split", "claim", *EFFECT, "verdict"]]
        table[["effect", "low", "high"]] = table[["effect", "low", "high"]].map("{:.1f}".format)
        table["p_holm"] = table["p_holm"].map("{:.2g}".format).replace("nan", "")
        tables.append((f"The paper's claims, seed {seed}", table))
    return tables


def read_seeds(plan: list[Step]) -> list[tuple[str, pd.DataFrame]]:
    """(title, table) of what the seed does, for each split that has been scored with several."""
    tables = []
    for split in settings.SPLITS:
        runs = [run for run in runs_of(plan) if run.split == split and is_made(run, "scores")]
        if len(runs) > 1:
            seeds = ", ".join(str(run.seed) for run in runs)
            title = f"Over the seeds {seeds} of split, encoders and fusion, split {split}"
            tables.append((title, over_seeds(runs)))
    return tables


def read_own(plan: list[Step]) -> list[tuple[str, pd.DataFrame]]:
    """(title, table) of a run's own fusions beside the tables', for each run that is scored."""
    tables = []
    for run in runs_of(plan):
        own = [variant.name for variant in h.own_variants(run)]
        if own and is_made(run, "scores"):
            scores = pd.read_csv(h.read_stage(run, "scores") / "scores.csv")
            chosen = scores[scores["model"].isin([*h.TABLE_FUSIONS, *own])]
            title = (f"Own fusions beside the paper's, split {run.split}, seed {run.seed}, "
                     f"{run.data_name}: percent, 95% bootstrap intervals, test part")
            tables.append((title, h.score_table(chosen.to_dict("records"))))
    return tables


EFFECT = ["n", "effect", "low", "high", "p_holm"]
ABOUT_CLAIMS = ("Effect on macro-F1 of the test part, in points, with its 95% interval over "
                "products and fusion seeds (split and encoders are this run's); p corrected for "
                "the number of claims of a split by Holm's procedure.")


def print_tables(plan: list[Step], console: Console) -> None:
    """The claims and the result tables on the console."""
    for title, table in read_claims(plan):
        print_table(f"{title}. {ABOUT_CLAIMS}", table, console)
    for title, run, table in read_tables(plan):
        if table is None:
            console.print(title, highlight=False, soft_wrap=True)
            continue
        shown, ahead = h.readable_table(table, run), row_ahead(table, run)
        print_table(f"{title}. {h.data_note(run)}", shown, console, ahead)
    for title, table in read_own(plan):
        print_table(title, table, console)
    for title, table in read_seeds(plan):
        print_table(f"{title}. Percent, test part.", table, console)


def print_table(title: str, table: pd.DataFrame, console: Console, bold: int | None = None) -> None:
    """One table on the console, one of its rows in bold."""
    shown = Table(title=title, title_justify="left", box=rich.box.SIMPLE)
    for column in table:
        left = column in ("model", "claim", "verdict")
        shown.add_column(column, justify="left" if left else "right")
    for place, row in enumerate(table.itertuples(index=False)):
        shown.add_row(*map(str, row), style="bold" if place == bold else None)
    console.print(shown)


def publish() -> None:
    """Copy the default run's executed notebooks and figures into the repository."""
    plan = make_plan("sample", ["90-10"], [0], {})
    for step in plan:
        if state(step) != "done":
            raise ValueError(f"{step} is {state(step)}; run `python run.py study` first")
    for step in plan:
        nbformat.write(_without_traces(nbformat.read(step.output, as_version=4)), step.source)
    figures = settings.ROOT / "figures"
    for old in figures.glob("[0-9][0-9]_*"):  # not the benchmark's
        old.unlink()
    shutil.copytree(plan[0].run.folder / "figures", figures, dirs_exist_ok=True)


def _without_traces(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A notebook without what says when and by whom it was executed."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in book.cells:
        cell.metadata = {key: cell.metadata[key] for key in ("tags", "slideshow")
                         if cell.metadata.get(key)}
    drop_finished_progress(book)
    return book


def drop_finished_progress(book: nbformat.NotebookNode) -> None:
    """Remove what is left of a progress line that has come to its end: an empty output."""
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs
                            if output.get("data", {}).get("text/markdown") != ""]
