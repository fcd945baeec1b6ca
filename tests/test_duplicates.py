"""Duplicates: by text, by picture, through others; what must not be taken for one."""
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import helpers as h

LONG = "Housse de coussin en velours doux pour le salon, {} cm, lavable en machine"


@pytest.mark.parametrize("a, b", [
    ("Table basse", "TABLE  basse !"),
    ("L\u2019été à Kerlouan", "l'ete a kerlouan"), ("<p>Été</p>", "&Eacute;t&eacute;"),
    ("Lot 3x pièces", "lot 3x PIECES"), ("oeuf \ufb01n", "oeuf fin"), (LONG.format("40 x 40"), LONG.format("60 x 60"))])
def test_texts_that_are_duplicates(a, b):
    assert h.text_key(a) == h.text_key(b) != ""


@pytest.mark.parametrize("a, b", [
    ("Tome 3", "Tome 4"), ("1984", "2001"), ("Ours blanc", "Ours brun"), ("bleu vert", "vert bleu"),
    (LONG.format("40"), LONG.format("40").replace("velours", "lin"))])
def test_texts_that_are_not(a, b):
    assert h.text_key(a) != h.text_key(b)


@pytest.mark.parametrize("text", ["", "   ", "<br/>", "!!! - ???", "&nbsp;"])
def test_text_without_a_word_has_no_key(text):
    assert h.text_key(text) == ""


# --- pictures -----------------------------------------------------------------------------------------
def photograph(seed: int) -> Image.Image:
    """A smooth random picture of 240 x 240 pixels with a white border."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    picture = Image.new("RGB", (240, 240), "white")
    picture.paste(Image.fromarray(noise).resize((200, 200), Image.Resampling.BICUBIC), (20, 20))
    return picture


def saved(picture: Image.Image, path: Path, quality: int = 90) -> Path:
    picture.save(path, quality=quality)
    return path


def test_picture_saved_again_is_near_and_others_are_not(tmp_path):
    changes = [lambda p: p, lambda p: p.resize((120, 120)), lambda p: Image.eval(p, lambda v: v * 0.9)]
    paths = [saved(change(photograph(seed)), tmp_path / f"{seed}-{i}.jpg", 90 - 20 * i)
             for seed in range(12) for i, change in enumerate(changes)]
    pairs = h.near_pairs(np.stack([h.picture_signs(path) for path in paths]), rows=5)
    assert {(a, b) for a, b in pairs.tolist()} == {
        (3 * k + i, 3 * k + j) for k in range(12) for i in range(3) for j in range(i + 1, 3)}


def test_plain_pictures_are_near_nothing(tmp_path):
    rng = np.random.default_rng(0)
    plain = [Image.fromarray(np.clip(level + rng.normal(0, 2, (90, 90)), 0, 255).astype(np.uint8))
             for level in (255, 255, 0, 128)]
    signs = np.stack([h.picture_signs(saved(picture, tmp_path / f"{i}.jpg")) for i, picture in enumerate(plain)])
    assert (signs == 0).all() and len(h.near_pairs(signs)) == 0


def test_near_pairs_equal_a_loop_at_the_threshold():
    rng = np.random.default_rng(1)
    signs = np.repeat(rng.choice([-1, 1], (20, 256)), 3, axis=0).astype(np.int8)
    for row, flips in zip(signs, np.tile([0, h.NEAR_SIGNS, h.NEAR_SIGNS + 1], 20)):
        row[rng.choice(256, flips, replace=False)] *= -1
    expected = [[i, j] for i in range(60) for j in range(i + 1, 60) if (signs[i] != signs[j]).sum() <= h.NEAR_SIGNS]
    assert sorted(h.near_pairs(signs, rows=7).tolist()) == expected and len(expected) >= 20


def test_unreadable_picture_is_named(tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    for path in (tmp_path / "torn.jpg", tmp_path / "missing.jpg"):
        with pytest.raises(ValueError, match=f"{path.name} cannot be read"):
            h.picture_signs(path)


# --- groups -------------------------------------------------------------------------------------------
def test_groups_as_worked_by_hand():
    """0-1 share a title, 1-2 a description, 3-4 a picture; 5 and 6 share only emptiness; 7 stands alone."""
    products = pd.DataFrame({"title": ["Ours", "OURS", "Chat", "Banc", "Lit", "", "", "Vase"],
                             "description": ["a", "en bois", "<b>En bois</b>", "b", "c", "", "", "d"]})
    signs = np.random.default_rng(0).choice([-1, 1], (8, 256)).astype(np.int8)
    signs[4] = signs[3]
    signs[5:7] = 0
    groups = h.duplicate_groups(products, signs)
    assert [np.flatnonzero(groups == group).tolist() for group in dict.fromkeys(groups)] == [[0, 1, 2], [3, 4], [5],
                                                                                             [6], [7]]


def test_signs_are_made_once_and_follow_the_pictures(run, tiny_ens, monkeypatch):
    products = h.load_catalogue(tiny_ens)
    first = h.cached_signs(tiny_ens, products)
    assert (first == np.stack([h.picture_signs(path) for path in products["picture"]])).all()
    monkeypatch.setattr(Image, "open", lambda path: pytest.fail("decoded again"))
    order = products.sample(frac=1, random_state=0)
    assert (h.cached_signs(tiny_ens, order) == first[order.index]).all()
    monkeypatch.undo()


def test_failure_leaves_no_cache_behind(run, tiny_ens):
    products = h.load_catalogue(tiny_ens)
    Path(products["picture"][40]).write_bytes(io.BytesIO().getvalue())
    with pytest.raises(ValueError, match="cannot be read"):
        h.cached_signs(tiny_ens, products)
    assert list((h.ROOT / "data" / "cache").iterdir()) == []
