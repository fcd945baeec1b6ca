"""Hours and disk that a study takes, on paper, before it starts: `run.py study --dry-run`.

FLOPs are measured on torch's meta device, which computes shapes and no numbers.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import pandas as pd
import rich.box
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, CamembertConfig, FlaubertConfig, PretrainedConfig

import helpers as h
from commands.encoders import listed_config
from engine.picture_cache import cache_bytes
from engine.rows import usable_products
from engine.runs import Run
from engine.settings import FIELDS, REPRESENTATIONS, SPLITS, VALIDATION_SHARE, Profile
from engine.text_checkpoints import checkpoint_place
from engine.texts import clean_text
from engine.variants import TRAINED_VARIANTS


# --- one network ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Network:
    """A network's parameters, its width, and the FLOPs of a forward pass of one row."""
    parameters: int
    width: int
    forward: float

    @property
    def training(self) -> float:
        """FLOPs of a training step on one row: a forward pass, and two of them backward."""
        return 3 * self.forward


def flops(model: Callable, *rows: torch.Tensor, **inputs: torch.Tensor) -> int:
    """FLOPs of a forward pass of inputs on the meta device; a multiply-add is two of them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*rows, **inputs)
    return counter.get_total_flops()


# The paper's two checkpoints; used where nothing else says what a checkpoint is.
BASE_CONFIGS = {
    "camembert": CamembertConfig(
        vocab_size=32_005, max_position_embeddings=514, type_vocab_size=1),
    "flaubert": FlaubertConfig(vocab_size=68_729, emb_dim=768, n_layers=12, n_heads=12)}


def text_config(profile: Profile, encoder: str) -> PretrainedConfig | None:
    """A small encoder's configuration, or a checkpoint's; None if it is not known here."""
    source = getattr(profile, encoder)
    if source == "small":
        return type(BASE_CONFIGS[encoder])(
            vocab_size=profile.vocabulary, hidden_size=profile.text_width, num_attention_heads=4,
            num_hidden_layers=profile.text_layers, intermediate_size=4 * profile.text_width,
            max_position_embeddings=profile.max_length + 2)
    try:
        return AutoConfig.from_pretrained(checkpoint_place(source), local_files_only=True,
                                          trust_remote_code=False)
    except (OSError, ValueError):
        return listed_config(source)


@cache
def text_network(profile: Profile, encoder: str, tokens: int) -> Network:
    """A text encoder on one text of `tokens` tokens, or of as many as it has positions for."""
    with torch.device("meta"):
        config = text_config(profile, encoder) or BASE_CONFIGS[encoder]
        model = AutoModel.from_config(config, trust_remote_code=False).eval()
        longest = getattr(config, "max_position_embeddings", None) or -1
        shape = (1, min(tokens, longest) if longest > 0 else tokens)  # XLNet's has no limit: -1
        inputs = {"inputs_embeds": torch.empty(*shape, config.hidden_size)}
        if config.model_type == "flaubert":
            inputs["attention_mask"] = torch.ones(shape)
            # It looks at the lengths' values, which meta tensors do not have.
            inputs["lengths"] = torch.tensor([shape[1]], device="cpu")
        return Network(h.count_parameters(model), config.hidden_size, flops(model, **inputs))


@cache
def image_networks(profile: Profile) -> tuple[Network, Network]:
    """The image encoder on one whole picture, and on all regions of one picture."""
    with torch.device("meta"):
        encoder = h.ImageEncoder(profile.seresnext, size=profile.image_size).to("meta").eval()
        picture = partial(torch.empty, 1, 3)
        forward = flops(encoder, picture(profile.image_size, profile.image_size))
        network = Network(h.count_parameters(encoder), encoder.width, forward)
        if profile.regions == "feature_map":
            return network, network
        tiles = partial(h.regional_features, encoder, grid=profile.grid)
        forward = flops(tiles, picture(profile.region_size, profile.region_size))
    return network, replace(network, forward=forward)


@cache
def fusion_networks(project: bool, **widths: int) -> list[Network]:
    """The fusion models of notebook 07, one seed each, on a row of representations this wide."""
    with torch.device("meta"):
        row = {symbol: torch.empty(1, width) for symbol, width in widths.items()}
        models = [h.HierarchicalFusion(widths, variant, project=project).eval()
                  for variant in TRAINED_VARIANTS]
        return [Network(h.count_parameters(model), 27, flops(model, **row)) for model in models]


# --- the stages of a study ------------------------------------------------------------------------
# Makers' peaks, TFLOP/s: half precision (tensor cores, dense, single sums), single precision.
GPUS = {"T4": (65, 8.1), "V100": (125, 15.7), "RTX 3090": (71, 35.6), "RTX 4090": (165.2, 82.6),
        "A100": (312, 19.5), "H100": (989.4, 66.9)}
# Share of the peak, assumptions. "image" has a reference: NVIDIA's DeepLearningExamples state 443
# pictures a second on a V100 and 855 on an A100 for SE-ResNeXt-101 32x4d in mixed precision; at 48
# GFLOP a picture, 17% and 13%.
UTILISATION = {"text": 0.40, "image": 0.15, "regions": 0.10, "fusion": 0.10}
# Seconds that a step takes at least, to start its kernels one by one: assumptions, of eager
# PyTorch's order.
STEP_SECONDS = {"text": 0.03, "image": 0.06, "regions": 0.03, "fusion": 0.002}
CHECKPOINT_BYTES = 2 * 12  # a parameter: the best one and the newest, weight and AdamW's moments
PUBLIC_ROWS = {"described": 55_116, "all": 84_916}
TOKENS_PER_WORD = 1.8  # 22 tokens of titles of 11 words (see PUBLIC_TOKENS)
# Mean tokens, before the cut, of 2,818 product texts with CamemBERT's tokenizer; by `rows`.
PUBLIC_TOKENS = {"described": {"title": 22, "description": 141},
                 "all": {"title": 22, "description": 92}}
ASSUMPTIONS = (
    "FLOPs are measured on shapes alone; a training step counts as three forward passes. Hours are "
    "FLOPs / (peak x utilisation), and the utilisations are assumptions: text {text:.0%} (large "
    "matrix products), pictures {image:.0%} (grouped convolutions and squeeze-and-excitation wait "
    "for memory), regions {regions:.0%} (maps of one pixel), fusion {fusion:.0%}; a step takes 30 "
    "ms at least, of pictures 60 ms, of fusion 2 ms, however fast the GPU. Where a batch does not "
    "fit a GPU's memory, fewer rows at a time are taken, which is slower. What frozen encoders "
    "make is the same for all splits and seeds, and counted once. Text lengths: ")


@dataclass(frozen=True)
class Sizes:
    """Rows of a run, mean tokens of each field after the cut, and where these come from."""
    rows: int
    tokens: dict[str, int]
    source: str


def find_sizes(profile: Profile) -> Sizes:
    """Sizes from the catalogue where it is there, else those of the public data."""
    try:
        products = usable_products(Run(profile, "90-10", 0))
    except (OSError, ValueError):
        rows, means = PUBLIC_ROWS[profile.rows], PUBLIC_TOKENS[profile.rows]
        source = ("no catalogue that can be read is here, so rows and text lengths are those of "
                  "the public data, measured on 2,818 product texts.")
    else:
        products = h.select_rows(products, profile.rows)
        some, rows = products.sample(min(len(products), 2000), random_state=0), len(products)
        means = {field: mean_tokens(some[field], profile) for field in FIELDS}
        source = f"words of {len(some):,} rows of the catalogue x {TOKENS_PER_WORD} tokens."
    tokens = {field: min(math.ceil(mean), profile.max_length) for field, mean in means.items()}
    return Sizes(min(rows, profile.limit or rows), tokens, source)


def mean_tokens(texts: Sequence[str], profile: Profile) -> float:
    """The mean length of texts in tokens, by their words, after the cut."""
    words = np.array([len(clean_text(text, profile.clean).split()) for text in texts])
    return np.minimum(TOKENS_PER_WORD * words + 2, profile.max_length).mean()


@dataclass(frozen=True)
class Work:
    """What a stage of one run computes, and what it keeps (bytes)."""
    stage: str
    kind: str
    flop: float
    steps: float
    disk: float
    checkpoint: float = 0.0


def stage_work(profile: Profile, split: str, sizes: Sizes) -> list[Work]:
    """The stages of one run that a GPU makes, in the order of the notebooks."""
    rest, trained = sizes.rows * (1 - SPLITS[split]), not profile.freeze_encoders
    train, val = rest * (1 - VALIDATION_SHARE), rest * VALIDATION_SHARE

    def encoder(stage: str, kind: str, network: Network, epochs: int, batch: int, rows: int,
                at_a_time: int) -> Work:
        """`epochs` of fine-tuning in batches of `batch`; then the features of `rows` rows."""
        flop = trained * epochs * (train * network.training + val * network.forward)
        steps = trained * epochs * (train + val / 2) / batch
        weights = network.parameters if epochs else 0
        return Work(stage, kind, flop + rows * network.forward, steps + rows / at_a_time,
                    4 * (weights + rows * network.width), trained * weights * CHECKPOINT_BYTES)

    work, widths, rows, batch = [], {}, sizes.rows, profile.image_batch
    for symbol, stage in list(REPRESENTATIONS.items())[:-1]:
        name, field = stage.split("_")
        network = text_network(profile, name, sizes.tokens[field])
        widths[symbol] = network.width
        work.append(encoder(stage, "text", network, profile.text_epochs, profile.text_batch, rows,
                            4 * profile.text_batch))
    whole, regions = image_networks(profile)
    kind = "image" if profile.regions == "feature_map" else "regions"
    models = fusion_networks(profile.project, **widths, P=whole.width)
    flop = sum(train * model.training + val * model.forward for model in models)
    epochs = profile.fusion_epochs * profile.fusion_seeds
    steps = len(models) * train / profile.fusion_batch
    return [*work,
            encoder("seresnext", "image", whole, profile.image_epochs, batch, 0, batch),
            encoder("image_regions", kind, regions, 0, batch, rows, batch),
            encoder("image_whole", "image", whole, 0, batch, rows, batch),
            Work("fusion", "fusion", epochs * flop, epochs * steps,
                 4 * profile.fusion_seeds * sum(model.parameters for model in models))]


def cache_gb(profile: Profile, rows: int) -> float:
    """Disk that the decoded pictures take, once for each size that is used."""
    sizes = {profile.image_size, profile.region_size} if profile.cache_pictures else ()
    return sum(cache_bytes((rows, 3, size, size)) for size in sizes) / 1e9


# --- the table ------------------------------------------------------------------------------------
def cost_table(profile: Profile, splits: Sequence[str], seeds: Sequence[int],
               sizes: Sizes, gpus: dict[str, tuple[float, float]] = GPUS,
               launches: bool = True) -> pd.DataFrame:
    """What each stage costs on each GPU, a row for each split, stage and GPU; nothing is run.

    Columns: split ("all": made once for all), stage, runs, gpu; each time: pflop (10^15), hours,
    disk_gb (kept), checkpoint_gb (while it trains). Without `launches` a step itself takes no time.
    """
    rows = []
    for split in splits:
        for work in stage_work(profile, split, sizes):
            shared = profile.freeze_encoders and work.stage != "fusion"
            if shared and split != splits[0]:
                continue
            runs = 1 if shared and not profile.limit else len(seeds)  # a limit chooses by seed
            for gpu, (half, single) in gpus.items():
                peak = 1e12 * (single if profile.precision == "float32" else half)
                seconds = max(work.flop / (peak * UTILISATION[work.kind]),
                              launches * work.steps * STEP_SECONDS[work.kind])
                rows.append({"split": "all" if shared else split, "stage": work.stage,
                             "runs": runs, "pflop": work.flop / 1e15, "disk_gb": work.disk / 1e9,
                             "checkpoint_gb": work.checkpoint / 1e9, "gpu": gpu,
                             "hours": seconds / 3600})
    return pd.DataFrame(rows)


def disk_gb(costs: pd.DataFrame) -> float:
    """Disk that all stages take, with the checkpoints of one that trains."""
    once = costs[costs["gpu"] == next(iter(GPUS))]
    return (once["disk_gb"] * once["runs"]).sum() + once["checkpoint_gb"].max()


def readable_costs(costs: pd.DataFrame, pictures_gb: float) -> pd.DataFrame:
    """`cost_table` for reading: a row a stage, all its runs together; hours by GPU; totals."""
    numbers = ["pflop", "disk_gb", "hours"]
    sums = costs.assign(**costs[numbers].mul(costs["runs"], axis=0))
    by_gpu = sums.pivot_table(numbers, "stage", "gpu", "sum", sort=False)
    table = by_gpu["hours"][list(GPUS)]
    table.insert(0, "PFLOP", by_gpu["pflop"].iloc[:, 0])
    table.insert(1, "disk (GB)", by_gpu["disk_gb"].iloc[:, 0])
    total = table.sum()
    table.loc["picture cache", "disk (GB)"] = pictures_gb
    table.loc["checkpoints, one stage", "disk (GB)"] = costs["checkpoint_gb"].max()
    total["disk (GB)"] = table["disk (GB)"].sum()
    table.loc["all, one after another"] = total
    return table.map(readable_number).reset_index(names="stage")


def readable_number(value: float) -> str:
    """A number with as many digits as these deserve; "" for none."""
    decimals = 0 if value >= 10 else 2
    return "" if math.isnan(value) else f"{value:,.{decimals}f}"


def print_costs(console: Console, runs: Sequence[Run]) -> None:
    """The costs of a study as a table, with the assumptions below it."""
    profile = runs[0].profile
    splits = list(dict.fromkeys(run.split for run in runs))
    seeds = list(dict.fromkeys(run.seed for run in runs))
    sizes = find_sizes(profile)
    readable = readable_costs(cost_table(profile, splits, seeds, sizes),
                              cache_gb(profile, sizes.rows))
    table = Table(
        title=f"Profile {profile.name}, {sizes.rows:,} rows, splits {' and '.join(splits)}, "
              f"{len(seeds)} seed(s): {len(runs)} run(s). Hours on one GPU",
        title_justify="left", box=rich.box.SIMPLE)
    for column in readable:
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in readable.itertuples(index=False):
        if row[0] in ("picture cache", "all, one after another"):
            table.add_section()
        table.add_row(*row)
    console.print(table)
    console.print(ASSUMPTIONS.format(**UTILISATION) + sizes.source, highlight=False)
