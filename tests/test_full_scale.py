"""The paper's profile on files in Rakuten's two layouts, with checkpoints from local folders, by
the command line.
"""
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import CamembertConfig, CamembertModel, FlaubertConfig, FlaubertModel

import helpers as h
from commands import doctor, inputs
from commands.plan import NOTEBOOKS
from conftest import ROOT, isolate
from engine.rows import chosen_products


@pytest.fixture(scope="module")
def ens():
    """About 1,800 invented products of all 27 classes, as challengedata.ens.fr lays them out: the
    sample's.
    """
    return h.catalogue_folder(h.open_run("sample", "90-10", 0))


@pytest.fixture(scope="module")
def sigir(ens, tmp_path_factory):
    """The same products as the SIGIR eCom 2020 challenge laid them out."""
    folder = tmp_path_factory.mktemp("sigir")
    theirs, ours = h.LAYOUTS["ENS"], h.LAYOUTS["SIGIR"]
    name_of = {meaning: name for name, meaning in ours["columns"].items()}
    columns = {old: name_of[meaning] for old, meaning in theirs["columns"].items()}
    for table in ("x", "y"):
        rows = pd.read_csv(ens / theirs[table], index_col=0, keep_default_na=False)
        rows = rows.rename(columns={**columns, theirs["label"]: ours["label"]})
        rows.rename_axis("Integer_id").to_csv(folder / ours[table], sep="\t")
    (folder / "image_training").symlink_to(ens / "images" / "image_train")
    return folder


def save_checkpoint(encoder: str, model, texts, folder) -> Path:
    """A local folder as a user would have it: the model's configuration and weights, and a
    tokenizer.
    """
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
    folders = {}
    for encoder in h.TEXT_ENCODERS:
        def model(tokenizer):
            return h.small_text_model(encoder, tokenizer, 32, 1, 64)

        folders[encoder] = save_checkpoint(encoder, model, texts, tmp_path_factory.mktemp(encoder))
    return folders


def base_camembert(tokenizer):
    return CamembertModel(CamembertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=514, type_vocab_size=1))


def base_flaubert(tokenizer):
    return FlaubertModel(FlaubertConfig(
        vocab_size=len(tokenizer), emb_dim=768, n_layers=12, n_heads=12))


@pytest.fixture(scope="module")
def full(texts, tmp_path_factory):
    """{encoder: folder} of models of the paper's depth and width, with random weights and a small
    vocabulary.
    """
    torch.manual_seed(0)
    folders = {}
    for encoder, model in (("camembert", base_camembert), ("flaubert", base_flaubert)):
        place = tmp_path_factory.mktemp(f"full-{encoder}")
        folders[encoder] = save_checkpoint(encoder, model, texts, place)
    return folders


def command(monkeypatch, *words: str, **settings) -> str:
    """Run run.py as a user does; its output."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("STUDY_CORES", "1")  # the other one is another test process's
    words = [*words, "--profile", "paper"]
    words += [f"--set={name}={value}" for name, value in settings.items()]
    ended = subprocess.run([sys.executable, str(ROOT / "run.py"), *words], capture_output=True,
                           text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def as_texts(settings: dict) -> dict:
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in settings.items()}


@pytest.mark.slow
def test_limited_study_on_the_sigir_layout_with_two_workers(sigir, small, tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path, sigir)
    settings = {**small, "seresnext": "small", "max_length": 64, "text_epochs": 1, "text_lr": 1e-3,
                "image_epochs": 1, "image_size": 64, "region_size": 64, "grid": 4,
                "fusion_epochs": 2, "fusion_seeds": 2, "bootstrap": 50, "cache_pictures": False}
    words = ["--limit", "300", "--split", "90-10"]
    found = command(monkeypatch, "doctor", *words, **settings)
    assert "SIGIR layout" in found
    assert "fatal" not in found
    printed = command(monkeypatch, "study", *words, "--workers", "2", **settings)
    printed = " ".join(printed.split())  # titles are wrapped
    assert "Table II, split 90-10, seed 0, 243 training and 30 test products. Percent" in printed
    assert "Rakuten France, described-limit300 rows" in printed
    run = h.open_run("paper", "90-10", 0, as_texts({**settings, "limit": 300}))
    assert run.folder.parent == tmp_path / "runs" / "paper" / "described-limit300" / "90-10"
    split = h.read_split(run)
    assert len(split) == 300
    assert split["label_id"].nunique() == 27
    assert (split["part"].value_counts()[["test", "val"]] == [30, 27]).all()
    assert len(pd.read_csv(h.read_stage(run, "scores") / "table_I.csv")) == 5
    assert command(monkeypatch, "status", *words, **settings).count("done") == len(NOTEBOOKS)
    report = run.folder.parents[1] / f"report{run.suffix}"
    assert (report / "index.html").exists()


@pytest.mark.slow
def test_frozen_encoders_of_full_size_on_the_ens_layout(ens, full, tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path, ens)
    settings = {**full, "image_weights": "none", "max_length": 32, "image_size": 64,
                "fusion_epochs": 1, "fusion_seeds": 1,
                "region_size": 56, "grid": 4,  # 16 tiles of 14 x 14 pixels: 256 would take a minute
                "freeze_encoders": True, "cache_pictures": False}
    command(monkeypatch, "doctor", "--limit", "81", **settings)
    command(monkeypatch, "stage", "--limit", "81", "--split", "80-20", **settings)
    run = h.open_run("paper", "80-20", 0, as_texts({**settings, "limit": 81}))
    layers = 12 * (12 * 768 ** 2 + 13 * 768)  # weights, biases and norms of twelve layers
    for name in ("camembert_title", "flaubert_title"):
        parameters = h.read_manifest(run, name)["metrics"]["parameters"]
        assert layers < parameters < layers + 2e6
    image = h.read_manifest(run, "seresnext")["metrics"]
    assert 25_510_896 <= image["parameters"] <= 25_566_219  # without its head, and with it
    assert image["weights_from"] == "random weights"
    ids = h.read_split(run)["product_id"]
    for symbol, representation in h.read_representations(run, ids).items():
        assert representation.shape == (81, 2048 if symbol == "P" else 768)
        assert representation.std(0).mean() > 0
    assert (h.read_stage(run, "fusion-concat-concat") / "model-0.safetensors").exists()


@pytest.mark.slow  # the catalogue and the checkpoints take half a minute
@pytest.mark.parametrize("settings, message", [
    ({"max_length": 65}, "reads at most 64 tokens; set max_length=64 or less"),
    ({"image_weights": "/nowhere/w.pth"}, "there is no file /nowhere/w.pth"),
    ({"limit": 20}, "limit=20 is too small for 27 classes"),
    ({}, r"1 of 300 pictures are absent, empty .*\.jpg")])
def test_what_would_stop_a_study_after_hours_stops_it_at_once(
        ens, small, tmp_path, monkeypatch, settings, message):
    isolate(monkeypatch, tmp_path, ens)
    run = h.open_run("paper", "90-10", 0, as_texts({
        **small, "seresnext": "small", "max_length": 64, "limit": 300, **settings}))
    if not settings:
        doctor.refuse_fatal(run)
        absent = chosen_products(run)["picture"].tolist()[:1]
        monkeypatch.setattr(inputs.catalogue, "absent_pictures", lambda rows: absent)
    with pytest.raises(ValueError, match=message):
        doctor.refuse_fatal(run)
