"""What a model does: how sure it is and how often right, where, and because of what."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor, nn


def reliability(truth: Sequence[int], probabilities: Tensor, bins: int = 10) -> pd.DataFrame:
    """Rows in bins of as many rows each, by the probability of the predicted class: n, confidence
    (its mean), accuracy, and the accuracy's 95% interval (Wilson) as low and high. Shown in 09.
    """
    confidence, predicted = probabilities.max(-1)
    order = confidence.argsort().numpy()
    right = predicted.numpy() == np.asarray(truth)
    rows = []
    for part in np.array_split(order, bins):
        test = scipy.stats.binomtest(int(right[part].sum()), len(part))
        low, high = test.proportion_ci(method="wilson")
        rows.append({"n": len(part), "confidence": confidence[part].mean().item(),
                     "accuracy": right[part].mean(), "low": low, "high": high})
    return pd.DataFrame(rows)


def calibration_error(truth: Sequence[int], probabilities: Tensor, bins: int = 10) -> float:
    """The expected calibration error: how far accuracy and confidence lie apart, mean over rows.
    Bins of few rows are off by chance alone, so that it is above 0 for a perfect model. Shown in
    09.
    """
    table = reliability(truth, probabilities, bins)
    return float(np.average((table["accuracy"] - table["confidence"]).abs(), weights=table["n"]))


def calibration_error_by_chance(probabilities: Tensor, bins: int = 10, draws: int = 200,
                                seed: int = 0) -> float:
    """The mean of `calibration_error` if the probabilities were true: its bias with so many rows.
    Shown in 09.
    """
    rng, errors = np.random.default_rng(seed), []
    cumulated = probabilities.double().cumsum(-1).numpy()
    for _ in range(draws):
        labels = (cumulated < rng.uniform(size=(len(cumulated), 1)) * cumulated[:, -1:]).sum(1)
        errors.append(calibration_error(labels, probabilities, bins))
    return float(np.mean(errors))


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """T for which softmax(log p / T) has the lowest cross-entropy (Guo et al. 2017), on rows that
    are not scored afterwards. Shown in 09.
    """
    logits = probabilities.clamp(min=1e-12).log()

    def loss(log_t: float) -> float:
        return nn.functional.cross_entropy(logits / np.exp(log_t), labels).item()

    return float(np.exp(scipy.optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def with_temperature(probabilities: Tensor, t: float) -> Tensor:
    """softmax(log p / T): above 1 less sure, below 1 surer, and the same predictions."""
    return (probabilities.clamp(min=1e-12).log() / t).softmax(-1)


def by_group(truth: Sequence[int], predicted: dict[str, np.ndarray],
             groups: pd.Series) -> pd.DataFrame:
    """Accuracy of each model within each group of rows, in percent: group, model, n, accuracy, low,
    high (95% Wilson interval, of the first seed's labels where there are several).
    """
    rows = []
    for group, places in groups.groupby(groups, observed=True).indices.items():
        for model, labels in predicted.items():
            first = np.reshape(labels, (len(truth), -1))[places, 0]
            right = int((first == np.asarray(truth)[places]).sum())
            ends = scipy.stats.binomtest(right, len(places)).proportion_ci(method="wilson")
            rows.append({"group": group, "model": model, "n": len(places),
                         "accuracy": 100 * right / len(places), "low": 100 * ends.low,
                         "high": 100 * ends.high})
    return pd.DataFrame(rows)


def complementarity(truth: Sequence[int], predicted: dict[str, np.ndarray]) -> pd.DataFrame:
    """For each pair: of the rows that the model of the line has wrong, the percent that the model
    of the column has right.
    """
    right = {model: np.asarray(labels) == np.asarray(truth) for model, labels in predicted.items()}
    table = pd.DataFrame(index=list(right), columns=list(right), dtype=float)
    for wrong_of in right:
        for model in right:
            table.loc[wrong_of, model] = 100 * right[model][~right[wrong_of]].mean()
    return table


def region_parts(head: nn.Linear, tiles: Tensor, label: int) -> Tensor:
    """What each tile adds to the logit of a class, [tiles]: P is the mean of the tiles' vectors
    [tiles, width] and the head is linear, so that the parts and the bias add up to it. Shown in 09.
    """
    return tiles @ head.weight[label].detach() / len(tiles)


def token_parts(encoder: nn.Module, head: nn.Module, tokenizer, text: str, max_length: int,
                label: int, steps: int = 32) -> tuple[list[str], Tensor]:
    """The tokens of a text, and what each is estimated to add to the logit of a class, [tokens]:
    integrated gradients from a text of nothing but padding within the same frame (Sundararajan et
    al. 2017). The parts add up to the difference of the two logits, but for an error of `steps`.
    Shown in 09.
    """
    from captum.attr import LayerIntegratedGradients  # takes a second to import

    tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length)
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    frame = tokenizer.get_special_tokens_mask(ids[0].tolist(), already_has_special_tokens=True)
    empty = torch.where(torch.tensor([frame]) > 0, ids, tokenizer.pad_token_id)

    def logits(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return head(encoder(input_ids, attention_mask))

    attribute = LayerIntegratedGradients(logits, encoder.model.get_input_embeddings())
    parts = attribute.attribute(ids, empty, target=label, n_steps=steps,
                                additional_forward_args=(mask,))
    return tokenizer.convert_ids_to_tokens(ids[0]), parts.sum(-1)[0].detach()
