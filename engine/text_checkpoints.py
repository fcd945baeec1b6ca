"""A text checkpoint: loaded whole and with the tokens that it was trained with, or refused."""
from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from engine.files import hash_source, one_line
from engine.fingerprint import content
from engine.runs import Run, from_root


def _source_digest(run: Run, stage: str) -> str:
    encoder = stage.removeprefix("vectors-").partition("_")[0]
    return hash_source(text_source(run, encoder))


@content(_source_digest, of_stage=True)
def text_source(run: Run, encoder: str) -> str:
    """What the setting of a text encoder names: a checkpoint, or "small"."""
    return getattr(run.profile, encoder)


def checkpoint_place(source: str) -> str:
    """The folder that `source` names from the project's root; else `source`, a name on the hub."""
    folder = from_root(source)
    return str(folder) if folder.is_dir() else source


def load_checkpoint(source: str, max_length: int, gradient_checkpointing: bool = False,
                    here: bool = False) -> tuple[nn.Module, object]:
    """Model (float32, without the pooler, which nothing here reads) and tokenizer of a Hugging
    Face text checkpoint, a folder or a name on the hub; `here` asks the hub for nothing.

    ValueError if it cannot be had, is not whole, or cannot read `max_length` tokens.
    """
    place = checkpoint_place(source)
    model, missing, left_over = obtain(source, load_weights, place, here)
    refuse_other_kind(source, model)
    tokenizer = obtain(source, load_tokenizer, place, model, here)
    refuse_other_weights(source, missing, left_over)
    refuse_unfit(source, model, tokenizer, max_length)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    tokenizer.padding_side = "right"  # the first token is the text's, not padding
    if gradient_checkpointing and model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model, tokenizer


def obtain(source: str, load: Callable, *arguments: object) -> object:
    """What `load` gives; ValueError if this part of a checkpoint cannot be had."""
    try:
        return load(*arguments)
    except Exception as error:  # the libraries raise many kinds for what is not whole
        raise ValueError(
            f"text checkpoint {source!r} cannot be loaded: it is neither a whole folder here, nor "
            f"in the hub's cache, nor can it be had from the hub ({one_line(error)})") from error


# --- weights --------------------------------------------------------------------------------------
def load_weights(place: str, here: bool) -> tuple[nn.Module, list[str], list[str]]:
    """A checkpoint's model; the names of its weights that the files lack; and the files' names
    that it has no place for, its heads' apart.

    transformers leaves a weight that it does not find random, with a warning alone. A prefix that
    the files' names carry, as `module.` or `model.`, is taken off where all weights fit then.
    """
    load = partial(AutoModel.from_pretrained, place, dtype=torch.float32, trust_remote_code=False,
                   local_files_only=here, output_loading_info=True)
    model, report = load()
    missing, left_over = misfits(model, report)
    if not missing:
        return model, missing, left_over
    ending = "." + max(missing, key=len)
    prefixes = [name.removesuffix(ending[1:]) for name in report["unexpected_keys"]
                if name.endswith(ending)]
    if len(prefixes) == 1:
        bare, report = load(key_mapping={f"^{re.escape(prefixes[0])}": ""})
        if not any(found := misfits(bare, report)):
            return bare, *found
    return model, missing, left_over


def misfits(model: nn.Module, report: dict) -> tuple[list[str], list[str]]:
    """Of a loading report, the missing names and the left over ones that are no head's.

    A head's name begins outside the model. The pooler is a head here; buffers are made anew.
    """
    parts = {name for name, _ in model.named_children()} - {"pooler"}
    buffers, base = dict(model.named_buffers()), f"{model.base_model_prefix}."
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    left_over = sorted(name.removeprefix(base) for name in report["unexpected_keys"])
    inside = [name for name in left_over if name.partition(".")[0] in parts]
    return missing, [name for name in inside if name not in buffers]


def refuse_other_weights(source: str, missing: list[str], left_over: list[str]) -> None:
    """ValueError if weights are missing, or left over within the model, by their names."""
    for names, what in ((missing, "lacks {} weights of its model, which would be random"),
                        (left_over, "holds {} weights that its model has no place for")):
        if names:
            some = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
            raise ValueError(
                f"text checkpoint {source!r} {what.format(f'{len(names):,}')}: {some}; its "
                "config.json is another model's, or its weights were saved under other names: save "
                "the encoder alone, with save_pretrained")


# --- tokens ---------------------------------------------------------------------------------------
PROBES = ("L'été à NOËL : œuvre d'art n° 3, 12,50 €", "Console PlayStation 4 – Édition limitée",
          "coffret dvd l’intégrale, saison 2 (2005)", "")


def load_tokenizer(place: str, model: nn.Module, here: bool):
    """A checkpoint's tokenizer, which gives the probe texts the ids that tokenizer.json gives.

    transformers makes a tokenizer anew by the rules of the class that is named beside the file,
    and where that is not the file's own kind its tokens are others, without a word. The file
    decides; only without one does the class alone.
    """
    own = {"trust_remote_code": False, "local_files_only": here}
    file = cached_file(place, "tokenizer.json", local_files_only=here,
                       _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False)
    if file is None:
        return AutoTokenizer.from_pretrained(place, **own)
    wanted = ids_of_file(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **own)
        faithful = probe_ids(tokenizer) == wanted
    except Exception:  # each class fails in its own way on another's file
        faithful = False
    if not faithful:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(place, local_files_only=here)
        if probe_ids(tokenizer) != wanted:
            raise ValueError("its tokenizer gives other tokens than its tokenizer.json")
    padding = model.config.pad_token_id
    if tokenizer.pad_token is None and padding is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    return tokenizer


def probe_ids(tokenizer) -> list[list[int]]:
    """The ids that a tokenizer gives the probe texts."""
    return tokenizer(list(PROBES))["input_ids"]


def ids_of_file(file: str) -> list[list[int]]:
    """The ids that a tokenizer.json itself gives the probe texts, neither cut nor padded."""
    tokenizer = Tokenizer.from_file(file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [found.ids for found in tokenizer.encode_batch(list(PROBES))]


# --- limits ---------------------------------------------------------------------------------------
def refuse_unfit(source: str, model: nn.Module, tokenizer, max_length: int) -> None:
    """ValueError if tokenizer and model do not belong together, or read fewer tokens than
    `max_length`.
    """
    tokens = model.config.vocab_size
    if len(tokenizer) < tokens / 2:  # transformers makes an empty one where files are missing
        raise ValueError(f"text checkpoint {source!r}: the model has {tokens} tokens and its "
                         f"tokenizer {len(tokenizer)}; the tokenizer's files are missing")
    if max(tokenizer.get_vocab().values()) >= tokens:
        raise ValueError(f"text checkpoint {source!r}: the model has {tokens} tokens and its "
                         f"tokenizer {len(tokenizer)}; it is another model's")
    if tokenizer.pad_token is None:
        raise ValueError(f"text checkpoint {source!r} has no padding token, as generative models "
                         "have none; take an encoder such as BERT or RoBERTa, or an embedding "
                         "model with a padding token and pooling=last")
    longest = longest_input(model, tokenizer)
    if max_length > longest:
        raise ValueError(f"text checkpoint {source!r} reads at most {longest} tokens; set "
                         f"max_length={longest} or less")


def refuse_other_kind(source: str, model: nn.Module) -> None:
    """ValueError if a model is no encoder of texts alone."""
    config = model.config
    if hasattr(config, "vision_config") or not hasattr(config, "vocab_size"):
        raise ValueError(f"text checkpoint {source!r} ({config.model_type}) reads pictures too, or "
                         "no texts at all; take a text encoder here, and name the picture's in "
                         "seresnext=timm/<network>")
    if config.is_encoder_decoder:
        raise ValueError(f"text checkpoint {source!r} ({config.model_type}) is an encoder with a "
                         "decoder; take an encoder such as BERT or RoBERTa")


def longest_input(model: nn.Module, tokenizer) -> int:
    """The number of tokens that a text model and its tokenizer can take."""
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    positions = positions if positions > 0 else sys.maxsize  # XLNet has no limit and says -1
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    if padding is not None:  # RoBERTa's kin number positions from the one after padding
        positions -= padding + 1
    return min(positions, tokenizer.model_max_length)


@torch.no_grad()
def refuse_blind_first_token(source: str, model: nn.Module) -> None:
    """ValueError if the first token's vector is the same whatever follows it, as in GPT-2."""
    ids = torch.tensor([[5, 6, 7], [5, 8, 9]])
    states = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    if torch.allclose(*states[:, 0], atol=1e-6):
        raise ValueError(f"text checkpoint {source!r}: its first token does not see the others, so "
                         "its vector says nothing about the text; set pooling=last, or mean")
