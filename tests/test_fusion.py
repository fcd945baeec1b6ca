"""Fusion: Z, the reduction of P, the heads and equation (1) against numbers worked by hand or in
numpy.
"""
import inspect
import itertools
import linecache
import re

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from torch.nn.functional import adaptive_max_pool1d, conv1d, cross_entropy

import helpers as h
from engine import fusions
from engine.keys import info_of, key_of
from engine.settings import OTHER_FUSIONS, TABLE_FUSIONS
from helpers import Join

D, P_WIDTH, CLASSES = 8, 20, 5
WIDTHS = {"T_c": D, "D_c": D, "T_f": D, "D_f": D, "P": P_WIDTH}
PAPER = ("add", "concat", "average")
PAIRS = list(itertools.product(PAPER, PAPER))
pairs = pytest.mark.parametrize("text, final", PAIRS)


def rows_of(n: int, seed: int = 0, widths: dict = WIDTHS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, width, generator=generator) for name, width in widths.items()}


def model_of(text: str, final: str, seed: int = 0, **more) -> h.HierarchicalFusion:
    torch.manual_seed(seed)
    variant = h.Variant(text, final, more.pop("head", "basic"))
    return h.HierarchicalFusion(WIDTHS, variant, CLASSES, **more).eval()


# --- Z --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how, expected", [
    ("add", [[6, -1], [3, 9]]),
    ("average", [[3, -0.5], [1.5, 4.5]]),
    ("concat", [[1, 2, 5, -3], [0, 4, 3, 5]]),
])
def test_fuse_as_worked_by_hand(how, expected):
    a, b = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[5.0, -3.0], [3.0, 5.0]])
    assert h.FUSIONS[how].make(2, 2)(a, b).tolist() == expected


@pytest.mark.parametrize("how, expected", [
    ("add", [6, 3, 6]), ("concat", [1, 2, 3, 4, 0, 2, 1, 1, 1]), ("average", [2, 1, 2]),
    ("maximum", [4, 2, 3]), ("product", [4, 0, 6])])
def test_three_vectors_are_fused_as_worked_by_hand(how, expected):
    x = torch.tensor([[1.0, 2, 3]]), torch.tensor([[4.0, 0, 2]]), torch.tensor([[1.0, 1, 1]])
    assert h.FUSIONS[how].make(3, 3)(*x)[0].tolist() == expected
    assert h.FUSIONS[how].width(3, 3) == len(expected)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_a_gate_of_two_is_that_of_arevalo():
    """h = z tanh(W_a a) + (1 - z) tanh(W_b b), z = sigmoid(W_z [a, b])."""
    gated = h.FUSIONS["gated"].make(3, 2)
    w = {name: value.detach().numpy().astype(float) for name, value in gated.named_parameters()}
    a, b = np.random.default_rng(0).normal(size=(2, 5, 3))
    read = [np.tanh(x @ w[f"read.{i}.weight"].T + w[f"read.{i}.bias"])
            for i, x in enumerate((a, b))]
    gates = np.concatenate([a, b], 1) @ w["gates.weight"].T + w["gates.bias"]
    z = sigmoid(gates[:, :3] - gates[:, 3:])
    found = gated(torch.tensor(a).float(), torch.tensor(b).float()).detach().numpy()
    assert np.allclose(found, z * read[0] + (1 - z) * read[1], atol=1e-5)


def test_low_rank_is_a_bilinear_form_of_each_coordinate():
    """The same as [a, 1]' B_k [b, 1], with B_k the sum of four outer products."""
    z = h.FUSIONS["lowrank"].make(3, 2)
    w = [np.concatenate([f.weight.detach().numpy(), f.bias.detach().numpy()[:, None]], 1)
         .reshape(4, 3, 4) for f in z.factors]  # rank, coordinate, [x, 1]
    a, b = np.random.default_rng(1).normal(size=(2, 5, 3))
    ones = np.ones((5, 1))
    bilinear = np.einsum("rki,rkj->kij", *w)
    expected = np.einsum("ni,kij,nj->nk", np.hstack([a, ones]), bilinear, np.hstack([b, ones]))
    found = z(torch.tensor(a).float(), torch.tensor(b).float()).detach().numpy()
    assert np.allclose(found, expected, atol=1e-5)


def test_attention_weighs_each_representation_by_what_it_holds():
    z = h.FUSIONS["attention"].make(3, 2)
    w = [value.detach().numpy() for value in z.parameters()]  # W, its bias, v, its bias
    x = np.random.default_rng(2).normal(size=(2, 5, 3))
    scores = np.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3]
    shares = np.exp(scores) / np.exp(scores).sum(0)
    found = z(*torch.tensor(x).float()).detach().numpy()
    assert np.allclose(found, (shares * x).sum(0), atol=1e-5)
    z.weigh[2].weight.data.zero_()  # no preference: their mean
    assert np.allclose(z(*torch.tensor(x).float()).detach(), x.mean(0), atol=1e-5)


@pytest.mark.parametrize("how", h.FUSIONS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_each_fusion_joins_any_number_and_says_how_wide_it_is(how, n):
    fusion, x = h.FUSIONS[how], [torch.randn(4, 6) for _ in range(n)]
    state = torch.random.get_rng_state()
    assert fusion.make(6, n)(*x).shape == (4, fusion.width(6, n))
    torch.random.set_rng_state(state)
    fusion.width(6, n)
    assert torch.equal(torch.random.get_rng_state(), state)  # draws no initial weights
    assert fusion.equation and fusion.source


def test_unknown_fusion_is_named_with_the_known_ones(run):
    known = "'multiply'.*add, concat, average, maximum, product, gated, lowrank, attention"
    with pytest.raises(ValueError, match=known):
        h.fusion_of(run, "multiply")
    with pytest.raises(ValueError, match=known):
        h.HierarchicalFusion(WIDTHS, h.Variant("multiply", "add"))


# --- reduction of P, heads ------------------------------------------------------------------------
def test_image_reduction_as_worked_by_hand():
    reduction = h.ImageReduction(4, channels=2)
    itself, left_minus_right = [[0.0, 1.0, 0.0]], [[1.0, 0.0, -1.0]]
    with torch.no_grad():
        reduction.conv.weight[:] = torch.tensor([itself, left_minus_right])
        reduction.conv.bias[:] = torch.tensor([0.0, 10.0])
    found = reduction(torch.tensor([[1.0, 5.0, 2.0, -4.0]]))
    # channel 1: max(1, 5), max(2, -4). channel 2: 10 + (0-5, 1-2, 5+4, 2-0) = 5, 9, 19, 12
    assert found.tolist() == [[5, 2, 9, 19]]


@pytest.mark.parametrize("width", [64, 768, 3072])
def test_image_reduction_gives_the_text_vectors_width(width):
    reduction = h.ImageReduction(width)
    assert reduction(torch.randn(3, 2048)).shape == (3, width)
    assert sum(p.numel() for p in reduction.parameters()) == 4 * 3 + 4


@pytest.mark.parametrize("width", [60, 768])
def test_image_reduction_is_a_convolution_and_a_max_pool(width):
    reduction, image = h.ImageReduction(width), torch.randn(5, 512)
    weights = list(reduction.parameters())
    channels = conv1d(image[:, None], reduction.conv.weight, reduction.conv.bias, padding=1)
    expected = adaptive_max_pool1d(channels, width // 4).flatten(1)
    assert torch.allclose(reduction(image), expected, atol=1e-6)
    ours, theirs = (torch.autograd.grad(reduced.square().sum(), weights)
                    for reduced in (reduction(image), expected))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, theirs))


def test_image_reduction_says_what_the_paper_says():
    """A Conv1d and a max-pool, in one line that a reader of section III.C knows again."""
    reduction = h.ImageReduction(8)
    assert isinstance(reduction.conv, torch.nn.Conv1d)
    assert isinstance(reduction.pool, torch.nn.AdaptiveMaxPool1d)
    body = inspect.getsource(h.ImageReduction.forward).strip().splitlines()[1:]
    assert body == ["        return self.pool(self.conv(image[:, None])).flatten(1)"]


def test_width_that_the_channels_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="30 is not a multiple of 4"):
        h.ImageReduction(30)


@pytest.mark.parametrize("head, expected", [
    ("basic", "Linear 40 512, ReLU, Linear 512 256, ReLU, Linear 256 27"),
    ("dropout", "Dropout 0.3, Linear 40 512, ReLU, Linear 512 256, ReLU, Linear 256 27"),
    ("layers", "Linear 40 512, ReLU, Linear 512 256, ReLU, Dropout 0.3, Linear 256 256, ReLU, "
               "Linear 256 27"),
])
def test_layers_of_the_heads(head, expected):
    def say(layer: torch.nn.Module) -> str:
        name = type(layer).__name__
        if name == "Linear":
            return f"{name} {layer.in_features} {layer.out_features}"
        return f"{name} {layer.p}" if name == "Dropout" else name

    assert ", ".join(say(layer) for layer in h.make_head(40, 27, head, 0.3)) == expected


def test_unknown_head_is_named():
    with pytest.raises(ValueError, match="'deep'.*basic, dropout, layers"):
        h.make_head(40, 27, "deep", 0.3)


# --- equation (1) ---------------------------------------------------------------------------------
def numpy_reduction(image: np.ndarray, kernel: np.ndarray, bias: np.ndarray,
                    width: int) -> np.ndarray:
    """P [N, p] as [N, width]: a convolution and a max-pool, without torch."""
    size, pieces = image.shape[1], width // len(kernel)
    padded = np.pad(image, ((0, 0), (1, 1)))
    # Adaptive pooling: piece i begins at floor(i * size / pieces) and ends at the next one's ceil.
    bounds = [(i * size // pieces, -(-(i + 1) * size // pieces)) for i in range(pieces)]
    reduced = []
    for weights, shift in zip(kernel, bias):
        line = np.stack([padded[:, i:i + 3] @ weights for i in range(size)], 1) + shift
        reduced += [line[:, a:b].max(1) for a, b in bounds]
    return np.stack(reduced, 1)


def numpy_forward(model, x, text: str, final: str) -> np.ndarray:
    """Logits of equation (1) from the model's weights, without torch."""
    z = {"add": lambda a, b: a + b,
         "average": lambda a, b: (a + b) / 2,
         "concat": lambda a, b: np.concatenate([a, b], 1)}
    w = {name: value.numpy().astype(np.float64) for name, value in model.state_dict().items()}
    x = {name: (rows.numpy() - w[f"mean_{name}"]) / w[f"std_{name}"] for name, rows in x.items()}
    y = z[text](z[text](x["T_f"], x["D_f"]), z[text](x["T_c"], x["D_c"]))
    kernel, bias = w["reduce_image.conv.weight"][:, 0], w["reduce_image.conv.bias"]
    y = z[final](numpy_reduction(x["P"], kernel, bias, y.shape[1]), y)
    layers = sorted({int(name.split(".")[1]) for name in w if name.startswith("classify")})
    for i in layers:
        y = y @ w[f"classify.{i}.weight"].T + w[f"classify.{i}.bias"]
        y = y if i == layers[-1] else np.maximum(y, 0)
    return y


@pairs
def test_logits_equal_equation_1_in_numpy(text, final):
    model, x = model_of(text, final), rows_of(6)
    model.fit_scale(rows_of(50, seed=3))
    logits = h.predict_fusion(model, x)
    assert logits.shape == (6, CLASSES)
    assert np.allclose(logits, numpy_forward(model, x, text, final), rtol=1e-4, atol=1e-5)


@pairs
def test_widths_are_d_or_4d_and_twice_that_after_a_final_concat(text, final):
    model = model_of(text, final)
    text_width = 4 * D if text == "concat" else D
    assert model.reduce_image(torch.randn(2, P_WIDTH)).shape == (2, text_width)
    assert model.classify[0].in_features == (2 if final == "concat" else 1) * text_width


@pytest.mark.parametrize("text, same", [("add", True), ("average", True), ("concat", False)])
def test_title_and_description_may_be_exchanged_under_addition_only(text, same):
    model, x = model_of(text, "add"), rows_of(6)
    swapped = {**x, "T_f": x["D_f"], "D_f": x["T_f"]}
    logits = [h.predict_fusion(model, rows) for rows in (x, swapped)]
    assert torch.allclose(*logits, atol=1e-5) is same


@pairs
def test_every_representation_counts(text, final):
    model, x = model_of(text, final), rows_of(6)
    for name in x:
        changed = h.predict_fusion(model, {**x, name: x[name] + 1})
        assert not torch.allclose(h.predict_fusion(model, x), changed, atol=1e-4), name


# --- structures -----------------------------------------------------------------------------------
def join_of(structure: str, outer: str = "concat", inner: str = "add") -> torch.Tensor:
    """What a structure gives of T_c = 1, D_c = 10, T_f = 100, D_f = 1000 and P = 10000."""
    join = Join(h.Variant(inner, outer, structure=structure).tree, 1, inner, outer)
    x = {symbol: torch.tensor([[10.0 ** i]]) for i, symbol in enumerate(WIDTHS)}
    return join(x)[0].tolist()


@pytest.mark.parametrize("structure, expected", [
    ("encoders", [10_000, 1_111]),
    ("fields", [10_000, 1_111]),
    ("image", [21_100, 20_011]),
    ("flat", [10_000, 100, 1_000, 1, 10]),
    ("text", [1_100, 11]),
    ("T_c+P", [1, 10_000]), ("P", [10_000])])
def test_structures_join_what_they_say(structure, expected):
    assert join_of(structure) == expected


def test_what_is_joined_first_differs_between_encoders_and_fields():
    x = {symbol: torch.tensor([[10.0 ** i]]) for i, symbol in enumerate(WIDTHS)}
    x["P"] = torch.zeros(1, 4)
    inner = {structure: Join(h.STRUCTURES[structure], 1, "concat", "add")(x)[0].tolist()
             for structure in ("encoders", "fields")}
    assert inner == {"encoders": [100, 1_000, 1, 10], "fields": [100, 1, 1_000, 10]}


@pytest.mark.parametrize("name", [*TABLE_FUSIONS, *OTHER_FUSIONS])
def test_every_scored_variant_reads_what_its_name_says_and_no_more(name):
    variant = h.named_variant(name)
    assert variant.name == name
    model = h.HierarchicalFusion(WIDTHS, variant, CLASSES).eval()
    x = rows_of(6)
    before = h.predict_fusion(model, x)
    for symbol in WIDTHS:
        after = h.predict_fusion(model, {**x, symbol: x[symbol] + 1})
        assert torch.allclose(before, after) is (symbol not in variant.symbols), symbol
    whole = {"text": list(WIDTHS)[:4], "P": ["P"], "T_c+D_c": ["T_c", "D_c"],
             "T_c+T_f+P": ["T_c", "T_f", "P"]}
    assert variant.symbols == whole.get(variant.structure, list(WIDTHS))


@pytest.mark.parametrize("name", ["concat", "concat-add-deep", "concat-add-raw-dropout",
                                  "concat-add-T_c+X", "concat-add-basic", "concat-add-encoders"])
def test_a_name_of_no_variant_is_refused(name):
    with pytest.raises(ValueError, match=f"unknown variant '{re.escape(name)}'; a variant is"):
        h.named_variant(name)


# --- modalities -----------------------------------------------------------------------------------
def test_hidden_modalities_are_hidden_together_and_never_all():
    x = {name: torch.ones(4000, 2) for name in WIDTHS}
    hidden = h.hide_modalities(x, {name: torch.zeros(2) for name in WIDTHS}, 0.3)
    gone = {name: (rows == 0).all(1) for name, rows in hidden.items()}
    assert torch.equal(gone["T_c"], gone["T_f"]) and torch.equal(gone["D_c"], gone["D_f"])
    assert not (gone["T_c"] & gone["D_c"] & gone["P"]).any()
    share = 0.3 - 0.3 ** 3  # without the rows of which nothing would be left
    for name in ("T_c", "D_c", "P"):
        assert gone[name].float().mean().item() == pytest.approx(share, abs=0.03)
    assert (x["T_c"] == 1).all()  # the caller's stay as they are


def test_modalities_are_hidden_while_training_alone():
    model = h.HierarchicalFusion(WIDTHS, h.Variant("add", "add", hide=True), CLASSES, hide=0.5)
    x = rows_of(20)
    model.train()
    assert not torch.equal(model(**x), model(**x))
    assert torch.equal(h.predict_fusion(model, x), h.predict_fusion(model, x))


def test_variants_of_the_tables_have_names_of_their_own():
    choices = itertools.product(PAIRS, h.HEADS, (True, False))
    names = {h.Variant(*pair, head, standardise).name for pair, head, standardise in choices}
    assert len(names) == 9 * 4 * 2
    assert h.Variant("concat", "add").name == "concat-add"
    assert h.Variant("average", "average", "dropout", False).name == "average-average-dropout-raw"


# --- standardisation, projection ------------------------------------------------------------------
def test_fit_scale_gives_mean_0_and_deviation_1_on_the_training_rows():
    model, x = model_of("concat", "concat"), rows_of(40)
    x["P"] = 100 + 30 * x["P"]
    x["T_c"][:, 2] = 7.0  # a constant column is only centred
    model.fit_scale(x)
    for name, rows in x.items():
        scaled = model.prepare(name, rows).numpy()
        deviations = np.ones(rows.shape[1])
        deviations[2] = 0 if name == "T_c" else 1
        assert np.allclose(scaled.mean(0), 0, atol=1e-5)
        assert np.allclose(scaled.std(0, ddof=1), deviations, atol=1e-5)
    assert model.prepare("T_c", torch.full((1, D), 9.0))[0, 2].item() == pytest.approx(2.0)


def test_scale_is_kept_with_the_model():
    model, other = model_of("add", "add"), model_of("add", "add", seed=1)
    model.fit_scale({name: 5 + rows for name, rows in rows_of(40).items()})
    other.load_state_dict(model.state_dict())
    x = rows_of(3)
    assert torch.equal(h.predict_fusion(model, x), h.predict_fusion(other, x))


def test_without_fit_scale_nothing_is_scaled():
    x = rows_of(3)
    assert torch.equal(model_of("add", "add").prepare("P", x["P"]), x["P"])


UNLIKE = {"T_c": 8, "D_c": 8, "T_f": 12, "D_f": 12, "P": 20}


def test_texts_of_different_width_need_project():
    with pytest.raises(ValueError, match=r"differ in width.*12.*project=True"):
        h.HierarchicalFusion(UNLIKE, h.Variant("concat", "add"))
    with pytest.raises(ValueError, match="project"):
        h.HierarchicalFusion({**WIDTHS, "D_f": 4}, h.Variant("add", "add"))


@pytest.mark.parametrize("text, width", [("add", 12), ("concat", 48)])
def test_projected_texts_meet_in_the_widest_width(text, width):
    model = h.HierarchicalFusion(UNLIKE, h.Variant(text, "add"), CLASSES, project=True).eval()
    x = rows_of(3, widths=UNLIKE)
    layer = model.projections["T_c"]
    projected = x["T_c"] @ layer.weight.T + layer.bias
    assert model.prepare("T_c", x["T_c"]).shape == (3, 12)
    assert torch.allclose(model.prepare("T_c", x["T_c"]), projected, atol=1e-6)
    assert model.classify[0].in_features == width
    assert h.predict_fusion(model, x).shape == (3, CLASSES)
    assert len(model_of("add", "add").projections) == 0


# --- training -------------------------------------------------------------------------------------
def labelled(n: int, seed: int, noise: float = 1.0):
    """Representations that hold the label: (representations, labels)."""
    labels = torch.tensor(np.random.default_rng(seed).integers(0, CLASSES, n))
    centres, x = rows_of(CLASSES, seed=99), rows_of(n, seed)
    return {name: centres[name][labels] + noise * rows for name, rows in x.items()}, labels


def fit(seed: int = 0, epochs: int = 4, noise: float = 1.0, lr: float = 1e-3):
    model = model_of("average", "average", seed)
    (train, labels), (val, val_labels) = labelled(120, 1, noise), labelled(60, 2, noise)
    x = {name: torch.cat([val[name], train[name]]) for name in val}
    y = torch.cat([val_labels, labels])
    curve = h.train_fusion(model, x, y, torch.arange(60, 180), torch.arange(60), epochs=epochs,
                           batch=32, lr=lr, seed=seed, label="test")
    return model, curve


def test_one_step_returns_the_loss_before_it_and_lowers_it():
    model, (x, y) = model_of("concat", "average"), labelled(32, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = cross_entropy(model(**x), y).item()
    assert h.train_step(model, optimizer, x, y) == pytest.approx(before, rel=1e-5)
    after = cross_entropy(model(**x), y).item()
    assert after < before
    assert h.train_step(model, optimizer, x, y) == pytest.approx(after, rel=1e-5)


def test_training_learns_and_leaves_the_best_epoch():
    # Noisy and restless, so that the last epoch is not the best.
    model, curve = fit(epochs=12, noise=4.0, lr=5e-3)
    x, y = labelled(60, 2, 4.0)
    logits = h.predict_fusion(model, x)
    best = curve.loc[curve["val_macro_f1"].idxmax()]
    assert curve["epoch"].tolist() == list(range(1, 13))
    assert curve["train_loss"].iloc[-1] < curve["train_loss"].iloc[0]
    assert best["val_macro_f1"] > curve["val_macro_f1"].iloc[-1]
    assert f1_score(y, logits.argmax(1), average="macro") == pytest.approx(best["val_macro_f1"])
    assert cross_entropy(logits, y).item() == pytest.approx(best["val_loss"], rel=1e-5)


def test_separable_classes_are_learnt():
    assert fit(noise=0.3, epochs=10)[1]["val_macro_f1"].max() > 0.95


def test_same_seed_same_numbers_other_seed_others():
    (first, a), (second, b), (_, other) = fit(1), fit(1), fit(2)
    assert_frame_equal(a, b)
    weights = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) for x, y in weights)
    assert not np.allclose(a["val_loss"], other["val_loss"], rtol=1e-3)


@pytest.mark.parametrize("head", ["dropout", "layers"])
def test_dropout_is_off_in_prediction_and_on_in_training(head):
    model, x = model_of("add", "add", head=head).train(), rows_of(20)
    assert not torch.equal(model(**x), model(**x))
    assert torch.equal(h.predict_fusion(model, x), h.predict_fusion(model, x))
    assert not model.training


# --- the stage ------------------------------------------------------------------------------------
def features_of(split: pd.DataFrame, place: int, symbol: str) -> torch.Tensor:
    """Random numbers that lean towards the label."""
    labels = torch.tensor(split["label_id"].to_numpy())
    return rows_of(len(split), seed=place)[symbol] + labels[:, None].float() / 5


@pytest.fixture
def featured(make_run, fake_stage):
    """A run whose five feature stages are random numbers, so that fusion can be trained without
    encoders.
    """
    def prepare(**settings):
        run = make_run(**settings)
        h.stage(run, "splits")
        split = h.read_split(run)
        features = {name: features_of(split, place, symbol)
                    for place, (symbol, name) in enumerate(h.REPRESENTATIONS.items())}

        def build(run, name, folder):
            order = np.random.default_rng(0).permutation(len(split))  # the product id is the key
            h.save_tensors(folder / "features.safetensors", split["product_id"].iloc[order],
                           features=features[name][order])

        for name in features:
            fake_stage(name, build)
            h.stage(run, name)
        return run, split

    return prepare


def test_representations_come_in_the_order_of_the_products(featured):
    run, split = featured()
    ids = split["product_id"].iloc[[9, 2, 30]]
    x = h.read_representations(run, ids)
    for place, symbol in enumerate(["T_c", "D_c", "T_f", "D_f", "P"]):
        assert torch.equal(x[symbol], features_of(split, place, symbol)[[9, 2, 30]])


@pytest.mark.parametrize("standardise", [True, False])
def test_stage_trains_on_the_training_part_and_its_model_loads(featured, standardise):
    run, split = featured()
    variant = h.Variant("average", "average", standardise=standardise)
    folder = h.stage(run, f"fusion-{variant.name}")
    saved = load_file(folder / "model-0.safetensors")
    training = h.read_representations(run, split.loc[split["part"] == "train", "product_id"])
    expected = training["P"].mean(0) if standardise else torch.zeros(P_WIDTH)
    assert torch.allclose(saved["mean_P"], expected, atol=1e-5)
    val = split[split["part"] == "val"]
    x = h.read_representations(run, val["product_id"])
    probabilities = h.fusion_probabilities(run, variant, x)
    assert probabilities.shape == (len(val), 2, 27)
    assert torch.allclose(probabilities.sum(2), torch.ones(len(val), 2), atol=1e-5)
    curves, best = pd.read_csv(folder / "curve.csv"), []
    for k, curve in curves.groupby("fusion_seed"):
        accuracy = (probabilities[:, k].argmax(1).numpy() == val["label_id"].to_numpy()).mean()
        best.append(curve.loc[curve["val_macro_f1"].idxmax(), "val_accuracy"])
        assert accuracy == pytest.approx(best[-1])
    metrics = h.read_manifest(run, folder.name.rpartition("-")[0])["metrics"]
    assert metrics["seeds"] == len(best) == 2
    assert metrics["val_accuracy"] == pytest.approx(np.mean(best))
    assert not torch.equal(probabilities[:, 0], probabilities[:, 1])
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["curve.csv", "manifest.json", "model-0.safetensors", "model-1.safetensors"]


def test_fusion_learns_from_the_rows_kept_from_the_encoders(featured):
    run, split = featured(fusion_rows="held-out")
    assert set(split["part"]) == {*run.parts} == {"train", "fusion", "val", "test"}
    saved = load_file(h.stage(run, "fusion-add-add") / "model-0.safetensors")
    held_out = h.read_representations(run, split.loc[split["part"] == "fusion", "product_id"])
    assert torch.allclose(saved["mean_P"], held_out["P"].mean(0), atol=1e-5)


def test_in_train_mode_only_the_rows_that_fusion_learns_from_change(featured, monkeypatch):
    run, split = featured(encoder_mode="train")
    asked, given = [], {}

    def encode(run, variant, rows):
        asked.append((variant.symbols, rows.tolist()))
        return {symbol: torch.full((len(rows), 1), 7.0) for symbol in variant.symbols}

    def train(model, x, *rest, **settings):
        given.update(x)
        return train_fusion(model, x, *rest, **settings)

    train_fusion = h.train_fusion
    monkeypatch.setattr(h, "encode_in_train_mode", encode)
    monkeypatch.setattr(h, "train_fusion", train)
    h.stage(run, "fusion-concat-concat-T_c+P")
    train_rows = np.flatnonzero(split["part"] == "train")
    assert asked == [(["T_c", "P"], train_rows.tolist())]
    features = h.read_representations(run, split["product_id"])
    for symbol, rows in given.items():
        changed = (rows != features[symbol]).any(1).numpy()
        assert np.flatnonzero(changed).tolist() == train_rows.tolist()
        assert (rows[train_rows] == 7).all()


def test_setting_standardise_reaches_the_variants(featured):
    run, _ = featured(standardise=False)
    saved = load_file(h.stage(run, "fusion-add-add") / "model-0.safetensors")
    assert (saved["mean_P"] == 0).all() and (saved["std_P"] == 1).all()
    assert (saved["missing_P"] != 0).all()  # what is missing is the mean all the same


def test_a_column_that_hardly_varies_is_only_centred():
    x = {name: torch.zeros(6, 8) for name in ("T_c", "D_c", "T_f", "D_f", "P")}
    x["P"][:, 0] = torch.tensor([0, 1, 0, 1, 0, 1]) * 1e-8
    x["P"][:, 1] = torch.tensor([0, 1, 0, 1, 0, 1]) * 4.0
    model = h.HierarchicalFusion(dict.fromkeys(x, 8), h.named_variant("concat-add"))
    model.fit_scale(x)
    assert model.std_P[0] == 1 and model.std_P[1] == pytest.approx(x["P"][:, 1].std().item())


def test_a_step_forgets_the_gradient_of_the_one_before():
    layer = torch.nn.Linear(3, 2)

    def model(x: torch.Tensor) -> torch.Tensor:
        return layer(x)

    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    batch, labels, moved = {"x": torch.ones(4, 3)}, torch.tensor([0, 0, 0, 1]), []
    for _ in range(2):
        before = layer.weight.detach().clone()
        h.train_step(model, optimizer, batch, labels)
        moved.append((layer.weight.detach() - before).norm().item())
    assert moved[1] == pytest.approx(moved[0], rel=0.01)


def test_fusion_draws_its_rows_in_another_order_each_epoch(monkeypatch):
    drawn = []
    monkeypatch.setattr(h, "train_step", lambda model, optimizer, batch, labels:
                        drawn.append(batch["P"][:, 0].tolist()) or 0.0)
    x = {name: torch.randn(20, 8) for name in ("T_c", "D_c", "T_f", "D_f", "P")}
    x["P"][:, 0] = torch.arange(20)
    model = h.HierarchicalFusion(dict.fromkeys(x, 8), h.named_variant("concat-add"))
    h.train_fusion(model, x, torch.arange(20) % 3, torch.arange(16), torch.arange(16, 20),
                   epochs=2, batch=4, lr=0.1, seed=0, label="test")
    first, second = np.array(drawn).reshape(2, 16).astype(int).tolist()
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != sorted(first) and first != second


def test_a_missing_modality_is_the_mean_of_the_training_rows(featured):
    run, split = featured()
    variant = h.named_variant("average-average")
    h.stage(run, "fusion-average-average")
    x = h.read_representations(run, split["product_id"])
    training = h.read_representations(run, split.loc[split["part"] == "train", "product_id"])
    means = {name: rows.mean(0).expand_as(x[name]) for name, rows in training.items()}
    without = {**x, "D_c": means["D_c"], "D_f": means["D_f"]}
    found = h.fusion_probabilities(run, variant, x, ["description"])
    assert torch.allclose(found, h.fusion_probabilities(run, variant, without), atol=1e-5)
    assert not torch.allclose(found, h.fusion_probabilities(run, variant, x), atol=1e-3)


@pytest.mark.slow
def test_vectors_in_train_mode_are_the_same_products_with_dropout(make_run, monkeypatch):
    run = make_run(encoder_mode="train", image_batch=16)
    variant = h.named_variant("concat-concat-T_c+D_f+P-whole")
    for name in ("splits", "text", "camembert_title", "flaubert_description", "seresnext",
                 "image_whole"):
        h.stage(run, name)
    split = h.read_split(run)
    train = torch.tensor(np.flatnonzero(split["part"] == "train"))
    frozen = h.read_representations(run, split["product_id"], "whole", variant.symbols)
    found = h.encode_in_train_mode(run, variant, train)
    again = h.encode_in_train_mode(run, variant, train)
    for symbol, rows in found.items():
        assert torch.equal(rows, again[symbol])  # drawn from the run's seed
        assert (rows - frozen[symbol][train]).abs().amax(1).min() > 1e-3

    def load(*arguments):
        model, tokenizer = load_checkpoint(*arguments)
        for module in model.modules():
            for name in {"p", "dropout"} & {*vars(module)}:
                setattr(module, name, 0.0)
        return model, tokenizer

    load_checkpoint = h.load_checkpoint
    monkeypatch.setattr(h, "load_checkpoint", load)  # without dropout nothing is left of the mode
    bare = h.encode_in_train_mode(run, variant, train)
    for symbol in ("T_c", "D_f"):
        assert torch.allclose(bare[symbol], frozen[symbol][train], atol=1e-5)
    encoder, pictures = h.load_image_encoder(run).train(), h.cached_pictures(run, 64)
    with torch.no_grad():
        batches = [encoder(torch.tensor(pictures[rows])) for rows in train.split(16)]
    assert torch.allclose(torch.cat(batches), found["P"], atol=1e-4)


# --- a Z of one's own -----------------------------------------------------------------------------
OWN = """import math
import helpers as h

@h.fusion(r"\\sqrt{x_1 x_2}")
def geometric(*x):
    return math.prod(x).abs().sqrt()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file with one Z, forgotten afterwards."""
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    monkeypatch.setattr("engine.fusions.FUSIONS", dict(h.FUSIONS))
    monkeypatch.setattr(h, "FUSIONS", fusions.FUSIONS)
    return path


def test_a_fusion_of_ones_own_is_trained_and_scored_with_the_others(featured, own):
    run, split = featured(fusions=str(own))
    assert [variant.name for variant in h.scored_variants(run)][-1] == "geometric-geometric"
    assert "fusion-geometric-geometric" in info_of(run, "scores").reads
    folder = h.stage(run, "fusion-geometric-geometric")
    assert (folder / "model-1.safetensors").exists()
    x = h.read_representations(run, split["product_id"])
    found = h.fusion_probabilities(run, h.named_variant("geometric-geometric"), x)
    assert found.shape == (len(split), 2, 27)
    other = h.open_run("paper", run.split, run.seed, {**run.changed, "fusions": ""})
    assert h.stage(other, "fusion-add-add") == h.stage(run, "fusion-add-add")


def test_another_code_of_ones_own_fusion_is_another_stage(featured, own):
    run, _ = featured(fusions=str(own))
    keys = {name: key_of(run, f"fusion-{name}") for name in ("geometric-add", "add-add")}
    own.write_text(OWN.replace("import math", "import math\nHALF = 2"))  # all of the file counts
    assert key_of(run, "fusion-geometric-add") != keys["geometric-add"]
    assert key_of(run, "fusion-add-add") == keys["add-add"]
    own.write_text(OWN.replace(".sqrt()", ".sqrt() + 1"))
    x = torch.tensor([[4.0]]), torch.tensor([[9.0]])
    assert h.fusion_of(run, "geometric").z(*x).item() == 7  # what runs is what is written


def test_the_file_stands_for_a_name_and_not_a_notebooks_cell(featured, own):
    run, _ = featured(fusions=str(own))
    key = key_of(run, "fusion-geometric-add")

    @h.fusion("0")
    def geometric(*x):
        return 0 * x[0]

    assert h.FUSIONS["geometric"].z is geometric
    assert key_of(run, "fusion-geometric-add") == key
    assert h.fusion_of(run, "geometric").z(torch.ones(1), torch.ones(1)).item() == 1


def test_another_code_of_a_notebooks_fusion_is_another_stage(run, own):
    keys = []
    for code in ("x[0]", "x[1]"):
        text = f"def first(*x):\n    return {code}\n"
        cell, names = f"<cell {code}>", {"__name__": "__main__"}
        linecache.cache[cell] = (len(text), None, text.splitlines(True), cell)
        exec(compile(text, cell, "exec"), names)
        h.fusion("one of them")(names["first"])
        keys.append(key_of(run, "fusion-first-add"))
    assert keys[0] != keys[1]


@pytest.mark.parametrize("text, said", [
    (None, "holds no fusion; write it as"), ("x = 1\n", "holds no fusion; write it as"),
    ("x = 1\ndef f(:\n", "is no Python: invalid syntax, line 2")])
def test_a_file_without_a_fusion_is_named(make_run, tmp_path, text, said):
    path = tmp_path / "mine.py"
    if text:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"setting fusions: .*mine.py {said}"):
        h.scored_variants(make_run(fusions=str(path)))


def test_a_fusion_of_the_study_is_not_replaced(own):
    def average(*x):
        return x[0]

    with pytest.raises(ValueError, match="'average' is a fusion of this study: give yours"):
        h.fusion("x_1")(average)
    with pytest.raises(ValueError, match="a fusion needs a name, got '<lambda>'"):
        h.fusion("x_1")(lambda *x: x[0])
    assert h.FUSIONS["average"].z is h.average


# --- what the released code does otherwise --------------------------------------------------------
def test_a_single_linear_layer_is_a_head():
    (layer,) = h.make_head(40, 27, "linear", 0.3)
    assert (layer.in_features, layer.out_features) == (40, 27)


def test_the_last_epoch_is_kept_where_a_variant_says_so():
    (x, y), (val, val_y) = labelled(120, 1, 4.0), labelled(60, 2, 4.0)
    rows = {name: torch.cat([val[name], x[name]]) for name in val}
    labels, scores = torch.cat([val_y, y]), []
    for keep_last in (False, True):
        model = model_of("average", "average", 0)
        curve = h.train_fusion(model, rows, labels, torch.arange(60, 180), torch.arange(60),
                               epochs=12, batch=32, lr=5e-3, seed=0, label="test",
                               keep_last=keep_last)
        found = h.predict_fusion(model, val).argmax(1)
        scores.append(f1_score(val_y, found, average="macro"))
    assert scores[0] == pytest.approx(curve["val_macro_f1"].max())
    assert scores[1] == pytest.approx(curve["val_macro_f1"].iloc[-1]) and scores[1] < scores[0]
    assert h.named_variant("average-average-last").last


@pytest.mark.parametrize("model, name", [
    ("flaubert_description", "FlauBERT description"), ("seresnext", "SE-ResNeXt"),
    ("concat-add", "text concat + final add"), ("late mean", "late mean"),
    ("TF-IDF title", "TF-IDF title"), ("majority class", "majority class"),
    ("average-average-dropout", "text average + final average, with dropout"),
    ("concat-concat-flat", "concat of all five"), ("add-add-T_c+P", "add of T_c, P"),
    ("gated-gated-text-hidden", "text gated + final gated, no picture, modality dropout")])
def test_a_model_has_one_name_for_readers(model, name):
    assert h.display_name(model) == name
