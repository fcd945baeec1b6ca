"""Product text stays text, in notebooks, on their pages and on the console; no file runs code."""
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from bs4 import BeautifulSoup

import helpers as h
from conftest import ROOT, SMALL, isolate, write_bert
from engine.image_models import read_weights
from engine.runs import runs_folder

HOSTILE = ["<script>document.title='taken'</script>", "<img src=x onerror=document.title='taken'>",
           "{{ 7 * 7 }} {% raw %}", "**gras** [lien](javascript:alert(1)) `code`",
           "$x^2$ et \\(y_1\\)", "\x1b[31mrouge\x1b[0m", "</pre></td><h1>gros</h1>",
           "&lt;script&gt;document.title='taken'&lt;/script&gt;"]


def spoil(folder) -> None:
    """Begin each text with one of these."""
    path = folder / "X_train_update.csv"
    table = pd.read_csv(path, index_col=0, keep_default_na=False, dtype=str)
    for column in ("designation", "description"):
        table[column] = [f"{HOSTILE[i % len(HOSTILE)]} {text}" if text else ""
                         for i, text in enumerate(table[column])]
    table.to_csv(path)


@pytest.mark.slow
def test_notebooks_and_their_pages_show_product_text_as_text(tiny_ens, tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path, tiny_ens)
    spoil(tiny_ens)
    settings = [f"--set={name}={value}" for name, value in SMALL.items()]
    ended = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "study", "--profile", "paper", "--split", "90-10",
         "--only", "01", "--only", "02", *settings], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "\x1b[31mrouge" not in ended.stdout
    pages = sorted(runs_folder().glob("paper/described/report*/90-10-seed0/0*.html"))
    assert [page.name[:2] for page in pages] == ["01", "02"]
    for page in pages:
        soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
        for kind in ("script", "h1"):
            assert not [found for found in soup.find_all(kind)
                        if "taken" in found.get_text() or "gros" in found.get_text()]
        assert not soup.find_all("img", src="x")
        assert not soup.find_all("a", href="javascript:alert(1)")
        assert not {"x2", "y1"} & {found.get_text() for found in soup.find_all("math")}
    shown = BeautifulSoup(pages[0].read_text(encoding="utf-8"), "html.parser").get_text()
    assert any(words[:20] in shown for words in HOSTILE[:5])


def test_cleaned_texts_hold_no_control_characters():
    text = "".join(map(chr, range(32))) + "mot\x7f\x1b[31mrouge\x9b" + "\x00fin"
    cleaned = h.clean_text(text, "light")
    assert cleaned.isprintable() and "mot" in cleaned and "rouge" in cleaned and "fin" in cleaned


# --- files ----------------------------------------------------------------------------------------
class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def bert(tmp_path):
    return write_bert(tmp_path / "bert", hidden_size=24, num_hidden_layers=1,
                      num_attention_heads=2, intermediate_size=24)


@pytest.mark.parametrize("weights", [lambda place: Touch(place),
                                     lambda place: {"conv1.weight": Touch(place)}])
def test_weights_that_are_a_program_are_not_run(tmp_path, bert, weights):
    content = pickle.dumps(weights(tmp_path / "ran"))
    for name in ("weights.pth", "weights.pt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="it is damaged, or holds more than tensors"):
            read_weights(tmp_path / name)
    (bert / "model.safetensors").unlink()
    (bert / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be loaded"):
        h.load_checkpoint(str(bert), 32)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [
    struct.pack("<Q", 2 ** 62) + b"{}", struct.pack("<Q", 10 ** 6) + b"{" * 1000, b"",
    struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,99999]}}  ',
    b"\x80\x04cos\nsystem\n."])
def test_safetensors_that_lie_about_their_size_are_refused(tmp_path, bert, content):
    for path in (tmp_path / "weights.safetensors", bert / "model.safetensors"):
        path.write_bytes(content)
    with pytest.raises(ValueError, match="it is damaged, or holds more than tensors"):
        read_weights(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="cannot be loaded"):
        h.load_checkpoint(str(bert), 32)


@pytest.mark.parametrize("content", [
    "[" * 100_000, "{}", '{"model": {"type": "WordPiece"}}', "\0", '{"version": "1.0"}'])
def test_tokenizers_that_are_none_are_refused(bert, content):
    (bert / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="cannot be loaded"):
        h.load_checkpoint(str(bert), 32)
