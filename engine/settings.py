"""The study's words, the table of its stages, and every setting."""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge, Gt, Lt
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ("title", "description")
TEXT_ENCODERS = ("camembert", "flaubert")
SPLITS = {"90-10": 0.10, "80-20": 0.20}  # share of the test part
VALIDATION_SHARE = 0.10  # of what is not test (paper, section V)
# The paper's symbols, and the stage whose features they are.
REPRESENTATIONS = {
    "T_c": "camembert_title",
    "D_c": "camembert_description",
    "T_f": "flaubert_title",
    "D_f": "flaubert_description",
    "P": "image_regions",
}
TEXT_STAGES = tuple(name for symbol, name in REPRESENTATIONS.items() if symbol != "P")
# The fusion models of Tables II, III and V: text fusion, final fusion, head.
TABLE_FUSIONS = ("concat-concat", "concat-add", "concat-average", "average-average",
                 "average-average-dropout", "average-average-layers")
# Those beside them: the other pairs of the paper's Z, other Z, other structures.
OTHER_FUSIONS = (
    "add-add", "add-concat", "add-average", "average-add", "average-concat",
    "maximum-maximum", "product-product", "gated-gated", "lowrank-lowrank", "attention-attention",
    "concat-concat-text", "average-average-text", "concat-concat-P", "concat-concat-T_c+D_c",
    "concat-concat-flat", "average-average-flat", "attention-attention-flat",
    "gated-gated-fields", "gated-gated-image", "concat-concat-whole", "average-average-whole",
    "concat-concat-hidden", "average-average-hidden",
    # What the released code does otherwise, each alone and together (notebook 10).
    "average-average-T_c+T_f+P", "average-average-linear", "average-average-last",
    "average-average-linear-T_c+T_f+P-last")


# The encoders of the paper's tables, and the settings that say what runs in their place.
SLOTS = {"CamemBERT": "camembert", "FlauBERT": "flaubert", "SE-ResNeXt-50": "seresnext"}


# --- the stages -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class StageInfo:
    """The notebook that makes a stage, and the stages that it reads."""
    notebook: str
    reads: tuple[str, ...] = ()


ENCODER_NOTEBOOK = {"camembert": "03_finetune_camembert", "flaubert": "04_finetune_flaubert",
                    "image": "06_regional_features"}
STAGES = {
    "splits": StageInfo("01_data_exploration"),
    "text": StageInfo("02_text_preprocessing"),
    "baselines": StageInfo("02_text_preprocessing", ("splits", "text")),
    **{name: StageInfo(ENCODER_NOTEBOOK[name.split("_")[0]], ("splits", "text"))
       for name in TEXT_STAGES},
    "seresnext": StageInfo("05_finetune_seresnext", ("splits",)),
    "image_regions": StageInfo("06_regional_features", ("seresnext",)),
    "image_whole": StageInfo("06_regional_features", ("seresnext",)),
    "fusion": StageInfo("07_hierarchical_fusion", (
        "splits", "text", "seresnext", *REPRESENTATIONS.values(), "image_whole")),
    "scores": StageInfo("08_result_tables", (
        "splits", "baselines", *REPRESENTATIONS.values(), "seresnext", "image_whole",
        *(f"fusion-{name}" for name in (*TABLE_FUSIONS, *OTHER_FUSIONS)))),
    "claims": StageInfo("08_result_tables", ("scores",)),
}
# With frozen encoders: the vectors of all chosen products, the same for each split and seed, and
# what the other stages then read.
FROZEN_STAGES = {
    **{f"vectors-{name}": StageInfo(STAGES[name].notebook, ("text",)) for name in TEXT_STAGES},
    "vectors-image_whole": StageInfo("05_finetune_seresnext"),
    "vectors-image_regions": StageInfo("06_regional_features"),
    **{name: StageInfo(STAGES[name].notebook, ("splits", f"vectors-{name}"))
       for name in TEXT_STAGES},
    "seresnext": StageInfo("05_finetune_seresnext", ("splits", "vectors-image_whole")),
    "image_regions": StageInfo("06_regional_features", ("vectors-image_regions",)),
    "image_whole": StageInfo("06_regional_features", ("vectors-image_whole",)),
}


def stage_info(name: str, frozen: bool = False) -> StageInfo:
    """The entry of stage `name`, such as "text" or "fusion-concat-add"; ValueError if none."""
    table = {**STAGES, **FROZEN_STAGES} if frozen else STAGES
    known = name if name in table else name.partition("-")[0]
    return table[one_of("stage", known, table)]


# --- the settings ---------------------------------------------------------------------------------
Count = Annotated[int, Gt(0)]
CountOr0 = Annotated[int, Ge(0)]
Tokens = Annotated[int, Ge(3)]  # the two of the frame and one
Workers = Annotated[int, Ge(-1)]
Rate = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Lt(1)]
LIMITS = {Count: "above 0 and finite", CountOr0: "0 or more", Tokens: "3 or more",
          Workers: "-1 or more", Rate: "above 0 and finite", Share: "from 0 to below 1"}


def setting(default: Any, meaning: str, unit: str = "", source: str = "ours") -> Any:
    """A setting's default, with what `run.py settings` says of it."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit, "source": source})


PAPER_3B, PAPER_4B = "paper, section III.B", "paper, section IV.B"


@checked_dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class Profile:
    """Every setting of a run: `sample` is small enough for a laptop, `paper` is the paper's own."""
    name: str = "paper"
    data: str = setting("data/raw", "the catalogue, from the project's root", "folder")
    rows: Literal["described", "all"] = setting(
        "described", "rows that have a description, or all rows", source="paper, section IV.A")
    grouped: bool = setting(False, "exact and near duplicates stay on one side of the split")
    limit: CountOr0 = setting(0, "a stratified choice of so many rows; 0: all", "rows")
    bad_rows: Literal["stop", "set_aside"] = setting(
        "stop", "a row or picture that cannot be used stops the run, or is set aside and listed")
    clean: Literal["paper", "light"] = setting(
        "paper", "paper: HTML, tokens, lower case; light: HTML only", source="paper, section IV.A")
    camembert: str = setting(
        "almanach/camembert-base", "checkpoint's name or folder; small: from scratch",
        source="paper, section III.A")
    flaubert: str = setting(
        "flaubert/flaubert_base_cased", "checkpoint's name or folder; small: from scratch",
        source="paper, section III.A")
    seresnext: str = setting(
        "se_resnext50_32x4d", "pretrainedmodels' network, timm/<name>, or small", source=PAPER_3B)
    image_weights: str = setting("imagenet", "imagenet, a weight file, or none; small has none")
    freeze_encoders: bool = setting(False, "no fine-tuning: the checkpoints' features as they are")
    text_width: Count = setting(768, "d of small encoders; a checkpoint brings its own", "numbers")
    text_layers: Count = setting(12, "for small encoders", "layers")
    vocabulary: Count = setting(32_000, "for small encoders", "tokens")
    texts: Literal["apart", "joined"] = setting(
        "apart", "each text encoder reads its field, or title and description as one text",
        source="paper, section III.A")
    max_length: Tokens = setting(256, "where texts are cut", "tokens", PAPER_4B)
    pooling: Literal["first", "mean", "last"] = setting(
        "first", "a text's vector: its first token's, the mean, or its last token's")
    text_epochs: Count = setting(10, "of fine-tuning on texts", "epochs", PAPER_4B)
    text_batch: Count = setting(32, "a step of fine-tuning on texts", "rows", PAPER_4B)
    text_lr: Rate = setting(2e-5, "AdamW's learning rate", "", PAPER_4B)
    text_dropout: Share = setting(0.1, "before the linear head; the paper is silent", "share")
    image_size: Count = setting(224, "a side of a whole picture", "pixels", PAPER_3B)
    region_size: Count = setting(224, "a side of the picture that is cut into regions", "pixels",
                                 PAPER_3B)
    image_epochs: Count = setting(20, "of fine-tuning on pictures", "epochs", PAPER_4B)
    image_batch: Count = setting(32, "a step of fine-tuning on pictures", "rows", PAPER_4B)
    image_lr: Rate = setting(1e-3, "Adam's learning rate", "", PAPER_4B)
    grid: Count = setting(16, "regions a side, 16 x 16 = 256", "regions", PAPER_3B)
    regions: Literal["tiles", "feature_map"] = setting(
        "tiles", "each tile through the encoder, or the whole picture's map", source="equation (2)")
    standardise: bool = setting(True, "representations to mean 0, deviation 1 of training rows")
    project: bool = setting(False, "a learned linear map of each text to the same width")
    dropout: Share = setting(0.3, "in the heads of Table III", "share")
    fusion_epochs: Count = setting(20, "of training a fusion model", "epochs")
    fusion_batch: Count = setting(128, "a step of training a fusion model", "rows")
    fusion_lr: Rate = setting(1e-3, "Adam's learning rate")
    fusion_seeds: Count = setting(5, "of each fusion, whose scores are averaged", "models")
    fusions: str = setting("", "a Python file with fusions Z of one's own", "file")
    fusion_rows: Literal["train", "held-out"] = setting(
        "train", "what fusion models learn from: the encoders' training rows, or a fifth of these, "
        "kept from the encoders")
    encoder_mode: Literal["eval", "train"] = setting(
        "eval", "of the encoders that give fusion its training rows; train: dropout is on",
        source="paper, section III.D")
    modality_dropout: Share = setting(
        0.3, "how often each modality is hidden in training, in variants named -hidden", "share")
    bootstrap: Count = setting(2000, "behind each 95% interval", "resamples")
    early_stopping: CountOr0 = setting(
        0, "without a better validation macro-F1 before fine-tuning stops; 0: never", "epochs")
    precision: Literal["auto", "float32", "bf16", "fp16"] = setting(
        "auto", "of the encoders; auto: half on a GPU, float32 on a CPU")
    compile: Literal["off", "eager", "aot_eager", "inductor", "cudagraphs"] = setting(
        "off", "backend of torch.compile")
    device_batch: CountOr0 = setting(
        0, "on one device at a time; 0: all, fewer when memory runs out", "rows")
    gradient_checkpointing: bool = setting(
        False, "of text encoders that offer it (FlauBERT does not): less memory, slower")
    checkpoint_steps: CountOr0 = setting(
        500, "between two checkpoints within an epoch; 0: at its end alone", "steps")
    threads: CountOr0 = setting(0, "on a CPU; 0: one for each core", "threads")
    deterministic: bool = setting(
        False, "the same bits each time on the same GPU, where it can; slower")
    processes: CountOr0 = setting(0, "make one stage together; 0: one for each GPU", "processes")
    loader_workers: Workers = setting(
        -1, "load pictures for fine-tuning; -1: none on a CPU, up to 8 for a GPU", "processes")
    region_batch: CountOr0 = setting(
        0, "whose regions are read at a time; 0: image_batch on a GPU, 4 on a CPU", "pictures")
    report_to: Literal["none", "tensorboard", "mlflow", "wandb"] = setting(
        "none", "where fine-tuning logs its losses and scores while it runs")
    as_released: bool = setting(
        False, "notebook 10 trains two text encoders and an image network like the released code's")
    cache_pictures: bool = setting(True, "decoded pictures are kept; False: decoded each time")


PROFILES = {
    "sample": Profile(
        name="sample", data="data/sample", camembert="small", flaubert="small", seresnext="small",
        text_width=64, text_layers=2, vocabulary=2000, max_length=96, text_lr=1e-3, image_size=80,
        image_epochs=12, image_lr=3e-3, bootstrap=1000, threads=1, processes=1, as_released=True),
    "paper": Profile(),
    # Encoders of 2023 to 2025, cased texts, all rows, the features of the whole picture.
    "modern": Profile(
        name="modern", rows="all", clean="light", camembert="almanach/moderncamembert-base",
        flaubert="almanach/camembertav2-base", regions="feature_map",
        seresnext="timm/convnext_base.fb_in22k_ft_in1k", fusion_seeds=5),
}
# Settings that decide how a stage is made, how fast and in how much memory, not what it contains.
SPEED_ONLY = ("gradient_checkpointing", "checkpoint_steps", "threads", "deterministic",
              "processes", "loader_workers", "region_batch", "report_to", "cache_pictures")
IN_FOLDER = ("rows", "grouped", "limit", "freeze_encoders")  # settings that name a folder of runs
# What `protocol=<name>` stands for; what else the released code does is a word of a variant's name.
PROTOCOLS = {"as-described": {}, "as-released": {"texts": "joined", "image_weights": "none",
                                                 "encoder_mode": "train"}}
TYPES = get_type_hints(Profile, include_extras=True)


def setting_names() -> list[str]:
    """All settings, in the order of `Profile`."""
    return [field.name for field in dataclasses.fields(Profile) if field.name != "name"]


def about(name: str) -> tuple[str, str, str]:
    """What a setting is, its unit, and where its default comes from."""
    field = Profile.__pydantic_fields__[name]
    return field.description, field.json_schema_extra["unit"], field.json_schema_extra["source"]


def choices(name: str) -> tuple[str, ...]:
    """The values that a setting may have; () where they are not a short list."""
    return tuple(value for value in get_args(TYPES[name]) if isinstance(value, str))


def make_profile(name: str, settings: dict | None = None) -> Profile:
    """The profile `name` with some settings replaced.

    ValueError that tells all that is wrong with an unknown profile or setting or a wrong value.
    """
    made, told = PROFILES[one_of("profile", name, PROFILES)], []
    known = setting_names()
    changed = dict(settings or {})
    protocol = one_of("protocol", changed.pop("protocol", "as-described"), PROTOCOLS)
    changed = PROTOCOLS[protocol] | changed
    allowed = {key: value for key, value in changed.items() if key in known}
    try:
        made = dataclasses.replace(made, **allowed)
    except ValidationError as error:
        told = [_sentence(str(wrong["loc"][0]), wrong["input"]) for wrong in error.errors()]
    if unknown := [repr(key) for key in changed if key not in known]:
        told.append(f"unknown setting {', '.join(unknown)}; choose from: {', '.join(known)}")
    if told:
        raise ValueError("; ".join(told))
    return made


def _sentence(name: str, value: object) -> str:
    """What is wrong with a setting's value, and what is allowed."""
    allowed = choices(name)
    kind = str if allowed else getattr(TYPES[name], "__origin__", TYPES[name])
    whole_for_real = kind is float and type(value) is int
    if type(value) is not kind and not whole_for_real:
        return f"setting {name} must be {kind.__name__}, got {value!r}"
    if allowed:
        return f"unknown setting {name} {value!r}; choose from: {', '.join(allowed)}"
    return f"setting {name} must be {LIMITS[TYPES[name]]}, got {value!r}"


def one_of(what: str, value: str, allowed: Iterable[str]) -> str:
    """`value`, if it is among `allowed`; otherwise a ValueError that lists them."""
    if value not in allowed:
        raise ValueError(f"unknown {what} {value!r}; choose from: {', '.join(allowed)}")
    return value


def parse_settings(pairs: Iterable[str]) -> dict[str, object]:
    """{name: value} of `name=value` texts; a value in Python's or JSON's notation, else a text.

    What is a text by its kind stays one: `data=2024` names a folder.
    """
    settings = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set wants name=value, got {pair!r}")
        try:
            value = json.loads(text.lower() if text in ("True", "False") else text)
        except json.JSONDecodeError:
            value = text
        settings[name] = text if TYPES.get(name) is str else value
    return settings
