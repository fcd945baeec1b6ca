"""What a run needs and what it costs, said before it starts.

`run.py doctor` calls `check_up`: files, pictures, machine, versions and weights, each ok, warning or missing.
`run.py study --dry-run` calls `print_costs`: FLOPs measured on torch's meta device, which computes shapes and no
numbers, and from them hours, GPU memory and disk on common GPUs.
"""
from __future__ import annotations

import dataclasses
import http.client
import importlib.metadata
import math
import os
import platform
import shutil
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import pretrainedmodels
import psutil
import rich.box
import torch
from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, CamembertConfig, CamembertTokenizer, FlaubertConfig, PreTrainedConfig

import helpers as h


# ======================================================================================================
# 1  Checks: the catalogue and its pictures
# ======================================================================================================
@dataclass(frozen=True)
class Check:
    """One thing that a run needs: "ok", "warning" (it can do without) or "missing"; what was found; what to do."""
    name: str
    state: str
    found: str
    todo: str = ""


LABELLED, UNLABELLED = 84_916, 13_812    # rows of the public tables
NOT_MISSING, NOT_BLANK = 55_116, 55_025  # descriptions: cells that are not missing, and the class table's sum
UNLABELLED_TABLES = {"ENS": "X_test_update.csv", "SIGIR": "[xX]_test*.tsv"}
PICTURES_DECODED, NAMES_SHOWN = 500, 10


def check_up(run: h.Run, all_pictures: bool = False) -> list[Check]:
    """All checks of the run's profile, the catalogue first."""
    checks, products = check_catalogue(run)
    if products is not None:
        checks += check_pictures(run, products, all_pictures)
    return [*checks, *check_disk(run.profile), *check_machine(run.profile), check_versions(),
            *(check_text_weights(encoder, getattr(run.profile, encoder)) for encoder in h.TEXT_ENCODERS),
            check_image_weights(run)]


def check_catalogue(run: h.Run) -> tuple[list[Check], pd.DataFrame | None]:
    """The tables and what they hold; the products, or None if they cannot be read."""
    try:
        folder = h.catalogue_folder(run)
    except FileNotFoundError as error:
        return [Check("catalogue", "missing", str(error), "get the files as data/README.md says")], None
    layout = h.find_layout(folder)
    checks = [Check("catalogue", "ok", f"{layout} layout in {folder}")]
    try:
        products = h.load_catalogue(folder)
    except (ValueError, OSError) as error:
        return [*checks, Check("tables", "missing", str(error), "correct the table or get it again")], None
    public = run.profile.data == h.PROFILES["paper"].data
    return checks + check_rows(products, public) + (check_unlabelled(folder, layout) if public else []), products


def check_rows(products: pd.DataFrame, public: bool) -> list[Check]:
    """Row counts, for Rakuten's files beside the public ones, and the 27 codes."""
    rows = len(products)
    filled = int((products["description"] != "").sum())
    described = len(h.select_rows(products, "described"))
    tables, texts = f"{rows:,} labelled rows", f"{filled:,} not missing, {described:,} not blank"
    same_rows, same_texts = rows == LABELLED, filled == NOT_MISSING or described == NOT_BLANK
    if public:
        tables += f" (public: {LABELLED:,})"
        texts += (f" (public: {NOT_MISSING:,}; data/rakuten_classes.csv sums to {NOT_BLANK:,}; which rows the "
                  "difference is, is an open question)")
    todo = "fine for a subset; otherwise get the files again"
    absent = h.load_classes().query("prdtypecode not in @products.prdtypecode")["prdtypecode"].tolist()
    return [Check("tables", "warning", tables, todo) if public and not same_rows else Check("tables", "ok", tables),
            Check("descriptions", "warning", texts, todo) if public and not same_texts
            else Check("descriptions", "ok", texts),
            Check("codes", "warning", f"{27 - len(absent)} of 27; without a row: {', '.join(map(str, absent))}", todo)
            if absent else Check("codes", "ok", "all 27")]


def check_unlabelled(folder: Path, layout: str) -> list[Check]:
    """The challenge's test table, which only a submission needs."""
    pattern = UNLABELLED_TABLES[layout]
    if not (found := sorted(folder.glob(pattern))):
        return [Check("unlabelled table", "warning", f"no {pattern} in {folder}", "only a submission file needs it")]
    checks = []
    for path in found:
        try:
            rows = len(pd.read_csv(path, sep=h.LAYOUTS[layout]["separator"], index_col=0, keep_default_na=False))
            checks.append(Check("unlabelled table", "ok" if rows == UNLABELLED else "warning",
                                f"{path.name}: {rows:,} rows (public: {UNLABELLED:,})",
                                "" if rows == UNLABELLED else "fine for a subset; otherwise get the file again"))
        except (ValueError, OSError) as error:
            checks.append(Check("unlabelled table", "warning", f"{path} cannot be read ({error})", "get it again"))
    return checks


def check_pictures(run: h.Run, products: pd.DataFrame, all_pictures: bool) -> list[Check]:
    """Whether each picture of the run's rows is there, and whether they, or some of them, can be decoded."""
    paths = h.select_rows(products, run.profile.rows)["picture"].tolist()
    if not paths:
        return [Check("pictures", "missing", f"no row is left by rows={run.profile.rows!r}", "use --set rows=all")]
    there = {entry.name for folder in {Path(path).parent for path in paths} if folder.is_dir()
             for entry in os.scandir(folder)}
    present = [path for path in paths if Path(path).name in there]
    missing = [path for path in paths if Path(path).name not in there]
    found = f"{len(present):,} of {len(paths):,} (rows: {run.profile.rows}) in {Path(paths[0]).parent}"
    checks = [_named("pictures", found, "absent", missing, "get them again, or remove their rows from both tables")]
    if present:
        some = present
        if not all_pictures and len(present) > PICTURES_DECODED:
            some = sorted(np.random.default_rng(0).choice(present, PICTURES_DECODED, replace=False).tolist())
        unreadable = find_unreadable(some, run.profile.image_size)
        found = f"{len(some) - len(unreadable):,} of {len(some):,} decode"
        found += "" if len(some) == len(present) else f" (a random choice of {len(present):,}; --all-pictures: all)"
        checks.append(_named("decoding", found, "unreadable", unreadable, "get them again, or remove their rows"))
    return checks


def find_unreadable(paths: Sequence[str], size: int) -> list[str]:
    """The pictures that cannot be decoded; several are decoded at a time, and a bar shows how far it is."""
    def fails(path: str) -> bool:
        try:
            h.decode_picture(path, size)
        except ValueError:
            return True
        return False

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter's lock
        failed = track(pool.map(fails, paths), "decoding pictures", len(paths), console=Console(stderr=True),
                       transient=True)
        return [path for path, bad in zip(paths, failed) if bad]


def _named(name: str, found: str, what: str, paths: list[str], todo: str) -> Check:
    """A check that fails if there are `paths`: the first ten by name, all of them in a file if they are more."""
    if not paths:
        return Check(name, "ok", found)
    names = [Path(path).name for path in paths]
    found += f"; {len(names):,} {what}: {', '.join(names[:NAMES_SHOWN])}"
    if len(names) > NAMES_SHOWN:
        listing = h.runs_folder() / f"pictures-{what}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
        found += f" ...; all of them: {listing}"
    return Check(name, "missing", found, todo)


# ======================================================================================================
# 2  Checks: the machine and the libraries
# ======================================================================================================
MEMORY_GB = {"sample": 4, "paper": 12}  # paper: one encoder in training, the features of all rows, the tables


def check_disk(profile: h.Profile) -> list[Check]:
    """Free space where the runs and the picture cache lie, against what both splits with one seed need."""
    sizes = find_sizes(profile)
    costs = cost_table(profile, list(h.SPLITS), [0], sizes)
    once = costs.drop_duplicates(["split", "stage"])
    places = {"runs": (h.runs_folder(), (once["disk_gb"] * once["runs"]).sum() + once["checkpoint_gb"].max()),
              "data/cache": (h.ROOT / "data" / "cache", cache_gb(profile, sizes.rows))}
    checks, needed_on = [], {}
    for name, (folder, need) in places.items():
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
        disk = there.stat().st_dev
        needed_on[disk] = needed_on.get(disk, 0) + max(need - used, 0)  # both may lie on the same one
        free = shutil.disk_usage(there).free / 1e9
        found = f"{free:,.1f} GB free; both splits with one seed need {need:.1f} GB, {used:.1f} GB of it are used"
        short = bool(free < needed_on[disk])
        checks.append(Check(f"disk, {name}", "missing" if short else "ok", found,
                            "make room, name another folder in STUDY_RUNS, or use cache_pictures=False" * short))
    return checks


def check_machine(profile: h.Profile) -> list[Check]:
    """Memory, processor cores and GPUs."""
    memory, need, cores = psutil.virtual_memory(), MEMORY_GB[profile.name], os.cpu_count() or 1
    little = memory.available / 1e9 < need
    found = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free; profile {profile.name} needs {need} GB"
    checks = [Check("memory", "warning" if little else "ok", found,
                    "close other programs, or use --set limit=300" * little),
              Check("processor", "ok" if cores > 1 else "warning", f"{cores} cores")]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        kind = "bf16" if gpu.major >= 8 else "fp16, no bf16"
        checks.append(Check(f"GPU {i}", "ok", f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, {kind}"))
    if torch.cuda.is_available():
        return checks
    if profile.name == "sample":
        return [*checks, Check("GPU", "ok", "none; the sample needs none")]
    return [*checks, Check("GPU", "warning", "none: fine-tuning base-size encoders on all rows would take weeks",
                           "for a small real run on a CPU: --set limit=300 --set freeze_encoders=True")]


def check_versions() -> Check:
    """Installed libraries beside the pins of requirements.txt."""
    lines = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.partition("#")[0].strip().split("==") for line in lines if "==" in line)
    other = []
    for name, pin in pins.items():
        try:
            installed = importlib.metadata.version(name).partition("+")[0]  # torch adds "+cpu"
        except importlib.metadata.PackageNotFoundError:
            installed = "not installed"
        if installed != pin:
            other.append(f"{name} {installed} instead of {pin}")
    if other:
        return Check("versions", "warning", "; ".join(other),
                     "pip install -r requirements.txt -c constraints.txt; numbers may differ otherwise")
    return Check("versions", "ok", f"Python {platform.python_version()}, all {len(pins)} libraries as pinned")


# ======================================================================================================
# 3  Checks: the encoders' weights
# ======================================================================================================
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
                "pytorch_model.bin.index.json")
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("sentencepiece.bpe.model",), ("spm.model",),
                   ("vocab.txt",))  # any of these sets is a tokenizer
MIRROR = "timm/legacy_seresnext50_32x4d.in1k"  # the same weights as pretrainedmodels' se_resnext50_32x4d
DOWNLOAD = "or download it elsewhere and name its folder: --set {}=<folder>"


def absent_parts(has: Callable[[str], bool]) -> list[str]:
    """Which of configuration, weights and tokenizer a checkpoint lacks, where `has(file)` says what it holds."""
    tokenizers = " or ".join(" + ".join(files) for files in TOKENIZER_FILES)
    parts = {"config.json": has("config.json"),
             f"weights ({' or '.join(WEIGHT_FILES[:2])})": any(map(has, WEIGHT_FILES)),
             f"tokenizer files ({tokenizers})": any(all(map(has, files)) for files in TOKENIZER_FILES)}
    return [part for part, there in parts.items() if not there]


def is_cached(checkpoint: str, file: str) -> bool:
    """Whether the hub's local cache holds a file of a checkpoint."""
    try:
        return isinstance(try_to_load_from_cache(checkpoint, file), str)
    except HFValidationError:  # a path, not a name on the hub
        return False


@cache
def why_unreachable(url: str) -> str:
    """Empty if the address answers to one HEAD request, else the reason; HF_HUB_OFFLINE forbids to ask."""
    if constants.HF_HUB_OFFLINE:
        return "not asked for, because HF_HUB_OFFLINE is set"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=3):
            return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"no answer from {url} ({error})"


def check_text_weights(encoder: str, source: str) -> Check:
    """Where the checkpoint of a text encoder would come from; nothing is downloaded."""
    todo = f"connect to the hub once, {DOWNLOAD.format(encoder)}"
    if source == "small":
        return Check(encoder, "ok", "small, from scratch: no weights needed")
    if (folder := Path(source)).is_dir():
        absent = absent_parts(lambda file: (folder / file).is_file())
        wrong = f"folder {folder} lacks {'; '.join(absent)}" if absent else why_unloadable(folder)
        return Check(encoder, "missing", wrong, f"complete the folder, {DOWNLOAD.format(encoder)}") if wrong \
            else Check(encoder, "ok", f"folder {folder}: configuration, weights and tokenizer")
    absent = absent_parts(partial(is_cached, source))
    if not absent:
        return Check(encoder, "ok", f"{source}, in the hub's local cache")
    try:
        reason = why_unreachable(hf_hub_url(source, "config.json"))
    except HFValidationError:
        return Check(encoder, "missing", f"{source} is neither a folder nor a name on the hub", todo)
    if not reason:
        return Check(encoder, "ok", f"{source}, on the hub: downloaded when it is first used")
    return Check(encoder, "missing", f"{source}: no folder, not whole in the hub's local cache, {reason}", todo)


def why_unloadable(folder: Path) -> str:
    """Empty if a checkpoint's configuration loads and its weight file is whole, else what is wrong."""
    try:
        AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        return f"{folder / 'config.json'} cannot be loaded ({error})"
    try:
        if (weights := folder / "model.safetensors").exists():
            with safe_open(weights, "pt"):  # compares the header with the file's length
                pass
    except (OSError, SafetensorError) as error:
        return f"{weights} is damaged ({error})"
    return ""


def check_image_weights(run: h.Run) -> Check:
    """Where the image encoder's weights would come from, and where those of a finished stage came from."""
    state, found = find_image_weights(run.profile.seresnext, run.profile.image_weights)
    for split in h.SPLITS:
        manifest = h.read_json(dataclasses.replace(run, split=split).folder / "seresnext" / "manifest.json") or {}
        if source := manifest.get("metrics", {}).get("weights_from"):
            found += f"; stage seresnext of {split} was made from {source}"
    return Check("seresnext", state, found, "" if state == "ok" else
                 "connect to the network once, or download the weight file: --set image_weights=<file>")


def find_image_weights(name: str, weights: str) -> tuple[str, str]:
    """("ok" or "missing", where the weights would come from): a file, a local cache, an address that answers."""
    if name == "small" or weights == "none":
        return "ok", f"{name}, from scratch: no weights needed"
    if weights != "imagenet":
        return ("ok", f"file {weights}") if Path(weights).is_file() else ("missing", f"there is no file {weights}")
    if name not in pretrainedmodels.pretrained_settings:
        return "ok", f"{name}: its library downloads the weights when they are first used"
    url = pretrainedmodels.pretrained_settings[name]["imagenet"]["url"]
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if file.exists():
        return "ok", f"{name}, file {file}"
    if not (reason := why_unreachable(url)):
        return "ok", f"{name}, at {url}: downloaded when it is first used"
    if name == "se_resnext50_32x4d":
        if any(is_cached(MIRROR, weight_file) for weight_file in WEIGHT_FILES):
            return "ok", f"{name}, {MIRROR} in the hub's local cache"
        if not why_unreachable(hf_hub_url(MIRROR, "model.safetensors")):
            return "ok", f"{name}, {MIRROR} on the hub: downloaded when it is first used"
    return "missing", f"{name}: no file {file}, {reason}"


def print_checks(console: Console, checks: Iterable[Check]) -> None:
    """The checks as a table, one row each."""
    table = Table("check", "state", box=rich.box.SIMPLE)
    for column in ("found", "what to do"):
        table.add_column(column, overflow="fold")  # names of files are never cut
    colours = {"ok": "green", "warning": "yellow", "missing": "red"}
    for check in checks:
        table.add_row(check.name, f"[{colours[check.state]}]{check.state}[/]",
                      *map(rich.markup.escape, (check.found, check.todo)))
    console.print(table)


# ======================================================================================================
# 4  Costs on paper: one network
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
        return AutoConfig.from_pretrained(source, local_files_only=True)
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
    if isinstance(model, h.FlaubertModel):  # it looks at the lengths' values, which meta tensors do not have
        inputs |= {"lengths": torch.tensor([shape[1]]), "attention_mask": torch.ones(shape, device="meta")}
    return measure(model, inputs, profile.precision != "float32")


def text_network(profile: h.Profile, encoder: str, tokens: int) -> Network:
    """A text encoder on one text of `tokens` tokens; what is kept for the backward pass, at the longest length."""
    profile = architecture(profile)
    model = text_model(profile, encoder)
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    forward, training, _ = measure_text(profile, encoder, tokens)
    kept = measure_text(profile, encoder, profile.max_length)[2]
    if profile.gradient_checkpointing:  # each layer's input, and one layer, which is computed again
        training += forward
        kept = kept / layers + layers * profile.max_length * width * (4 if profile.precision == "float32" else 2)
    return Network(sum(p.numel() for p in model.parameters()), width, forward, training, kept)


@cache
def image_networks(profile: h.Profile) -> tuple[Network, Network]:
    """The image encoder on one whole picture, and on the regions of one picture (all its tiles, forward only)."""
    with torch.device("meta"):
        encoder = h.ImageEncoder(profile.seresnext, weights=None)
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
    raw = [dataclasses.replace(variant, standardise=False) for variant in h.TABLE_VARIANTS if variant.head == "basic"]
    found = []
    with torch.device("meta"):
        for variant in (*h.TABLE_VARIANTS, *raw):
            model = h.HierarchicalFusion(widths, variant, project=project)
            costs = measure(model, {name: torch.empty(1, width) for name, width in widths.items()}, half=False)
            found.append(Network(sum(p.numel() for p in model.parameters()), 27, *costs))
    return found


# ======================================================================================================
# 5  Costs on paper: the stages of a study
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
UTILISATION = {"text": 0.40, "image": 0.15, "regions": 0.10, "fusion": 0.01}
USABLE = 0.9            # share of a GPU's memory that tensors get; the rest is CUDA's own
STATES = 16             # bytes a parameter: weight, gradient and AdamW's two moments, in single precision
TOKENS_PER_WORD = 1.8   # 22 tokens of titles of 11 words (see PUBLIC_TOKENS)
# Mean tokens measured on 2,818 product texts with CamemBERT's tokenizer, before the cut; by `rows`.
PUBLIC_TOKENS = {"described": {"title": 22, "description": 141}, "all": {"title": 22, "description": 92}}
ASSUMPTIONS = (
    "FLOPs are measured on shapes alone; hours are FLOPs / (peak x utilisation), and the utilisations are assumptions: "
    "text {text:.0%} (large matrix products), pictures {image:.0%} (grouped convolutions and squeeze-and-excitation "
    "wait for memory), regions {regions:.0%} (maps of one pixel), fusion {fusion:.0%} (small steps). GPU memory is 16 "
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
    except (FileNotFoundError, ValueError):
        rows, tokens = (NOT_MISSING if profile.rows == "described" else LABELLED), PUBLIC_TOKENS[profile.rows]
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
    network: Network
    batch: int
    disk: float


def stage_work(profile: h.Profile, split: str, sizes: Sizes) -> list[Work]:
    """The stages of one run that a GPU makes, in the order of the notebooks."""
    rest = sizes.rows * (1 - h.SPLITS[split])
    train, val, rows = rest * (1 - h.VALIDATION_SHARE), rest * h.VALIDATION_SHARE, sizes.rows
    trained = not profile.freeze_encoders

    def finetuning(network: Network, epochs: int) -> float:
        return trained * epochs * (train * network.training + val * network.forward)

    work, widths = [], {}
    for encoder in h.TEXT_ENCODERS:
        for field in h.FIELDS:
            network = text_network(profile, encoder, sizes.tokens[field])
            widths[f"{field[0].upper()}_{encoder[0]}"] = network.width
            work.append(Work(f"{encoder}_{field}", "text",
                             finetuning(network, profile.text_epochs) + rows * network.forward, network,
                             profile.text_batch * trained, 4 * (network.parameters + rows * network.width)))
    whole, regions = image_networks(architecture(profile))
    work += [Work("seresnext", "image", finetuning(whole, profile.image_epochs), whole, profile.image_batch * trained,
                  4 * whole.parameters),
             Work("image_regions", "image" if profile.regions == "feature_map" else "regions", rows * regions.forward,
                  regions, 0, 4 * rows * whole.width),
             Work("image_whole", "image", rows * whole.forward, whole, 0, 4 * rows * whole.width)]
    models = fusion_networks(profile.project, **widths, P=whole.width)
    flop = profile.fusion_epochs * sum(train * model.training + val * model.forward for model in models)
    return [*work, Work("fusion", "fusion", flop, max(models, key=lambda model: model.parameters), profile.fusion_batch,
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
    """Disk that the decoded pictures take: 3 bytes a pixel, once for each size that is used."""
    sizes = {profile.image_size, profile.region_size}
    return profile.cache_pictures * sum(rows * 3 * size ** 2 for size in sizes) / 1e9


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
                rows.append({**common, "gpu": name, "hours": work.flop / (peak * UTILISATION[work.kind]) / 3600,
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


def print_costs(console: Console, profile: h.Profile, splits: Sequence[str], seeds: Sequence[int]) -> None:
    """The costs of a study as a table, with the assumptions below it."""
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
