"""`run.py doctor --encoders`: encoders that the slots take, each built with random weights."""
from __future__ import annotations

import tomllib
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig

import helpers as h
from engine.files import one_line
from engine.image_models import make_network, refusal
from engine.settings import ROOT
from engine.text_checkpoints import refuse_blind_first_token

FILE = ROOT / "data" / "encoders.toml"
SIDE, TILE = 224, 14  # pixels a side of the paper's pictures and tiles
LAYERS = 2  # of a text encoder that is run; its other layers are the same


def read_encoders() -> dict[str, list[dict]]:
    """The entries of data/encoders.toml, of texts and of images."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def encoder_rows() -> Iterator[dict[str, str]]:
    """Of each encoder in data/encoders.toml: slot, name, width, millions of parameters, what it
    reads, the setting that fits, and "ok" or why it does not work.
    """
    known = read_encoders()
    looks = {"text": look_at_text, "image": look_at_image}
    for slot, look in looks.items():
        for entry in known[slot]:
            row = dict.fromkeys(("width", "parameters", "reads", "setting"), "")
            try:
                row |= look(entry) | {"state": "ok"}
            except Exception as error:  # each network fails in its own way
                row["state"] = one_line(error)
            yield {"slot": slot, "name": entry["name"], **row}


def listed_config(name: str) -> PretrainedConfig | None:
    """The configuration of a text encoder in data/encoders.toml; None of another."""
    entries = [entry for entry in read_encoders()["text"] if entry["name"] == name]
    return config_of(entries[0]) if entries else None


def config_of(entry: dict, **changes: int) -> PretrainedConfig:
    """An entry's configuration, with some of its sizes changed."""
    return CONFIG_MAPPING[entry["type"]](**entry["config"] | changes)


def look_at_text(entry: dict) -> dict[str, str]:
    """Width, size and pooling of a text encoder; ValueError if its vector is no text's."""
    with torch.device("meta"):
        whole = AutoModel.from_config(config_of(entry)).eval()
    layers = "n_layers" if entry["type"] == "flaubert" else "num_hidden_layers"
    model = AutoModel.from_config(config_of(entry, **{layers: LAYERS})).eval()
    if entry["pooling"] == "first":
        refuse_blind_first_token(entry["name"], model)
    check_vectors(h.TextEncoder(model, entry["pooling"]), whole.config.hidden_size)
    return {"width": f"{whole.config.hidden_size:,}", "parameters": millions(whole),
            "reads": f"{entry['longest']:,} tokens", "setting": f"pooling={entry['pooling']}"}


@torch.inference_mode()
def check_vectors(encoder: nn.Module, width: int) -> None:
    """ValueError unless a text gives one vector of `width` numbers, the same beside a longer one.
    """
    ids, mask = torch.full((2, 9), 7), torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    together, alone = encoder(ids, mask), encoder(ids[:1, :5], mask[:1, :5])
    if list(together.shape) != [2, width]:
        raise ValueError(f"two texts give {list(together.shape)} numbers instead of {[2, width]}")
    if not torch.allclose(together[:1], alone, atol=1e-3):
        raise ValueError("a text's vector is another one beside a longer text: padding is read")


def look_at_image(entry: dict) -> dict[str, str]:
    """Width, size and reading of an image network; ValueError if it cannot take a picture."""
    with torch.device("meta"):
        network, expects = make_network(entry["name"], SIDE)
    network = network.to("meta").eval()
    if why := refusal(network, expects.width, SIDE):
        raise ValueError(why)
    tiles = "feature_map" if refusal(network, expects.width, TILE) else "tiles"
    return {"width": f"{expects.width:,}", "parameters": millions(network),
            "reads": f"{SIDE} x {SIDE} pixels", "setting": f"regions={tiles}"}


def millions(network: nn.Module) -> str:
    """A network's parameters, in millions."""
    return f"{h.count_parameters(network) / 1e6:.0f} M"


def print_encoders(console: Console) -> bool:
    """Print the table of encoders; whether all of them work."""
    table, works = Table("slot", "name", "width", "parameters", "reads", "setting", "state"), True
    for row in encoder_rows():
        table.add_row(*row.values())
        works = works and row["state"] == "ok"
    console.print(table)
    return works
