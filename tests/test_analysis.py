"""Analysis: calibration, groups of rows, complementarity and regions against cases worked by hand.
"""
import numpy as np
import pandas as pd
import pytest
import torch
from statsmodels.stats.proportion import proportion_confint

import helpers as h


def sure(confidence: list[float], right: list[int], truth: int = 3) -> tuple[list, torch.Tensor]:
    """(true labels, probabilities [N, 27]) with this confidence in the true class, or another."""
    p = torch.zeros(len(right), 27)
    for row, (c, hit) in enumerate(zip(confidence, right)):
        p[row] = (1 - c) / 26
        p[row, truth if hit else truth + 1] = c
    return [truth] * len(right), p


def test_reliability_as_counted_by_hand():
    truth, p = sure([0.9, 0.6, 0.9, 0.6, 0.9, 0.6, 0.9, 0.6], [1, 1, 1, 0, 1, 0, 0, 0])
    table = h.reliability(truth, p, bins=2)
    assert table["n"].tolist() == [4, 4]
    assert table["confidence"].tolist() == pytest.approx([0.6, 0.9])
    assert table["accuracy"].tolist() == [0.25, 0.75]
    low, high = proportion_confint(1, 4, method="wilson")
    assert (table["low"][0], table["high"][0]) == pytest.approx((low, high))
    assert h.calibration_error(truth, p, bins=2) == pytest.approx((0.35 + 0.15) / 2)


def test_a_perfect_model_has_the_error_that_chance_gives():
    p = torch.softmax(2 * torch.randn(400, 27, generator=torch.Generator().manual_seed(0)), 1)
    expected = h.calibration_error_by_chance(p, draws=200)
    errors = []
    for seed in range(100):
        labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
        errors.append(h.calibration_error(labels.tolist(), p))
    assert expected > 0.01 and np.mean(errors) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("t", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_a_model_too_sure_is_found_again(t):
    generator = torch.Generator().manual_seed(1)
    p = torch.softmax(torch.randn(5000, 27, generator=generator), 1)
    labels = torch.multinomial(p, 1, generator=generator)[:, 0]
    too_sure = h.with_temperature(p, 1 / t)
    assert h.fit_temperature(too_sure, labels) == pytest.approx(t, rel=0.05)
    assert torch.allclose(h.with_temperature(too_sure, t), p, atol=1e-4)
    assert torch.equal(too_sure.argmax(1), p.argmax(1))


def test_groups_are_counted_apart():
    groups = pd.Series(["a", "b", "a", "a", "b"])
    predicted = {"one": np.array([1, 2, 0, 1, 0]),
                 "seeds": np.array([[1, 9], [2, 9], [1, 9], [2, 9], [0, 0]])}
    table = h.by_group([1, 2, 3, 1, 2], predicted, groups).set_index(["group", "model"])
    assert table.loc[("a", "one"), "accuracy"] == pytest.approx(200 / 3)
    assert table.loc[("b", "one"), "accuracy"] == 50
    assert table.loc[("a", "seeds"), "n"] == 3  # right by its first seed: row 0 alone
    assert table.loc[("a", "seeds"), "accuracy"] == pytest.approx(100 / 3)


def test_who_is_right_when_another_is_wrong():
    table = h.complementarity([0, 0, 0, 0], {"a": [0, 0, 1, 1], "b": [0, 1, 0, 1]})
    # "a" has rows 2 and 3 wrong, of which "b" has row 2 right
    assert table.loc["a", "b"] == 50 and table.loc["b", "a"] == 50 and table.loc["a", "a"] == 0


def test_the_parts_of_the_regions_and_the_bias_are_the_logit():
    head, tiles = torch.nn.Linear(6, 27), torch.randn(256, 6)
    logits = head(tiles.mean(0))
    for label in (0, 26):
        parts = h.region_parts(head, tiles, label)
        assert parts.shape == (256,)
        assert (parts.sum() + head.bias[label]).item() == pytest.approx(logits[label].item(),
                                                                        abs=1e-5)


@pytest.mark.parametrize("encoder", h.TEXT_ENCODERS)
def test_the_parts_of_tokens_add_up_to_what_the_text_changes(encoder, tmp_path):
    torch.manual_seed(0)
    texts = ["un ours en peluche", "une table en bois", "ours et table, peluche et bois"]
    tokenizer = h.train_tokenizer(encoder, texts * 5, 60, tmp_path)
    model = h.TextEncoder(h.small_text_model(encoder, tokenizer, 16, 1, 32), "mean").eval()
    head = torch.nn.Linear(16, 27)
    tokens, parts = h.token_parts(model, head, tokenizer, texts[0], 32, label=4, steps=400)
    ids = tokenizer(texts[0], return_tensors="pt")["input_ids"]
    assert tokens == tokenizer.convert_ids_to_tokens(ids[0]) and parts.shape == (len(tokens),)
    nothing = ids.clone()
    nothing[0, 1:-1] = tokenizer.pad_token_id
    embeddings, mask = model.model.get_input_embeddings(), torch.ones_like(ids)
    with torch.no_grad():
        whole, padding = head(model(ids, mask))[0, 4], embeddings(nothing)
        embeddings.register_forward_hook(lambda *_: padding)  # the places stay what they are
        empty = head(model(ids, mask))[0, 4]
    assert parts.sum().item() == pytest.approx((whole - empty).item(), abs=1e-3)
    assert abs(whole - empty) > 0.01 and parts[[0, -1]].abs().max() < 1e-6  # the frame stays
