"""The report: a folder of pages that needs no network and nothing beside it, made by Sphinx from
the executed notebooks and the pages in docs/.
"""
from __future__ import annotations

import io
import re
import shutil
import subprocess
from pathlib import Path

import jinja2
import nbformat
import pandas as pd

import helpers as h
from commands.plan import Step, runs_of, state
from commands.report import (
    ABOUT_CLAIMS,
    drop_finished_progress,
    read_claims,
    read_own,
    read_seeds,
    read_tables,
)
from engine import settings
from engine.files import put_in_place, read_json, temporary_folder, write_text
from engine.keys import folder_of, manifest_of
from engine.runs import Run, runs_folder
from engine.settings import about, setting_names
from engine.stages import is_made

DOCS = settings.ROOT / "docs"
TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(DOCS), keep_trailing_newline=True)
ITALIC = re.compile(r"\*([^*].*?)\*(?:\n|$)", re.DOTALL)
NOTEBOOK = re.compile(r"\[([^\]]+)\]\((?:[\w-]+/)*(\w+)\.ipynb\)")  # a link to it
FIGURE = re.compile(r'h\.save_figure\(run, fig, "(\w+)"')


def report_folder(run: Run) -> Path:
    """`runs/<profile>/<protocol>/report[+<name>=<value>]`, the same for all splits and seeds."""
    return runs_folder() / run.profile.name / run.protocol / f"report{run.suffix}"


def write_report(plan: list[Step]) -> Path:
    """Make the site anew from what is done; the path of its first page."""
    from sphinx.application import Sphinx  # takes a second to import

    run = plan[0].run
    folder = report_folder(run)
    with temporary_folder() as place:
        source, pages = place / "source", place / "pages"
        shutil.copytree(DOCS, source)
        write_sources(plan, source)
        said = io.StringIO()
        site = Sphinx(source, source, pages, place / "trees", "html", status=None, warning=said,
                      confoverrides={"html_title": f"Hierarchical fusion, {run.profile.name}"})
        site.build()
        if said.getvalue():
            write_text(pages / "warnings.txt", said.getvalue())
        with put_in_place(folder) as whole:
            shutil.copytree(pages, whole)
            shutil.rmtree(folder, ignore_errors=True)  # it stays until the new one is whole
    return folder / "index.html"


# --- what Sphinx reads ----------------------------------------------------------------------------
def write_sources(plan: list[Step], source: Path) -> None:
    """Put everything that is written by this run beside the pages of docs/."""
    runs = []
    for run in runs_of(plan):
        steps = [step for step in plan if step.run == run and step.output.exists()]
        if not steps:
            continue
        place, figures = source / folder_name(run), []
        place.mkdir()
        done = [step.notebook for step in steps]
        for step in steps:
            book = nbformat.read(step.output, as_version=4)
            figures += figures_of(step, book)
            nbformat.write(prepare(book, done), place / f"{step.notebook}.ipynb")
        write_figures(run, figures, place)
        pages = [*done, "figures"]
        name = f"Split {run.split}, seed {run.seed}"
        runs.append((name, [f"{folder_name(run)}/{page}" for page in pages]))
    write_index(plan, runs, source)
    write_facts(plan, source)
    first = next((pages for _, pages in runs), [])
    pages = {"about": settings.ROOT / "README.md", "data": settings.ROOT / "data" / "README.md",
             **{page.stem: page for page in DOCS.glob("*.md")}}
    for name, text in pages.items():
        write_text(source / f"{name}.md", site_links(text.read_text(encoding="utf-8"), first))
    shutil.copytree(settings.ROOT / "figures", source / "figures")
    for name in ("LICENSE", "CITATION.cff"):
        shutil.copy(settings.ROOT / name, source)


def folder_name(run: Run) -> str:
    """Where a run's pages are in the site."""
    return f"{run.split}-seed{run.seed}"


def site_links(text: str, pages: list[str]) -> str:
    """Links of the repository as links of the site; `pages` are those of one run."""
    text = text.replace("](../", "](")  # as a page in docs/ or data/ says it
    text = notebook_links(text, pages)
    for here, there in (("data/README.md", "data.md"), ("README.md", "about.md"), ("docs/", "")):
        text = text.replace(f"]({here}", f"]({there}")
    return text


def notebook_links(text: str, pages: list[str]) -> str:
    """Links to notebooks, by any path, as links to these pages; words for a page that is not there.
    """
    there = {Path(page).name: page for page in pages}

    def link(found: re.Match) -> str:
        words, name = found.groups()
        return f"[{words}]({there[name]}.ipynb)" if name in there else words

    return NOTEBOOK.sub(link, text)


def prepare(book: nbformat.NotebookNode, pages: list[str]) -> nbformat.NotebookNode:
    """An executed notebook as a page beside these: captions without their code, figures with their
    captions as alternative text, links that hold in the site.
    """
    drop_finished_progress(book)
    for cell, caption in zip(book.cells, captions_of(book)):
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../README.md)", "](../about.md)")
            cell.source = notebook_links(cell.source.replace("](../docs/", "](../"), pages)
        elif cell.source.startswith("h.caption("):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "remove-input"]
        if caption:
            cell.metadata["mystnb"] = {"image": {"alt": caption}}
    return book


def captions_of(book: nbformat.NotebookNode) -> list[str]:
    """For each cell the caption of its figure: what `h.caption` says below it, in this cell or the
    next, or the next cell's Markdown in italics; "" for a cell without a figure.
    """
    captions = []
    for cell, after in zip(book.cells, [*book.cells[1:], nbformat.v4.new_markdown_cell()]):
        outputs = [*cell.get("outputs", []), *after.get("outputs", [])]
        said = [output.data["text/markdown"] for output in outputs
                if "text/markdown" in output.get("data", {})]
        if after.cell_type == "markdown":
            said.append(after.source)
        italic = [found for words in said if (found := ITALIC.match(words))]
        drawn = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        captions.append(" ".join(italic[0][1].split()) if drawn and italic else "")
    return captions


def figures_of(step: Step, book: nbformat.NotebookNode) -> list[dict]:
    """{file, caption, notebook} of each figure that a notebook has saved; one that has failed has
    not saved all.
    """
    return [{"file": f"{name}.png", "caption": caption, "notebook": step.notebook}
            for cell, caption in zip(book.cells, captions_of(book))
            for name in FIGURE.findall(cell.source)
            if (step.run.folder / "figures" / f"{name}.png").exists()]


def write_figures(run: Run, figures: list[dict], place: Path) -> None:
    """The page of a run's figures, in the notebooks' order, each with its caption."""
    for figure in figures:
        shutil.copy(run.folder / "figures" / figure["file"], place)
    page = TEMPLATES.get_template("figures.md.jinja").render(
        name=f"split {run.split}, seed {run.seed}", figures=figures)
    write_text(place / "figures.md", page)


def write_index(plan: list[Step], runs: list[tuple[str, list[str]]], source: Path) -> None:
    """The first page: the claims with their verdicts, the recommended models, all tables; and, by
    the name of each run, its pages.
    """
    run = plan[0].run
    claims = [(title, to_html(table, classes="claims")) for title, table in read_claims(plan)]
    tables = [(title, "" if table is None else h.style_table(table, its_run).to_html())
              for title, its_run, table in read_tables(plan)]
    tables += [(title, to_html(table)) for title, table in [*read_own(plan), *read_seeds(plan)]]
    chosen = [(each, h.read_manifest(each, "claims")["metrics"]["recommended"])
              for each in runs_of(plan) if is_made(each, "claims")]
    recommended = [(each, h.display_name(model)) for each, model in chosen]
    title = ", ".join(["Hierarchical fusion", f"profile {run.profile.name}",
                       f"{run.protocol} rows", *run.told])
    page = TEMPLATES.get_template("index.md.jinja").render(
        title=title, note=h.data_note(run), about_claims=ABOUT_CLAIMS, claims=claims, tables=tables,
        recommended=recommended, runs=runs)
    write_text(source / "index.md", page)


def write_facts(plan: list[Step], source: Path) -> None:
    """The page of minutes, memory, versions and settings."""
    run, stages = plan[0].run, {}
    for step in plan:
        for key, name in (read_json(step.manifest) or {}).get("stages", {}).items():
            stages[name, key] = manifest_of(folder_of(name, key)) or {}
    shown = [{"stage": name, "split and seed": made.get("run", "").partition("split ")[2],
              "device": made.get("device"), "processor": made.get("processor"),
              "threads": made.get("threads"), "seconds": made.get("seconds"),
              "peak memory (GB)": made.get("peak_memory_gb"), "key": key[:8]}
             for (name, key), made in sorted(stages.items())]
    made = next(filter(None, stages.values()), {})
    versions = ", ".join(f"{name} {number}" for name, number in made.get("versions", {}).items())
    values = [{"setting": name, "value": str(getattr(run.profile, name)),
               "unit": about(name)[1], "what it is": about(name)[0]} for name in setting_names()]
    page = TEMPLATES.get_template("facts.md.jinja").render(
        where=f"Code: {commit()}. Python {made.get('python', '')}; {versions}.",
        changed=", ".join(f"`{name}={value}`" for name, value in run.changed.items()),
        settings=to_html(pd.DataFrame(values), "facts"),
        notebooks=to_html(pd.DataFrame(map(row_of, plan)), "facts"),
        stages=to_html(pd.DataFrame(shown), "facts"))
    write_text(source / "facts.md", page)


def row_of(step: Step) -> dict:
    """What the report says of a notebook."""
    done = read_json(step.manifest) or {}
    return {"notebook": step.notebook, "split": step.run.split, "seed": step.run.seed,
            "state": state(step), "minutes": round(done["seconds"] / 60, 1) if done else "",
            "peak memory (GB)": done.get("peak_memory_gb", "")}


def commit() -> str:
    """The commit that the code is at, and whether files differ from it."""
    said = subprocess.run(["git", "-C", str(settings.ROOT), "describe", "--always", "--dirty"],
                          capture_output=True, text=True)
    return f"commit {said.stdout.strip()}" if said.returncode == 0 else "no commit is known"


def to_html(table: pd.DataFrame, classes: str = "") -> str:
    """A table without row numbers."""
    return table.to_html(index=False, border=0, classes=classes)
