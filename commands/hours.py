"""`run.py rehearse`: from the speeds that were measured here to the hours of the whole study."""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import rich.box
import torch
from rich.console import Console
from rich.table import Table

from commands import costs
from commands.measuring import device_name, matrix_peak
from commands.rehearse import Rehearsed, rehearse
from engine.processes import device, use_threads
from engine.runs import Run, runs_folder
from engine.settings import SPLITS, VALIDATION_SHARE, Profile
from engine.training import precision
from engine.variants import TRAINED_VARIANTS


def hours_of(each: Rehearsed, profile: Profile, split: str, rows: int) -> float:
    """Hours that a stage of one run takes at the measured speed."""
    train = rows * (1 - SPLITS[split]) * (1 - VALIDATION_SHARE)
    epochs = {"seresnext": profile.image_epochs, "image_regions": 0, "image_whole": 0,
              "fusion": profile.fusion_epochs * profile.fusion_seeds * len(TRAINED_VARIANTS)}
    often = epochs.get(each.stage, profile.text_epochs)
    return (often * train * each.training + rows * each.reading) / 3600


def study_hours(each: Rehearsed, runs: Sequence[Run], rows: int) -> float:
    """Hours that a stage takes in all runs together; what frozen encoders give is made once."""
    profile = runs[0].profile
    if profile.freeze_encoders and each.stage != "fusion":
        runs = [run for run in runs if run.split == runs[0].split][:None if profile.limit else 1]
    return sum(hours_of(each, run.profile, run.split, rows) for run in runs)


def paper_hours(runs: Sequence[Run], sizes: costs.Sizes, peak: float) -> tuple[float, str]:
    """The hours of `--dry-run` for this GPU, or at the measured peak where it knows no such device;
    and at which.
    """
    profile, name = runs[0].profile, device_name()
    splits = list(dict.fromkeys(run.split for run in runs))
    seeds = list(dict.fromkeys(run.seed for run in runs))
    known = [gpu for gpu in costs.GPUS if device().type == "cuda" and gpu in name]
    gpus = {gpu: costs.GPUS[gpu] for gpu in known} or {name: (peak / 1e12, peak / 1e12)}
    table = costs.cost_table(profile, splits, seeds, sizes, gpus, device().type == "cuda")
    return (table["hours"] * table["runs"]).sum(), known[0] if known else "the measured peak"


def write_fastest(found: Sequence[Rehearsed]) -> Path:
    """A file for --config with the settings that were fastest here."""
    settings = {name: value for each in found for name, value in each.fastest.items()}
    path = runs_folder() / "rehearsed.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# The fastest on {device_name()}, of those that change no result.",
             *(f"{name} = {value}" for name, value in settings.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def print_rehearsal(console: Console, runs: Sequence[Run]) -> None:
    """Speed, memory, share of the peak and hours of each heavy stage; hours by workers."""
    profile = runs[0].profile
    sizes = costs.find_sizes(profile)
    use_threads(profile)  # as stages are made
    peak, found = matrix_peak(precision(profile)), []
    with console.status("rehearsing") as status:
        for each in rehearse(runs[0], sizes):
            found.append(each)
            status.update(f"rehearsing: {each.stage} is measured")
    table = Table(title=f"Profile {profile.name}, {sizes.rows:,} rows, {len(runs)} run(s), on "
                        f"{device_name()}: {peak / 1e12:.2f} TFLOP/s in matrix products",
                  title_justify="left", box=rich.box.SIMPLE)
    for name in ("stage", "rows a second, training", "reading", "share of the peak", "memory (GB)",
                 "hours, all runs", "fastest with"):
        table.add_column(name, justify="left" if name in ("stage", "fastest with") else "right")
    hours = {each.stage: study_hours(each, runs, sizes.rows) for each in found}
    for each in found:
        table.add_row(*row_of(each, peak), f"{hours[each.stage]:.3f}", each.told)
    console.print(table)
    longest, whole = max(hours.values()) / len(runs), sum(hours.values())
    for workers in range(1, max(1, torch.cuda.device_count()) + 1):
        console.print(f"--workers {workers}: {max(longest, whole / workers):.2f} hours of stages")
    paper, at = paper_hours(runs, sizes, peak)
    console.print(f"On paper (--dry-run, {at}): {paper:.2f} hours; measured is "
                  f"{whole / paper:.1f} times that.", highlight=False)
    console.print(f"What is fastest here: --config {write_fastest(found)}", highlight=False,
                  soft_wrap=True)
    console.print("Notebooks, decoding of pictures and the tables come on top. Weights are random, "
                  f"rows are drawn. Text lengths: {sizes.source}", highlight=False)


def row_of(each: Rehearsed, peak: float) -> list[str]:
    """A stage's speed, share of the peak and memory, for reading."""
    speeds = [1 / seconds if seconds else math.nan for seconds in (each.training, each.reading)]
    share = f"{each.flop / each.training / peak:.0%}" if each.training else ""
    return [each.stage, *map(costs.readable_number, speeds), share, f"{each.memory:.1f}"]
