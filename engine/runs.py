"""A run: one profile on one split with one seed, its folder, and where folders lie."""
from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine import settings
from engine.settings import (
    IN_FOLDER,
    PROFILES,
    SLOTS,
    SPEED_ONLY,
    SPLITS,
    Profile,
    make_profile,
    one_of,
    setting_names,
)

OWN_CLASSES = "classes.csv"  # beside the tables of a catalogue that is not Rakuten's
SAMPLE_MARK = "sample.json"  # lies in a folder that the sample's generator has written


@dataclass(frozen=True)
class Run:
    """One profile on one split with one seed: what every stage is made for."""
    profile: Profile
    split: str
    seed: int

    @property
    def protocol(self) -> str:
        """Which rows, how split, whether trained: `<rows>[-grouped][-limit<N>][-frozen]`."""
        profile = self.profile
        parts = [profile.rows]
        parts += ["grouped"] if profile.grouped else []
        parts += [f"limit{profile.limit}"] if profile.limit else []
        parts += ["frozen"] if profile.freeze_encoders else []
        return "-".join(parts)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of its split, in the order in which they are used."""
        held_out = self.profile.fusion_rows == "held-out"
        return ("train", *(["fusion"] if held_out else []), "val", "test")

    @property
    def changed(self) -> dict[str, object]:
        """The settings that differ from the profile's."""
        base = PROFILES[self.profile.name]
        return {name: getattr(self.profile, name) for name in setting_names()
                if getattr(self.profile, name) != getattr(base, name)}

    @property
    def told(self) -> list[str]:
        """`<name>=<value>` of each changed setting that the protocol does not say; speed apart."""
        return [f"{name}={value}" for name, value in self.changed.items()
                if name not in (*IN_FOLDER, *SPEED_ONLY)]

    @property
    def suffix(self) -> str:
        """`+<name>=<value>` of each of `told`, as a part of a folder's name.

        Where a value is no name for a folder, or there are many,
        eight digits of their hash keep two runs apart.
        """
        exact = "".join(f"+{words}" for words in self.told)
        parts = (re.sub(r"[^\w.=-]+", "-", words) for words in self.told)
        readable = "".join(f"+{part}" for part in parts)[:80]
        if readable == exact:
            return exact
        return f"{readable}~{hashlib.sha256(exact.encode()).hexdigest()[:8]}"

    @property
    def unlike_the_paper(self) -> list[str]:
        """Why this run's numbers cannot stand beside the paper's; [] where they can."""
        profile, paper = vars(self.profile), vars(PROFILES["paper"])

        def other(*names: str) -> bool:
            return any(profile[name] != paper[name] for name in names)

        reasons = {"other data": self.synthetic or self.own_catalogue,
                   "other encoders": other(*SLOTS.values(), "freeze_encoders", "image_weights"),
                   "other texts": other("texts", "clean"),
                   "other rows": other("rows", "grouped", "limit", "bad_rows", "fusion_rows")}
        return [reason for reason, given in reasons.items() if given]

    @property
    def own_fusions(self) -> list[str]:
        """The names of the Z in the file that the setting `fusions` names; it is read, not run.

        ValueError if there is no such file, if it is no Python, or holds no Z.
        """
        if not self.profile.fusions:
            return []
        path = from_root(self.profile.fusions)
        try:
            names = _entered(path.read_text(encoding="utf-8"))
        except SyntaxError as error:
            raise ValueError(f"setting fusions: {path} is no Python: {error.msg}, line "
                             f"{error.lineno}") from error
        except OSError:
            names = []
        if not names:
            raise ValueError(f"setting fusions: {path} holds no fusion; write it as a Python file "
                             "with `@h.fusion(\"<equation>\")` above each function Z")
        return names

    @property
    def folder(self) -> Path:
        """`runs/<profile>/<protocol>/<split>/seed<k>[+<name>=<value>]`: what is this run's own."""
        place = runs_folder() / self.profile.name / self.protocol / self.split
        return place / f"seed{self.seed}{self.suffix}"

    @property
    def name(self) -> str:
        rows = f"{self.profile.name}, {self.protocol} rows"
        return ", ".join([rows, f"split {self.split}", f"seed {self.seed}", *self.told])

    @property
    def synthetic(self) -> bool:
        """Whether its products are the sample's, which are invented, wherever they lie."""
        return (self.profile.data == PROFILES["sample"].data
                or (self.data_folder / SAMPLE_MARK).exists())

    @property
    def data_folder(self) -> Path:
        """Where its catalogue lies, if it is not the sample: RAKUTEN_DATA replaces `data/raw`."""
        data = self.profile.data
        if data == PROFILES["paper"].data:
            data = os.environ.get("RAKUTEN_DATA") or data
        return from_root(data)

    @property
    def own_catalogue(self) -> bool:
        """Whether its products are neither Rakuten's nor the sample's: of other classes."""
        return not self.synthetic and (self.data_folder / OWN_CLASSES).exists()

    @property
    def data_name(self) -> str:
        """What titles and captions call its products."""
        if self.synthetic:
            return "synthetic sample"
        return f"catalogue {self.data_folder.name}" if self.own_catalogue else "Rakuten France"

    @property
    def options(self) -> list[str]:
        """What names this run on run.py's command line."""
        words = ["--profile", self.profile.name, "--split", self.split, "--seed", str(self.seed)]
        for name, value in self.changed.items():
            words += ["--set", f"{name}={value}"]
        return words

    @property
    def command(self) -> str:
        """The command line that makes this run."""
        return f"python run.py study {shlex.join(self.options)}"


def open_run(profile: str, split: str, seed: int, changes: dict | str | None = None) -> Run:
    """The run that a notebook's parameters name; ValueError if one of them is not allowed.

    `changes` may be JSON, as `papermill -p SETTINGS '{"text_epochs": 3}'` gives it.
    """
    if isinstance(changes, str):
        with suppress(ValueError):
            changes = json.loads(changes)
    if not isinstance(changes, dict | None):
        raise ValueError(f"SETTINGS must be a dictionary of settings, or JSON of one; got "
                         f"{changes!r}")
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed must be a whole number from 0, got {seed!r}")
    return Run(make_profile(profile, changes), one_of("split", split, SPLITS), seed)


def _entered(source: str) -> list[str]:
    """The names of what stands below `@h.fusion(...)` or `@fusion(...)`."""
    names = []
    for node in ast.parse(source).body:
        marks = " ".join(map(ast.unparse, getattr(node, "decorator_list", [])))
        names += [node.name.lower()] if "fusion(" in marks else []
    return names


def runs_folder() -> Path:
    """`runs`, or the folder that STUDY_RUNS names; ValueError if that is a file."""
    return _folder("STUDY_RUNS", "runs")


def log_folder(stage: str) -> Path:
    """Where TensorBoard's log of a training lies: beside the stages, which do not contain it."""
    return runs_folder() / "logs" / stage.removesuffix(".partial")


def cache_folder() -> Path:
    """`data/cache`, or the folder that STUDY_CACHE names; ValueError if that is a file."""
    return _folder("STUDY_CACHE", "data/cache")


def _folder(variable: str, default: str) -> Path:
    folder = from_root(os.environ.get(variable) or default)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder in {variable}")
    return folder


def from_root(path: str) -> Path:
    """A path as all parts of the study understand it: from the project's root."""
    return settings.ROOT / Path(path).expanduser()
