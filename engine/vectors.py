"""The vectors that an encoder gives of rows: one batch, or all rows, shared by the processes."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate.utils import reduce
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from engine.processes import device, group
from engine.progress import Progress


@torch.inference_mode()
def encode(encoder: Callable[..., Tensor], batch: dict[str, Tensor],
           dtype: torch.dtype = torch.float32) -> Tensor:
    """`encoder(**batch)`: the vectors [N, width] (float32, CPU); by halves when memory runs out.

    Without gradient; the caller has set eval mode and moved the encoder to `device()`.
    """
    try:
        inputs = {name: tensor.to(device()) for name, tensor in batch.items()}
        with torch.autocast(device().type, dtype, enabled=dtype != torch.float32):
            return encoder(**inputs).float().cpu()
    except RuntimeError as error:
        if not should_reduce_batch_size(error) or len(next(iter(batch.values()))) == 1:
            raise
    clear_device_cache(garbage_collection=True)
    halves = zip(*(tensor.chunk(2) for tensor in batch.values()))
    return torch.cat([encode(encoder, dict(zip(batch, half)), dtype) for half in halves])


def encode_rows(encoder: Callable[..., Tensor], order: Sequence[int],
                inputs: Callable[[Sequence[int]], dict], batch: int, dtype: torch.dtype,
                label: str) -> Tensor:
    """The vectors [N, width] (float32, CPU) of rows 0 to N - 1, taken in this `order`.

    `inputs(rows)` is their batch. The processes share the batches; each gets all vectors.
    """
    groups = [order[start:start + batch] for start in range(0, len(order), batch)]
    mine = groups[group().process_index::group().num_processes]
    bar = Progress(f"{label} features", sum(map(len, mine)), "rows")
    features = None
    for rows in mine or groups[:1]:  # without rows of its own a process only learns the width
        vectors = encode(encoder, inputs(rows), dtype)
        if features is None:
            features = torch.zeros(len(order), vectors.shape[1])
        if mine:
            features[rows] = vectors
            bar.advance(len(rows))
    bar.close()
    return features if group().num_processes == 1 else reduce(features.to(device()), "sum").cpu()
