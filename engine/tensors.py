"""What stages hold: tensors keyed by product id, weights, tables. Nothing is pickled.

Of the processes that make a stage together, the main one writes; the others' writers do nothing.
"""
from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.files import put_in_place
from engine.processes import group


def save_tensors(path: Path, product_ids: Sequence[int], **tensors: np.ndarray | Tensor) -> None:
    """Write tensors of shape [N, ...] and the N product ids that key their rows, as safetensors."""
    columns = {name: torch.tensor(np.asarray(x)).contiguous() for name, x in tensors.items()}
    wrong = {name: len(column) for name, column in columns.items()
             if len(column) != len(product_ids)}
    if wrong:
        raise ValueError(f"{len(product_ids)} product ids, but rows: {wrong}")
    ids = torch.tensor(np.asarray(product_ids, dtype=np.int64))
    save_weights(path, {"product_id": ids, **columns})


def load_tensors(path: Path, product_ids: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of `save_tensors`, rows in the order of `product_ids`; ValueError if one lacks.

    All rows in the file's own order are not copied: they are read when used, from pages that
    processes share.
    """
    tensors = load_file(path)
    index = pd.Index(tensors.pop("product_id").numpy())
    rows = index.get_indexer(np.asarray(product_ids))
    if (rows < 0).any():
        raise ValueError(f"{path} has no row for product {np.asarray(product_ids)[rows < 0][0]}; "
                         f"{(rows < 0).sum()} of {len(rows)} are missing: make its stage again")
    if np.array_equal(rows, np.arange(len(index))):
        return tensors
    return {name: tensor[torch.as_tensor(rows)] for name, tensor in tensors.items()}


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write named tensors as safetensors; the file appears when it is whole."""
    if group().is_main_process:
        stored = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
        with put_in_place(path) as partial:
            save_file(stored, partial)


def save_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV."""
    if group().is_main_process:
        table.to_csv(path, index=False)


def save_pretrained(folder: Path, model: nn.Module, tokenizer) -> None:
    """Write a Hugging Face model and its tokenizer."""
    if group().is_main_process:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def share_file(source: Path, target: Path) -> None:
    """The same file in another stage, without a second copy where the disk allows it."""
    if group().is_main_process and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(source)
        except OSError:
            with put_in_place(target) as partial:
                shutil.copy(source, partial)
