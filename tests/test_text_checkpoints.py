"""Text slots: any Hugging Face checkpoint, from a local folder, with its tokenizer and width."""
import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartModel,
    CamembertConfig,
    CamembertModel,
    CLIPConfig,
    CLIPModel,
    DebertaV2Config,
    DebertaV2Model,
    DebertaV2Tokenizer,
    FlaubertConfig,
    FlaubertModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaModel,
    XLMRobertaTokenizer,
    XLNetConfig,
    XLNetModel,
)

import helpers as h
from conftest import make_bert, tiny_products
from engine.files import hash_source, read_json, write_json
from engine.keys import key_of

SIZE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48}


def pieces(*special: str) -> list[tuple[str, float]]:
    """A vocabulary for tokenizers of SentencePiece's Unigram kind: special tokens, then the texts'
    characters.
    """
    letters = sorted({letter for title in tiny_products()["title"] for letter in title} - {" "})
    own = [(letter, -2.0) for letter in letters]
    return [(token, 0.0) for token in special] + [("▁", -1.0), *own]


def bert(folder):
    return make_bert(folder, max_position_embeddings=40, **SIZE)


def roberta(folder):
    tokenizer = RobertaTokenizer().train_new_from_iterator(tiny_products()["title"], 300)
    return tokenizer, RobertaModel(RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=42, **SIZE))


def xlm_roberta(folder):
    tokenizer = XLMRobertaTokenizer(vocab=pieces("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    return tokenizer, XLMRobertaModel(XLMRobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=42, **SIZE))


def deberta(folder):
    tokenizer = DebertaV2Tokenizer(vocab=pieces("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"))
    return tokenizer, DebertaV2Model(DebertaV2Config(
        vocab_size=len(tokenizer), max_position_embeddings=40, relative_attention=True,
        pos_att_type=["p2c", "c2p"], pad_token_id=tokenizer.pad_token_id, **SIZE))


KINDS = {"bert": bert, "roberta": roberta, "xlm_roberta": xlm_roberta, "deberta": deberta}


@pytest.fixture(params=KINDS)
def checkpoint(request, tmp_path):
    """A local folder as `save_pretrained` writes it: model of random weights, and tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path / request.param
    folder.mkdir()
    for part in KINDS[request.param](folder):
        part.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_slot_takes_the_checkpoint_with_its_tokenizer_and_width(checkpoint, make_run):
    run = make_run(flaubert=str(checkpoint), text_epochs=2, text_batch=8)
    for name in ("splits", "text", "flaubert_title"):
        folder = h.stage(run, name)
    ids = h.read_split(run)["product_id"]
    features = h.load_tensors(folder / "features.safetensors", ids)["features"]
    assert features.shape == (len(ids), 24) and features.std() > 0.05
    model, tokenizer = h.load_checkpoint(str(folder / "encoder"), 32)
    texts = h.read_text(run)["title"]
    own = tokenizer(list(texts[:1]), return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(input_ids=own["input_ids"], attention_mask=own["attention_mask"])
    assert torch.allclose(states.last_hidden_state[0, 0], features[0], atol=1e-5)
    assert tokenizer.unk_token_id not in own["input_ids"]


def test_a_checkpoint_says_how_many_tokens_it_can_read(checkpoint):
    model, tokenizer = h.load_checkpoint(str(checkpoint), 40)
    assert model.dtype == torch.float32 and getattr(model, "pooler", None) is None
    longest = torch.full((1, 40), tokenizer.convert_tokens_to_ids(tokenizer.tokenize("a"))[0])
    states = model(input_ids=longest, attention_mask=torch.ones_like(longest))
    assert states.last_hidden_state.shape == (1, 40, 24)
    with pytest.raises(ValueError, match="reads at most 40 tokens; set max_length=40 or less"):
        h.load_checkpoint(str(checkpoint), 41)


def test_gradient_checkpointing_changes_nothing_but_memory(checkpoint):
    tokens = torch.randint(5, 20, (3, 12))
    found = []
    for saving in (False, True):
        model, _ = h.load_checkpoint(str(checkpoint), 32, saving)
        assert model.is_activation_checkpointing == saving
        torch.manual_seed(0)
        out = model.train()(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        out.last_hidden_state.square().sum().backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()
                      if weight.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


def test_gradient_checkpointing_leaves_alone_a_model_that_has_none(tmp_path):
    """FlauBERT's in transformers: a study with the setting must not stop at its notebook."""
    tokenizer = h.train_tokenizer("flaubert", list(tiny_products()["title"]), 200, tmp_path)
    h.small_text_model("flaubert", tokenizer, 16, 1, 32).save_pretrained(tmp_path)
    model, _ = h.load_checkpoint(str(tmp_path), 32, gradient_checkpointing=True)
    assert model.config.emb_dim == 16


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="text checkpoint '.*nowhere' cannot be loaded: it is "
                                         "neither a whole folder"):
        h.load_checkpoint(str(tmp_path / "nowhere"), 32)
    with pytest.raises(ValueError, match="text checkpoint 'nobody/nothing' cannot be loaded"):
        h.load_checkpoint("nobody/nothing", 32)


def test_a_checkpoint_without_its_tokenizers_files_is_refused(checkpoint):
    for file in checkpoint.iterdir():
        if file.name not in ("config.json", "model.safetensors", "tokenizer_config.json"):
            file.unlink()
    with pytest.raises(ValueError, match="the tokenizer's files are missing|cannot be loaded"):
        h.load_checkpoint(str(checkpoint), 32)


def test_code_of_a_checkpoint_is_never_run_nor_asked_for(checkpoint, monkeypatch):
    """Of a model type that the library does not know it would ask, on the terminal."""
    (checkpoint / "own.py").write_text("raise SystemExit('the code was run')")
    config = read_json(checkpoint / "config.json")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    write_json(checkpoint / "config.json", {**config, **own})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        h.load_checkpoint(str(checkpoint), 32)


def gpt2(size: dict) -> torch.nn.Module:
    return GPT2Model(GPT2Config(n_embd=24, n_layer=2, n_head=2, **size))


def bart(size: dict) -> torch.nn.Module:
    return BartModel(BartConfig(d_model=24, encoder_layers=1, decoder_layers=1,
                                encoder_attention_heads=2, decoder_attention_heads=2, **size))


def xlnet(size: dict) -> torch.nn.Module:
    return XLNetModel(XLNetConfig(d_model=24, n_layer=2, n_head=2, d_inner=48, **size))


def clip(size: dict) -> torch.nn.Module:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}
    return CLIPModel(CLIPConfig(text_config={**small, **size},
                                vision_config={**small, "image_size": 8, "patch_size": 4}))


@pytest.mark.parametrize("make, message", [
    (clip, r"\(clip\) reads pictures too.*seresnext=timm/"),
    (gpt2, "its first token does not see the others.*set pooling=last, or mean"),
    (bart, r"\(bart\) is an encoder with a decoder; take an encoder such as BERT"), (xlnet, None)])
def test_models_whose_first_token_says_nothing_are_refused(tmp_path, make_run, make, message):
    tokenizer = RobertaTokenizer().train_new_from_iterator(tiny_products()["title"], 300)
    folder = tmp_path / make.__name__
    model = make({"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id})
    for part in (tokenizer, model):
        part.save_pretrained(folder)

    def load(**settings):
        run = make_run(camembert=str(folder), **settings)
        return h.load_text_model(run, "camembert", [], tmp_path)

    if message:
        with pytest.raises(ValueError, match=f"text checkpoint .*{make.__name__}'.* {message}"):
            load()
    else:
        load()
    if make is gpt2:
        load(pooling="mean")
        load(pooling="last")


def test_padding_stands_on_the_right(tmp_path, make_run):
    for part in bert(tmp_path):
        part.padding_side = "left"
        part.save_pretrained(tmp_path)
    model, tokenizer = h.load_checkpoint(str(tmp_path), 32)
    texts = list(tiny_products()["title"])
    rows = h.tokenise(tokenizer, texts, 32)
    together, each = (
        h.text_vectors(h.TextEncoder(model), tokenizer, rows, profile, "")
        for profile in (make_run(text_batch=len(texts)).profile, make_run(text_batch=1).profile))
    alone = [h.text_vectors(h.TextEncoder(model), tokenizer, [row], make_run().profile, "")
             for row in rows]
    assert torch.allclose(together, each, atol=1e-5)
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_a_changed_checkpoint_makes_its_stage_stale(checkpoint, make_run):
    run = make_run(camembert=str(checkpoint))

    def keys() -> list[str]:
        return [key_of(run, f"{encoder}_title") for encoder in h.TEXT_ENCODERS]

    digest, (before, other) = hash_source(str(checkpoint)), keys()
    assert hash_source(str(checkpoint)) == digest != str(checkpoint)
    config = checkpoint / "config.json"
    config.write_text(config.read_text() + " ")
    assert hash_source(str(checkpoint)) != digest
    assert keys()[0] != before and keys()[1] == other
    assert hash_source("almanach/camembert-base") == "almanach/camembert-base"


@pytest.mark.slow
def test_frozen_encoder_keeps_the_checkpoints_features(checkpoint, make_run):
    run = make_run(camembert=str(checkpoint), freeze_encoders=True, pooling="mean")
    assert run.folder.parent.parent.name == "described-frozen"
    for name in ("splits", "text", "camembert_description"):
        folder = h.stage(run, name)
    model, tokenizer = h.load_checkpoint(str(checkpoint), 32)
    rows = h.tokenise(tokenizer, h.read_text(run)["description"], 32)
    encoder = h.TextEncoder(model, "mean")
    features = h.text_vectors(encoder, tokenizer, rows, run.profile, "test")
    split = h.read_split(run)
    kept = h.load_tensors(folder / "features.safetensors", split["product_id"])["features"]
    assert torch.allclose(kept, features, atol=1e-5)
    truth, training = split["label_id"], split["part"] == "train"
    guess = h.head_probabilities(folder, kept).argmax(-1).numpy()
    most_frequent = np.bincount(truth).max() / len(truth)
    assert (guess == truth)[training].mean() > 0.5 > most_frequent
    source = h.read_stage(run, "vectors-camembert_description")
    assert h.read_manifest(run, "camembert_description")["metrics"]["parameters"] \
        == h.read_manifest(run, "vectors-camembert_description")["metrics"]["parameters"]
    assert (source / "encoder" / "config.json").samefile(folder / "encoder" / "config.json")


def test_frozen_encoder_needs_a_checkpoint(make_run):
    run = make_run(freeze_encoders=True)
    for name in ("splits", "text"):
        h.stage(run, name)
    with pytest.raises(ValueError, match="freeze_encoders=True needs a checkpoint, and "
                                         "camembert=small has learnt nothing yet; set camembert="):
        h.stage(run, "camembert_title")


def test_full_size_encoders_have_the_published_parameters():
    """CamemBERT-base 110.6 M (110.0 M without its pooler), FlauBERT-base cased 138.2 M, at the
    paper's width.
    """
    def millions(model):
        return round(sum(p.numel() for p in model.parameters()) / 1e6, 1)

    with torch.device("meta"):
        camembert = CamembertConfig(vocab_size=32_005, max_position_embeddings=514,
                                    type_vocab_size=1)
        flaubert = FlaubertConfig(vocab_size=68_729, emb_dim=768, n_layers=12, n_heads=12)
        assert millions(CamembertModel(camembert)) == 110.6
        assert millions(CamembertModel(camembert, add_pooling_layer=False)) == 110.0
        assert millions(FlaubertModel(flaubert)) == 138.2
