"""The table of encoders: each is built and tried, and the page says the same."""
import tomllib

import pytest
import torch

from commands import encoders
from conftest import ROOT

PAGE = ROOT / "docs" / "encoders.md"


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
