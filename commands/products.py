"""Products of one's own, predicted from a CSV file; and a trained classifier as a folder."""
from __future__ import annotations

import sys
from pathlib import Path

import jinja2

import helpers as h
from commands.plan import Step, runs_of
from engine import settings
from engine.catalogue import load_classes
from engine.exports import parts_of_run, refuse_export, write_export
from engine.files import write_text
from engine.products import read_product_file
from engine.runs import Run
from engine.stages import is_made

DOCS = settings.ROOT / "docs"
BASELINES = ("majority class", "TF-IDF both")


def trained_runs(plan: list[Step], variant: str) -> list[Run]:
    """The plan's runs that have trained this fusion; without one the first, whose error then names
    what is missing. ValueError for a variant that there is not.
    """
    runs, name = runs_of(plan), h.named_variant(variant).name
    return [run for run in runs if is_made(run, f"fusion-{name}")] or runs[:1]


# --- predict --------------------------------------------------------------------------------------
def predict_file(path: Path, place: Run | Path, variant: str | None, to: Path | None,
                 every: bool = False) -> None:
    """Write [row, code, name, probability, notes] of a CSV file's products, and the probabilities
    of `every` class, as CSV: to the console, or into the file `to`, which appears when it is whole.
    """
    refuse_target(path, to)
    products = read_product_file(path)  # before the encoders are loaded
    found = h.load_classifier(place, variant).predict(products, probabilities=every)
    text = found.to_csv(index_label="row", lineterminator="\n")
    if to is None:
        sys.stdout.write(text)
    else:
        write_text(to, text)


def refuse_target(path: Path, to: Path | None) -> None:
    """ValueError if predictions cannot be written to that place, or would replace the products."""
    if to is None:
        return
    if to.is_dir() or not to.resolve().parent.is_dir():
        raise ValueError(f"--to {to}: it must be a file in a folder that is there")
    if to.resolve() == path.resolve():
        raise ValueError(f"--to {to} would replace the products themselves; name another file")


# --- export ---------------------------------------------------------------------------------------
def export_classifier(folder: Path, plan: list[Step], name: str) -> Run:
    """Write the classifier of a variant, with its card, into a new folder: that of the plan's first
    run which has trained it. Returns that run.
    """
    run, variant = trained_runs(plan, name)[0], h.named_variant(name)
    refuse_export(folder, run, variant)
    write_export(folder, parts_of_run(run, variant), card_of(run, variant))
    return run


def card_of(run: Run, variant: h.Variant) -> str:
    """The README.md of an exported folder: what it is, its scores, its data, its limits."""
    template = (DOCS / "card.md.jinja").read_text(encoding="utf-8")
    changed = [f"`{name}={value}`" for name, value in run.changed.items()
               if name not in ("data", "fusions")]
    return jinja2.Template(template, keep_trailing_newline=True).render(
        name=h.display_name(variant.name), variant=variant.name, run=run,
        classes=len(load_classes(run)),
        scores=scores_of(run, variant), changed=", ".join(changed),
        symbols=", ".join(variant.symbols))


def scores_of(run: Run, variant: h.Variant) -> str:
    """The test part's scores of the exported model, the first seed's, and of two baselines, as a
    table in Markdown; "" where they have not been scored.
    """
    known = [each.name for each in h.scored_variants(run)]
    if variant.name not in known or not is_made(run, "scores"):
        return ""
    truth, predicted = h.read_predictions(run)
    rows = [h.score_row(name, truth, predicted[name], run) for name in BASELINES]
    rows.append(h.score_row(variant.name, truth, predicted[variant.name][:, 0], run))
    table = h.score_table(rows).drop(columns="seeds")
    lines = [table.columns, ["---"] * len(table.columns), *table.astype(str).to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
