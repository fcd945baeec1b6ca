"""What is done, what the stages take on the disk, and which of them no run names any more."""
from __future__ import annotations

import shutil
from pathlib import Path

import rich.box
from rich.console import Console
from rich.table import Table

from commands import plan as plans
from engine.files import read_json
from engine.keys import folder_of, manifest_of
from engine.runs import runs_folder


def print_states(console: Console, plan: list[plans.Step]) -> None:
    """Whether each notebook of a plan is done, stale, damaged or missing, and what it took."""
    table = Table("notebook", "split", "seed", "state", "seconds", "peak memory (GB)")
    for step in plan:
        done = read_json(step.manifest) or {}
        numbers = (str(done.get(name, "")) for name in ("seconds", "peak_memory_gb"))
        table.add_row(step.notebook, step.run.split, str(step.run.seed), plans.state(step),
                      *numbers)
    console.print(table)
    for note in plans.notes_on_versions(plan):
        console.print(note, highlight=False, soft_wrap=True)


def stage_folders() -> list[Path]:
    """All stages that are there, whole or not."""
    place = runs_folder() / "stages"
    return sorted(path for path in place.glob("*") if path.is_dir())


def used_stages() -> set[str]:
    """The names of folders that a run's stages.json names, and those that they were made from."""
    todo = []
    for path in runs_folder().glob("*/*/*/*/stages.json"):
        todo += (read_json(path) or {}).items()
    used = set()
    while todo:
        name, key = todo.pop()
        folder = folder_of(name, key)
        if folder.name not in used:
            used.add(folder.name)
            manifest = manifest_of(folder) or {}
            todo += manifest.get("reads", {}).items()
    return used


def size_of(folder: Path) -> int:
    """Bytes of a folder's files; one that two stages share counts for each."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def print_disk(console: Console) -> None:
    """What each stage takes, and whether a run uses it."""
    used, table = used_stages(), Table("stage", "made for", "MB", "used", box=rich.box.SIMPLE)
    total = 0
    for folder in stage_folders():
        size = size_of(folder)
        total += size
        manifest = manifest_of(folder) or {}
        named = "yes" if folder.name.removesuffix(".partial") in used else "no"
        table.add_row(folder.name, manifest.get("run", "not whole"), f"{size / 1e6:,.1f}", named)
    table.add_section()
    table.add_row("all", "", f"{total / 1e6:,.1f}", "")
    console.print(table)


def clean_unused(console: Console) -> None:
    """Delete the stages that no run names, after saying which; what a stop left of them too."""
    used = used_stages()
    unused = [folder for folder in stage_folders()
              if folder.name.removesuffix(".partial") not in used]
    for folder in unused:
        console.print(f"{folder.name}  {size_of(folder) / 1e6:,.1f} MB", highlight=False)
    for folder in unused:
        shutil.rmtree(folder)
        folder.with_name(f".{folder.name.removesuffix('.partial')}.lock").unlink(missing_ok=True)
    console.print(f"{len(unused)} stages deleted", highlight=False)
