"""Fusion: Z, the reduction of P, the heads and equation (1) against numbers worked by hand or in
numpy.
"""
import inspect
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from torch.nn.functional import adaptive_max_pool1d, conv1d, cross_entropy

import helpers as h

D, P_WIDTH, CLASSES = 8, 20, 5
WIDTHS = {"T_c": D, "D_c": D, "T_f": D, "D_f": D, "P": P_WIDTH}
PAIRS = list(itertools.product(h.FUSIONS, h.FUSIONS))
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
    assert h.fuse(how, a, b).tolist() == expected


def test_unknown_fusion_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'multiply'.*add, concat, average"):
        h.fuse("multiply", torch.zeros(1, 2), torch.zeros(1, 2))


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


def test_variants_of_the_tables_have_names_of_their_own():
    choices = itertools.product(PAIRS, h.HEADS, (True, False))
    names = {h.Variant(*pair, head, standardise).name for pair, head, standardise in choices}
    assert len(names) == 9 * 3 * 2
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
    saved = load_file(folder / "model.safetensors")
    training = h.read_representations(run, split.loc[split["part"] == "train", "product_id"])
    expected = training["P"].mean(0) if standardise else torch.zeros(P_WIDTH)
    assert torch.allclose(saved["mean_P"], expected, atol=1e-5)
    val = split[split["part"] == "val"]
    x = h.read_representations(run, val["product_id"])
    probabilities = h.fusion_probabilities(run, variant, x)
    assert probabilities.shape == (len(val), 27)
    assert torch.allclose(probabilities.sum(1), torch.ones(len(val)), atol=1e-5)
    curve = pd.read_csv(folder / "curve.csv")
    accuracy = (probabilities.argmax(1).numpy() == val["label_id"].to_numpy()).mean()
    assert accuracy == pytest.approx(curve.loc[curve["val_macro_f1"].idxmax(), "val_accuracy"])
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["curve.csv", "manifest.json", "model.safetensors"]


def test_setting_standardise_reaches_the_variants(featured):
    run, _ = featured(standardise=False)
    saved = load_file(h.stage(run, "fusion-add-add") / "model.safetensors")
    assert (saved["mean_P"] == 0).all() and (saved["std_P"] == 1).all()


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
