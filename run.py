"""Runs the study: which notebooks, in which order, over which splits and seeds.

    python run.py study      execute what is not done yet, print the tables, write the report
    python run.py status     what is done, what is stale, what is missing
    python run.py doctor     whether all that a run needs is there
    python run.py report     write the report again
    python run.py publish    copy the default run's notebooks and figures into the repository

Each notebook runs in a kernel process of its own, through papermill. What a notebook computes is kept as stages
(see helpers.py, section 3), so a study that was stopped goes on where it was.
"""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jinja2
import nbformat
import pandas as pd
import papermill
import psutil
import rich.box
import typer
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table

import doctor
import helpers as h

NOTEBOOKS = ["01_data_exploration", "02_text_preprocessing", "03_finetune_camembert", "04_finetune_flaubert",
             "05_finetune_seresnext", "06_regional_features", "07_hierarchical_fusion", "08_result_tables"]
LAST_OF_SPLIT = "07_hierarchical_fusion"  # what follows compares the splits, so it runs after all of them
UNSCORED = "not scored yet; run `python run.py study` with this split and seed"
DEFAULTS = {"PROFILE": "sample", "SPLIT": "90-10", "SEED": 0, "SETTINGS": {}}  # of every notebook

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__,
                  rich_markup_mode=None)
console = Console()
if not console.is_terminal:
    console.width = 150  # a log has no width of its own
problems = Console(stderr=True)


# --- the plan -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    """One notebook of one run."""
    notebook: str
    run: h.Run
    settings: dict

    @property
    def source(self) -> Path:
        return h.ROOT / "notebooks" / f"{self.notebook}.ipynb"

    @property
    def output(self) -> Path:
        return self.run.folder / "notebooks" / f"{self.notebook}.ipynb"

    @property
    def manifest(self) -> Path:
        return self.output.with_suffix(".json")

    @property
    def parameters(self) -> dict:
        """What papermill injects: the parameters that differ from the notebooks' own defaults."""
        given = {"PROFILE": self.run.profile.name, "SPLIT": self.run.split, "SEED": self.run.seed,
                 "SETTINGS": self.settings}
        return {name: value for name, value in given.items() if value != DEFAULTS[name]}

    @property
    def earlier(self) -> list[Step]:
        """The steps whose stages this one may read: those before it, in all splits once the splits are compared."""
        before = NOTEBOOKS[:NOTEBOOKS.index(self.notebook)]
        splits = h.SPLITS if LAST_OF_SPLIT in before else [self.run.split]
        runs = [h.Run(self.run.profile, split, self.run.seed) for split in splits]
        return [Step(name, run, self.settings) for run in runs for name in before
                if run == self.run or NOTEBOOKS.index(name) <= NOTEBOOKS.index(LAST_OF_SPLIT)]

    def __str__(self) -> str:
        return f"{self.notebook}  {self.run.split}  seed {self.run.seed}"


def make_plan(profile: str, splits: list[str], seeds: list[int], settings: dict) -> list[Step]:
    """All steps in order: the notebooks of each split and seed, then those that compare the splits."""
    runs = [h.open_run(profile, split, seed, settings) for seed in seeds for split in splits]
    cut = NOTEBOOKS.index(LAST_OF_SPLIT) + 1
    return [Step(name, run, settings) for names in (NOTEBOOKS[:cut], NOTEBOOKS[cut:]) for run in runs for name in names]


def step_key(step: Step, catalogue: str) -> str:
    """Hash of all that an executed notebook depends on: code, parameters, catalogue, and what earlier ones made."""
    cells = [cell.source for cell in nbformat.read(step.source, as_version=4).cells]
    made = [(h.read_json(other.manifest) or {}).get("stages") for other in step.earlier]
    return h.hash_json([cells, h.hash_file(h.ROOT / "helpers.py"), step.parameters, catalogue, made])


def state(step: Step, catalogue: str) -> str:
    """"done", "stale" (made from something else, or its stages are gone) or "missing"."""
    done = h.read_json(step.manifest)
    if done is None or not step.output.exists():
        return "missing"
    kept = all((h.read_json(h.runs_folder() / name / "manifest.json") or {}).get("key") == key
               for name, key in done["stages"].items())
    return "done" if kept and done["key"] == step_key(step, catalogue) else "stale"


# --- running one notebook -----------------------------------------------------------------------------
class StepFailed(Exception):
    """A notebook that ended with an error; the text says where."""


def execute(step: Step, label: str) -> dict:
    """Run the notebook; {seconds, peak_memory_gb, stages: {folder below runs: key}}. StepFailed names the cell."""
    step.output.parent.mkdir(parents=True, exist_ok=True)
    step.manifest.unlink(missing_ok=True)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            papermill.execute_notebook(step.source, step.output, step.parameters, cwd=step.source.parent,
                                       progress_bar=False, extra_arguments=["--IPKernelApp.log_level=40"])
        except BaseException as error:  # handed to the main thread
            failures.append(error)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["STUDY_EVENTS"] = str(Path(folder) / "events")  # the kernel inherits it
        start, thread = time.perf_counter(), threading.Thread(target=work, daemon=True)
        thread.start()
        events, peak = follow(thread, Path(folder) / "events", label)
    if failures:
        raise StepFailed(describe_failure(step, failures[0]))
    return {"seconds": round(time.perf_counter() - start, 1), "peak_memory_gb": round(peak / 1e9, 2),
            "stages": {event["stage"]: event["key"] for event in events if "stage" in event}}


def follow(thread: threading.Thread, path: Path, label: str) -> tuple[list[dict], int]:
    """Show progress until the thread ends; returns the notebook's events and the peak memory of its processes (bytes).

    A terminal gets one line that moves, a log a line every 15 seconds.
    """
    path.touch()
    events, peak, last, alive = [], 0, time.monotonic(), True
    with path.open(encoding="utf-8") as file, console.status(label) as status:
        while alive:
            thread.join(0.5)
            alive = thread.is_alive()  # asked before the file is read, so that nothing is missed
            events += map(json.loads, file)  # what has been added since the last look
            peak = max(peak, memory_of_children())
            if not events or "text" not in events[-1]:
                continue
            text = events[-1]["text"]
            status.update(f"{label}  {text}")
            if not console.is_terminal and time.monotonic() - last > 15:
                last = time.monotonic()
                console.print(f"        {text}", highlight=False)
    return events, peak


def memory_of_children() -> int:
    """Resident memory of all processes below this one, in bytes."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def describe_failure(step: Step, error: BaseException) -> str:
    """Which notebook, which cell, what it says, and where the executed notebook is."""
    if isinstance(error, PapermillExecutionError):
        where, what = f" in cell [{error.exec_count}]", f"{error.ename}: {error.evalue}"
    else:
        where, what = "", f"{type(error).__name__}: {error}"
    return f"{step} failed{where}\n  {what}\n  executed notebook: {step.output}"


# --- commands -----------------------------------------------------------------------------------------
Profile = Annotated[str, typer.Option(help="sample | paper")]
Splits = Annotated[list[str], typer.Option("--split", help="90-10 | 80-20; may be repeated")]
Seeds = Annotated[list[int], typer.Option("--seed", help="may be repeated")]
Settings = Annotated[list[str], typer.Option("--set", help="name=value: override a setting of the profile")]


def parse_settings(pairs: list[str]) -> dict:
    """{name: value} of `name=value` texts; values in Python's or JSON's notation, anything else is a string."""
    settings = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set wants name=value, got {pair!r}")
        try:
            settings[name] = json.loads(text.lower() if text in ("True", "False") else text)
        except json.JSONDecodeError:
            settings[name] = text
    return settings


def choose_notebooks(first: str | None, only: list[str]) -> list[str]:
    """The notebooks that --from NN or --only NN name; ValueError for a number that is none."""
    numbers = [name[:2] for name in NOTEBOOKS]
    for number in [first or numbers[0], *only]:
        h.one_of("notebook number", number, numbers)
    return [name for name in NOTEBOOKS if name[:2] >= (first or "00") and (not only or name[:2] in only)]


@app.command()
def study(profile: Profile = "sample", split: Splits = list(h.SPLITS), seed: Seeds = [0], set_: Settings = [],
          from_: Annotated[str, typer.Option("--from", help="NN: execute this notebook and all after it again")] = None,
          only: Annotated[list[str], typer.Option(help="NN: execute only this notebook; may be repeated")] = [],
          dry_run: Annotated[bool, typer.Option("--dry-run", help="only print what the study would cost")] = False):
    """Execute what is not done yet, print the tables, write the report."""
    plan = make_plan(profile, split, seed, parse_settings(set_))
    chosen = choose_notebooks(from_, only)
    if dry_run:
        return doctor.print_costs(console, plan[0].run.profile, split, seed)
    catalogue = h.catalogue_hash(h.catalogue_folder(plan[0].run))
    for number, step in enumerate(plan, 1):
        if step.notebook not in chosen:
            continue
        label = f"[{number:2}/{len(plan)}] {step}"
        if state(step, catalogue) == "done" and not (from_ or only):
            console.print(f"{label}  already done", highlight=False)
            continue
        found = execute(step, label)
        key = step_key(step, catalogue)
        h.write_json(step.manifest, {"key": key, **found})
        console.print(f"{label}  {found['seconds']:.0f} s, peak {found['peak_memory_gb']:.1f} GB", highlight=False)
    print_tables(plan)
    console.print(f"Report: {write_report(plan, catalogue)}", highlight=False, soft_wrap=True)


@app.command()
def status(profile: Profile = "sample", split: Splits = list(h.SPLITS), seed: Seeds = [0], set_: Settings = []):
    """Say what is done, what is stale, what is missing."""
    plan = make_plan(profile, split, seed, parse_settings(set_))
    catalogue = h.catalogue_hash(h.catalogue_folder(plan[0].run))
    table = Table("notebook", "split", "seed", "state", "seconds", "peak memory (GB)")
    for step in plan:
        done = h.read_json(step.manifest) or {}
        table.add_row(step.notebook, step.run.split, str(step.run.seed), state(step, catalogue),
                      *(str(done.get(name, "")) for name in ("seconds", "peak_memory_gb")))
    console.print(table)


@app.command("doctor")
def check(profile: Profile = "sample", set_: Settings = [],
          all_pictures: Annotated[bool, typer.Option("--all-pictures", help="decode all, not 500 of them")] = False):
    """Say whether all that a run needs is there: catalogue, pictures, machine, libraries, weights."""
    checks = doctor.check_up(h.open_run(profile, "90-10", 0, parse_settings(set_)), all_pictures)
    doctor.print_checks(console, checks)
    if any(check.state == "missing" for check in checks):
        raise typer.Exit(1)


@app.command()
def report(profile: Profile = "sample", split: Splits = list(h.SPLITS), seed: Seeds = [0], set_: Settings = []):
    """Write the report again, from what is done."""
    plan = make_plan(profile, split, seed, parse_settings(set_))
    catalogue = h.catalogue_hash(h.catalogue_folder(plan[0].run))
    console.print(f"Report: {write_report(plan, catalogue)}", highlight=False, soft_wrap=True)


@app.command()
def publish():
    """Copy the default run's executed notebooks and figures into the repository."""
    plan = make_plan("sample", ["90-10"], [0], {})
    catalogue = h.catalogue_hash(h.catalogue_folder(plan[0].run))
    for step in plan:
        if state(step, catalogue) != "done":
            raise ValueError(f"{step} is {state(step, catalogue)}; run `python run.py study` first")
    for step in plan:
        book = nbformat.read(step.output, as_version=4)
        book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                         "language_info": {"name": "python"}}
        for cell in book.cells:
            cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
            if cell.cell_type == "code":  # a finished progress line is an empty output
                cell.outputs = [output for output in cell.outputs if output.get("data", {}).get("text/markdown") != ""]
        nbformat.write(book, step.source)
    shutil.rmtree(h.ROOT / "figures", ignore_errors=True)
    shutil.copytree(plan[0].run.folder / "figures", h.ROOT / "figures")


# --- tables and report --------------------------------------------------------------------------------
def read_tables(plan: list[Step]) -> list[tuple[str, pd.DataFrame | None]]:
    """(title, table) of Tables I to V for each seed; None where its split has not been scored."""
    found = []
    for seed in sorted({step.run.seed for step in plan}):
        for number, split in h.TABLES.items():
            path = h.Run(plan[0].run.profile, split, seed).folder / "scores" / f"table_{number}.csv"
            found.append((f"Table {number}, split {split}, seed {seed}", pd.read_csv(path) if path.exists() else None))
    return found


def print_tables(plan: list[Step]) -> None:
    """The result tables on the console."""
    note = h.data_note(plan[0].run)
    for title, table in read_tables(plan):
        if table is None:
            console.print(f"{title}: {UNSCORED}", highlight=False)
            continue
        shown = Table(title=f"{title}. {note}", title_justify="left", box=rich.box.SIMPLE)
        for column in (readable := h.readable_table(table)):
            shown.add_column(column, justify="left" if column == "model" else "right")
        for row in readable.itertuples(index=False):
            shown.add_row(*map(str, row))
        console.print(shown)


REPORT = jinja2.Template("""<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 2rem }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead { border-bottom: 2px solid #222 }
tbody tr { border-bottom: 1px solid #ddd } img { max-width: 100% } figure { margin: 2rem 0 } figcaption { color: #666 }
</style><h1>{{ title }}</h1><p>{{ note }}</p>
{% for heading, table in tables %}<h2>{{ heading }}</h2>{{ table }}{% endfor %}
<h2>Notebooks</h2>{{ steps }}
<h2>Figures</h2>{% for name, path in figures %}<figure><img src="{{ path }}" alt="{{ name }}">
<figcaption>{{ name }}</figcaption></figure>{% endfor %}</html>
""")


def write_report(plan: list[Step], catalogue: str) -> Path:
    """`runs/<profile>/report/index.html`: tables, notebooks with minutes and peak memory, figures. Returns its path."""
    profile = plan[0].run.profile
    folder = h.runs_folder() / profile.name / "report"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows, exporter = [], HTMLExporter()
    for step in plan:
        done, link = h.read_json(step.manifest) or {}, step.notebook
        if step.output.exists():
            page = folder / f"{step.notebook}-{step.run.split}-seed{step.run.seed}.html"
            page.write_text(exporter.from_filename(str(step.output))[0], encoding="utf-8")
            link = f'<a href="{page.name}">{step.notebook}</a>'
        rows.append({"notebook": link, "split": step.run.split, "seed": step.run.seed, "state": state(step, catalogue),
                     "minutes": round(done["seconds"] / 60, 1) if done else "",
                     "peak memory (GB)": done.get("peak_memory_gb", "")})
    runs = dict.fromkeys(step.run for step in plan)
    pictures = [(f"{path.stem}, split {run.split}, seed {run.seed}", os.path.relpath(path, folder))
                for run in runs for path in sorted(run.folder.glob("figures/*.png"))]
    tables = [(title, f"<p>{UNSCORED}</p>" if table is None
               else h.readable_table(table).to_html(index=False, border=0)) for title, table in read_tables(plan)]
    (folder / "index.html").write_text(REPORT.render(
        title=f"Hierarchical fusion, profile {profile.name}", note=h.data_note(plan[0].run), tables=tables,
        steps=pd.DataFrame(rows).to_html(index=False, border=0, escape=False), figures=pictures), encoding="utf-8")
    return folder / "index.html"


def main() -> None:
    """The command line; an error is one clear sentence and a non-zero exit."""
    try:
        app()
    except (ValueError, FileNotFoundError, h.DamagedStage, StepFailed) as error:
        problems.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
