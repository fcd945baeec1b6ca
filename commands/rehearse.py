"""`run.py rehearse`: the heavy stages for a few steps at their real size, on this very machine.

Speed does not depend on what weights and rows hold: weights come from the networks' configurations,
rows are drawn, texts as long as the catalogue's where it is here, else as the public data's.
"""
from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import rich.box
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel

import helpers as h
from commands import costs
from engine.files import temporary_folder
from engine.processes import device
from engine.rows import usable_products
from engine.runs import Run
from engine.settings import REPRESENTATIONS, SPLITS, VALIDATION_SHARE, Profile
from engine.training import RowDataset, loader_workers, precision
from engine.variants import TABLE_VARIANTS, TRAINED_VARIANTS

LEAST = 2.0    # seconds that the counted steps have to take, so that their start does not count
MOST_STEPS = 64
SPREAD = 0.5   # of drawn text lengths, as a share of their mean, where no catalogue is here


@dataclass(frozen=True)
class Rehearsed:
    """Of a stage: seconds for a row in training, 0 where nothing is trained, and for a row whose
    vector is read; FLOPs of a training step on a row; memory in GB.
    """
    stage: str
    training: float
    reading: float
    flop: float
    memory: float


# --- measuring ------------------------------------------------------------------------------------
def seconds_a_step(work: Callable[[int], None]) -> float:
    """Seconds for a step of `work(steps)`, without its start: many steps minus few of them."""
    work(1)
    few, many = 1, 4
    while True:
        extra = clocked(work, many) - clocked(work, few)
        if extra >= LEAST or many >= MOST_STEPS:
            return max(extra, 1e-9) / (many - few)
        many = min(MOST_STEPS, 4 * many)


def clocked(work: Callable[[int], None], steps: int) -> float:
    """Seconds that `work(steps)` takes, on a GPU to its end."""
    start = time.perf_counter()
    work(steps)
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device: what a network could reach at most."""
    side = 8192 if device().type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device(), dtype=dtype)

    def multiply(times: int) -> None:
        for _ in range(times):
            matrix @ matrix

    return 2 * side ** 3 / seconds_a_step(multiply)


def memory_gb() -> float:
    """What this process holds now, in GB: on a GPU the most that its tensors took there."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


# --- the stages -----------------------------------------------------------------------------------
def text_lengths(run: Run, field: str, sizes: costs.Sizes) -> np.ndarray:
    """1,000 lengths in tokens as the field's texts have them, or as the public data's mean says."""
    rng, profile = np.random.default_rng(0), run.profile
    mean = sizes.tokens[field]
    try:
        texts = usable_products(run)[field].sample(1000, replace=True, random_state=0)
        words = texts.str.split().str.len().to_numpy()
        lengths = costs.TOKENS_PER_WORD * words + 2
    except (OSError, ValueError):
        lengths = rng.gamma(1 / SPREAD ** 2, mean * SPREAD ** 2, 1000)
    return np.clip(lengths, 3, profile.max_length).astype(int)


def pad(rows: Sequence[dict]) -> dict[str, Tensor]:
    """A batch of token rows, filled up on the right, with their labels."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    mask = [torch.ones_like(each) for each in ids]
    fill = torch.nn.utils.rnn.pad_sequence
    return {"input_ids": fill(ids, True, 1), "attention_mask": fill(mask, True),
            "labels": torch.tensor([row["labels"] for row in rows])}


def trained(run: Run, model: h.Classifier, rows_of: Callable[[int], RowDataset], collate: Callable,
            batch: int, place: Path, **more: object) -> float:
    """Seconds for a row of fine-tuning: `h.finetune` on so many batches, in folders of its own."""
    def work(steps: int) -> None:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            h.finetune(model, rows_of(steps * batch), rows_of(2), Path(folder), run.profile,
                       collate=collate, epochs=1, batch=batch, lr=1e-5, weight_decay=0.0, seed=0,
                       **more)

    return seconds_a_step(work) / batch


def rehearse_text(run: Run, stage: str, sizes: costs.Sizes, place: Path) -> Rehearsed:
    """A text encoder: fine-tuning in the profile's batches, and reading."""
    profile, (encoder, field) = run.profile, stage.split("_")
    config = costs.text_config(profile, encoder) or costs.BASE_CONFIGS[encoder]
    lengths, rng = text_lengths(run, field, sizes), np.random.default_rng(0)
    network = h.TextEncoder(AutoModel.from_config(config), profile.pooling)
    model = h.Classifier(network, config.hidden_size)
    tokens = [rng.integers(5, config.vocab_size, length).tolist() for length in lengths]

    def rows_of(rows: int) -> RowDataset:
        return RowDataset(lambda i: {"input_ids": tokens[i % len(tokens)]}, [0] * rows)

    training = 0.0
    if not profile.freeze_encoders:
        training = trained(run, model, rows_of, pad, profile.text_batch, place)
    network.eval().to(device())
    batch = pad([{"input_ids": each, "labels": 0} for each in tokens[:4 * profile.text_batch]])
    batch.pop("labels")

    def read(steps: int) -> None:
        for _ in range(steps):
            h.encode(network, batch, precision(profile))

    reading = seconds_a_step(read) / len(batch["input_ids"])
    flop = costs.text_network(profile, encoder, round(lengths.mean())).training
    return Rehearsed(stage, training, reading, flop, memory_gb())


def rehearse_pictures(run: Run, place: Path) -> list[Rehearsed]:
    """The image encoder: fine-tuning, reading of whole pictures, and of regions."""
    profile, rng = run.profile, np.random.default_rng(0)
    encoder = h.ImageEncoder(profile.seresnext, size=profile.image_size)
    model = h.Classifier(encoder, encoder.width, dropout=0.0)

    def pictures_of(side: int, rows: int) -> np.ndarray:
        return rng.integers(0, 256, (rows, 3, side, side), dtype=np.uint8)

    def rows_of(rows: int) -> RowDataset:
        split = pd.DataFrame({"part": ["train"] * rows, "label_id": 0})
        return h.picture_rows(pictures_of(profile.image_size, rows), split, "train",
                              profile.image_size, 0)

    training = 0.0
    if not profile.freeze_encoders:
        training = trained(run, model, rows_of, torch.utils.data.default_collate,
                           profile.image_batch, place, workers=loader_workers(profile))
    whole, regions = costs.image_networks(profile)

    def reading(vectors: Callable, network: costs.Network, stage: str) -> Rehearsed:
        def read(rows: int) -> None:
            vectors(encoder, profile, lambda side: pictures_of(side, 4 * rows))

        return Rehearsed(stage, 0.0, seconds_a_step(read) / 4, network.training, memory_gb())

    return [Rehearsed("seresnext", training, 0.0, whole.training, memory_gb()),
            reading(h.region_vectors, regions, "image_regions"),
            reading(h.whole_vectors, whole, "image_whole")]


def rehearse_fusion(run: Run, widths: dict[str, int]) -> Rehearsed:
    """The table's fusions, a mean one of which stands for all; `training` is of one variant."""
    profile, batch = run.profile, run.profile.fusion_batch
    x = {symbol: torch.randn(MOST_STEPS * batch, width).to(device())
         for symbol, width in widths.items()}
    labels = torch.zeros(MOST_STEPS * batch, dtype=torch.long, device=device())
    models = [h.make_fusion(run, variant, x).to(device()) for variant in TABLE_VARIANTS]

    def work(steps: int) -> None:
        train = torch.arange(steps * batch, device=device())
        for model in models:
            h.train_fusion(model, x, labels, train, train[:2], epochs=1, batch=batch, lr=1e-4,
                           seed=0, label="rehearsal")

    seconds = seconds_a_step(work) / batch / len(models)
    networks = costs.fusion_networks(profile.project, **widths)  # the table's come first
    flop = np.mean([network.training for network in networks[:len(models)]])
    return Rehearsed("fusion", seconds, 0.0, float(flop), memory_gb())


def rehearse(run: Run, sizes: costs.Sizes) -> list[Rehearsed]:
    """All heavy stages of a run, in the order of the notebooks."""
    stages = [name for symbol, name in REPRESENTATIONS.items() if symbol != "P"]
    with temporary_folder() as place:
        found = [rehearse_text(run, stage, sizes, place) for stage in stages]
        found += rehearse_pictures(run, place)
    widths = {symbol: costs.text_network(run.profile, stage.partition("_")[0], 8).width
              for symbol, stage in REPRESENTATIONS.items() if symbol != "P"}
    widths["P"] = costs.image_networks(run.profile)[0].width
    return [*found, rehearse_fusion(run, widths)]


# --- the whole study ------------------------------------------------------------------------------
def hours_of(each: Rehearsed, profile: Profile, split: str, rows: int) -> float:
    """Hours that a stage of one run takes at the measured speed."""
    train = rows * (1 - SPLITS[split]) * (1 - VALIDATION_SHARE)
    epochs = {"seresnext": profile.image_epochs, "image_regions": 0, "image_whole": 0,
              "fusion": profile.fusion_epochs * profile.fusion_seeds * len(TRAINED_VARIANTS)}
    often = epochs.get(each.stage, profile.text_epochs)
    return (often * train * each.training + rows * each.reading) / 3600


def study_hours(each: Rehearsed, runs: Sequence[Run], rows: int) -> float:
    """Hours that a stage takes in all runs together."""
    return sum(hours_of(each, run.profile, run.split, rows) for run in runs)


def print_rehearsal(console: Console, runs: Sequence[Run]) -> None:
    """Speed, memory, share of the peak and hours of each heavy stage; hours by workers."""
    profile = runs[0].profile
    sizes = costs.find_sizes(profile)
    if profile.threads:  # as stages are made
        torch.set_num_threads(profile.threads)
    peak = matrix_peak(precision(profile))
    found = rehearse(runs[0], sizes)
    table = Table(title=f"Profile {profile.name}, {sizes.rows:,} rows, {len(runs)} run(s), on "
                        f"{device_name()}: {peak / 1e12:.2f} TFLOP/s in matrix products",
                  title_justify="left", box=rich.box.SIMPLE)
    for name in ("stage", "rows a second, training", "reading", "share of the peak", "memory (GB)",
                 "hours, all runs"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    hours = {each.stage: study_hours(each, runs, sizes.rows) for each in found}
    for each in found:
        share = each.flop / each.training / peak if each.training else math.nan
        table.add_row(each.stage, *(costs.readable_number(value) for value in (
            1 / each.training if each.training else math.nan,
            1 / each.reading if each.reading else math.nan)),
            "" if math.isnan(share) else f"{share:.0%}", f"{each.memory:.1f}",
            f"{hours[each.stage]:.3f}")
    console.print(table)
    longest, whole = max(hours.values()) / len(runs), sum(hours.values())
    for workers in range(1, max(1, torch.cuda.device_count()) + 1):
        console.print(f"--workers {workers}: {max(longest, whole / workers):.2f} hours of stages")
    console.print("Notebooks, decoding of pictures and the tables come on top. Weights are random, "
                  f"rows are drawn. Text lengths: {sizes.source}", highlight=False)


def device_name() -> str:
    """What the networks run on."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} thread(s) of this processor"
