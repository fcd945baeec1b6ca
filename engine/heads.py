"""An encoder's linear head: fitted, loaded, asked; an epoch's scores, and the best epoch's."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from engine.scores import score


def validation_scores(found: transformers.EvalPrediction) -> dict[str, float]:
    """Scores and cross-entropy (nats) of all validation rows at once, however batched."""
    logits, labels = torch.as_tensor(found.predictions), torch.as_tensor(found.label_ids)
    loss = nn.functional.cross_entropy(logits, labels).item()
    return score(labels, logits.argmax(-1)) | {"cross_entropy": loss}


def fit_head(head: nn.Linear, features: Tensor, labels: Tensor, parts: np.ndarray) -> pd.DataFrame:
    """Fit the linear layer of a frozen encoder by logistic regression on the training part.

    `features` are [N, width]. Returns a curve of one row, epoch 0: no step of the encoder's.
    """
    train, val = (torch.as_tensor(parts == part) for part in ("train", "val"))
    learnt = features[train]  # few of them, maybe: a copy of all rows may not fit
    mean, std = learnt.mean(0), learnt.std(0).clamp(min=1e-6)
    scaled = (learnt - mean) / std
    model = LogisticRegression(max_iter=2000).fit(scaled.numpy(), labels[train].numpy())
    weight = torch.tensor(model.coef_, dtype=torch.float32) / std
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-1e4)  # a class without a training row is never predicted
        head.weight[model.classes_] = weight
        bias = torch.tensor(model.intercept_, dtype=torch.float32)
        head.bias[model.classes_] = bias - weight @ mean
        found = [validation_scores(transformers.EvalPrediction(head(features[rows]), labels[rows]))
                 for rows in (train, val)]
    return pd.DataFrame([{"epoch": 0, "train_loss": found[0]["cross_entropy"],
                          "val_loss": found[1]["cross_entropy"],
                          "val_accuracy": found[1]["accuracy"],
                          "val_macro_f1": found[1]["macro_f1"]}])


def curve_metrics(curve: pd.DataFrame) -> dict:
    """The best epoch of a learning curve and its validation scores: what a manifest keeps."""
    best = curve.loc[curve["val_macro_f1"].idxmax()]
    return {"best_epoch": int(best["epoch"]), **best[["val_accuracy", "val_macro_f1"]]}


def head_probabilities(folder: Path, features: Tensor) -> Tensor:
    """Class probabilities [N, 27] that an encoder's own linear head gives its features."""
    with torch.no_grad():
        return torch.softmax(load_head(folder)(features), -1)


def load_head(folder: Path) -> nn.Linear:
    """An encoder's own linear head, from its width to the classes."""
    weights = load_file(folder / "head.safetensors")
    head = nn.Linear(weights["weight"].shape[1], len(weights["weight"]))
    head.load_state_dict(weights)
    return head


def count_parameters(model: nn.Module) -> int:
    """The number of weights of a network."""
    return sum(parameter.numel() for parameter in model.parameters())
