"""The method of the study "hierarchical fusion for multimodal product classification".

The notebooks import this module as ``h`` and nothing else of ours. Its sections follow them, and a
section uses only those above it. What a notebook calls besides is handed on from the rooms of
``engine``; ``h.show`` says where a thing stands.

    section             taught in    handed on from
    1  Splits           01           catalogue, rows, duplicates, pictures, figures
    2  Text             02           texts, text_models, scores, checks
    3  Fine-tuning      03           training, vectors, heads
    4  Text encoders    03, 04       text_checkpoints, text_models
    5  Image encoder    05           image_models, pictures, picture_cache
    6  Regions          06
    7  Fusion           07           fusions, variants, looks
    8  Result tables    08, 09, 10   paper_tables, late_fusion, claims, analysis, stages, tensors
    9  New products     11           products

"The paper" is Tashu, Fattouh, Kiss, Horvath: Multimodal E-Commerce Product Classification Using
Hierarchical Fusion (2022). Importing this module reads and writes no data.
"""
from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from torchvision.transforms import v2
from transformers import DataCollatorWithPadding, set_seed

from engine.analysis import (
    by_group,
    calibration_error,
    calibration_error_by_chance,
    complementarity,
    fit_temperature,
    region_parts,
    reliability,
    token_parts,
    with_temperature,
)
from engine.catalogue import (
    LAYOUTS,
    absent_pictures,
    catalogue_folder,
    check_pictures,
    find_layout,
    load_catalogue,
    load_classes,
    load_published,
    load_rakuten_classes,
    load_released,
    load_text_lengths,
    sample_generator,
)
from engine.checks import check
from engine.claims import TEXT_ALONE, claims_table, compare_splits, recommend
from engine.cuts import cut_groups, cut_rows
from engine.duplicates import chosen_groups
from engine.exports import Parts, parts_of_folder, parts_of_run
from engine.figures import (
    COLOURS,
    COLUMN,
    PAGE,
    caption,
    figure,
    note,
    number_no_rows,
    plain,
    plot_confusion,
    plot_learning_curve,
    plot_scores,
    save_figure,
    show,
    source_colour,
)
from engine.files import read_json, temporary_folder
from engine.fusions import (
    FUSIONS,
    Attention,
    Gated,
    LowRank,
    add,
    average,
    concat,
    fusion,
    fusion_of,
    maximum,
    product,
)
from engine.heads import (
    count_parameters,
    curve_metrics,
    fit_head,
    head_probabilities,
    load_head,
    validation_scores,
)
from engine.image_models import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SmallSENet,
    check_network,
    image_weights,
    load_weights,
    make_network,
    refusal,
)
from engine.keys import makes
from engine.late_fusion import LATE_FUSIONS, cross_fitted, fit_mixture, late_fusions, stack
from engine.looks import one_look
from engine.paper_tables import (
    OUR_MODEL,
    TABLES,
    compare,
    data_note,
    paper_table,
    readable_table,
    rows_note,
    style_table,
)
from engine.picture_cache import DecodedPictures, cached_pictures
from engine.pictures import as_rgb, decode_picture, open_picture
from engine.processes import device, open_run, use_threads
from engine.products import cleaned_products, missing_notes, whole_products
from engine.progress import Progress
from engine.rows import (
    chosen_labels,
    chosen_pictures,
    chosen_texts,
    select_rows,
    set_aside,
    usable_products,
)
from engine.runs import Run
from engine.scores import (
    Resamples,
    bootstrap,
    compare_all,
    contrast,
    holm,
    interval,
    mcnemar,
    resample,
    rows_to_separate,
    score,
    score_row,
    score_table,
    seed_variance,
    who_beats_whom,
)
from engine.settings import (
    FIELDS,
    PROFILES,
    REPRESENTATIONS,
    SPLITS,
    TABLE_FUSIONS,
    TEXT_ENCODERS,
    TEXT_STAGES,
    VALIDATION_SHARE,
    Profile,
    one_of,
)
from engine.stages import describe_stages, read_manifest, read_stage, stage
from engine.tensors import (
    load_tensors,
    save_pretrained,
    save_table,
    save_tensors,
    save_weights,
    share_file,
)
from engine.text_checkpoints import load_checkpoint, refuse_blind_first_token, text_source
from engine.text_models import encoder_texts, small_text_model, tokenise, train_bpe, train_tokenizer
from engine.texts import clean_text, clean_texts, decode_entities, has_words, strip_html
from engine.training import (
    EpochSampler,
    RowDataset,
    StudyTrainer,
    loader_workers,
    precision,
    trained_once,
    training_arguments,
)
from engine.variants import (
    HEADS,
    RAW_VARIANTS,
    STRUCTURES,
    TABLE_VARIANTS,
    Variant,
    display_name,
    named_variant,
    own_variants,
    scored_variants,
)
from engine.vectors import encode, encode_rows

pd.set_option("display.html.use_mathjax", False)  # a price in a table is no formula
number_no_rows()
# The libraries stay for good: without this Python looks through them again and again, and for
# seconds when a kernel ends. run.py's kernels import them with the collector off.
gc.freeze()
gc.enable()


# ==================================================================================================
# 1  Splits
# ==================================================================================================
def make_split(products: pd.DataFrame, split: str, seed: int,
               groups: Sequence[int] | None = None, held_out: float = 0.0,
               codes: Sequence[int] | None = None) -> pd.DataFrame:
    """[product_id, label_id, part] with part train, val or test, stratified by class.

    The test part is 10% or 20% of the rows, the validation part 10% of the others (paper, section
    V). A share `held_out` of the training rows is a part of its own, "fusion". With `groups` (a
    number for each product) no group is in two parts, and the shares are kept as closely as whole
    groups allow. ValueError if a class or all rows are too few to be split; it names classes by
    `codes`, the product type code of each label id. Shown in 01.
    """
    products = products.assign(group=range(len(products)) if groups is None else groups)
    products = products.sort_values("product_id")  # the file's order decides nothing
    counts = products["label_id"].value_counts()
    codes = range(counts.index.max() + 1) if codes is None else codes
    needed = 4 if held_out else 3
    if counts.min() < needed:
        few = {int(codes[label]): rows for label, rows in counts[counts < needed].items()}
        raise ValueError(f"a stratified split needs {needed} rows of each class, but these product "
                         f"type codes have fewer: {few}. Use rows='all', more rows, or remove "
                         "theirs")
    cut = cut_rows if groups is None else cut_groups
    rest, test = cut(products, SPLITS[split], seed)
    train, val = cut(rest, VALIDATION_SHARE, seed)
    parts = {"val": val, "test": test}
    if held_out:
        train, parts["fusion"] = cut(train, held_out, seed)
    if untrained := sorted(set(counts.index) - set(train["label_id"])):
        raise ValueError(f"product type code {codes[untrained[0]]} has no training row: all its "
                         "rows are copies of each other. Use grouped=False, more rows or another "
                         "seed")
    parts["train"] = train
    tables = [rows[["product_id", "label_id"]].assign(part=part) for part, rows in parts.items()]
    return pd.concat(tables).sort_values("product_id", ignore_index=True)


def held_out_share(profile: Profile) -> float:
    """Which share of the training rows the setting `fusion_rows` keeps from the encoders."""
    return 0.2 if profile.fusion_rows == "held-out" else 0.0


@makes("splits")
def build_splits(run: Run, name: str, folder: Path) -> dict:
    """Stage `splits`: split.csv, which every later stage and every modality uses, and
    set_aside.csv, the rows that the run goes on without.
    """
    save_table(folder / "set_aside.csv", set_aside(run))
    table = make_split(chosen_labels(run), run.split, run.seed, chosen_groups(run),
                       held_out_share(run.profile), load_classes(run)["prdtypecode"])
    save_table(folder / "split.csv", table)
    return {part: int(n) for part, n in table["part"].value_counts().items()}


def read_split(run: Run) -> pd.DataFrame:
    """The run's split, [product_id, label_id, part], in order of product id."""
    return pd.read_csv(read_stage(run, "splits") / "split.csv")


# ==================================================================================================
# 2  Text
# ==================================================================================================
@makes("text")
def build_text(run: Run, name: str, folder: Path) -> dict:
    """Stage `text`: text.csv with the cleaned [product_id, title, description] of the rows."""
    products = chosen_texts(run)
    for field in FIELDS:
        how = run.profile.clean
        products[field] = clean_texts(products[field], how, f"cleaning each {field}")
    save_table(folder / "text.csv", products)
    return {"rows": len(products)}


def read_text(run: Run) -> pd.DataFrame:
    """The cleaned text with part and label: product_id, title, description, label_id, part."""
    return read_cleaned(run).merge(read_split(run), on="product_id", validate="one_to_one")


def read_cleaned(run: Run) -> pd.DataFrame:
    """The cleaned text of all the run's rows, whatever their part: no split decides it."""
    return pd.read_csv(read_stage(run, "text") / "text.csv", keep_default_na=False,
                       dtype=dict.fromkeys(FIELDS, str))


BASELINES = ("majority class", "TF-IDF title", "TF-IDF description", "TF-IDF both")


def tfidf_baseline(train: Sequence[str], labels: Sequence[int], texts: Sequence[str],
                   classes: int = 27) -> np.ndarray:
    """Class probabilities [N, classes] of `texts` by TF-IDF (words and pairs) and logistic
    regression.

    Shown in 02.
    """
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2),
                          LogisticRegression(C=10, max_iter=500))
    model.fit(train, labels)
    probabilities = np.zeros((len(texts), classes), dtype=np.float32)
    probabilities[:, model[-1].classes_] = model.predict_proba(texts)
    return probabilities


@makes("baselines")
def build_baselines(run: Run, name: str, folder: Path) -> dict:
    """Stage `baselines`: probabilities.safetensors of the models BASELINES, for val and test."""
    text = read_text(run)
    text["both"] = encoder_texts(text, "both", "joined")
    train, rest = text[text["part"] == "train"], text[text["part"] != "train"]
    classes = len(load_classes(run))
    shares = np.bincount(train["label_id"], minlength=classes) / len(train)
    probabilities = {"majority class": np.tile(shares.astype(np.float32), (len(rest), 1))}
    for field in (*FIELDS, "both"):
        found = tfidf_baseline(train[field], train["label_id"], rest[field], classes)
        probabilities[f"TF-IDF {field}"] = found
    save_tensors(folder / "probabilities.safetensors", rest["product_id"], **probabilities)
    return {}


def baseline_probabilities(run: Run, product_ids: Sequence[int]) -> dict[str, Tensor]:
    """Class probabilities [N, 27] of each baseline for products of the val or test part."""
    path = read_stage(run, "baselines") / "probabilities.safetensors"
    probabilities = load_tensors(path, product_ids)
    return {model: probabilities[model] for model in BASELINES}


# ==================================================================================================
# 3  Fine-tuning
# ==================================================================================================
class Classifier(nn.Module):
    """An encoder, which gives one vector a row, and a linear layer to the classes.

    `encoder(**inputs)` returns [N, width]; `forward` returns the logits [N, classes] and, with
    labels, the loss. Shown in 03.
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


def finetune(model: Classifier, train: RowDataset, val: RowDataset, folder: Path,
             profile: Profile, *, collate: Callable, epochs: int, batch: int, lr: float,
             weight_decay: float, seed: int, lengths: Sequence[int] | None = None,
             workers: int = 0) -> pd.DataFrame:
    """Train `model` in place and leave it at its best epoch by validation macro-F1.

    AdamW with linear decay, gradients clipped at 1.0. `batch` rows make a step, shared by all
    processes; where they do not fit on a device, fewer at a time, whose gradients are added up.
    (Batch normalisation sees only the rows that are on a device together, or, on several GPUs, in
    all processes.) After a stop it goes on from its last checkpoint in `folder`. Returns the
    learning curve, one row an epoch: [epoch, train_loss, val_loss, val_accuracy, val_macro_f1].
    Shown in 03.
    """
    label = folder.name.partition("-")[0]
    sampler = EpochSampler(len(train), batch, seed, lengths)

    def attempt(rows: int) -> pd.DataFrame:
        arguments = training_arguments(
            profile, folder, batch, rows, num_train_epochs=epochs, learning_rate=lr,
            weight_decay=weight_decay, seed=seed, dataloader_num_workers=workers)
        trainer = StudyTrainer(
            model, arguments, sampler=sampler, profile=profile, label=label, data_collator=collate,
            train_dataset=train, eval_dataset=val, compute_metrics=validation_scores)
        return trainer.go_on()

    return trained_once(model, attempt, folder, batch, profile, seed)


def build_frozen(run: Run, vectors: str, folder: Path) -> dict:
    """With frozen encoders: the checkpoint and its vectors as stage `vectors` holds them, and a
    head fitted on the training part.
    """
    source, split = read_stage(run, vectors), read_split(run)
    features = load_tensors(source / "features.safetensors", split["product_id"])["features"]
    head = nn.Linear(features.shape[1], len(load_classes(run)))
    labels = torch.tensor(split["label_id"].to_numpy())
    curve = fit_head(head, features, labels, split["part"].to_numpy())
    for path in source.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            share_file(path, folder / path.relative_to(source))
    save_weights(folder / "head.safetensors", head.state_dict())
    save_table(folder / "curve.csv", curve)
    return curve_metrics(curve) | read_manifest(run, vectors)["metrics"]


# ==================================================================================================
# 4  Text encoders
# ==================================================================================================
class TextEncoder(nn.Module):
    """A Hugging Face text model whose output is one vector a text: the first token's, the mean, or
    the last token's.

    T_c, D_c, T_f, D_f of the paper: [N, d], d = 768 for the paper's checkpoints. Shown in 03.
    """

    def __init__(self, model: nn.Module, pooling: str = "first"):
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.model(input_ids=input_ids, attention_mask=attention_mask)
        tokens = states.last_hidden_state  # [N, length, d]
        if self.pooling == "first":
            return tokens[:, 0]
        if self.pooling == "last":
            last = attention_mask.sum(1).clamp(min=1) - 1  # padding is on the right
            return tokens[torch.arange(len(tokens)), last]
        mask = attention_mask[..., None].to(tokens.dtype)
        return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)


def load_text_model(run: Run, encoder: str, texts: Sequence[str],
                    folder: Path) -> tuple[nn.Module, object]:
    """The model and tokenizer that fine-tuning starts from: a checkpoint, or small ones made for
    `texts`, whose tokenizer is written into `folder`. Shown in 03.
    """
    profile, source = run.profile, text_source(run, encoder)
    if source == "small":
        tokenizer = train_tokenizer(encoder, texts, profile.vocabulary, folder)
        width, layers = profile.text_width, profile.text_layers
        return small_text_model(encoder, tokenizer, width, layers, profile.max_length), tokenizer
    model, tokenizer = load_checkpoint(source, profile.max_length, profile.gradient_checkpointing)
    if profile.pooling == "first":
        refuse_blind_first_token(source, model)
    return model, tokenizer


def text_rows(rows: list[dict], text: pd.DataFrame, part: str) -> RowDataset:
    """The tokenised rows of one part with their labels; those of val by length, to pad little."""
    places = np.flatnonzero(text["part"] == part)
    if part == "val":
        lengths = np.array([len(rows[i]["input_ids"]) for i in places])
        places = places[np.argsort(lengths)]
    chosen = [rows[i] for i in places]
    return RowDataset(chosen.__getitem__, text["label_id"].iloc[places])


def text_vectors(encoder: TextEncoder, tokenizer, rows: list[dict], profile: Profile,
                 label: str, mode: str = "eval") -> Tensor:
    """The vectors [N, d] of tokenised texts, longest first, so that batches pad little."""
    order = np.argsort([-len(row["input_ids"]) for row in rows], kind="stable")

    def inputs(places: Sequence[int]) -> dict[str, Tensor]:
        return dict(tokenizer.pad([rows[i] for i in places], return_tensors="pt"))

    encoder = encoder.train(mode == "train").to(device())
    return encode_rows(encoder, order, inputs, 4 * profile.text_batch, precision(profile), label)


def field_vectors(model: nn.Module, tokenizer, products: pd.DataFrame, name: str,
                  profile: Profile, mode: str = "eval") -> Tensor:
    """The vectors [N, d] that the text stage `name` holds of cleaned products [title, description].
    """
    texts = encoder_texts(products, name.rpartition("_")[2], profile.texts)
    rows = tokenise(tokenizer, texts, profile.max_length)
    return text_vectors(TextEncoder(model, profile.pooling), tokenizer, rows, profile, name, mode)


@makes(*TEXT_STAGES, together=True)
def build_text_encoder(run: Run, name: str, folder: Path) -> dict:
    """Stage `<encoder>_<field>`: the encoder fine-tuned on one field, and its features.

    Writes encoder/ (Hugging Face model and tokenizer), head.safetensors (linear layer),
    features.safetensors (`features` [N, d] by product id, all parts) and curve.csv.
    """
    if run.profile.freeze_encoders:
        return build_frozen(run, f"vectors-{name}", folder)
    profile, (encoder, field) = run.profile, name.split("_")
    text = read_text(run)
    training = text[text["part"] == "train"]
    set_seed(run.seed)
    both = [*training["title"], *training["description"]]  # one tokenizer serves both fields
    with temporary_folder() as place:  # for a small tokenizer's files
        model, tokenizer = load_text_model(run, encoder, both, place)
    rows = tokenise(tokenizer, encoder_texts(text, field, profile.texts), profile.max_length)
    train, val = (text_rows(rows, text, part) for part in ("train", "val"))
    classifier = Classifier(TextEncoder(model, profile.pooling), model.config.hidden_size,
                            len(load_classes(run)), profile.text_dropout)
    curve = finetune(
        classifier, train, val, folder, profile, epochs=profile.text_epochs,
        batch=profile.text_batch, lr=profile.text_lr, weight_decay=0.01, seed=run.seed,
        collate=DataCollatorWithPadding(tokenizer),
        lengths=[len(train.row(i)["input_ids"]) for i in range(len(train))])
    features = text_vectors(classifier.encoder, tokenizer, rows, profile, name)
    save_pretrained(folder / "encoder", model, tokenizer)
    save_weights(folder / "head.safetensors", classifier.head.state_dict())
    save_tensors(folder / "features.safetensors", text["product_id"], features=features)
    return curve_metrics(curve) | {"parameters": count_parameters(model)}


@makes(*(f"vectors-{name}" for name in TEXT_STAGES), together=True)
def build_text_vectors(run: Run, name: str, folder: Path) -> dict:
    """Stage `vectors-<encoder>_<field>`: what a checkpoint as it is makes of all chosen rows.

    It reads no split and no seed, so every run on the same rows shares it.
    """
    profile, encoder = run.profile, name.removeprefix("vectors-").partition("_")[0]
    source = text_source(run, encoder)
    if source == "small":
        raise ValueError(f"freeze_encoders=True needs a checkpoint, and {encoder}=small has learnt "
                         f"nothing yet; set {encoder}=<checkpoint>")
    model, tokenizer = load_checkpoint(source, profile.max_length)
    text = read_cleaned(run)
    features = field_vectors(model, tokenizer, text, name, profile)
    save_pretrained(folder / "encoder", model, tokenizer)
    save_tensors(folder / "features.safetensors", text["product_id"], features=features)
    return {"parameters": count_parameters(model)}


# ==================================================================================================
# 5  Image encoder
# ==================================================================================================
def augmentation(size: int) -> v2.Transform:
    """Random rotation, flip and crop of training pictures (paper, section IV.A); uint8 to uint8.

    Shown in 05.
    """
    return v2.Compose([
        v2.ToPILImage(),  # Pillow rotates several times as fast as tensors do on a CPU
        v2.RandomRotation(15, interpolation=v2.InterpolationMode.BILINEAR),
        v2.RandomHorizontalFlip(),
        v2.RandomResizedCrop(size, scale=(0.8, 1.0)),
        v2.PILToTensor()])


def normalise(pictures: Tensor, mean: Sequence[float] | Tensor,
              std: Sequence[float] | Tensor) -> Tensor:
    """Bytes [..., 3, H, W] to float32: as 0 to 1, minus `mean`, by `std` of each channel (paper,
    section IV.A). Shown in 05.
    """
    mean, std = (torch.as_tensor(x, device=pictures.device).view(3, 1, 1) for x in (mean, std))
    return (pictures.float() / 255 - mean) / std


class ImageEncoder(nn.Module):
    """A network without its classification layer: one vector a picture, [N, width].

    Width is 2048 for SE-ResNeXt-50 and 512 for the small one. `name` is the setting `seresnext`,
    `weights` the setting `image_weights`, `size` the pixels a side that a transformer is made for.
    `forward` takes bytes (0 to 255, uint8 or float)
    [N, 3, H, W], red first, and prepares them as this network expects. Shown in 05.
    """

    def __init__(self, name: str, weights: str = "none", size: int = 224):
        super().__init__()
        self.model, self.expects = make_network(name, size)
        self.width = self.expects.width
        self.weights_from = load_weights(self.model, name, weights, size)
        for statistic in ("mean", "std"):  # buffers, so that they move to the encoder's device
            values = torch.tensor(getattr(self.expects, statistic))
            self.register_buffer(statistic, values, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = normalise(pixels, self.mean, self.std)
        return self.model(pixels.contiguous(memory_format=torch.channels_last))  # the faster layout


def picture_rows(pictures: np.ndarray | DecodedPictures, split: pd.DataFrame, part: str,
                 size: int, seed: int) -> RowDataset:
    """The pictures and labels of one part of the split, as bytes; those of train augmented."""
    places = np.flatnonzero(split["part"] == part)
    labels = split["label_id"].iloc[places]
    if part == "train":
        change = augmentation(size)
        return RowDataset(lambda i: {"pixels": change(torch.tensor(pictures[places[i]]))}, labels,
                          seed)
    return RowDataset(lambda i: {"pixels": torch.tensor(pictures[places[i]])}, labels)


@makes("seresnext", together=True)
def build_image_encoder(run: Run, name: str, folder: Path) -> dict:
    """Stage `seresnext`: the image encoder fine-tuned on whole pictures.

    Writes encoder.safetensors, head.safetensors (linear layer) and curve.csv.
    """
    if run.profile.freeze_encoders:
        return build_frozen(run, "vectors-image_whole", folder)
    profile = run.profile
    check_network(profile)  # before hours of training, not after
    set_seed(run.seed)
    # First: there may be no weights.
    model = ImageEncoder(profile.seresnext, image_weights(run), profile.image_size)
    split, pictures = read_split(run), cached_pictures(run, profile.image_size)
    assert split["product_id"].tolist() == chosen_pictures(run)["product_id"].tolist()
    train, val = (picture_rows(pictures, split, part, profile.image_size, run.seed)
                  for part in ("train", "val"))
    classifier = Classifier(model, model.width, len(load_classes(run)), dropout=0.0)
    curve = finetune(
        classifier, train, val, folder, profile, epochs=profile.image_epochs,
        batch=profile.image_batch, lr=profile.image_lr, seed=run.seed,
        weight_decay=0.0,  # AdamW without decay: Adam
        collate=torch.utils.data.default_collate, workers=loader_workers(profile))
    save_weights(folder / "encoder.safetensors", model.state_dict())
    save_weights(folder / "head.safetensors", classifier.head.state_dict())
    return curve_metrics(curve) | {"parameters": count_parameters(classifier),
                                   "weights_from": model.weights_from}


def load_image_encoder(run: Run) -> ImageEncoder:
    """The image encoder of stage `seresnext`, in eval mode."""
    encoder = ImageEncoder(run.profile.seresnext, size=run.profile.image_size)
    encoder.load_state_dict(load_file(read_stage(run, "seresnext") / "encoder.safetensors"))
    return encoder.eval()


# ==================================================================================================
# 6  Regions
# ==================================================================================================
def split_regions(pictures: Tensor, grid: int = 16) -> Tensor:
    """Pictures [N, 3, S, S] as tiles [N, grid * grid, 3, S/grid, S/grid], row by row (paper,
    section III.B).

    ValueError if S is not a multiple of `grid`. Shown in 06.
    """
    n, channels, height, width = pictures.shape
    if height % grid or width % grid:
        raise ValueError(f"pictures of {height} x {width} pixels cannot be cut into {grid} x "
                         f"{grid} equal regions")
    tiles = pictures.reshape(n, channels, grid, height // grid, grid, width // grid)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(n, grid * grid, channels, height // grid, width // grid)


def regional_features(encoder: ImageEncoder, pictures: Tensor, grid: int = 16) -> Tensor:
    """P of equation (2): the mean of the encoder's vectors of all tiles, [N, width]. Shown in 06.
    """
    tiles = split_regions(pictures, grid)                          # [N, 256, 3, 14, 14]
    vectors = encoder(tiles.flatten(0, 1))                         # [N * 256, width]
    return vectors.view(len(pictures), grid * grid, -1).mean(1)    # [N, width]


def whole_vectors(encoder: ImageEncoder, profile: Profile,
                  pictures_of: Callable[[int], Sequence], mode: str = "eval") -> Tensor:
    """The encoder's vectors [N, width] of whole pictures; `pictures_of(pixels a side)` gives them.
    """
    pictures = pictures_of(profile.image_size)
    encoder = encoder.train(mode == "train").to(device())
    return encode_pictures(encoder, pictures, profile.image_batch, profile, "whole pictures")


def region_vectors(encoder: ImageEncoder, profile: Profile,
                   pictures_of: Callable[[int], Sequence], mode: str = "eval") -> Tensor:
    """P [N, width] by the setting `regions`: equation (2), or the whole picture's own average."""
    if profile.regions == "feature_map":
        return whole_vectors(encoder, profile, pictures_of, mode)
    pictures = pictures_of(profile.region_size)
    encoder = encoder.train(mode == "train").to(device(), memory_format=torch.channels_last)
    # On a CPU few pictures at a time: their tiles suit the cache best.
    batch = profile.region_batch or (profile.image_batch if device().type == "cuda" else 4)

    def vectors(pixels: Tensor) -> Tensor:
        return regional_features(encoder, pixels, profile.grid)

    return encode_pictures(vectors, pictures, batch, profile, "regions")


def encode_pictures(vectors: Callable[..., Tensor], pictures: Sequence, batch: int,
                    profile: Profile, label: str) -> Tensor:
    """`vectors(pixels)` of all pictures, in their order."""
    def inputs(places: Sequence[int]) -> dict[str, Tensor]:
        return {"pixels": torch.tensor(pictures[places])}

    order = np.arange(len(pictures))
    return encode_rows(vectors, order, inputs, batch, precision(profile), label)


@makes("image_whole", together=True)
def build_image_whole(run: Run, name: str, folder: Path) -> dict:
    """Stage `image_whole`: features.safetensors [N, width] of whole pictures, for Table I."""
    return build_image_features(run, name, folder, whole_vectors)


@makes("image_regions", together=True)
def build_image_regions(run: Run, name: str, folder: Path) -> dict:
    """Stage `image_regions`: features.safetensors, P [N, width] by product id."""
    return build_image_features(run, name, folder, region_vectors)


def build_image_features(run: Run, name: str, folder: Path,
                         vectors: Callable[..., Tensor]) -> dict:
    """The fine-tuned encoder's `vectors`; of a frozen one those that `vectors-<name>` holds."""
    if not run.profile.freeze_encoders:
        return save_vectors(run, folder, load_image_encoder(run), vectors)
    source = read_stage(run, f"vectors-{name}")
    share_file(source / "features.safetensors", folder / "features.safetensors")
    return read_manifest(run, f"vectors-{name}")["metrics"]


@makes("vectors-image_whole", together=True)
def build_whole_vectors(run: Run, name: str, folder: Path) -> dict:
    """Stage `vectors-image_whole`: what a network with its published weights makes of whole
    pictures; the network itself too.
    """
    encoder = untrained_encoder(run)
    metrics = save_vectors(run, folder, encoder, whole_vectors)
    save_weights(folder / "encoder.safetensors", encoder.state_dict())
    return metrics | {"parameters": count_parameters(encoder),
                      "weights_from": encoder.weights_from}


@makes("vectors-image_regions", together=True)
def build_region_vectors(run: Run, name: str, folder: Path) -> dict:
    """Stage `vectors-image_regions`: what a network with its published weights makes of regions."""
    return save_vectors(run, folder, untrained_encoder(run), region_vectors)


def untrained_encoder(run: Run) -> ImageEncoder:
    """The network with its published weights, the same for every split and seed."""
    check_network(run.profile)
    torch.manual_seed(0)  # for random weights, where there are no others
    profile = run.profile
    return ImageEncoder(profile.seresnext, image_weights(run), profile.image_size)


def save_vectors(run: Run, folder: Path, encoder: ImageEncoder,
                 vectors: Callable[..., Tensor]) -> dict:
    """Write what `vectors`, of whole pictures or of regions, makes of the run's; their width."""
    features = vectors(encoder, run.profile, partial(cached_pictures, run))
    ids = chosen_pictures(run)["product_id"]
    save_tensors(folder / "features.safetensors", ids, features=features)
    return {"width": features.shape[1]}


# ==================================================================================================
# 7  Fusion
# ==================================================================================================
class ImageReduction(nn.Module):
    """Conv1d with max-pooling that fits P [N, p] to the width of the text vector [N, width]
    (paper, section III.C).

    Shown in 07.
    """

    def __init__(self, width: int, channels: int = 4):
        super().__init__()
        if width % channels:
            raise ValueError(f"the text vector's width {width} is not a multiple of {channels} "
                             "channels")
        self.conv = nn.Conv1d(1, channels, kernel_size=3, padding=1)
        self.pool = nn.AdaptiveMaxPool1d(width // channels)

    def forward(self, image: Tensor) -> Tensor:
        return self.pool(self.conv(image[:, None])).flatten(1)


def make_head(width: int, classes: int, head: str, dropout: float) -> nn.Sequential:
    """f of equation (1): three fully connected layers; Table III adds dropout, or dropout and one
    more layer; the released code has a single one. Shown in 07.
    """
    if one_of("head", head, HEADS) == "linear":
        return nn.Sequential(nn.Linear(width, classes))
    first = [nn.Dropout(dropout)] if head == "dropout" else []
    more = [nn.Dropout(dropout), nn.Linear(256, 256), nn.ReLU()] if head == "layers" else []
    return nn.Sequential(*first, nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(),
                         *more, nn.Linear(256, classes))


class Join(nn.Module):
    """Z of parts: representations by name, or joins of their own, whose Z is that of the inner
    levels. Shown in 07.
    """

    def __init__(self, parts: tuple, width: int, inner: str, outer: str):
        super().__init__()
        self.parts = [part if isinstance(part, str) else str(i) for i, part in enumerate(parts)]
        self.joins = nn.ModuleDict({str(i): Join(part, width, inner, inner)
                                    for i, part in enumerate(parts) if isinstance(part, tuple)})
        for join in self.joins.values():
            width = join.gives
        self.takes, z = width, FUSIONS[one_of("fusion", outer, FUSIONS)]
        self.gives = z.width(width, len(parts))
        self.z = z.make(width, len(parts))

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.z(*(self.joins[part](x) if part in self.joins else x[part]
                        for part in self.parts))

    def width_at(self, symbol: str) -> int:
        """How wide a representation has to be where it is joined; 0 if it is not."""
        if symbol in self.parts:
            return self.takes
        return max((join.width_at(symbol) for join in self.joins.values()), default=0)


class HierarchicalFusion(nn.Module):
    """y = f(Z(P, Z(Z(T_f, D_f), Z(T_c, D_c)))), equation (1), or another structure of its variant.

    `widths` gives the width of each of T_c, D_c, T_f, D_f and P. `forward` takes them as
    [N, width] tensors and returns logits [N, classes]. Text representations of different widths
    need `project`. While it is trained, `hide` is the share of rows whose titles, descriptions or
    pictures are replaced by the training rows' mean. Shown in 07.
    """

    def __init__(self, widths: dict[str, int], variant: Variant, classes: int = 27,
                 dropout: float = 0.3, project: bool = False, hide: float = 0.0):
        super().__init__()
        self.variant, self.hide = variant, hide
        widths = {name: widths[name] for name in variant.symbols}
        texts = {name: width for name, width in widths.items() if name != "P"}
        if len(set(texts.values())) > 1 and not project:
            raise ValueError(f"the text representations differ in width ({texts}); set "
                             "project=True")
        d = max(texts.values(), default=widths.get("P"))
        for name, width in widths.items():  # 0 and 1 until fit_scale is called
            self.register_buffer(f"mean_{name}", torch.zeros(width))
            self.register_buffer(f"std_{name}", torch.ones(width))
            self.register_buffer(f"missing_{name}", torch.zeros(width))
        self.projections = nn.ModuleDict(
            {name: nn.Linear(width, d) for name, width in texts.items() if project})
        self.join = Join(variant.tree, d, variant.text_fusion, variant.final_fusion)
        if "P" in widths:  # alone, it has no text to fit
            self.reduce_image = ImageReduction(self.join.width_at("P")) if texts else nn.Identity()
        self.classify = make_head(self.join.gives, classes, variant.head, dropout)

    def fit_scale(self, representations: dict[str, Tensor], training: Tensor | slice = slice(None),
                  scale: bool = True) -> None:
        """Remember the mean of the `training` rows, which stands for what is missing, and, to
        `scale`, their deviation; a constant column is only centred.
        """
        for name in self.variant.symbols:
            x = representations[name]
            # Some columns at a time, because indexing copies.
            parts = [torch.std_mean(columns[training], 0) for columns in x.split(256, 1)]
            std, mean = map(torch.cat, zip(*parts))
            getattr(self, f"missing_{name}").copy_(mean)
            if scale:
                std = torch.where(std > 1e-6, std, torch.ones_like(std))
                getattr(self, f"mean_{name}").copy_(mean)
                getattr(self, f"std_{name}").copy_(std)

    def prepare(self, name: str, rows: Tensor) -> Tensor:
        """A representation standardised and, where asked for, projected."""
        rows = (rows - getattr(self, f"mean_{name}")) / getattr(self, f"std_{name}")
        return self.projections[name](rows) if name in self.projections else rows

    def forward(self, **representations: Tensor) -> Tensor:
        x = {name: representations[name] for name in self.variant.symbols}
        if self.training and self.hide:
            x = hide_modalities(x, self.means, self.hide)
        x = {name: self.prepare(name, rows) for name, rows in x.items()}
        if "P" in x:
            x["P"] = self.reduce_image(x["P"])
        return self.classify(self.join(x))

    @property
    def means(self) -> dict[str, Tensor]:
        """The mean of each representation's training rows: what stands for a missing one."""
        return {name: getattr(self, f"missing_{name}") for name in self.variant.symbols}


# What is missing together: a product without a title has neither T_c nor T_f.
MODALITIES = {"title": ("T_c", "T_f"), "description": ("D_c", "D_f"), "picture": ("P",)}


def hide_modalities(x: dict[str, Tensor], means: dict[str, Tensor],
                    share: float) -> dict[str, Tensor]:
    """Modality dropout: in a `share` of the rows of each modality its mean stands for it, never for
    all three of a product (Neverova et al. 2016). Shown in 09.
    """
    rows = len(next(iter(x.values())))
    hidden = torch.rand(rows, len(MODALITIES), device=next(iter(x.values())).device) < share
    hidden &= ~hidden.all(1, keepdim=True)
    for place, symbols in enumerate(MODALITIES.values()):
        for symbol in set(symbols) & set(x):
            x = {**x, symbol: torch.where(hidden[:, place, None], means[symbol], x[symbol])}
    return x


def read_representations(run: Run, product_ids: Sequence[int], picture: str = "regions",
                         symbols: Sequence[str] = tuple(REPRESENTATIONS)) -> dict[str, Tensor]:
    """T_c, D_c, T_f, D_f and P of the products, or those `symbols` alone, in the products' order; P
    of the picture's regions, or of the "whole" picture.
    """
    names, representations = REPRESENTATIONS | {"P": f"image_{picture}"}, {}
    for symbol in symbols:
        path = read_stage(run, names[symbol]) / "features.safetensors"
        representations[symbol] = load_tensors(path, product_ids)["features"]
    return representations


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor],
               labels: Tensor) -> float:
    """One step of gradient descent on the cross-entropy; returns the loss before it. Shown in 07.
    """
    loss = nn.functional.cross_entropy(model(**batch), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def train_fusion(model: HierarchicalFusion, representations: dict[str, Tensor], labels: Tensor,
                 train: Tensor, val: Tensor, *, epochs: int, batch: int, lr: float, seed: int,
                 label: str, keep_last: bool = False) -> pd.DataFrame:
    """Train on the rows `train`, leave the model at its best epoch by macro-F1 of the rows `val`,
    or at its last.

    `representations` and `labels` hold all rows. Returns the learning curve, one row an epoch, as
    `finetune` does. Shown in 07.
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
        val_loss = nn.functional.cross_entropy(logits, val_labels).item()
        curve.append({"epoch": epoch, "train_loss": float(np.mean(losses)), "val_loss": val_loss,
                      "val_accuracy": scores["accuracy"], "val_macro_f1": scores["macro_f1"]})
        if scores["macro_f1"] > best[0]:
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            best = (scores["macro_f1"], weights)
        bar.advance()
    bar.close()
    if not keep_last:
        model.load_state_dict(best[1])
    return pd.DataFrame(curve)


@torch.inference_mode()
def predict_fusion(model: HierarchicalFusion, representations: dict[str, Tensor]) -> Tensor:
    """Logits [N, 27], in eval mode; some rows at a time, so that memory does not grow with them."""
    model.eval()
    batches = zip(*(rows.split(256) for rows in representations.values()))
    return torch.cat([model(**dict(zip(representations, batch))) for batch in batches])


def make_fusion(run: Run, variant: Variant,
                representations: dict[str, Tensor]) -> HierarchicalFusion:
    """An untrained fusion model for representations of these widths."""
    for name in (variant.text_fusion, variant.final_fusion):
        fusion_of(run, name)
    widths = {name: rows.shape[1] for name, rows in representations.items()}
    profile, classes = run.profile, len(load_classes(run))
    return HierarchicalFusion(widths, variant, classes, profile.dropout, profile.project,
                              hide=profile.modality_dropout if variant.hide else 0.0)


def encode_in_train_mode(run: Run, variant: Variant, rows: Tensor) -> dict[str, Tensor]:
    """What fusion learns from where the encoders are left in train mode: dropout is on, and batch
    normalisation goes by the batch. Drawn once, not anew in each epoch.
    """
    set_seed(run.seed)

    def pictures_of(size: int) -> Sequence:
        return torch.utils.data.Subset(cached_pictures(run, size), rows.numpy())

    text = read_text(run).iloc[rows.numpy()]
    return encode_products(run, text, pictures_of, variant, "train")


@makes("fusion")
def build_fusion(run: Run, name: str, folder: Path) -> dict:
    """Stage `fusion-<variant>`: the model of each fusion seed k (model-<k>.safetensors), and
    curve.csv with their learning curves.
    """
    profile, variant = run.profile, named_variant(name.removeprefix("fusion-"))
    split = read_split(run)
    x = read_representations(run, split["product_id"], variant.picture, variant.symbols)
    learnt = "train" if profile.fusion_rows == "train" else "fusion"
    train, val = (torch.tensor(np.flatnonzero(split["part"] == part)) for part in (learnt, "val"))
    if profile.encoder_mode == "train":
        for symbol, rows in encode_in_train_mode(run, variant, train).items():
            x[symbol][train] = rows
    x = {symbol: rows.to(device()) for symbol, rows in x.items()}
    labels = torch.tensor(split["label_id"].to_numpy()).to(device())
    train, val = train.to(device()), val.to(device())
    curves = []
    for k in range(profile.fusion_seeds):
        set_seed(run.seed + k)
        model = make_fusion(run, variant, x).to(device())
        model.fit_scale(x, train, scale=variant.standardise and profile.standardise)
        curve = train_fusion(
            model, x, labels, train, val, epochs=profile.fusion_epochs, batch=profile.fusion_batch,
            lr=profile.fusion_lr, seed=run.seed + k, label=variant.name, keep_last=variant.last)
        save_weights(folder / f"model-{k}.safetensors", model.state_dict())
        curves.append(curve.assign(fusion_seed=k))
    save_table(folder / "curve.csv", pd.concat(curves))
    kept = [curve.tail(1) if variant.last else curve for curve in curves]
    scores = pd.DataFrame(map(curve_metrics, kept)).drop(columns="best_epoch").mean()
    return {**scores, "seeds": profile.fusion_seeds, "parameters": count_parameters(model)}


def load_fusions(run: Run, variant: Variant,
                 representations: dict[str, Tensor]) -> Iterator[HierarchicalFusion]:
    """The trained models of a variant, one for each fusion seed."""
    folder = read_stage(run, f"fusion-{variant.name}")
    for k in range(run.profile.fusion_seeds):
        model = make_fusion(run, variant, representations)
        model.load_state_dict(load_file(folder / f"model-{k}.safetensors"))
        yield model


def fusion_probabilities(run: Run, variant: Variant, representations: dict[str, Tensor],
                         missing: Sequence[str] = ()) -> Tensor:
    """Class probabilities [N, seeds, 27] of a trained variant for these rows; the mean of the
    training rows stands for the modalities that are `missing`.
    """
    found = []
    for model in load_fusions(run, variant, representations):
        x = dict(representations)
        for symbol in itertools.chain.from_iterable(MODALITIES[name] for name in missing):
            if symbol in model.means:
                x[symbol] = model.means[symbol].expand_as(x[symbol])
        found.append(torch.softmax(predict_fusion(model, x), -1))
    return torch.stack(found, 1)


def encode_products(run: Run, text: pd.DataFrame, pictures_of: Callable[[int], Sequence],
                    variant: Variant, mode: str = "eval") -> dict[str, Tensor]:
    """The representations [N, width] that a variant reads, of any products' cleaned texts [title,
    description] and pictures, by the run's encoders in this mode.
    """
    profile, found = run.profile, {}
    vectors_of = region_vectors if variant.picture == "regions" else whole_vectors
    for symbol in variant.symbols:
        name = REPRESENTATIONS[symbol]
        if symbol == "P":
            found[symbol] = vectors_of(load_image_encoder(run), profile, pictures_of, mode)
            continue
        folder = read_stage(run, name) / "encoder"
        model, tokenizer = load_checkpoint(str(folder), profile.max_length)
        found[symbol] = field_vectors(model, tokenizer, text, name, profile, mode)
    return found


# ==================================================================================================
# 8  Result tables
# ==================================================================================================
ENCODER_MODELS = (*TEXT_STAGES, "seresnext")
# Who is compared with whom: each pair more makes the correction harsher.
COMPARED = ("TF-IDF both", *ENCODER_MODELS, *TABLE_FUSIONS, "concat-concat-text",
            "average-average-text", "late mean", "late stacking")


def encoder_probabilities(run: Run, model: str, product_ids: Sequence[int]) -> Tensor:
    """Class probabilities [N, 27] of one encoder alone, by its own head."""
    holder = "image_whole" if model == "seresnext" else model
    path = read_stage(run, holder) / "features.safetensors"
    return head_probabilities(read_stage(run, model), load_tensors(path, product_ids)["features"])


@one_look()  # at what the many stages were given: once for them all
def all_probabilities(run: Run, part: str) -> tuple[np.ndarray, dict[str, Tensor]]:
    """(true labels [N], {model: probabilities}) of baselines and encoders [N, 27], of fusion
    variants [N, seeds, 27], of late fusions [N, 27] and of the blend of both [N, seeds, 27], on one
    part, in order of product id.

    Late fusions are fitted on the validation part, whose own rows are cross-fitted. Shown in 08.
    """
    rows = read_split(run).query("part == @part")
    ids, labels = rows["product_id"].to_numpy(), torch.tensor(rows["label_id"].to_numpy())
    found = baseline_probabilities(run, ids)
    found |= {model: encoder_probabilities(run, model, ids) for model in ENCODER_MODELS}
    x = {picture: read_representations(run, ids, picture) for picture in ("regions", "whole")}
    for variant in scored_variants(run):
        found[variant.name] = fusion_probabilities(run, variant, x[variant.picture])
    encoders = torch.stack([found[model] for model in ENCODER_MODELS], 1)
    if part == "val":
        found |= cross_fitted(encoders, labels)
    else:
        val = read_split(run).query("part == 'val'")
        others = [encoder_probabilities(run, model, val["product_id"]) for model in ENCODER_MODELS]
        val_labels = torch.tensor(val["label_id"].to_numpy())
        found |= late_fusions(torch.stack(others, 1), val_labels, encoders)
    found["blend"] = (found["average-average"] + found["late mean"][:, None]) / 2
    return labels.numpy(), found


@makes("scores")
def build_scores(run: Run, name: str, folder: Path) -> dict:
    """Stage `scores`: predictions.safetensors of the test part and validation.safetensors of the
    validation part, {model: probabilities} and `label_id`; scores.csv and table_<number>.csv of the
    test part.

    Shown in 08.
    """
    for part, file in (("val", "validation"), ("test", "predictions")):
        truth, found = all_probabilities(run, part)
        ids = read_split(run).query("part == @part")["product_id"]
        save_tensors(folder / f"{file}.safetensors", ids, label_id=truth, **found)
    scores = pd.DataFrame([score_row(model, truth, probabilities.argmax(-1), run)
                           for model, probabilities in found.items()])
    save_table(folder / "scores.csv", scores)
    for number, split in TABLES.items():
        if split == run.split:
            save_table(folder / f"table_{number}.csv", paper_table(scores, number))
    return {"models": len(scores), "n": len(truth)}


def read_probabilities(run: Run, part: str = "test") -> tuple[Tensor, dict[str, Tensor]]:
    """(true labels [N], {model: probabilities, [N, 27] or [N, seeds, 27]}) of the test or val part,
    as the stage `scores` keeps them, in order of product id.
    """
    file = {"test": "predictions", "val": "validation"}[one_of("part", part, ("test", "val"))]
    kept = load_file(read_stage(run, "scores") / f"{file}.safetensors")
    return kept["label_id"], {model: kept[model] for model in model_order(run)}


def read_predictions(run: Run, part: str = "test") -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(true labels [N], {model: predicted labels, [N] or [N, seeds]}) of the test or val part."""
    truth, found = read_probabilities(run, part)
    return truth.numpy(), {model: each.argmax(-1).numpy() for model, each in found.items()}


def model_order(run: Run) -> list[str]:
    """All scored models: baselines, encoders, fusions, late fusions, the blend."""
    fusions = [variant.name for variant in scored_variants(run)]
    return [*BASELINES, *ENCODER_MODELS, *fusions, *LATE_FUSIONS, "blend"]


@makes("claims")
def build_claims(run: Run, name: str, folder: Path) -> dict:
    """Stage `claims`: claims.csv, the paper's claims tested on this split, comparisons.csv, the
    models of COMPARED against each other, and the recommended model, chosen on the validation part.

    Macro-F1 of the test part, resampled over products and seeds together.
    """
    truth, predicted = read_predictions(run, "val")
    val = resample(truth, predicted, "macro_f1", run.profile.bootstrap)
    single = max(ENCODER_MODELS, key=lambda model: val.value[model].mean())
    fusions = [model for model in model_order(run) if model not in (*BASELINES, *ENCODER_MODELS)]
    chosen = recommend(val, fusions)
    truth, predicted = read_predictions(run)
    found = resample(truth, predicted, "macro_f1", run.profile.bootstrap)
    save_table(folder / "claims.csv", claims_table(found, single))
    compared = list(dict.fromkeys([*COMPARED, chosen]))
    save_table(folder / "comparisons.csv", compare_all(found, compared))
    return {"best single encoder": single, "recommended": chosen, "n": len(truth)}


def read_claims(runs: Sequence[Run]) -> pd.DataFrame:
    """The claims tested on each of these splits, a column `split` before the others; where both
    splits are there, the claim about them too.
    """
    tables = []
    for run in runs:
        tables.append(pd.read_csv(read_stage(run, "claims") / "claims.csv"))
        tables[-1].insert(0, "split", run.split)
    if len(runs) == 2:
        row = {"split": "both", **compare_splits(resample_common(runs))}
        tables.append(pd.DataFrame([row]))
    return pd.concat(tables, ignore_index=True)


def resample_common(runs: Sequence[Run]) -> Resamples:
    """Macro-F1 of "<split> <model>" for the tables' fusions, on the products that all these runs
    test, and on those drawn again.
    """
    tests = [read_split(run).query("part == 'test'").set_index("product_id") for run in runs]
    common = sorted(set.intersection(*(set(test.index) for test in tests)))
    predicted = {}
    for run, test in zip(runs, tests):
        places = test.index.get_indexer(common)
        for name, labels in read_predictions(run)[1].items():
            if name in TABLE_FUSIONS:
                predicted[f"{run.split} {name}"] = labels[places]
    truth = tests[0].loc[common, "label_id"].to_numpy()
    return resample(truth, predicted, "macro_f1", runs[0].profile.bootstrap)


# ==================================================================================================
# 9  New products
# ==================================================================================================
class ProductClassifier:
    """A trained fusion with its encoders and tokenizers, in memory once, for any products.

    A table of products has the columns title, description and picture (a path). A missing text is
    an empty one, which a run on `rows="described"` never saw; for a missing picture stands the
    training rows' mean. Of the fusion the first seed decides. Made by `load_classifier`.
    """

    def __init__(self, parts: Parts):
        self.run, self.variant, self.classes = parts.run, parts.variant, parts.classes
        profile, folders, self.image = self.run.profile, parts.folders, None
        use_threads(profile)  # of the run: on another number sums are rounded otherwise
        self.fusions = {name: load_fusion(parts, name) for name in parts.fusions}
        self.heads = {name: load_head(folders[name]) for name in ENCODER_MODELS if name in folders}
        self.readers = {name: load_checkpoint(str(folders[name] / "encoder"), profile.max_length)
                        for name in TEXT_STAGES if name in folders}
        if "seresnext" in folders:
            self.image = ImageEncoder(profile.seresnext, size=profile.image_size)
            self.image.load_state_dict(load_file(folders["seresnext"] / "encoder.safetensors"))

    def vectors(self, name: str, products: pd.DataFrame) -> Tensor:
        """What an encoder's stage would hold of cleaned products, [N, width]; NaN: no picture."""
        profile = self.run.profile
        if name in self.readers:
            return field_vectors(*self.readers[name], products, name, profile)
        there = products["picture"].to_numpy() != ""
        found = torch.full((len(there), self.image.width), torch.nan)
        if there.any():
            read = region_vectors if name == "image_regions" else whole_vectors
            pictures_of = partial(DecodedPictures, products["picture"][there])
            found[torch.tensor(there)] = read(self.image, profile, pictures_of)
        return found

    def representations(self, products: pd.DataFrame,
                        missing: Sequence[str] = ()) -> dict[str, Tensor]:
        """What the fusion reads, [N, width] each. The training rows' mean stands for the modalities
        that are `missing`, and for the picture of a row that has none.
        """
        products, found = cleaned_products(products, self.run.profile.clean), {}
        names = REPRESENTATIONS | {"P": f"image_{self.variant.picture}"}
        gone = list(itertools.chain.from_iterable(MODALITIES[name] for name in missing))
        absent = torch.tensor((products["picture"] == "").to_numpy())[:, None]
        for symbol, mean in self.fusions[self.variant.name].means.items():
            mean = mean.repeat(len(products), 1)
            rows = mean if symbol in gone else self.vectors(names[symbol], products)
            found[symbol] = torch.where(absent, mean, rows) if symbol == "P" else rows
        return found

    def levels(self, products: pd.DataFrame) -> dict[str, Tensor]:
        """Class probabilities [N, classes] by model: each encoder's own head (NaN: no picture), the
        fusion of the texts alone where there is one, the whole.
        """
        x = self.representations(products)
        read = {REPRESENTATIONS[symbol]: rows for symbol, rows in x.items()}
        if self.image:
            read["seresnext"] = self.vectors("image_whole", whole_products(products))
        with torch.no_grad():
            found = {name: head(read[name]).softmax(-1) for name, head in self.heads.items()}
        return found | {name: predict_fusion(model, x).softmax(-1)
                        for name, model in self.fusions.items()}

    def probabilities(self, products: pd.DataFrame, missing: Sequence[str] = ()) -> Tensor:
        """Class probabilities [N, classes] by the fusion; `missing` as in `representations`."""
        x = self.representations(products, missing)
        return predict_fusion(self.fusions[self.variant.name], x).softmax(-1)

    def predict(self, products: pd.DataFrame, probabilities: bool = False) -> pd.DataFrame:
        """[code, name, probability, notes on what is missing] of each product, by its own index; if
        asked, the `probabilities` of all classes by their codes too.
        """
        notes, p = missing_notes(products), self.probabilities(products)
        table = self.classes.loc[p.argmax(-1).tolist(), ["prdtypecode", "name_en"]]
        table = table.set_axis(["code", "name"], axis=1).set_axis(products.index)
        table = table.assign(probability=p.amax(-1).numpy(), notes=notes)
        every = pd.DataFrame(p.numpy(), products.index, self.classes["prdtypecode"].tolist())
        return pd.concat([table, every], axis=1) if probabilities else table


def load_fusion(parts: Parts, name: str) -> HierarchicalFusion:
    """The first seed's model of a variant."""
    variant, profile = named_variant(name), parts.run.profile
    for z in (variant.text_fusion, variant.final_fusion):
        fusion_of(parts.run, z)  # one's own is known from here on
    weights = load_file(parts.folders[f"fusion-{name}"] / "model-0.safetensors")
    widths = {symbol: len(weights[f"mean_{symbol}"]) for symbol in variant.symbols}
    model = HierarchicalFusion(widths, variant, len(parts.classes), project=profile.project)
    model.load_state_dict(weights)
    return model


def load_classifier(place: Run | str | Path, variant: str | None = None) -> ProductClassifier:
    """The classifier of a run, of "concat-add" or another `variant`; or of a folder that
    `run.py export` has written, which holds one variant.

    FileNotFoundError names what is missing of a run, ValueError of a folder. Shown in 11.
    """
    if isinstance(place, Run):
        return ProductClassifier(parts_of_run(place, named_variant(variant or "concat-add")))
    return ProductClassifier(parts_of_folder(Path(place), variant))
