"""A stage: made once, resumed after a stop, found again by its key, refused when damaged.

It lies in `runs/stages/<stage>-<8 digits of its key>`, for all runs, and nothing there is
overwritten. Who reads a stage works out the key that the run needs and opens that folder or none.
"""
from __future__ import annotations

import functools
import importlib.metadata
import platform
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import pandas as pd
import torch
from filelock import Timeout

from engine import fingerprint
from engine.files import full_disk_explained, hash_file, lock_of, make_folder, read_json, write_json
from engine.keys import (
    MAKERS,
    TOGETHER,
    differences,
    folder_of,
    info_of,
    key_of,
    kind_of,
    manifest_of,
    recipe_of,
    refuse_changed_contents,
    write_manifest,
)
from engine.looks import Changed, one_look
from engine.processes import (
    agreed,
    device,
    group,
    launch,
    peak_memory_gb,
    processes_for,
    processor,
    use_threads,
    wait_for_file,
)
from engine.progress import Progress, report_event
from engine.runs import Run, runs_folder
from engine.settings import stage_info

# What a stopped stage goes on from; no part of it.
UNTIL_WHOLE = ("trained.safetensors", "trained.json")
LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "sentencepiece", "accelerate",
             "timm", "pretrainedmodels", "scikit-learn", "scipy", "numpy", "pandas", "nltk",
             "pillow")
# The stages that the one which is being made may read.
_READABLE: ContextVar[tuple[str, ...] | None] = ContextVar("readable", default=None)


class DamagedStage(RuntimeError):
    """A stage's files are not those its manifest lists."""


# --- making ---------------------------------------------------------------------------------------
def stage(run: Run, name: str) -> Path:
    """The folder of stage `name` of this run, made unless it is there.

    What the same notebook makes and this stage reads is made on the way. DamagedStage for a folder
    whose files have changed; CodeChanged if the code has been edited since it was imported.
    """
    with one_look():
        notebook = info_of(run, name).notebook
        for other in info_of(run, name).reads:
            if info_of(run, other).notebook == notebook:
                stage(run, other)
        key = agreed(key_of(run, name))
        folder = folder_of(name, key)
        if not agreed(is_whole(folder)):
            _make(run, name, key, folder)
        check_stage(folder, name, key)
    if group().is_main_process:
        _remember(run, name, key)
    report_event(stage=name, key=key)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a stage is there: its folder has its final name. Nothing else counts."""
    return folder.is_dir()


def is_made(run: Run, name: str) -> bool:
    """Whether the stage `name` that this run needs is there."""
    return is_whole(folder_of(name, key_of(run, name)))


def _make(run: Run, name: str, key: str, folder: Path) -> None:
    """Make a stage in this process, or in as many as the profile says."""
    fingerprint.refuse_changed_code()
    together = kind_of(name) in TOGETHER
    processes = processes_for(run.profile)
    if together and processes > 1 and group().num_processes == 1:
        return launch(run, name, processes)
    with _made_once(folder):
        if agreed(is_whole(folder)):  # another process made it meanwhile
            return None
        partial = folder.with_name(f"{folder.name}.partial")
        if group().is_main_process:
            partial.mkdir(parents=True, exist_ok=True)
        if together:
            wait_for_file(partial)
        finished = group().is_main_process and _was_finished(partial, name, key)
        if not agreed(finished) and (together or group().is_main_process):
            _build(run, name, key, partial)
        if group().is_main_process:
            partial.rename(folder)
        wait_for_file(folder / "manifest.json", {"key": key})


def _was_finished(partial: Path, name: str, key: str) -> bool:
    """Whether a stop left a folder that lacks its final name alone."""
    try:
        return bool(check_stage(partial, name, key))
    except DamagedStage:
        (partial / "manifest.json").unlink(missing_ok=True)
        return False


def _build(run: Run, name: str, key: str, partial: Path) -> None:
    """Let the stage's maker write into `partial`, and add the manifest."""
    start = time.perf_counter()
    use_threads(run.profile)
    # A few operations have no such way, and warn.
    torch.use_deterministic_algorithms(run.profile.deterministic, warn_only=True)
    token = _READABLE.set(info_of(run, name).reads)
    try:
        with full_disk_explained(partial):
            metrics = MAKERS[kind_of(name)](run, name, partial) or {}
        if group().is_main_process:
            refuse_changed_contents(run, name)
    except BaseException as error:
        if group().is_main_process and (isinstance(error, Changed) or not any(partial.iterdir())):
            shutil.rmtree(partial)  # there is nothing to go on from
        raise
    finally:
        _READABLE.reset(token)
    if not group().is_main_process:
        return
    for left in partial.rglob("*.partial"):  # of a stop while a file was written
        left.unlink()
    files = (path for path in sorted(partial.rglob("*")) if path.is_file())
    hashes = {str(path.relative_to(partial)): hash_file(path) for path in files
              if path.name not in UNTIL_WHOLE}
    write_manifest(partial, {
        **recipe_of(run, name), "key": key, "run": run.name, "metrics": metrics,
        "seconds": round(time.perf_counter() - start, 2),
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "device": str(device()), "processor": processor(),
        "threads": torch.get_num_threads(), "processes": group().num_processes,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "python": platform.python_version(), "versions": _versions(), "files": hashes})


def _versions() -> dict[str, str]:
    """The libraries that decide numbers."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


@contextmanager
def _made_once(folder: Path) -> Iterator[None]:
    """Keep other processes from making the stage `folder` at the same time; wait for one that is.

    The system frees the lock of a process that ends, however it ends.
    """
    if not group().is_main_process:
        yield
        return
    make_folder(folder.parent, "STUDY_RUNS")
    lock = lock_of(folder.with_name(f".{folder.name}.lock"))
    line = None
    while not lock.is_locked:
        try:
            lock.acquire(timeout=2)
        except Timeout:
            line = line or Progress(f"{folder.name} is being made by another process", 0)
            line.show(f"{folder.name} is being made by another process; waiting for it")
    if line:
        line.close()
    try:
        yield
    finally:
        lock.release()


def _remember(run: Run, name: str, key: str) -> None:
    """Note in the run's stages.json which stage it stands on; several processes may do so."""
    path = run.folder / "stages.json"
    if (read_json(path) or {}).get(name) == key:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    with lock_of(run.folder / ".stages.lock"):
        write_json(path, {**(read_json(path) or {}), name: key})


# --- reading --------------------------------------------------------------------------------------
@one_look()
def read_stage(run: Run, name: str) -> Path:
    """The folder of the stage that this very run needs.

    FileNotFoundError if it has not been made, with what is there instead, the notebook and the
    command that make it; DamagedStage if its files have changed.
    """
    allowed = _READABLE.get()
    assert allowed is None or name in allowed, f"a stage reads {name}; its entry in STAGES lacks it"
    key = key_of(run, name)
    folder = folder_of(name, key)
    if not is_whole(folder):
        notebook = info_of(run, name).notebook
        raise FileNotFoundError(
            f"stage {name} of this run ({run.name}) is missing{_made_otherwise(run, name)}: run "
            f"notebook {notebook} first, or `{run.command} --only {notebook[:2]}`")
    check_stage(folder, name, key)
    return folder


def read_manifest(run: Run, name: str) -> dict:
    """What stage `name` was made from and how it went, after a check of its files."""
    return manifest_of(read_stage(run, name))


def check_stage(folder: Path, name: str, key: str) -> dict:
    """A stage's manifest, once its files are those that it lists; DamagedStage if one is not."""
    manifest = manifest_of(folder)
    remedy = f"delete the folder {folder} and run notebook {stage_info(name, True).notebook} again"
    if manifest is None:
        raise DamagedStage(f"{folder / 'manifest.json'} is damaged or missing; {remedy}")
    if manifest["key"] != key:
        raise DamagedStage(f"{folder} holds another stage ({manifest['stage']} of "
                           f"{manifest['run']}) than its name says; {remedy}")
    for file, digest in manifest["files"].items():
        path = folder / file
        if not path.is_file() or hash_file(path) != digest:
            raise DamagedStage(f"{path} is damaged or missing; {remedy}")
    for left in UNTIL_WHOLE:  # a kill may have left it
        (folder / left).unlink(missing_ok=True)
    _name_other_versions(str(folder), tuple(manifest["versions"].items()))
    return manifest


@functools.cache
def _name_other_versions(folder: str, made_with: tuple[tuple[str, str], ...]) -> None:
    """Warn, once a process, of a stage that other versions of the libraries have made."""
    if others := other_versions(dict(made_with)):
        warnings.warn(f"{Path(folder).name} was made with {others}; numbers may differ by rounding",
                      stacklevel=2)


def other_versions(made_with: dict[str, str]) -> str:
    """"torch 2.13.0 (here 2.14.1)", for each library whose version is another; "" if none."""
    return ", ".join(f"{name} {made_with[name]} (here {version})"
                     for name, version in _versions().items()
                     if made_with.get(name, version) != version)


def _made_otherwise(run: Run, name: str) -> str:
    """What makes the last one of these stages that is there another; "" if there is none."""
    others = map(manifest_of, runs_folder().glob(f"stages/{name}-*"))
    others = [other for other in others if other and other["stage"] == name]
    if not others:
        return ""
    least = min((_unlike(run, name, other) for other in others), key=len)
    return f" (there is one with {', '.join(least)})" if least else ""


def _unlike(run: Run, name: str, made: dict) -> list[str]:
    """How a stage that has been made, and what it reads, differ from what this run needs."""
    wanted = recipe_of(run, name)
    found = differences(wanted, made)
    for other, key in wanted["reads"].items():
        if (below := made["reads"].get(other)) != key:
            manifest = manifest_of(folder_of(other, below or ""))
            found += _unlike(run, other, manifest) if manifest else [f"another {other}"]
    return list(dict.fromkeys(found))


@one_look()
def describe_stages(run: Run, *names: str) -> pd.DataFrame:
    """What the manifests of these stages say: seconds, peak memory, metrics."""
    rows = []
    for name in names:
        manifest = read_manifest(run, name)
        row = {"stage": name, "seconds": manifest["seconds"],
               "peak memory (GB)": manifest["peak_memory_gb"]}
        for key, value in manifest["metrics"].items():
            row[key] = value if isinstance(value, str) else round(value, 4)
        rows.append(row)
    return pd.DataFrame(rows)
