"""Text: cleaning against examples worked by hand, tokenizers, and encoders against one row at a time."""
import nltk
import numpy as np
import pytest
import torch
from transformers import CamembertTokenizer, DebertaV2Tokenizer, XLMRobertaTokenizer

import helpers as h
from conftest import make_bert, tiny_products

TEXTS = [h.clean_text(text) for column in ("title", "description") for text in tiny_products()[column]]


# --- cleaning -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, plain", [
    ("", ""), (" \t\n ", ""), ("Chaise", "Chaise"),
    ("<p>Table <b>en <i>bois</i></b></p>", "Table en bois"),
    ("bois<br>métal<br/>verre", "bois métal verre"),            # a tag is a space
    ("<ul><li>un<li>deux</ul>", "un deux"),                     # not closed
    ("L&#39;&eacute;t&eacute; &amp; l&rsquo;hiver", "L'été & l’hiver"),
    ("avant&lt;br&gt;apr&egrave;s", "avant après"),             # an escaped tag is a tag
    ("20&nbsp;cm\u00a0x  30\n cm", "20 cm x 30 cm"),
    ("a < b et c > d", "a < b et c > d"), ("5<6", "5<6"), ("<", "<"), ("3 &lt; 4", "3 < 4"),
    ("<!-- caché -->vu", "vu"), ('<a href="x.html" title="y">lien</a>', "lien"),
    ("&inconnu; reste", "&inconnu; reste"), ("emoji 🧸 œuf", "emoji 🧸 œuf")])
def test_strip_html_as_worked_by_hand(text, plain):
    assert h.strip_html(text) == plain
    assert h.clean_text(text, "light") == plain


@pytest.mark.parametrize("text", ["&amp;lt;b&amp;gt;", "&amp;lt;b&amp;gt; <i>z</i>"])
def test_entities_are_decoded_once_with_or_without_a_tag(text):
    assert h.strip_html(text).startswith("&lt;b&gt;")


@pytest.mark.parametrize("text", ["<script>var a = 1;</script>vu", "<style>p { color: red }</style>vu"])
def test_code_of_a_page_is_no_text(text):
    assert h.strip_html(text) == "vu"


@pytest.mark.parametrize("text, clean", [
    ("", ""), ("TABLE Basse", "table basse"), ("Prix: 12,5 cm.", "prix : 12,5 cm ."),
    ("<b>Été</b>, fin", "été , fin"), ("(poche)", "( poche )"), ("L&#39;été", "l'été")])
def test_clean_text_as_worked_by_hand(text, clean):
    assert h.clean_text(text) == clean


def test_light_keeps_case_and_punctuation_and_paper_does_not():
    assert h.clean_text("<b>Été,</b> FIN.", "light") == "Été, FIN."
    assert h.clean_text("<b>Été,</b> FIN.", "paper") == "été , fin ."


def test_cleaning_a_clean_text_changes_nothing():
    """Not true of every text: NLTK writes an opening " as ``, and a decoded &lt; may open a tag."""
    for text in [*tiny_products()["title"], *tiny_products()["description"]]:
        for how in h.CHOICES["clean"]:
            once = h.clean_text(text, how)
            if '"' not in text:
                assert h.clean_text(once, how) == once
            assert once == " ".join(once.split())


def test_cleaning_needs_no_nltk_download(monkeypatch):
    def refuse(*args, **kwargs):
        raise LookupError("nltk_data was asked for")

    monkeypatch.setattr(nltk.data, "find", refuse)
    monkeypatch.setattr(nltk.data, "load", refuse)
    assert h.clean_text("L'ours. Il dort.") == "l'ours. il dort ."


def test_text_stage_cleans_every_row_of_the_split(make_run):
    for how in h.CHOICES["clean"]:
        run = make_run(clean=how, rows="all")
        h.split_stage(run)
        h.text_stage(run)
        text, products = h.read_text(run), tiny_products().set_index("product_id")
        assert text["product_id"].tolist() == sorted(products.index)
        for row in text.itertuples():
            assert row.title == h.clean_text(products.loc[row.product_id, "title"], how)
            assert row.description == h.clean_text(products.loc[row.product_id, "description"], how)


# --- many texts, in processes -------------------------------------------------------------------------
def test_many_texts_are_cleaned_in_processes_to_the_same_result(monkeypatch):
    texts = [*TEXTS, "", "<br>"]
    expected = [h.clean_text(text) for text in texts]
    assert h.clean_texts(texts, "paper", "test") == expected
    monkeypatch.setattr(h, "MANY_TEXTS", 10)
    started = []
    monkeypatch.setattr(h.joblib, "Parallel", lambda *args, real=h.joblib.Parallel, **more: started.append(1) or real(
        *args, **more))
    assert h.clean_texts(texts, "paper", "test") == expected and started == [1]
    assert h.clean_texts(texts, "light", "test") == [h.clean_text(text, "light") for text in texts]


# --- baseline -----------------------------------------------------------------------------------------
def test_tfidf_finds_the_words_of_a_class_and_gives_probabilities_of_all_27():
    train = ["rouge pomme"] * 5 + ["bleu ciel"] * 5
    found = h.tfidf_baseline(train, [3] * 5 + [20] * 5, ["pomme", "ciel bleu", "inconnu"])
    assert found.shape == (3, 27) and np.allclose(found.sum(1), 1, atol=1e-6)
    assert found[:2].argmax(1).tolist() == [3, 20]
    assert (found[:, [c for c in range(27) if c not in (3, 20)]] == 0).all()


def test_baseline_stage_fits_on_the_training_part_alone(run):
    h.split_stage(run)
    h.text_stage(run)
    text = h.read_text(run)
    rest, train = text[text["part"] != "train"], text[text["part"] == "train"]
    found = h.load_tensors(h.baseline_stage(run) / "probabilities.safetensors", rest["product_id"])
    shares = train["label_id"].value_counts(normalize=True)
    assert set(found) == {"majority class", "TF-IDF title", "TF-IDF description", "TF-IDF both"}
    for label in range(27):
        assert found["majority class"][:, label].numpy() == pytest.approx(shares.get(label, 0), abs=1e-6)
    expected = h.tfidf_baseline(train["title"].tolist(), train["label_id"].tolist(), rest["title"].tolist())
    assert np.allclose(found["TF-IDF title"], expected, atol=1e-6)


# --- tokenizers ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {encoder: h.train_tokenizer(encoder, TEXTS, 200, tmp_path_factory.mktemp(encoder))
            for encoder in h.TEXT_ENCODERS}


encoders = pytest.mark.parametrize("encoder", h.TEXT_ENCODERS)


def tokens_of(tokenizer, texts) -> list[list[str]]:
    return [tokenizer.tokenize(text) for text in texts]


@encoders
def test_saved_tokenizer_gives_the_same_ids(tokenizers, encoder, tmp_path):
    tokenizers[encoder].save_pretrained(tmp_path)
    again = h.AutoTokenizer.from_pretrained(tmp_path)
    assert h.tokenise(again, TEXTS, 32) == h.tokenise(tokenizers[encoder], TEXTS, 32)


@encoders
def test_vocabulary_has_the_size_asked_for_and_covers_the_special_tokens(tokenizers, encoder):
    tokenizer = tokenizers[encoder]
    assert len(tokenizer) == tokenizer.vocab_size == 200
    assert sorted(tokenizer.get_vocab().values()) == list(range(200))
    for token in tokenizer.all_special_tokens:
        assert token in tokenizer.get_vocab() and tokenizer.convert_tokens_to_ids(token) < 200
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id or tokenizer.sep_token_id, tokenizer.pad_token_id,
           tokenizer.unk_token_id}
    assert len(ids) == 4


@encoders
def test_every_text_is_framed_and_no_known_letter_is_lost(tokenizers, encoder):
    tokenizer = tokenizers[encoder]
    for row, text in zip(h.tokenise(tokenizer, TEXTS, 512), TEXTS):
        assert row["input_ids"][0] == tokenizer.bos_token_id and row["input_ids"][-1] == tokenizer.sep_token_id
        assert tokenizer.unk_token_id not in row["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("漢")["input_ids"]


@encoders
def test_other_training_texts_give_another_vocabulary(tokenizers, encoder, tmp_path):
    other = h.train_tokenizer(encoder, [text.replace("piscine", "pistolet") for text in TEXTS], 200, tmp_path)
    assert set(other.get_vocab()) != set(tokenizers[encoder].get_vocab())


@encoders
def test_same_training_texts_give_the_same_tokenizer(tokenizers, encoder, tmp_path):
    """A stage that is stopped and goes on trains it again; the checkpoint's embeddings need the same ids."""
    again = h.train_tokenizer(encoder, TEXTS, 200, tmp_path)
    assert again.get_vocab() == tokenizers[encoder].get_vocab()
    assert h.tokenise(again, TEXTS, 32) == h.tokenise(tokenizers[encoder], TEXTS, 32)


@encoders
def test_tokenise_equals_one_call_a_row_and_cuts_at_the_length(tokenizers, encoder):
    tokenizer = tokenizers[encoder]
    rows = h.tokenise(tokenizer, TEXTS, 9)
    assert max(len(row["input_ids"]) for row in rows) == 9
    for row, text in zip(rows, TEXTS):
        alone = tokenizer(text)["input_ids"]
        kept = alone if len(alone) <= 9 else [*alone[:8], alone[-1]]  # the closing token stays
        assert row == {"input_ids": kept}
    assert h.tokenise(tokenizer, [""], 9)[0]["input_ids"] == [tokenizer.bos_token_id, tokenizer.sep_token_id]


@pytest.mark.parametrize("kind, by_words", [
    ("camembert", True), ("xlm-r", True), ("bert", False), ("deberta", False), ("cut on the left", False)])
def test_words_put_together_equal_whole_texts(tokenizers, tmp_path, kind, by_words):
    """A tokenizer whose words depend on their neighbours, or whose cut is another, takes whole texts."""
    odd = ["<mask>", "a <mask> b", "a<mask>b </s> c", "  deux   espaces ", "saut\nde\tligne", "\u00a0insécable\u2003fin",
           "e\u0301te\u0301 \u0302x", "漢字 🧸", "▁a ▁ b", "\x1cx\x1f"]
    pieces = [(piece, -float(i)) for piece, i in sorted(tokenizers["camembert"].get_vocab().items(), key=lambda p: p[1])]
    makers = {"xlm-r": XLMRobertaTokenizer, "deberta": DebertaV2Tokenizer}
    if kind == "bert":
        tokenizer = make_bert(tmp_path, hidden_size=8, num_attention_heads=2)[0]
    else:
        tokenizer = makers.get(kind, CamembertTokenizer)(vocab=pieces)
    if kind == "cut on the left":
        tokenizer.truncation_side = "left"
    assert h.cuts_at_spaces(tokenizer) == by_words
    for length in (3, 9, 500):
        rows = h.tokenise(tokenizer, [*TEXTS, *odd, ""], length)
        assert [row["input_ids"] for row in rows] == [
            tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in [*TEXTS, *odd, ""]]


@encoders
def test_many_texts_give_the_same_ids_computed_and_cached(run, tokenizers, encoder, monkeypatch):
    texts = [*TEXTS, "", *TEXTS[:5]]
    expected = [{"input_ids": tokenizers[encoder](text, truncation=True, max_length=9)["input_ids"]} for text in texts]
    monkeypatch.setattr(h, "MANY_TEXTS", 10)
    assert h.tokenise(tokenizers[encoder], texts, 9) == expected
    assert tokenizers[encoder].is_fast == (encoder == "camembert")
    monkeypatch.setattr(h, "map_texts", lambda *_: pytest.fail("computed again"))
    assert h.tokenise(tokenizers[encoder], texts, 9) == expected


def test_cached_ids_belong_to_texts_length_and_tokenizer(run, tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(h, "MANY_TEXTS", 10)
    other = h.train_tokenizer("flaubert", TEXTS[:60], 150, tmp_path / "other")
    asked = [(tokenizers["flaubert"], TEXTS[:20], 9), (tokenizers["flaubert"], TEXTS[1:21], 9),
             (tokenizers["flaubert"], TEXTS[:20], 8), (other, TEXTS[:20], 9)]
    for tokenizer, texts, length in asked:
        assert [row["input_ids"] for row in h.tokenise(tokenizer, texts, length)] == [
            tokenizer.encode(text, truncation=True, max_length=length) for text in texts]
    files = sorted(path.name for path in (h.ROOT / "data" / "cache").iterdir())
    assert len(files) == 4 and all(name.endswith(".safetensors") for name in files)


def test_missing_descriptions_stay_empty_texts_to_the_end(make_run):
    run = make_run(rows="all")
    h.split_stage(run)
    h.text_stage(run)
    text = h.read_text(run)
    missing = text["description"] == ""
    assert missing.sum() == 5 and (text.loc[missing, "title"] != "").all()
    h.text_encoder_stage(run, "camembert", "description")
    folder = h.read_stage(run, "camembert_description")
    features = h.load_tensors(folder / "features.safetensors", text["product_id"])["features"]
    vectors = features[torch.tensor(missing.to_numpy())]
    model, tokenizer = h.load_checkpoint(str(folder / "encoder"), 32)
    with torch.no_grad():
        frame = torch.tensor([[tokenizer.bos_token_id, tokenizer.eos_token_id]])  # <s></s>
        own = model.eval()(input_ids=frame, attention_mask=torch.ones_like(frame)).last_hidden_state[0, 0]
    assert torch.allclose(vectors, own.expand_as(vectors), atol=1e-5) and own.abs().max() > 0.01


# --- encoders -----------------------------------------------------------------------------------------
class Counter(torch.nn.Module):
    """A "model" whose vector of token t is (t, t squared), so that pooling can be worked by hand."""

    def forward(self, input_ids, attention_mask):
        tokens = input_ids.float()
        return type("Output", (), {"last_hidden_state": torch.stack([tokens, tokens ** 2], -1)})


def test_pooling_as_worked_by_hand():
    ids, mask = torch.tensor([[4, 2, 9], [1, 3, 5]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert h.TextEncoder(Counter(), "first")(ids, mask).tolist() == [[4, 16], [1, 1]]
    means = h.TextEncoder(Counter(), "mean")(ids, mask)
    assert torch.allclose(means, torch.tensor([[3.0, 10.0], [3.0, 35 / 3]]))


@pytest.fixture(scope="module")
def text_models(tokenizers):
    torch.manual_seed(3)
    return {encoder: h.small_text_model(encoder, tokenizers[encoder], 16, 2, 32).eval() for encoder in tokenizers}


@encoders
@torch.no_grad()
def test_output_does_not_depend_on_padding(tokenizers, text_models, encoder):
    ids = torch.tensor([tokenizers[encoder](TEXTS[0])["input_ids"][:8]])
    alone = text_models[encoder](input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    for filler in (tokenizers[encoder].pad_token_id, 50):
        padded = torch.cat([ids, torch.full((1, 5), filler)], 1)
        mask = torch.tensor([[1] * 8 + [0] * 5])
        masked = text_models[encoder](input_ids=padded, attention_mask=mask).last_hidden_state[:, :8]
        seen = text_models[encoder](input_ids=padded, attention_mask=torch.ones_like(mask)).last_hidden_state[:, :8]
        assert torch.allclose(alone, masked, atol=1e-5)
        assert not torch.allclose(alone, seen, atol=1e-4)  # so the mask is what does it


@encoders
@pytest.mark.parametrize("pooling", h.CHOICES["pooling"])
@torch.no_grad()
def test_features_equal_a_loop_over_rows_whatever_the_batch_and_order(tokenizers, text_models, encoder, pooling):
    rows = h.tokenise(tokenizers[encoder], TEXTS[:23], 32)
    model = text_models[encoder]
    expected = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        tokens = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        expected.append(tokens[0] if pooling == "first" else sum(tokens) / len(tokens))
    expected = torch.stack(expected)
    text_encoder = h.TextEncoder(model, pooling).train()  # text_features must switch the dropout off
    for batch in (1, 4, 50):
        found = h.text_features(text_encoder, tokenizers[encoder], rows, batch, torch.float32, "test")
        assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-5)
        text_encoder.train()
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = h.text_features(text_encoder, tokenizers[encoder], [rows[i] for i in order], 4, torch.float32,
                               "test")
    assert torch.allclose(shuffled, expected[torch.tensor(order)], atol=1e-5)


@encoders
def test_small_model_follows_the_settings(text_models, encoder):
    config = text_models[encoder].config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 2, 200)
    longest = torch.full((1, 32), 20)
    assert text_models[encoder](input_ids=longest, attention_mask=torch.ones_like(longest)
                                ).last_hidden_state.shape == (1, 32, 16)
