"""A text checkpoint's tokens and weights are those that it was trained with, or it is refused."""
import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CamembertConfig,
    CamembertForMaskedLM,
    DebertaV2Config,
    DebertaV2Model,
    RobertaConfig,
    RobertaModel,
)

import helpers as h
from commands.doctor import refuse_fatal
from commands.networks import check_weights_here
from conftest import make_bert, tiny_products, write_bert

SIZE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 64}
PADS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
        "mask_token": "[MASK]"}
TEXTS = [*tiny_products()["title"], "L'ÉTÉ À NOËL, œuvre n° 3 : 12,50 €", "", "Étagère  d’angle"]


def wordpiece(**normalizer: bool) -> Tokenizer:
    """A WordPiece tokenizer.json of the titles' words, as BERT's kin have it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(tiny_products()["title"], trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=list(PADS.values()), show_progress=False))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def unigram() -> Tokenizer:
    """A tokenizer.json of SentencePiece's kind: Unigram pieces, blanks as "▁"."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(tiny_products()["title"], trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends)
    return tokenizer


MODELS = {"bert": (BertConfig, BertModel), "roberta": (RobertaConfig, RobertaModel),
          "deberta": (DebertaV2Config, DebertaV2Model)}
CASED = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": False,
         "lowercase": False}
# name: the model, the tokenizer.json, what tokenizer_config.json says of it, config.json
FOLDERS = {
    "wordpiece as Roberta's": (
        "roberta", wordpiece(**CASED), {"tokenizer_class": "RobertaTokenizerFast", **PADS}, {}),
    "the same, with a model name": (
        "roberta", wordpiece(**CASED), {"tokenizer_class": "RobertaTokenizerFast", **PADS},
        {"model_name": "camembertv2-base"}),
    "wordpiece as DeBERTa's": (
        "deberta", wordpiece(**CASED), {"tokenizer_class": "DebertaV2TokenizerFast", **PADS}, {}),
    "uncased with accents": (
        "bert", wordpiece(**{**CASED, "lowercase": True}),
        {"tokenizer_class": "BertTokenizerFast", "do_lower_case": True, **PADS}, {}),
    "pieces as BERT's": ("bert", unigram(), None, {}),
}


def write_folder(folder: Path, kind: str, tokenizer: Tokenizer, about: dict | None,
                 config: dict) -> Path:
    """A checkpoint of random weights with this tokenizer.json."""
    torch.manual_seed(0)
    make_config, make_model = MODELS[kind]
    model = make_model(make_config(vocab_size=tokenizer.get_vocab_size(), pad_token_id=0, **SIZE))
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    if about is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def ids_of(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text).ids for text in TEXTS]


def read_ids(folder: Path) -> list[list[int]]:
    _, tokenizer = h.load_checkpoint(str(folder), 60)
    return [row["input_ids"] for row in h.tokenise(tokenizer, TEXTS, 60)]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_file_decides_the_tokens(tmp_path, name):
    folder, tokenizer = write_folder(tmp_path / "own", *FOLDERS[name]), FOLDERS[name][1]
    expected = ids_of(tokenizer)
    assert len({tuple(row) for row in expected}) > 55  # not all unknown
    try:
        others = AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
    except Exception:  # which kind depends on the class
        others = None
    assert others != expected  # what the library makes of it: the guard is needed
    assert read_ids(folder) == expected

    model, found = h.load_checkpoint(str(folder), 60)
    h.save_pretrained(tmp_path / "again", model, found)
    assert read_ids(tmp_path / "again") == expected
    batch = found.pad(h.tokenise(found, TEXTS[:9], 60), return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() == [len(row) for row in expected[:9]]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()


@pytest.mark.slow
def test_a_stage_is_trained_on_these_tokens_and_keeps_them(make_run, tmp_path):
    kind = FOLDERS["wordpiece as Roberta's"]
    run = make_run(camembert=str(write_folder(tmp_path / "own", *kind)), text_batch=8)
    for name in ("splits", "text", "camembert_title"):
        folder = h.stage(run, name)
    assert read_ids(folder / "encoder") == ids_of(kind[1])


# --- weights --------------------------------------------------------------------------------------
def rename_weights(folder: Path, rename) -> None:
    """Rewrite model.safetensors with `rename(name)`; None leaves a tensor out."""
    path = folder / "model.safetensors"
    weights = {rename(name): value for name, value in load_file(path).items()}
    weights.pop(None, None)
    save_file(weights, path, {"format": "pt"})


@pytest.fixture
def bert(tmp_path):
    return write_bert(tmp_path, **SIZE)


@pytest.mark.parametrize("prefix", [
    "module.", "model.", "encoder.model.", "module.model.bert.", "bert."])
def test_a_prefix_of_all_names_is_taken_off(bert, prefix):
    whole = load_file(bert / "model.safetensors")
    rename_weights(bert, lambda name: prefix + name)
    model, _ = h.load_checkpoint(str(bert), 32)
    found = model.state_dict()
    assert len(found) > 30 and all(torch.equal(found[name], whole[name]) for name in found)


def test_a_head_is_no_fault(tmp_path):
    tokenizer, _ = make_bert(tmp_path, **SIZE)
    torch.manual_seed(0)
    own = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **SIZE))
    for part in (tokenizer, own):
        part.save_pretrained(tmp_path)
    rename_weights(tmp_path, lambda name: f"module.{name}")
    model, _ = h.load_checkpoint(str(tmp_path), 32)
    found = model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in own.bert.state_dict().items()
               if not name.startswith("pooler."))


def test_masked_language_models_serve_as_they_are(tmp_path):
    """As almanach/camembert-base: `roberta.` before each name, a head, no pooler."""
    tokenizer = h.train_tokenizer("camembert", list(tiny_products()["title"]), 200, tmp_path)
    own = CamembertForMaskedLM(CamembertConfig(vocab_size=len(tokenizer), pad_token_id=1, **SIZE))
    own.save_pretrained(tmp_path)
    model, _ = h.load_checkpoint(str(tmp_path), 32)
    weight = own.roberta.encoder.layer[1].output.dense.weight
    assert torch.equal(model.encoder.layer[1].output.dense.weight, weight)


@pytest.mark.parametrize("rename, said", [
    (lambda name: None if "layer.1.output" in name else name,
     "lacks 4 weights of its model, which would be random: encoder.layer.1.output.LayerNorm.bias"),
    (lambda name: name.replace("layer.1", "layer.2"),
     "lacks 16 weights of its model, which would be random: encoder.layer.1"),
    (lambda name: name.replace("word_embeddings", "words"), "lacks 1 weights of its model"),
])
def test_weights_that_would_be_random_are_refused_by_name(bert, make_run, rename, said):
    rename_weights(bert, rename)
    with pytest.raises(ValueError, match=said):
        h.load_checkpoint(str(bert), 32)
    run = make_run(camembert=str(bert), project=True)
    # The doctor and `study` say so before anything starts.
    assert any(check.state == "fatal" and said in check.found for check in check_weights_here(run))
    with pytest.raises(ValueError, match=said):
        refuse_fatal(run)


def test_layers_without_a_place_are_refused_by_name(bert):
    path = bert / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="holds 16 weights that its model has no place for: "
                                         "encoder.layer.1"):
        h.load_checkpoint(str(bert), 32)


def test_two_encoders_in_one_file_are_refused(bert):
    path = bert / "model.safetensors"
    weights = load_file(path)
    both = {f"{side}.{name}": value.clone() for side in ("query", "product")
            for name, value in weights.items()}
    save_file(both, path, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks .* weights of its model"):
        h.load_checkpoint(str(bert), 32)


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(bert):
    path = bert / "config.json"
    tokenizer = AutoTokenizer.from_pretrained(bert)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer) - 1, **SIZE)).save_pretrained(bert)
    assert path.exists()
    with pytest.raises(ValueError, match="tokens and its tokenizer .*; it is another model's"):
        h.load_checkpoint(str(bert), 32)


def test_sentencepiece_file_alone_gives_its_pieces(tmp_path):
    """As older checkpoints of CamemBERT's kind come: no tokenizer.json."""
    place = tmp_path / "sentencepiece.bpe"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny_products()["title"]), model_prefix=str(place),
        model_type="unigram", vocab_size=120, hard_vocab_limit=False, character_coverage=1.0,
        num_threads=1, minloglevel=2)
    (tmp_path / "sentencepiece.bpe.vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(model_file=f"{place}.model")
    special = 4  # <s>NOTUSED, <pad>, </s>NOTUSED, <unk> stand before the pieces in fairseq's order
    config = CamembertConfig(vocab_size=len(pieces) + special + 2, pad_token_id=1, **SIZE)
    CamembertForMaskedLM(config).save_pretrained(tmp_path)
    _, tokenizer = h.load_checkpoint(str(tmp_path), 32)
    for text in ("Table basse en chêne", "Étagère murale 5 niveaux"):
        (row,) = h.tokenise(tokenizer, [text], 32)
        found = tokenizer.convert_ids_to_tokens(row["input_ids"])
        assert found == ["<s>", *pieces.encode(text, out_type=str), "</s>"]
        assert row["input_ids"][1:-1] == [piece + special for piece in pieces.encode(text)]
