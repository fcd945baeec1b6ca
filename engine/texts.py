"""HTML out of texts, words, lower case; many texts in several processes."""
from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from functools import partial

import joblib
import nltk

from engine.progress import Progress

# No sentences, so that NLTK needs no download.
split_words = partial(nltk.word_tokenize, language="french", preserve_line=True)
MANY_TEXTS = 10_000  # from here on processes save more time than their start takes


# --- HTML out ------------------------------------------------------------------------------------
ELEMENTS = r"""
    a|abbr|acronym|address|area|article|aside|audio|b|base|basefont|bdi|bdo|big|blink|blockquote|
    body|br|button|canvas|caption|center|cite|code|col|colgroup|data|datalist|dd|del|details|dfn|
    dialog|dir|div|dl|dt|em|embed|fieldset|figcaption|figure|font|footer|form|frame|frameset|h1|h2|
    h3|h4|h5|h6|head|header|hgroup|hr|html|i|iframe|img|input|ins|kbd|label|legend|li|link|main|
    map|mark|marquee|menu|meta|meter|nav|nobr|noframes|noscript|object|ol|optgroup|option|output|p|
    param|picture|pre|progress|q|rp|rt|ruby|s|samp|script|section|select|small|source|span|strike|
    strong|style|sub|summary|sup|svg|table|tbody|td|template|textarea|tfoot|th|thead|time|title|tr|
    track|tt|u|ul|var|video|wbr|(?:o|v|w|m|x|st1):\w+"""
# A `<` that begins none of these is text, as in "poids<lourd", "<NEUF>", "<vis L=40 mm>" or an
# unfinished tag. No part of the pattern passes the next `<`, or is tried twice: the time is linear.
TAG = re.compile(rf"""
      </? (?: {ELEMENTS} )                                      # <br>, </p>, <o:p>
          (?: \s+ (?: nowrap|noshade|compact|checked|selected|disabled|controls ) )*+
          \s*+ /?+ \s*+ >
    | < (?: (?: {ELEMENTS} ) [\s/]++ [\w:-]++ \s*+ =             # <a href=...>
          | [a-z][\w:-]*+ [\s/]++ [\w:-]++ \s*+ = (?=\s*+["']) ) # <x-font size="2">
          (?: \s*+ (?: "[^"<]*+" | '[^'<]*+' | [^\s<>"']*+ ) [^<>"'=]*+ =?+ )*+ [^<>]*+ >
    | <!doctype [^<>]*+ > | <\?\w [^<>]*+ > | <!-- """, re.VERBOSE | re.IGNORECASE)
# What a browser does not show. Where the end is missing, what follows is shown.
HIDDEN = [(re.compile("<!--"), re.compile("-->")),
          (re.compile(r"<(?:script|style)\b[^<>]*>", re.IGNORECASE),
           re.compile(r"</(?:script|style)\s*>", re.IGNORECASE))]
# Control characters: the 32 of C1 as Windows meant them (\x92 is an apostrophe), others as blanks.
WINDOWS = dict.fromkeys([*range(9), *range(14, 32), 127], " ") | {
    code: bytes([code]).decode("cp1252", "ignore") or " " for code in range(0x80, 0xA0)}
DECODINGS = 8  # "&amp;amp;eacute;" takes two; a text that needs more is no text


def decode_entities(text: str) -> str:
    """Entities as the characters that they mean, those written twice too. Shown in 02."""
    text = re.sub("&(?:amp;)+", "&amp;", text)
    for _ in range(DECODINGS):
        text, before = html.unescape(text), text
        if text == before:
            break
    return text.translate(WINDOWS)


def strip_html(text: str) -> str:
    """Plain text: entities decoded, each tag a space, runs of white space one space.

    What is no whole tag of HTML stays, so that no word is lost. Shown in 02.
    """
    text = decode_entities(text)
    if "<" in text:
        for opening, closing in HIDDEN:
            shown, *others = opening.split(text)
            text = " ".join([shown, *(closing.split(part, 1)[-1] for part in others)])
        text = TAG.sub(" ", text)
    return " ".join(text.split())


def has_words(text: str) -> bool:
    """Whether a text has a letter or a digit once its HTML is gone; a lone `<br />` has none."""
    return any(map(str.isalnum, strip_html(text)))


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
