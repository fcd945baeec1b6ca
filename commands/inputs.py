"""What a run is given, looked at: its networks and their weights, its catalogue, its pictures.

The list of all checks is in commands/doctor.py.
"""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open

import helpers as h
from commands import costs
from engine import catalogue
from engine.files import one_line
from engine.image_models import check_network, hub_repository, weight_file
from engine.pictures import decode_picture
from engine.progress import cores
from engine.rows import chosen_labels, chosen_products
from engine.runs import Run, from_root, runs_folder
from engine.settings import PROFILES, TEXT_ENCODERS
from engine.text_models import look_at_checkpoint


@dataclass(frozen=True)
class Check:
    """One thing that a run needs: "ok", "warning" or "fatal"; what was found; what to do."""
    name: str
    state: str
    found: str
    todo: str = ""


def judge(name: str, found: str, wrong: str, todo: str = "", state: str = "fatal") -> Check:
    """ok with what was found; or, if there is something wrong, that and what to do."""
    return Check(name, state, wrong, todo) if wrong else Check(name, "ok", found)


def fault(call: Callable, *arguments: object) -> str:
    """What a call says against its arguments; "" if nothing."""
    try:
        call(*arguments)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


# --- networks and their weights -------------------------------------------------------------------
def check_networks(run: Run) -> list[Check]:
    """Whether the networks can take pictures and regions, and whether texts can be fused."""
    profile, side = run.profile, run.profile.region_size
    texts = [costs.text_config(profile, encoder) for encoder in TEXT_ENCODERS]
    widths = [getattr(config, "hidden_size", None) for config in texts]
    wrong = fault(check_network, profile)
    if not wrong and profile.regions == "tiles":
        picture = torch.empty(1, 3, side, side, device="meta")
        wrong = fault(h.split_regions, picture, profile.grid)
    if not wrong and all(widths):  # of a checkpoint on the hub it is not known yet
        c, f = widths
        fusions = partial(costs.fusion_networks, profile.project, P=1)
        wrong = fault(partial(fusions, T_c=c, D_c=c, T_f=f, D_f=f))
    return [judge("networks", "they fit pictures, regions and each other", wrong,
                  "choose other networks or settings")]


ENCODERS = (*TEXT_ENCODERS, "seresnext")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
                "pytorch_model.bin.index.json")
SHORTEST = 3  # tokens; a checkpoint that is whole reads so many
COMPLETE = ("complete the folder (config.json, weights, and the tokenizer's files: tokenizer.json, "
            "or vocab.json and merges.txt, or sentencepiece.bpe.model)")
CONNECT_FOR_FILE = ("connect to the hub once, or download the weight file: "
                    "--set image_weights=<file>")
CONNECT = "connect to the hub once, or download it elsewhere and name its folder: --set {}=<folder>"


def check_weights_here(run: Run) -> list[Check]:
    """The encoders whose weights need no download: whether they are whole and fit."""
    return [check for encoder in ENCODERS if (check := find_weights(run, encoder))]


def check_weights_on_hub(run: Run) -> list[Check]:
    """The other encoders: whether the hub has their weights. Nothing is downloaded."""
    checks = []
    for encoder in ENCODERS:
        if find_weights(run, encoder) is None:
            source, todo = getattr(run.profile, encoder), CONNECT.format(encoder)
            if encoder == "seresnext":
                source, todo = hub_repository(source), CONNECT_FOR_FILE
            why = why_unreachable(hf_hub_url(source, "config.json"))
            checks.append(judge(
                encoder, f"{source}, on the hub: downloaded when it is first used",
                f"{source}: no folder, not whole in the hub's local cache, {why}" if why else "",
                todo))
    return checks


def find_weights(run: Run, encoder: str) -> Check | None:
    """What lies on this machine for an encoder; None if only the hub may have it."""
    if encoder == "seresnext":
        return find_image_weights(run)
    source, longest = getattr(run.profile, encoder), run.profile.max_length
    if source == "small":
        wrong = (f"freeze_encoders=True needs a checkpoint, and {encoder}=small has learnt nothing "
                 "yet") * run.profile.freeze_encoders
        return judge(encoder, "small, from scratch: no weights needed", wrong,
                     f"set {encoder}=<checkpoint>")
    folder, place = from_root(source), f"folder {from_root(source)}"
    own = folder.is_dir()
    if not own:
        if fault(validate_repo_id, source):
            return Check(encoder, "fatal", f"{source} is neither a folder nor a name on the hub",
                         CONNECT.format(encoder))
        folder, place = cached(source, "config.json"), f"{source}, in the hub's local cache"
    wrong = folder and why_unfit(folder, longest)
    whole = folder and not (wrong and why_unfit(folder, SHORTEST))
    if not own and not whole:
        return None
    # Of a whole one the error says what to set.
    return judge(encoder, f"{place}: configuration, weights and tokenizer", wrong,
                 "" if whole else COMPLETE)


def cached(repository: str, file: str) -> Path | None:
    """The folder in the hub's local cache that holds a file of a repository."""
    path = try_to_load_from_cache(repository, file)
    return Path(path).parent if isinstance(path, str) else None


def why_unfit(folder: Path, max_length: int) -> str:
    """What is wrong with a checkpoint's folder; "" if it is whole and reads `max_length` tokens."""
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        return f"folder {folder} lacks weights ({' or '.join(WEIGHT_FILES[:2])})"
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt"):  # compares the header with the file's length
                pass
    except (OSError, SafetensorError) as error:
        return f"{path} is damaged ({error})"
    return fault(look_at_checkpoint, str(folder), max_length)


def find_image_weights(run: Run) -> Check | None:
    """The image encoder's weights as they lie in a file or in the hub's local cache."""
    name, weights = run.profile.seresnext, run.profile.image_weights
    file = weight_file(weights)
    if weights == "none" or (name == "small" and not file):
        return Check("seresnext", "ok", f"{name}: random weights")
    if file and not file.exists():
        return Check("seresnext", "fatal", f"image_weights={weights}: there is no file {file}",
                     "bring it, or set image_weights=none for random weights")
    wrong = fault(h.ImageEncoder, name, weights) if file else fault(hub_repository, name)
    if wrong or file or cached(hub_repository(name), "model.safetensors"):
        place = f"file {weights}" if file else "in the hub's local cache"
        return judge("seresnext", f"{name}: {place}", wrong)
    return None


@cache
def why_unreachable(url: str) -> str:
    """Why the hub does not answer for a file within 3 seconds; "" if it does."""
    if constants.HF_HUB_OFFLINE:
        return "not asked for, because HF_HUB_OFFLINE is set"
    try:
        get_hf_file_metadata(url, timeout=3)
    except Exception as error:  # each step on the way to the hub has errors of its own
        return f"no answer from {url} ({one_line(error)})"
    return ""


# --- the catalogue and its pictures ---------------------------------------------------------------
LABELLED = 84_916                        # rows of the public table
NOT_MISSING, NOT_BLANK = 55_116, 55_025  # descriptions: cells not missing, the class table's sum
UNLABELLED = {"X_test_update.csv": 13_812, "x_test_task1_phase1.tsv": 937,
              "x_test_task1_phase2.tsv": 8_435}
PICTURES_DECODED, NAMES_SHOWN = 500, 10
SUBSET = "fine for a subset; otherwise get the files again"


def check_catalogue(run: Run) -> list[Check]:
    """Whether there is a catalogue, can be read, and has rows that can be split."""
    if wrong := fault(catalogue.catalogue_folder, run):
        return [Check("catalogue", "fatal", wrong, "get the files as data/README.md says")]
    folder = catalogue.catalogue_folder(run)
    checks = [Check("catalogue", "ok", f"{catalogue.find_layout(folder)} layout in {folder}")]
    if wrong := fault(catalogue.load_catalogue, folder):
        return [*checks, Check("tables", "fatal", wrong, "correct the table or get it again")]
    wrong = fault(lambda: h.make_split(chosen_labels(run), run.split, run.seed))
    return [*checks, judge("rows", f"the {run.protocol} rows can be split {run.split}", wrong,
                           "choose other rows, or get the tables again")]


def chosen_rows(run: Run) -> pd.DataFrame:
    """The run's rows; none, where `check_catalogue` says why."""
    wrong = fault(chosen_products, run)
    return pd.DataFrame() if wrong else chosen_products(run)


def check_counts(run: Run) -> list[Check]:
    """The tables beside what the public ones hold."""
    if chosen_rows(run).empty:
        return []
    folder, public = catalogue.catalogue_folder(run), run.profile.data == PROFILES["paper"].data
    checks = check_rows(catalogue.load_catalogue(folder), public)
    return [*checks, check_unlabelled(folder)] if public else checks


def check_rows(products: pd.DataFrame, public: bool) -> list[Check]:
    """Row counts, for Rakuten's files beside the public ones, and the 27 codes."""
    rows, texts = len(products), products["description"]
    filled, described = int((texts != "").sum()), int(texts.map(h.has_words).sum())
    tables, told = f"{rows:,} labelled rows", f"{filled:,} not missing, {described:,} with words"
    if public:
        tables += f" (public: {LABELLED:,})"
        told += (f" (public: {NOT_MISSING:,}; data/rakuten_classes.csv sums to {NOT_BLANK:,}; "
                 "which rows the difference is, is an open question)")
    other_texts = public and filled != NOT_MISSING and described != NOT_BLANK
    codes = catalogue.load_classes()["prdtypecode"]
    absent = codes[~codes.isin(products["prdtypecode"])].astype(str).tolist()
    lacks = f"{27 - len(absent)} of 27; without a row: {', '.join(absent)}" if absent else ""
    return [judge("tables", tables, tables * (public and rows != LABELLED), SUBSET, "warning"),
            judge("descriptions", told, told * other_texts, SUBSET, "warning"),
            judge("codes", "all 27", lacks, SUBSET, "warning")]


def check_unlabelled(folder: Path) -> Check:
    """The challenge's test table, which only a submission needs."""
    name = "unlabelled table"
    if wrong := fault(catalogue.load_test_products, folder):
        return Check(name, "warning", wrong, "only a submission file needs it")
    table, products = catalogue.test_table(folder), catalogue.load_test_products(folder)
    rows, absent = len(products), len(catalogue.absent_pictures(products))
    found = f"{table}: {rows:,} rows (public: {UNLABELLED[table]:,}), {rows - absent:,} pictures"
    if absent:
        return Check(name, "warning", found, "a submission needs all of their pictures")
    return judge(name, found, found * (rows != UNLABELLED[table]), SUBSET, "warning")


def check_pictures(run: Run) -> list[Check]:
    """Whether each picture of the run's rows is there and not empty."""
    products = chosen_rows(run)
    if products.empty:
        return []
    absent, rows = catalogue.absent_pictures(products), f"{len(products):,}"
    folder = Path(products["picture"].iloc[0]).parent
    wrong = f"{len(absent):,} of {rows} pictures are absent or empty in {folder}: "
    todo = "get them again, or remove their rows from both tables"
    if len(absent) == len(products):
        places = catalogue.LAYOUTS[catalogue.find_layout(catalogue.catalogue_folder(run))]["images"]
        todo = f"unpack them into one of {', '.join(places)}"
    return [judge("pictures", f"{rows} of {rows} in {folder}",
                  wrong + listed(absent, "absent") if absent else "", todo)]


def listed(paths: list[str], what: str) -> str:
    """The names of some files; where they are many, of the first ten, and a file that has all."""
    names = ", ".join(Path(path).name for path in paths[:NAMES_SHOWN])
    if len(paths) <= NAMES_SHOWN:
        return names
    listing = runs_folder() / f"pictures-{what}.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    return f"{names} ...; all of them: {listing}"


def decode_some(run: Run, most: int = 0) -> list[Check]:
    """Whether pictures can be decoded; a random choice, where they are many."""
    products = chosen_rows(run)
    if products.empty:
        return []
    present = sorted(set(products["picture"]) - set(catalogue.absent_pictures(products)))
    most = min(most or PICTURES_DECODED, len(present))
    some = np.random.default_rng(0).choice(present, most, replace=False).tolist()
    with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes outside the interpreter's lock
        size, bar = run.profile.image_size, Console(stderr=True)
        faults = pool.map(lambda path: fault(decode_picture, path, size), some)
        faults = list(track(faults, "decoding pictures", most, console=bar, transient=True))
    unreadable = sorted(path for path, wrong in zip(some, faults) if wrong)
    found = f"{most - len(unreadable):,} of {most:,} decode"
    if most < len(present):
        found += f" (a random choice of {len(present):,}; --all-pictures: all)"
    wrong = f"{found}; {len(unreadable):,} unreadable: {listed(unreadable, 'unreadable')}"
    return [judge("decoding", found, wrong if unreadable else "",
                  "get them again, or remove their rows")]


def decode_all(run: Run) -> list[Check]:
    """Whether all pictures can be decoded."""
    return decode_some(run, len(chosen_rows(run)))
