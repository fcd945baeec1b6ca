"""What a study costs, on paper, said before it starts: `run.py study --dry-run`.

FLOPs are measured on torch's meta device, which computes shapes and no numbers; hours, GPU memory and disk on common
GPUs follow from them.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import rich.box
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModel,
    CamembertConfig,
    CamembertTokenizer,
    FlaubertConfig,
    FlaubertModel,
    PreTrainedConfig,
)

import helpers as h


# ======================================================================================================
# 1  One network
# ======================================================================================================
@dataclass(frozen=True)
class Network:
    """What one row costs: FLOPs of a forward pass and of a training step, bytes kept for the backward pass."""
    parameters: int
    width: int
    forward: float
    training: float
    kept: float


def measure(model: nn.Module, inputs: dict[str, Tensor], half: bool = True) -> tuple[float, float, float]:
    """(forward FLOPs, forward and backward FLOPs, bytes kept for the backward pass) of inputs on the meta device.

    A multiply-add is two FLOPs. `half`: numbers take 2 bytes, as in mixed precision.
    """
    kept, own = {}, {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:  # several operations may keep the same one
            bytes_each = 2 if half and tensor.is_floating_point() else tensor.element_size()
            kept[storage._cdata] = (storage.nbytes() // tensor.element_size() * bytes_each, tensor)
        return tensor

    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.eval()(**inputs)
    counted = {torch.ops.aten.convolution_backward: _backward_flops}
    with FlopCounterMode(display=False, custom_mapping=counted) as both, \
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(**inputs)
        getattr(output, "last_hidden_state", output).sum().backward()
    return forward.get_total_flops(), both.get_total_flops(), sum(size for size, _ in kept.values())


def _backward_flops(grad, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, wanted,
                    out_shape) -> int:
    """FLOPs of a convolution's gradients, each as many as its forward pass; torch's own count forgets the groups."""
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(wanted[:2])


# What AutoConfig gives for the paper's two checkpoints; used where the hub's files are not at hand.
BASE_CONFIGS = {
    "camembert": CamembertConfig(vocab_size=32_005, max_position_embeddings=514, type_vocab_size=1),
    "flaubert": FlaubertConfig(vocab_size=68_729, emb_dim=768, n_layers=12, n_heads=12)}


def text_config(encoder: str, source: str) -> PreTrainedConfig:
    """The checkpoint's configuration from its folder or the hub's local cache, else that of the paper's checkpoint."""
    try:
        return AutoConfig.from_pretrained(h.checkpoint_place(source), local_files_only=True)
    except (OSError, ValueError):
        return BASE_CONFIGS[encoder]


# The settings on which a network's cost for one row depends.
ARCHITECTURE = (*h.TEXT_ENCODERS, "seresnext", "text_width", "text_layers", "vocabulary", "max_length", "precision",
                "gradient_checkpointing", "image_size", "region_size", "grid", "regions", "project")


def architecture(profile: h.Profile) -> h.Profile:
    """A profile with the same networks and all other settings as by default, so that each is measured once."""
    return h.Profile(profile.name, profile.data, **{name: getattr(profile, name) for name in ARCHITECTURE})


@cache
def text_model(profile: h.Profile, encoder: str) -> nn.Module:
    """The profile's text encoder on the meta device: shapes without numbers."""
    with torch.device("meta"):
        if (source := getattr(profile, encoder)) != "small":
            return AutoModel.from_config(text_config(encoder, source))
        tokens = ["<s>", "<pad>", "</s>", "<unk>", *map(str, range(profile.vocabulary - 4))]
        tokenizer = CamembertTokenizer(vocab=[(token, 0.0) for token in tokens])  # only its size matters here
        return h.small_text_model(encoder, tokenizer, profile.text_width, profile.text_layers, profile.max_length)


@cache
def measure_text(profile: h.Profile, encoder: str, tokens: int) -> tuple[float, float, float]:
    """`measure` of a text encoder on one text of `tokens` tokens, or of as many as it has positions for."""
    model = text_model(profile, encoder)
    shape = (1, min(tokens, model.config.max_position_embeddings))
    inputs = {"inputs_embeds": torch.empty(*shape, model.config.hidden_size, device="meta")}
    if isinstance(model, FlaubertModel):  # it looks at the lengths' values, which meta tensors do not have
        inputs |= {"lengths": torch.tensor([shape[1]]), "attention_mask": torch.ones(shape, device="meta")}
    return measure(model, inputs, profile.precision != "float32")


def text_network(profile: h.Profile, encoder: str, tokens: int) -> Network:
    """A text encoder on one text of `tokens` tokens; what is kept for the backward pass, at the longest length."""
    profile = architecture(profile)
    model = text_model(profile, encoder)
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    forward, training, _ = measure_text(profile, encoder, tokens)
    kept = measure_text(profile, encoder, profile.max_length)[2]
    if profile.gradient_checkpointing and model.supports_gradient_checkpointing:
        # Kept are each layer's input, and one layer, which is computed again.
        training += forward
        kept = kept / layers + layers * profile.max_length * width * (4 if profile.precision == "float32" else 2)
    return Network(sum(p.numel() for p in model.parameters()), width, forward, training, kept)


@cache
def image_networks(profile: h.Profile) -> tuple[Network, Network]:
    """The image encoder on one whole picture, and on the regions of one picture (all its tiles, forward only)."""
    encoder = h.shape_of_encoder(profile.seresnext)
    with torch.device("meta"):
        whole, cut = (torch.empty(2, 3, size, size) for size in (profile.image_size, profile.region_size))
        costs = [cost / 2 for cost in measure(encoder, {"pixels": whole}, profile.precision != "float32")]
        network = Network(sum(p.numel() for p in encoder.parameters()), encoder.width, *costs)
        if profile.regions == "feature_map":
            return network, network
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            h.RegionEncoder(encoder.eval(), profile.grid)(pixels=cut[:1])
    return network, dataclasses.replace(network, forward=counter.get_total_flops(), training=0, kept=0)


@cache
def fusion_networks(project: bool, **widths: int) -> list[Network]:
    """The fusion models that notebook 07 trains, each on one row of representations of these widths."""
    found = []
    with torch.device("meta"):
        for variant in h.TRAINED_VARIANTS:
            model = h.HierarchicalFusion(widths, variant, project=project)
            costs = measure(model, {name: torch.empty(1, width) for name, width in widths.items()}, half=False)
            found.append(Network(sum(p.numel() for p in model.parameters()), 27, *costs))
    return found


# ======================================================================================================
# 2  The stages of a study
# ======================================================================================================
@dataclass(frozen=True)
class Gpu:
    """A GPU's memory (GB) and its maker's peak, TFLOP/s: half precision on tensor cores (dense, sums in single
    precision), and single precision outside of them."""
    memory: int
    half: float
    single: float


GPUS = {"T4": Gpu(16, 65, 8.1), "V100": Gpu(16, 125, 15.7), "RTX 3090": Gpu(24, 71, 35.6),
        "RTX 4090": Gpu(24, 165.2, 82.6), "A100": Gpu(40, 312, 19.5), "H100": Gpu(80, 989.4, 66.9)}
# Share of the peak, assumptions. "image" has a reference: NVIDIA's DeepLearningExamples state 443 pictures a second on
# a V100 and 855 on an A100 for SE-ResNeXt-101 32x4d in mixed precision; at 48 GFLOP a picture, 17% and 13%.
UTILISATION = {"text": 0.40, "image": 0.15, "regions": 0.10, "fusion": 0.10}
# Seconds that a step takes at least, to start its kernels one by one: assumptions, of eager PyTorch's order.
STEP_SECONDS = {"text": 0.03, "image": 0.06, "regions": 0.03, "fusion": 0.002}
USABLE = 0.9            # share of a GPU's memory that tensors get; the rest is CUDA's own
STATES = 16             # bytes a parameter: weight, gradient and AdamW's two moments, in single precision
PUBLIC_ROWS = {"described": 55_116, "all": 84_916}
TOKENS_PER_WORD = 1.8   # 22 tokens of titles of 11 words (see PUBLIC_TOKENS)
# Mean tokens measured on 2,818 product texts with CamemBERT's tokenizer, before the cut; by `rows`.
PUBLIC_TOKENS = {"described": {"title": 22, "description": 141}, "all": {"title": 22, "description": 92}}
ASSUMPTIONS = (
    "FLOPs are measured on shapes alone; hours are FLOPs / (peak x utilisation), and the utilisations are assumptions: "
    "text {text:.0%} (large matrix products), pictures {image:.0%} (grouped convolutions and squeeze-and-excitation "
    "wait for memory), regions {regions:.0%} (maps of one pixel), fusion {fusion:.0%}; a step takes 30 ms at least, of "
    "pictures 60 ms, of fusion 2 ms, however fast the GPU. GPU memory is 16 "
    "bytes a parameter (weight, gradient, AdamW) plus what a batch of the longest rows keeps for the backward pass, "
    "attention matrices included; 3.1 (8) means 3.1 hours, and that it fits with --set device_batch=8. Text lengths: ")


@dataclass(frozen=True)
class Sizes:
    """Rows of a run, mean tokens of each field after the cut, and where these numbers come from."""
    rows: int
    tokens: dict[str, int]
    source: str


def find_sizes(profile: h.Profile) -> Sizes:
    """Sizes from the catalogue where it is there (words of up to 2,000 rows), else those of the public data."""
    try:
        products = h.load_catalogue(h.catalogue_folder(h.Run(profile, "90-10", 0)))
    except (OSError, ValueError):
        rows, tokens = PUBLIC_ROWS[profile.rows], PUBLIC_TOKENS[profile.rows]
        source = "no catalogue that can be read is here, so rows and text lengths are those of the public data, " \
                 "measured on 2,818 product texts."
    else:
        products = h.select_rows(products, profile.rows)
        some, rows = products.sample(min(len(products), 2000), random_state=0), len(products)
        tokens = {field: np.mean([min(TOKENS_PER_WORD * len(h.clean_text(text, profile.clean).split()) + 2,
                                      profile.max_length) for text in some[field]]) for field in h.FIELDS}
        source = f"words of {len(some):,} rows of the catalogue x {TOKENS_PER_WORD} tokens."
    tokens = {field: min(math.ceil(mean), profile.max_length) for field, mean in tokens.items()}
    return Sizes(min(rows, profile.limit or rows), tokens, source)


@dataclass(frozen=True)
class Work:
    """What a stage of one run computes and keeps; `batch` is 0 where nothing is trained on a GPU's memory."""
    stage: str
    kind: str
    flop: float
    steps: float
    network: Network
    batch: int
    disk: float

    def hours(self, peak: float) -> float:
        """Hours on a GPU of `peak` FLOP/s."""
        return max(self.flop / (peak * UTILISATION[self.kind]), self.steps * STEP_SECONDS[self.kind]) / 3600


def stage_work(profile: h.Profile, split: str, sizes: Sizes) -> list[Work]:
    """The stages of one run that a GPU makes, in the order of the notebooks."""
    rest = sizes.rows * (1 - h.SPLITS[split])
    train, val, rows = rest * (1 - h.VALIDATION_SHARE), rest * h.VALIDATION_SHARE, sizes.rows
    trained = not profile.freeze_encoders

    def finetuning(network: Network, epochs: int) -> float:
        return trained * epochs * (train * network.training + val * network.forward)

    def steps(epochs: int, batch: int) -> float:
        return trained * epochs * (train + val / 2) / batch

    work, widths = [], {}
    for encoder in h.TEXT_ENCODERS:
        for field in h.FIELDS:
            network = text_network(profile, encoder, sizes.tokens[field])
            widths[f"{field[0].upper()}_{encoder[0]}"] = network.width
            work.append(Work(f"{encoder}_{field}", "text",
                             finetuning(network, profile.text_epochs) + rows * network.forward,
                             steps(profile.text_epochs, profile.text_batch) + rows / profile.text_batch / 4, network,
                             profile.text_batch * trained, 4 * (network.parameters + rows * network.width)))
    whole, regions = image_networks(architecture(profile))
    work += [Work("seresnext", "image", finetuning(whole, profile.image_epochs),
                  steps(profile.image_epochs, profile.image_batch), whole, profile.image_batch * trained,
                  4 * whole.parameters),
             Work("image_regions", "image" if profile.regions == "feature_map" else "regions", rows * regions.forward,
                  rows / profile.image_batch, regions, 0, 4 * rows * whole.width),
             Work("image_whole", "image", rows * whole.forward, rows / profile.image_batch, whole, 0,
                  4 * rows * whole.width)]
    models = fusion_networks(profile.project, **widths, P=whole.width)
    flop = profile.fusion_epochs * sum(train * model.training + val * model.forward for model in models)
    fusion_steps = len(models) * profile.fusion_epochs * train / profile.fusion_batch
    largest = max(models, key=lambda model: model.parameters)
    return [*work, Work("fusion", "fusion", flop, fusion_steps, largest, profile.fusion_batch,
                        4 * sum(model.parameters for model in models))]


def memory_gb(network: Network, batch: int) -> float:
    """GPU memory that training takes: the parameters' states, and what `batch` rows keep for the backward pass."""
    return (STATES * network.parameters + batch * network.kept) / 1e9


def fitting_batch(network: Network, batch: int, gpu: Gpu) -> int:
    """The largest of batch, batch/2, batch/4 ... that fits the GPU; 0 if not even one row does."""
    while batch and memory_gb(network, batch) > USABLE * gpu.memory:
        batch //= 2
    return batch


def cache_gb(profile: h.Profile, rows: int) -> float:
    """Disk that the decoded pictures take, once for each size that is used."""
    sizes = {profile.image_size, profile.region_size}
    return profile.cache_pictures * sum(cache_bytes(rows, size) for size in sizes) / 1e9


def cache_bytes(rows: int, size: int) -> int:
    """Bytes of `rows` decoded pictures: 3 a pixel."""
    return rows * 3 * size ** 2


def cost_table(profile: h.Profile, splits: Sequence[str], seeds: Sequence[int], sizes: Sizes) -> pd.DataFrame:
    """What each stage costs on each GPU, a row for each split, stage and GPU; nothing is run.

    Columns: split, stage, runs (how many seeds), gpu; for one run: pflop (10^15), hours, memory_gb (NaN: features
    alone), disk_gb (kept), checkpoint_gb (while it trains); device_batch: rows on the GPU at a time, 0 if none fits.
    """
    rows = []
    for split in splits:
        for work in stage_work(profile, split, sizes):
            batch = min(work.batch, profile.device_batch or work.batch)
            trains = work.batch and work.kind != "fusion"
            common = {"split": split, "stage": work.stage, "runs": len(seeds), "pflop": work.flop / 1e15,
                      "memory_gb": memory_gb(work.network, batch) if batch else math.nan, "disk_gb": work.disk / 1e9,
                      "checkpoint_gb": 2 * 12 * work.network.parameters / 1e9 if trains else 0.0}
            for name, gpu in GPUS.items():
                peak = 1e12 * (gpu.single if profile.precision == "float32" else gpu.half)
                rows.append({**common, "gpu": name, "hours": work.hours(peak),
                             "device_batch": fitting_batch(work.network, batch, gpu), "batch": batch})
    return pd.DataFrame(rows)


def longest_path(costs: pd.DataFrame, gpu: str) -> float:
    """Hours until all is done if each stage has a GPU of its own as soon as the stages that it reads are there."""
    def end(hours: pd.Series, stage: str) -> float:
        return hours.get(stage, 0.0) + max((end(hours, other) for other in h.READS[stage]), default=0.0)

    runs = costs[costs["gpu"] == gpu].groupby("split")
    return max(end(run.set_index("stage")["hours"], stage) for _, run in runs for stage in run["stage"])


def readable_costs(costs: pd.DataFrame, pictures_gb: float) -> pd.DataFrame:
    """`cost_table` for reading: a row a stage, all its runs together; hours by GPU; totals, caches, longest path."""
    def number(value: float) -> str:
        if math.isnan(value):
            return "-"
        if 0 < value < 0.01:
            return "<0.01"
        return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"

    paths = [longest_path(costs, gpu) for gpu in GPUS]
    costs = costs.assign(**{name: costs[name] * costs["runs"] for name in ("hours", "pflop", "disk_gb")})
    once, names = costs.drop_duplicates(["split", "stage"]), [f"{name} {gpu.memory} GB" for name, gpu in GPUS.items()]
    rows = []
    for stage, group in costs.groupby("stage", sort=False):
        mine = once[once["stage"] == stage]
        row = {"stage": stage, "PFLOP": number(mine["pflop"].sum()), "GPU memory (GB)": number(mine["memory_gb"].max()),
               "disk (GB)": number(mine["disk_gb"].sum())}
        for name, (_, on_gpu) in zip(names, group.groupby("gpu", sort=False)):
            batch = on_gpu["device_batch"].iloc[0]
            note = "" if batch == on_gpu["batch"].iloc[0] else f" ({batch})" if batch else " (no)"
            row[name] = number(on_gpu["hours"].sum()) + note
        rows.append(row)
    checkpoints = once["checkpoint_gb"].max()
    rows += [{"stage": "picture cache", "disk (GB)": number(pictures_gb)},
             {"stage": "checkpoints, one stage", "disk (GB)": number(checkpoints)},
             {"stage": "all, one after another", "PFLOP": number(once["pflop"].sum()),
              "GPU memory (GB)": number(once["memory_gb"].max()),
              "disk (GB)": number(once["disk_gb"].sum() + pictures_gb + checkpoints),
              **{name: number(costs.loc[costs["gpu"] == gpu, "hours"].sum()) for name, gpu in zip(names, GPUS)}},
             {"stage": "a GPU for each stage", **dict(zip(names, map(number, paths)))}]
    return pd.DataFrame(rows).fillna("")


def print_costs(console: Console, runs: Sequence[h.Run]) -> None:
    """The costs of a study as a table, with the assumptions below it."""
    profile = runs[0].profile
    splits, seeds = (list(dict.fromkeys(getattr(run, name) for run in runs)) for name in ("split", "seed"))
    sizes = find_sizes(profile)
    costs = cost_table(profile, splits, seeds, sizes)
    table = Table(title=f"Profile {profile.name}, {sizes.rows:,} rows, splits {' and '.join(splits)}, {len(seeds)} "
                        f"seed(s): {len(splits) * len(seeds)} run(s). Hours on one GPU", title_justify="left",
                  box=rich.box.SIMPLE)
    readable = readable_costs(costs, cache_gb(profile, sizes.rows))
    for column in readable:
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in readable.itertuples(index=False):
        if row[0] in ("picture cache", "all, one after another"):
            table.add_section()
        table.add_row(*row)
    console.print(table)
    console.print(ASSUMPTIONS.format(**UTILISATION) + sizes.source, highlight=False)
