"""Several processes: one stage made by two together, and several stages side by side, come out as made by one."""
import os
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import torch
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizer

import helpers as h
from conftest import ROOT, SMALL, tiny_products

RUN = [sys.executable, str(ROOT / "run.py")]


def bert_folder(folder):
    """A small BERT without dropout: what is random in it would differ between processes."""
    words = sorted({word for title in tiny_products()["title"] for word in title.lower().split()})
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"))
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=64, max_position_embeddings=64, hidden_dropout_prob=0.0,
                         attention_probs_dropout_prob=0.0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prepared(make_run, tmp_path):
    """prepared(**settings): a run on a local checkpoint, whose text is there."""
    def prepare(**settings):
        run = make_run(**{"camembert": str(bert_folder(tmp_path / "bert")), "text_dropout": 0.0, "text_epochs": 3,
                          "text_batch": 8, **settings})
        h.split_stage(run)
        h.text_stage(run)
        return run
    return prepare


def made(run, name="camembert_title"):
    folder = h.read_stage(run, name)
    ids = h.read_split(run)["product_id"]
    return (h.load_tensors(folder / "features.safetensors", ids)["features"], pd.read_csv(folder / "curve.csv"),
            h.read_manifest(run, name))


def test_two_processes_make_the_stage_that_one_makes(prepared, monkeypatch, tmp_path):
    run = prepared(processes=2)
    h.text_encoder_stage(run, "camembert", "title")
    together, curve, manifest = made(run)
    assert manifest["processes"] == 2 and not list(run.folder.glob("*.partial"))

    alone = h.Run(h.dataclasses.replace(run.profile, processes=1), run.split, run.seed)
    assert h.text_encoder_stage(alone, "camembert", "title") == run.folder / "camembert_title"
    assert h.read_manifest(run, "camembert_title") == manifest  # the number of processes does not make it stale
    monkeypatch.setenv("STUDY_RUNS", str(tmp_path / "alone"))
    h.split_stage(alone)
    h.text_stage(alone)
    h.text_encoder_stage(alone, "camembert", "title")
    features, one_curve, one = made(alone)
    assert one["processes"] == 1 and one["key"] == manifest["key"]
    assert_frame_equal(curve, one_curve, rtol=0, atol=1e-4)
    assert torch.allclose(together, features, atol=1e-4) and features.std() > 0.1
