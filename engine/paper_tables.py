"""The paper's Tables I to V with our scores in its rows, and what a reader has to know of them."""
from __future__ import annotations

import pandas as pd

from engine.catalogue import load_published
from engine.runs import Run
from engine.scores import score_table
from engine.settings import PROFILES, SLOTS, one_of

TABLES = {"I": "90-10", "II": "90-10", "III": "90-10", "IV": "80-20", "V": "80-20"}
# The paper's rows, as data/published_results.csv names them, and our models.
OUR_MODEL = {
    "CamemBERT description": "camembert_description", "CamemBERT title": "camembert_title",
    "FlauBERT description": "flaubert_description", "FlauBERT title": "flaubert_title",
    "SE-ResNeXt-50": "seresnext",
    "text concat + final concat": "concat-concat", "text concat + final add": "concat-add",
    "text concat + final average": "concat-average",
    "text average + final average": "average-average",
    "basic (average + average)": "average-average",
    "with dropout": "average-average-dropout", "with more layers": "average-average-layers"}


def paper_table(scores: pd.DataFrame, number: str) -> pd.DataFrame:
    """One of the paper's Tables I to V, rows in its order: our scores, then paper_accuracy and
    paper_macro_f1.
    """
    reference = f"Table {one_of('table', number, TABLES)}"
    published = load_published().query("source == 'paper'")
    published = published[published["reference"] == reference].reset_index(drop=True)
    models = published["model"].map(OUR_MODEL)
    ours = scores.set_index("model").loc[models].reset_index(drop=True)
    paper = published[["accuracy", "macro_f1"]].add_prefix("paper_")
    return pd.concat([published[["model"]], ours, paper], axis=1)


def readable_table(table: pd.DataFrame, run: Run) -> pd.DataFrame:
    """A table of `paper_table` for reading: ours with intervals, then the paper's, in percent. Rows
    name what ran where that is not the paper's own, and the paper's columns say why they are
    another matter.
    """
    ours = score_table(table.to_dict("records"))
    for word, slot in SLOTS.items():
        ran = getattr(run.profile, slot)
        if ran != getattr(PROFILES["paper"], slot):
            ours["model"] = ours["model"].str.replace(word, f"{word} ({ran})", regex=False)
    why = run.unlike_the_paper
    heading = f"paper ({', '.join(why)})" if why else "paper"
    for metric in ("accuracy", "macro_f1"):
        ours[f"{heading}: {metric}"] = table[f"paper_{metric}"].map("{:.2f}".format)
    return ours


def data_note(run: Run) -> str:
    """Which data the numbers belong to, for titles and reports."""
    rakuten = f"ours: Rakuten France, {run.protocol} rows"
    sample = "ours: the synthetic sample, another data set than the paper's"
    ours = sample if run.synthetic else rakuten
    return f"Percent, 95% bootstrap intervals, test part; {ours}; paper: as published."
