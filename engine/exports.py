"""A trained classifier as one folder that needs no run: written whole, sealed, read again.

It holds classifier.json (settings, variant, versions), classes.csv, README.md, and, for each stage
that the classifier stands on, a folder of its name with what reading it needs. Nothing in it is
pickled, and nothing in it is code.
"""
from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from engine.catalogue import load_classes
from engine.files import damaged_file, put_in_place, read_json, seal, write_json, write_text
from engine.fusions import fusion_of
from engine.runs import Run
from engine.settings import PROFILES, REPRESENTATIONS, make_profile, setting_names
from engine.stages import is_made, other_versions, read_manifest, read_stage
from engine.tables import read_classes
from engine.variants import Variant, named_variant, text_level

ABOUT, TABLE, SEAL = "classifier.json", "classes.csv", "hashes.json"
KEPT = ("encoder/*", "encoder.safetensors", "head.safetensors", "model-0.safetensors")
PLACES = ("data", "fusions")  # settings that name places of the run's machine


@dataclass(frozen=True)
class Parts:
    """What a classifier is made of: its run's settings, its variant, the folders of the stages that
    it stands on by their names, and the table of classes.
    """
    run: Run
    variant: Variant
    folders: dict[str, Path]
    classes: pd.DataFrame

    @property
    def fusions(self) -> list[str]:
        """The variants whose models are among them: the texts' alone, if it is there, and its own.
        """
        level = text_level(self.variant)
        names = [level.name if level else "", self.variant.name]
        return [name for name in names if f"fusion-{name}" in self.folders]


def parts_of_run(run: Run, variant: Variant) -> Parts:
    """The parts of a run's classifier; FileNotFoundError names a stage that has not been made."""
    symbols = [symbol for symbol in variant.symbols if symbol != "P"]
    names = [f"fusion-{variant.name}", *(REPRESENTATIONS[symbol] for symbol in symbols)]
    names += ["seresnext"] if "P" in variant.symbols else []
    level = text_level(variant)
    if level and is_made(run, f"fusion-{level.name}"):
        names.append(f"fusion-{level.name}")
    folders = {name: read_stage(run, name) for name in names}
    return Parts(run, variant, folders, load_classes(run))


def parts_of_folder(folder: Path, variant: str | None = None) -> Parts:
    """The parts that a folder holds. ValueError if it is no exported classifier, if a file is not
    as it was written, or if it holds another variant than this one.
    """
    about = read_json(folder / ABOUT)
    if about is None:
        raise ValueError(f"{folder} is no exported classifier: it has no {ABOUT}; make one with "
                         "`python run.py export <folder>`")
    if damaged := damaged_file(folder / SEAL):
        raise ValueError(f"{folder / damaged} is damaged or missing; export the classifier again")
    if variant not in (None, about["variant"]):
        raise ValueError(f"{folder} holds the variant {about['variant']}, not {variant}; leave the "
                         "variant out, or export that one from its run")
    if others := other_versions(about["versions"]):
        warnings.warn(f"{folder} was made with {others}; numbers may differ by rounding",
                      stacklevel=2)
    profile = make_profile(about["profile"], about["settings"])
    folders = {path.name: path.resolve() for path in folder.iterdir() if path.is_dir()}
    return Parts(Run(profile, about["split"], about["seed"]), named_variant(about["variant"]),
                 folders, read_classes(folder / TABLE))


def refuse_export(folder: Path, run: Run, variant: Variant) -> None:
    """ValueError if something is at the folder's place, or if the variant's Z is one's own code."""
    if folder.exists():
        raise ValueError(f"{folder} is there already: name a new folder, or delete it first")
    own = [name for name in (variant.text_fusion, variant.final_fusion)
           if fusion_of(run, name).code]
    if own:
        raise ValueError(f"{variant.name} cannot be exported: its Z {own[0]} is your own code, and "
                         "an exported folder holds none; use it from its run by "
                         "h.load_classifier(run, variant), or export a fusion of this study")


def write_export(folder: Path, parts: Parts, card: str) -> None:
    """Write the parts of a classifier and its card into a new folder, which appears when it is
    whole.
    """
    run = parts.run
    refuse_export(folder, run, parts.variant)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with put_in_place(folder) as partial:
        partial.mkdir()
        for name, source in parts.folders.items():
            copy_kept(source, partial / name)
        parts.classes.to_csv(partial / TABLE, index=False)
        write_text(partial / "README.md", card)
        write_json(partial / ABOUT, about_parts(parts))
        seal(partial / SEAL, [path for path in sorted(partial.rglob("*")) if path.is_file()])


def copy_kept(source: Path, target: Path) -> None:
    """Copy what a classifier reads of one stage."""
    for pattern in KEPT:
        for path in sorted(source.glob(pattern)):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def about_parts(parts: Parts) -> dict:
    """What an exported folder says of itself: variant, run, all settings, versions."""
    run, usual = parts.run, PROFILES[parts.run.profile.name]
    values = {name: getattr(usual if name in PLACES else run.profile, name)
              for name in setting_names()}
    return {"variant": parts.variant.name, "fusion seed": 0, "profile": run.profile.name,
            "split": run.split, "seed": run.seed, "settings": values,
            "versions": read_manifest(run, f"fusion-{parts.variant.name}")["versions"]}
