"""Shared code of the study "hierarchical fusion for multimodal product classification".

The notebooks import this module as ``h``. Sections follow the notebooks; a section uses only those above it.

    section                what it holds                                              taught in
    1  Settings            words, profiles, runs                                      01
    2  Progress            one line that moves, in Jupyter, a terminal or a log       03
    3  Stages              manifests: skip what is done, redo what is stale           01
    4  Catalogue           both public layouts, checks, labels, plain text            01
    5  Splits              90-10 and 80-20, stratified, duplicates kept together      01
    6  Text                cleaning, tokenizers, TF-IDF baseline                      02
    7  Scores              accuracy, F1, bootstrap intervals, paired test             02, 08
    8  Fine-tuning         encoder + linear head, through transformers.Trainer        03
    9  Text encoders       CamemBERT and FlauBERT, one model per field                03, 04
    10 Pictures            SE-ResNeXt, augmentation, cached decoding                  05
    11 Regions             equation (2): 16 x 16 tiles, averaged                      06
    12 Fusion              equation (1): Z, hierarchy, classifier                     07
    13 Result tables       test scores, Tables I to V beside the paper's              08
    14 New products        any product's classes, submission files of the challenge    run.py
    15 Figures             one look for every figure                                  all
    16 Notebook display    source, captions, text from results                        all

"The paper" is Tashu, Fattouh, Kiss, Horvath: Multimodal E-Commerce Product Classification Using
Hierarchical Fusion (2022). Importing this module reads and writes nothing.
"""
from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import hashlib
import html
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, lru_cache, partial
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from urllib.parse import urlparse

import joblib
import matplotlib.pyplot as plt
import nltk
import numpy as np
import pandas as pd
import scipy.fft
import scipy.stats
import seaborn as sns
import sentencepiece
import timm
import torch
import torchvision
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, find_executable_batch_size, reduce
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from filelock import FileLock, Timeout
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from IPython import get_ipython
from IPython.display import Markdown, display
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from selectolax.lexbor import LexborHTMLParser
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from sklearn.pipeline import make_pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torchvision.transforms import v2
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CamembertConfig,
    CamembertModel,
    CamembertTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    FlaubertConfig,
    FlaubertModel,
    FlaubertTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

with torch.device("meta"):  # it builds two large networks while it is imported: half a GB that nobody needs
    import pretrainedmodels
    from pretrainedmodels.models.senet import SENet, SEResNeXtBottleneck

# ======================================================================================================
# 1  Settings
# ======================================================================================================
ROOT = Path(__file__).resolve().parent
FIELDS = ("title", "description")
TEXT_ENCODERS = ("camembert", "flaubert")
PARTS = ("train", "val", "test")
SPLITS = {"90-10": 0.10, "80-20": 0.20}  # share of the test part
VALIDATION_SHARE = 0.10  # of what is not test (paper, section V)
# The paper's symbols, and the stage whose features they are.
REPRESENTATIONS = {"T_c": "camembert_title", "D_c": "camembert_description", "T_f": "flaubert_title",
                   "D_f": "flaubert_description", "P": "image_regions"}


@dataclass(frozen=True)
class Profile:
    """Every setting of a run. `sample` is small enough for a laptop, `paper` is the paper's own size."""
    name: str
    data: str                     # folder of the catalogue, from the project's root
    rows: str = "described"       # "described": rows that have a description (the paper's subset) | "all"
    grouped: bool = False         # exact and near duplicates stay on one side of the split
    limit: int = 0                # rows, a stratified choice; 0: all
    clean: str = "paper"          # "paper": HTML, tokens, lower case | "light": HTML only
    camembert: str = "almanach/camembert-base"       # checkpoint name or folder, "small": from scratch
    flaubert: str = "flaubert/flaubert_base_cased"   # likewise
    seresnext: str = "se_resnext50_32x4d"            # pretrainedmodels' name, torchvision/<name>, timm/<name>, "small"
    image_weights: str = "imagenet"                  # "imagenet" | a weight file | "none"; "small" has none
    freeze_encoders: bool = False # True: no fine-tuning, the checkpoints' features as they are
    text_width: int = 768         # d, for "small" encoders; a checkpoint brings its own
    text_layers: int = 12         # for "small" encoders
    vocabulary: int = 32_000      # tokens, for "small" encoders
    max_length: int = 256         # tokens (paper, section IV.B)
    pooling: str = "first"        # vector of the first token | "mean": of all tokens
    text_epochs: int = 10         # paper, section IV.B
    text_batch: int = 32          # rows; paper, section IV.B
    text_lr: float = 2e-5         # AdamW; paper, section IV.B
    text_dropout: float = 0.1     # before the linear head; the paper is silent
    image_size: int = 224         # pixels a side of a whole picture (paper, section III.B)
    region_size: int = 224        # pixels a side of the picture that is cut into regions (paper, section III.B)
    image_epochs: int = 20        # paper, section IV.B
    image_batch: int = 32         # rows; paper, section IV.B
    image_lr: float = 1e-3        # Adam; paper, section IV.B
    grid: int = 16                # regions a side, 16 x 16 = 256 (paper, section III.B)
    regions: str = "tiles"        # each tile through the encoder (eq. 2) | "feature_map"
    standardise: bool = True      # representations to mean 0, deviation 1 of the training rows
    project: bool = False         # learned linear map of each representation to the same width
    dropout: float = 0.3          # Table III variants
    fusion_epochs: int = 20
    fusion_batch: int = 128       # rows
    fusion_lr: float = 1e-3       # Adam
    bootstrap: int = 2000         # resamples behind each 95% interval
    early_stopping: int = 0       # epochs without a better validation macro-F1 before fine-tuning stops; 0: never
    precision: str = "auto"       # of the encoders; "auto": "bf16" or "fp16" on a GPU, "float32" on a CPU
    compile: str = "off"          # backend of torch.compile, such as "inductor"
    device_batch: int = 0         # rows on one device at a time; 0: all; halved when memory runs out
    gradient_checkpointing: bool = False  # of text encoders that offer it (FlauBERT does not): less memory, slower
    checkpoint_steps: int = 500   # steps between two checkpoints within an epoch; 0: at its end alone
    processes: int = 0            # processes that make one stage together; 0: one for each GPU, without one 1
    loader_workers: int = -1      # processes that load pictures for fine-tuning; -1: none on a CPU, up to 8 for a GPU
    cache_pictures: bool = True   # decoded pictures are kept in data/cache; False: decoded each time


PROFILES = {
    "sample": Profile(
        name="sample", data="data/sample", camembert="small", flaubert="small", seresnext="small",
        text_width=64, text_layers=2, vocabulary=2000, max_length=96, text_lr=1e-3, image_size=80,
        image_epochs=12, image_lr=3e-3, bootstrap=1000, processes=1),
    "paper": Profile(name="paper", data="data/raw"),
}
CHOICES = {"rows": ("described", "all"), "clean": ("paper", "light"), "pooling": ("first", "mean"),
           "regions": ("tiles", "feature_map"), "precision": ("auto", "float32", "bf16", "fp16"),
           "compile": ("off", "eager", "aot_eager", "inductor", "cudagraphs")}
SHARES = ("dropout", "text_dropout")  # from 0 to below 1
LOWEST = {"limit": 0, "early_stopping": 0, "device_batch": 0, "checkpoint_steps": 0, "processes": 0,
          "loader_workers": -1, "max_length": 3}  # tokens: the two of the frame and one; other numbers are above 0
# Settings that decide how fast a stage is made and in how much memory, and nothing of what it contains.
SPEED_ONLY = ("gradient_checkpointing", "checkpoint_steps", "processes", "loader_workers", "cache_pictures")


def make_profile(name: str, settings: dict | None = None) -> Profile:
    """The profile `name` with some settings replaced.

    Raises ValueError, naming what is allowed, for an unknown profile or setting or an ill-typed value.
    Used in every notebook (through `open_run`) and in run.py.
    """
    profile = PROFILES[one_of("profile", name, PROFILES)]
    types = {field.name: type(getattr(profile, field.name)) for field in dataclasses.fields(Profile)[1:]}  # not name
    for key, value in (settings or {}).items():
        one_of("setting", key, types)
        whole = types[key] is float and type(value) is int
        if type(value) is not types[key] and not whole:
            raise ValueError(f"setting {key} must be {types[key].__name__}, got {value!r}")
        if key in CHOICES:
            one_of(f"setting {key}", value, CHOICES[key])
        if key in SHARES and not 0 <= value < 1:
            raise ValueError(f"setting {key} must be from 0 to below 1, got {value!r}")
        if key in LOWEST and value < LOWEST[key]:
            raise ValueError(f"setting {key} must be {LOWEST[key]} or more, got {value!r}")
        if key not in (*SHARES, *LOWEST) and types[key] in (int, float) and not (math.isfinite(value) and value > 0):
            raise ValueError(f"setting {key} must be above 0 and finite, got {value!r}")
    return dataclasses.replace(profile, **(settings or {}))


def one_of(what: str, value: str, allowed: Iterable[str]) -> str:
    """`value`, if it is among `allowed`; otherwise a ValueError that lists them."""
    if value not in allowed:
        raise ValueError(f"unknown {what} {value!r}; choose from: {', '.join(allowed)}")
    return value


@dataclass(frozen=True)
class Run:
    """One profile on one split with one seed: what every stage is made for, and where it is kept."""
    profile: Profile
    split: str
    seed: int

    @property
    def protocol(self) -> str:
        """Which rows, how they are split, whether encoders are trained: `<rows>[-grouped][-limit<N>][-frozen]`."""
        profile = self.profile
        return (profile.rows + "-grouped" * profile.grouped + f"-limit{profile.limit}" * bool(profile.limit)
                + "-frozen" * profile.freeze_encoders)

    @property
    def folder(self) -> Path:
        """`runs/<profile>/<protocol>/<split>/seed<k>`."""
        return runs_folder() / self.profile.name / self.protocol / self.split / f"seed{self.seed}"

    @property
    def name(self) -> str:
        return f"{self.profile.name}, {self.protocol} rows, split {self.split}, seed {self.seed}"

    @property
    def options(self) -> list[str]:
        """What names this run on run.py's command line."""
        base = PROFILES[self.profile.name]
        changed = [f"{field.name}={getattr(self.profile, field.name)}" for field in dataclasses.fields(Profile)
                   if getattr(self.profile, field.name) != getattr(base, field.name)]
        return ["--profile", self.profile.name, "--split", self.split, "--seed", str(self.seed),
                *(word for setting in changed for word in ("--set", setting))]

    @property
    def command(self) -> str:
        """The command line that makes this run."""
        return f"python run.py study {shlex.join(self.options)}"


def open_run(profile: str, split: str, seed: int, settings: dict | None = None) -> Run:
    """The run that a notebook's parameters name; ValueError if one of them is not allowed. Used in 01 to 08."""
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed must be a whole number from 0, got {seed!r}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # Progress shows what the Trainer does
    return Run(make_profile(profile, settings), one_of("split", split, SPLITS), seed)


def runs_folder() -> Path:
    """`runs`, or the folder that STUDY_RUNS names; ValueError if that is a file."""
    folder = from_root(os.environ.get("STUDY_RUNS") or "runs")
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder in STUDY_RUNS")
    return folder


def from_root(path: str) -> Path:
    """A path as all parts of the study understand it: from the project's root, not from where a notebook runs."""
    return ROOT / Path(path).expanduser()


def group() -> PartialState:
    """The processes that make a stage together: this one alone, or all that torchrun or `accelerate launch` started."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))


def device() -> torch.device:
    """This process's GPU where there is one, else the CPU. Used in 06."""
    return group().device


def cores() -> int:
    """Processor cores for this process: STUDY_CORES, or its share of those that the machine lets it use."""
    share = joblib.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(os.environ.get("STUDY_CORES") or max(1, share))


# ======================================================================================================
# 2  Progress
# ======================================================================================================
def report_event(**event: object) -> None:
    """Tell run.py, which reads the file named by STUDY_EVENTS, what happens in this notebook."""
    if path := os.environ.get("STUDY_EVENTS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


class Progress:
    """One line for `total` steps of work, in the notebook while it runs and gone when it is done."""

    def __init__(self, label: str, total: int, unit: str = "steps", every: float = 0.5):
        self.label, self.total, self.unit, self.every = label, total, unit, every
        self.done, self.start, self.shown = 0, time.perf_counter(), 0.0
        self.handle = display(Markdown(f"{label} ..."), display_id=True) if get_ipython() else None

    def advance(self, steps: int = 1) -> None:
        """Count `steps` as done; the line changes at most every half second."""
        self.done += steps
        now = time.perf_counter()
        if now - self.shown >= self.every:
            self.shown = now
            rate = self.done / (now - self.start)
            left = (self.total - self.done) / rate
            self.show(f"{self.label}: {self.done} of {self.total} {self.unit}, {rate:.1f} a second, {left:.0f} s left")

    def track(self, things: Iterable) -> Iterator:
        """The things one by one, each counted as a step."""
        for thing in things:
            yield thing
            self.advance()

    def close(self) -> None:
        """Leave nothing behind in the notebook's output."""
        if self.handle is not None:  # None outside of a notebook
            self.handle.update(Markdown(""))

    def show(self, text: str) -> None:
        """Put `text` in the line's place."""
        if self.handle is not None:
            self.handle.update(Markdown(text))
        if group().is_main_process:
            report_event(text=text)


# ======================================================================================================
# 3  Stages: each writes a folder that appears only when it is whole, with a manifest that says from what
# ======================================================================================================
# Which notebook makes a stage (the name up to the first dash), and which stages it reads: the graph of the study.
MADE_IN = {"splits": "01_data_exploration", "text": "02_text_preprocessing", "baselines": "02_text_preprocessing",
           "camembert_title": "03_finetune_camembert", "camembert_description": "03_finetune_camembert",
           "flaubert_title": "04_finetune_flaubert", "flaubert_description": "04_finetune_flaubert",
           "seresnext": "05_finetune_seresnext", "image_regions": "06_regional_features",
           "image_whole": "06_regional_features", "fusion": "07_hierarchical_fusion",
           "scores": "08_result_tables"}
READS = {"splits": (), "text": ("splits",), "baselines": ("text", "splits"),
         **{f"{encoder}_{field}": ("text", "splits") for encoder in TEXT_ENCODERS for field in FIELDS},
         "seresnext": ("splits",), "image_regions": ("splits", "seresnext"), "image_whole": ("splits", "seresnext"),
         "fusion": ("splits", *REPRESENTATIONS.values())}
UNTIL_WHOLE = ("recipe.json", "trained.safetensors")  # what a stopped stage goes on from; no part of it
LIBRARIES = ("torch", "torchvision", "transformers", "pretrainedmodels", "timm", "scikit-learn", "numpy", "pandas")


class DamagedStage(RuntimeError):
    """A stage's files are not those its manifest lists."""


def stage(run: Run, name: str, build: Callable[[Path], dict], reads: Sequence[str] = (),
          inputs: dict[str, str] | None = None, together: bool = False) -> Path:
    """The folder of stage `name`, made by `build(folder) -> metrics` unless a matching one is there.

    It matches if the code of `build` and of the helpers it calls, the settings this code reads, the split,
    the seed, and the contents of `reads` (stages) and `inputs` (name -> hash) are the same. `build` writes
    into `<name>.partial`, which stays after a stop, so that a build that can resume finds what it left.
    Raises DamagedStage for a folder whose files have changed, ValueError if another process is making this stage.

    A build that several processes can do `together` is started in as many as the profile says; it is then called in
    each of them, and its main process writes the files.
    """
    recipe = _recipe(run, name, build, reads, inputs or {})
    key = hash_json(recipe)
    folder, partial_folder = run.folder / name, run.folder / f"{name}.partial"
    manifest = read_manifest(run, name) if (folder / "manifest.json").exists() else {}
    if agreed(manifest.get("key") != key):
        processes = processes_for(run.profile)
        if together and processes > 1 and group().num_processes == 1:
            launch(run, name, processes)
        else:
            with made_once(folder):
                if group().is_main_process and read_json(partial_folder / "recipe.json") != recipe:
                    shutil.rmtree(partial_folder, ignore_errors=True)
                    partial_folder.mkdir(parents=True, exist_ok=True)
                    write_json(partial_folder / "recipe.json", recipe)
                if together:
                    wait_for_file(partial_folder / "recipe.json", recipe)
                if together or group().is_main_process:
                    _build(build, partial_folder, folder, {"stage": name, "key": key, **recipe})
                wait_for_file(folder / "manifest.json", {"key": key})
    report_event(stage=str(folder.relative_to(runs_folder())), key=key)
    return folder


@contextmanager
def made_once(folder: Path) -> Iterator[None]:
    """Keep other processes from making the stage `folder` at the same time; ValueError if one is making it."""
    if not group().is_main_process:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:  # for some seconds, because what a stopped study started ends a little later
        held = FileLock(folder.with_name(f".{folder.name}.lock")).acquire(timeout=10)
    except Timeout as error:
        raise ValueError(f"stage {folder.name} is being made by another process of this study ({folder}); "
                         "wait until it is done, or stop it") from error
    with held:
        yield


def processes_for(profile: Profile) -> int:
    """How many processes make one stage together: the setting, or the most GPUs among which both batches can be shared.

    ValueError for more processes than GPUs, where there is one.
    """
    gpus = torch.cuda.device_count()
    if gpus and profile.processes > gpus:
        raise ValueError(f"processes={profile.processes}, but this machine has {gpus} GPU(s); each process needs one")
    both = math.gcd(profile.text_batch, profile.image_batch)
    return profile.processes or max(n for n in range(1, max(gpus, 1) + 1) if both % n == 0)


def agreed(value: object) -> object:
    """The main process's `value`, in every process."""
    return broadcast_object_list([value])[0] if group().num_processes > 1 else value


def wait_for_file(path: Path, holds: dict | None = None, seconds: float = 120) -> None:
    """Wait until all processes are here and see the file `path`; if it is JSON, that it holds the values `holds`.

    On another machine a shared folder may show a new file late. TimeoutError if it does not within `seconds`.
    """
    group().wait_for_everyone()
    end = time.monotonic() + seconds
    while not (path.exists() if holds is None else holds.items() <= (read_json(path) or {}).items()):
        if time.monotonic() > end:
            raise TimeoutError(f"{path} has not appeared within {seconds:.0f} s; is the folder shared by all machines?")
        time.sleep(0.5)


def notebook_of(name: str) -> str:
    """The notebook that makes a stage."""
    return MADE_IN[name.split("-")[0]]


def read_stage(run: Run, name: str) -> Path:
    """The folder of a stage that an earlier notebook made, with this run's settings.

    FileNotFoundError if it is not there, ValueError if it was made with others; both name the notebook and the command.
    Used in 04.
    """
    notebook = notebook_of(name)
    if not (run.folder / name / "manifest.json").exists():
        raise FileNotFoundError(f"stage {name} of this run ({run.name}) is missing: run notebook {notebook} first, or "
                                f"`{run.command} --only {notebook[:2]}`")
    made_with = read_manifest(run, name)["settings"]
    if other := [key for key, value in made_with.items() if getattr(run.profile, key) != value]:
        raise ValueError(f"stage {name} was made with {other[0]}={made_with[other[0]]!r}, but this run says "
                         f"{other[0]}={getattr(run.profile, other[0])!r}: run notebook {notebook} again with the same "
                         f"settings, or `{run.command}`")
    return run.folder / name


def read_manifest(run: Run, name: str) -> dict:
    """What stage `name` was made from and how it went, after a check of its files (DamagedStage if one changed).

    Used in 05 and 08.
    """
    folder = run.folder / name
    manifest = read_json(folder / "manifest.json")
    files = (manifest or {}).get("files", {"manifest.json": ""})
    for file, digest in files.items():
        if not (folder / file).exists() or hash_file(folder / file) != digest:
            raise DamagedStage(f"{folder / file} is damaged or missing; delete the folder {folder} "
                               f"and run notebook {notebook_of(name)} again")
    return manifest


def _build(build: Callable[[Path], dict], partial_folder: Path, folder: Path, head: dict) -> None:
    """Run `build` in `partial_folder`, write its manifest there and rename it to `folder`."""
    start = time.perf_counter()
    metrics = build(partial_folder) or {}
    if not group().is_main_process:
        return
    files = {str(path.relative_to(partial_folder)): hash_file(path) for path in sorted(partial_folder.rglob("*"))
             if path.is_file() and path.name not in UNTIL_WHOLE}
    write_json(partial_folder / "manifest.json", {
        **head, "metrics": metrics, "seconds": round(time.perf_counter() - start, 2),
        "peak_memory_gb": round(peak_memory_gb(), 3), "device": str(device()), "processes": group().num_processes,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES}, "files": files})
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.rename(folder)
    for name in UNTIL_WHOLE:
        (folder / name).unlink(missing_ok=True)


def launch(run: Run, name: str, processes: int) -> None:
    """Make a stage in `processes` new processes of this machine, one for each GPU: `torchrun run.py stage <name>`.

    New ones, because a notebook's own process may hold a GPU already, and then cannot be forked ("CUDA already
    initialised"). ChildProcessError if they fail, with what they said.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               str(Path(__file__).with_name("run.py")), "stage", name, *run.options]
    with tempfile.TemporaryDirectory() as folder:
        events, log = Path(folder) / "events", Path(folder) / "log"
        events.touch()
        share = str(max(1, cores() // processes))
        environment = {"OMP_NUM_THREADS": share, **os.environ, "STUDY_CORES": share, "STUDY_EVENTS": str(events),
                       "STUDY_PARENT": str(os.getpid())}
        line = Progress(f"{name} in {processes} processes", 0)
        with log.open("w") as output, events.open(encoding="utf-8") as lines:
            child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            try:
                while child.poll() is None:
                    time.sleep(0.5)
                    for event in map(json.loads, lines):
                        if "text" in event:
                            line.show(event["text"])
            finally:
                child.terminate()  # torchrun ends its processes; nothing happens if it has ended
                child.wait()
                line.close()
        if child.returncode:
            raise ChildProcessError(f"stage {name} failed in {processes} processes: "
                                    + what_failed(log.read_text(encoding="utf-8", errors="replace")))


def what_failed(log: str) -> str:
    """The sentences that begin with "error: " in what torchrun and its processes said, or else their last words."""
    said = log.splitlines()
    if errors := list(dict.fromkeys(line for line in said if line.startswith("error: "))):
        return "\n".join(errors)
    own = next((i for i, line in enumerate(said) if "torch/distributed/elastic" in line), len(said))
    signals = [line.strip() for line in said if line.strip().startswith("traceback : Signal")]
    return "\n".join([*said[:own][-20:], *signals]) or "\n".join(said[-20:])


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _recipe(run: Run, name: str, build: Callable, reads: Sequence[str], inputs: dict[str, str]) -> dict:
    """All that decides what a stage contains."""
    code, settings = code_and_settings(build)
    contents = {other: hash_json(read_json(read_stage(run, other) / "manifest.json")["files"]) for other in reads}
    return {"split": run.split, "seed": run.seed, "code": code, "reads": {**contents, **inputs},
            "settings": {key: getattr(run.profile, key) for key in settings if key not in SPEED_ONLY}}


def code_and_settings(function: Callable) -> tuple[str, list[str]]:
    """Hash of `function` and of all helpers it calls, and the profile's settings that this code reads.

    Comments and docstrings do not count. A setting is seen where it is written as `profile.<name>`.
    """
    definitions = _definitions()
    tree = _bare(ast.parse(textwrap.dedent(inspect.getsource(function))))
    todo, seen, settings, parts = [tree], set(), set(), []
    while todo:
        node = todo.pop()
        parts.append(ast.dump(node))
        for child in ast.walk(node):
            word = getattr(child, "id", None) if isinstance(child, ast.Name) else getattr(child, "attr", None)
            owner = getattr(child, "value", None)
            if isinstance(child, ast.Attribute) and "profile" in (getattr(owner, "id", ""), getattr(owner, "attr", "")):
                settings.add(word)
            elif word in definitions and word not in seen:
                seen.add(word)
                todo.append(definitions[word])
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest(), sorted(settings)


@lru_cache
def _definitions() -> dict[str, ast.AST]:
    """This module's constants, and its functions and classes from section 4 on: what can decide a result.

    Not PROFILES, whose settings count one by one.
    """
    found = {}
    source = Path(__file__).read_text(encoding="utf-8")
    first_line = next(i for i, line in enumerate(source.splitlines(), 1) if line.startswith("# 4  "))
    for node in _bare(ast.parse(source)).body:
        if isinstance(node, ast.Assign):
            names = {child.id for target in node.targets for child in ast.walk(target) if isinstance(child, ast.Name)}
            found.update({name: node for name in names if name != "PROFILES"})
        elif hasattr(node, "name") and node.lineno > first_line:
            found[node.name] = node
    return found


def _bare(tree: ast.Module) -> ast.Module:
    """The tree without docstrings."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) \
                and isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
            node.body = body[1:] or [ast.Pass()]
    return tree


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, read once in a process unless its size or time changes."""
    about = path.stat()
    return _hash_bytes(path, about.st_size, about.st_mtime_ns)


@cache
def _hash_bytes(path: Path, size: int, mtime: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_source(source: str) -> str:
    """The hash of a local folder's or file's contents; any other name, such as one on the hub, as it is."""
    path = from_root(source)
    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        return source
    return hash_json({str(file.relative_to(path)): hash_file(file) for file in path.rglob("*") if file.is_file()})


def hash_json(value: object) -> str:
    """sha256 of a value's JSON form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict | None:
    """The file's content; None if it is missing or is not JSON. Used in 01."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON; a stop, or a full disk, leaves the old file."""
    partial_path = path.with_name(f"{path.name}.partial")
    partial_path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial_path.replace(path)


def save_tensors(path: Path, product_ids: Sequence[int], **tensors: np.ndarray | Tensor) -> None:
    """Write tensors of shape [N, ...] and the N product ids that key their rows, as safetensors."""
    columns = {name: torch.tensor(np.asarray(tensor)).contiguous() for name, tensor in tensors.items()}
    wrong = {name: len(column) for name, column in columns.items() if len(column) != len(product_ids)}
    if wrong:
        raise ValueError(f"{len(product_ids)} product ids, but rows: {wrong}")
    save_file({"product_id": torch.tensor(np.asarray(product_ids, dtype=np.int64)), **columns}, path)


def load_tensors(path: Path, product_ids: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of `save_tensors`, with their rows in the order of `product_ids`; ValueError names a missing id.

    All rows in the file's own order are not copied: they are read when used, from pages that processes share.
    Used in 03, 06 and 08.
    """
    tensors = load_file(path)
    index = pd.Index(tensors.pop("product_id").numpy())
    rows = index.get_indexer(np.asarray(product_ids))
    if (rows < 0).any():
        raise ValueError(f"{path} has no row for product {np.asarray(product_ids)[rows < 0][0]}; "
                         f"{(rows < 0).sum()} of {len(rows)} are missing: make its stage again")
    if np.array_equal(rows, np.arange(len(index))):
        return tensors
    return {name: tensor[torch.as_tensor(rows)] for name, tensor in tensors.items()}


# ======================================================================================================
# 4  Catalogue
# ======================================================================================================
LAYOUTS = {
    "ENS": {
        "x": "X_train_update.csv", "y": "Y_train_CVw08PX.csv", "separator": ",",
        "columns": {"designation": "title", "description": "description", "productid": "product_id",
                    "imageid": "image_id"},
        "label": "prdtypecode", "images": ("images/image_train", "image_train"),
        "test": {"X_test_update.csv": ("images/image_test", "image_test")}},  # unlabelled, and its pictures' folders
    "SIGIR": {
        "x": "X_train.tsv", "y": "Y_train.tsv", "separator": "\t",
        "columns": {"Title": "title", "Description": "description", "Product_id": "product_id",
                    "Image_id": "image_id"},
        "label": "Prdtypecode", "images": ("image_training", "images/image_training", "images"),
        "test": {f"x_test_task1_{phase}.tsv": (f"image_test/image_test_task1_{phase}", "image_test", "images")
                 for phase in ("phase2", "phase1")}},
}
CLASSES = ROOT / "data" / "rakuten_classes.csv"
PUBLISHED = ROOT / "data" / "published_results.csv"


def load_classes() -> pd.DataFrame:
    """The 27 classes [label_id, prdtypecode, domain, name_fr, name_en, train_rows, rows_with_description].

    Used in 01, 02, 05 and 08.
    """
    return pd.read_csv(CLASSES)


def catalogue_folder(run: Run) -> Path:
    """Where the run's catalogue lies; makes the sample if it is missing or was written by another generator.

    RAKUTEN_DATA replaces `data/raw`. FileNotFoundError says what to do if there is no catalogue.
    Used in 01, 02 and 05.
    """
    if run.profile.data == PROFILES["sample"].data:
        return _current_sample(ROOT / run.profile.data)
    folder = from_root(os.environ.get("RAKUTEN_DATA") or run.profile.data)
    find_layout(folder)
    return folder


def sample_generator() -> ModuleType:
    """The module data/sample_catalogue.py."""
    spec = importlib.util.spec_from_file_location("sample_catalogue", CLASSES.with_name("sample_catalogue.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _current_sample(folder: Path) -> Path:
    generator = sample_generator()
    written = read_json(folder / "sample.json") or {}
    if written.get("source_sha256") != hash_file(Path(generator.__file__)):
        generator.write_catalogue(folder)
    return folder


def find_layout(folder: Path) -> str:
    """"ENS" or "SIGIR", by the files in `folder`; FileNotFoundError names the files that are missing. Used in 01."""
    for name, layout in LAYOUTS.items():
        if (folder / layout["x"]).exists() and (folder / layout["y"]).exists():
            return name
    wanted = " or ".join(f"{layout['x']} and {layout['y']} ({name})" for name, layout in LAYOUTS.items())
    raise FileNotFoundError(f"no catalogue in {folder}: it needs {wanted}. "
                            "Put the files there or name their folder in RAKUTEN_DATA (see data/README.md)")


def load_catalogue(folder: Path) -> pd.DataFrame:
    """The labelled products of a folder in ENS or SIGIR layout, in file order.

    Columns: product_id, image_id (int64), title, description (str, "" if missing), prdtypecode, label_id
    (0 to 26, the order of data/rakuten_classes.csv), picture (path). ValueError for a column, code or id that
    does not fit. Shown in 01. Used in 01, 02 and 05.
    """
    layout = LAYOUTS[find_layout(folder)]
    x, y = read_products(folder, layout["x"], layout["images"]), read_table(folder, layout["y"], [layout["label"]])
    if not x.index.equals(y.index):
        raise ValueError(f"{layout['x']} ({len(x)} rows) and {layout['y']} ({len(y)} rows) in {folder} "
                         "do not list the same products in the same order; download both again")
    products = x.drop(columns="picture").assign(prdtypecode=y[layout["label"]])
    return products.assign(label_id=encode_labels(products["prdtypecode"]), picture=x["picture"]).reset_index(drop=True)


def load_test_products(folder: Path) -> pd.DataFrame:
    """The challenge's unlabelled products: columns as `load_catalogue`'s but for the labels, and the file's own index.

    FileNotFoundError names the files that would do. SIGIR's second phase is taken before its first.
    """
    name = test_table(folder)
    return read_products(folder, name, LAYOUTS[find_layout(folder)]["test"][name])


def test_table(folder: Path) -> str:
    """The name of the file that lists the challenge's unlabelled products; FileNotFoundError if there is none."""
    tables = LAYOUTS[find_layout(folder)]["test"]
    if not (found := [name for name in tables if (folder / name).exists()]):
        raise FileNotFoundError(f"no unlabelled products in {folder}: it needs {' or '.join(tables)} "
                                "(see data/README.md)")
    return found[0]


def read_products(folder: Path, file: str, images: Sequence[str]) -> pd.DataFrame:
    """[product_id, image_id, title, description, picture] of one table, with its index; pictures in one of `images`."""
    columns = LAYOUTS[find_layout(folder)]["columns"]
    x = read_table(folder, file, list(columns))[list(columns)].rename(columns=columns)
    for name in ("product_id", "image_id"):
        if len(odd := x[name][~x[name].astype(str).str.fullmatch(r"\d{1,18}")]):
            raise ValueError(f"{folder / file}: {name} {str(odd.iloc[0])!r} is no whole number of at most 18 digits; "
                             "get the file again")
    if not x["product_id"].is_unique:
        raise ValueError(f"product ids in {folder / file} are not unique: "
                         f"{x['product_id'][x['product_id'].duplicated()].iloc[0]} occurs twice")
    place = next((folder / name for name in images if (folder / name).is_dir()), folder / images[0])
    x["picture"] = [str(place / f"image_{image}_product_{product}.jpg") for image, product
                    in zip(x["image_id"], x["product_id"])]
    return x


def absent_pictures(products: pd.DataFrame) -> list[str]:
    """The paths of these products' pictures that are not there, or are empty files. Used in 01."""
    folders = {Path(path).parent for path in products["picture"]}
    there = {entry.path for folder in folders if folder.is_dir() for entry in os.scandir(folder)
             if entry.is_file() and entry.stat().st_size}
    return [path for path in products["picture"] if path not in there]


def check_pictures(products: pd.DataFrame, todo: str = "") -> None:
    """ValueError that counts the absent pictures and names the first of them. Used in 01."""
    if absent := absent_pictures(products):
        names = ", ".join(Path(path).name for path in absent[:3]) + ", ..." * (len(absent) > 3)
        raise ValueError(f"{len(absent):,} of {len(products):,} pictures are absent or empty in "
                         f"{Path(absent[0]).parent}: {names}; {todo or '`run.py doctor` lists them all'}")


def read_table(folder: Path, file: str, columns: Sequence[str]) -> pd.DataFrame:
    """A table of the catalogue as it is, texts as texts and "" where one is missing; ValueError names a lost column."""
    layout = LAYOUTS[find_layout(folder)]
    text = {theirs: str for theirs, ours in layout["columns"].items() if ours in FIELDS}
    try:
        table = pd.read_csv(folder / file, sep=layout["separator"], index_col=0, keep_default_na=False, dtype=text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / file} cannot be read as a table in UTF-8 ({one_line(error)}); get it again") from error
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{folder / file} has no column {', '.join(missing)}; found: {', '.join(table)}")
    return table


def encode_labels(codes: pd.Series) -> pd.Series:
    """Label ids 0 to 26 of Rakuten's type codes; ValueError names codes that are not among the 27."""
    labels = pd.to_numeric(codes, errors="coerce").map(load_classes().set_index("prdtypecode")["label_id"])
    if labels.isna().any():
        unknown = codes[labels.isna()].drop_duplicates().head(5).tolist()
        raise ValueError(f"unknown product type codes {unknown}; data/rakuten_classes.csv lists the 27 known ones")
    return labels.astype("int64")


def catalogue_hash(folder: Path) -> str:
    """sha256 over the tables, the class table, and the pictures' names and sizes."""
    layout = LAYOUTS[find_layout(folder)]
    sizes = {name: sorted((entry.name, entry.stat().st_size) for entry in os.scandir(folder / name))
             for name in layout["images"] if (folder / name).is_dir()}
    return hash_json([*(hash_file(path) for path in (folder / layout["x"], folder / layout["y"], CLASSES)), sizes])


def select_rows(products: pd.DataFrame, rows: str, limit: int = 0, seed: int = 0) -> pd.DataFrame:
    """The rows that a protocol keeps: "described" (a description that is not blank; the paper's subset) or "all".

    Under "all" a missing description is the empty text. The encoders read it as `<s></s>` and learn during
    fine-tuning what a missing text means; its vector is theirs, and so within the distribution that standardising
    sees, as a vector of zeros would not be. To TF-IDF it is an empty document.

    `limit` above 0 keeps so many of them: at least 3 of each class (or all, if it has fewer), and class shares as
    close as whole rows allow (Sainte-Lague's method). `seed` chooses, the order of the file does not. ValueError,
    with the smallest limit that works, if no split could be made of so few. Used in 01.
    """
    if one_of("rows", rows, CHOICES["rows"]) == "described":
        products = products[products["description"].str.strip() != ""]
    products = products.reset_index(drop=True)
    if products.empty:
        raise ValueError(f"no row is left by rows={rows!r}; use rows='all', or get the tables again")
    if not limit or limit >= len(products):
        return products
    classes = products["label_id"].nunique()
    if limit < 3 * classes:
        raise ValueError(f"limit={limit} is too small for {classes} classes; set it to at least {3 * classes}")
    labels = products.sort_values("product_id")["label_id"].sample(frac=1, random_state=seed)
    turn = labels.groupby(labels).cumcount()  # 0 for a class's first row
    claim = (labels.map(labels.value_counts()) / (turn + 0.5)).mask(turn < 3, np.inf)
    kept = claim.sort_values(ascending=False, kind="stable").index[:limit]
    return products.loc[kept.sort_values()].reset_index(drop=True)


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def strip_html(text: str) -> str:
    """Plain text: entities decoded, each tag a space, runs of white space one space. Shown in 02."""
    text = html.unescape(text)
    if "<" in text:
        page = LexborHTMLParser(text.replace("&", "&amp;"))  # so that the parser decodes nothing a second time
        page.strip_tags(["script", "style"])
        text = page.root.text(separator=" ") if page.root else ""
    return " ".join(text.split())


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """The picture, to be read within; ValueError names a file that cannot be read. Used in 05."""
    try:
        with Image.open(path) as picture:
            yield picture
    except Exception as error:  # each of Pillow's decoders has errors of its own
        raise ValueError(f"picture {path} cannot be read ({one_line(error)}); download it again or remove its row") \
            from error


def cache_file(name: str, write: Callable[[Path], None]) -> Path:
    """`data/cache/<name>`, made by `write(path)` if it is missing; it appears only when it is whole."""
    path = ROOT / "data" / "cache" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(f"{name}.partial")
        with FileLock(path.parent.with_suffix(".lock")):  # stages side by side would all make it
            try:
                partial_path.unlink(missing_ok=True)  # what a kill left takes room
                if not path.exists():
                    write(partial_path)
                    partial_path.rename(path)
            finally:
                partial_path.unlink(missing_ok=True)
    return path


# ======================================================================================================
# 5  Splits
# ======================================================================================================
SAME_WORDS = 8     # a text of so many words is a copy of one that differs in its numbers alone
HASH_SIDE = 16     # 16 x 16 = 256 signs describe a picture
NEAR_SIGNS = 16    # pictures that differ in so many signs, or fewer, are near duplicates
PLAIN_PICTURE = 4  # grey levels: a picture that deviates less from its mean shows nothing


def text_key(text: str) -> str:
    """What near-duplicate texts share: their words, without HTML, case, accents and punctuation.

    Numbers are left out of texts of at least SAME_WORDS other words, where they are a price, a size or a reference in
    the same seller's sentence. In shorter ones they count: "volume 3" is not "volume 4". "" if there is no word.
    """
    letters = unicodedata.normalize("NFKD", strip_html(text).casefold())
    letters = "".join(letter for letter in letters if not unicodedata.combining(letter))
    words = re.findall(r"[^\W\d_]+", letters)
    return " ".join(words if len(words) >= SAME_WORDS else re.findall(r"[^\W_]+", letters))


def picture_signs(path: str | Path) -> np.ndarray:
    """A perceptual hash, int8 [256] of 1 and -1: which low frequencies of the grey picture are above their median.

    All 0 for a plain picture, such as a white placeholder: its signs would be noise.
    """
    side = 4 * HASH_SIDE
    with open_picture(path) as picture:
        picture.draft("L", (side, side))  # a JPEG is decoded at an eighth, a quarter or half of its size
        grey = np.asarray(picture.convert("L").resize((side, side), Image.Resampling.BOX), dtype=np.float32)
    if grey.std() < PLAIN_PICTURE:
        return np.zeros(HASH_SIDE ** 2, dtype=np.int8)
    low = scipy.fft.dctn(grey, norm="ortho")[:HASH_SIDE, :HASH_SIDE].ravel()
    return np.where(low > np.median(low), 1, -1).astype(np.int8)


def cached_signs(folder: Path, products: pd.DataFrame) -> np.ndarray:
    """`picture_signs` [N, 256] of a catalogue's products, made once and kept in data/cache."""
    def write(path: Path) -> None:
        bar = Progress("comparing pictures", len(products), "pictures")
        try:
            with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes outside the interpreter's lock
                signs = np.stack(list(bar.track(pool.map(picture_signs, products["picture"]))))
        finally:
            bar.close()
        save_tensors(path, products["product_id"], signs=signs)

    code, _ = code_and_settings(picture_signs)
    name = hash_json([code, catalogue_hash(folder), sorted(map(int, products["product_id"]))])[:16]
    path = cache_file(f"signs-{name}.safetensors", write)
    return load_tensors(path, products["product_id"])["signs"].numpy()


def near_pairs(signs: np.ndarray, rows: int = 512) -> np.ndarray:
    """Pairs of rows [K, 2], the earlier first, that differ in at most NEAR_SIGNS signs; a row of zeros is near none.

    All pairs are compared, as matrix products of `rows` rows: about half a minute for 85,000 pictures on 2 cores.
    """
    signs, found = signs.astype(np.float32), []
    for start in range(0, len(signs), rows):
        alike = signs[start:start + rows] @ signs[start:].T  # 256 - 2 x the number of differing signs
        found.append(np.argwhere(alike >= signs.shape[1] - 2 * NEAR_SIGNS) + start)
    pairs = np.concatenate(found)
    return pairs[pairs[:, 0] < pairs[:, 1]]


def duplicate_groups(products: pd.DataFrame, signs: np.ndarray) -> np.ndarray:
    """A group number [N] for each product; linked products have the same one, directly or through others.

    Two products are linked by the same title or the same description (`text_key`; empty texts link nothing) or by the
    same or nearly the same picture (`near_pairs`).
    """
    # Equal pictures are linked to the first of them, so that many copies of one do not make a pair of each two.
    distinct, firsts, which = np.unique(signs, axis=0, return_index=True, return_inverse=True)
    copies = np.column_stack([firsts[which], np.arange(len(which))])[signs.any(1)]
    links = [copies, firsts[near_pairs(distinct)]]
    for field in FIELDS:
        keys = products[field].map(text_key).to_numpy()
        rows = pd.Series(np.flatnonzero(keys != ""))
        links.append(np.column_stack([rows.groupby(keys[rows]).transform("first"), rows]))
    first, second = np.concatenate(links).T
    graph = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(len(products), len(products)))
    return connected_components(graph, directed=False)[1]


def make_split(products: pd.DataFrame, split: str, seed: int, groups: Sequence[int] | None = None) -> pd.DataFrame:
    """[product_id, label_id, part] with part train, val or test, stratified by class.

    The test part is 10% or 20% of the rows, the validation part 10% of the others (paper, section V). With `groups`
    (a number for each product) no group is in two parts, and the shares are kept as closely as whole groups allow.
    ValueError if a class or all rows are too few to be split. Shown in 01.
    """
    products = products.assign(group=range(len(products)) if groups is None else groups)
    products = products.sort_values("product_id")  # the file's order decides nothing
    counts = products["label_id"].value_counts()
    if counts.min() < 3:
        raise ValueError(f"class {counts.idxmin()} has {counts.min()} rows; a stratified split needs 3. "
                         "Use rows='all' or more rows")
    cut = cut_rows if groups is None else cut_groups
    rest, test = cut(products, SPLITS[split], seed)
    train, val = cut(rest, VALIDATION_SHARE, seed)
    if untrained := sorted(set(counts.index) - set(train["label_id"])):
        raise ValueError(f"class {untrained[0]} has no training row: all its rows are copies of each other. "
                         "Use grouped=False, more rows or another seed")
    parts = {"train": train, "val": val, "test": test}
    table = pd.concat([rows[["product_id", "label_id"]].assign(part=part) for part, rows in parts.items()])
    return table.sort_values("product_id", ignore_index=True)


def cut_rows(rows: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(the rest, a stratified random share of the rows, and at least as many rows as there are classes)."""
    size = max(math.ceil(share * len(rows)), rows["label_id"].nunique())
    return tuple(train_test_split(rows, test_size=size, stratify=rows["label_id"], random_state=seed))


def cut_groups(rows: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(the rest, a share of the rows), no group in both: of the 1 / share folds that with the fairest class counts."""
    labels = rows["label_id"].to_numpy()
    fair = share * np.bincount(labels)
    groups, largest, n = rows["group"].nunique(), np.bincount(labels).max(), round(1 / share)
    if min(groups, largest) < n:
        raise ValueError(f"{groups} groups of duplicates, and at most {largest} rows of a class, cannot be cut into "
                         f"{n} folds; use grouped=False or more rows")
    folds = StratifiedGroupKFold(n, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class has fewer rows than there are folds: one is enough
        rest, part = min(folds.split(rows, labels, rows["group"]), key=lambda cut: np.abs(
            np.bincount(labels[cut[1]], minlength=len(fair)) - fair).sum())
    return rows.iloc[rest], rows.iloc[part]


def split_stage(run: Run) -> Path:
    """Stage `splits`: split.csv, which every later stage and every modality uses. Used in 01."""
    folder = catalogue_folder(run)

    def build(out: Path) -> dict:
        profile = run.profile
        products = select_rows(load_catalogue(folder), profile.rows, profile.limit, run.seed)
        groups = duplicate_groups(products, cached_signs(folder, products)) if profile.grouped else None
        table = make_split(products, run.split, run.seed, groups)
        table.to_csv(out / "split.csv", index=False)
        return {part: int(n) for part, n in table["part"].value_counts().items()}

    return stage(run, "splits", build, inputs={"catalogue": catalogue_hash(folder)})


def read_split(run: Run) -> pd.DataFrame:
    """The run's split, [product_id, label_id, part], in order of product id. Used in 01, 02 and 05 to 08."""
    return pd.read_csv(read_stage(run, "splits") / "split.csv")


# ======================================================================================================
# 6  Text
# ======================================================================================================
split_words = partial(nltk.word_tokenize, language="french", preserve_line=True)  # no sentences: needs no download
MANY_TEXTS = 10_000  # from here on processes save more time than their start takes


def clean_text(text: str, how: str = "paper") -> str:
    """A title or description as the encoders read it (paper, section IV.A).

    "paper": HTML removed, split by NLTK's word tokenizer, lower-case. "light": HTML removed. Shown in 02.
    """
    text = strip_html(text)
    if how == "light":
        return text
    return " ".join(split_words(text)).lower()


def clean_texts(texts: Sequence[str], how: str, label: str) -> list[str]:
    """`clean_text` of each text, in processes if they are many."""
    plain = [strip_html(text) for text in texts]
    return plain if how == "light" else [" ".join(words).lower() for words in map_texts(split_words, plain, label)]


def map_texts(function: Callable[[str], object], texts: Sequence[str], label: str) -> Iterator:
    """`function(text)` of each text in their order, shown as progress; in one process for each CPU if they are many.

    `function` should be a library's: one of this module would make each process load all that it imports.
    """
    bar = Progress(label, len(texts), "texts")
    if len(texts) < MANY_TEXTS:
        yield from bar.track(map(function, texts))
    else:
        share = len(texts) // (8 * joblib.cpu_count()) + 1  # of one message: `function` is sent with each
        work = joblib.Parallel(joblib.cpu_count(), return_as="generator", batch_size=share, pre_dispatch="all")
        yield from bar.track(work(joblib.delayed(function)(text) for text in texts))
        joblib.externals.loky.get_reusable_executor().shutdown()  # they would wait, and keep their memory
    bar.close()


def text_stage(run: Run) -> Path:
    """Stage `text`: text.csv with the cleaned [product_id, title, description] of the split's rows. Used in 02."""
    folder = catalogue_folder(run)

    def build(out: Path) -> dict:
        products = load_catalogue(folder).set_index("product_id").loc[read_split(run)["product_id"]].reset_index()
        for field in FIELDS:
            products[field] = clean_texts(products[field], run.profile.clean, f"cleaning each {field}")
        products[["product_id", *FIELDS]].to_csv(out / "text.csv", index=False)
        return {"rows": len(products)}

    return stage(run, "text", build, READS["text"], inputs={"catalogue": catalogue_hash(folder)})


def read_text(run: Run) -> pd.DataFrame:
    """The cleaned text with each row's part and label: [product_id, title, description, label_id, part].

    Used in 02 to 04.
    """
    text = pd.read_csv(read_stage(run, "text") / "text.csv", keep_default_na=False)
    return text.merge(read_split(run), on="product_id", validate="one_to_one")


BASELINES = ("majority class", "TF-IDF title", "TF-IDF description", "TF-IDF both")


def tfidf_baseline(train: Sequence[str], labels: Sequence[int], texts: Sequence[str]) -> np.ndarray:
    """Class probabilities [N, 27] of `texts` by TF-IDF (words and pairs) and logistic regression. Shown in 02."""
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2),
                          LogisticRegression(C=10, max_iter=500))
    model.fit(train, labels)
    probabilities = np.zeros((len(texts), len(load_classes())), dtype=np.float32)
    probabilities[:, model[-1].classes_] = model.predict_proba(texts)
    return probabilities


def baseline_stage(run: Run) -> Path:
    """Stage `baselines`: probabilities.safetensors of the models BASELINES, for val and test. Used in 02."""

    def build(out: Path) -> dict:
        text = read_text(run)
        text["both"] = text["title"] + " " + text["description"]
        train, rest = text[text["part"] == "train"], text[text["part"] != "train"]
        majority = np.bincount(train["label_id"], minlength=len(load_classes())) / len(train)
        found = {"majority class": np.tile(majority.astype(np.float32), (len(rest), 1))}
        for field in (*FIELDS, "both"):
            found[f"TF-IDF {field}"] = tfidf_baseline(train[field], train["label_id"], rest[field])
        save_tensors(out / "probabilities.safetensors", rest["product_id"], **found)
        return {}

    return stage(run, "baselines", build, READS["baselines"])


def baseline_probabilities(run: Run, product_ids: Sequence[int]) -> dict[str, Tensor]:
    """Class probabilities [N, 27] of each baseline for products of the validation or test part. Used in 02 to 06."""
    found = load_tensors(read_stage(run, "baselines") / "probabilities.safetensors", product_ids)
    return {model: found[model] for model in BASELINES}


# ======================================================================================================
# 7  Scores
# ======================================================================================================
METRICS = ("accuracy", "macro_f1", "weighted_f1")


def score(truth: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """Accuracy, macro-F1 and weighted-F1 in [0, 1]; macro-F1 over the classes that occur in `truth`.

    Shown in 02 and 08. Used in 02, 07 and 08.
    """
    f1 = partial(f1_score, truth, predicted, labels=np.unique(truth), zero_division=0)
    return {"accuracy": float(accuracy_score(truth, predicted)), "macro_f1": float(f1(average="macro")),
            "weighted_f1": float(f1(average="weighted"))}


def bootstrap(truth: Sequence[int], predicted: Sequence[int], resamples: int, seed: int = 0) -> dict[str, tuple]:
    """95% bootstrap interval of each metric: rows are drawn again `resamples` times.

    With few rows a resample misses whole classes and macro-F1 comes out too high; the BCa interval corrects such a
    bias. Above 2,000 rows, where its cost grows with their square and the bias is gone, it is the percentile interval.
    Shown in 08.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    classes = int(max(truth.max(), predicted.max())) + 1

    def metrics(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        cells = np.bincount(truth * classes + predicted, minlength=classes ** 2)
        return np.array(_scores_of_confusion(cells.reshape(classes, classes)))

    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)  # no spread at all gives NaN, handled below
        found = scipy.stats.bootstrap((truth, predicted), metrics, paired=True, vectorized=False, rng=seed,
                                      n_resamples=resamples, method="BCa" if len(truth) <= 2000 else "percentile")
    value, ends = metrics(truth, predicted), found.confidence_interval
    low, high = (np.where(np.isnan(end), value, end) for end in ends)
    return {metric: (float(a), float(b)) for metric, a, b in zip(METRICS, low, high)}


def _scores_of_confusion(cells: np.ndarray) -> tuple[float, float, float]:
    """The three metrics of a confusion matrix [true, predicted]."""
    true, hits = cells.sum(1), np.diag(cells)
    f1 = 2 * hits / np.maximum(true + cells.sum(0), 1)
    return hits.sum() / cells.sum(), f1[true > 0].mean(), f1 @ true / true.sum()


def score_row(model: str, truth: Sequence[int], predicted: Sequence[int], run: Run) -> dict:
    """A table's row: model, n, each metric in percent and its interval as <metric>_low and _high. Used in 02 to 07."""
    row = {"model": model, "n": len(truth)}
    intervals = bootstrap(truth, predicted, run.profile.bootstrap)
    for metric, value in score(truth, predicted).items():
        row |= {metric: 100 * value, f"{metric}_low": 100 * intervals[metric][0],
                f"{metric}_high": 100 * intervals[metric][1]}
    return row


def score_table(rows: list[dict]) -> pd.DataFrame:
    """Rows of `score_row` for reading: model, n, and "value [low, high]" in percent per metric. Used in 02 to 08."""
    return pd.DataFrame([{"model": row["model"], "n": row["n"],
                          **{metric: f"{row[metric]:.1f} [{row[metric + '_low']:.1f}, {row[metric + '_high']:.1f}]"
                             for metric in METRICS}} for row in rows])


def mcnemar(truth: Sequence[int], first: Sequence[int], second: Sequence[int]) -> tuple[int, int, float]:
    """Rows that only the first has right, only the second has right, and the exact two-sided p. Used in 02 to 08."""
    truth, first, second = map(np.asarray, (truth, first, second))
    only_first = int(((first == truth) & (second != truth)).sum())
    only_second = int(((first != truth) & (second == truth)).sum())
    trials = only_first + only_second
    return only_first, only_second, float(scipy.stats.binomtest(only_first, trials).pvalue) if trials else 1.0


# ======================================================================================================
# 8  Fine-tuning
# ======================================================================================================
class Classifier(nn.Module):
    """An encoder, which gives one vector a row, and a linear layer to the classes.

    `encoder(**inputs)` returns [N, width]; `forward` returns the logits [N, classes] and, with labels, the loss.
    Shown in 03. Used in 03 and 05.
    """

    def __init__(self, encoder: nn.Module, width: int, classes: int = 27, dropout: float = 0.1):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.dropout(self.encoder(**inputs)))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def mixed_seed(*numbers: int) -> int:
    """One seed of 32 bits, all that torch's generator takes, from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class RowDataset(torch.utils.data.Dataset):
    """Rows as the Trainer wants them: `row(i)` gives a dictionary of inputs, to which the label is added.

    It is asked for draws: draw number `epoch * rows + i` is row i. With a `seed`, the draw decides whatever is random
    in `row`, so that augmentation does not depend on which process makes it, or on what came before.
    """

    def __init__(self, row: Callable[[int], dict], labels: Sequence[int], seed: int | None = None):
        self.row, self.labels, self.seed = row, list(labels), seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, draw: int) -> dict:
        i = draw % len(self)
        if self.seed is None:
            return {**self.row(i), "labels": int(self.labels[i])}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, draw))
            return {**self.row(i), "labels": int(self.labels[i])}


class EpochSampler(torch.utils.data.Sampler):
    """The draws of one epoch, in an order that seed and epoch alone decide: whole batches of `batch` rows.

    With `lengths`, rows of similar length share a batch, so that it pads little. The last batch is filled with rows
    from the epoch's beginning. Shown in 03.
    """

    def __init__(self, rows: int, batch: int, seed: int, lengths: Sequence[int] | None = None):
        self.rows, self.batch, self.seed, self.lengths, self.epoch = rows, batch, seed, lengths, 0

    def __len__(self) -> int:
        return math.ceil(self.rows / self.batch) * self.batch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        order = (torch.randperm(self.rows, generator=generator).tolist() if self.lengths is None
                 else get_length_grouped_indices(self.lengths, self.batch, generator=generator))
        yield from (self.epoch * self.rows + i for i in np.resize(order, len(self)).tolist())


class StudyTrainer(Trainer):
    """The Trainer with our order of rows, which neither a resume nor the number of processes changes."""

    def __init__(self, *args, sampler: EpochSampler, **kwargs):
        self.sampler = sampler
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, *args) -> EpochSampler:
        return self.sampler


class StudyCallback(TrainerCallback):
    """Tells the sampler which epoch it is, shows progress, and saves a checkpoint every `steps` steps (0: never).

    Not at an epoch's last step: the Trainer saves there itself, once the epoch has been scored.
    """

    def __init__(self, label: str, sampler: EpochSampler, steps: int):
        self.label, self.sampler, self.steps, self.bar = label, sampler, steps, None
        self.epoch_steps = len(sampler) // sampler.batch

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = Progress(self.label, state.max_steps - state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch = state.global_step // self.epoch_steps

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.advance()
        if self.steps and state.global_step % self.steps == 0 and state.global_step % self.epoch_steps:
            control.should_save = control.should_log = True  # logged, so that an epoch's loss survives a stop

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def finetune(model: Classifier, train: RowDataset, val: RowDataset, folder: Path, profile: Profile, *,
             collate: Callable, epochs: int, batch: int, lr: float, weight_decay: float, seed: int,
             lengths: Sequence[int] | None = None, workers: int = 0) -> pd.DataFrame:
    """Train `model` in place and leave it at its best epoch by validation macro-F1.

    AdamW with linear decay, gradients clipped at 1.0. `batch` rows make a step, shared by all processes; where they do
    not fit on a device, fewer at a time, whose gradients are added up. (Batch normalisation sees only the rows that are
    on a device together, or, on several GPUs, in all processes.) Checkpoints in `folder`/checkpoints, from which it
    resumes after a stop; the end in `folder`/trained.safetensors, so that a stop while features are written loses no
    training. `workers` processes load the rows. Returns the learning curve, one row an epoch: [epoch,
    train_loss, val_loss, val_accuracy, val_macro_f1]. Shown in 03.
    """
    sampler = EpochSampler(len(train), batch, seed, lengths)
    start = {name: value.clone() for name, value in model.cpu().state_dict().items()}
    sizes = iter(rows_at_a_time(batch, profile.device_batch))

    @find_executable_batch_size(starting_batch_size=next(sizes), reduce_batch_size_fn=lambda: next(sizes, 0))
    def attempt(rows: int) -> list[dict]:
        set_seed(seed)
        model.load_state_dict(start)
        arguments = training_arguments(
            profile, folder / "checkpoints", num_train_epochs=epochs, learning_rate=lr, weight_decay=weight_decay,
            per_device_train_batch_size=rows, per_device_eval_batch_size=2 * rows, seed=seed,
            gradient_accumulation_steps=batch // group().num_processes // rows, dataloader_num_workers=workers)
        patience = [EarlyStoppingCallback(profile.early_stopping)] if profile.early_stopping else []
        name = folder.name.removesuffix(".partial")
        trainer = StudyTrainer(
            model, arguments, sampler=sampler, data_collator=collate, train_dataset=train, eval_dataset=val,
            compute_metrics=validation_scores,
            callbacks=[StudyCallback(name, sampler, profile.checkpoint_steps), *patience])
        trainer.model_accepts_loss_kwargs = False  # forward's **inputs are the encoder's, not the loss's
        trainer.remove_callback(PrinterCallback)
        with memory_explained(rows):
            trainer.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints", precision(profile)))
        return trainer.state.log_history

    trained = folder / "trained.safetensors"
    if not agreed(trained.exists()):
        curve = learning_curve(attempt())
        group().wait_for_everyone()  # all have read the best epoch
        if group().is_main_process:
            curve.to_csv(folder / "curve.csv", index=False)
            save_file(model.state_dict(), trained.with_suffix(".partial"))
            trained.with_suffix(".partial").rename(trained)
    wait_for_file(trained)
    model.load_state_dict(load_file(trained))
    if group().is_main_process:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return pd.read_csv(folder / "curve.csv")


def rows_at_a_time(batch: int, device_batch: int) -> list[int]:
    """The sizes to try on one device, largest first: divisors of its share of a batch, at most `device_batch` (0: all).

    ValueError if the processes cannot share a batch alike.
    """
    share, left = divmod(batch, group().num_processes)
    if left:
        raise ValueError(f"a batch of {batch} rows cannot be shared by {group().num_processes} processes alike; "
                         "set processes or the batch so that it can")
    return [size for size in range(share, 0, -1) if share % size == 0 and size <= (device_batch or share)]


@contextmanager
def memory_explained(rows: int) -> Iterator[None]:
    """Where no smaller number of rows can be tried after memory ran out, a ValueError that says what to set.

    One process alone tries fewer rows. Of several, those that had room are waiting for this one, so all must end.
    """
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error) or (rows > 1 and group().num_processes == 1):
            raise
        smaller = f"device_batch={rows // 2} or " if rows > 1 else ""
        raise ValueError(f"out of memory with {rows} row(s) on a device at a time; set {smaller}a smaller max_length "
                         "or image_size, precision=bf16, or gradient_checkpointing=True") from error


def precision(profile: Profile) -> torch.dtype:
    """The data type of the encoders' matrix products; weights are float32 always."""
    types = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if profile.precision != "auto":
        return types[profile.precision]
    if device().type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def training_arguments(profile: Profile, folder: Path, **more: object) -> TrainingArguments:
    """The Trainer's settings that text and pictures share. Shown in 03."""
    cuda, dtype = device().type == "cuda", precision(profile)
    arguments = TrainingArguments(
        output_dir=folder, max_grad_norm=1.0, lr_scheduler_type="linear",
        eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch", save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="macro_f1", greater_is_better=True,
        restore_callback_states_from_checkpoint=True,  # how long early stopping has waited
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=not cuda,
        torch_compile_backend=None if profile.compile == "off" else profile.compile,
        dataloader_pin_memory=cuda, label_names=["labels"], remove_unused_columns=False, report_to="none",
        disable_tqdm=True, **more)
    arguments._n_gpu = min(1, arguments.n_gpu)  # otherwise one process would spread each batch over all GPUs
    return arguments


def loader_workers(profile: Profile) -> int:
    """How many processes load pictures for one that trains: the setting, or as many as it has cores, at most 8."""
    if profile.loader_workers >= 0:
        return profile.loader_workers
    return min(8, cores()) if device().type == "cuda" else 0


def validation_scores(found: transformers.EvalPrediction) -> dict[str, float]:
    """Scores and cross-entropy (nats) of all validation rows at once, however they were batched."""
    logits, labels = torch.as_tensor(found.predictions), torch.as_tensor(found.label_ids)
    return score(labels, logits.argmax(-1)) | {"cross_entropy": nn.functional.cross_entropy(logits, labels).item()}


CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def last_checkpoint(folder: Path, dtype: torch.dtype) -> str | None:
    """The newest whole checkpoint of the Trainer, the same for all processes; what a stop left of others is removed.

    A GPU in another precision than fp16 cannot read fp16's scaler, and does without it.
    """
    found = None
    if group().is_main_process:
        for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])):
            whole = all((checkpoint / file).exists() for file in CHECKPOINT_FILES)
            if whole and read_json(checkpoint / "trainer_state.json"):  # written last
                found = str(checkpoint)
            else:
                shutil.rmtree(checkpoint)
            if dtype != torch.float16:
                (checkpoint / "scaler.pt").unlink(missing_ok=True)
    return agreed(found)


def learning_curve(history: list[dict]) -> pd.DataFrame:
    """One row an epoch from the Trainer's log, whose losses are means over the steps since the entry before."""
    rows, sums, last = [], 0.0, 0
    first = 0
    for entry in history:
        if "loss" in entry:
            sums, last = sums + entry["loss"] * (entry["step"] - last), entry["step"]
        if "eval_cross_entropy" in entry:
            rows.append({"epoch": len(rows) + 1, "train_loss": sums / (last - first),
                         "val_loss": entry["eval_cross_entropy"], "val_accuracy": entry["eval_accuracy"],
                         "val_macro_f1": entry["eval_macro_f1"]})
            sums, first = 0.0, last
    return pd.DataFrame(rows)


def save_trained(folder: Path, head: nn.Linear, curve: pd.DataFrame) -> None:
    """Write head.safetensors (an encoder's linear layer) and curve.csv."""
    save_file(head.cpu().state_dict(), folder / "head.safetensors")
    curve.to_csv(folder / "curve.csv", index=False)


def curve_metrics(curve: pd.DataFrame) -> dict:
    """The best epoch of a learning curve and its validation scores: what a stage's manifest keeps. Used in 05."""
    best = curve.loc[curve["val_macro_f1"].idxmax()]
    return {"best_epoch": int(best["epoch"]), **best[["val_accuracy", "val_macro_f1"]]}


@torch.inference_mode()
def encode(encoder: nn.Module, batches: Iterable[dict[str, Tensor]],
           dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """The encoder's vectors [N, width] (float32, CPU) of each batch of inputs; frozen: eval mode, no gradient.

    Used in 05.
    """
    encoder.eval().to(device())
    with torch.autocast(device().type, dtype, enabled=dtype != torch.float32):
        for batch in batches:
            yield encode_batch(encoder, batch)


def encode_batch(encoder: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The vectors [N, width] (float32, CPU) of one batch; by halves when memory runs out."""
    try:
        return encoder(**{name: tensor.to(device()) for name, tensor in batch.items()}).float().cpu()
    except RuntimeError as error:
        if not should_reduce_batch_size(error) or len(next(iter(batch.values()))) == 1:
            raise
    clear_device_cache(garbage_collection=True)
    halves = zip(*(tensor.chunk(2) for tensor in batch.values()))
    return torch.cat([encode_batch(encoder, dict(zip(batch, half))) for half in halves])


def encode_rows(encoder: nn.Module, groups: Sequence[Sequence[int]], inputs: Callable[[Sequence[int]], dict],
                dtype: torch.dtype, label: str) -> Tensor:
    """The vectors [N, width] (float32, CPU) of all rows, each in one of the `groups`; `inputs(group)` is its batch.

    The processes share the groups; each gets all vectors.
    """
    rows = sum(map(len, groups))
    mine = groups[group().process_index::group().num_processes]
    bar = Progress(f"{label} features", sum(map(len, mine)), "rows")
    features = None
    for places, vectors in zip(mine or groups[:1], encode(encoder, map(inputs, mine or groups[:1]), dtype)):
        features = torch.zeros(rows, vectors.shape[1]) if features is None else features
        if mine:  # a process without a group of its own only learns the width
            features[places] = vectors
            bar.advance(len(places))
    bar.close()
    return features if group().num_processes == 1 else reduce(features.to(device()), "sum").cpu()


def fit_head(head: nn.Linear, features: Tensor, labels: Tensor, parts: np.ndarray) -> pd.DataFrame:
    """Fit the linear layer of a frozen encoder by logistic regression on the training part's features [N, width].

    Returns a learning curve of one row, epoch 0: no step of the encoder's training.
    """
    train = torch.as_tensor(parts == "train")
    mean, std = features[train].mean(0), features[train].std(0).clamp(min=1e-6)
    model = LogisticRegression(max_iter=300).fit(((features - mean) / std)[train].numpy(), labels[train].numpy())
    weight = torch.tensor(model.coef_, dtype=torch.float32) / std
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-1e4)  # a class without a training row is never predicted
        head.weight[model.classes_] = weight
        head.bias[model.classes_] = torch.tensor(model.intercept_, dtype=torch.float32) - weight @ mean
        logits = {part: head(features[torch.as_tensor(parts == part)]) for part in ("train", "val")}
    found = {part: validation_scores(transformers.EvalPrediction(rows, labels[torch.as_tensor(parts == part)]))
             for part, rows in logits.items()}
    return pd.DataFrame([{"epoch": 0, "train_loss": found["train"]["cross_entropy"],
                          "val_loss": found["val"]["cross_entropy"], "val_accuracy": found["val"]["accuracy"],
                          "val_macro_f1": found["val"]["macro_f1"]}])


# ======================================================================================================
# 9  Text encoders
# ======================================================================================================
class TextEncoder(nn.Module):
    """A Hugging Face text model whose output is one vector a text: that of the first token, or the mean.

    T_c, D_c, T_f, D_f of the paper: [N, d], d = 768 for the paper's two checkpoints. Shown in 03.
    """

    def __init__(self, model: nn.Module, pooling: str = "first"):
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # [N, length, d]
        if self.pooling == "first":
            return tokens[:, 0]
        mask = attention_mask[..., None].to(tokens.dtype)
        return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)


def train_tokenizer(encoder: str, texts: Sequence[str], vocabulary: int, folder: Path):
    """A tokenizer of the encoder's own kind, trained on `texts` (the training part) and saved in `folder`.

    CamemBERT: SentencePiece's Unigram, of at most `vocabulary` pieces. FlauBERT: byte-pair encoding of the words
    that its own rules find. The same texts give the same ids. Used in 02.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_unigram(texts, vocabulary) if encoder == "camembert" else train_bpe(texts, vocabulary, folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_unigram(texts: Sequence[str], vocabulary: int) -> CamembertTokenizer:
    """CamemBERT's tokenizer with pieces learnt from `texts`."""
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED")
    own = 3  # SentencePiece's own <unk>, <s> and </s>, which come first
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=file, model_type="unigram",
        vocab_size=vocabulary - len(special) + own, hard_vocab_limit=False, character_coverage=1.0,
        normalization_rule_name="identity", num_threads=1, minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    learnt = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(own, len(pieces))]
    return CamembertTokenizer(vocab=[(token, 0.0) for token in special] + learnt)


def train_bpe(texts: Sequence[str], vocabulary: int, folder: Path) -> FlaubertTokenizer:
    """FlauBERT's tokenizer with merges learnt from `texts`; writes its vocab.json and merges.txt. Shown in 04."""
    special = ["<s>", "</s>", "<pad>", "<unk>", *(f"<special{i}>" for i in range(10))]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(special)})
    (folder / "merges.txt").write_text("")
    rules = FlaubertTokenizer(folder / "vocab.json", folder / "merges.txt")  # for the way it finds words
    words = [rules.moses_tokenize(rules.moses_pipeline(rules.preprocess_text(text), "fr"), "fr") for text in texts]
    ends = sorted({word[-1] + "</w>" for text in words for word in text})  # named first, or their ids would vary
    bpe = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(map(" ".join, words), trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special + ends, end_of_word_suffix="</w>", show_progress=False))
    bpe.model.save(str(folder))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]  # FlauBERT's file has no header
    (folder / "merges.txt").write_text("".join(f"{line}\n" for line in merges), encoding="utf-8")
    return FlaubertTokenizer(folder / "vocab.json", folder / "merges.txt")


def small_text_model(encoder: str, tokenizer, width: int, layers: int, max_length: int) -> nn.Module:
    """A CamembertModel or FlaubertModel of `layers` layers and random weights, for the tokenizer's vocabulary.

    No dropout of attention weights: it would take a third of the training time on a CPU.
    """
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
               "eos_token_id": tokenizer.eos_token_id}
    if encoder == "camembert":
        return CamembertModel(CamembertConfig(
            vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=4 * width, max_position_embeddings=max_length + 2, attention_probs_dropout_prob=0.0,
            **special), add_pooling_layer=False)
    return FlaubertModel(FlaubertConfig(
        vocab_size=len(tokenizer), emb_dim=width, n_layers=layers, n_heads=4, max_position_embeddings=max_length,
        attention_dropout=0.0, unk_index=tokenizer.unk_token_id, **special))


def load_text_model(run: Run, encoder: str, texts: Sequence[str], folder: Path) -> tuple[nn.Module, object]:
    """The model and tokenizer that fine-tuning starts from: a checkpoint, or small ones made for `texts`.

    Shown in 03. Used in 03 and 04.
    """
    profile, source = run.profile, getattr(run.profile, encoder)
    if source != "small":
        model, tokenizer = load_checkpoint(source, profile.max_length, profile.gradient_checkpointing)
        check_pooling(source, model, profile.pooling)
        return model, tokenizer
    tokenizer = train_tokenizer(encoder, texts, profile.vocabulary, folder)
    return small_text_model(encoder, tokenizer, profile.text_width, profile.text_layers, profile.max_length), tokenizer


def checkpoint_place(source: str) -> str:
    """The folder that `source` names from the project's root; if there is none, `source`, a name on the hub."""
    folder = from_root(source)
    return str(folder) if folder.is_dir() else source


def load_checkpoint(source: str, max_length: int, gradient_checkpointing: bool = False) -> tuple[nn.Module, object]:
    """Model (float32, without the pooler, which nothing here reads) and tokenizer of a Hugging Face text checkpoint.

    `source` is a folder or a name on the hub. ValueError if it cannot be had, or cannot read `max_length` tokens.
    """
    try:
        place = checkpoint_place(source)
        model = AutoModel.from_pretrained(place, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(place)
    except Exception as error:  # the libraries raise many kinds for a folder or a download that is not whole
        raise ValueError(f"text checkpoint {source!r} cannot be loaded: it is neither a whole folder here, nor in the "
                         f"hub's cache, nor can it be had from the hub ({str(error).splitlines()[0]})") from error
    if len(tokenizer) < model.config.vocab_size / 2:  # transformers makes an empty one where files are missing
        raise ValueError(f"text checkpoint {source!r}: the model has {model.config.vocab_size} tokens and its "
                         f"tokenizer {len(tokenizer)}; the tokenizer's files are missing")
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    if tokenizer.pad_token is None or model.config.is_encoder_decoder:
        lacks = "has no padding token" if tokenizer.pad_token is None else "is an encoder with a decoder"
        raise ValueError(f"text checkpoint {source!r} {lacks}; take an encoder such as BERT or RoBERTa")
    tokenizer.padding_side = "right"  # the first token is the text's, not padding
    refuse_longer(source, longest_input(model, tokenizer), max_length)
    if gradient_checkpointing and model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model, tokenizer


@torch.no_grad()
def check_pooling(source: str, model: nn.Module, pooling: str) -> None:
    """ValueError if the vector of a text's first token is the same whatever follows it, as in a model such as GPT-2."""
    ids = torch.tensor([[5, 6, 7], [5, 8, 9]])
    one, other = TextEncoder(model, pooling).eval()(ids, torch.ones_like(ids))
    if torch.allclose(one, other, atol=1e-6):
        raise ValueError(f"text checkpoint {source!r}: its first token does not see the others, so its vector says "
                         "nothing about the text; set pooling=mean")


def refuse_longer(source: str, longest: int, max_length: int) -> None:
    """ValueError if a checkpoint reads fewer tokens than `max_length`."""
    if max_length > longest:
        raise ValueError(f"text checkpoint {source!r} reads at most {longest} tokens; set max_length={longest} or less")


def longest_input(model: nn.Module, tokenizer) -> int:
    """The number of tokens that a text model and its tokenizer can take."""
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    positions = positions if positions > 0 else sys.maxsize  # XLNet has no limit and says -1
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)  # RoBERTa's kin number positions from the one after padding
    return min(positions if padding is None else positions - padding - 1, tokenizer.model_max_length)


def tokenise(tokenizer, texts: Sequence[str], max_length: int) -> list[dict[str, list[int]]]:
    """input_ids of each text, cut at `max_length` tokens; `tokenizer.pad` makes a batch of them, with its mask.

    A tokenizer in Rust takes all texts in one call, or, where words do not depend on their neighbours, all distinct
    words. One in Python, such as FlauBERT's, takes texts one by one; if they are many, in processes, and the ids are
    kept in data/cache under a name made of the tokenizer's files and the texts. An empty text, as of a missing
    description, has the opening and the closing token. Used in 02 to 04.
    """
    texts = list(texts)
    if cuts_at_spaces(tokenizer):
        ids = ids_of_words(tokenizer, texts, max_length)
    elif tokenizer.is_fast:
        rust = tokenizer.backend_tokenizer  # itself, so that no offsets into the texts are computed
        rust.no_padding()
        rust.enable_truncation(max_length, direction=tokenizer.truncation_side)
        ids = [found.ids for found in rust.encode_batch_fast(texts)]
    elif len(texts) < MANY_TEXTS:
        ids = [tokenizer.encode(text, truncation=True, max_length=max_length) for text in texts]
    else:
        ids = cached_ids(tokenizer, texts, max_length)
    return [{"input_ids": row} for row in ids]


def cuts_at_spaces(tokenizer) -> bool:
    """Whether a tokenizer cuts texts at spaces before all else, and frames them by one token on either side.

    CamemBERT's and XLM-R's do: a word's tokens are the same in every text.
    """
    if not tokenizer.is_fast or tokenizer.truncation_side != "right":
        return False
    rust, steps = tokenizer.backend_tokenizer, tokenizer.backend_tokenizer.pre_tokenizer
    return (isinstance(steps, pre_tokenizers.Sequence) and isinstance(steps[0], pre_tokenizers.WhitespaceSplit)
            and len(rust.encode("").ids) == 2)


def ids_of_words(tokenizer, texts: list[str], max_length: int) -> list[list[int]]:
    """The token ids of each text, put together from those of its words; a word that occurs often is looked at once."""
    rust = tokenizer.backend_tokenizer
    rust.no_padding()
    rust.no_truncation()
    first, last = rust.encode("").ids
    words = list(dict.fromkeys(itertools.chain.from_iterable(text.split(" ") for text in texts)))
    known = dict(zip(words, (found.ids for found in rust.encode_batch_fast(words, add_special_tokens=False))))
    rows = (itertools.chain.from_iterable(map(known.__getitem__, text.split(" "))) for text in texts)
    return [[first, *itertools.islice(row, max_length - 2), last] for row in rows]


def cached_ids(tokenizer, texts: list[str], max_length: int) -> list[list[int]]:
    """The token ids of each text; computed once, then read from data/cache: ids one after another, and their ends."""
    def write(path: Path) -> None:
        encode = partial(tokenizer.encode, truncation=True, max_length=max_length)
        distinct = list(dict.fromkeys(texts))
        known = dict(zip(distinct, map_texts(encode, distinct, "tokens")))
        rows = [known[text] for text in texts]
        ends = torch.tensor([len(row) for row in rows]).cumsum(0)
        save_file({"ids": torch.tensor([i for row in rows for i in row], dtype=torch.int32), "ends": ends}, path)

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: hash_file(path) for path in Path(folder).iterdir()}
    key = [files, type(tokenizer).__name__, transformers.__version__, max_length, hash_json(texts)]
    found = load_file(cache_file(f"tokens-{hash_json(key)[:16]}.safetensors", write))
    ids, ends = found["ids"].tolist(), found["ends"].tolist()
    return [ids[start:end] for start, end in zip([0, *ends], ends)]


def text_features(encoder: TextEncoder, tokenizer, rows: list[dict], batch: int, dtype: torch.dtype,
                  label: str) -> Tensor:
    """The vectors [N, d] of tokenised texts, in their order; longest first, so that batches pad little."""
    order = np.argsort([-len(row["input_ids"]) for row in rows], kind="stable")
    groups = [order[start:start + batch] for start in range(0, len(order), batch)]
    return encode_rows(encoder, groups, dtype=dtype, label=label, inputs=lambda places: dict(
        tokenizer.pad([rows[i] for i in places], return_tensors="pt")))


def text_encoder_stage(run: Run, encoder: str, field: str) -> Path:
    """Stage `<encoder>_<field>`: the encoder fine-tuned on one field, and its features.

    Writes encoder/ (Hugging Face model and tokenizer), head.safetensors (linear layer), features.safetensors
    (`features` [N, d] by product id, all parts) and curve.csv. Used in 03 and 04.
    """
    name = f"{one_of('encoder', encoder, TEXT_ENCODERS)}_{one_of('field', field, FIELDS)}"

    def build(out: Path) -> dict:
        profile = run.profile
        text = read_text(run)
        training = text[text["part"] == "train"]
        set_seed(run.seed)
        both_fields = [*training["title"], *training["description"]]  # one tokenizer serves both fields
        with tempfile.TemporaryDirectory() as folder:  # for a small tokenizer's files
            model, tokenizer = load_text_model(run, encoder, both_fields, Path(folder))
        with group().main_process_first():  # one fills the cache
            rows = tokenise(tokenizer, text[field], profile.max_length)
        lengths = np.array([len(row["input_ids"]) for row in rows])
        classifier = Classifier(TextEncoder(model, profile.pooling), model.config.hidden_size,
                                dropout=profile.text_dropout)
        if not profile.freeze_encoders:
            places = {part: np.flatnonzero(text["part"] == part) for part in ("train", "val")}
            places["val"] = places["val"][np.argsort(lengths[places["val"]])]  # so that batches pad little
            datasets = {part: RowDataset([rows[i] for i in found].__getitem__, text["label_id"].iloc[found])
                        for part, found in places.items()}
            curve = finetune(classifier, **datasets, folder=out, profile=profile, epochs=profile.text_epochs,
                             batch=profile.text_batch, lr=profile.text_lr, weight_decay=0.01, seed=run.seed,
                             collate=DataCollatorWithPadding(tokenizer), lengths=lengths[places["train"]].tolist())
        features = text_features(classifier.encoder, tokenizer, rows, 4 * profile.text_batch, precision(profile), name)
        if profile.freeze_encoders:
            curve = fit_head(classifier.head, features, torch.tensor(text["label_id"]), text["part"].to_numpy())
        if group().is_main_process:
            model.save_pretrained(out / "encoder")
            tokenizer.save_pretrained(out / "encoder")
            save_trained(out, classifier.head, curve)
            save_tensors(out / "features.safetensors", text["product_id"], features=features)
        return curve_metrics(curve) | {"parameters": sum(p.numel() for p in model.parameters())}

    return stage(run, name, build, READS[name], inputs={"encoder": hash_source(getattr(run.profile, encoder))},
                 together=True)


def head_probabilities(folder: Path, features: Tensor) -> Tensor:
    """Class probabilities [N, 27] that a fine-tuned encoder's own linear head gives its features. Used in 05."""
    head = load_file(folder / "head.safetensors")
    return torch.softmax(nn.functional.linear(features, head["weight"], head["bias"]), -1)


# ======================================================================================================
# 10  Pictures
# ======================================================================================================
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SERESNEXT_MIRROR = "timm/legacy_seresnext50_32x4d.in1k"  # on the model hub: the same weights as safetensors


def decode_picture(path: str | Path, size: int) -> np.ndarray:
    """The picture as uint8 [3, size, size] RGB; ValueError names a file that cannot be read. Shown in 05."""
    with open_picture(path) as picture:
        small = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(small).transpose(2, 0, 1)


class DecodedPictures:
    """Pictures of `paths` that are decoded each time they are asked for, by the same indexing as an array's first axis.

    `pictures[i]` is uint8 [3, size, size], a slice or an array of positions gives [n, 3, size, size].
    """

    def __init__(self, paths: Sequence[str], size: int):
        self.paths, self.shape, self.dtype = list(paths), (len(paths), 3, size, size), np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        positions = np.arange(len(self))[index]
        if positions.ndim == 0:
            return decode_picture(self.paths[positions], self.shape[-1])
        found = np.empty((len(positions), *self.shape[1:]), self.dtype)
        for i, picture in enumerate(self.decode(positions)):
            found[i] = picture
        return found

    def decode(self, positions: Iterable[int]) -> Iterator[np.ndarray]:
        """These pictures one by one, decoded on all processors."""
        with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes outside the interpreter's lock
            yield from pool.map(lambda i: self[int(i)], positions)


def cached_pictures(run: Run, size: int) -> np.ndarray | DecodedPictures:
    """uint8 [N, 3, size, size] of the split's products in order of product id, memory-mapped.

    Decoded once into data/cache (150 kB a picture at 224 pixels); the file's name says which pictures it holds.
    With the setting `cache_pictures` off they are decoded each time they are asked for, and nothing is written.
    OSError if the disk has no room. Used in 05 and 06.
    """
    folder = catalogue_folder(run)
    products = load_catalogue(folder).set_index("product_id").loc[np.sort(read_split(run)["product_id"])]
    pictures = DecodedPictures(products["picture"], size)
    if not run.profile.cache_pictures:
        return pictures
    code, _ = code_and_settings(decode_picture)
    name = hash_json([code, catalogue_hash(folder), list(map(int, products.index)), size])[:16]
    return np.load(cache_file(f"pictures-{name}.npy", partial(write_pictures, pictures)), mmap_mode="r")


def write_pictures(pictures: DecodedPictures, path: Path) -> None:
    """Decode all pictures into one NumPy file; OSError if the disk has no room."""
    needed, free = math.prod(pictures.shape), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(f"the cache of decoded pictures needs {needed / 1e9:.2f} GB in {path.parent}, where "
                      f"{free / 1e9:.2f} GB are free; free some disk space, or set cache_pictures=False, which decodes "
                      "each picture in every epoch")
    cache = np.lib.format.open_memmap(path, "w+", pictures.dtype, pictures.shape)
    bar = Progress("decoding", len(pictures), "pictures")
    try:
        for i, picture in enumerate(bar.track(pictures.decode(range(len(pictures))))):
            cache[i] = picture
    finally:
        bar.close()
    cache.flush()


def augmentation(size: int) -> v2.Transform:
    """Random rotation, flip and crop of training pictures (paper, section IV.A); uint8 to uint8. Shown in 05."""
    return v2.Compose([v2.ToPILImage(),  # Pillow rotates several times as fast as tensors do on a CPU
                       v2.RandomRotation(15, interpolation=v2.InterpolationMode.BILINEAR),
                       v2.RandomHorizontalFlip(),
                       v2.RandomResizedCrop(size, scale=(0.8, 1.0)),
                       v2.PILToTensor()])


def normalise(pictures: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Bytes [..., 3, H, W] to float32: as 0 to 1, minus `mean`, by `std` of each channel (paper, section IV.A).

    Shown in 05. Used in 05.
    """
    mean, std = (torch.as_tensor(values, device=pictures.device).view(3, 1, 1) for values in (mean, std))
    return (pictures.float() / 255 - mean) / std


class SmallSENet(SENet):
    """SE-ResNeXt at a quarter of its width: the blocks of pretrainedmodels, 512 output channels. Shown in 05."""

    def __init__(self):
        super().__init__(SEResNeXtBottleneck, [1, 1, 1, 1], groups=8, reduction=16, dropout_p=None, inplanes=16,
                         input_3x3=False, downsample_kernel_size=1, downsample_padding=0)
        self.last_linear = nn.Linear(512, 1000)

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 4, *args, **kwargs)


@dataclass(frozen=True)
class PictureFormat:
    """What a backbone expects: mean and deviation per channel (red, green, blue; bytes as 0 to 1), pixels a side."""
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    size: int = 224
    bgr: bool = False  # blue first


def split_backbone_name(name: str) -> tuple[str, str]:
    """("torchvision", "resnet50") of "torchvision/resnet50"; pretrainedmodels' names have no library before them.

    ValueError with close names for a name that no library knows.
    """
    library, _, model = name.rpartition("/")
    known = ["small", *pretrainedmodels.model_names,
             *(f"torchvision/{other}" for other in torchvision.models.list_models(module=torchvision.models)),
             *(f"timm/{other}" for other in timm.list_models())]
    if name not in known and not (library == "timm" and model in timm.list_pretrained()):
        close = difflib.get_close_matches(name, known, n=5)
        hint = f"close names: {', '.join(close)}" if close else "examples: se_resnext50_32x4d, timm/convnext_tiny"
        raise ValueError(f"unknown image encoder {name!r}; it must be small, a name of pretrainedmodels, "
                         f"torchvision/<name> or timm/<name>; {hint}")
    return library, model


def make_backbone(name: str) -> tuple[nn.Module, int, PictureFormat]:
    """(network with random weights and without its classification layer, width of its vectors, what it expects)."""
    library, model_name = split_backbone_name(name)
    if library == "timm":
        model = timm.create_model(model_name, num_classes=0)
        data = timm.data.resolve_model_data_config(model)
        return model, model.head_hidden_size, PictureFormat(data["mean"], data["std"], data["input_size"][-1])
    if library == "torchvision":
        model = torchvision.models.get_model(model_name, weights=None)
        if hasattr(model, "transform_input"):
            model.transform_input = True  # as torchvision sets it where it loads the weights itself
        data = torchvision.models.get_model_weights(model_name).DEFAULT.transforms()
        return model, remove_classifier(model), PictureFormat(data.mean, data.std, data.crop_size[0])
    if name == "small":
        model, expected = SmallSENet(), PictureFormat()
    else:
        model, expected = pretrained_model(name)
    for child_name, child in model.named_children():
        if isinstance(child, nn.AvgPool2d) and child.padding == 0:  # of 7 x 7 cells or so: made for one picture size
            setattr(model, child_name, nn.AdaptiveAvgPool2d(1))
    return model, remove_classifier(model), expected


def pretrained_model(name: str) -> tuple[nn.Module, PictureFormat]:
    """A network of pretrainedmodels with random weights; those that it wraps come from torchvision itself."""
    wrapped = {"inceptionv3": "inception_v3"}.get(name, name)
    if wrapped in torchvision.models.list_models(module=torchvision.models):
        model = torchvision.models.get_model(wrapped, weights=None)
    else:  # copied, because the layers of some are made once, at import
        model = copy.deepcopy(getattr(pretrainedmodels, name)(num_classes=1000, pretrained=None))
        if any(weight.is_meta for weight in model.parameters()):
            model.to_empty(device=torch.get_default_device())
            for layer in model.modules():
                getattr(layer, "reset_parameters", lambda: None)()
    data = pretrained_settings(name)
    order = -1 if data["input_space"] == "BGR" else 1
    mean, std = ([value / data["input_range"][1] for value in data[key]][::order] for key in ("mean", "std"))
    return model, PictureFormat(mean, std, data["input_size"][-1], bgr=order == -1)


def pretrained_settings(name: str) -> dict:
    """pretrainedmodels' own record of its first weights for a network: address, mean, std, input range, ..."""
    return next(iter(pretrainedmodels.pretrained_settings[name].values()))


def remove_classifier(model: nn.Module) -> int:
    """Take the layer with 1,000 outputs off a network and return the width of what it read."""
    path, layer = [(path, layer) for path, layer in model.named_modules()
                   if isinstance(layer, (nn.Linear, nn.Conv2d)) and len(layer.weight) == 1000][-1]
    model.set_submodule(path, nn.Identity())
    return layer.weight.shape[1]


@dataclass(frozen=True)
class WeightSource:
    """A place where weights are looked for. `here`: they lie on this machine, so that `load` does not ask `url`."""
    label: str
    here: bool
    load: Callable[[], dict[str, Tensor]]
    url: str = ""


def weight_sources(name: str, weights: str) -> list[WeightSource]:
    """Where a backbone's weights are looked for, in this order; nothing is read or asked yet.

    `weights` is the setting `image_weights`: "imagenet", a file (from the project's root), or "none". The small
    network has no ImageNet weights. An empty list means random weights. ValueError if nobody offers any.
    """
    library, model = split_backbone_name(name)
    if weights == "none" or (name == "small" and weights == "imagenet"):
        return []
    url = published_url(name)
    if file := weight_file(weights):
        read = read_checked if file.name == file_name(url) else read_weights  # another file's checksum is not known
        return [WeightSource(f"file {weights}", file.exists(), partial(read, file))]
    if library == "timm" and (repository := timm.get_pretrained_cfg(model).hf_hub_id):
        return [on_hub(repository, partial(read_timm, model))]
    if not url:
        raise ValueError(f"timm has no weights for {model}; set image_weights to a file, or to none")
    found = published_at(library or "pretrainedmodels", url)
    if name == "se_resnext50_32x4d":  # the address is often down
        found.append(on_hub(SERESNEXT_MIRROR, read_mirror))
    return found


def published_url(name: str) -> str:
    """The address of a backbone's ImageNet weights, as its library knows it; "" if there is none."""
    library, model = split_backbone_name(name)
    if library == "timm":
        return timm.get_pretrained_cfg(model).url or ""
    if library == "torchvision":
        return torchvision.models.get_model_weights(model).DEFAULT.url
    return "" if name == "small" else pretrained_settings(name)["url"]


def file_name(url: str) -> str:
    """"resnet50-11ad3fa6.pth" of its address."""
    return Path(urlparse(url).path).name


def weight_file(weights: str) -> Path | None:
    """The file that the setting `image_weights` names, from the project's root; None if it names none."""
    return None if weights in ("imagenet", "none") else from_root(weights)


def published_at(owner: str, url: str) -> list[WeightSource]:
    """A file in torch hub's cache, then the address it comes from."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name(url)
    return [WeightSource(f"torch hub cache {path.name}", path.exists(), partial(read_checked, path)),
            WeightSource(f"{owner}, {url}", False, partial(download_checked, url, path), url)]


def on_hub(repository: str, load: Callable[[], dict[str, Tensor]]) -> WeightSource:
    """model.safetensors of a repository on the model hub, or in the hub's cache on this machine."""
    here = isinstance(try_to_load_from_cache(repository, "model.safetensors"), str)
    return WeightSource(f"model hub {repository}", here, load, hf_hub_url(repository, "model.safetensors"))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file, read without running code that it may hold.

    FileNotFoundError if it is missing, ValueError if it is damaged or holds anything else.
    """
    if not path.exists():
        raise FileNotFoundError("there is no such file")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(
            path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"it is damaged, or holds more than tensors ({one_line(error)})") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError("it does not hold a state dict (a dictionary of tensors)")
    return dict(found)


def read_checked(path: Path) -> dict[str, Tensor]:
    """`read_weights` of a file whose name ends in the first digits of its sha256, which is compared before."""
    if not path.exists():
        raise FileNotFoundError("not there")
    if not hash_file(path).startswith(hash_in_name(path)):
        raise ValueError(f"its sha256 begins with {hash_file(path)[:8]}, not as its name says; delete {path}")
    return read_weights(path)


def hash_in_name(path: Path) -> str:
    """"a260b3a4" of se_resnext50_32x4d-a260b3a4.pth; ValueError if the name has no such digits."""
    if found := re.search(r"-([0-9a-f]{8,64})\.", path.name):
        return found[1]
    raise ValueError(f"{path.name} does not say its sha256, so it cannot be checked")


def download_checked(url: str, path: Path) -> dict[str, Tensor]:
    """Fetch a file into torch hub's cache if its sha256 is as its name says, and read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds without an answer; torch hub would wait for minutes
    try:
        torch.hub.download_url_to_file(url, path, hash_in_name(path), progress=False)
    finally:
        socket.setdefaulttimeout(patience)
    return read_checked(path)


def read_mirror() -> dict[str, Tensor]:
    """SE-ResNeXt-50's weights from the model hub, after a check of the sha256 that the hub publishes.

    In the hub's cache a large file is a link to a blob that is named by it; elsewhere the hub is asked.
    """
    path = Path(hf_hub_download(SERESNEXT_MIRROR, "model.safetensors"))
    published = path.resolve().name
    if not re.fullmatch("[0-9a-f]{64}", published):
        published = get_hf_file_metadata(hf_hub_url(SERESNEXT_MIRROR, "model.safetensors")).etag
    if hash_file(path) != published:
        raise ValueError(f"its sha256 begins with {hash_file(path)[:8]}, not {published[:8]}; delete {path.resolve()}")
    return read_weights(path)


def read_timm(model: str) -> dict[str, Tensor]:
    """The weights that timm itself loads for one of its networks."""
    return timm.create_model(model, pretrained=True, num_classes=0).state_dict()


def load_weights(name: str, weights: str) -> tuple[dict[str, Tensor] | None, str]:
    """(weights of a backbone, where they come from); None for random weights.

    ValueError says which places were tried, what was wrong with each, and how to bring the file by hand.
    """
    sources, tried = weight_sources(name, weights), []
    for source in sources:
        try:
            return source.load(), source.label
        except Exception as error:  # of a network, a cache, a file: each has its own
            tried.append(f"{source.label}: {one_line(error)}")
    if tried:
        raise ValueError(f"no usable weights for {name} (tried {'; '.join(tried)}); bring the file by hand and set "
                         "image_weights=<file> (.safetensors, .pth or .pt), or image_weights=none for random weights")
    return None, "random weights"


def fit_weights(model: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Load weights into a network without classifier; those of a 1,000-class head are dropped, all others must match.

    ValueError names keys that are missing or unexpected, and shapes that differ.
    """
    own = model.state_dict()
    # DenseNet's files date from a time when a layer's name could hold a dot.
    weights = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key): x for key, x in weights.items()}
    weights = {key: x for key, x in weights.items() if key in own or x.shape[:1] not in ((1000,), (1001,))}
    wrong = {"wrong shape": [f"{key} {list(x.shape)} instead of {list(own[key].shape)}" for key, x in weights.items()
                             if key in own and x.shape != own[key].shape]}
    if not wrong["wrong shape"]:
        wrong["missing"], wrong["unexpected"] = model.load_state_dict(weights, strict=False)
    if any(wrong.values()):
        parts = [f"{len(keys)} {word} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})"
                 for word, keys in wrong.items() if keys]
        raise ValueError(f"the weights do not fit {what}: {'; '.join(parts)}; set image_weights to a file of this "
                         "very network")


class ImageEncoder(nn.Module):
    """A network without its classification layer: one vector a picture, [N, width] (SE-ResNeXt-50: 2048, small: 512).

    `name` is the setting `seresnext`, `weights` the setting `image_weights`. `forward` takes bytes (0 to 255, uint8
    or float) [N, 3, H, W], red first, and prepares them as this network expects. Shown in 05. Used in 05 and 06.
    """

    def __init__(self, name: str, weights: str = "none"):
        super().__init__()
        self.model, self.width, self.expects = make_backbone(name)
        found, self.weights_from = load_weights(name, weights)
        if found is not None:
            fit_weights(self.model, found, f"{name} ({self.weights_from})")
        for statistic in ("mean", "std"):  # buffers, so that they move to the encoder's device
            self.register_buffer(statistic, torch.tensor(getattr(self.expects, statistic)), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = normalise(pixels, self.mean, self.std)
        if self.expects.bgr:
            pixels = pixels.flip(1)
        vectors = self.model(pixels.contiguous(memory_format=torch.channels_last))  # the faster layout
        return getattr(vectors, "logits", vectors).flatten(1)  # Inception returns more than one thing in training


def check_inputs(run: Run) -> None:
    """ValueError for what would stop a run after hours: pictures, checkpoints' folders, the weight file, a network."""
    profile = run.profile
    check_image_encoder(profile)
    check_pictures(select_rows(load_catalogue(catalogue_folder(run)), profile.rows, profile.limit, run.seed))
    if (file := weight_file(profile.image_weights)) and not file.exists():
        raise ValueError(f"image_weights={profile.image_weights}: there is no file {file}")
    for encoder in TEXT_ENCODERS:
        if Path(checkpoint_place(getattr(profile, encoder))).is_dir():
            check_length(getattr(profile, encoder), profile.max_length)


def check_length(source: str, max_length: int) -> None:
    """ValueError if a checkpoint's folder is not whole, or its model or tokenizer cannot take `max_length` tokens."""
    place = checkpoint_place(source)
    try:
        with torch.device("meta"):  # shapes alone
            model = AutoModel.from_config(AutoConfig.from_pretrained(place, local_files_only=True))
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:  # the libraries raise many kinds
        raise ValueError(f"text checkpoint {source!r} cannot be loaded ({one_line(error)})") from error
    refuse_longer(source, longest_input(model, tokenizer), max_length)


def check_image_encoder(profile: Profile) -> None:
    """ValueError if the profile's network cannot take its pictures or tiles, and which settings would do.

    Takes no time: on PyTorch's meta device a tensor has a shape and no content.
    """
    name, side = profile.seresnext, profile.image_size
    encoder = shape_of_encoder(name)
    if why := refusal(encoder, side):
        raise ValueError(f"{name} cannot take pictures of {side} x {side} pixels ({why}); set image_size="
                         f"{encoder.expects.size}")
    if profile.regions == "tiles":
        side = profile.region_size // profile.grid
        if why := refusal(encoder, side):
            raise ValueError(f"{name} cannot take {side} x {side} tiles ({why}); set regions=feature_map, which reads "
                             "the features of the whole picture")


def shape_of_encoder(name: str) -> ImageEncoder:
    """The encoder on PyTorch's meta device, in eval mode; those that cannot be built there are moved to it."""
    try:
        with torch.device("meta"):
            return ImageEncoder(name).to("meta").eval()
    except NotImplementedError:  # torchvision's RegNets copy numbers while they are built
        return ImageEncoder(name).to("meta").eval()


@torch.inference_mode()
def refusal(encoder: ImageEncoder, side: int) -> str:
    """Why an encoder in eval mode cannot take pictures of `side` x `side` pixels; "" if it can. Used in 06."""
    pixels = torch.zeros(2, 3, side, side, device=encoder.mean.device)
    try:
        shape = list(encoder(pixels).shape)
    except Exception as error:  # each network fails in its own way
        return one_line(error)
    return "" if shape == [2, encoder.width] else f"a picture gives {shape[1:]} numbers instead of {encoder.width}"


def picture_rows(pictures: np.ndarray | DecodedPictures, split: pd.DataFrame, part: str, size: int,
                 seed: int) -> RowDataset:
    """The pictures and labels of one part of the split, as bytes; those of the training part are augmented."""
    places = np.flatnonzero(split["part"] == part)
    change = augmentation(size) if part == "train" else nn.Identity()
    return RowDataset(lambda i: {"pixels": change(torch.tensor(pictures[places[i]]))}, split["label_id"].iloc[places],
                      seed if part == "train" else None)


def image_features(encoder: nn.Module, pictures: np.ndarray | DecodedPictures, batch: int, dtype: torch.dtype,
                   label: str) -> Tensor:
    """The vectors [N, width] of all pictures, in their order."""
    groups = [np.arange(start, min(start + batch, len(pictures))) for start in range(0, len(pictures), batch)]
    return encode_rows(encoder, groups, lambda places: {"pixels": torch.tensor(pictures[places])}, dtype, label)


def image_encoder_stage(run: Run) -> Path:
    """Stage `seresnext`: the image encoder fine-tuned on whole pictures.

    Writes encoder.safetensors, head.safetensors (linear layer) and curve.csv. Used in 05.
    """

    def build(out: Path) -> dict:
        profile = run.profile
        set_seed(run.seed)
        with group().main_process_first():  # one fetches the weights and decodes the pictures
            model = ImageEncoder(profile.seresnext, profile.image_weights)  # first, in case there are no weights
            split, pictures = read_split(run), cached_pictures(run, profile.image_size)
        classifier = Classifier(model, model.width, dropout=0.0)
        if profile.freeze_encoders:
            features = image_features(model, pictures, profile.image_batch, precision(profile), "seresnext")
            curve = fit_head(classifier.head, features, torch.tensor(split["label_id"]), split["part"].to_numpy())
        else:
            if group().num_processes > 1 and device().type == "cuda":  # statistics of the whole batch
                timm.layers.convert_sync_batchnorm(classifier)  # torch's would lose the activations inside timm's
            datasets = {part: picture_rows(pictures, split, part, profile.image_size, run.seed)
                        for part in ("train", "val")}
            curve = finetune(classifier, **datasets, folder=out, profile=profile, epochs=profile.image_epochs,
                             batch=profile.image_batch, lr=profile.image_lr, seed=run.seed,
                             weight_decay=0.0,  # AdamW without decay: Adam
                             collate=torch.utils.data.default_collate, workers=loader_workers(profile))
        if group().is_main_process:
            save_file(model.cpu().state_dict(), out / "encoder.safetensors")
            save_trained(out, classifier.head, curve)
        return curve_metrics(curve) | {"parameters": sum(p.numel() for p in classifier.parameters()),
                                       "weights_from": model.weights_from}

    check_image_encoder(run.profile)  # before hours of training, not after
    file = weight_file(run.profile.image_weights)
    return stage(run, "seresnext", build, READS["seresnext"],
                 inputs={"pictures": catalogue_hash(catalogue_folder(run)), **(
                     {"weights": hash_file(file)} if file and file.exists() else {})}, together=True)


def load_image_encoder(run: Run) -> ImageEncoder:
    """The fine-tuned image encoder of stage `seresnext`, in eval mode. Used in 05 and 06."""
    encoder = ImageEncoder(run.profile.seresnext)
    encoder.load_state_dict(load_file(read_stage(run, "seresnext") / "encoder.safetensors"))
    return encoder.eval()


# ======================================================================================================
# 11  Regions
# ======================================================================================================
def split_regions(pictures: Tensor, grid: int = 16) -> Tensor:
    """Pictures [N, 3, S, S] as tiles [N, grid * grid, 3, S/grid, S/grid], row by row (paper, section III.B).

    ValueError if S is not a multiple of `grid`. Shown in 06.
    """
    n, channels, height, width = pictures.shape
    if height % grid or width % grid:
        raise ValueError(f"pictures of {height} x {width} pixels cannot be cut into {grid} x {grid} equal regions")
    tiles = pictures.reshape(n, channels, grid, height // grid, grid, width // grid)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(n, grid * grid, channels, height // grid, width // grid)


def regional_features(encoder: ImageEncoder, pictures: Tensor, grid: int = 16) -> Tensor:
    """P of equation (2): the mean of the encoder's vectors of all tiles, [N, width]. Shown in 06."""
    tiles = split_regions(pictures, grid)                          # [N, 256, 3, 14, 14]
    vectors = encoder(tiles.flatten(0, 1))                         # [N * 256, width]
    return vectors.view(len(pictures), grid * grid, -1).mean(1)    # [N, width]


class RegionEncoder(nn.Module):
    """`regional_features` as a module, so that `encode` can run it."""

    def __init__(self, encoder: ImageEncoder, grid: int):
        super().__init__()
        self.encoder, self.grid = encoder, grid

    def forward(self, pixels: Tensor) -> Tensor:
        return regional_features(self.encoder, pixels, self.grid)


def represent_pictures(run: Run, name: str, pictures_of: Callable[[int], Sequence]) -> Tensor:
    """The vectors [N, width] of stage `name`, of the pictures that `pictures_of(pixels a side)` gives."""
    profile, encoder, batch = run.profile, load_image_encoder(run), run.profile.image_batch
    whole = name == "image_whole" or profile.regions == "feature_map"
    if not whole:
        encoder = RegionEncoder(encoder, profile.grid)
        batch = batch if device().type == "cuda" else 1  # one picture's tiles suit a processor's cache best
    pictures = pictures_of(profile.image_size if whole else profile.region_size)
    return image_features(encoder, pictures, batch, precision(profile), name)


def image_features_stage(run: Run, name: str) -> Path:
    """Stage `image_regions` (P) or `image_whole` (whole pictures): features.safetensors, [N, width] by product id.

    P follows the setting `regions`: "tiles" is equation (2), "feature_map" the encoder's own global average of
    the whole picture, which `image_whole` always is (Table I scores it). Used in 06.
    """

    def build(out: Path) -> dict:
        features = represent_pictures(run, name, partial(cached_pictures, run))
        if group().is_main_process:
            save_tensors(out / "features.safetensors", np.sort(read_split(run)["product_id"]), features=features)
        return {"width": features.shape[1]}

    return stage(run, name, build, READS[name], inputs={"pictures": catalogue_hash(catalogue_folder(run))},
                 together=True)


# ======================================================================================================
# 12  Fusion
# ======================================================================================================
FUSIONS = ("add", "concat", "average")
HEADS = ("basic", "dropout", "layers")


def fuse(how: str, a: Tensor, b: Tensor) -> Tensor:
    """Z of two representations [N, d]: [N, d] for "add" and "average", [N, 2d] for "concat" (paper, section III.C).

    Shown in 07.
    """
    if how == "concat":
        return torch.cat([a, b], dim=-1)
    total = a + b
    return total / 2 if one_of("fusion", how, FUSIONS) == "average" else total


@dataclass(frozen=True)
class Variant:
    """One fusion model: Z of both inner levels, Z of the outer level, and the classifier's head. Used in 07."""
    text_fusion: str
    final_fusion: str
    head: str = "basic"
    standardise: bool = True

    @property
    def name(self) -> str:
        parts = [self.text_fusion, self.final_fusion, self.head if self.head != "basic" else "",
                 "" if self.standardise else "raw"]
        return "-".join(part for part in parts if part)


# The variants of Tables II, III and V; all nine pairs: itertools.product(FUSIONS, FUSIONS).
TABLE_VARIANTS = (Variant("concat", "concat"), Variant("concat", "add"), Variant("concat", "average"),
                  Variant("average", "average"), Variant("average", "average", "dropout"),
                  Variant("average", "average", "layers"))
# The same without standardising, which notebook 07 compares.
RAW_VARIANTS = tuple(dataclasses.replace(variant, standardise=False) for variant in TABLE_VARIANTS
                     if variant.head == "basic")
TRAINED_VARIANTS = (*TABLE_VARIANTS, *RAW_VARIANTS)


def named_variant(name: str) -> Variant:
    """The variant of that name, such as "concat-add" or "average-average-dropout"; ValueError lists all names."""
    every = (Variant(*choice) for choice in itertools.product(FUSIONS, FUSIONS, HEADS, (True, False)))
    variants = {variant.name: variant for variant in every}
    return variants[one_of("variant", name, variants)]


class ImageReduction(nn.Module):
    """Conv1d with max-pooling that fits P [N, p] to the width of the text vector [N, width] (paper, section III.C).

    Shown in 07.
    """

    def __init__(self, width: int, channels: int = 4):
        super().__init__()
        if width % channels:
            raise ValueError(f"the text vector's width {width} is not a multiple of {channels} channels")
        self.conv = nn.Conv1d(1, channels, kernel_size=3, padding=1)
        self.pool = nn.AdaptiveMaxPool1d(width // channels)

    def forward(self, image: Tensor) -> Tensor:
        # pool(conv(image[:, None])), three times as fast on a CPU: with the rows as the innermost axis it vectorises.
        columns = nn.functional.pad(image.T, (0, 0, 1, 1))                         # [p + 2, N]
        windows = torch.stack([columns[:-2], columns[1:-1], columns[2:]])          # [3, p, N]
        answers = torch.tensordot(self.conv.weight[:, 0], windows, 1)              # [channels, p, N]
        pooled = self.pool(answers.transpose(1, 2)).transpose(0, 1)                # [N, channels, width / channels]
        return (pooled + self.conv.bias[:, None]).flatten(1)


def make_head(width: int, classes: int, head: str, dropout: float) -> nn.Sequential:
    """f of equation (1): three fully connected layers; Table III adds dropout, or dropout and one more layer.

    Shown in 07.
    """
    one_of("head", head, HEADS)
    first = [nn.Dropout(dropout)] if head == "dropout" else []
    more = [nn.Dropout(dropout), nn.Linear(256, 256), nn.ReLU()] if head == "layers" else []
    return nn.Sequential(*first, nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), *more,
                         nn.Linear(256, classes))


class HierarchicalFusion(nn.Module):
    """y = f(Z(P, Z(Z(T_f, D_f), Z(T_c, D_c)))), equation (1).

    `widths` gives the width of each of T_c, D_c, T_f, D_f and P. `forward` takes them as [N, width] tensors and
    returns logits [N, classes]. Text representations of different widths need `project`. Shown in 07.
    """

    def __init__(self, widths: dict[str, int], variant: Variant, classes: int = 27, dropout: float = 0.3,
                 project: bool = False):
        super().__init__()
        self.variant = variant
        texts = {name: width for name, width in widths.items() if name != "P"}
        if len(set(texts.values())) > 1 and not project:
            raise ValueError(f"the text representations differ in width ({texts}); set project=True")
        d = max(texts.values())
        for name, width in widths.items():  # 0 and 1 until fit_scale is called
            self.register_buffer(f"mean_{name}", torch.zeros(width))
            self.register_buffer(f"std_{name}", torch.ones(width))
        self.projections = nn.ModuleDict({name: nn.Linear(width, d) for name, width in texts.items() if project})
        text_width = 4 * d if variant.text_fusion == "concat" else d
        self.reduce_image = ImageReduction(text_width)
        fused_width = 2 * text_width if variant.final_fusion == "concat" else text_width
        self.classify = make_head(fused_width, classes, variant.head, dropout)

    def fit_scale(self, representations: dict[str, Tensor], training: Tensor | slice = slice(None)) -> None:
        """Remember mean and deviation of the `training` rows (default: all); a constant column is only centred."""
        for name, x in representations.items():
            # Some columns at a time, because indexing copies.
            parts = [torch.std_mean(columns[training], 0) for columns in x.split(256, 1)]
            std, mean = map(torch.cat, zip(*parts))
            getattr(self, f"mean_{name}").copy_(mean)
            getattr(self, f"std_{name}").copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def prepare(self, name: str, rows: Tensor) -> Tensor:
        """A representation standardised and, where asked for, projected."""
        rows = (rows - getattr(self, f"mean_{name}")) / getattr(self, f"std_{name}")
        return self.projections[name](rows) if name in self.projections else rows

    def forward(self, **representations: Tensor) -> Tensor:
        x = {name: self.prepare(name, rows) for name, rows in representations.items()}
        inner = partial(fuse, self.variant.text_fusion)
        text = inner(inner(x["T_f"], x["D_f"]), inner(x["T_c"], x["D_c"]))
        return self.classify(fuse(self.variant.final_fusion, self.reduce_image(x["P"]), text))


def read_representations(run: Run, product_ids: Sequence[int]) -> dict[str, Tensor]:
    """T_c, D_c, T_f, D_f and P of the products, in their order. Used in 07."""
    return {symbol: load_tensors(read_stage(run, name) / "features.safetensors", product_ids)["features"]
            for symbol, name in REPRESENTATIONS.items()}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], labels: Tensor) -> float:
    """One step of gradient descent on the cross-entropy; returns the loss before it. Shown in 07."""
    loss = nn.functional.cross_entropy(model(**batch), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def train_fusion(model: HierarchicalFusion, representations: dict[str, Tensor], labels: Tensor, train: Tensor,
                 val: Tensor, *, epochs: int, batch: int, lr: float, seed: int, label: str) -> pd.DataFrame:
    """Train on the rows `train` and leave the model at its best epoch by macro-F1 of the rows `val`.

    `representations` and `labels` hold all rows. Returns the learning curve, one row an epoch, as `finetune` does.
    Shown in 07.
    """
    def rows_of(places: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {name: x[places] for name, x in representations.items()}, labels[places]

    val_rows, val_labels = rows_of(val)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    shuffle, curve, best = torch.Generator().manual_seed(seed), [], (-1.0, {})
    bar = Progress(label, epochs, "epochs")
    for epoch in range(1, epochs + 1):
        model.train()
        losses = [train_step(model, optimizer, *rows_of(train[draw]))
                  for draw in torch.randperm(len(train), generator=shuffle).split(batch)]
        logits = predict_fusion(model, val_rows)
        scores = score(val_labels.cpu(), logits.argmax(-1).cpu())
        curve.append({"epoch": epoch, "train_loss": float(np.mean(losses)),
                      "val_loss": nn.functional.cross_entropy(logits, val_labels).item(),
                      "val_accuracy": scores["accuracy"], "val_macro_f1": scores["macro_f1"]})
        if scores["macro_f1"] > best[0]:
            best = (scores["macro_f1"], {name: value.clone() for name, value in model.state_dict().items()})
        bar.advance()
    bar.close()
    model.load_state_dict(best[1])
    return pd.DataFrame(curve)


@torch.inference_mode()
def predict_fusion(model: HierarchicalFusion, representations: dict[str, Tensor]) -> Tensor:
    """Logits [N, 27], in eval mode; some rows at a time, so that memory does not grow with them. Used in 07."""
    model.eval()
    batches = zip(*(rows.split(256) for rows in representations.values()))
    return torch.cat([model(**dict(zip(representations, batch))) for batch in batches])


def make_fusion(run: Run, variant: Variant, representations: dict[str, Tensor]) -> HierarchicalFusion:
    """An untrained fusion model for representations of these widths. Used in 07."""
    widths = {name: rows.shape[1] for name, rows in representations.items()}
    return HierarchicalFusion(widths, variant, dropout=run.profile.dropout, project=run.profile.project)


def fusion_stage(run: Run, variant: Variant) -> Path:
    """Stage `fusion-<variant>`: the trained fusion model (model.safetensors) and curve.csv. Used in 07."""

    def build(out: Path) -> dict:
        profile = run.profile
        split = read_split(run)
        x = {name: rows.to(device()) for name, rows in read_representations(run, split["product_id"]).items()}
        labels = torch.tensor(split["label_id"].to_numpy()).to(device())
        train, val = (torch.tensor(np.flatnonzero(split["part"] == part)).to(device()) for part in ("train", "val"))
        set_seed(run.seed)
        model = make_fusion(run, variant, x).to(device())
        if variant.standardise and profile.standardise:
            model.fit_scale(x, train)
        curve = train_fusion(model, x, labels, train, val, epochs=profile.fusion_epochs, batch=profile.fusion_batch,
                             lr=profile.fusion_lr, seed=run.seed, label=variant.name)
        save_file(model.cpu().state_dict(), out / "model.safetensors")
        curve.to_csv(out / "curve.csv", index=False)
        return curve_metrics(curve) | {"parameters": sum(p.numel() for p in model.parameters())}

    return stage(run, f"fusion-{variant.name}", build, READS["fusion"])


def fusion_probabilities(run: Run, variant: Variant, representations: dict[str, Tensor]) -> Tensor:
    """Class probabilities [N, 27] of a trained variant for these rows. Used in 07."""
    model = make_fusion(run, variant, representations)
    model.load_state_dict(load_file(read_stage(run, f"fusion-{variant.name}") / "model.safetensors"))
    return torch.softmax(predict_fusion(model, representations), -1)


# ======================================================================================================
# 13  Result tables
# ======================================================================================================
TABLES = {"I": "90-10", "II": "90-10", "III": "90-10", "IV": "80-20", "V": "80-20"}
# The paper's rows, as data/published_results.csv names them, and our models.
OUR_MODEL = {
    "CamemBERT description": "camembert_description", "CamemBERT title": "camembert_title",
    "FlauBERT description": "flaubert_description", "FlauBERT title": "flaubert_title", "SE-ResNeXt-50": "seresnext",
    "text concat + final concat": "concat-concat", "text concat + final add": "concat-add",
    "text concat + final average": "concat-average", "text average + final average": "average-average",
    "basic (average + average)": "average-average", "with dropout": "average-average-dropout",
    "with more layers": "average-average-layers"}
ENCODER_MODELS = ("camembert_title", "camembert_description", "flaubert_title", "flaubert_description", "seresnext")


def encoder_probabilities(run: Run, model: str, product_ids: Sequence[int]) -> Tensor:
    """Class probabilities [N, 27] of one fine-tuned encoder alone, by its own head. Used in 03, 04 and 06."""
    features = read_stage(run, "image_whole" if model == "seresnext" else model) / "features.safetensors"
    return head_probabilities(read_stage(run, model), load_tensors(features, product_ids)["features"])


def all_probabilities(run: Run, part: str) -> tuple[np.ndarray, dict[str, Tensor]]:
    """(true labels [N], {model: probabilities [N, 27]}) of baselines, encoders and fusion variants on one part.

    Rows in order of product id. Shown in 08. Used in 07 and 08.
    """
    rows = read_split(run).query("part == @part")
    ids = rows["product_id"].to_numpy()
    found = baseline_probabilities(run, ids)
    found |= {model: encoder_probabilities(run, model, ids) for model in ENCODER_MODELS}
    representations = read_representations(run, ids)
    found |= {variant.name: fusion_probabilities(run, variant, representations) for variant in TABLE_VARIANTS}
    return rows["label_id"].to_numpy(), found


def score_stage(run: Run) -> Path:
    """Stage `scores`: the test part's predictions.safetensors, scores.csv and table_<number>.csv. Shown in 08."""

    def build(out: Path) -> dict:
        truth, found = all_probabilities(run, "test")
        ids = read_split(run).query("part == 'test'")["product_id"]
        save_tensors(out / "predictions.safetensors", ids, label_id=truth, **found)
        scores = pd.DataFrame([score_row(model, truth, probabilities.argmax(-1), run)
                               for model, probabilities in found.items()])
        scores.to_csv(out / "scores.csv", index=False)
        for number in (number for number, split in TABLES.items() if split == run.split):
            paper_table(scores, number).to_csv(out / f"table_{number}.csv", index=False)
        return {"models": len(scores), "n": len(truth)}

    reads = ["splits", "baselines", *ENCODER_MODELS, "image_whole", "image_regions",
             *(f"fusion-{variant.name}" for variant in TABLE_VARIANTS)]
    return stage(run, "scores", build, reads=reads, inputs={"published": hash_file(PUBLISHED)})


def paper_table(scores: pd.DataFrame, number: str) -> pd.DataFrame:
    """One of the paper's Tables I to V, rows in its order: our scores, then paper_accuracy and paper_macro_f1."""
    published = pd.read_csv(PUBLISHED).query("source == 'paper' and reference == @table", local_dict={
        "table": f"Table {one_of('table', number, TABLES)}"})
    ours = scores.set_index("model").loc[[OUR_MODEL[name] for name in published["model"]]].reset_index(drop=True)
    table = pd.concat([published[["model"]].reset_index(drop=True), ours], axis=1)
    paper = published[["accuracy", "macro_f1"]].add_prefix("paper_").reset_index(drop=True)
    return pd.concat([table, paper], axis=1)


def readable_table(table: pd.DataFrame) -> pd.DataFrame:
    """A table of `paper_table` for reading: ours with intervals, then the paper's, all in percent. Used in 08."""
    ours = score_table(table.to_dict("records"))
    return ours.assign(**{"paper: accuracy": table["paper_accuracy"].map("{:.2f}".format),
                          "paper: macro_f1": table["paper_macro_f1"].map("{:.2f}".format)})


def data_note(run: Run) -> str:
    """Which data the numbers belong to, for titles and reports. Used in 08."""
    ours = ("ours: the synthetic sample, another data set than the paper's" if run.profile.name == "sample"
            else f"ours: Rakuten France, {run.protocol} rows")
    return f"Percent, 95% bootstrap intervals, test part; {ours}; paper: as published."


# ======================================================================================================
# 14  New products
# ======================================================================================================
def represent_products(run: Run, products: pd.DataFrame) -> dict[str, Tensor]:
    """T_c, D_c, T_f, D_f and P [N, width] of any products [title, description, picture], by the run's encoders."""
    profile, found = run.profile, {}
    texts = {field: clean_texts(products[field], profile.clean, f"cleaning each {field}") for field in FIELDS}
    for symbol, name in REPRESENTATIONS.items():
        if symbol == "P":
            found[symbol] = represent_pictures(run, name, partial(DecodedPictures, products["picture"]))
            continue
        model, tokenizer = load_checkpoint(str(read_stage(run, name) / "encoder"), profile.max_length)
        rows = tokenise(tokenizer, texts[name.rpartition("_")[2]], profile.max_length)
        found[symbol] = text_features(TextEncoder(model, profile.pooling), tokenizer, rows, 4 * profile.text_batch,
                                      precision(profile), name)
    return found


def predict_products(run: Run, products: pd.DataFrame, variant: Variant) -> Tensor:
    """Class probabilities [N, 27] of any products [title, description, picture (path)], in their order.

    An empty description is allowed. A run on `rows="described"` never saw one, so what its description encoders make
    of it is a guess, and such a row leans on title and picture; a run on `rows="all"` has learnt it. FileNotFoundError
    if the run has no trained `variant`.
    """
    read_stage(run, f"fusion-{variant.name}")  # before the encoders' hours, not after
    return fusion_probabilities(run, variant, represent_products(run, products))


def write_submission(run: Run, variant: Variant) -> Path:
    """Predict the challenge's unlabelled products; the path of the file to submit, below `<run>/submissions`.

    ENS: comma-separated, header `,prdtypecode`; SIGIR: tab-separated, header `Integer_id`, `Prdtypecode`. The first
    column is the test table's index.
    """
    folder = catalogue_folder(run)
    layout, products = LAYOUTS[find_layout(folder)], load_test_products(folder)
    check_pictures(products, "unpack those of the unlabelled products there")
    predicted = predict_products(run, products, variant).argmax(-1).numpy()
    table = pd.DataFrame({layout["label"]: load_classes()["prdtypecode"].to_numpy()[predicted]}, index=products.index)
    name = Path(test_table(folder))
    path = run.folder / "submissions" / variant.name / f"y{name.stem[1:]}_pred{name.suffix}"  # SIGIR's naming
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path.with_suffix(".partial"), sep=layout["separator"])
    path.with_suffix(".partial").rename(path)
    return path


# ======================================================================================================
# 15  Figures
# ======================================================================================================
COLOURS = {"camembert": "#004D80", "flaubert": "#3D9BD6", "image": "#D55E00", "fusion": "#222222", "paper": "#767676",
           "data": "#4F7A6B"}
COLUMN, PAGE = 3.5, 7.2  # inches


def figure(width: float = PAGE, height: float = 3.0, **subplots):
    """`plt.subplots` in the study's look. Used in 01 to 08."""
    sns.set_theme(style="ticks", context="paper", rc={
        "figure.constrained_layout.use": True, "savefig.dpi": 200, "figure.dpi": 110, "axes.spines.top": False,
        "axes.spines.right": False, "svg.hashsalt": "hierarchical-fusion", "svg.fonttype": "none"})
    return plt.subplots(figsize=(width, height), **subplots)


def save_figure(run: Run, fig, name: str, data: pd.DataFrame) -> None:
    """Write <run>/figures/<name>.png, .svg and .csv (the plotted numbers); sample figures say so in a corner.

    Used in 01 to 08.
    """
    folder = run.folder / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    if run.profile.name == "sample":
        fig.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))  # keep the corner free
        fig.text(0.995, 0.005, "synthetic sample", ha="right", fontsize=6, color=COLOURS["paper"], in_layout=False)
    fig.savefig(folder / f"{name}.png", metadata={"Software": None})
    fig.savefig(folder / f"{name}.svg", metadata={"Date": None})
    data.to_csv(folder / f"{name}.csv", index=False)


def source_colour(model: str) -> str:
    """The colour of a model's source: an encoder, or fusion, by its name. Used in 08."""
    for word, colour in (("camembert", "camembert"), ("flaubert", "flaubert"), ("resnext", "image"),
                         ("majority", "paper"), ("tf-idf", "paper")):
        if word in model.lower():
            return COLOURS[colour]
    return COLOURS["fusion"]


def plot_learning_curve(axes: Sequence, curve: pd.DataFrame, label: str, colour: str, marker: str = "o") -> None:
    """Losses on the first axes, validation macro-F1 with its best epoch on the second. Used in 03 to 05 and 07."""
    loss, f1 = axes
    dash = "--" if marker == "s" else "-"
    loss.plot(curve["epoch"], curve["train_loss"], color=colour, ls=dash, alpha=0.4, label=f"{label}, train")
    loss.plot(curve["epoch"], curve["val_loss"], color=colour, ls=dash, marker=marker, ms=3, label=f"{label}, val")
    f1.plot(curve["epoch"], 100 * curve["val_macro_f1"], color=colour, ls=dash, marker=marker, ms=3, label=label)
    best = curve.loc[curve["val_macro_f1"].idxmax()]
    f1.plot(best["epoch"], 100 * best["val_macro_f1"], marker="*", ms=9, color=colour, ls="none")
    loss.set(xlabel="epoch", ylabel="cross-entropy (nats)")
    f1.set(xlabel="epoch", ylabel="validation macro-F1 (%)", ylim=(0, 100))


def plot_confusion(ax, truth: Sequence[int], predicted: Sequence[int], names: Sequence[str],
                   place: pd.Series) -> pd.DataFrame:
    """Shares of each true class (rows sum to 1) as a one-hue map from 0 to 1; returns them.

    `place` maps a label id to its row and column, `names` are the classes in that order. Used in 08.
    """
    cells = np.zeros((len(names), len(names)))
    np.add.at(cells, (place[truth].to_numpy(), place[predicted].to_numpy()), 1)
    shares = pd.DataFrame(cells / np.maximum(cells.sum(1, keepdims=True), 1), index=list(names), columns=list(names))
    sns.heatmap(shares, ax=ax, vmin=0, vmax=1, cmap="Greys", cbar=False, square=True,
                xticklabels=True, yticklabels=True)
    ax.set(xlabel="predicted class", ylabel="true class")
    ax.tick_params(labelsize=5, length=0)
    return shares


def plot_scores(ax, scores: pd.DataFrame, metric: str, published: pd.Series | None = None) -> None:
    """Dots with 95% intervals, ours filled; the paper's figures as open grey diamonds.

    `scores` holds rows of `score_row`; `published` is in percent, indexed like `scores`, NaN where there is none.
    Used in 06 to 08.
    """
    places = np.arange(len(scores))[::-1]
    for place, (_, row) in zip(places, scores.iterrows()):
        colour, face = source_colour(row["model"]), None if "description" not in row["model"] else "white"
        ax.plot([row[f"{metric}_low"], row[f"{metric}_high"]], [place, place], color=colour, lw=1.2)
        ax.plot(row[metric], place, "s" if face else "o", color=colour, ms=5)
    if published is not None:
        ax.plot(published, places, "D", mfc="none", mec=COLOURS["paper"], ms=5, label="paper, Rakuten data")
    ax.set(yticks=places, yticklabels=scores["model"], xlabel=f"{metric.replace('_f1', '-F1')} (%)", xlim=(-2, 100))
    ax.grid(axis="x", lw=0.4)


# ======================================================================================================
# 16  Notebook display
# ======================================================================================================
def show(*objects: object) -> None:
    """The source of helpers, as they run. Used in 01 to 08."""
    for thing in objects:
        display(Markdown(f"```python\n{inspect.getsource(thing)}```"))


def caption(text: str) -> None:
    """A figure's caption, filled from results, under the figure. Used in 01 to 08."""
    display(Markdown(f"*{text}*"))


def note(text: str) -> None:
    """A sentence of the running text whose numbers come from results. Used in 01 to 03 and 05 to 08."""
    display(Markdown(text))


def describe_stages(run: Run, *names: str) -> pd.DataFrame:
    """What the manifests of these stages say: seconds, peak memory, metrics. Used in 03 to 07."""
    manifests = [read_manifest(run, name) for name in names]
    return pd.DataFrame([{"stage": m["stage"], "seconds": m["seconds"], "peak memory (GB)": m["peak_memory_gb"],
                          **{key: value if isinstance(value, str) else round(value, 4)
                             for key, value in m["metrics"].items()}} for m in manifests])
