"""The texts of encoders, their tokens, and the small models and tokenizers made for the sample."""
from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CamembertConfig,
    CamembertModel,
    FlaubertConfig,
    FlaubertModel,
    FlaubertTokenizer,
    PreTrainedTokenizerFast,
)

from engine.files import write_json
from engine.settings import one_of


# --- texts and tokens -----------------------------------------------------------------------------
def encoder_texts(text: pd.DataFrame, field: str, texts: str) -> pd.Series:
    """What the encoders of a field read: it, or, by the setting `texts`, both fields joined."""
    if one_of("texts", texts, ("apart", "joined")) == "apart":
        return text[field]
    return (text["title"] + " " + text["description"]).str.strip()


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


def train_unigram(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """CamemBERT's tokenizer with pieces learnt from `texts`.

    Put together here, as the class CamembertTokenizer of transformers 4 cannot be given pieces.
    """
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
    unigram = [(token, 0.0) for token in special] + learnt
    tokenizer = Tokenizer(models.Unigram(unigram, unk_id=special.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>",
        sep_token="</s>", unk_token="<unk>", pad_token="<pad>", mask_token="<mask>")


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
