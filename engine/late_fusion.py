"""Late fusion: models that have read one thing each vote, and nothing else is trained."""
from __future__ import annotations

import warnings

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from torch import Tensor

LATE_FUSIONS = ("late mean", "late weighted", "late stacking")


def fit_mixture(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Weights [models], above 0 and of sum 1, of the weighted mean of probabilities
    [N, models, 27] that has the lowest cross-entropy. Shown in 09.
    """
    w = torch.zeros(probabilities.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")
    of_truth = probabilities[torch.arange(len(labels)), :, labels]

    def loss() -> Tensor:
        optimizer.zero_grad()
        loss = -(of_truth @ w.softmax(0)).clamp(min=1e-9).log().mean()
        loss.backward()
        return loss

    optimizer.step(loss)
    return w.softmax(0).detach()


def stack(probabilities: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Probabilities [rows, 27] by a logistic regression on the logarithms of all models'
    probabilities [N, models, 27], fitted on these labels. Shown in 09.
    """
    # In double precision: logarithms of so many models are nearly dependent, and in single
    # precision the fit stops early, at 0.05 of a probability elsewhere on another machine.
    logarithms = [x.double().clamp(min=1e-6).log().flatten(1).numpy()
                  for x in (probabilities, rows)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # many classes for the rows: so it is
        model = LogisticRegression(max_iter=5000, tol=1e-6).fit(logarithms[0], labels)
    found = torch.zeros(len(rows), rows.shape[-1])
    found[:, model.classes_] = torch.tensor(model.predict_proba(logarithms[1])).float()
    return found


def late_fusions(probabilities: Tensor, labels: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """{name: probabilities [rows, 27]} of the models' mean, their weighted mean and their stack,
    fitted on probabilities [N, models, 27] and labels [N] of other rows.
    """
    weighted = torch.einsum("nmc,m->nc", rows, fit_mixture(probabilities, labels))
    return dict(zip(LATE_FUSIONS, (rows.mean(1), weighted, stack(probabilities, labels, rows))))


def cross_fitted(probabilities: Tensor, labels: Tensor, folds: int = 5) -> dict[str, Tensor]:
    """`late_fusions` of the very rows that fit them: each row's by a fit on the other folds, since
    what has been fitted on a row cannot be judged on it. Shown in 09.
    """
    found = {name: torch.zeros_like(probabilities[:, 0]) for name in LATE_FUSIONS}
    for fit, rest in KFold(folds, shuffle=True, random_state=0).split(labels):
        fold = late_fusions(probabilities[fit], labels[fit], probabilities[rest])
        for name, rows in fold.items():
            found[name][rest] = rows
    return found
