"""Late fusion: means, weights and stacks, and that none is scored on the rows that fitted it."""
import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression

import helpers as h
from engine.late_fusion import cross_fitted, fit_mixture, late_fusions, stack

CLASSES = 27


def votes(n: int, strengths: tuple[float, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities [n, models, 27], labels [n]) of models that know the label this strongly."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    logits = torch.randn(n, len(strengths), CLASSES, generator=generator)
    for model, strength in enumerate(strengths):
        logits[range(n), model, labels] += strength
    return logits.softmax(-1), labels


def test_the_mean_is_the_mean_and_the_weighted_mean_is_weighted():
    probabilities, labels = votes(60, (3.0, 1.0))
    rows, _ = votes(10, (3.0, 1.0), seed=1)
    found, w = late_fusions(probabilities, labels, rows), fit_mixture(probabilities, labels)
    assert tuple(found) == h.LATE_FUSIONS
    assert torch.allclose(found["late mean"], (rows[:, 0] + rows[:, 1]) / 2)
    assert torch.allclose(found["late weighted"], w[0] * rows[:, 0] + w[1] * rows[:, 1], atol=1e-6)


@pytest.mark.parametrize("strengths", [(4.0, 1.0), (2.0, 2.5), (0.0, 5.0)])
def test_weights_of_two_models_are_those_of_a_search_along_the_line(strengths):
    probabilities, labels = votes(300, strengths)
    of_truth = probabilities[range(300), :, labels].numpy().astype(float)
    expected = minimize_scalar(lambda w: -np.log(of_truth @ [w, 1 - w]).mean(), bounds=(0, 1),
                               method="bounded").x
    found = fit_mixture(probabilities, labels)
    assert found[0].item() == pytest.approx(expected, abs=0.01)
    assert found.sum().item() == pytest.approx(1)


def test_a_stack_is_a_logistic_regression_on_all_logarithms():
    probabilities, labels = votes(200, (2.0, 1.0, 3.0))
    labels[labels > 20] = 3  # classes that it has never seen
    rows, _ = votes(7, (2.0, 1.0, 3.0), seed=1)
    logarithms, others = (x.double().log().flatten(1).numpy() for x in (probabilities, rows))
    model = LogisticRegression(max_iter=100_000, tol=1e-9).fit(logarithms, labels)
    found = stack(probabilities, labels, rows)
    assert np.allclose(found[:, :21], model.predict_proba(others), atol=0.002)
    assert (found[:, 21:] == 0).all() and torch.allclose(found.sum(1), torch.ones(7), atol=1e-5)


def test_no_row_is_predicted_by_what_was_fitted_on_it():
    """Another label of a row changes the predictions of the rows in other folds, never its own."""
    probabilities, labels = votes(50, (2.0, 1.0))
    before = cross_fitted(probabilities, labels)
    for row in (0, 17, 49):
        other = labels.clone()
        other[row] = (labels[row] + 1) % CLASSES
        after = cross_fitted(probabilities, other)
        for name in ("late weighted", "late stacking"):
            assert torch.equal(before[name][row], after[name][row]), name
            assert not torch.equal(before[name], after[name]), name


def test_scores_on_the_rows_that_fitted_a_stack_are_too_good():
    """The mistake that cross-fitting prevents, with models that know nothing."""
    probabilities, labels = votes(150, (0.0, 0.0, 0.0))
    fooled = (stack(probabilities, labels, probabilities).argmax(1) == labels).float().mean()
    honest = (cross_fitted(probabilities, labels)["late stacking"].argmax(1) == labels)
    assert fooled > 0.5 and honest.float().mean() < 0.15
