"""What a run needs, checked before it starts: `run.py doctor`.

Files, pictures, machine, versions and weights, each ok, warning or missing, with what to do.
"""
from __future__ import annotations

import dataclasses
import http.client
import importlib.metadata
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
import psutil
import rich.box
import torch
from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

import costs
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


LABELLED = 84_916                        # rows of the public table
NOT_MISSING, NOT_BLANK = 55_116, 55_025  # descriptions: cells that are not missing, and the class table's sum
UNLABELLED = {"X_test_update.csv": 13_812, "x_test_task1_phase1.tsv": 937, "x_test_task1_phase2.tsv": 8_435}
PICTURES_DECODED, NAMES_SHOWN = 500, 10


def check_up(run: h.Run, all_pictures: bool = False) -> list[Check]:
    """All checks of the run's profile, the catalogue first."""
    checks, products = check_catalogue(run)
    if products is not None:
        checks += check_pictures(run, products, all_pictures)
    return [*checks, *check_disk(run), *check_machine(run.profile), check_versions(),
            *(check_text_weights(encoder, getattr(run.profile, encoder), run.profile.max_length)
              for encoder in h.TEXT_ENCODERS),
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
    return checks + check_rows(products, public) + ([check_unlabelled(folder)] if public else []), products


def check_rows(products: pd.DataFrame, public: bool) -> list[Check]:
    """Row counts, for Rakuten's files beside the public ones, and the 27 codes."""
    rows = len(products)
    filled = int((products["description"] != "").sum())
    described = int((products["description"].str.strip() != "").sum())
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


def check_unlabelled(folder: Path) -> Check:
    """The challenge's test table, which only a submission needs."""
    try:
        table, products = h.test_table(folder), h.load_test_products(folder)
    except (ValueError, OSError) as error:
        return Check("unlabelled table", "warning", str(error), "only a submission file needs it")
    rows, absent = len(products), len(h.absent_pictures(products))
    found = f"{table}: {rows:,} rows (public: {UNLABELLED[table]:,}), {rows - absent:,} pictures"
    if absent:
        return Check("unlabelled table", "warning", found, "a submission needs all of their pictures")
    return Check("unlabelled table", "ok", found) if rows == UNLABELLED[table] else \
        Check("unlabelled table", "warning", found, "fine for a subset; otherwise get the file again")


def check_pictures(run: h.Run, products: pd.DataFrame, all_pictures: bool) -> list[Check]:
    """Whether each picture of the run's rows is there and not empty, and whether they, or some of them, can be decoded.
    """
    try:
        products = h.select_rows(products, run.profile.rows, run.profile.limit, run.seed)
    except ValueError as error:
        return [Check("rows", "missing", str(error), "choose other rows, or get the tables again")]
    paths, missing = products["picture"].tolist(), h.absent_pictures(products)
    present = sorted(set(paths) - set(missing))
    found = f"{len(present):,} of {len(paths):,} ({run.protocol} rows) in {Path(paths[0]).parent}"
    places = ", ".join(h.LAYOUTS[h.find_layout(h.catalogue_folder(run))]["images"])
    todo = "get them again, or remove their rows from both tables" if present else f"unpack them into one of {places}"
    checks = [_named("pictures", found, "absent", missing, todo)]
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

    with ThreadPoolExecutor(h.cores()) as pool:  # Pillow decodes outside the interpreter's lock
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
NPY_HEADER = 128  # bytes before the numbers in a NumPy file
MEMORY_GB = {"sample": 4, "paper": 12}  # paper: one encoder in training, the features of all rows, the tables


def check_disk(run: h.Run) -> list[Check]:
    """Free space where the runs and the picture cache lie, against what both splits with one seed need."""
    profile, cache, runs = run.profile, h.ROOT / "data" / "cache", run.folder.parents[1]  # those of this protocol
    try:
        h.check_image_encoder(profile)
        sizes = costs.find_sizes(profile)
        once = costs.cost_table(profile, list(h.SPLITS), [0], sizes).drop_duplicates(["split", "stage"])
    except ValueError as error:
        return [Check("disk", "warning", f"not computed: {error}", "correct this first")]
    kept = (once["disk_gb"] * once["runs"]).sum() + once["checkpoint_gb"].max()
    ours = {costs.cache_bytes(sizes.rows, size) for size in (profile.image_size, profile.region_size)}
    places = {"runs": (runs, kept, [path for path in runs.rglob("*") if path.is_file()]),
              "data/cache": (cache, costs.cache_gb(profile, sizes.rows), [
                  path for path in cache.glob("pictures-*.npy") if path.stat().st_size - NPY_HEADER in ours])}
    checks, needed_on = [], {}
    for name, (folder, need, files) in places.items():
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        used = min(sum(path.stat().st_size for path in files) / 1e9, need)
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
    memory, need, cores = psutil.virtual_memory(), MEMORY_GB[profile.name], h.cores()
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


def check_text_weights(encoder: str, source: str, max_length: int) -> Check:
    """Where the checkpoint of a text encoder would come from; nothing is downloaded."""
    todo = f"connect to the hub once, {DOWNLOAD.format(encoder)}"
    if source == "small":
        return Check(encoder, "ok", "small, from scratch: no weights needed")
    if (folder := h.from_root(source)).is_dir():
        absent = absent_parts(lambda file: (folder / file).is_file())
        wrong = f"folder {folder} lacks {'; '.join(absent)}" if absent else why_unloadable(folder, max_length)
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


def why_unloadable(folder: Path, max_length: int) -> str:
    """Empty if a checkpoint's configuration loads, its weight file is whole and `max_length` fits, else what is wrong.
    """
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
    try:
        h.check_length(str(folder), max_length)
    except ValueError as error:
        return str(error)
    return ""


def check_image_weights(run: h.Run) -> Check:
    """Where the image encoder's weights would come from, and where those of a finished stage came from."""
    try:
        h.check_image_encoder(run.profile)
    except ValueError as error:
        return Check("seresnext", "missing", str(error), "choose another network or other settings")
    state, found = find_image_weights(run.profile.seresnext, run.profile.image_weights)
    for split in h.SPLITS:
        manifest = h.read_json(dataclasses.replace(run, split=split).folder / "seresnext" / "manifest.json") or {}
        if source := manifest.get("metrics", {}).get("weights_from"):
            found += f"; stage seresnext of {split} was made from {source}"
    return Check("seresnext", state, found, "" if state == "ok" else
                 "connect to the network once, or download the weight file: --set image_weights=<file>")


def find_image_weights(name: str, weights: str) -> tuple[str, str]:
    """("ok" or "missing", where the weights would come from): the first source that is here or answers."""
    sources = h.weight_sources(name, weights)
    if not sources:
        return "ok", f"{name}: random weights"
    for source in sources:
        if source.here:
            return "ok", f"{name}: {source.label}"
        if source.url and not why_unreachable(source.url):
            return "ok", f"{name}: {source.label}, downloaded when it is first used"
    reasons = dict.fromkeys(why_unreachable(source.url) for source in sources if source.url)
    return "missing", "; ".join([f"{name}: not in " + ", ".join(source.label for source in sources), *reasons])


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
