"""Product text stays text, in notebooks, on their pages and on the console; no file runs code."""
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import helpers as h
from browsing import browsing, complaints, dead_links
from commands.importing import Columns, import_catalogue
from commands.plan import stage_names
from commands.site import report_folder
from conftest import ROOT, SMALL, isolate, write_bert
from engine.image_models import read_weights
from own_catalogue import KINDS, make_products

HOSTILE = ["<script>document.title='taken'</script>", "<img src=x onerror=document.title='taken'>",
           "{{ 7 * 7 }} {% raw %}", "**gras** [lien](javascript:alert(1)) `code`",
           "$x^2$ et \\(y_1\\)", "\x1b[31mrouge\x1b[0m", "</pre></td><h1>gros</h1>",
           "&lt;script&gt;document.title='taken'&lt;/script&gt;"]


FORBIDDEN = ("h1:has-text('gros')", "img[src=x]", "a[href^=javascript]",
             "strong:has-text('gras')", "math:text-is('x2')", "math:text-is('y1')")
NOTEBOOKS = ("01", "02", "03", "05", "08", "09", "11")  # those that show products


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """(run, words of its command) of a catalogue whose titles, descriptions and class names begin
    with one of these; all stages are made.
    """
    place = tmp_path_factory.mktemp("taken")
    table = make_products(place / "shop", 280)
    for column in ("name", "details"):
        texts = enumerate(table[column])
        table[column] = [f"{HOSTILE[i % len(HOSTILE)]} {text}" for i, text in texts]
    names = dict(zip(KINDS, filter(str.isprintable, HOSTILE)))  # a class's name has to be
    table["category"] = [f"{names[kind]} {kind}" for kind in table["category"]]
    table.to_csv(place / "shop" / "products.csv", index=False)
    import_catalogue(place / "shop" / "products.csv", place / "own",
                     Columns("name", "category", "details", "photo"))
    settings = {**SMALL, "fusion_seeds": 1, "as_released": False, "rows": "all",
                "image_size": 32, "region_size": 32, "grid": 8, "data": str(place / "own")}
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, place, place)
        run = h.open_run("sample", "90-10", 0, settings)
        for name in (*stage_names(run), "scores", "claims"):
            h.stage(run, name)
        yield run, ["--split", "90-10", *(f"--set={name}={settings[name]}" for name in settings)]


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "run.py"), *words], capture_output=True,
                          text=True, env={**os.environ, "STUDY_CORES": "1"})


@pytest.mark.slow
def test_notebooks_and_their_pages_show_product_text_as_text(taken):
    """In a browser: no script of a product runs, and none of its tags is one."""
    run, words = taken
    ended = command("study", *words, *(f"--only={number}" for number in NOTEBOOKS))
    assert ended.returncode == 0, ended.stderr
    assert "\x1b[31mrouge" not in ended.stdout
    folder = report_folder(run)
    pages = sorted(folder.glob("90-10-seed0/[01]*.html"))
    assert tuple(page.name[:2] for page in pages) == NOTEBOOKS
    assert not (folder / "warnings.txt").exists()
    shown = ""
    with browsing(1280) as browser:
        for path in [folder / "index.html", *pages]:
            assert complaints(browser, path, folder) == [], path
            assert dead_links(browser, folder) == [], path
            assert browser.title() != "taken", path
            shown += browser.evaluate("() => document.body.innerText")
            for forbidden in FORBIDDEN:
                assert browser.locator(forbidden).count() == 0, (path, forbidden)
    for name in h.load_classes(run)["name_en"]:
        assert name in shown


@pytest.mark.slow
def test_a_terminal_is_not_steered_by_products(taken, tmp_path):
    """By no text, and by no picture's name, of a catalogue or of products to predict."""
    _, words = taken
    table = tmp_path / "products.csv"
    pd.DataFrame({"title": HOSTILE, "picture": "\x1b[31mrouge\x9b.jpg"}).to_csv(table, index=False)
    for ended in (command("doctor", *words), command("predict", str(table), *words),
                  command("predict", str(table), "--to", str(tmp_path / "\x1b[31m" / "x"), *words)):
        said = ended.stdout + ended.stderr
        assert said and "Traceback" not in said
        assert all(char.isprintable() or char == "\n" for char in said), said


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
    content = pickle.dumps(weights(tmp_path / "ran"), protocol=2)
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
