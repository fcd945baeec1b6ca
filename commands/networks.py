"""A run's networks and their weights, looked at; the list of all checks is in commands/doctor.py.
"""
from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

import helpers as h
from commands import costs
from commands.inputs import Check, fault, judge
from engine.files import one_line
from engine.image_models import check_network, hub_repository, weight_file
from engine.runs import Run, from_root
from engine.settings import TEXT_ENCODERS
from engine.text_checkpoints import load_checkpoint


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
    """What is wrong with a checkpoint's folder; "" if it is whole and reads `max_length` tokens.
    A folder that has not changed is loaded once.
    """
    about = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()]
    return _why_unfit(folder, max_length, tuple(sorted(about)))


@cache
def _why_unfit(folder: Path, max_length: int, about: tuple) -> str:
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        return f"folder {folder} lacks weights ({' or '.join(WEIGHT_FILES[:2])})"
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt"):  # compares the header with the file's length
                pass
    except (OSError, SafetensorError) as error:
        return f"{path} is damaged ({error})"
    return fault(partial(load_checkpoint, here=True), str(folder), max_length)


def find_image_weights(run: Run) -> Check | None:
    """The image encoder's weights as they lie in a file or in the hub's local cache."""
    name, weights = run.profile.seresnext, run.profile.image_weights
    file = weight_file(weights)
    if weights == "none" or (name == "small" and not file):
        return Check("seresnext", "ok", f"{name}: random weights")
    if file and not file.exists():
        return Check("seresnext", "fatal", f"image_weights={weights}: there is no file {file}",
                     "bring it, or set image_weights=none for random weights")
    size = run.profile.image_size
    wrong = fault(h.ImageEncoder, name, weights, size) if file else fault(hub_repository, name)
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
