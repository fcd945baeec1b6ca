"""The paper's profile on files in Rakuten's two layouts, with checkpoints from local folders, by the command line."""
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from transformers import CamembertConfig, CamembertModel, FlaubertConfig, FlaubertModel

import helpers as h
from conftest import ROOT, isolate


@pytest.fixture(scope="module")
def ens(tmp_path_factory):
    """About 1,800 invented products of all 27 classes, as challengedata.ens.fr lays them out."""
    folder = tmp_path_factory.mktemp("ens")
    h.sample_generator().write_catalogue(folder)
    return folder


@pytest.fixture(scope="module")
def sigir(ens, tmp_path_factory):
    """The same products as the SIGIR eCom 2020 challenge laid them out."""
    folder, theirs, ours = tmp_path_factory.mktemp("sigir"), h.LAYOUTS["ENS"], h.LAYOUTS["SIGIR"]
    columns = {old: next(new for new, name in ours["columns"].items() if name == meaning)
               for old, meaning in theirs["columns"].items()}
    for table in ("x", "y"):
        rows = pd.read_csv(ens / theirs[table], index_col=0, keep_default_na=False).rename_axis("Integer_id")
        rows.rename(columns={**columns, theirs["label"]: ours["label"]}).to_csv(folder / ours[table], sep="\t")
    (folder / "image_training").symlink_to(ens / "images" / "image_train")
    return folder


def save_checkpoint(encoder: str, model, texts, folder):
    """A local folder as a user would have it: the model's configuration and weights, and a tokenizer."""
    tokenizer = h.train_tokenizer(encoder, texts, 1000, folder)
    model(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(ens):
    products = h.load_catalogue(ens)
    return [h.clean_text(text) for text in (*products["title"], *products["description"])]


@pytest.fixture(scope="module")
def small(texts, tmp_path_factory):
    """{encoder: folder} of small models."""
    torch.manual_seed(0)
    return {encoder: save_checkpoint(encoder, lambda tokenizer: h.small_text_model(encoder, tokenizer, 32, 1, 64),
                                     texts, tmp_path_factory.mktemp(encoder)) for encoder in h.TEXT_ENCODERS}


@pytest.fixture(scope="module")
def full(texts, tmp_path_factory):
    """{encoder: folder} of models of the paper's depth and width, with random weights and a small vocabulary."""
    torch.manual_seed(0)
    models = {"camembert": lambda tokenizer: CamembertModel(CamembertConfig(
                  vocab_size=len(tokenizer), max_position_embeddings=514, type_vocab_size=1)),
              "flaubert": lambda tokenizer: FlaubertModel(FlaubertConfig(
                  vocab_size=len(tokenizer), emb_dim=768, n_layers=12, n_heads=12))}
    return {encoder: save_checkpoint(encoder, model, texts, tmp_path_factory.mktemp(f"full-{encoder}"))
            for encoder, model in models.items()}


def command(place, catalogue, *words, **settings):
    """Run run.py as a user does; its output."""
    environment = {**os.environ, "STUDY_RUNS": str(place), "RAKUTEN_DATA": str(catalogue), "COLUMNS": "200"}
    words = [*words, "--profile", "paper", *(f"--set={name}={value}" for name, value in settings.items())]
    ended = subprocess.run([sys.executable, str(ROOT / "run.py"), *words], env=environment, capture_output=True,
                           text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_limited_study_on_the_sigir_layout_with_two_workers(sigir, small, tmp_path):
    settings = {**small, "seresnext": "small", "max_length": 64, "text_epochs": 1, "text_lr": 1e-3, "image_epochs": 1,
                "image_size": 64, "region_size": 64, "grid": 4, "fusion_epochs": 2, "bootstrap": 50,
                "cache_pictures": False}
    words = ["--limit", "300", "--split", "90-10"]
    found = command(tmp_path, sigir, "doctor", *words, **settings)
    assert "SIGIR layout" in found and "missing" not in found.replace("not missing", "")
    printed = command(tmp_path, sigir, "study", *words, "--workers", "2", **settings)
    printed = " ".join(printed.split())  # titles are wrapped
    assert "Table II, split 90-10, seed 0. Percent" in printed and "Rakuten France, described-limit300 rows" in printed
    folder = tmp_path / "paper" / "described-limit300" / "90-10" / "seed0"
    split = pd.read_csv(folder / "splits" / "split.csv")
    assert len(split) == 300 and split["label_id"].nunique() == 27
    assert (split["part"].value_counts()[["test", "val"]] == [30, 27]).all()
    assert len(pd.read_csv(folder / "scores" / "table_I.csv")) == 5
    done = command(tmp_path, sigir, "status", *words, **settings)
    assert done.count("done") == 8 and (folder.parents[1] / "report" / "index.html").exists()


def test_frozen_encoders_of_full_size_on_the_ens_layout(ens, full, tmp_path):
    settings = {**full, "image_weights": "none", "max_length": 32, "image_size": 64, "fusion_epochs": 2,
                "region_size": 56, "grid": 4,  # 16 tiles of 14 x 14 pixels: 256 of them would take a minute
                "freeze_encoders": True, "cache_pictures": False}
    command(tmp_path, ens, "doctor", "--limit", "81", **settings)
    command(tmp_path, ens, "stage", "--limit", "81", "--split", "80-20", **settings)
    run = tmp_path / "paper" / "described-limit81-frozen" / "80-20" / "seed0"
    layers = 12 * (12 * 768 ** 2 + 13 * 768)  # weights, biases and norms of the paper's twelve layers
    for name in ("camembert_title", "flaubert_title"):
        assert layers < h.read_json(run / name / "manifest.json")["metrics"]["parameters"] < layers + 2e6
    image = h.read_json(run / "seresnext" / "manifest.json")["metrics"]
    assert image["parameters"] == 25_566_219 and image["weights_from"] == "random weights"
    ids = pd.read_csv(run / "splits" / "split.csv")["product_id"]
    for symbol, stage in h.REPRESENTATIONS.items():
        rows = h.load_tensors(run / stage / "features.safetensors", ids)["features"]
        assert rows.shape == (81, 2048 if symbol == "P" else 768) and rows.std(0).mean() > 0
    assert (run / "fusion-concat-concat" / "model.safetensors").exists()


@pytest.mark.parametrize("settings, message", [
    ({"max_length": 65}, "reads at most 64 tokens; set max_length=64 or less"),
    ({"image_weights": "/nowhere/w.pth"}, "there is no file /nowhere/w.pth"),
    ({"limit": 20}, "limit=20 is too small for 27 classes"), ({}, r"1 of 300 pictures are absent or empty .*\.jpg")])
def test_what_would_stop_a_study_after_hours_stops_it_at_once(ens, small, tmp_path, monkeypatch, settings, message):
    isolate(monkeypatch, tmp_path, ens)
    run = h.open_run("paper", "90-10", 0, {
        **{encoder: str(folder) for encoder, folder in small.items()}, "seresnext": "small", "max_length": 64,
        "limit": 300, **settings})
    if settings:
        with pytest.raises(ValueError, match=message):
            h.check_inputs(run)
    else:
        h.check_inputs(run)
        products = h.select_rows(h.load_catalogue(ens), "described", 300, 0)
        monkeypatch.setattr(h, "absent_pictures", lambda rows: [products["picture"][0]])
        with pytest.raises(ValueError, match=message):
            h.check_inputs(run)
