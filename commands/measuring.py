"""Seconds, memory and the peak of the device that is here, measured."""
from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch

from engine.processes import device

LEAST = 2.0    # seconds that the counted steps have to take, so that their start does not count
MOST_STEPS = 64


def seconds_a_step(work: Callable[[int], None]) -> float:
    """Seconds for a step of `work(steps)`, without its start: many steps minus few of them."""
    work(1)
    few, many = 1, 4
    while True:
        extra = clocked(work, many) - clocked(work, few)
        if extra >= LEAST or many >= MOST_STEPS:
            return max(extra, 1e-9) / (many - few)
        many = min(MOST_STEPS, 4 * many)


def clocked(work: Callable[[int], None], steps: int) -> float:
    """Seconds that `work(steps)` takes, on a GPU to its end."""
    start = time.perf_counter()
    work(steps)
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device: what a network could reach at most."""
    side = 8192 if device().type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device(), dtype=dtype)

    def multiply(times: int) -> None:
        for _ in range(times):
            matrix @ matrix

    return 2 * side ** 3 / seconds_a_step(multiply)


def memory_gb() -> float:
    """What this process holds now, in GB: on a GPU the most that its tensors have taken there since
    `torch.cuda.reset_peak_memory_stats`.
    """
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


def free_gb() -> float:
    """What networks may take here, in GB: of the GPU, or of this machine's memory."""
    if device().type == "cuda":
        return torch.cuda.mem_get_info()[0] / 1e9
    return psutil.virtual_memory().available / 1e9


def device_name() -> str:
    """What the networks run on."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} thread(s) of this processor"
