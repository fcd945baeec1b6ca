"""Notebooks, stages and runs in their order, and what of them is done. Imports no torch."""
from __future__ import annotations

import functools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from engine import settings
from engine.files import hash_file, hash_json, read_json
from engine.keys import folder_of, info_of, kind_of, manifest_of
from engine.runs import Run, open_run
from engine.settings import FROZEN_STAGES, SPEED_ONLY, SPLITS, STAGES, one_of

NOTEBOOKS = ["01_data_exploration", "02_text_preprocessing", "03_finetune_camembert",
             "04_finetune_flaubert", "05_finetune_seresnext", "06_regional_features",
             "07_hierarchical_fusion", "08_result_tables", "09_analysis",
             "10_paper_and_code", "11_classify_a_product", "12_defects_of_real_code"]
LAST_OF_SPLIT = NOTEBOOKS.index("07_hierarchical_fusion")  # what follows compares the splits
LAST_TO_COMPARE = NOTEBOOKS.index("10_paper_and_code")  # and what follows that reads its own
DEFAULTS = {"PROFILE": "sample", "SPLIT": "90-10", "SEED": 0, "SETTINGS": {}}  # of every notebook


# --- notebooks ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    """One notebook of one run."""
    notebook: str
    run: Run

    @property
    def source(self) -> Path:
        return settings.ROOT / "notebooks" / f"{self.notebook}.ipynb"

    @property
    def output(self) -> Path:
        return self.run.folder / "notebooks" / f"{self.notebook}.ipynb"

    @property
    def manifest(self) -> Path:
        return self.output.with_suffix(".json")

    @property
    def parameters(self) -> dict:
        """What papermill injects: the parameters that differ from the notebooks' own defaults."""
        run = self.run
        given = {"PROFILE": run.profile.name, "SPLIT": run.split, "SEED": run.seed,
                 "SETTINGS": run.changed}
        return {name: value for name, value in given.items() if value != DEFAULTS[name]}

    @property
    def runs(self) -> list[Run]:
        """The runs whose stages this notebook may read: all splits, where they are compared."""
        if LAST_OF_SPLIT < NOTEBOOKS.index(self.notebook) <= LAST_TO_COMPARE:
            return [Run(self.run.profile, split, self.run.seed) for split in SPLITS]
        return [self.run]

    def __str__(self) -> str:
        return f"{self.notebook}  {self.run.split}  seed {self.run.seed}"


def make_plan(profile: str, splits: list[str], seeds: list[int], changes: dict) -> list[Step]:
    """All steps in order: the notebooks of each split and seed, then those that compare splits and
    what follows these.
    """
    runs = [open_run(profile, split, seed, changes) for seed in seeds for split in splits]
    each, after = NOTEBOOKS[:LAST_OF_SPLIT + 1], NOTEBOOKS[LAST_OF_SPLIT + 1:]
    steps = [Step(name, run) for run in runs for name in each]
    return steps + [Step(name, run) for run in runs for name in after]


def runs_of(plan: list[Step]) -> list[Run]:
    """The runs of a plan, each once, in its order."""
    return list(dict.fromkeys(step.run for step in plan))


def choose_notebooks(first: str | None, only: list[str]) -> list[str]:
    """The notebooks that --from NN or --only NN name; ValueError for a number that is none."""
    numbers = [name[:2] for name in NOTEBOOKS]
    for number in [first or numbers[0], *only]:
        one_of("notebook number", number, numbers)
    return [name for name in NOTEBOOKS
            if name[:2] >= (first or "00") and (not only or name[:2] in only)]


def step_graph(steps: list[Step]) -> dict[Step, list[Step]]:
    """Each notebook, and those that have to be executed before it."""
    graph = {}
    for step in steps:
        graph[step] = [other for other in steps if other.run in step.runs
                       and other.notebook < step.notebook]
    return graph


# --- stages ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """Stages of one run, made by a process of its own: `run.py stage <name> ...`."""
    run: Run
    name: str
    stages: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(settings.ROOT / "run.py"), "stage", *self.stages,
                *self.run.options, "--set", "processes=1"]

    def __str__(self) -> str:
        return f"{self.name}  {self.run.split}  seed {self.run.seed}"


def stage_names(run: Run) -> list[str]:
    """All stages of a run up to the fusion variants, each after those it reads."""
    import helpers as h

    fusions = [f"fusion-{variant.name}" for variant in (*h.scored_variants(run), *h.RAW_VARIANTS)]
    names = [name for name in STAGES if name not in ("fusion", "scores", "claims")]
    if run.profile.freeze_encoders:
        vectors = [name for name in FROZEN_STAGES if name.startswith("vectors-")]
        names = ["splits", "text", "baselines", *vectors, *names[3:]]
    return [*names, *fusions]


def notebook_of(run: Run, name: str) -> str:
    """The notebook that makes a stage of a run."""
    return info_of(run, name).notebook


def stage_graph(plan: list[Step]) -> dict[Job, list[Job]]:
    """The stages that the plan's notebooks make as jobs, and the jobs that each has to wait for.

    The fusion variants of a run are one job: each takes less time than a process to start.
    """
    stages = {}
    for step in plan:
        for name in stage_names(step.run):
            if notebook_of(step.run, name) == step.notebook:
                stages.setdefault((step.run, kind_of(name)), []).append(name)
    jobs = {(run, kind): Job(run, kind, tuple(names)) for (run, kind), names in stages.items()}
    graph = {}
    for (run, _), job in jobs.items():
        reads = info_of(run, job.stages[0]).reads
        graph[job] = [jobs[run, other] for other in reads if (run, other) in jobs]
    return graph


# --- what is done ---------------------------------------------------------------------------------
def state(step: Step) -> str:
    """"missing", "stale" (made from something else), "damaged", or "done"."""
    done = read_json(step.manifest)
    if done is None or not done.keys() >= {"key", "stages"} or not step.output.exists():
        return "missing"
    if done["key"] != step_key(step):
        return "stale"
    return _state_of_stages(tuple(done["stages"].items()))


@functools.cache
def _state_of_stages(stages: tuple[tuple[str, str], ...]) -> str:
    from engine.stages import DamagedStage, check_stage

    for key, name in stages:
        folder = folder_of(name, key)
        if not folder.exists():
            return "stale"
        try:
            check_stage(folder, name, key)
        except DamagedStage:
            return "damaged"
    return "done"


def step_key(step: Step) -> str:
    """Hash of all that an executed notebook depends on: its cells and parameters, the code that it
    calls and shows, the catalogue, the keys of the stages it may read, and which other splits are
    there to be compared.
    """
    from engine.fingerprint import code_of_words
    from engine.keys import key_of
    from engine.looks import one_look

    book = json.loads(step.source.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in book["cells"]]
    words = sorted(set(re.findall(r"\bh\.(\w+)", "\n".join(cells))))
    values = {name: value for name, value in vars(step.run.profile).items()
              if name not in SPEED_ONLY}
    with one_look():
        keys = [key_of(run, name) for run in step.runs for name in stage_names(run)
                if notebook_of(run, name) <= step.notebook]
        compared = [is_trained(run) for run in step.runs if run != step.run]
    return hash_json([cells, step.parameters, values, code_of_words("helpers", tuple(words)).hash,
                      catalogue_hash(step.run), keys, compared])


def is_trained(run: Run) -> bool:
    """Whether all stages up to the fusions are there, so that a run can be scored."""
    from engine.stages import is_made

    return all(is_made(run, name) for name in stage_names(run))


@functools.cache
def catalogue_hash(run: Run) -> str:
    """The hash of what notebooks read of the catalogue themselves; once for a command."""
    from engine.catalogue import LAYOUTS, PUBLISHED, catalogue_folder, classes_file, find_layout
    from engine.rows import pictures_digest

    folder = catalogue_folder(run)
    layout = LAYOUTS[find_layout(folder)]
    files = [folder / layout["x"], folder / layout["y"], classes_file(folder), PUBLISHED]
    return hash_json([*map(hash_file, files), pictures_digest(run)])


def notes_on_versions(plan: list[Step]) -> list[str]:
    """A sentence for each stage of the plan that other versions of the libraries have made."""
    notes = {}
    for step in plan:
        for key, name in (read_json(step.manifest) or {}).get("stages", {}).items():
            from engine.stages import other_versions

            folder = folder_of(name, key)
            others = other_versions((manifest_of(folder) or {}).get("versions", {}))
            if others:
                notes[folder.name] = f"{folder.name} was made with {others}"
    return list(notes.values())
