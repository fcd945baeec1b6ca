"""Figures: files, the sample's mark, the confusion's shares, colours by source. Display: what is
shown, and where it stands.
"""
import base64
import inspect
import io

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from markdown_it import MarkdownIt
from PIL import Image
from torch import nn

import helpers as h
from engine.figures import small_png, source_colour, table_html
from engine.settings import ROOT


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def drawn(run):
    """A function that saves a small figure for a profile and returns its folder and numbers."""
    def draw(profile: str, **of: bool):
        run = h.open_run(profile, "90-10", 0)
        fig, ax = h.figure(h.COLUMN, 2.0)
        ax.plot([1, 2, 3])
        data = pd.DataFrame({"x": [1, 2, 3], "y": [0.25, 0.5, 1.0]})
        h.save_figure(run, fig, "line", data, **of)
        return run.folder / "figures", data

    return draw


@pytest.mark.parametrize("profile, marked", [("sample", True), ("paper", False)])
def test_figure_is_saved_thrice_and_the_sample_says_so(drawn, profile, marked):
    folder, data = drawn(profile)
    assert sorted(path.name for path in folder.iterdir()) == ["line.csv", "line.png", "line.svg"]
    assert ("synthetic sample" in (folder / "line.svg").read_text()) is marked
    assert pd.read_csv(folder / "line.csv").equals(data)
    assert (folder / "line.png").read_bytes().startswith(b"\x89PNG")
    assert Image.open(folder / "line.png").size == (700, 400)  # 3.5 x 2 inches at 200 dpi


def test_a_figure_that_shows_nothing_of_a_run_has_no_mark(drawn):
    folder, _ = drawn("sample", of_run=False)
    assert "synthetic sample" not in (folder / "line.svg").read_text()


def test_a_notebook_holds_a_figure_as_large_as_its_file_in_256_colours():
    fig, ax = h.figure(h.COLUMN, 2.0)
    ax.imshow(np.random.default_rng(0).integers(256, size=(32, 32, 3)))
    picture = Image.open(io.BytesIO(base64.b64decode(small_png(fig))))
    assert (picture.mode, picture.size) == ("P", (385, 220))  # 3.5 x 2 inches at 110 dpi
    full = io.BytesIO()
    fig.savefig(full, format="png", dpi="figure")
    apart = np.abs(np.asarray(picture.convert("RGB"), float) - np.asarray(
        Image.open(full).convert("RGB"), float))
    assert apart.mean() < 5  # of 255


def test_same_figure_same_bytes(drawn):
    """So that a rerun changes nothing in the repository."""
    first = {path.name: path.read_bytes() for path in drawn("sample")[0].iterdir()}
    assert first == {path.name: path.read_bytes() for path in drawn("sample")[0].iterdir()}


def test_confusion_shows_shares_of_the_true_class():
    _, ax = h.figure(3, 3)
    place = pd.Series({4: 0, 9: 1, 2: 2, 7: 3})  # of the label ids, in the figure's order
    truth, predicted = [4, 4, 4, 4, 9, 9, 2], [4, 4, 4, 9, 9, 4, 2]
    shares = h.plot_confusion(ax, truth, predicted, ["a", "b", r"c$\frac{$", "none"], place)
    ax.figure.canvas.draw()  # a class's name is no formula
    assert shares.loc["a"].tolist() == [0.75, 0.25, 0, 0]
    assert shares.loc["b"].tolist() == [0.5, 0.5, 0, 0]
    assert np.allclose(shares.sum(axis=1), [1, 1, 1, 0])  # a class without rows stays empty
    colours = ax.collections[0]
    assert (colours.norm.vmin, colours.norm.vmax) == (0, 1)
    assert ax.get_xlabel() == "predicted class" and ax.get_ylabel() == "true class"


@pytest.mark.parametrize("model, colour", [
    ("camembert_title", "#004D80"),
    ("CamemBERT description", "#004D80"),
    ("flaubert_title", "#3D9BD6"),
    ("seresnext", "#D55E00"),
    ("concat-add", "#222222"),
    ("average-average-dropout", "#222222"),
    ("majority class", "#767676"),
    ("TF-IDF both", "#767676"),
])
def test_colour_says_the_source(model, colour):
    assert source_colour(model) == colour


def test_the_papers_name_of_the_image_model_has_the_images_colour():
    assert source_colour("SE-ResNeXt-50") == "#D55E00"


def test_learning_curve_marks_the_best_epoch():
    curve = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [3, 2, 1.0],
                          "val_loss": [3, 2.5, 2.6], "val_macro_f1": [0.2, 0.6, 0.5]})
    _, axes = h.figure(7, 3, ncols=2)
    h.plot_learning_curve(axes, curve, "title", "#004D80")
    line, star = axes[1].lines
    assert line.get_ydata().tolist() == pytest.approx([20, 60, 50])
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (2, pytest.approx(60))
    assert "%" in axes[1].get_ylabel() and "nats" in axes[0].get_ylabel()
    assert axes[0].lines[0].get_marker() == ""
    h.plot_learning_curve(axes, curve[:1].assign(epoch=0), "frozen", "#004D80")
    assert axes[0].lines[2].get_marker() == "x"  # one point alone draws no line


def test_tables_come_without_their_rows_numbers_and_keep_other_indexes():
    table = pd.DataFrame({"title": ["<b>Chaise</b>", "12 $ ou 13 $"]})
    shown = table_html(table)
    assert "&lt;b&gt;Chaise" in shown and "tex2jax_ignore" in shown  # text stays text
    assert "<th>0</th>" not in shown and "<th></th>" not in shown
    assert "<th>bois</th>" in table_html(table.set_index(pd.Index(["bois", "métal"])))
    long = pd.DataFrame({"n": range(100)})
    assert table_html(long).count("<tr") < 20 and "100 rows" in table_html(long)
    assert "100 rows" not in table_html(long[:50])


def test_scores_are_dots_with_their_intervals_and_the_papers_are_open_diamonds():
    scores = pd.DataFrame({"model": ["camembert_title", "concat-add"], "accuracy": [80.0, 90.0],
                           "accuracy_low": [75.0, 88.0], "accuracy_high": [85.0, 92.0]})
    _, ax = h.figure(5, 3)
    h.plot_scores(ax, scores, "accuracy", pd.Series([81.0, np.nan]))
    interval, dot, interval_2, dot_2, paper = ax.lines
    assert interval.get_xdata().tolist() == [75, 85]
    assert dot.get_xdata()[0] == 80 and dot.get_color() == "#004D80"
    assert interval_2.get_xdata().tolist() == [88, 92] and dot_2.get_xdata()[0] == 90
    assert paper.get_markerfacecolor() == "none" and paper.get_xdata()[0] == 81
    names = {place: label.get_text() for place, label in zip(ax.get_yticks(), ax.get_yticklabels())}
    order = [names[place] for place in sorted(names, reverse=True)]
    assert order == ["CamemBERT title", "text concat + final add"]  # the first row on top


# --- display --------------------------------------------------------------------------------------
@pytest.fixture
def shown(monkeypatch):
    """The texts that are shown in the notebook, in order."""
    texts = []
    monkeypatch.setattr("engine.figures.display", lambda markdown: texts.append(markdown.data))
    return texts


def test_show_says_first_where_the_code_stands_and_then_the_code(shown):
    h.show(h.Join, h.clean_text, h.EpochSampler, nn.Linear)
    places = [text.splitlines()[1] for text in shown]
    assert places == ["# helpers.py", "# engine/texts.py", "# engine/training.py",
                      "# torch.nn.modules.linear"]
    source = inspect.getsource(h.Join)
    assert shown[0] == f"```python\n# helpers.py\n{source}```"
    assert source.startswith("class Join(nn.Module):")


def test_show_says_the_same_place_in_a_notebook_that_imports_from_the_folder_above(
        shown, monkeypatch):
    above = ROOT / "notebooks" / ".."  # so sys.path has it there
    monkeypatch.setattr("engine.figures.inspect.getsourcefile",
                        lambda thing: str(above / "engine" / "texts.py"))
    h.show(h.clean_text)
    assert shown[0].splitlines()[1] == "# engine/texts.py"


def test_a_products_text_means_nothing_in_markdown():
    text = "**gras** [lien](x) `code` $x^2$ <b> | # a_b ~ & 1. !"
    shown = MarkdownIt("commonmark").enable("table").render(h.plain(text))
    assert BeautifulSoup(shown, "html.parser").get_text().strip() == text
    assert shown.count("<") == 2  # the paragraph's own marks
