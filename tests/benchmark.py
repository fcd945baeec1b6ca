"""Speed, each as a ratio measured in one run (`make bench`): figures/benchmark.csv and .png.

    python tests/benchmark.py                 all measurements, each in a process of its own
    python tests/benchmark.py html regions    only these; the others' rows in the table stay
    python tests/benchmark.py --draw          the figure again, from figures/benchmark.csv

Networks have their full size and random weights, which cost the same time as trained ones. Texts
have the lengths of Rakuten's and not a word of them (full_size.py).
"""
from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import torch
from bs4 import BeautifulSoup
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import CamembertModel, CamembertTokenizer, FlaubertModel

import helpers as h
from commands import costs
from engine import training
from engine.picture_cache import open_cache, write_pictures
from engine.processes import processor
from engine.settings import make_profile
from engine.text_models import train_unigram
from full_size import DESCRIPTION, TITLE, column, write_tables

TABLE = ROOT / "figures" / "benchmark.csv"
COLUMN, ALL_ROWS = 55_116, 84_916  # rows with a description, which make a full column, and all rows
ROWS, BATCH, LONGEST = 256, 32, 256
# Tokens of product texts, log-normal (median, spread), as measured on 2,818 of them with
# CamemBERT's tokenizer: titles 22 on average, 40 at the 95th percentile; descriptions 141 after the
# cut at 256, which 19% reach; 35.1% are missing.
TITLE_TOKENS, DESCRIPTION_TOKENS, MISSING = (20.1, 0.42), (127.0, 0.80), 0.351
EPOCHS, MEASURED_EPOCHS = 20, 4
PAIRS = list(itertools.product(("add", "concat", "average"), repeat=2))
GRID_MINUTES = 30  # for the image reduction as the paper says it, which no trick makes faster
PROFILE = make_profile("paper")


@dataclass
class Ratio:
    """A measured ratio beside its goal, which it should reach, or not exceed where `at_most`."""
    what: str
    against: str
    ratio: float
    goal: float
    at_most: bool = False
    seconds: float = float("nan")
    seconds_against: float = float("nan")
    note: str = ""

    @property
    def met(self) -> bool:
        return self.ratio <= self.goal if self.at_most else self.ratio >= self.goal


def seconds(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turns(repeats: int, **ways: Callable[[], object]) -> dict[str, float]:
    """The median seconds of each way, warmed up; they take turns, so that all share the machine's
    noise.
    """
    for function in ways.values():
        function()
    times = {name: [] for name in ways}
    for _ in range(repeats):
        for name, function in ways.items():
            times[name].append(seconds(function))
    return {name: statistics.median(taken) for name, taken in times.items()}


class Memory:
    """The largest memory (bytes) of a process, this one, and its children together while the block
    runs, looked at each second.

    Of pages that several processes share each counts its part (PSS).
    """

    def __init__(self, process: int | None = None):
        self.process = process

    def __enter__(self) -> Memory:
        self.peak, self.over = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(1):
            with contextlib.suppress(psutil.NoSuchProcess):
                me = psutil.Process(self.process)
                all_of_them = (me, *me.children(recursive=True))
                now = sum(process.memory_full_info().pss for process in all_of_them)
                self.peak = max(self.peak, now)

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()


# --- fine-tuning ----------------------------------------------------------------------------------
class Clock(training.StudyCallback):
    """Notes the seconds of all steps of the last epoch."""
    taken = 0.0

    def on_epoch_begin(self, *args, **kwargs):
        super().on_epoch_begin(*args, **kwargs)
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        super().on_step_end(*args, **kwargs)
        Clock.taken = time.perf_counter() - self.start


def camembert() -> CamembertModel:
    """CamemBERT-base with random weights."""
    return CamembertModel(costs.BASE_CONFIGS["camembert"], add_pooling_layer=False)


class InOrder(h.EpochSampler):
    """Rows in the order in which they are given, which is that of the batches."""

    def __iter__(self):
        yield from range(self.rows)


def token_lengths(field: str) -> np.ndarray:
    """Tokens of ROWS texts, batch after batch: every so many of the batches of a full column's
    epoch, by their width.

    (Among a few hundred rows alone there are too few of each length to share a batch.) A missing
    text has two tokens.
    """
    rng, title = np.random.default_rng(0), field == "title"
    rows = COLUMN if title else ALL_ROWS
    median, spread = TITLE_TOKENS if title else DESCRIPTION_TOKENS
    lengths = np.clip(rng.lognormal(np.log(median), spread, rows), 3, LONGEST).astype(int)
    if field == "description":
        lengths[rng.random(rows) < MISSING] = 2
    order = [row for _, row in h.EpochSampler(rows, BATCH, 0, lengths.tolist())]
    batches = lengths[order].reshape(-1, BATCH)
    batches = batches[np.argsort(batches.max(1), kind="stable")]
    places = len(batches) * (2 * np.arange(ROWS // BATCH) + 1) // (2 * ROWS // BATCH)
    return batches[places].ravel()


def seconds_of_an_epoch(lengths: np.ndarray) -> float:
    """Seconds of one epoch of `finetune` on rows of these lengths."""
    rng, classifier = np.random.default_rng(0), h.Classifier(h.TextEncoder(camembert()), 768)
    rows = [{"input_ids": rng.integers(5, 32_005, n).tolist()} for n in lengths]
    train = h.RowDataset(rows.__getitem__, rng.integers(0, 27, len(rows)))
    val = h.RowDataset(rows[:4].__getitem__, train.labels[:4])
    collate = partial(CamembertTokenizer().pad, return_tensors="pt")
    training.StudyCallback, h.EpochSampler = Clock, InOrder
    with tempfile.TemporaryDirectory() as folder:
        h.finetune(classifier, train, val, Path(folder), PROFILE, epochs=1, batch=BATCH, lr=2e-5,
                   weight_decay=0.01, seed=0, collate=lambda batch: dict(collate(batch)))
    return Clock.taken


def matrix_peak() -> float:
    """FLOP/s of the machine's large matrix products in single precision."""
    n = 4096
    a, b = torch.rand(n, n), torch.rand(n, n)
    return 2 * n ** 3 / in_turns(5, product=lambda: a @ b)["product"]


def finetuning() -> list[Ratio]:
    """Batches of equal length against rows that are all padded to 256, and the share of the
    machine's peak.
    """
    peak, drawn = matrix_peak(), {field: token_lengths(field) for field in h.FIELDS}
    padded = seconds_of_an_epoch(np.full(ROWS, LONGEST))  # padding costs what tokens cost
    goals, found, flop, taken = {"title": 8.0, "description": 2.2}, [], 0.0, 0.0
    for field, goal in goals.items():
        lengths = drawn[field]
        ours = seconds_of_an_epoch(lengths)
        rows = [costs.text_network(PROFILE, "camembert", int(n)) for n in lengths]
        flop += sum(row.training for row in rows)
        taken += ours
        found.append(Ratio(
            f"an epoch of fine-tuning CamemBERT-base on {field}s", "every row padded to 256 tokens",
            padded / ours, goal, seconds=ours, seconds_against=padded,
            note=f"{ROWS} rows, {lengths.mean():.0f} tokens on average"))
    useful = Ratio(
        "useful FLOP/s of these two epochs", "matrix products of 4096 x 4096, single precision",
        flop / taken / peak, 0.40, note=f"{flop / taken / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s")
    return [*found, useful]


# --- text -----------------------------------------------------------------------------------------
def html() -> list[Ratio]:
    """Plain text of descriptions."""
    raw = column(COLUMN, DESCRIPTION, dressed=True)
    ours = seconds(lambda: [h.strip_html(text) for text in raw])
    theirs = seconds(lambda: [BeautifulSoup(text, "html.parser").get_text() for text in raw])
    return [Ratio("HTML to text of a full column", "BeautifulSoup's get_text on each row",
                  theirs / ours, 5, seconds=ours, seconds_against=theirs,
                  note=f"{len(raw):,} descriptions")]


def tokens() -> list[Ratio]:
    """CamemBERT's tokenizer on a full column of cleaned texts."""
    titles = h.clean_texts(column(COLUMN, TITLE, dressed=False), "paper", "cleaning")
    descriptions = h.clean_texts(column(COLUMN, DESCRIPTION, dressed=True), "paper", "cleaning")
    tokenizer, found = train_unigram(descriptions[:5000], 8000), []
    one = partial(tokenizer, truncation=True, max_length=LONGEST)
    for field, texts in (("titles", titles), ("descriptions", descriptions)):
        taken = in_turns(3, each=lambda: [one(text) for text in texts],
                         ours=lambda: h.tokenise(tokenizer, texts, LONGEST))
        found.append(Ratio(
            f"CamemBERT's tokens of all {field}", "one call per row", taken["each"] / taken["ours"],
            1.5, seconds=taken["ours"], seconds_against=taken["each"],
            note=f"{len(texts):,} {field}"))
    return found


def tables() -> list[Ratio]:
    """Loading, splitting and cleaning tables of Rakuten's size; the goal is 60 seconds and 2 GB."""
    with tempfile.TemporaryDirectory() as folder:
        write_tables(Path(folder))

        def work() -> None:
            products = h.load_catalogue(Path(folder))
            h.make_split(h.select_rows(products, "all"), "90-10", 0)
            for field in h.FIELDS:
                h.clean_texts(products[field], "paper", field)
        with Memory() as memory:
            taken = seconds(work)
    return [Ratio("load, check, split and clean 84,916 rows", "60 seconds", taken / 60, 1,
                  at_most=True, seconds=taken, seconds_against=60),
            Ratio("their memory, all processes", "2 GB", memory.peak / 2e9, 1, at_most=True,
                  note=f"{memory.peak / 1e9:.2f} GB")]


# --- pictures -------------------------------------------------------------------------------------
@torch.inference_mode()
def regions() -> list[Ratio]:
    """Regional features by full-size SE-ResNeXt-50: all tiles at once, tile by tile, and the whole
    picture.
    """
    encoder = h.ImageEncoder("se_resnext50_32x4d").eval()
    pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    tiles = h.split_regions(pixels)[0]
    taken = in_turns(5, ours=lambda: h.regional_features(encoder, pixels),
                     whole=lambda: encoder(pixels),
                     tile_by_tile=lambda: [encoder(tile[None]) for tile in tiles])
    more = costs.flops(encoder, tiles) / costs.flops(encoder, pixels)
    ours, whole, single = taken["ours"], taken["whole"], taken["tile_by_tile"]
    return [Ratio("regional features of a picture, SE-ResNeXt-50", "tile by tile", single / ours,
                  10, seconds=ours, seconds_against=single),
            Ratio("the same", "a 224 x 224 pass, scaled by FLOPs", ours / (whole * more), 2.2,
                  at_most=True, seconds=ours, seconds_against=whole * more,
                  note=f"regions have {more:.2f} times its FLOPs")]


def images() -> list[Ratio]:
    """Reading all pictures for a second epoch, from the cache, against decoding them again."""
    n, size = 1000, 224
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder), n)
        cache, decoded = Path(folder) / "pictures.bin", h.DecodedPictures(paths, size)
        first = seconds(lambda: write_pictures(decoded, cache))
        kept, _ = open_cache(cache, decoded.shape, "r")
        taken = in_turns(3, decoded=partial(read_all, decoded), second=partial(read_all, kept))
    return [Ratio("second epoch of image loading", "decoding every epoch",
                  taken["decoded"] / taken["second"], 5, seconds=taken["second"],
                  seconds_against=taken["decoded"],
                  note=f"{n:,} JPEGs of 500 x 500 pixels, decoded on all cores; filling the cache "
                       f"took {first:.1f} s")]


def write_photographs(folder: Path, n: int) -> list[Path]:
    """Smooth colours with some noise: about as large as product pictures of 500 x 500."""
    rng, paths = np.random.default_rng(0), [folder / f"{i}.jpg" for i in range(n)]
    for path in paths:
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((500, 500), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = (smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return paths


def read_all(pictures: h.DecodedPictures | np.ndarray) -> None:
    """Read all pictures in a random order, in batches, as training does."""
    order = np.random.default_rng(0).permutation(len(pictures))
    for places in order.reshape(-1, 25):
        torch.tensor(pictures[places])


# --- fusion ---------------------------------------------------------------------------------------
def seconds_to_encode(rows: int = 16) -> float:
    """Seconds to encode one product once: four text encoders and the regions of its picture, from
    a slice of rows.
    """
    taken = 0.0
    for model in (camembert(), FlaubertModel(costs.BASE_CONFIGS["flaubert"])):
        encoder = h.TextEncoder(model).eval().to(h.device())
        for field in h.FIELDS:
            lengths = np.sort(token_lengths(field))[::ROWS // rows]
            ids = [torch.randint(5, 30_000, (1, int(n))) for n in lengths]
            batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
            all_rows = partial(encode_each, encoder, batches)
            taken += seconds(all_rows) / len(batches)
    network = h.ImageEncoder("se_resnext50_32x4d").eval().to(h.device())
    picture = {"pictures": torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)}
    regions = partial(encode_each, partial(h.regional_features, network), [picture])
    return taken + in_turns(5, one=regions)["one"]


def encode_each(encoder: Callable, batches: list[dict]) -> None:
    """The vectors of each batch."""
    for batch in batches:
        h.encode(encoder, batch)


WIDTHS = {name: 2048 if name == "P" else 768 for name in h.REPRESENTATIONS}
TEST = round(COLUMN * h.SPLITS["90-10"])
VAL = round((COLUMN - TEST) * h.VALIDATION_SHARE)


def write_features(folder: Path) -> None:
    """The features of five encoders, as their stages write them: random numbers of the paper's
    size.
    """
    for name, width in WIDTHS.items():
        features = torch.randn(COLUMN, width)
        h.save_tensors(folder / f"{name}.safetensors", range(COLUMN), features=features)


def train_pair(pair: tuple[str, str], folder: Path) -> None:
    """Train one fusion variant for some epochs, as its stage does for all; all epochs cost the
    same.
    """
    torch.set_num_threads(1)  # one core for each of the two processes
    x = {name: h.load_tensors(folder / f"{name}.safetensors", range(COLUMN))["features"]
         for name in WIDTHS}
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 27, (COLUMN,), generator=draw)
    places = torch.randperm(COLUMN, generator=draw)
    train, val = places[TEST + VAL:].sort().values, places[TEST:TEST + VAL].sort().values
    model = h.HierarchicalFusion(WIDTHS, h.Variant(*pair))
    model.fit_scale(x, train)
    h.train_fusion(model, x, labels, train, val, epochs=MEASURED_EPOCHS, seed=0,
                   batch=PROFILE.fusion_batch, lr=PROFILE.fusion_lr, label=model.variant.name)


def seconds_of_the_grid() -> tuple[float, int]:
    """Seconds of all epochs of all nine pairs, two at a time, and the peak of memory (bytes)."""
    pairs = sorted(PAIRS, key=lambda pair: pair.count("concat"), reverse=True)  # the largest first
    with tempfile.TemporaryDirectory() as folder:
        write_features(Path(folder))
        spawn = multiprocessing.get_context("spawn")
        processes = concurrent.futures.ProcessPoolExecutor(2, spawn)
        train = partial(train_pair, folder=Path(folder))
        with Memory() as memory, processes as pool:
            list(pool.map(abs, range(2)))  # both have started; then each has a core of its own
            measured = seconds(lambda: list(pool.map(train, pairs)))
    return measured * EPOCHS / MEASURED_EPOCHS, memory.peak


def fusion() -> list[Ratio]:
    """The whole grid of fusions on cached features, against encoding every row again in every
    epoch.
    """
    grid, memory = seconds_of_the_grid()
    each, rows, passes = seconds_to_encode(), COLUMN - TEST, EPOCHS * len(PAIRS)
    again, once, allowed = grid + each * rows * passes, grid + each * rows, 60 * GRID_MINUTES
    note = (f"{rows:,} rows; from {MEASURED_EPOCHS} of {EPOCHS} epochs; the other time from "
            f"{each:.2f} s a row (four texts, the regions of a picture); with the one encoding "
            f"that caching needs: {again / once:.0f}")
    return [Ratio("the fusion grid, nine pairs x 20 epochs, on cached features",
                  "encoding in every epoch", again / grid, 200, seconds=grid, seconds_against=again,
                  note=note),
            Ratio("the fusion grid's time", f"{GRID_MINUTES} minutes", grid / allowed, 1,
                  at_most=True, seconds=grid, seconds_against=allowed),
            Ratio("the fusion grid's memory", "4 GB", memory / 4e9, 1, at_most=True,
                  note=f"{memory / 1e9:.2f} GB")]


# --- all of them ----------------------------------------------------------------------------------
MEASUREMENTS = {"html": html, "tokens": tokens, "tables": tables, "images": images,
                "regions": regions, "finetuning": finetuning, "fusion": fusion}


def measured(name: str) -> list[Ratio]:
    """The ratios of one measurement, made in a process of its own: none disturbs the next."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ratios.json"
        subprocess.run([sys.executable, __file__, name, "--to", str(path)], check=True)
        return [Ratio(**ratio) for ratio in json.loads(path.read_text())]


def show(ratios: list[Ratio]) -> None:
    """The table on the console."""
    table = Table("what", "against", "ratio", "goal", "met", "note")
    for ratio in ratios:
        goal = f"{'at most' if ratio.at_most else 'at least'} {ratio.goal:g}"
        met = "yes" if ratio.met else "NO"
        table.add_row(ratio.what, ratio.against, f"{ratio.ratio:.3g}", goal, met, ratio.note)
    Console(width=150).print(table)


def keep(name: str, ratios: list[Ratio]) -> pd.DataFrame:
    """Write figures/benchmark.csv with a measurement's rows and the others', if of this machine;
    return it.
    """
    machine = f"{os.cpu_count()} cores, {processor()}"
    version = torch.__version__.partition("+")[0]
    rows = [dataclasses.asdict(ratio) | {"met": ratio.met} for ratio in ratios]
    table = pd.DataFrame(rows).assign(machine=machine, torch=version)
    table.insert(0, "measurement", name)
    if TABLE.exists():
        old = read_table()
        same = old["machine"].eq(machine) & old["torch"].eq(version)
        table = pd.concat([table, old[same & (old["measurement"] != name)]])
    order = {name: place for place, name in enumerate(MEASUREMENTS)}
    table = table.sort_values("measurement", key=lambda names: names.map(order), kind="stable")
    table.to_csv(TABLE, index=False, float_format="%.4g")
    return table


def read_table() -> pd.DataFrame:
    """figures/benchmark.csv as `keep` has written it."""
    return pd.read_csv(TABLE, keep_default_na=False, dtype={"torch": str},
                       na_values={"seconds": "", "seconds_against": ""})


def draw(table: pd.DataFrame) -> None:
    """The ratios to be large as bars, with their goals."""
    bars = table[~table["at_most"] & (table["goal"] >= 1)].iloc[::-1]
    machine = table["machine"].iloc[0]
    names = bars["what"] + "\nagainst " + bars["against"]
    fig, ax = h.figure(h.PAGE, 0.7 + 0.42 * len(bars))
    ax.barh(names, bars["ratio"], color=h.COLOURS["data"], height=0.6)
    ax.plot(bars["goal"], names, "|", color=h.COLOURS["fusion"], ms=14, mew=2, label="goal")
    for place, (ratio, goal) in enumerate(zip(bars["ratio"], bars["goal"])):
        said = f"{ratio:,.0f} x" if ratio >= 100 else f"{ratio:.1f} x"
        ax.annotate(said, (max(ratio, goal), place), xytext=(6, 0), textcoords="offset points",
                    va="center", fontsize=7, color=h.COLOURS["paper"])
    ax.set(xscale="log", xlim=(1, 1.9 * bars[["ratio", "goal"]].max(axis=None)))  # room for a label
    ax.set_xlabel(f"times as fast, log scale ({machine})", fontsize=8)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.tick_params(axis="y", labelsize=7)
    ax.tick_params(axis="x", labelsize=7)
    ax.legend(frameon=False, loc="upper right", fontsize=7)
    fig.savefig(ROOT / "figures" / "benchmark.png", metadata={"Software": None})
    fig.savefig(ROOT / "figures" / "benchmark.svg", metadata={"Date": None})
    plt.close(fig)


def main(words: list[str]) -> int:
    """Run the named measurements, or all; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MEASUREMENTS)}; none: all")
    parser.add_argument("--draw", action="store_true", help="only draw what is in the table")
    parser.add_argument("--to", type=Path,
                        help="a file for the ratios, as JSON; measured in this process")
    given = parser.parse_args(words)
    chosen = [h.one_of("measurement", name, MEASUREMENTS) for name in given.names]
    if given.draw:
        draw(read_table())
        return 0
    if given.to:
        found = [dataclasses.asdict(ratio) for name in chosen for ratio in MEASUREMENTS[name]()]
        given.to.write_text(json.dumps(found))
        return 0
    ratios = []
    for name in chosen or MEASUREMENTS:
        found = measured(name)
        draw(keep(name, found))
        ratios += found
    show(ratios)
    return int(not all(ratio.met for ratio in ratios))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
