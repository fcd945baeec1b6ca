"""Near duplicates as groups: by text, by picture, through others."""
from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.fft
from PIL import Image
from safetensors.numpy import load_file, save_file
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from engine import fingerprint
from engine.files import cache_file, hash_json
from engine.fingerprint import content
from engine.pictures import as_rgb, open_picture
from engine.progress import Progress, in_threads
from engine.rows import chosen_products, pictures_digest, texts_digest
from engine.runs import Run
from engine.settings import FIELDS
from engine.texts import strip_html

SAME_WORDS = 8     # a text of so many words is a copy of one that differs in its numbers alone
HASH_SIDE = 16     # 16 x 16 = 256 signs describe a picture
NEAR_SIGNS = 16    # pictures that differ in so many signs, or fewer, are near duplicates
PLAIN_PICTURE = 4  # grey levels: a picture that deviates less from its mean shows nothing


def text_key(text: str) -> str:
    """What near-duplicate texts share: their words, without HTML, case, accents and punctuation.

    Numbers are left out of texts of at least SAME_WORDS other words, where they are a price, a
    size or a reference in the same seller's sentence. In shorter ones they count: "volume 3" is
    not "volume 4". "" if there is no word.
    """
    letters = unicodedata.normalize("NFKD", strip_html(text).casefold())
    letters = "".join(letter for letter in letters if not unicodedata.combining(letter))
    words = re.findall(r"[^\W\d_]+", letters)
    if len(words) < SAME_WORDS:
        words = re.findall(r"[^\W_]+", letters)
    return " ".join(words)


def picture_signs(path: str | Path) -> np.ndarray:
    """A perceptual hash, int8 [256] of 1 and -1: which low frequencies of the grey picture are
    above their median.

    All 0 for a plain picture, such as a white placeholder: its signs would be noise.
    """
    side = 4 * HASH_SIDE
    with open_picture(path) as picture:
        picture.draft("L", (side, side))  # a JPEG is decoded at a part of its size
        small = as_rgb(picture).convert("L").resize((side, side), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.float32)
    if grey.std() < PLAIN_PICTURE:
        return np.zeros(HASH_SIDE ** 2, dtype=np.int8)
    low = scipy.fft.dctn(grey, norm="ortho")[:HASH_SIDE, :HASH_SIDE].ravel()
    return np.where(low > np.median(low), 1, -1).astype(np.int8)


def near_pairs(signs: np.ndarray, rows: int = 512) -> np.ndarray:
    """Pairs of rows [K, 2], the earlier first, that differ in at most NEAR_SIGNS signs.

    A row of zeros is near none. All pairs are compared, as matrix products of `rows` rows: about
    half a minute for 85,000 pictures on 2 cores.
    """
    signs, near = signs.astype(np.float32), []
    for start in range(0, len(signs), rows):
        # 256 - 2 x the number of differing signs
        alike = signs[start:start + rows] @ signs[start:].T
        near.append(np.argwhere(alike >= signs.shape[1] - 2 * NEAR_SIGNS) + start)
    pairs = np.concatenate(near)
    return pairs[pairs[:, 0] < pairs[:, 1]]


def duplicate_groups(products: pd.DataFrame, signs: np.ndarray) -> np.ndarray:
    """A group number [N] for each product; linked ones share it, directly or through others.

    Two products are linked by the same title or the same description (`text_key`; empty texts
    link nothing) or by the same or nearly the same picture (`near_pairs`).
    """
    # Equal pictures are linked to the first of them, so that many copies of one do not make a pair
    # of each two.
    distinct, firsts, which = np.unique(signs, axis=0, return_index=True, return_inverse=True)
    copies = np.column_stack([firsts[which], np.arange(len(which))])[signs.any(1)]
    links = [copies, firsts[near_pairs(distinct)]]
    for field in FIELDS:
        keys = products[field].map(text_key).to_numpy()
        rows = pd.Series(np.flatnonzero(keys != ""))
        links.append(np.column_stack([rows.groupby(keys[rows]).transform("first"), rows]))
    first, second = np.concatenate(links).T
    edges = np.ones(len(first), dtype=bool)
    graph = coo_array((edges, (first, second)), shape=(len(products), len(products)))
    return connected_components(graph, directed=False)[1]


def all_signs(products: pd.DataFrame) -> np.ndarray:
    """`picture_signs` [N, 256] of products, shown as progress."""
    bar = Progress("comparing pictures", len(products), "pictures")
    try:
        return np.stack(list(bar.track(in_threads(picture_signs, products["picture"]))))
    finally:
        bar.close()


def _groups_digest(run: Run) -> str:
    groups = chosen_groups(run)
    return "" if groups is None else hash_json(groups.tolist())


@content(_groups_digest)
def chosen_groups(run: Run) -> np.ndarray | None:
    """The group number [N] of each of the run's rows, in order of product id; None where the
    setting `grouped` is off. Made once, and kept in the cache.
    """
    if not run.profile.grouped:
        return None

    def write(path: Path) -> None:
        products = chosen_products(run)
        save_file({"groups": duplicate_groups(products, all_signs(products))}, path)

    code = [fingerprint.code_of(function).hash for function in (duplicate_groups, picture_signs)]
    name = hash_json([code, texts_digest(run), pictures_digest(run)])[:16]
    return load_file(cache_file(f"groups-{name}.safetensors", write))["groups"]
