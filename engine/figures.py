"""Figures in the study's look, and what notebooks print between them."""
from __future__ import annotations

import base64
import inspect
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from IPython.display import Markdown, display
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from engine import settings
from engine.files import full_disk_explained
from engine.runs import Run
from engine.scores import metric_name
from engine.variants import display_name

COLOURS = {"camembert": "#004D80", "flaubert": "#3D9BD6", "image": "#D55E00", "fusion": "#222222",
           "paper": "#767676", "data": "#4F7A6B"}
COLUMN, PAGE = 3.5, 7.2  # inches


def figure(width: float = PAGE, height: float = 3.0, **subplots):
    """`plt.subplots` in the study's look, whatever a user's own matplotlib settings are."""
    plt.rcdefaults()
    sns.set_theme(style="ticks", context="paper", rc={
        "figure.constrained_layout.use": True, "savefig.dpi": 200, "figure.dpi": 110,
        "axes.spines.top": False, "axes.spines.right": False,
        "svg.hashsalt": "hierarchical-fusion", "svg.fonttype": "none"})
    made = plt.subplots(figsize=(width, height), **subplots)
    if shell := get_ipython():  # after the first figure, with which the backend sets its own
        shell.display_formatter.formatters["image/png"].for_type(Figure, small_png)
    return made


def small_png(fig: Figure) -> str:
    """A figure as notebooks hold it: a PNG of 256 colours in base64, about a third of the bytes.

    As large as in its file, so that no label is cut off.
    """
    full, small = BytesIO(), BytesIO()
    fig.savefig(full, format="png", dpi="figure")
    picture = Image.open(full).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def number_no_rows() -> None:
    """Let tables in a notebook come without their rows' numbers; other indexes stay."""
    if shell := get_ipython():
        shell.display_formatter.formatters["text/html"].for_type(pd.DataFrame, table_html)


def table_html(table: pd.DataFrame) -> str:
    """A table as notebooks hold it, long ones cut as pandas cuts them."""
    long = len(table) > pd.get_option("display.max_rows")
    return table.to_html(
        notebook=True, index=not isinstance(table.index, pd.RangeIndex), show_dimensions=long,
        max_rows=pd.get_option("display.min_rows") if long else None)


def save_figure(run: Run, fig, name: str, data: pd.DataFrame, of_run: bool = True) -> None:
    """Write <run>/figures/<name>.png, .svg and .csv (the plotted numbers). Figures of the sample
    say so in a corner; those that show nothing of a run do not.
    """
    folder = run.folder / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    if run.synthetic and of_run:
        fig.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))  # keep the corner free
        fig.text(0.995, 0.005, "synthetic sample", ha="right", fontsize=6, color=COLOURS["paper"],
                 in_layout=False)
    with full_disk_explained(folder):
        fig.savefig(folder / f"{name}.png", metadata={"Software": None})
        fig.savefig(folder / f"{name}.svg", metadata={"Date": None})
        data.to_csv(folder / f"{name}.csv", index=False)


def source_colour(model: str) -> str:
    """The colour of a model's source: an encoder, or fusion, by its name."""
    sources = {"camembert": "camembert", "flaubert": "flaubert", "resnext": "image",
               "majority": "paper", "tf-idf": "paper"}
    for word, source in sources.items():
        if word in model.lower():
            return COLOURS[source]
    return COLOURS["fusion"]


def plot_learning_curve(axes: Sequence, curve: pd.DataFrame, label: str, colour: str,
                        marker: str = "o") -> None:
    """Losses on the first axes, validation macro-F1 with its best epoch on the second."""
    loss, f1 = axes
    style = {"color": colour, "ls": "--" if marker == "s" else "-"}
    epochs, percent = curve["epoch"], 100 * curve["val_macro_f1"]
    alone = "x" if len(curve) == 1 else ""  # of a frozen encoder's head: no line
    loss.plot(epochs, curve["train_loss"], marker=alone, alpha=0.4, label=f"{label}, train",
              **style)
    loss.plot(epochs, curve["val_loss"], marker=marker, ms=3, label=f"{label}, val", **style)
    f1.plot(epochs, percent, marker=marker, ms=3, label=label, **style)
    best = percent.idxmax()
    f1.plot(epochs[best], percent[best], marker="*", ms=9, color=colour, ls="none")
    loss.set(xlabel="epoch", ylabel="cross-entropy (nats)")
    f1.set(xlabel="epoch", ylabel="validation macro-F1 (%)", ylim=(0, 100))


def plot_confusion(ax, truth: Sequence[int], predicted: Sequence[int], names: Sequence[str],
                   place: pd.Series) -> pd.DataFrame:
    """Shares of each true class (rows sum to 1) as a one-hue map from 0 to 1; returns them. The
    more products, the larger a square.

    `place` maps a label id to its row and column, `names` are the classes in that order. Classes
    are numbered from 1, with their products in brackets.
    """
    cells = np.zeros((len(names), len(names)))
    np.add.at(cells, (place[truth].to_numpy(), place[predicted].to_numpy()), 1)
    counts, numbers = cells.sum(1), range(1, len(names) + 1)
    shares = cells / np.maximum(counts[:, None], 1)
    filled = np.argwhere(cells)
    sides = np.sqrt(cells[cells > 0] / cells.max()).clip(0.4)
    squares = [Rectangle((x - side / 2, y - side / 2), side, side)
               for (y, x), side in zip(filled, sides)]
    ax.add_collection(PatchCollection(squares, cmap="Greys", norm=Normalize(0, 1),
                                      array=shares[cells > 0], edgecolor="none"))
    ends = (-0.5, len(names) - 0.5)
    labels = [f"{name} ({n:.0f})  {k}" for name, n, k in zip(names, counts, numbers)]
    ax.set(xlabel="predicted class", ylabel="true class", xlim=ends, ylim=ends[::-1],
           xticks=range(len(names)), yticks=range(len(names)))
    ax.set_xticklabels(numbers, fontsize=5.5)
    ax.set_yticklabels(labels, fontsize=6.5, parse_math=False)  # a name is no formula
    ax.tick_params(length=0)
    return pd.DataFrame(shares, index=list(names), columns=list(names))


def plot_scores(ax, scores: pd.DataFrame, metric: str,
                published: pd.Series | None = None) -> None:
    """Dots with 95% intervals, ours filled; the paper's figures as open grey diamonds.

    `scores` holds rows of `score_row`; `published` is in percent, indexed like `scores`, NaN where
    there is none.
    """
    places = np.arange(len(scores))[::-1]
    for place, (_, row) in zip(places, scores.iterrows()):
        colour, marker = source_colour(row["model"]), "os"["description" in row["model"]]
        ends = [row[f"{metric}_low"], row[f"{metric}_high"]]
        ax.plot(ends, [place, place], color=colour, lw=1.2)
        ax.plot(row[metric], place, marker, color=colour, ms=5)
    if published is not None:
        ax.plot(published, places, "D", mfc="none", mec=COLOURS["paper"], ms=5,
                label="paper, Rakuten data")
    ax.set(yticks=places, yticklabels=scores["model"].map(display_name),
           xlabel=f"{metric_name(metric)} (%)", xlim=(-2, 100))
    ax.grid(axis="x", lw=0.4)


# --- display --------------------------------------------------------------------------------------
def show(*objects: object) -> None:
    """The source of things of this study, as they run; the first line says where each stands."""
    for thing in objects:
        path = Path(inspect.getsourcefile(thing)).resolve()  # notebooks import from ".."
        ours = path.is_relative_to(settings.ROOT) and "site-packages" not in path.parts
        place = path.relative_to(settings.ROOT) if ours else inspect.getmodule(thing).__name__
        display(Markdown(f"```python\n# {place}\n{inspect.getsource(thing)}```"))


def caption(text: str) -> None:
    """A figure's caption, filled from results, under the figure."""
    display(Markdown(f"*{text}*"))


def plain(text: str) -> str:
    """A product's text for a place where Markdown is read: it means nothing there."""
    return re.sub(r"([\\`*_{}\[\]<>()#+\-.!|$~&])", r"\\\1", text)


def note(text: str) -> None:
    """A sentence of the running text whose numbers come from results."""
    display(Markdown(text))
