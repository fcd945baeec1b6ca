"""A class's kit: what a run's notebooks have made, in one archive, so that no class waits."""
from __future__ import annotations

import json
import zipfile
from pathlib import Path

from commands.plan import NOTEBOOKS, Step, state
from commands.store import size_of
from engine.files import put_in_place, read_json
from engine.keys import folder_of
from engine.runs import runs_folder

FIRST_OF_CLASS = "07_hierarchical_fusion"
ABOUT = """\
# The class kit of {name}

Unpack it in the study's folder, a clean clone: its `runs` joins that folder's own. Then

    .venv/bin/python run.py status --split {split}

says what is done; {first}.

It holds {n} stages ({size:.0f} MB) and the executed notebooks that made them. The sample's
pictures are drawn anew when the first notebook starts, which takes half a minute. A stage is found
by its key, the hash of the code and the settings that made it. In another version of the study the
keys differ: then `run.py status` says stale, and the notebooks make their own.
"""


def write_kit(plan: list[Step], everything: bool, target: Path) -> Path:
    """Pack the stages and executed notebooks of a plan into `target`; its path.

    What the notebooks 01 to 06 have made, so that a class begins with 07; with `everything` what
    all have, so that none trains. ValueError for a notebook that is not done.
    """
    steps = [step for step in plan if everything or step.notebook < FIRST_OF_CLASS]
    for step in steps:
        if state(step) != "done":
            raise ValueError(f"{step} is {state(step)}; run `python run.py study` first")
    stages = {}
    for step in steps:
        stages |= read_json(step.manifest)["stages"]
    folders = sorted({folder_of(name, key) for key, name in stages.items()})
    target.parent.mkdir(parents=True, exist_ok=True)
    with (put_in_place(target) as partial,
          zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive):
        archive.writestr("runs/CLASS_KIT.md", about(steps, folders))
        for path, named in known_stages(stages).items():
            archive.writestr(place_of(path), json.dumps(named, indent=1))
        for path in files_of(folders, steps):
            archive.write(path, place_of(path))
    return target


def files_of(folders: list[Path], steps: list[Step]) -> list[Path]:
    """The files of stages, and of executed notebooks."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return files + [path for step in steps for path in (step.output, step.manifest)]


def known_stages(stages: dict[str, str]) -> dict[Path, dict[str, str]]:
    """Each run's stages.json, without what is not among `stages`; a run that has none is left out.

    `run.py clean --unused` keeps what stands there.
    """
    found = {}
    for path in sorted(runs_folder().glob("*/*/*/*/stages.json")):
        named = {name: key for name, key in read_json(path).items() if key in stages}
        found |= {path: named} if named else {}
    return found


def place_of(path: Path) -> str:
    """Where a file of the runs lies in the archive."""
    return (Path("runs") / path.relative_to(runs_folder())).as_posix()


def about(steps: list[Step], folders: list[Path]) -> str:
    """What the archive is, for who opens it."""
    left = NOTEBOOKS[NOTEBOOKS.index(steps[-1].notebook) + 1:]
    first = f"{left[0]} is the first notebook that is not" if left else "all notebooks are"
    return ABOUT.format(name=steps[0].run.name, split=steps[0].run.split, first=first,
                        n=len(folders), size=sum(map(size_of, folders)) / 1e6)
