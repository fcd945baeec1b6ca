"""Duplicates: by text, by picture, through others; what must not be taken for one."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import helpers as h
from engine import duplicates
from engine.duplicates import NEAR_SIGNS, duplicate_groups, near_pairs, picture_signs, text_key
from engine.rows import chosen_products
from engine.runs import cache_folder

LONG = "Housse de coussin en velours doux pour le salon, {} cm, lavable en machine"


@pytest.mark.parametrize("a, b", [
    ("Table basse", "TABLE  basse !"),
    ("L\u2019été à Kerlouan", "l'ete a kerlouan"),
    ("<p>Été</p>", "&Eacute;t&eacute;"),
    ("Lot 3x pièces", "lot 3x PIECES"),
    ("oeuf \ufb01n", "oeuf fin"),
    (LONG.format("40 x 40"), LONG.format("60 x 60")),
])
def test_texts_that_are_duplicates(a, b):
    assert text_key(a) == text_key(b) != ""


@pytest.mark.parametrize("a, b", [
    ("Tome 3", "Tome 4"),
    ("1984", "2001"),
    ("Ours blanc", "Ours brun"),
    ("bleu vert", "vert bleu"),
    (LONG.format("40"), LONG.format("40").replace("velours", "lin")),
])
def test_texts_that_are_not(a, b):
    assert text_key(a) != text_key(b)


@pytest.mark.parametrize("text", ["", "   ", "<br/>", "!!! - ???", "&nbsp;"])
def test_text_without_a_word_has_no_key(text):
    assert text_key(text) == ""


# --- pictures -------------------------------------------------------------------------------------
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
    changes = [lambda p: p,
               lambda p: p.resize((120, 120)),
               lambda p: Image.eval(p, lambda v: v * 0.9)]
    paths = [saved(change(photograph(seed)), tmp_path / f"{seed}-{i}.jpg", 90 - 20 * i)
             for seed in range(12) for i, change in enumerate(changes)]
    pairs = near_pairs(np.stack([picture_signs(path) for path in paths]), rows=5)
    own = {(3 * k + i, 3 * k + j) for k in range(12) for i, j in ((0, 1), (0, 2), (1, 2))}
    assert {(a, b) for a, b in pairs.tolist()} == own


def test_plain_pictures_are_near_nothing(tmp_path):
    rng, signs = np.random.default_rng(0), []
    for i, level in enumerate((255, 255, 0, 128)):
        pixels = np.clip(level + rng.normal(0, 2, (90, 90)), 0, 255).astype(np.uint8)
        signs.append(picture_signs(saved(Image.fromarray(pixels), tmp_path / f"{i}.jpg")))
    assert (np.stack(signs) == 0).all() and len(near_pairs(np.stack(signs))) == 0


def test_near_pairs_equal_a_loop_at_the_threshold():
    rng = np.random.default_rng(1)
    signs = np.repeat(rng.choice([-1, 1], (20, 256)), 3, axis=0).astype(np.int8)
    for row, flips in zip(signs, np.tile([0, NEAR_SIGNS, NEAR_SIGNS + 1], 20)):
        row[rng.choice(256, flips, replace=False)] *= -1
    expected = [[i, j] for i in range(60) for j in range(i + 1, 60)
                if (signs[i] != signs[j]).sum() <= NEAR_SIGNS]
    assert sorted(near_pairs(signs, rows=7).tolist()) == expected and len(expected) >= 20


def test_unreadable_picture_is_named(tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    for path in (tmp_path / "torn.jpg", tmp_path / "missing.jpg"):
        with pytest.raises(ValueError, match=f"{path.name} cannot be read"):
            picture_signs(path)


# --- groups ---------------------------------------------------------------------------------------
def members(groups: np.ndarray) -> list[list[int]]:
    """The rows of each group, in the order of their first rows."""
    return [np.flatnonzero(groups == group).tolist() for group in dict.fromkeys(groups)]


def test_groups_as_worked_by_hand():
    """0-1 share a title, 1-2 a description, 3-4 a picture; 5 and 6 share only emptiness; 7 stands
    alone.
    """
    products = pd.DataFrame({
        "title": ["Ours", "OURS", "Chat", "Banc", "Lit", "", "", "Vase"],
        "description": ["a", "en bois", "<b>En bois</b>", "b", "c", "", "", "d"]})
    signs = np.random.default_rng(0).choice([-1, 1], (8, 256)).astype(np.int8)
    signs[4] = signs[3]
    signs[5:7] = 0
    assert members(duplicate_groups(products, signs)) == [[0, 1, 2], [3, 4], [5], [6], [7]]


def test_groups_are_those_of_the_runs_rows_in_order_of_product_id(make_run):
    run = make_run(grouped=True)
    products = chosen_products(run)
    signs = np.stack([picture_signs(path) for path in products["picture"]])
    found = h.chosen_groups(run)
    assert members(found) == members(duplicate_groups(products, signs))
    assert len(found) == len(products) == 55
    assert h.chosen_groups(make_run()) is None


def test_groups_are_made_once_and_follow_the_pictures(make_run, monkeypatch):
    run, rest = make_run(grouped=True), make_run(grouped=True, limit=50)
    first = h.chosen_groups(run)
    made = []

    def counted(products: pd.DataFrame) -> np.ndarray:
        made.append(len(products))
        return np.zeros((len(products), 256), np.int8)

    monkeypatch.setattr(duplicates, "all_signs", counted)
    other = make_run(grouped=True, split="80-20", seed=3)
    assert (h.chosen_groups(run) == first).all() and (h.chosen_groups(other) == first).all()
    assert made == []
    h.chosen_groups(rest)
    assert made == [50]
    picture = chosen_products(run)["picture"][3]
    saved(photograph(1), Path(picture))
    h.chosen_groups(run)
    assert made == [50, 55]


def test_failure_leaves_no_cache_behind(make_run):
    run = make_run(grouped=True)
    Path(chosen_products(run)["picture"][40]).write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        h.chosen_groups(run)
    assert list(cache_folder().glob("groups-*")) == []


def test_numbers_count_in_texts_of_fewer_than_eight_words():
    assert duplicates.text_key("le beau tome numéro 3") != duplicates.text_key(
        "le beau tome numéro 4")
    seven, eight = ("un deux trois quatre cinq six sept", "un deux trois quatre cinq six sept huit")
    assert duplicates.text_key(f"{seven} 3") != duplicates.text_key(f"{seven} 4")
    assert duplicates.text_key(f"{eight} 3") == duplicates.text_key(f"{eight} 4")


def test_half_of_a_pictures_signs_are_above_their_median(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    assert (duplicates.picture_signs(tmp_path / "noise.png") > 0).sum() == 128


def test_near_pictures_are_linked_and_others_not():
    signs = np.where(np.random.default_rng(0).random((3, 256)) < 0.5, 1, -1).astype(np.int8)
    signs[1] = signs[0]
    signs[1, :16] *= -1  # 16 signs differ: near
    titles = {"title": ["un livre", "une table", "une lampe"], "description": ["", "", ""]}
    groups = duplicates.duplicate_groups(pd.DataFrame(titles), signs)
    assert groups[0] == groups[1] != groups[2]
