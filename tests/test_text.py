"""Text: cleaning against examples worked by hand, tokenizers, and encoders against one row at a
time.
"""
import json
import time

import nltk
import numpy as np
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, CamembertTokenizer

import helpers as h
from conftest import tiny_products
from engine import texts as cleaning
from engine.settings import choices, make_profile

RAW = [*tiny_products()["title"], *tiny_products()["description"]]
TEXTS = [h.clean_text(text) for text in RAW]
# What a tokenizer may take for a mark of its own, or for a space.
ODD_TEXTS = ["<mask>", "a <mask> b", "a<mask>b </s> c", "  deux   espaces ", "saut\nde\tligne",
             "\u00a0insécable\u2003fin", "e\u0301te\u0301 \u0302x", "漢字 🧸", "▁a ▁ b",
             "\x1cx\x1f"]


# --- cleaning -------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, plain", [
    ("", ""),
    (" \t\n ", ""),
    ("Chaise", "Chaise"),
    ("<p>Table <b>en <i>bois</i></b></p>", "Table en bois"),
    ("bois<br>métal<br/>verre", "bois métal verre"),            # a tag is a space
    ("<ul><li>un<li>deux</ul>", "un deux"),                     # not closed
    ("L&#39;&eacute;t&eacute; &amp; l&rsquo;hiver", "L'été & l’hiver"),
    ("avant&lt;br&gt;apr&egrave;s", "avant après"),             # an escaped tag is a tag
    ("20&nbsp;cm\u00a0x  30\n cm", "20 cm x 30 cm"),
    ("a < b et c > d", "a < b et c > d"),
    ("5<6", "5<6"),
    ("<", "<"),
    ("3 &lt; 4", "3 < 4"),
    ("<!-- caché -->vu", "vu"),
    ('<a href="x.html" title="y">lien</a>', "lien"),
    ("&inconnu; reste", "&inconnu; reste"),
    ("emoji 🧸 œuf", "emoji 🧸 œuf"),
    ("<head><title>Un</title></head><body>Deux</body>", "Un Deux"),
    ("<html><head>un</head><body>deux</body></html>", "un deux"),
    ("<table><b>un</b><tr><td>deux</td></tr></table>", "un deux"),  # in the order it is written
    ('<p class="x>un</p>', "un"),                                # a quote that is not closed
    ('<p style="font-family: "Arial";">un</p>', "un"),
    ('<a title="a > b">un</a>', "un"),
    ("<a\nhref='x'>un</a><td width=10 nowrap>deux<input disabled>", "un deux"),
    ("<x-font size=\"2\">un <mot v = 'a' w=b>deux", "un deux"),
    ("<o:p></o:p><?xml:namespace prefix = o /><!DOCTYPE html>un", "un"),  # of a word processor
    ("L&amp;apos;arbre caf&amp;eacute;", "L'arbre café"),       # written twice
    ("&amp;amp;lt;b&amp;amp;gt;gras &amp;amp;amp;", "gras &"),
    ("d\x92argent, 5 \x80, suite\x85", "d’argent, 5 €, suite…"),  # as Windows meant it
    ("a\x81b", "a b"),                                          # not even Windows knew it
])
def test_strip_html_as_worked_by_hand(text, plain):
    assert h.strip_html(text) == plain
    assert h.clean_text(text, "light") == plain


@pytest.mark.parametrize("text", [
    "<<Les Vagues>>", "<NEUF>", "poids<lourd 3 kg", "<ref 2203 blanche", "<table basse> bois",
    "<3 de nos clients", "prix <12:30>", "a --> b", "un <a href=", "un <b ", "un </p",
    "Lot <vis L=40 mm> acier", "<diam D=32 longueur 50 m> noir", "<ref taille=42> blanche",
    "R&D <-> SAV", '<a href="x" Table en bois', "<img src=x.jpg Chaise et <b"])
def test_what_is_no_whole_tag_stays(text):
    assert h.strip_html(text) == text.strip()


@pytest.mark.parametrize("text", ["un <!-- deux", "un <script>deux", "un <style type='a'>deux",
                                  "<!-- caché -->un <!-- deux", "<b>un</b> <script>deux</style"])
def test_what_is_hidden_without_an_end_is_shown(text):
    shown = h.strip_html(text).split()
    assert shown[:2] == ["un", "deux"] or shown == ["un", "deux</style"]


WORDS = ["bois", "l'été", "é", "10", "5<6", "<NEUF>", "poids<lourd", "<vis", "L=40", "mm>"]
MARKS = ["<br>", "<br />", "</p>", "<b>", "<o:p>", "<a ", "<p", "</", "<", ">", "&", '"', "&lt;",
         "<x", "&amp;euro;", "-->", "\x92"]


@given(st.lists(st.sampled_from(WORDS + MARKS), max_size=20).map(" ".join))
def test_no_word_is_lost_or_glued(text):
    found = h.strip_html(text)
    for word in WORDS:
        assert found.split().count(word) == text.split().count(word)


@given(st.recursive(
    st.sampled_from(["un", "deux trois", "l'été", "5 cm"]),
    lambda inside: st.tuples(st.sampled_from(["p", "b", "div", "ul", "span", "h2"]),
                             st.sampled_from(["", " class='a'", ' id="b" title="c > d"']),
                             st.lists(inside, max_size=4)).map(
        lambda part: f"<{part[0]}{part[1]}>{'<br/>'.join(part[2])}</{part[0]}>"), max_leaves=12))
def test_whole_html_reads_as_a_parser_reads_it(text):
    parsed = BeautifulSoup(text, "html.parser").get_text(" ")
    assert h.strip_html(text) == " ".join(parsed.split())


@pytest.mark.parametrize("piece", [
    "<div>", "<", '<a href="', "<a b='c' ", "<!--", "<script>", "amp;", "&#38;", "#38;", "b=", '"'])
def test_a_long_text_of_anything_takes_a_second(piece):
    """Quadratic, it would take minutes."""
    text = "&<a " + piece * (300_000 // len(piece))
    start = time.process_time()
    h.strip_html(text)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("text, said", [
    ("", False), ("<br />", False), (" <p>&nbsp;</p> ", False), ("...", False),
    ("<!-- un -->", False), ("<p>un</p>", True), ("5", True), ("<NEUF>", True)])
def test_a_text_has_words_or_not(text, said):
    assert h.has_words(text) == said


@pytest.mark.parametrize("text", [
    "<script>var a = 1;</script>vu", "<style>p { color: red }</style>vu"])
def test_code_of_a_page_is_no_text(text):
    assert h.strip_html(text) == "vu"


@pytest.mark.parametrize("text, clean", [
    ("", ""),
    ("TABLE Basse", "table basse"),
    ("Prix: 12,5 cm.", "prix : 12,5 cm ."),
    ("<b>Été</b>, fin", "été , fin"),
    ("(poche)", "( poche )"),
    ("L&#39;été", "l'été"),
])
def test_clean_text_as_worked_by_hand(text, clean):
    assert h.clean_text(text) == clean


def test_light_keeps_case_and_punctuation_and_paper_does_not():
    assert h.clean_text("<b>Été,</b> FIN.", "light") == "Été, FIN."
    assert h.clean_text("<b>Été,</b> FIN.", "paper") == "été , fin ."


def test_cleaning_a_clean_text_changes_nothing():
    """Not true of every text: NLTK writes an opening " as ``."""
    for text in RAW:
        for how in choices("clean"):
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
    products = tiny_products().set_index("product_id").sort_index()
    for how in choices("clean"):
        run = make_run(clean=how, rows="all")
        h.stage(run, "splits")
        h.stage(run, "text")
        text = h.read_text(run)
        assert text["product_id"].tolist() == products.index.tolist()
        for field in h.FIELDS:
            expected = [h.clean_text(raw, how) for raw in products[field]]
            assert text[field].tolist() == expected


# --- many texts, in processes ---------------------------------------------------------------------
@pytest.mark.slow
def test_many_texts_are_cleaned_in_processes_to_the_same_result(monkeypatch):
    texts = [*TEXTS, "", "<br>"]
    expected = [h.clean_text(text) for text in texts]
    assert h.clean_texts(texts, "paper", "test") == expected
    started, parallel = [], cleaning.joblib.Parallel

    def counted(*arguments, **more):
        started.append(1)
        return parallel(*arguments, **more)

    monkeypatch.setattr(cleaning, "MANY_TEXTS", 10)
    monkeypatch.setattr(cleaning.joblib, "Parallel", counted)
    assert h.clean_texts(texts, "paper", "test") == expected and started == [1]
    light = [h.clean_text(text, "light") for text in texts]
    assert h.clean_texts(texts, "light", "test") == light


# --- baseline -------------------------------------------------------------------------------------
def test_tfidf_finds_the_words_of_a_class_and_gives_probabilities_of_all_27():
    train = ["rouge pomme"] * 5 + ["bleu ciel"] * 5
    asked = ["pomme", "ciel bleu", "inconnu"]
    probabilities = h.tfidf_baseline(train, [3] * 5 + [20] * 5, asked)
    assert probabilities.shape == (3, 27) and np.allclose(probabilities.sum(1), 1, atol=1e-6)
    assert probabilities[:2].argmax(1).tolist() == [3, 20]
    assert (np.delete(probabilities, [3, 20], axis=1) == 0).all()


def test_baseline_stage_fits_on_the_training_part_alone(run):
    h.stage(run, "splits")
    folder = h.stage(run, "baselines")
    text = h.read_text(run)
    rest, train = text[text["part"] != "train"], text[text["part"] == "train"]
    kept = h.load_tensors(folder / "probabilities.safetensors", rest["product_id"])
    assert set(kept) == {"majority class", "TF-IDF title", "TF-IDF description", "TF-IDF both"}
    counts = train["label_id"].value_counts(normalize=True)
    shares = [counts.get(label, 0) for label in range(27)]
    assert np.allclose(kept["majority class"], [shares] * len(rest), atol=1e-6)
    expected = h.tfidf_baseline(train["title"].tolist(), train["label_id"].tolist(),
                                rest["title"].tolist())
    assert np.allclose(kept["TF-IDF title"], expected, atol=1e-6)


# --- tokenizers -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {encoder: h.train_tokenizer(encoder, TEXTS, 200, tmp_path_factory.mktemp(encoder))
            for encoder in h.TEXT_ENCODERS}


encoders = pytest.mark.parametrize("encoder", h.TEXT_ENCODERS)


@encoders
def test_saved_tokenizer_gives_the_same_ids(tokenizers, encoder, tmp_path):
    tokenizers[encoder].save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert h.tokenise(again, TEXTS, 32) == h.tokenise(tokenizers[encoder], TEXTS, 32)


@encoders
def test_vocabulary_has_the_size_asked_for_and_covers_the_special_tokens(tokenizers, encoder):
    tokenizer = tokenizers[encoder]
    assert len(tokenizer) == tokenizer.vocab_size == 200
    assert sorted(tokenizer.get_vocab().values()) == list(range(200))
    for token in tokenizer.all_special_tokens:
        assert token in tokenizer.get_vocab() and tokenizer.convert_tokens_to_ids(token) < 200
    end = tokenizer.eos_token_id or tokenizer.sep_token_id
    ids = {tokenizer.bos_token_id, end, tokenizer.pad_token_id, tokenizer.unk_token_id}
    assert len(ids) == 4


@encoders
def test_every_text_is_framed_and_no_known_letter_is_lost(tokenizers, encoder):
    tokenizer = tokenizers[encoder]
    for row in h.tokenise(tokenizer, TEXTS, 512):
        assert row["input_ids"][0] == tokenizer.bos_token_id
        assert row["input_ids"][-1] == tokenizer.sep_token_id
        assert tokenizer.unk_token_id not in row["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("漢")["input_ids"]


def test_camemberts_small_tokenizer_gives_the_ids_that_the_librarys_own_class_gives(tokenizers):
    ours = tokenizers["camembert"]
    pieces = json.loads(ours.backend_tokenizer.to_str())["model"]["vocab"]
    library = CamembertTokenizer(vocab=[tuple(piece) for piece in pieces])
    texts = [*TEXTS, *ODD_TEXTS, ""]
    assert h.tokenise(ours, texts, 64) == h.tokenise(library, texts, 64)
    assert ours.decode(ours(TEXTS[0])["input_ids"]) == library.decode(
        library(TEXTS[0])["input_ids"])


@encoders
def test_other_training_texts_give_another_vocabulary(tokenizers, encoder, tmp_path):
    texts = [text.replace("piscine", "pistolet") for text in TEXTS]
    other = h.train_tokenizer(encoder, texts, 200, tmp_path)
    assert set(other.get_vocab()) != set(tokenizers[encoder].get_vocab())


@encoders
def test_same_training_texts_give_the_same_tokenizer(tokenizers, encoder, tmp_path):
    """A stage that is stopped and goes on trains it again; the checkpoint's embeddings need the
    same ids.
    """
    again = h.train_tokenizer(encoder, TEXTS, 200, tmp_path)
    assert again.get_vocab() == tokenizers[encoder].get_vocab()
    assert h.tokenise(again, TEXTS, 32) == h.tokenise(tokenizers[encoder], TEXTS, 32)


@encoders
def test_tokenise_equals_one_call_a_row_and_cuts_at_the_length(tokenizers, encoder):
    tokenizer, texts = tokenizers[encoder], [*TEXTS, *ODD_TEXTS]
    rows = h.tokenise(tokenizer, texts, 9)
    assert max(len(row["input_ids"]) for row in rows) == 9
    for row, text in zip(rows, texts, strict=True):
        alone = tokenizer(text)["input_ids"]
        kept = alone if len(alone) <= 9 else [*alone[:8], alone[-1]]  # the closing token stays
        assert row == {"input_ids": kept}
    frame = [tokenizer.bos_token_id, tokenizer.sep_token_id]
    assert h.tokenise(tokenizer, [""], 9) == [{"input_ids": frame}]


@pytest.mark.slow
def test_missing_descriptions_stay_empty_texts_to_the_end(make_run):
    run = make_run(rows="all")
    h.stage(run, "splits")
    h.stage(run, "text")
    text = h.read_text(run)
    missing = text["description"] == ""
    assert missing.sum() == 5 and (text.loc[missing, "title"] != "").all()
    folder = h.stage(run, "camembert_description")
    features = h.load_tensors(folder / "features.safetensors", text["product_id"])["features"]
    vectors = features[torch.tensor(missing.to_numpy())]
    model, tokenizer = h.load_checkpoint(str(folder / "encoder"), 32)
    frame = torch.tensor([[tokenizer.bos_token_id, tokenizer.eos_token_id]])  # <s></s>
    with torch.no_grad():
        states = model.eval()(input_ids=frame, attention_mask=torch.ones_like(frame))
    own = states.last_hidden_state[0, 0]
    assert torch.allclose(vectors, own.expand_as(vectors), atol=1e-5) and own.abs().max() > 0.01


# --- encoders -------------------------------------------------------------------------------------
class Counter(torch.nn.Module):
    """A "model" whose vector of token t is (t, t squared): pooling can be worked by hand."""

    def forward(self, input_ids, attention_mask):
        tokens = input_ids.float()
        states = torch.stack([tokens, tokens ** 2], -1)
        return type("Output", (), {"last_hidden_state": states})


def test_pooling_as_worked_by_hand():
    ids, mask = torch.tensor([[4, 2, 9], [1, 3, 5]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert h.TextEncoder(Counter(), "first")(ids, mask).tolist() == [[4, 16], [1, 1]]
    means = h.TextEncoder(Counter(), "mean")(ids, mask)
    assert torch.allclose(means, torch.tensor([[3.0, 10.0], [3.0, 35 / 3]]))
    assert h.TextEncoder(Counter(), "last")(ids, mask).tolist() == [[2, 4], [5, 25]]


@pytest.fixture(scope="module")
def text_models(tokenizers):
    torch.manual_seed(3)
    return {encoder: h.small_text_model(encoder, tokenizer, 16, 2, 32).eval()
            for encoder, tokenizer in tokenizers.items()}


def states_of(model, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The vectors of all tokens; without a mask each token is seen."""
    mask = torch.ones_like(ids) if mask is None else mask
    return model(input_ids=ids, attention_mask=mask).last_hidden_state


@encoders
@torch.no_grad()
def test_output_does_not_depend_on_padding(tokenizers, text_models, encoder):
    tokenizer, model = tokenizers[encoder], text_models[encoder]
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"][:8]])
    alone = states_of(model, ids)
    for filler in (tokenizer.pad_token_id, 50):
        padded = torch.cat([ids, torch.full((1, 5), filler)], 1)
        masked = states_of(model, padded, torch.tensor([[1] * 8 + [0] * 5]))[:, :8]
        seen = states_of(model, padded)[:, :8]
        assert torch.allclose(alone, masked, atol=1e-5)
        assert not torch.allclose(alone, seen, atol=1e-4)  # so the mask is what does it


@encoders
@pytest.mark.parametrize("pooling", choices("pooling"))
@torch.no_grad()
def test_features_equal_a_loop_over_rows_whatever_the_batch_and_order(
        tokenizers, text_models, encoder, pooling):
    tokenizer, model = tokenizers[encoder], text_models[encoder]
    rows = h.tokenise(tokenizer, TEXTS[:23], 32)
    expected = []
    for row in rows:
        tokens = states_of(model, torch.tensor([row["input_ids"]]))[0]
        by_hand = {"first": tokens[0], "mean": sum(tokens) / len(tokens), "last": tokens[-1]}
        expected.append(by_hand[pooling])
    expected = torch.stack(expected)
    text_encoder = h.TextEncoder(model, pooling)

    def vectors(rows: list[dict], text_batch: int) -> torch.Tensor:
        profile = make_profile("sample", {"text_batch": text_batch})
        text_encoder.train()  # text_vectors must switch the dropout off
        return h.text_vectors(text_encoder, tokenizer, rows, profile, "test")

    for text_batch in (1, 2, 50):  # 4, 8 and all rows at once
        found = vectors(rows, text_batch)
        assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = vectors([rows[i] for i in order], 1)
    assert torch.allclose(shuffled, expected[torch.tensor(order)], atol=1e-5)


@encoders
def test_small_model_follows_the_settings(text_models, encoder):
    config = text_models[encoder].config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 2, 200)
    longest = torch.full((1, 32), 20)
    assert states_of(text_models[encoder], longest).shape == (1, 32, 16)


def test_tfidf_reads_pairs_of_words():
    train, labels = ["table rouge"] * 5 + ["rouge table"] * 5, [3] * 5 + [7] * 5
    found = h.tfidf_baseline(train, labels, ["table rouge", "rouge table"])
    assert found.argmax(1).tolist() == [3, 7] and found.max(1).min() > 0.6


def test_encoders_read_their_field_or_both_as_one_text():
    text = pd.DataFrame({"title": ["a b", "c"], "description": ["d", ""]})
    assert h.encoder_texts(text, "description", "apart").tolist() == ["d", ""]
    for field in h.FIELDS:
        assert h.encoder_texts(text, field, "joined").tolist() == ["a b d", "c"]
    with pytest.raises(ValueError, match="unknown texts 'both'; choose from: apart, joined"):
        h.encoder_texts(text, "title", "both")
