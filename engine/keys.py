"""The key of a stage: the hash of its name, of the code that makes it and the settings that this
code reads, of the contents that it is given, and of the keys of the stages that it reads.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from engine import fingerprint
from engine.files import hash_json, read_json, write_json
from engine.looks import once, refuse_changed
from engine.runs import Run, runs_folder
from engine.settings import SPEED_ONLY, StageInfo, stage_info

MAKERS: dict[str, Callable[[Run, str, Path], dict]] = {}
TOGETHER: set[str] = set()


def makes(*kinds: str, together: bool = False) -> Callable:
    """Mark `build(run, name, folder) -> metrics` as what makes the stages of these kinds.

    One that several processes can do `together` is called in each of them.
    """
    def mark(build: Callable) -> Callable:
        MAKERS.update(dict.fromkeys(kinds, build))
        TOGETHER.update(kinds if together else ())
        return build

    return mark


def kind_of(name: str) -> str:
    """"fusion" of "fusion-concat-add"; another stage's name is its kind."""
    return name if name in MAKERS else name.partition("-")[0]


def info_of(run: Run, name: str) -> StageInfo:
    """The notebook that makes a stage of this run, and the stages that it reads; `scores` those of
    the run's own fusions too.
    """
    info = stage_info(name, run.profile.freeze_encoders)
    if name != "scores":
        return info
    own = tuple(f"fusion-{z}-{z}" for z in run.own_fusions)
    return dataclasses.replace(info, reads=info.reads + own)


def recipe_of(run: Run, name: str) -> dict:
    """All that decides what a stage contains: code, settings, contents, keys of what it reads."""
    return once(_look_up_recipe, run, name)


def _digest(run: Run, name: str, function: str) -> tuple:
    """What gives the digest of what a function of `content` gives to a stage: (function, its
    arguments).
    """
    digest = fingerprint.DIGESTS[function]
    return (digest, run, name) if digest in fingerprint.OF_STAGE else (digest, run)


def refuse_changed_contents(run: Run, name: str) -> None:
    """Changed if a stage would now be given other contents than at the beginning of this look."""
    for function in recipe_of(run, name)["contents"]:
        refuse_changed(*_digest(run, name, function))


def _look_up_recipe(run: Run, name: str) -> dict:
    code = fingerprint.code_of(MAKERS[kind_of(name)])
    values = vars(run.profile) | {"split": run.split, "seed": run.seed}
    return {
        "stage": name,
        "code": code.hash,
        "settings": {key: values[key] for key in code.settings if key not in SPEED_ONLY},
        "contents": {key: once(*_digest(run, name, key)) for key in code.contents},
        "reads": {other: key_of(run, other) for other in info_of(run, name).reads},
    }


def key_of(run: Run, name: str) -> str:
    """The key of a stage of this run, whether it has been made or not."""
    return hash_json(recipe_of(run, name))


def folder_of(name: str, key: str) -> Path:
    """Where the stage with this key lies."""
    return runs_folder() / "stages" / f"{name}-{key[:8]}"


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write what a stage was made from and how it went, with the hash of all that."""
    write_json(folder / "manifest.json", manifest | {"sealed": hash_json(manifest)})


def manifest_of(folder: Path) -> dict | None:
    """What `write_manifest` has written; None if it is missing or no longer the same."""
    manifest = read_json(folder / "manifest.json") or {}
    sealed = manifest.pop("sealed", "")
    return manifest if sealed == hash_json(manifest) else None


def differences(wanted: dict, made: dict) -> list[str]:
    """How a stage that has been made differs from a recipe, in words; what it reads apart."""
    found = [f"{key}={made['settings'][key]}" for key, value in wanted["settings"].items()
             if made["settings"].get(key, value) != value]
    found += ["other code"] if made["code"] != wanted["code"] else []
    return found + [f"another {key}" for key, value in wanted["contents"].items()
                    if made["contents"].get(key) != value]
