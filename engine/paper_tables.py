"""The paper's Tables I to V with our scores in its rows, what a reader has to know of them, and two
runs side by side.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from pandas.io.formats.style import Styler
from safetensors.torch import load_file

from engine.catalogue import load_published
from engine.runs import Run, from_root
from engine.scores import mcnemar, metric_name, score_table, who_beats_whom
from engine.settings import PROFILES, SLOTS, one_of
from engine.stages import is_made, read_manifest, read_stage
from engine.variants import display_name

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
            ran = Path(ran).name if from_root(ran).is_dir() else ran
            ours["model"] = ours["model"].str.replace(word, f"{word} ({ran})", regex=False)
    if run.own_catalogue:
        return ours
    why = run.unlike_the_paper
    heading = f"paper ({', '.join(why)})" if why else "paper"
    for metric in ("accuracy", "macro_f1"):
        ours[f"{heading}: {metric_name(metric)}"] = table[f"paper_{metric}"].map("{:.2f}".format)
    return ours


GREY = "var(--color-foreground-secondary, #767676)"  # on the site's dark pages another one


def ahead_of_all(models: Sequence[str], comparisons: pd.DataFrame) -> str:
    """The one of the models that the corrected test calls better than each of the others; "" if
    there is none.
    """
    square = who_beats_whom(comparisons).loc[models, models]
    return next((model for model in models if square.loc[model].sum() == len(models) - 1), "")


def row_ahead(table: pd.DataFrame, run: Run) -> int | None:
    """The place of the row of a table of `paper_table` that is ahead of all its others."""
    if not is_made(run, "claims"):
        return None
    comparisons = pd.read_csv(read_stage(run, "claims") / "comparisons.csv")
    models = [OUR_MODEL[model] for model in table["model"]]
    ahead = ahead_of_all(models, comparisons)
    return models.index(ahead) if ahead else None


def style_table(table: pd.DataFrame, run: Run) -> Styler:
    """`readable_table` with colours: bold is the row that is ahead of all others by the corrected
    test, grey are the paper's columns where they are another matter.
    """
    shown, ahead = readable_table(table, run), row_ahead(table, run)
    # Tables on one page must not share their cells' names: each is of one split and seed.
    name = "-".join([run.split, str(run.seed), *table["model"].str[0]])
    styled = shown.style.hide(axis="index").set_uuid(name)
    styled = styled.set_properties(["model"], **{"text-align": "left"})
    if run.unlike_the_paper and not run.own_catalogue:
        styled = styled.set_properties(shown.columns[-2:], color=GREY)
    return styled if ahead is None else styled.set_properties(
        pd.IndexSlice[ahead, :], **{"font-weight": "bold"})


def over_seeds(runs: Sequence[Run]) -> pd.DataFrame:
    """Mean and standard deviation of the tables' models in percent, over runs that differ by their
    seed: in the split, in all initial weights, in the order of the rows.
    """
    scores = pd.concat(pd.read_csv(read_stage(run, "scores") / "scores.csv") for run in runs)
    groups = scores[scores["model"].isin(OUR_MODEL.values())].groupby("model", sort=False)
    found = {"model": groups["model"].first(), "seeds": groups.size()}
    for metric in ("accuracy", "macro_f1"):
        of_seed = groups[metric]
        found[metric], found[f"{metric}, deviation"] = of_seed.mean(), of_seed.std(ddof=1)
    return pd.DataFrame(found).round(2).reset_index(drop=True)


def compare(run: Run, other: Run) -> pd.DataFrame:
    """Accuracy of each model in two runs (percent), on the test products of both, and the exact
    McNemar test of the difference; of fusions the first seed.

    ValueError if the runs score different products, as two splits or seeds do.
    """
    kept = [load_file(read_stage(each, "scores") / "predictions.safetensors")
            for each in (run, other)]
    if not torch.equal(kept[0]["product_id"], kept[1]["product_id"]):
        raise ValueError(f"{run.name} and {other.name} score different products, so they cannot be "
                         "compared row by row; take the same rows, split and seed")
    truth = kept[0]["label_id"].numpy()
    rows = []
    order = pd.read_csv(read_stage(run, "scores") / "scores.csv")["model"]
    for model in order[order.isin(list(kept[1]))]:  # a fusion of one's own may be in one alone
        first, second = (predictions[model].argmax(-1).reshape(len(truth), -1)[:, 0].numpy()
                         for predictions in kept)
        only_first, only_second, p = mcnemar(truth, first, second)
        rows.append({"model": display_name(model), "n": len(truth),
                     "accuracy": 100 * (first == truth).mean(),
                     "other: accuracy": 100 * (second == truth).mean(),
                     "only this right": only_first, "only other right": only_second, "p": p})
    return pd.DataFrame(rows)


def rows_note(run: Run) -> str:
    """How many products trained the run's models, and how many scored them."""
    rows = read_manifest(run, "splits")["metrics"]
    return f"{rows['train']:,} training and {rows['test']:,} test products"


def data_note(run: Run) -> str:
    """Which data the numbers belong to, for titles and reports."""
    about = "Percent, 95% bootstrap intervals, test part; ours:"
    if run.own_catalogue:
        return (f"{about} the {run.data_name}, {run.protocol} rows; the paper's figures are left "
                "out, because they belong to other products.")
    rakuten = f"Rakuten France, {run.protocol} rows"
    sample = "the synthetic sample, another data set than the paper's"
    return f"{about} {sample if run.synthetic else rakuten}; paper: as published."
