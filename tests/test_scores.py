"""Scores and tables: metrics against hand-worked counts and scikit-learn, intervals, the paper's
rows, two runs compared.
"""
import itertools
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from bs4 import BeautifulSoup
from safetensors.torch import save_file
from sklearn.metrics import classification_report

import helpers as h
from commands.plan import stage_names
from engine.claims import CLAIMS
from engine.paper_tables import ahead_of_all, over_seeds
from engine.runs import runs_folder
from engine.scores import bootstrap, confusion_cells, count_classes, scores_of_cells
from engine.settings import OTHER_FUSIONS

# Six rows of three classes: class 0 has 2 of 3 right, class 1 has 1 of 2, class 2 has 1 of 1.
TRUTH, PREDICTED = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
ENCODERS_ALONE = ["CamemBERT description", "CamemBERT title", "FlauBERT description",
                  "FlauBERT title", "SE-ResNeXt-50"]
ROWS_OF_TABLES = {
    "I": ENCODERS_ALONE,
    "II": ["text concat + final concat", "text concat + final add", "text concat + final average",
           "text average + final average"],
    "III": ["basic (average + average)", "with dropout", "with more layers"],
    "IV": ENCODERS_ALONE,
    "V": ["text concat + final add", "text concat + final concat", "text concat + final average",
          "text average + final average"]}
SOME_NUMBERS = [
    ("I", 3, 92.31, 90.32), ("I", 4, 59.25, 54.30), ("II", 3, 93.20, 92.67),
    ("III", 1, 92.49, 90.00), ("IV", 0, 86.40, 83.13), ("V", 0, 91.97, 89.39),
    ("V", 3, 92.25, 89.94)]
MODELS = {
    "CamemBERT description": "camembert_description",
    "text concat + final add": "concat-add",
    "SE-ResNeXt-50": "seresnext",
    "with more layers": "average-average-layers",
    "basic (average + average)": "average-average"}


def random_rows(n: int, classes: int = 7, seed: int = 0, right: float = 0.6):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, n)
    return truth, np.where(rng.random(n) < right, truth, rng.integers(0, classes, n))


def test_score_as_worked_by_hand():
    f1 = [2 * 2 / (3 + 2), 2 * 1 / (2 + 2), 2 * 1 / (1 + 2)]  # 2 * hits / (true + predicted)
    weighted = (3 * f1[0] + 2 * f1[1] + f1[2]) / 6
    assert h.score(TRUTH, PREDICTED) == pytest.approx({
        "accuracy": 4 / 6, "macro_f1": sum(f1) / 3, "weighted_f1": weighted})


def test_score_equals_scikit_learns_report():
    truth, predicted = random_rows(300)
    report = classification_report(truth, predicted, output_dict=True)
    assert h.score(truth, predicted) == pytest.approx({
        "accuracy": report["accuracy"], "macro_f1": report["macro avg"]["f1-score"],
        "weighted_f1": report["weighted avg"]["f1-score"]})


def test_macro_f1_is_over_the_classes_that_occur_in_the_truth():
    found = h.score([0, 0, 1, 1], [0, 0, 1, 5])
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["weighted_f1"] == pytest.approx((2 * 1 + 2 * 2 / 3) / 4)


def test_scores_of_cells_equal_score_on_resampled_rows():
    truth, predicted = random_rows(40, seed=3)
    for seed in range(30):
        rows = np.random.default_rng(seed).integers(0, 12, 40)  # some classes are missing
        found = scores_of_cells(confusion_cells(truth[rows], predicted[rows], 7), 7)
        expected = h.score(truth[rows], predicted[rows])
        assert found[0] == pytest.approx(list(expected.values()))


def test_bootstrap_equals_scipys_with_score_as_the_statistic():
    def scores(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        return np.array(list(h.score(truth, predicted).values()))

    truth, predicted = random_rows(40, seed=3)
    low, high = scipy.stats.bootstrap(
        (truth, predicted), scores, paired=True, vectorized=False, n_resamples=80, rng=5,
        method="BCa").confidence_interval
    found = h.bootstrap(truth, predicted, 80, seed=5)
    assert list(found) == ["accuracy", "macro_f1", "weighted_f1"]
    assert np.allclose(list(found.values()), np.transpose([low, high]))


def test_interval_of_a_perfect_prediction_is_a_point():
    assert set(h.bootstrap([0, 1, 2] * 5, [0, 1, 2] * 5, 20).values()) == {(1.0, 1.0)}


def test_an_interval_stays_within_what_a_score_can_be():
    truth = np.arange(40) % 8
    guesses = np.stack([np.where(truth == 0, 0, 9), truth], 1)  # two seeds, far apart
    for low, high in h.bootstrap(truth, guesses, 200).values():
        assert low == 0 and high == 1


def test_interval_holds_the_score_and_shrinks_with_the_root_of_n():
    truth, predicted = random_rows(200)
    few, point = h.bootstrap(truth, predicted, 400), h.score(truth, predicted)
    many = h.bootstrap(np.tile(truth, 16), np.tile(predicted, 16), 400)
    for metric, (low, high) in few.items():
        assert low < point[metric] < high
        assert (many[metric][1] - many[metric][0]) / (high - low) == pytest.approx(1 / 4, rel=0.25)
    width, p = few["accuracy"][1] - few["accuracy"][0], point["accuracy"]
    half = 1.96 * np.sqrt(p * (1 - p) / 200)  # of the binomial interval
    assert width == pytest.approx(2 * half, rel=0.15)


def test_bootstrap_repeats_itself_and_depends_on_its_seed():
    truth, predicted = random_rows(50)
    assert h.bootstrap(truth, predicted, 30) == h.bootstrap(truth, predicted, 30)
    assert h.bootstrap(truth, predicted, 30) != h.bootstrap(truth, predicted, 30, seed=1)


def test_mcnemar_as_counted_by_hand_and_symmetric():
    #          both right  only first          only second  both wrong
    truth = [1] * 12
    first = [1, 1, 1] + [1, 1, 1, 1, 1, 1] + [0] + [0, 2]
    second = [1, 1, 1] + [0, 0, 2, 0, 0, 0] + [1] + [2, 2]
    p = scipy.stats.binomtest(6, 7, 0.5).pvalue
    assert p == pytest.approx(2 * (7 + 1) / 2 ** 7)  # six or more heads of seven, both sides
    assert h.mcnemar(truth, first, second) == (6, 1, pytest.approx(p))
    assert h.mcnemar(truth, second, first) == (1, 6, pytest.approx(p))
    assert h.mcnemar(truth, first, first) == (0, 0, 1.0)


def test_score_row_is_in_percent_with_its_intervals(run):
    truth, predicted = random_rows(80)
    row, point = h.score_row("a model", truth, predicted, run), h.score(truth, predicted)
    interval = h.bootstrap(truth, predicted, run.profile.bootstrap)
    assert (row["model"], row["n"]) == ("a model", 80)
    for metric in ("accuracy", "macro_f1", "weighted_f1"):
        (low, high), value = interval[metric], point[metric]
        found = (row[f"{metric}_low"], row[metric], row[f"{metric}_high"])
        assert found == pytest.approx((100 * low, 100 * value, 100 * high))
    ends = f"{row['accuracy_low']:.1f}, {row['accuracy_high']:.1f}"
    assert h.score_table([row])["accuracy"][0] == f"{row['accuracy']:.1f} [{ends}]"


# --- the paper's tables ---------------------------------------------------------------------------
@pytest.fixture
def scores(run):
    """Our scores of every model, in another order than the paper's."""
    models = sorted(set(h.OUR_MODEL.values()), reverse=True)
    return pd.DataFrame([h.score_row(model, *random_rows(30, seed=i), run)
                         for i, model in enumerate(models)])


@pytest.mark.parametrize("number", ROWS_OF_TABLES)
def test_table_has_the_papers_rows_in_its_order_with_our_scores_beside(scores, number):
    table, ours = h.paper_table(scores, number), scores.set_index("model")
    assert table["model"].tolist() == ROWS_OF_TABLES[number]
    for row in table.itertuples():
        if row.model in MODELS:
            assert row.accuracy == ours.loc[MODELS[row.model], "accuracy"]
    assert h.TABLES[number] == ("90-10" if number in ("I", "II", "III") else "80-20")
    readable = h.readable_table(table, h.open_run("paper", "90-10", 0))
    assert readable["model"].tolist() == ROWS_OF_TABLES[number]
    quoted = [f"{value:.2f}" for value in table["paper_accuracy"]]
    assert readable["paper: accuracy"].tolist() == quoted


@pytest.mark.parametrize("changes, why, first", [
    ({}, "paper", "CamemBERT description"),
    ({"camembert": "nobody/x"}, "paper (other encoders)", "CamemBERT (nobody/x) description"),
    ({"freeze_encoders": True}, "paper (other encoders)", "CamemBERT description"),
    ({"limit": 300, "seresnext": "small"}, "paper (other encoders, other rows)",
     "CamemBERT description"),
    ({"rows": "all"}, "paper (other rows)", "CamemBERT description"),
    ({"camembert": "data"}, "paper (other encoders)", "CamemBERT (data) description"),
    ({"texts": "joined"}, "paper (other texts)", "CamemBERT description"),
    ({"fusion_epochs": 3}, "paper", "CamemBERT description")])
def test_a_table_says_what_ran_and_why_the_papers_figures_are_another_matter(scores, changes, why,
                                                                             first):
    run = h.open_run("paper", "90-10", 0, changes)
    readable = h.readable_table(h.paper_table(scores, "I"), run)
    assert readable["model"][0] == first
    assert readable.columns[-2:].tolist() == [f"{why}: accuracy", f"{why}: macro-F1"]
    last = "SE-ResNeXt-50 (small)" if "seresnext" in changes else "SE-ResNeXt-50"
    assert readable["model"].tolist()[-1] == last


def test_the_samples_tables_name_the_small_encoders_and_the_other_data(scores):
    readable = h.readable_table(h.paper_table(scores, "I"), h.open_run("sample", "90-10", 0))
    assert readable["model"][0] == "CamemBERT (small) description"
    assert readable.columns[-1] == "paper (other data, other encoders): macro-F1"


COMPARED = [("concat-concat", "concat-add", 3.0, 0.01),
            ("concat-concat", "concat-average", 2.0, 0.04),
            ("concat-concat", "average-average", -1.0, 0.03),
            ("concat-add", "concat-average", 1.0, 0.9),
            ("concat-add", "average-average", -4.0, 0.001),
            ("concat-average", "average-average", -3.0, 0.02)]


@pytest.mark.parametrize("p, ahead", [(0.049, "average-average"), (0.051, "")])
def test_a_row_is_ahead_only_where_each_other_is_told_from_it(p, ahead):
    table = pd.DataFrame(COMPARED, columns=["first", "second", "effect", "p_holm"])
    models = ["concat-concat", "concat-add", "concat-average", "average-average"]
    table.loc[5, "p_holm"] = p
    assert ahead_of_all(models, table) == ahead
    assert ahead_of_all(models[:3], table) == "concat-concat"
    assert ahead_of_all(models[1:3], table) == ""


@pytest.mark.parametrize("place, changes, grey", [
    (None, {}, []), (3, {}, []), (0, {"rows": "all"}, [-2, -1])])
def test_a_table_is_bold_where_a_row_is_ahead_and_grey_where_the_papers_is_another_matter(
        scores, monkeypatch, place, changes, grey):
    monkeypatch.setattr("engine.paper_tables.row_ahead", lambda table, run: place)
    run, table = h.open_run("paper", "90-10", 0, changes), h.paper_table(scores, "II")
    page = BeautifulSoup(h.style_table(table, run).to_html(), "html.parser")
    rules = [rule.partition("{") for rule in page.style.string.split("}")]
    bold = "".join(cells for cells, _, rule in rules if "bold" in rule)
    pale = "".join(cells for cells, _, rule in rules if "#767676" in rule)
    width = len(h.readable_table(table, run).columns)
    for row, column in itertools.product(range(4), range(width)):
        cell = rf"row{row}_col{column}\b"
        assert bool(re.search(cell, bold)) == (row == place)
        assert bool(re.search(cell, pale)) == (column - width in grey)


@pytest.mark.parametrize("number, row, accuracy, macro_f1", SOME_NUMBERS)
def test_table_quotes_the_paper(scores, number, row, accuracy, macro_f1):
    found = h.paper_table(scores, number).iloc[row]
    assert (found["paper_accuracy"], found["paper_macro_f1"]) == (accuracy, macro_f1)


def test_unknown_table_is_refused(scores):
    with pytest.raises(ValueError, match="'VI'"):
        h.paper_table(scores, "VI")


def test_every_published_row_has_a_model_of_ours():
    published = h.load_published().query("source == 'paper'")
    assert len(published) == 21 and set(published["model"]) == set(h.OUR_MODEL)
    known = {*h.ENCODER_MODELS, *(variant.name for variant in h.TABLE_VARIANTS)}
    assert set(h.OUR_MODEL.values()) == known


def test_no_two_tables_of_a_page_name_their_cells_alike(scores, monkeypatch):
    monkeypatch.setattr("engine.paper_tables.row_ahead", lambda table, run: None)
    runs = [h.open_run("paper", split, seed) for split in h.SPLITS for seed in (0, 1)]
    pages = [h.style_table(h.paper_table(scores, number), run).to_html()
             for run in runs for number, split in h.TABLES.items() if split == run.split]
    names = [cell["id"] for page in pages
             for cell in BeautifulSoup(page, "html.parser").find_all("td")]
    assert len(pages) == 10 and len(names) == len(set(names))


def test_several_seeds_have_a_mean_and_a_deviation(scores, tmp_path, monkeypatch):
    def read(run, name):
        folder = tmp_path / str(run.seed)
        folder.mkdir()
        table = scores.assign(accuracy=50 + 10 * run.seed, macro_f1=40.0)
        extra = pd.DataFrame([{"model": "majority class", "accuracy": 1.0, "macro_f1": 1.0}])
        pd.concat([table, extra]).to_csv(folder / "scores.csv")
        return folder

    monkeypatch.setattr("engine.paper_tables.read_stage", read)
    runs = [h.open_run("paper", "90-10", seed) for seed in (0, 1, 2)]
    table = over_seeds(runs)
    assert table["model"].tolist() == scores["model"].tolist() and (table["seeds"] == 3).all()
    assert (table["accuracy"] == 60).all() and (table["accuracy, deviation"] == 10).all()
    assert (table["macro_f1"] == 40).all() and (table["macro_f1, deviation"] == 0).all()


def test_sample_is_never_called_rakuten(run):
    assert "synthetic sample" in h.data_note(h.open_run("sample", "90-10", 0))
    assert "Rakuten" in h.data_note(run) and "described" in h.data_note(run)


# --- two runs -------------------------------------------------------------------------------------
# What is right (1) and wrong (0) of eight test products, in each of two runs, of three models.
RIGHT = {
    "paper": {"concat-add": "11111110", "TF-IDF title": "10101010", "camembert_title": "00000000"},
    "light": {"concat-add": "11110001", "TF-IDF title": "10101010", "camembert_title": "00001111"}}
EIGHT = [1, 0, 2, 1, 0, 2, 1, 0]  # their classes


def probabilities(right: str) -> np.ndarray:
    """Probabilities [8, 27] whose largest is that of the true class, or of another one."""
    predicted = [label if sign == "1" else label + 5 for label, sign in zip(EIGHT, right)]
    found = np.full((8, 27), 0.01, np.float32)
    found[range(8), predicted] = 0.74
    return found


@pytest.fixture
def scored(make_run, fake_stage):
    """A function that makes a run whose stage `scores` holds the predictions of RIGHT."""
    def build(run, name, folder):
        first = 100 * run.seed
        predictions = {model: probabilities(right) for model, right
                       in RIGHT[run.profile.clean].items()}
        h.save_tensors(folder / "predictions.safetensors", range(first, first + 8),
                       label_id=EIGHT, **predictions)
        h.save_table(folder / "scores.csv", pd.DataFrame({"model": list(predictions)}))

    def prepare(**changes):
        run = make_run(**changes)
        fake_stage("scores", build)
        h.stage(run, "scores")
        return run

    return prepare


def test_two_runs_are_compared_as_counted_by_hand(scored):
    table = h.compare(scored(), scored(clean="light"))
    # Of the fusion: four both right, three only here, one only there, none both wrong.
    p = {"concat-add": 2 * (1 + 4) / 2 ** 4, "TF-IDF title": 1.0, "camembert_title": 2 / 2 ** 4}
    rows = [("text concat + final add", 8, 87.5, 62.5, 3, 1, p["concat-add"]),
            ("TF-IDF title", 8, 50.0, 50.0, 0, 0, p["TF-IDF title"]),
            ("CamemBERT title", 8, 0.0, 50.0, 0, 4, p["camembert_title"])]
    assert table.columns.tolist() == ["model", "n", "accuracy", "other: accuracy",
                                      "only this right", "only other right", "p"]
    assert list(table.itertuples(index=False, name=None)) == [pytest.approx(row) for row in rows]


def test_a_run_compared_with_itself_does_not_differ(scored):
    run = scored()
    table = h.compare(run, run)
    assert (table["accuracy"] == table["other: accuracy"]).all() and (table["p"] == 1).all()


def test_runs_that_score_different_products_are_not_compared(scored):
    with pytest.raises(ValueError, match="different products.*take the same rows, split and seed"):
        h.compare(scored(), scored(seed=1))


def test_a_run_without_scores_says_how_to_make_them(scored, make_run):
    with pytest.raises(FileNotFoundError, match="stage scores.*--only 08"):
        h.compare(scored(), make_run(clean="light"))


# --- an encoder alone -----------------------------------------------------------------------------
def test_head_probabilities_are_the_softmax_of_the_linear_head(tmp_path):
    weight, bias = torch.randn(27, 6), torch.randn(27)
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
    features = torch.randn(10, 6)
    found = h.head_probabilities(tmp_path, features)
    powers = np.exp(features.numpy() @ weight.numpy().T + bias.numpy())
    assert np.allclose(found.numpy(), powers / powers.sum(1, keepdims=True), atol=1e-5)
    assert torch.allclose(found.sum(1), torch.ones(10), atol=1e-5)


# --- the whole chain ------------------------------------------------------------------------------
def times_of_stages() -> dict:
    """When the manifest of each stage was written."""
    manifests = (runs_folder() / "stages").glob("*/manifest.json")
    return {path: path.stat().st_mtime_ns for path in manifests}


ONE_SEED = {*h.BASELINES, *h.ENCODER_MODELS, *h.LATE_FUSIONS}


@pytest.mark.slow
def test_chain_ends_in_the_test_parts_scores(make_run):
    run = make_run(image_size=32, region_size=32, grid=8, image_batch=16)
    for name in stage_names(run):
        h.stage(run, name)
    folder = h.stage(run, "scores")
    test = h.read_split(run).query("part == 'test'")
    predictions = h.load_tensors(folder / "predictions.safetensors", test["product_id"])
    assert predictions.pop("label_id").tolist() == test["label_id"].tolist()
    table = pd.read_csv(folder / "scores.csv").set_index("model")
    assert set(table.index) == set(predictions)
    assert len(table) == 4 + 5 + 6 + len(OTHER_FUSIONS) + 4
    assert set(table["n"]) == {len(test)}
    for model, each in predictions.items():
        assert torch.allclose(each.sum(-1), torch.tensor(1.0), atol=1e-4)
        seeds = each.argmax(-1).reshape(len(test), -1).numpy()
        assert seeds.shape[1] == (1 if model in ONE_SEED else run.profile.fusion_seeds)
        right = (seeds == test["label_id"].to_numpy()[:, None]).mean()
        assert table.loc[model, "accuracy"] == pytest.approx(100 * right)
    halves = predictions["average-average"] + predictions["late mean"][:, None]
    assert torch.allclose(predictions["blend"], halves / 2, atol=1e-6)
    labels, val = h.read_probabilities(run, "val")
    encoders = torch.stack([val[model] for model in h.ENCODER_MODELS], 1)
    for model, each in h.cross_fitted(encoders, labels).items():  # no row by a fit on itself
        assert torch.equal(val[model], each), model
    tables = sorted(path.name for path in folder.glob("table_*"))
    assert tables == ["table_I.csv", "table_II.csv", "table_III.csv"]
    kinds = {path.suffix for path in runs_folder().rglob("*") if path.is_file()}
    assert kinds <= {".csv", ".json", ".lock", ".safetensors", ".txt"}  # nothing is pickled
    before = times_of_stages()
    h.stage(run, "scores")
    h.stage(run, "seresnext")
    assert times_of_stages() == before and len(before) == len(stage_names(run)) + 1
    again = h.read_predictions(run)[1]
    assert again.keys() == predictions.keys()
    for model, labels in again.items():
        assert labels.tolist() == predictions[model].argmax(-1).tolist()
    metrics = h.read_manifest(run, h.stage(run, "claims").name.rpartition("-")[0])["metrics"]
    assert metrics["best single encoder"] in h.ENCODER_MODELS
    assert metrics["recommended"] in predictions
    claims = h.read_claims([run])
    assert claims["claim"].tolist() == list(CLAIMS) and set(claims["n"]) == {len(test)}
    described = h.describe_stages(run, "splits", "seresnext", "scores")
    assert described["stage"].tolist() == ["splits", "seresnext", "scores"]
    assert (described["seconds"] >= 0).all()


def test_the_picture_encoder_alone_is_scored_on_whole_pictures(run, tmp_path, monkeypatch):
    monkeypatch.setattr(h, "read_stage", lambda run, name: tmp_path / name)
    features = {name: torch.randn(4, 8) for name in ("image_whole", "image_regions")}
    for name, rows in features.items():
        (tmp_path / name).mkdir()
        h.save_tensors(tmp_path / name / "features.safetensors", [1, 2, 3, 4], features=rows)
    (tmp_path / "seresnext").mkdir()
    h.save_weights(tmp_path / "seresnext" / "head.safetensors", torch.nn.Linear(8, 27).state_dict())
    found = h.encoder_probabilities(run, "seresnext", [1, 2, 3, 4])
    expected = h.head_probabilities(tmp_path / "seresnext", features["image_whole"])
    assert torch.equal(found, expected)


def test_labels_may_be_tensors_of_any_number_of_classes():
    truth, predicted = random_rows(40, classes=3)
    by_array = bootstrap(truth, predicted, 50)
    assert bootstrap(torch.tensor(truth), torch.tensor(predicted), 50) == by_array
    seeds = np.stack([predicted, truth], 1)
    assert count_classes(truth, torch.tensor(seeds)) == 3
    assert count_classes([0, 1], np.array([[4], [0]])) == 5
