"""A text checkpoint and its limits, or a small model made for the sample."""
from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CamembertConfig,
    CamembertModel,
    CamembertTokenizer,
    FlaubertConfig,
    FlaubertModel,
    FlaubertTokenizer,
)

from engine.files import hash_source, one_line, write_json
from engine.fingerprint import content
from engine.runs import Run, from_root


# --- checkpoints ----------------------------------------------------------------------------------
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


def load_checkpoint(source: str, max_length: int,
                    gradient_checkpointing: bool = False) -> tuple[nn.Module, object]:
    """Model (float32, without the pooler, which nothing here reads) and tokenizer of a Hugging
    Face text checkpoint, a folder or a name on the hub.

    ValueError if it cannot be had, or cannot read `max_length` tokens.
    """
    try:
        place = checkpoint_place(source)
        model = AutoModel.from_pretrained(place, dtype=torch.float32,
                                          trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # the libraries raise many kinds for what is not whole
        raise ValueError(
            f"text checkpoint {source!r} cannot be loaded: it is neither a whole folder here, nor "
            f"in the hub's cache, nor can it be had from the hub ({one_line(error)})") from error
    refuse_unfit(source, model, tokenizer, max_length)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    tokenizer.padding_side = "right"  # the first token is the text's, not padding
    if gradient_checkpointing and model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model, tokenizer


def look_at_checkpoint(source: str, max_length: int) -> None:
    """ValueError if a checkpoint that lies here is not fit, judged by its shapes alone."""
    place = checkpoint_place(source)
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(place, local_files_only=True,
                                                trust_remote_code=False)
            model = AutoModel.from_config(config, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True,
                                                  trust_remote_code=False)
    except Exception as error:  # the libraries raise many kinds
        raise ValueError(f"text checkpoint {source!r} cannot be loaded ({one_line(error)})") \
            from error
    refuse_unfit(source, model, tokenizer, max_length)


def refuse_unfit(source: str, model: nn.Module, tokenizer, max_length: int) -> None:
    """ValueError if tokenizer and model do not belong together, or are of a kind that gives no
    vector of a text, or read fewer tokens than `max_length`.
    """
    tokens = model.config.vocab_size
    if len(tokenizer) < tokens / 2:  # transformers makes an empty one where files are missing
        raise ValueError(f"text checkpoint {source!r}: the model has {tokens} tokens and its "
                         f"tokenizer {len(tokenizer)}; the tokenizer's files are missing")
    if tokenizer.pad_token is None or model.config.is_encoder_decoder:
        no_padding = tokenizer.pad_token is None
        lacks = "has no padding token" if no_padding else "is an encoder with a decoder"
        raise ValueError(f"text checkpoint {source!r} {lacks}; take an encoder such as BERT or "
                         "RoBERTa")
    longest = longest_input(model, tokenizer)
    if max_length > longest:
        raise ValueError(f"text checkpoint {source!r} reads at most {longest} tokens; set "
                         f"max_length={longest} or less")


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
                         "its vector says nothing about the text; set pooling=mean")


def tokenise(tokenizer, texts: Sequence[str], max_length: int) -> list[dict[str, list[int]]]:
    """input_ids of each text, cut at `max_length` tokens; `tokenizer.pad` makes a batch of them.

    An empty text, as of a missing description, has the opening and the closing token.
    """
    ids = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return [{"input_ids": row} for row in ids]


# --- small ones, from scratch ---------------------------------------------------------------------
def train_tokenizer(encoder: str, texts: Sequence[str], vocabulary: int, folder: Path):
    """A tokenizer of the encoder's own kind, trained on `texts` (the training part's) and saved.

    CamemBERT: SentencePiece's Unigram, of at most `vocabulary` pieces. FlauBERT: byte-pair
    encoding of the words that its own rules find. The same texts give the same ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if encoder == "camembert":
        tokenizer = train_unigram(texts, vocabulary)
    else:
        tokenizer = train_bpe(texts, vocabulary, folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_unigram(texts: Sequence[str], vocabulary: int) -> CamembertTokenizer:
    """CamemBERT's tokenizer with pieces learnt from `texts`."""
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<s>NOTUSED", "</s>NOTUSED",
               "<unk>NOTUSED")
    own = 3  # SentencePiece's own <unk>, <s> and </s>, which come first
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=file, model_type="unigram",
        vocab_size=vocabulary - len(special) + own, hard_vocab_limit=False,
        character_coverage=1.0, normalization_rule_name="identity", num_threads=1, minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    learnt = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(own, len(pieces))]
    return CamembertTokenizer(vocab=[(token, 0.0) for token in special] + learnt)


def train_bpe(texts: Sequence[str], vocabulary: int, folder: Path) -> FlaubertTokenizer:
    """FlauBERT's tokenizer with merges learnt from `texts`; writes its vocab.json and merges.txt.

    Shown in 04.
    """
    special = ["<s>", "</s>", "<pad>", "<unk>", *(f"<special{i}>" for i in range(10))]
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    write_json(vocab, {token: i for i, token in enumerate(special)})
    merges.write_text("")
    rules = FlaubertTokenizer(vocab, merges)  # for the way it finds words
    plain = (rules.moses_pipeline(rules.preprocess_text(text), "fr") for text in texts)
    words = [rules.moses_tokenize(text, "fr") for text in plain]
    # The ends of words are named first, or their ids would vary.
    ends = sorted({word[-1] + "</w>" for text in words for word in text})
    bpe = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(map(" ".join, words), trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special + ends, end_of_word_suffix="</w>",
        show_progress=False))
    bpe.model.save(str(folder))
    lines = merges.read_text(encoding="utf-8").splitlines()[1:]  # FlauBERT's file has no header
    merges.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return FlaubertTokenizer(vocab, merges)


def small_text_model(encoder: str, tokenizer, width: int, layers: int,
                     max_length: int) -> nn.Module:
    """A CamembertModel or FlaubertModel of `layers` layers and random weights.

    No dropout of attention weights: it would take a third of the training time on a CPU.
    """
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
               "eos_token_id": tokenizer.eos_token_id}
    if encoder == "camembert":
        config = CamembertConfig(
            vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=4, intermediate_size=4 * width,
            max_position_embeddings=max_length + 2, attention_probs_dropout_prob=0.0, **special)
        return CamembertModel(config, add_pooling_layer=False)
    return FlaubertModel(FlaubertConfig(
        vocab_size=len(tokenizer), emb_dim=width, n_layers=layers, n_heads=4,
        max_position_embeddings=max_length, attention_dropout=0.0,
        unk_index=tokenizer.unk_token_id, **special))
