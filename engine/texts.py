"""HTML out of texts, words, lower case; many texts in several processes."""
from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from functools import partial

import joblib
import nltk
from selectolax.lexbor import LexborHTMLParser

from engine.progress import Progress

# No sentences, so that NLTK needs no download.
split_words = partial(nltk.word_tokenize, language="french", preserve_line=True)
MANY_TEXTS = 10_000  # from here on processes save more time than their start takes


def strip_html(text: str) -> str:
    """Plain text: entities decoded, each tag a space, runs of white space one space. Shown in 02.
    """
    text = html.unescape(text)
    if "<" in text:
        page = LexborHTMLParser(text.replace("&", "&amp;"))  # so that it decodes nothing again
        page.strip_tags(["script", "style"])
        text = page.root.text(separator=" ") if page.root else ""
    return " ".join(text.split())


def clean_text(text: str, how: str = "paper") -> str:
    """A title or description as the encoders read it (paper, section IV.A).

    "paper": HTML removed, split by NLTK's word tokenizer, lower-case. "light": HTML removed.
    Shown in 02.
    """
    text = strip_html(text)
    if how == "light":
        return text
    return " ".join(split_words(text)).lower()


def clean_texts(texts: Sequence[str], how: str, label: str) -> list[str]:
    """`clean_text` of each text, shown as progress; in one process for each CPU if they are many.
    """
    bar = Progress(label, len(texts), "texts")
    found = list(bar.track(_map(partial(clean_text, how=how), texts)))
    bar.close()
    return found


def _map(function: partial, texts: Sequence[str]) -> Iterator[str]:
    if len(texts) < MANY_TEXTS:
        yield from map(function, texts)
        return
    share = len(texts) // (8 * joblib.cpu_count()) + 1  # of one message
    work = joblib.Parallel(joblib.cpu_count(), return_as="generator", batch_size=share,
                           pre_dispatch="all")
    yield from work(joblib.delayed(function)(text) for text in texts)
    joblib.externals.loky.get_reusable_executor().shutdown()  # they would wait, and keep memory
