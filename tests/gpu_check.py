"""What only a CUDA GPU can prove (`make gpu-check`): figures/gpu_check.csv, a line each.

    python tests/gpu_check.py                  all checks; some minutes, no network
    python tests/gpu_check.py features losses  only these; the others' lines in the table stay
    python tests/gpu_check.py --small          small networks, on any device, into the console alone

Networks have their full size and random weights, texts are drawn, as long as the public data's. The
reference is this machine's CPU in float32. It runs with whatever versions are here. A line is
demanded (`met` decides the exit code) or a goal, which is only told.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import AutoModel

import helpers as h
from commands import costs, hours, rehearse
from commands.measuring import device_name, matrix_peak
from engine.processes import device
from engine.runs import Run
from engine.settings import PROFILES, REPRESENTATIONS, Profile, make_profile
from engine.training import RowDataset, precision
from engine.variants import TABLE_VARIANTS
from engine.vectors import encode

TABLE = ROOT / "figures" / "gpu_check.csv"
NETWORKS = ("camembert", "flaubert", "seresnext")
# Largest difference from float32 on the CPU: of vectors as a share of their length, of losses as a
# share of the loss. Convolutions of a GPU round to TF32, with 10 bits.
TOLERANCES = {"float32": 5e-3, "bf16": 5e-2, "fp16": 2e-2}
STEPS, PICTURES = 3, 4
SIZES = costs.Sizes(costs.PUBLIC_ROWS["described"], costs.PUBLIC_TOKENS["described"], "")
RESUMED = ("camembert_title", "seresnext")


@dataclass
class Finding:
    """One line: a value, which may be `limit` at most, or must be that at least."""
    check: str
    what: str
    precision: str
    value: float
    unit: str
    limit: float
    at_least: bool = False
    demanded: bool = True
    note: str = ""

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest distance of two rows as a share of the wanted one's length."""
    distance = (found.double() - wanted.double()).norm(dim=-1)
    return (distance / wanted.double().norm(dim=-1)).max().item()


# --- networks and rows that are the same everywhere -----------------------------------------------
def make_encoder(profile: Profile, name: str) -> nn.Module:
    """An encoder of the profile's size, without dropout, its weights drawn by a seed."""
    torch.manual_seed(0)
    if name == "seresnext":
        return h.ImageEncoder(profile.seresnext, size=profile.image_size)
    config = costs.text_config(profile, name) or costs.BASE_CONFIGS[name]
    for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout",
                  "attention_dropout"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    return h.TextEncoder(AutoModel.from_config(config), profile.pooling)


def text_tokens(profile: Profile, rows: int) -> list[dict]:
    """Drawn texts as long as the public descriptions."""
    rng = np.random.default_rng(0)
    lengths = rehearse.drawn_lengths(SIZES.tokens["description"], rows)
    lengths = np.clip(lengths, 3, profile.max_length)
    return [{"input_ids": rng.integers(5, 2000, int(length)).tolist()} for length in lengths]


def features(profile: Profile, name: str, dtype: torch.dtype) -> Tensor:
    """An encoder's vectors of a few rows; of "regions" equation (2) of full-size pictures."""
    encoder = make_encoder(profile, "seresnext" if name == "regions" else name).eval().to(device())
    if name == "regions":
        pixels = torch.tensor(rehearse.drawn_pictures(profile.region_size, PICTURES))
        return encode(lambda pixels: h.regional_features(encoder, pixels, profile.grid),
                      {"pixels": pixels}, dtype)
    if name == "seresnext":
        pixels = torch.tensor(rehearse.drawn_pictures(profile.image_size, PICTURES))
        return encode(encoder, {"pixels": pixels}, dtype)
    batch = rehearse.pad([row | {"labels": 0} for row in text_tokens(profile, PICTURES)])
    return encode(encoder, {key: batch[key] for key in ("input_ids", "attention_mask")}, dtype)


def losses(profile: Profile, name: str) -> Tensor:
    """Loss of a few steps of fine-tuning, and on other rows after them."""
    encoder = make_encoder(profile, name)
    text = name != "seresnext"
    width = encoder.model.config.hidden_size if text else encoder.width
    batch = profile.text_batch if text else profile.image_batch
    labels = (np.arange(STEPS * batch) % 27).tolist()
    if text:
        train = RowDataset(text_tokens(profile, len(labels)).__getitem__, labels)
    else:
        train = rehearse.picture_rows(profile, labels)
    val = RowDataset(train.row, labels[:batch])
    with tempfile.TemporaryDirectory() as folder:
        curve = h.finetune(
            h.Classifier(encoder, width, dropout=0.0), train, val, Path(folder), profile, epochs=1,
            collate=rehearse.pad if text else default_collate, batch=batch, lr=2e-5,
            weight_decay=0.0, seed=0)
    return torch.tensor(curve[["train_loss", "val_loss"]].to_numpy())


def fusion_losses(profile: Profile) -> Tensor:
    """The last loss of each fusion of Tables II, III and V, on drawn representations."""
    rows, found = 4 * profile.fusion_batch, []
    draw = torch.Generator().manual_seed(0)
    width = profile.text_width
    x = {symbol: torch.randn(rows, width if symbol != "P" else 2 * width, generator=draw)
         for symbol in REPRESENTATIONS}
    x = {symbol: each.to(device()) for symbol, each in x.items()}
    labels = (torch.arange(rows) % 27).to(device())
    train = torch.arange(rows, device=device())
    for variant in TABLE_VARIANTS:
        torch.manual_seed(0)
        plain = replace(profile, dropout=0.0)
        model = h.make_fusion(Run(plain, "90-10", 0), variant, x).to(device())
        curve = h.train_fusion(model, x, labels, train, train[:rows // 4], epochs=2,
                               batch=profile.fusion_batch, lr=1e-3, seed=0, label=variant.name)
        found.append(curve[["train_loss", "val_loss"]].iloc[-1].to_numpy())
    return torch.tensor(np.array(found))


# --- the checks -----------------------------------------------------------------------------------
@cache
def reference(small: bool) -> dict[str, Tensor]:
    """What this machine's CPU gives in float32, in a process that sees no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reference.safetensors"
        words = [sys.executable, __file__, "--reference", str(file), *["--small"] * small]
        subprocess.run(words, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        return load_file(file)


def write_reference(file: Path, profile: Profile) -> None:
    """The tensors that `reference` reads."""
    found = {f"features {name}": features(profile, name, torch.float32)
             for name in (*NETWORKS, "regions")}
    found |= {f"losses {name}": losses(profile, name) for name in NETWORKS}
    found["fusion"] = fusion_losses(profile)
    save_file({name: each.contiguous() for name, each in found.items()}, file)


def check_features(profile: Profile, small: bool) -> Iterator[Finding]:
    """Vectors of each network, whole pictures' and regions' too, as on the CPU."""
    wanted = reference(small)
    for name in (*NETWORKS, "regions"):
        for kind, tolerance in TOLERANCES.items():
            found = features(profile, name, precision(replace(profile, precision=kind)))
            yield Finding("features", name, kind, apart(found, wanted[f"features {name}"]),
                          "share of the vector", tolerance)


def check_losses(profile: Profile, small: bool) -> Iterator[Finding]:
    """Fine-tuning and fusion in each precision, as on the CPU; compiled too."""
    wanted = reference(small)
    ways = {kind: {"precision": kind} for kind in TOLERANCES}
    backend = "aot_eager" if small else "inductor"
    ways["float32, " + backend] = {"precision": "float32", "compile": backend}
    for name in NETWORKS:
        for way, settings in ways.items():
            found = losses(replace(profile, **settings), name)
            yield Finding("losses", name, way, apart(found.T, wanted[f"losses {name}"].T),
                          "share of the loss", TOLERANCES[settings["precision"]])
    yield Finding("losses", "fusion grid", "float32", apart(fusion_losses(profile).T,
                  wanted["fusion"].T), "share of the loss", TOLERANCES["float32"])


def check_memory(profile: Profile, small: bool) -> Iterator[Finding]:
    """When a GPU's memory runs out, fewer rows are taken at a time and the losses stay."""
    if device().type != "cuda":
        return
    whole = torch.cuda.get_device_properties(0).total_memory
    full = replace(profile, precision="float32")
    torch.cuda.reset_peak_memory_stats()
    wanted = losses(full, "camembert")
    needed = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.7 * needed / whole)
    try:
        torch.cuda.reset_peak_memory_stats()
        found = losses(full, "camembert")
        took = torch.cuda.max_memory_allocated()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    yield Finding("out of memory", "camembert", "float32", apart(found.T, wanted.T),
                  "share of the loss", TOLERANCES["float32"])
    yield Finding("out of memory", "camembert", "float32", took / needed, "share of the memory",
                  0.7, note=f"of {needed / 1e9:.1f} GB")


def check_resume(profile: Profile, small: bool) -> Iterator[Finding]:
    """A stage killed in training goes on to the same bytes: `deterministic`, on the sample."""
    with tempfile.TemporaryDirectory() as place:
        calm, rough = Path(place) / "calm", Path(place) / "rough"
        assert make_stages(calm).wait() == 0, "the stages cannot be made"
        killed = []
        for stage in RESUMED:
            process = make_stages(rough)
            until = f"stages/{stage}-*.partial/checkpoints/checkpoint-*/trainer_state.json"
            while process.poll() is None and not list(rough.glob(until)):
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            killed += [stage] if process.wait() == -signal.SIGKILL else []
        assert make_stages(rough).wait() == 0, "the stages that were killed do not go on"
        for stage in RESUMED:
            (wanted,), (found,) = (sorted(runs.glob(f"stages/{stage}-*/manifest.json"))
                                   for runs in (calm, rough))
            hashes = [json.loads(path.read_text())["files"] for path in (wanted, found)]
            others = sum(hashes[1].get(name) != each for name, each in hashes[0].items())
            yield Finding("kill and resume", stage, "auto", others if stage in killed else np.nan,
                          "files that differ", 0, note="" if stage in killed else "not killed")


def make_stages(runs: Path) -> subprocess.Popen:
    """A process that makes two encoders of the sample and what they read."""
    names = ["splits", "text", *RESUMED]
    words = [sys.executable, str(ROOT / "run.py"), "stage", *names, "--split", "90-10",
             "--set", "deterministic=True", "--set", "checkpoint_steps=3"]
    return subprocess.Popen(words, env=os.environ | {"STUDY_RUNS": str(runs)})


def check_speed(profile: Profile, small: bool) -> Iterator[Finding]:
    """Rows a second of each heavy stage, its share of the measured peak (counted without padding),
    memory, and the hours of the paper's whole grid, both splits.
    """
    for kind in ("float32",) if small else ("bf16", "fp16"):
        here = replace(profile, precision=kind)
        runs = [Run(here, split, 0) for split in ("90-10", "80-20")]
        peak, whole = matrix_peak(precision(here)), 0.0
        yield Finding("speed", "matrix product", kind, peak / 1e12, "TFLOP/s", 0, True, False)
        for each in rehearse.rehearse(runs[0], SIZES):
            whole += hours.study_hours(each, runs, SIZES.rows)
            note = ", ".join(filter(None, [f"{each.memory:.1f} GB", each.told]))
            row = each.training or each.reading
            yield Finding("speed", each.stage, kind, 1 / row, "rows a second", 0, True, False, note)
            if each.training:
                goal = 0.4 if each.stage in h.TEXT_STAGES else 0.0
                yield Finding("share of the peak", each.stage, kind, each.flop / row / peak,
                              "of matrix products", goal, True, False)
        yield Finding("whole grid", "both splits", kind, whole, "hours", 3, demanded=False)


def check_loading(profile: Profile, small: bool) -> Iterator[Finding]:
    """How much of a training step on pictures is waiting for them."""
    encoder = make_encoder(profile, "seresnext")
    run, size = Run(profile, "90-10", 0), profile.image_size
    model = h.Classifier(encoder, encoder.width, dropout=0.0)
    at_once = torch.tensor(rehearse.drawn_pictures(size, 1)[0])

    def ready(rows: int) -> RowDataset:
        return RowDataset(lambda i: {"pixels": at_once}, [0] * rows)

    with tempfile.TemporaryDirectory() as place:
        real = rehearse.rehearse_training(run, encoder, Path(place))
        bare = rehearse.trained(run, model, ready, default_collate, profile.image_batch,
                                Path(place), workers=real.fastest["loader_workers"])
    yield Finding("loading", "seresnext", profile.precision, max(0.0, 1 - bare / real.training),
                  "share of a step", 0.1, demanded=False, note=real.told)


CHECKS: dict[str, Callable[[Profile, bool], Iterator[Finding]]] = {
    "features": check_features, "losses": check_losses, "memory": check_memory,
    "resume": check_resume, "speed": check_speed, "loading": check_loading}


def write_table(findings: list[Finding], asked: list[str], path: Path) -> None:
    """The findings as a table on the disk; lines of checks that were not asked for stay."""
    found = pd.DataFrame([{"device": device_name(), "torch": torch.__version__, **asdict(each),
                           "met": each.met} for each in findings])
    if path.exists() and set(asked) < set(CHECKS):
        before = pd.read_csv(path)
        found = pd.concat([before[~before["check"].isin(found["check"])], found])
    found.to_csv(path, index=False)


def main(words: list[str] | None = None) -> int:
    """Run the checks that are asked for; 1 if one that is demanded is not met."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checks", nargs="*", default=list(CHECKS), metavar="|".join(CHECKS))
    parser.add_argument("--small", action="store_true", help="small networks, on any device")
    parser.add_argument("--to", type=Path, help="another table")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(words)
    small = chosen.small
    profile = make_profile("sample", {"text_width": 64}) if small else PROFILES["paper"]
    if chosen.reference:
        write_reference(chosen.reference, profile)
        return 0
    if not small and device().type != "cuda":
        print("error: no CUDA GPU is here; --small checks small networks on the CPU",
              file=sys.stderr)
        return 1
    table = Table("check", "what", "precision", "value", "unit", "limit", "met", "note",
                  title=f"{device_name()}, torch {torch.__version__}")
    findings = []
    for name in chosen.checks:
        for each in CHECKS[name](profile, small):
            findings.append(each)
            table.add_row(each.check, each.what, each.precision, f"{each.value:.3g}", each.unit,
                          f"{each.limit:g}", str(each.met), each.note)
    Console(width=150).print(table)
    if path := chosen.to or (None if small else TABLE):
        write_table(findings, chosen.checks, path)
    return int(any(each.demanded and not each.met for each in findings))


if __name__ == "__main__":
    sys.exit(main())
