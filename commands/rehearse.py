"""The heavy stages for a few steps at their real size, on this very machine.

Speed does not depend on what weights and rows hold: weights come from the networks' configurations,
rows are drawn, texts as long as the catalogue's where it is here, else as the public data's.
Settings that change no result but the speed are tried, and the fastest are named.
"""
from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from transformers import AutoModel

import helpers as h
from commands import costs
from commands.measuring import MOST_STEPS, free_gb, memory_gb, seconds_a_step
from engine.files import one_line, temporary_folder
from engine.processes import device
from engine.progress import cores
from engine.rows import usable_products
from engine.runs import Run
from engine.settings import REPRESENTATIONS, Profile
from engine.training import RowDataset, precision
from engine.variants import TABLE_VARIANTS

SPREAD = 0.5  # of drawn text lengths, as a share of their mean, where no catalogue is here
REGION_BATCHES = {"cpu": (1, 2, 4, 8), "cuda": (8, 16, 32, 64, 128)}
LOADERS = (0, 1, 2, 4, 8, 16)
TRAINING_BYTES = 16  # a parameter: its weight, its gradient and AdamW's two moments


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
    fastest: dict[str, int] = field(default_factory=dict)  # settings that were tried for it

    @property
    def told(self) -> str:
        """`fastest` for reading."""
        return ", ".join(f"{name}={value}" for name, value in self.fastest.items())


# --- what does not fit ----------------------------------------------------------------------------
@contextmanager
def fitting(stage: str) -> Iterator[None]:
    """ValueError with the stage and the remedy if memory runs out within the block."""
    clear_device_cache(garbage_collection=True)  # of the stage before
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error  # `finetune` tells the remedy itself
        if not isinstance(cause, MemoryError) and not should_reduce_batch_size(cause):
            raise
        told = str(error) if error.__cause__ else (
            f"{one_line(error)}; set a smaller max_length, image_size or region_size, or "
            "precision=bf16")
        raise ValueError(f"stage {stage} does not fit this machine: {told}") from error


def refuse_too_large(stage: str, parameters: int, profile: Profile) -> None:
    """ValueError if a network's weights, and what trains them, are more than the memory here."""
    needed = (4 if profile.freeze_encoders else TRAINING_BYTES) * parameters / 1e9
    if needed > (here := free_gb()):
        raise ValueError(f"stage {stage} does not fit this machine: {parameters / 1e6:,.0f} "
                         f"million parameters take {needed:,.1f} GB, and {here:,.1f} GB are free; "
                         "take a smaller encoder, or another machine")


# --- the stages -----------------------------------------------------------------------------------
def drawn_lengths(mean: float, rows: int) -> np.ndarray:
    """Lengths of drawn texts, before any cut."""
    return np.random.default_rng(0).gamma(1 / SPREAD ** 2, mean * SPREAD ** 2, rows)


def text_lengths(run: Run, field: str, sizes: costs.Sizes) -> np.ndarray:
    """1,000 lengths in tokens as the field's texts have them, or as the public data's mean says."""
    try:
        texts = usable_products(run)[field].sample(1000, replace=True, random_state=0)
        words = texts.str.split().str.len().to_numpy()
        lengths = costs.TOKENS_PER_WORD * words + 2
    except (OSError, ValueError):
        lengths = drawn_lengths(sizes.tokens[field], 1000)
    return np.clip(lengths, 3, run.profile.max_length).astype(int)


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
    size = costs.text_network(profile, encoder, round(lengths.mean()))
    refuse_too_large(stage, size.parameters, profile)
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
    return Rehearsed(stage, training, reading, size.training, memory_gb())


def drawn_pictures(side: int, rows: int) -> np.ndarray:
    """Pictures of noise, [rows, 3, side, side]."""
    return np.random.default_rng(0).integers(0, 256, (rows, 3, side, side), dtype=np.uint8)


def picture_rows(profile: Profile, labels: Sequence[int]) -> RowDataset:
    """Training rows of drawn pictures, augmented as in the study."""
    pictures = drawn_pictures(profile.image_size, len(labels))
    split = pd.DataFrame({"part": "train", "label_id": labels})
    return h.picture_rows(pictures, split, "train", profile.image_size, 0)


def rehearse_training(run: Run, encoder: h.ImageEncoder, place: Path) -> Rehearsed:
    """Fine-tuning of the image encoder, with as many processes that load pictures as are best."""
    profile, (whole, _) = run.profile, costs.image_networks(run.profile)
    model = h.Classifier(encoder, encoder.width, dropout=0.0)

    def rows_of(rows: int) -> RowDataset:
        return picture_rows(profile, [0] * rows)

    def training(workers: int) -> float:
        return trained(run, model, rows_of, torch.utils.data.default_collate, profile.image_batch,
                       place, workers=workers)

    if profile.freeze_encoders:
        return Rehearsed("seresnext", 0.0, 0.0, whole.training, memory_gb())
    seconds = {workers: training(workers) for workers in LOADERS if workers <= cores()}
    best = min(seconds, key=seconds.get)
    return Rehearsed("seresnext", seconds[best], 0.0, whole.training, memory_gb(),
                     {"loader_workers": best})


def rehearse_reading(run: Run, encoder: h.ImageEncoder, stage: str) -> Rehearsed:
    """Reading of whole pictures or of regions, of as many pictures at a time as are best."""
    profile, (whole, regions) = run.profile, costs.image_networks(run.profile)
    tiles = stage == "image_regions" and profile.regions == "tiles"
    vectors = h.region_vectors if stage == "image_regions" else h.whole_vectors

    def read(settings: Profile, rows: int, steps: int) -> None:
        vectors(encoder, settings, lambda side: drawn_pictures(side, steps * rows))

    def reading(batch: int) -> float:
        settings = replace(profile, region_batch=batch)
        rows = batch or profile.image_batch
        return seconds_a_step(partial(read, settings, rows)) / rows

    batches = REGION_BATCHES[device().type] if tiles else (0,)
    seconds = {batch: reading(batch) for batch in batches}
    best = min(seconds, key=seconds.get)
    network = regions if tiles else whole
    return Rehearsed(stage, 0.0, seconds[best], network.training, memory_gb(),
                     {"region_batch": best} if tiles else {})


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


def rehearse(run: Run, sizes: costs.Sizes) -> Iterator[Rehearsed]:
    """All heavy stages of a run, in the order of the notebooks, each when it is measured.

    ValueError for one that does not fit this machine's memory.
    """
    stages = [name for symbol, name in REPRESENTATIONS.items() if symbol != "P"]
    with temporary_folder() as place:
        for stage in stages:
            with fitting(stage):
                yield rehearse_text(run, stage, sizes, place)
        with fitting("seresnext"):
            whole, _ = costs.image_networks(run.profile)
            refuse_too_large("seresnext", whole.parameters, run.profile)
            encoder = h.ImageEncoder(run.profile.seresnext, size=run.profile.image_size)
            yield rehearse_training(run, encoder, place)
    for stage in ("image_regions", "image_whole"):
        with fitting(stage):
            yield rehearse_reading(run, encoder, stage)
    widths = {symbol: costs.text_network(run.profile, stage.partition("_")[0], 8).width
              for symbol, stage in REPRESENTATIONS.items() if symbol != "P"}
    widths["P"] = costs.image_networks(run.profile)[0].width
    with fitting("fusion"):
        yield rehearse_fusion(run, widths)
