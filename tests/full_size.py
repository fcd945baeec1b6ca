"""Tables of Rakuten's size and shape without a word of Rakuten's: what loading, cleaning and
splitting are measured on.

Real: the number of rows, the 27 codes and their row counts, with and without a description.
Invented: the words, drawn from a made-up vocabulary as frequently as words are (Zipf's law), in
texts of realistic length, some with HTML.
"""
import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from engine.catalogue import CLASSES, LAYOUTS

VOCABULARY = 60_000
TITLE = (11, 0.45, 56)          # words: median, spread of the logarithm, maximum
DESCRIPTION = (62, 0.95, 2068)
SYLLABLES = ("ba", "ché", "cro", "del", "é", "fan", "gui", "ja", "li", "lou", "mai", "né", "or",
             "pla", "qui", "ri", "sou", "ta", "ver", "vi")
FORMS = ("l'{}", "<p>{}</p>", "{}<br />", "<b>{}</b>", "{} &amp;", "&eacute;{}", "({})", "{} 20 cm")
DRESS = np.array(["{}"] * 20 + ["{},"] * 3 + ["{}."] * 3 + list(FORMS))


def write_tables(folder: Path, rows: int | None = None, seed: int = 0) -> Path:
    """Both tables in ENS layout, 84,916 rows or a draw of `rows` of them; no pictures. Returns
    `folder`.
    """
    rng, classes = np.random.default_rng(seed), pd.read_csv(CLASSES)
    codes = np.repeat(classes["prdtypecode"].to_numpy(), classes["train_rows"])
    counts = zip(classes["train_rows"], classes["rows_with_description"])
    described = np.concatenate([np.arange(total) < with_one for total, with_one in counts])
    order = rng.permutation(len(codes))[:rows]
    words = vocabulary(rng)
    descriptions = texts(rng, words, len(order), DESCRIPTION, dressed=True)
    kept = [text if has_one else "" for text, has_one in zip(descriptions, described[order])]
    table = pd.DataFrame({
        "designation": texts(rng, words, len(order), TITLE, dressed=False),
        "description": kept,
        "productid": rng.permutation(4_000_000)[:len(order)],
        "imageid": rng.permutation(10**7)[:len(order)]})
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / LAYOUTS["ENS"]["x"])
    pd.DataFrame({"prdtypecode": codes[order]}).to_csv(folder / LAYOUTS["ENS"]["y"])
    return folder


def column(rows: int, shape: tuple, dressed: bool, seed: int = 0) -> list[str]:
    """One column of `rows` texts, none of them empty."""
    rng = np.random.default_rng(seed)
    return texts(rng, vocabulary(rng), rows, shape, dressed)


def vocabulary(rng: np.random.Generator) -> np.ndarray:
    """Different made-up words, of one to four syllables; the frequent ones come first and are the
    short ones.
    """
    words = []
    for syllables in range(1, 5):
        every = map("".join, itertools.product(SYLLABLES, repeat=syllables))
        words += rng.permutation(list(every)).tolist()
    return np.array(words[:VOCABULARY], dtype=object)


def texts(rng: np.random.Generator, words: np.ndarray, n: int, shape: tuple,
          dressed: bool) -> list[str]:
    """`n` texts of a log-normal number of words; dressed ones carry punctuation, tags and
    entities.
    """
    median, spread, most = shape
    lengths = np.clip(rng.lognormal(np.log(median), spread, n), 1, most).astype(int)
    ends, frequent = lengths.cumsum(), 1 / np.arange(1, len(words) + 1)
    drawn = rng.choice(words, ends[-1], p=frequent / frequent.sum())
    if dressed:
        forms = rng.choice(DRESS, len(drawn))
        drawn = [form.format(word) for form, word in zip(forms, drawn)]
    return [" ".join(drawn[end - length:end]).capitalize() for end, length in zip(ends, lengths)]
