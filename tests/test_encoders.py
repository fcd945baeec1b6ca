"""The table of encoders: each is built and tried, and the page says the same."""
import tomllib

import pytest
import torch
from transformers import (
    BertTokenizer,
    DebertaV2Config,
    DebertaV2Model,
    ModernBertConfig,
    ModernBertModel,
)

import helpers as h
from commands import costs, encoders
from conftest import ROOT, SMALL, isolate, write_bert
from engine.settings import PROFILES, TEXT_ENCODERS, TEXT_STAGES

PAGE = ROOT / "docs" / "encoders.md"
SIZE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48}


@pytest.fixture(scope="module")
def rows():
    return list(encoders.encoder_rows())


@pytest.mark.slow
def test_each_encoder_of_the_list_works(rows):
    assert [row["state"] for row in rows] == ["ok"] * len(rows)
    assert {row["slot"] for row in rows} == {"text", "image"} and len(rows) > 12


@pytest.mark.slow
def test_the_page_holds_what_was_tried(rows):
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines()
             if line.startswith("| `")]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    found = [[row["name"], row["width"], row["parameters"], row["reads"], row["setting"]]
             for row in rows]
    assert [each[:5] for each in cells] == found


def modern_checkpoint(folder, model) -> str:
    """A folder with a small model of one of the profile's families, and a tokenizer for it."""
    write_bert(folder, **SIZE)
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_the_modern_profile_runs_with_small_encoders_of_its_families(tmp_path, tiny_ens,
                                                                     monkeypatch):
    isolate(monkeypatch, tmp_path, tiny_ens)
    words = len(BertTokenizer.from_pretrained(write_bert(tmp_path / "words", **SIZE)))
    modern = ModernBertModel(ModernBertConfig(vocab_size=words, pad_token_id=0, **SIZE))
    deberta = DebertaV2Model(DebertaV2Config(vocab_size=words, relative_attention=True,
                                             pos_att_type=["p2c", "c2p"], **SIZE))
    small = {name: SMALL[name] for name in ("text_epochs", "image_epochs", "image_size",
                                            "fusion_epochs", "bootstrap", "max_length")}
    run = h.open_run("modern", "80-20", 0, {
        **small, "camembert": modern_checkpoint(tmp_path / "modern", modern), "fusion_seeds": 2,
        "flaubert": modern_checkpoint(tmp_path / "deberta", deberta), "image_weights": "none",
        "seresnext": "timm/test_convnext"})
    stages = ("splits", "text", *TEXT_STAGES, "seresnext", "image_regions", "fusion-concat-add")
    for name in stages:
        h.stage(run, name)
    parts = h.read_split(run)["part"]
    assert len(parts) == 60  # those without a description too
    x = h.read_representations(run, h.read_split(run)["product_id"])
    assert {rows.shape[1] for symbol, rows in x.items() if symbol != "P"} == {24}
    assert h.read_manifest(run, "fusion-concat-add")["metrics"]["seeds"] == 2


def test_the_modern_profile_names_encoders_of_the_list():
    profile, known = PROFILES["modern"], encoders.read_encoders()
    assert {profile.camembert, profile.flaubert} <= {entry["name"] for entry in known["text"]}
    assert profile.seresnext in {entry["name"] for entry in known["image"]}
    sizes = [costs.text_network(profile, name, 64).parameters for name in TEXT_ENCODERS]
    assert [round(size / 1e6) for size in sizes] == [135, 111]


class Twice(torch.nn.Module):
    """An encoder that forgets the mask, and so reads padding."""

    def forward(self, input_ids, attention_mask):
        return input_ids.float().sum(1, keepdim=True)


def test_an_encoder_that_reads_padding_or_has_another_width_is_refused():
    with pytest.raises(ValueError, match="padding is read"):
        encoders.check_vectors(Twice(), 1)
    with pytest.raises(ValueError, match=r"give \[2, 1\] numbers instead of \[2, 8\]"):
        encoders.check_vectors(Twice(), 8)


def test_what_does_not_work_is_a_row_with_its_reason(monkeypatch, tmp_path):
    known = tomllib.loads((ROOT / "data" / "encoders.toml").read_text())
    assert len({entry["name"] for entries in known.values() for entry in entries}) == sum(
        map(len, known.values()))
    wrong = tmp_path / "encoders.toml"
    wrong.write_text('[[text]]\nname = "a/gpt2"\ntype = "gpt2"\npooling = "first"\nlongest = 9\n'
                     'config = { n_embd = 8, n_layer = 2, n_head = 2, vocab_size = 50 }\n'
                     '[[image]]\nname = "timm/resnet1"\n')
    monkeypatch.setattr(encoders, "FILE", wrong)
    text, image = encoders.encoder_rows()
    assert "set pooling=last" in text["state"] and "unknown image encoder" in image["state"]
