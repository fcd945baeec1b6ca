"""What a run needs: one list of checks, for `run.py doctor` and for `run.py study` alike.

Each check is ok, a warning (a run can do without), or fatal. `study` asks the quick ones, and stops
at the first fatal one before anything starts.
"""
from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shutil
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import psutil
import rich.box
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from commands import costs
from commands.inputs import (
    Check,
    check_catalogue,
    check_counts,
    check_pictures,
    decode_all,
    decode_some,
    fault,
    judge,
)
from commands.networks import check_networks, check_weights_here, check_weights_on_hub
from engine import settings
from engine.files import printable, read_json
from engine.keys import folder_of
from engine.picture_cache import cache_bytes
from engine.progress import cores
from engine.runs import Run, cache_folder, runs_folder
from engine.settings import SPLITS

# --- the machine and the libraries ----------------------------------------------------------------
# An encoder in training, the features, the tables.
MEMORY_GB = {"sample": 4, "paper": 12, "modern": 12}


def check_disk(run: Run) -> list[Check]:
    """Free space for stages and decoded pictures, against what both splits with this seed need."""
    (networks,) = check_networks(run)
    wrong = networks.found if networks.state == "fatal" else fault(costs.find_sizes, run.profile)
    if wrong:
        return [Check("disk", "warning", f"not computed: {wrong}", "correct this first")]
    sizes = costs.find_sizes(run.profile)
    table = costs.cost_table(run.profile, list(SPLITS), [run.seed], sizes)
    pictures = costs.cache_gb(run.profile, sizes.rows)
    places = {"runs": (runs_folder(), costs.disk_gb(table), stage_files(run)),
              "data/cache": (cache_folder(), pictures, picture_files(run, sizes.rows))}
    checks, needed_on = [], {}
    for name, (folder, need, files) in places.items():
        there = nearest(folder)
        used = min(sum(path.stat().st_size for path in files) / 1e9, need)
        disk = there.stat().st_dev
        needed_on[disk] = needed_on.get(disk, 0) + need - used  # both may lie on the same one
        free = shutil.disk_usage(there).free / 1e9
        found = (f"{free:,.1f} GB free; both splits with one seed need {need:.1f} GB, {used:.1f} "
                 "GB of it are used")
        checks.append(judge(
            f"disk, {name}", found, found * bool(free < needed_on[disk]),
            "make room, name another folder in STUDY_RUNS, or use cache_pictures=False"))
    return checks


def nearest(folder: Path) -> Path:
    """The folder itself, or the lowest of those above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def check_places(run: Run) -> list[Check]:
    """Whether what a run makes can be written."""
    def write(folder: Path) -> None:
        with tempfile.TemporaryFile(dir=nearest(folder)) as file:
            file.write(b"room")

    places = {"STUDY_RUNS": runs_folder, "STUDY_CACHE": cache_folder}
    checks = []
    for variable, find in places.items():
        wrong = fault(find)
        if not wrong and (why := fault(write, find())):
            wrong = f"nothing can be written below {find()} ({why})"
        checks.append(judge(f"place of {variable}", "can be written", wrong,
                            f"name another folder in {variable}"))
    return checks


def stage_files(run: Run) -> list[Path]:
    """The files of the stages on which this run stands, with either split."""
    others = [dataclasses.replace(run, split=split).folder for split in SPLITS]
    stages = [(read_json(folder / "stages.json") or {}).items() for folder in others]
    folders = {folder_of(*stage) for pairs in stages for stage in pairs}
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def picture_files(run: Run, rows: int) -> list[Path]:
    """The files of decoded pictures that are as large as this run's."""
    sizes = (run.profile.image_size, run.profile.region_size)
    ours = {cache_bytes((rows, 3, size, size)) for size in sizes}
    return [path for path in cache_folder().glob("pictures-*.bin") if path.stat().st_size in ours]


def check_machine(run: Run) -> list[Check]:
    """Memory, processor cores and GPUs."""
    name, memory = run.profile.name, psutil.virtual_memory()
    free, need = memory.available / 1e9, MEMORY_GB[name]
    found = f"{free:.1f} of {memory.total / 1e9:.1f} GB free; profile {name} needs {need} GB"
    checks = [judge("memory", found, found * (free < need),
                    "close other programs, or use --set limit=300", "warning"),
              Check("processor", "ok" if cores() > 1 else "warning", f"{cores()} cores")]
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for i, gpu in enumerate(gpus):
        kind = "bf16" if gpu.major >= 8 else "fp16, no bf16"
        found = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, {kind}"
        checks.append(Check(f"GPU {i}", "ok", found))
    if not gpus:
        slow = "none: fine-tuning base-size encoders on all rows would take weeks"
        checks.append(judge(
            "GPU", "none; the sample needs none", slow * (name != "sample"),
            "for a small real run on a CPU: --set limit=300 --set freeze_encoders=True", "warning"))
    return checks


def check_report(run: Run) -> list[Check]:
    """Whether the package is here to which fine-tuning is to report."""
    where = run.profile.report_to
    if where == "none":
        return []
    packages = {"tensorboard": ("tensorboardX", "tensorboard")}.get(where, (where,))
    lacks = not any(map(find_spec, packages))
    return [judge("report_to", where, f"no package {where} is installed" * lacks,
                  f".venv/bin/python -m pip install {packages[0]}, or set report_to=none")]


def check_versions(run: Run) -> list[Check]:
    """Installed libraries beside the pins of requirements.txt."""
    lines = (settings.ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.partition("#")[0].strip().split("==") for line in lines if "==" in line)
    other = []
    for name, pin in pins.items():
        try:
            installed = importlib.metadata.version(name).partition("+")[0]  # torch adds "+cpu"
        except importlib.metadata.PackageNotFoundError:
            installed = "not installed"
        if installed != pin:
            other.append(f"{name} {installed} instead of {pin}")
    found = f"Python {platform.python_version()}, all {len(pins)} libraries as pinned"
    todo = "pip install -r requirements.txt -c constraints.txt; numbers may differ otherwise"
    return [judge("versions", found, "; ".join(other), todo, "warning")]


# --- the list -------------------------------------------------------------------------------------
# Quick checks decide in seconds whether a study can run: of its settings alone, or of its
# catalogue too. The others are the doctor's.
CHECKS = {
    check_places: "settings",
    check_report: "settings",
    check_networks: "settings",
    check_weights_here: "settings",
    check_weights_on_hub: "doctor",
    check_catalogue: "catalogue",
    check_counts: "doctor",
    check_pictures: "catalogue",
    decode_some: "doctor",
    check_disk: "doctor",
    check_machine: "doctor",
    check_versions: "doctor",
}


def check_up(run: Run, all_pictures: bool = False) -> list[Check]:
    """All checks of a run."""
    instead = {decode_some: decode_all} if all_pictures else {}
    return [check for look in CHECKS for check in instead.get(look, look)(run)]


def refuse_fatal(*runs: Run, needs_catalogue: bool = True) -> list[str]:
    """ValueError for the first of the quick checks that is fatal: what was found, what to do.
    Else what they warn of in the catalogue, in the same words.

    The runs differ in split and seed alone, so their settings are looked at once.
    """
    warned = []
    looks = [(look, runs[0]) for look, kind in CHECKS.items() if kind == "settings"]
    if needs_catalogue:
        looks += [(look, run) for look, kind in CHECKS.items() if kind == "catalogue"
                  for run in runs]
    for look, run in looks:
        for check in look(run):
            said = "; ".join(filter(None, (check.found, check.todo)))
            if check.state == "fatal":
                raise ValueError(said)
            if check.state == "warning" and CHECKS[look] == "catalogue":
                warned.append(f"{check.name}: {said}")
    return list(dict.fromkeys(warned))


def print_checks(console: Console, checks: Iterable[Check]) -> None:
    """The checks as a table, one row each."""
    table = Table("check", "state", box=rich.box.SIMPLE)
    for column in ("found", "what to do"):
        table.add_column(column, overflow="fold")  # names of files are never cut
    colours = {"ok": "green", "warning": "yellow", "fatal": "red"}
    for check in checks:
        words = (escape(printable(said)) for said in (check.found, check.todo))
        table.add_row(check.name, f"[{colours[check.state]}]{check.state}[/]", *words)
    console.print(table)
