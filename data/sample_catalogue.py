"""A seeded generator of invented French products in the ENS layout of the Rakuten challenge.

Nothing here comes from Rakuten: sentences, brands, series and pictures are invented, and stand in
sample_words.toml. Only the shape of the tables follows the challenge (class sizes, share of missing
descriptions, lengths, duplicates, HTML), so that the files written here go through the loader that
reads the real ones. A score on this sample says that the chain runs; it says nothing about the real
data.

What each modality can know
---------------------------
Every product has a class and belongs to a neighbourhood of classes that share vocabulary ([groups]
in sample_words.toml): books (10, 2705, 2280, 2403), toys (1280, 1140, 1281, 1180, 1160, 1300, 1302,
1301, 1320), gaming (40, 2462, 60, 50, 2905), garden (2582, 2583, 2585), home (1560, 1920, 2060),
shop (2522, 2220, 1940).

- Title: with `P_VAGUE_TITLE` it holds words of the neighbourhood only. Otherwise one of the class's
  own templates is used, and some of these are shared by neighbours: `{book} - {author}` serves 10
  and 2705.
- Description: with `P_BOILERPLATE` it is shop talk common to all classes, with
  `P_VAGUE_DESCRIPTION` it speaks of the neighbourhood only. Otherwise it holds sentences of the
  class among the others. The condition (new, second-hand, a lot of several) is mostly said here, so
  it often decides between 10, 2705 and 2403, or between 40 and 2462.
- Picture: one of the class's objects ([classes]). Shared: book by 10, 2705 and 2403; magazine by
  2280 and 2403; game case by 40, 2462 and 2905; console and gamepad by 40, 2462, 60 and 50;
  figurine by 1140 and 1180; dice by 1281 and 1180; cards by 1281 and 1160; teddy by 1280 and 1140;
  t-shirt by 1140 and 1301; table by 1560 and 2582; pillow by 1920 and 2060; lounger by 2582 and
  2583. With `P_NEIGHBOUR_PICTURE` the picture shows the object of a class of the neighbourhood,
  with `P_PARCEL` a closed box. Second-hand classes are more often photographed at home, garden
  classes outdoors (`SCENES`); colour, pose and scale say nothing.

The draws for the three are independent given the class. So each modality knows something that the
others do not, and no model can reach 100%. The probabilities were set once from plausibility, for
no ranking. About `P_FOREIGN` of the rows are in English or German, title and description alike.

Departures from the real data
-----------------------------
- Every class has at least `MIN_ROWS` rows and `MIN_DESCRIBED` descriptions, so that it can be
  split; really, class 2462 describes 4% of its rows and class 2403 3%.
- Descriptions stop at `MAX_WORDS` words; the longest real one has 2,068.
- Real titles name many more things, real photographs are photographs, and a real copy of a
  description may stand under an unrelated class: here a copied text comes from the same class, or
  from a neighbour.

Each product draws from its own generator, seeded with (seed, index), so the files depend on
sample_words.toml, the seed and the row counts, and not on the number of workers.
"""

import argparse
import colorsys
import csv
import hashlib
import html.entities
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

VERSION = 1
P_VAGUE_TITLE = 0.25
P_BOILERPLATE = 0.20
P_VAGUE_DESCRIPTION = 0.20
P_NEIGHBOUR_PICTURE = 0.12
P_PARCEL = 0.06
P_FOREIGN = 0.04
P_GERMAN = 0.25           # of the foreign rows
P_SAME_CLASS_COPY = 0.85  # a copied text comes from the same class, else from a neighbour
TITLE_COPIES = 0.031      # of all rows
DESCRIPTION_COPIES = 0.138  # of the described rows
P_HTML = 0.45             # of the descriptions
P_ENTITIES = 0.30         # of the descriptions
P_TITLE_ENTITIES = 0.04
P_CAPITALS = 0.12         # of the titles; and of the first sentences of descriptions
P_BLACK_BORDER = 0.15
MIN_ROWS, MIN_DESCRIBED = 16, 12
TITLE_MEDIAN, TITLE_SPREAD, TITLE_MAX = 10.0, 0.45, 56  # words: median and sigma of a log-normal
TEXT_MEDIAN, TEXT_SPREAD, MAX_WORDS = 63.0, 0.95, 400  # described rows; a median near 35 over all
TEXT, PICTURE, TABLE = 1, 2, 3  # streams of random numbers

# Shares of the backgrounds, for each scene that a class may name.
SCENES = {"home": {"plain": 0.25, "gradient": 0.15, "room": 0.60, "lawn": 0.00},
          "garden": {"plain": 0.40, "gradient": 0.10, "room": 0.05, "lawn": 0.45},
          "shop": {"plain": 0.60, "gradient": 0.25, "room": 0.12, "lawn": 0.03}}


# --- Words ----------------------------------------------------------------------------------------
WORDS_FILE = Path(__file__).with_name("sample_words.toml")
CLASSES_FILE = Path(__file__).with_name("rakuten_classes.csv")
TABLES = ("numbers", "words", "groups", "classes", "boilerplate", "foreign", "colours", "objects")
GROUP_KEYS = ("classes", "titles", "additions", "sentences")
CLASS_KEYS = ("noun.en", "noun.de", "titles", "sentences", "objects", "scene")
FOREIGN_KEYS = ("titles", "additions", "sentences")


def load_classes() -> dict[int, tuple[int, int]]:
    """Class -> (training rows, rows with a description) of the real data."""
    with open(CLASSES_FILE, encoding="utf-8", newline="") as file:
        return {int(row["prdtypecode"]): (int(row["train_rows"]), int(row["rows_with_description"]))
                for row in csv.DictReader(file)}


def load_words(path: Path) -> dict:
    """The tables of sample_words.toml; ValueError names the first entry that is wrong."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name} is not written as TOML: {error}") from error
    for faults in (missing_entries, wrong_kinds, wrong_names, wrong_classes, wrong_shapes):
        for fault in faults(tables):  # each function relies on those before it
            raise ValueError(f"{path.name}: {fault}")
    return tables


def missing_entries(tables: dict) -> Iterator[str]:
    """What the generator reads and the tables lack."""
    wanted = [*TABLES, "boilerplate.sentences", "objects.parcel"]
    wanted += [f"groups.{name}.{key}" for name in tables.get("groups", ()) for key in GROUP_KEYS]
    wanted += [f"classes.{code}.{key}" for code in load_classes() for key in CLASS_KEYS]
    wanted += [f"foreign.{language}.{key}" for language in ("en", "de") for key in FOREIGN_KEYS]
    for entry in wanted:
        part, path = tables, entry.split(".")
        for depth, key in enumerate(path, 1):
            part = part.get(key) if isinstance(part, dict) else None
            if part is None:
                yield f"{'.'.join(path[:depth])} is missing"
                break


def leaves(tables: dict, above: str = "") -> Iterator[tuple[str, object]]:
    """Every entry that is no table, with its dotted name."""
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield above + key, value


def wrong_kinds(tables: dict) -> Iterator[str]:
    """Entries that are not a text, a list of texts or a list of whole numbers, as they should."""
    for entry, value in leaves(tables):
        kind = int if re.match(r"numbers\.|colours\.|groups\..*\.classes$", entry) else str
        single = re.search(r"\.noun\.|\.scene$", entry)
        items = [value] if single else value
        if not isinstance(items, list) or {type(item) for item in items} != {kind}:
            words = "texts" if kind is str else "whole numbers"
            yield f"{entry} must be {'a text' if single else f'a list of {words}'}"
        elif not all(str(item).strip() for item in items):
            yield f"{entry} holds an empty text"
    for name, value in tables["numbers"].items():
        if len(value) != 2 or value[0] > value[1]:
            yield f"numbers.{name} must be [smallest, largest]"


def wrong_names(tables: dict) -> Iterator[str]:
    """Texts with a {name} that nothing replaces, then words that are never replaced to the end."""
    known = {f"{{{name}}}" for name in (*tables["numbers"], *tables["words"])}
    for entry, value in leaves(tables):
        for name in re.findall(r"\{\w*\}?|\}", str(value)):
            if name not in known:
                yield f"{entry} uses {name}, which is neither in [numbers] nor in [words]"
    left = {name: re.findall(r"\{(\w+)\}", str(texts)) for name, texts in tables["words"].items()}
    while ended := [name for name in left if not left.keys() & left[name]]:
        for name in ended:
            del left[name]
    yield from (f"words.{name} leads to a word that holds itself" for name in left)


def wrong_classes(tables: dict) -> Iterator[str]:
    """Classes outside the 27 or not in one group, and rows with an unknown object or scene."""
    codes = [str(code) for code in load_classes()]
    listed = [str(code) for row in tables["groups"].values() for code in row["classes"]]
    yield from (f"class {code} is not in {CLASSES_FILE.name}"
                for code in (*listed, *tables["classes"]) if code not in codes)
    yield from (f"class {code} must be listed in one of [groups], not in {listed.count(code)}"
                for code in codes if listed.count(code) != 1)
    yield from (f"groups.{name}.classes needs two classes or more"
                for name, row in tables["groups"].items() if len(row["classes"]) < 2)
    for code, row in tables["classes"].items():
        for name in row["objects"]:
            if name not in tables["objects"]:
                yield f"classes.{code}.objects names {name!r}, which is not in [objects]"
        if row["scene"] not in SCENES:
            yield f"classes.{code}.scene is {row['scene']!r}; choose from: {', '.join(SCENES)}"


def wrong_shapes(tables: dict) -> Iterator[str]:
    """Shapes with an unknown kind or colour, or without numbers."""
    letters = "|".join((*"abcdt", *tables["colours"]))
    for name, shapes in tables["objects"].items():
        for shape in shapes:
            if not re.fullmatch(rf"[12]?[replaig] ({letters})( \d+(\.\d+)?)+", shape):
                yield f"objects.{name} holds {shape!r}, which is no shape"


LOADED = load_words(WORDS_FILE)
NUMBERS, WORDS, GROUPS = LOADED["numbers"], LOADED["words"], LOADED["groups"]
CLASSES = {int(code): row for code, row in LOADED["classes"].items()}
NEIGHBOURHOOD = {code: name for name, row in GROUPS.items() for code in row["classes"]}
BOILERPLATE = LOADED["boilerplate"]["sentences"]
FOREIGN, OBJECTS = LOADED["foreign"], LOADED["objects"]
FIXED_COLOURS = {letter: tuple(rgb) for letter, rgb in LOADED["colours"].items()}


# --- Text -----------------------------------------------------------------------------------------
@dataclass
class Product:
    """One row of the tables; `description` stays "" where `described` is False."""
    index: int
    code: int
    described: bool
    title: str = ""
    description: str = ""
    productid: int = 0
    imageid: int = 0


def generator(seed: int, index: int, stream: int, attempt: int = 0) -> np.random.Generator:
    """The generator of one product for its text or its picture, or of the tables (index 0)."""
    return np.random.default_rng([seed, index, stream, attempt])


def pick(rng: np.random.Generator, options: Sequence):
    """One of the options, uniformly."""
    return options[int(rng.integers(len(options)))]


def expand(template: str, rng: np.random.Generator) -> str:
    """The template with every {name} replaced by a number or a word, recursively."""
    def fill(match: re.Match) -> str:
        name = match[1]
        if name in NUMBERS:
            low, high = NUMBERS[name]
            return str(rng.integers(low, high + 1))
        return expand(pick(rng, WORDS[name]), rng)
    return re.sub(r"\{(\w+)\}", fill, template)


def draw_length(rng: np.random.Generator, median: float, spread: float, longest: int) -> int:
    """A number of words, log-normal, from 2 to `longest`."""
    return int(np.clip(round(rng.lognormal(np.log(median), spread)), 2, longest))


def group_of(code: int) -> str:
    """The name of the neighbourhood of a class."""
    return NEIGHBOURHOOD[code]


def draw_language(rng: np.random.Generator) -> str:
    """"fr", "en" or "de"."""
    if rng.random() >= P_FOREIGN:
        return "fr"
    return "de" if rng.random() < P_GERMAN else "en"


def foreign_templates(code: int, language: str) -> dict[str, list[str]]:
    """Titles, additions and sentences in English or German, with the noun of the class in place."""
    noun = CLASSES[code]["noun"][language]
    return {key: [text.replace("@", noun) for text in texts]
            for key, texts in FOREIGN[language].items()}


def make_title(code: int, language: str, rng: np.random.Generator) -> str:
    """A title: one template, then additions until a drawn length is reached."""
    group = GROUPS[group_of(code)]
    titles = (group if rng.random() < P_VAGUE_TITLE else CLASSES[code])["titles"]
    additions = group["additions"]
    if language != "fr":
        foreign = foreign_templates(code, language)
        titles, additions = foreign["titles"], foreign["additions"]
    target = draw_length(rng, TITLE_MEDIAN, TITLE_SPREAD, TITLE_MAX)
    title, separator = expand(pick(rng, titles), rng), pick(rng, (" - ", ", ", " ", " / "))
    while len(title.split()) < target:
        title += separator + expand(pick(rng, additions), rng)
    title = " ".join(title.split()[:TITLE_MAX])
    if rng.random() < P_CAPITALS:
        title = title.upper()
    return encode(title, rng) if rng.random() < P_TITLE_ENTITIES else title


def sentence_pools(code: int, language: str, rng: np.random.Generator) -> list[list[str]]:
    """The lists of sentences a description draws from, the most telling first."""
    if language != "fr":
        return [foreign_templates(code, language)["sentences"]]
    own, neighbours = CLASSES[code]["sentences"], GROUPS[group_of(code)]["sentences"]
    draw = rng.random()
    if draw < P_BOILERPLATE:
        return [BOILERPLATE]
    if draw < P_BOILERPLATE + P_VAGUE_DESCRIPTION:
        return [neighbours, neighbours, BOILERPLATE]
    return [own, own, neighbours, BOILERPLATE]


def make_description(code: int, language: str, rng: np.random.Generator) -> str:
    """A description with its markup, of a drawn length of at most MAX_WORDS words."""
    pools = sentence_pools(code, language, rng)
    longest = MAX_WORDS - 30  # room for the last sentence and tags
    target = draw_length(rng, TEXT_MEDIAN, TEXT_SPREAD, longest)
    sentences = [expand(pick(rng, pools[0]), rng)]
    words, used = len(sentences[0].split()), set()
    while words < target:
        pool = pick(rng, pools)
        template = pick(rng, [template for template in pool if template not in used] or pool)
        used.add(template)
        sentence = expand(template, rng)
        if sentence not in sentences:
            sentences.append(sentence)
        words += len(sentence.split())  # counted either way, so that a small pool ends too
    if rng.random() < P_CAPITALS:
        sentences[0] = sentences[0].upper()
    return mark_up(sentences, rng)


def encode(text: str, rng: np.random.Generator) -> str:
    """The text with its accents as named entities; mostly "'" and spaces before ":" and "!" too."""
    text = re.sub(r"&(?!\w+;)", "&amp;", text)
    names = html.entities.codepoint2name

    def entity(letter: re.Match) -> str:
        number = ord(letter[0])
        return f"&{names.get(number, f'#{number}')};"

    text = re.sub(r"[^\x00-\x7f]", entity, text)
    if rng.random() < 0.7:
        text = text.replace("'", "&#39;").replace(" :", "&nbsp;:").replace(" !", "&nbsp;!")
    return text


def mark_up(sentences: list[str], rng: np.random.Generator) -> str:
    """The sentences as one text: entities, then HTML tags, each for a share of the descriptions."""
    if rng.random() < P_ENTITIES:
        sentences = [encode(sentence, rng) for sentence in sentences]
    else:
        sentences = [sentence.replace(" & ", " &amp; ") for sentence in sentences]
    if rng.random() >= P_HTML:
        return " ".join(sentences)
    first, *rest = sentences
    layout = rng.integers(4)
    if layout == 0:
        return "<br />".join(sentences)
    if layout == 1:
        return "".join(f"<p>{sentence}</p>" for sentence in sentences)
    if layout == 2:
        return f"<div><b>{first}</b><br />{' '.join(rest)}</div>"
    return f"<b>{first}</b> <ul>{''.join(f'<li>{sentence}</li>' for sentence in rest)}</ul>"


# --- Tables ---------------------------------------------------------------------------------------
def class_counts(rows: int, minimum: int) -> dict[int, int]:
    """Rows per class: proportional to the real ones, `rows` in all, none below `minimum`."""
    real = {code: train for code, (train, _) in load_classes().items()}
    if rows < minimum * len(real):
        raise ValueError(f"rows={rows} is too few: {len(real)} classes need {minimum} each, "
                         f"so ask for at least {minimum * len(real)}.")
    counts: dict[int, int] = {}
    while True:  # a class raised to the minimum leaves less for the others: one more may fall below
        free = {code: train for code, train in real.items() if code not in counts}
        scale = (rows - sum(counts.values())) / sum(free.values())
        small = [code for code, train in free.items() if train * scale < minimum]
        if not small:
            break
        counts |= dict.fromkeys(small, minimum)
    whole = {code: int(train * scale) for code, train in free.items()}
    by_remainder = sorted(free, key=lambda code: whole[code] - free[code] * scale)
    for code in by_remainder[:rows - sum(counts.values()) - sum(whole.values())]:
        whole[code] += 1
    return counts | whole


def plan_rows(rows: int, min_rows: int, min_described: int, first: int,
              rng: np.random.Generator) -> list[Product]:
    """The products without their texts, shuffled and numbered from `first`."""
    planned = []
    for code, count in class_counts(rows, min_rows).items():
        train, with_text = load_classes()[code]
        described = min(count, max(min_described, round(count * with_text / train)))
        planned += [(code, position < described) for position in range(count)]
    order = rng.permutation(len(planned))
    return [Product(first + row, *planned[position]) for row, position in enumerate(order)]


def add_texts(products: list[Product], seed: int) -> None:
    """Give every product its title and description; a text that is already taken is drawn again."""
    taken: set[str] = set()
    for product in products:
        attempt = 0
        while not product.title:
            rng = generator(seed, product.index, TEXT, attempt)
            language = draw_language(rng)
            title = make_title(product.code, language, rng)
            description = make_description(product.code, language, rng) if product.described else ""
            if not {title, description} & taken:
                product.title, product.description = title, description
                taken |= {title, description} - {""}
            attempt += 1


def copy_texts(products: list[Product], field: str, share: float, rng: np.random.Generator) -> None:
    """Overwrite a share of the titles or descriptions by another product's, mostly of the class."""
    having = [product for product in products if getattr(product, field)]
    order = rng.permutation(len(having))
    cut = round(share * len(having))
    sources = [having[position] for position in order[cut:]]
    for position in order[:cut]:
        copy = having[position]
        same = [source for source in sources if source.code == copy.code]
        near = [source for source in sources if group_of(source.code) == group_of(copy.code)]
        chosen = same if same and rng.random() < P_SAME_CLASS_COPY else near
        setattr(copy, field, getattr(pick(rng, chosen), field))


def add_numbers(products: list[Product], rng: np.random.Generator) -> None:
    """Give every product its productid and imageid: unique, 7 to 10 digits, whatever the class."""
    digits = rng.integers(7, 11, 6 * len(products))
    numbers = np.unique(rng.integers(10 ** (digits - 1), 10 ** digits))
    numbers = rng.permutation(numbers)[:2 * len(products)].tolist()
    for product, productid, imageid in zip(products, numbers[::2], numbers[1::2], strict=True):
        product.productid, product.imageid = productid, imageid


def make_products(rows: int, test_rows: int, seed: int) -> tuple[list[Product], list[Product]]:
    """The labelled products and the unlabelled ones, whose index goes on after the labelled."""
    rng = generator(seed, 0, TABLE)
    train = plan_rows(rows, MIN_ROWS, MIN_DESCRIBED, 0, rng)
    test = plan_rows(test_rows, 0, 0, rows, rng)
    add_texts(train + test, seed)
    copy_texts(train, "title", TITLE_COPIES, rng)
    copy_texts(train, "description", DESCRIPTION_COPIES, rng)
    add_numbers(train + test, rng)
    return train, test


# --- Pictures -------------------------------------------------------------------------------------
def colour(rng: np.random.Generator, saturation: tuple = (0.35, 0.9),
           value: tuple = (0.45, 0.95)) -> tuple:
    """A random (red, green, blue), 0 to 255."""
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return tuple(int(255 * part) for part in rgb)


def scaled(rgb: tuple, factor: float) -> tuple:
    """The colour made darker (factor below 1) or lighter."""
    return tuple(int(min(255, part * factor + (40 if factor > 1 else 0))) for part in rgb)


def palette(rng: np.random.Generator) -> dict[str, tuple]:
    """The colours of one object: the fixed ones, three random ones, and two shades of the first."""
    main = colour(rng)
    shades = {"d": scaled(main, 0.65), "t": scaled(main, 1.2)}
    return FIXED_COLOURS | shades | {"a": main, "b": colour(rng), "c": colour(rng)}


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, colours: dict, unit: float) -> None:
    """Draw one shape, written as sample_words.toml says above [objects]; `unit` is in pixels."""
    kind, letter, *rest = shape.split()
    values = [float(word) for word in rest]
    fill, outline = colours[letter], scaled(colours[letter], 0.72)
    options = 2 if kind in "ia" else 1 if kind in "lg" else 0
    options += kind == "a"
    box = [unit * value for value in values[options:]]
    thin = max(1, round(unit * 0.5))
    if kind == "r":
        radius = box.pop() if len(box) == 5 else 0
        draw.rounded_rectangle(box, radius, fill, outline, thin)
    elif kind == "e":
        draw.ellipse(box, fill, outline, thin)
    elif kind == "p":
        draw.polygon(box, fill, outline, thin)
    elif kind == "l":
        draw.line(box, fill, round(unit * values[0]), joint="curve")
    elif kind == "i":
        draw.pieslice(box, values[0], values[1], fill, outline, thin)
    elif kind == "a":
        draw.arc(box, values[1], values[2], fill, round(unit * values[0]))
    else:
        draw_checkerboard(draw, box, int(values[0]), fill)


def draw_checkerboard(draw: ImageDraw.ImageDraw, box: list[float], count: int, fill: tuple) -> None:
    """Draw `count` x `count` squares, coloured and white in turn."""
    left, top, right, bottom = box
    side, height = (right - left) / count, (bottom - top) / count
    for row in range(count):
        for column in range(count):
            corner = (left + column * side, top + row * height)
            shade = fill if (row + column) % 2 else FIXED_COLOURS["w"]
            draw.rectangle((*corner, corner[0] + side, corner[1] + height), shade)


def draw_object(name: str, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """The object on a transparent layer: drawn large, reduced to `size`, lit sideways, rotated."""
    side = 560
    layer = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    draw, colours, optional = ImageDraw.Draw(layer), palette(rng), rng.random(2) < 0.5
    for shape in OBJECTS[name]:
        if shape[0] in "12" and not optional[int(shape[0]) - 1]:
            continue
        draw_shape(draw, shape.lstrip("12"), colours, side / 100)
    layer = layer.resize(size, Image.Resampling.BOX)
    row = np.linspace(*rng.permutation([185, 255]), size[0]).astype(np.uint8)[None]
    light = Image.fromarray(row).resize(size, Image.Resampling.NEAREST)
    opaque = Image.new("L", size, 255)
    layer = ImageChops.multiply(layer, Image.merge("RGBA", (light, light, light, opaque)))
    return layer.rotate(rng.normal(0, 9), Image.Resampling.BILINEAR, expand=True)


def draw_background(size: tuple[int, int], shares: dict[str, float],
                    rng: np.random.Generator) -> Image.Image:
    """A photograph without its object: plain, gradient, room (wall and floor boards) or lawn."""
    width, height = size
    kind = str(rng.choice(list(shares), p=list(shares.values())))
    papered = ((0.05, 0.3), (0.6, 0.92)) if kind == "room" else ((0.0, 0.12), (0.88, 1.0))
    wall = colour(rng, *papered)
    photo = np.full((height, width, 3), wall, np.uint8)
    horizon = int(height * rng.uniform(0.5, 0.72))
    if kind == "gradient":
        bottom = 0.3 * np.array(wall) + 0.7 * np.array(colour(rng))
        photo[:] = np.linspace(wall, bottom, height)[:, None]
    elif kind == "lawn":
        photo[:horizon] = np.array([188, 216, 236]) * rng.uniform(0.85, 1.05)
        grass = np.array([112, 158, 78]) * rng.uniform(0.75, 1.1)
        blades = grass + rng.uniform(-18, 18, (height - horizon, width // 4 + 1, 1))
        photo[horizon:] = blades.repeat(4, axis=1)[:, :width]
    elif kind == "room":
        floor = np.array(colour(rng, (0.25, 0.55), (0.35, 0.75)))
        boards = np.sin(np.arange(width) / rng.uniform(5, 14))
        photo[horizon:] = floor * (1 + 0.05 * boards)[:, None]
        photo[horizon:horizon + 6] = floor * 0.6
    return Image.fromarray(photo)


def choose_object(code: int, rng: np.random.Generator) -> str:
    """What the picture shows: an object of the class, of a neighbour, or a parcel."""
    draw = rng.random()
    if draw < P_PARCEL:
        return "parcel"
    if draw < P_PARCEL + P_NEIGHBOUR_PICTURE:
        code = pick(rng, [other for other in GROUPS[group_of(code)]["classes"] if other != code])
    first, *others = CLASSES[code]["objects"]
    return first if not others or rng.random() < 2 / 3 else pick(rng, others)


def draw_picture(code: int, seed: int, index: int) -> Image.Image:
    """The picture of a product: 500 x 500 RGB, a photograph between two white or black borders."""
    rng = generator(seed, index, PICTURE)
    name = choose_object(code, rng)
    short = int(500 * rng.uniform(0.68, 0.92))
    size = (500, short) if rng.random() < 0.5 else (short, 500)
    photo = draw_background(size, SCENES[CLASSES[code]["scene"]], rng)
    side = short * rng.uniform(0.55, 0.88)
    layer = draw_object(name, (int(side * rng.uniform(0.85, 1.1)), int(side)), rng)
    left, top = ((whole - part) * rng.uniform(0.25, 0.75) for whole, part in zip(size, layer.size))
    place = int(left), int(top)
    shade = Image.new("L", (size[0] // 4, size[1] // 4))
    mask = layer.getchannel("A").reduce(4).point(lambda alpha: alpha * 0.4)
    shade.paste(mask, (place[0] // 4 + 2, place[1] // 4 + 3))
    shade = shade.filter(ImageFilter.GaussianBlur(2)).resize(size, Image.Resampling.BILINEAR)
    photo.paste((30, 30, 35), (0, 0), shade)
    photo.paste(layer, place, layer)
    noise = Image.fromarray(rng.integers(0, 7, size[::-1], dtype=np.uint8)).convert("RGB")
    photo = ImageChops.add(photo, noise, offset=-3)
    border = (0, 0, 0) if rng.random() < P_BLACK_BORDER else (255, 255, 255)
    picture = Image.new("RGB", (500, 500), border)
    picture.paste(photo, ((500 - size[0]) // 2, (500 - size[1]) // 2))
    return picture


# --- Files ----------------------------------------------------------------------------------------
def draw_files(tasks: Iterable[tuple[str, int, int, int]]) -> None:
    """Draw and save one JPEG per task (file, class, seed, index)."""
    for file, code, seed, index in tasks:
        draw_picture(code, seed, index).save(file, quality=80)


def draw_in_processes(tasks: Sequence[tuple[str, int, int, int]], workers: int) -> None:
    """Draw the tasks in `workers` processes that run this file: no module to import, no fork."""
    command = [sys.executable, str(Path(__file__).resolve()), "--draw-from-stdin"]
    processes = []
    try:
        for worker in range(workers):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE,
                                       text=True)
            processes.append(process)
            process.stdin.write(json.dumps(tasks[worker::workers]))
            process.stdin.close()
        for process in processes:
            message = process.stderr.read()
            if process.wait():
                raise RuntimeError(f"Drawing the sample's pictures failed:\n{message}")
    finally:
        for process in processes:
            process.kill()
            process.stderr.close()
            process.wait()


def write_table(path: Path, header: list[str], rows: Iterable[list]) -> None:
    """Write a CSV with "\\n" line ends; an empty text is an empty field, as in the real files."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_tables(folder: Path, train: list[Product], test: list[Product]) -> None:
    """Write the three tables of the ENS layout."""
    header = ["", "designation", "description", "productid", "imageid"]
    for name, products in (("X_train_update.csv", train), ("X_test_update.csv", test)):
        rows = ([p.index, p.title, p.description, p.productid, p.imageid] for p in products)
        write_table(folder / name, header, rows)
    labels = ([p.index, p.code] for p in train)
    write_table(folder / "Y_train_CVw08PX.csv", ["", "prdtypecode"], labels)


def write_pictures(folder: Path, train: list[Product], test: list[Product], seed: int,
                   workers: int) -> None:
    """Write images/image_train/ and images/image_test/."""
    tasks = []
    for name, products in (("image_train", train), ("image_test", test)):
        images = folder / "images" / name
        images.mkdir(parents=True)
        for p in products:
            file = images / f"image_{p.imageid}_product_{p.productid}.jpg"
            tasks.append((str(file), p.code, seed, p.index))
    if workers > 1:
        draw_in_processes(tasks, workers)
    else:
        draw_files(tasks)


def source_hash() -> str:
    """sha256 of this file and sample_words.toml; a sample written with another one is stale."""
    source = Path(__file__).read_bytes() + WORDS_FILE.read_bytes()
    return hashlib.sha256(source).hexdigest()


def describe_sample(rows: int, test_rows: int, seed: int) -> dict:
    """The content of sample.json: what was asked for, and the source that made it."""
    return {"rows": rows, "test_rows": test_rows, "seed": seed, "version": VERSION,
            "source_sha256": source_hash()}


def replace_folder(new: Path, folder: Path) -> None:
    """Put the finished folder in the place of the old one, which is removed."""
    old = new.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_catalogue(folder: Path, rows: int = 1800, test_rows: int = 120, seed: int = 0,
                    workers: int = 2) -> None:
    """Write the sample: tables, pictures, sample.json. The folder appears whole or stays as it was.

    Raises ValueError if `rows` is too few for 27 classes, or if the folder holds something else.
    """
    folder = Path(folder).resolve()
    if folder.exists() and any(folder.iterdir()) and not (folder / "sample.json").exists():
        raise ValueError(f"{folder} holds files that are not a generated sample: "
                         "name another folder, or empty it.")
    facts = describe_sample(rows, test_rows, seed)  # an edit from here on makes the sample stale
    print(f"Writing a synthetic sample of {rows} + {test_rows} products to {folder.name}/ ...")
    train, test = make_products(rows, test_rows, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}-{os.getpid()}.partial")
    try:
        partial.mkdir()
        write_tables(partial, train, test)
        write_pictures(partial, train, test, seed, workers)
        about = json.dumps(facts, indent=1)
        (partial / "sample.json").write_text(about + "\n", encoding="utf-8")
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    described = sum(1 for p in train if p.description)
    print(f"Wrote {described} descriptions and {rows + test_rows} pictures.")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a synthetic sample in the ENS layout.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).with_name("sample"))
    parser.add_argument("--rows", type=int, default=1800)
    parser.add_argument("--test-rows", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--draw-from-stdin", action="store_true", help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    if options.pop("draw_from_stdin"):
        draw_files(json.load(sys.stdin))
    else:
        write_catalogue(**options)


if __name__ == "__main__":
    main()
