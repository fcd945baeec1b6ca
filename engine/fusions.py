"""Z: how representations of one width become one. Each is one entry of FUSIONS.

A Z takes any number of representations [N, d]. One that learns is a module, made as Z(d, n) for n
representations of width d. Write another in a notebook, and it is a fusion like these:

    @h.fusion(r"\\sqrt{|x_1 x_2|}")
    def geometric(*x):
        return torch.stack(x).abs().add(1e-6).log().mean(0).exp()

In a file that the setting `fusions` names, it is known to all notebooks and to `run.py` too:
docs/own_fusion.md.
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from engine import fingerprint
from engine.files import hash_json
from engine.runs import Run, from_root
from engine.settings import one_of

PAPER = "paper, section III.C"


@dataclass(frozen=True)
class Fusion:
    """One Z: a function of representations, or the class of a module made as Z(d, n). `code` is
    what it was made from, where that is not this study's.
    """
    z: Callable
    equation: str
    source: str
    code: str = ""

    def make(self, width: int, n: int) -> Callable[..., Tensor]:
        """What joins n representations of this width."""
        return self.z(width, n) if isinstance(self.z, type) else self.z

    def width(self, width: int, n: int) -> int:
        """The width of what it gives."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return self.make(width, n)(*[torch.zeros(2, width)] * n).shape[-1]


FUSIONS: dict[str, Fusion] = {}


def _own_code(z: Callable) -> str:
    """The text of a Z of a notebook, as it is now; "" for one of this study, and where none is."""
    if z.__module__ in fingerprint.ROOMS:
        return ""
    methods = vars(z).values() if isinstance(z, type) else [z]
    with suppress(OSError):  # of what a file's text defines, the whole text counts
        return "".join(inspect.getsource(code) for code in methods if inspect.isfunction(code))
    return ""


def fusion(equation: str, source: str = "ours") -> Callable:
    """Enter a function or a module's class as a Z, under its own name in small letters.

    ValueError for something without a name, and for the name of a fusion of this study.
    """
    def enter(z: Callable) -> Callable:
        name = z.__name__.lower()
        if not name.isidentifier():
            raise ValueError(f"a fusion needs a name, got {z.__name__!r}: write it as a function")
        if name in FUSIONS and FUSIONS[name].z.__module__ == __name__:
            raise ValueError(f"{name!r} is a fusion of this study: give yours another name")
        FUSIONS[name] = Fusion(z, equation, source, _own_code(z))
        return z

    return enter


# --- the paper's ----------------------------------------------------------------------------------
@fusion(r"x_1 + x_2", PAPER)
def add(*x: Tensor) -> Tensor:
    """Their sum, [N, d]. Shown in 07."""
    return sum(x)


@fusion(r"\langle x_1, x_2\rangle", PAPER)
def concat(*x: Tensor) -> Tensor:
    """One after the other, [N, n d]. Shown in 07."""
    return torch.cat(x, dim=-1)


@fusion(r"\tfrac12 (x_1 + x_2)", PAPER)
def average(*x: Tensor) -> Tensor:
    """Their mean, [N, d]. Shown in 07."""
    return sum(x) / len(x)


# --- others ---------------------------------------------------------------------------------------
@fusion(r"\max(x_1, x_2)")
def maximum(*x: Tensor) -> Tensor:
    """The larger of each coordinate, [N, d]. Shown in 07."""
    return torch.stack(x).amax(0)


@fusion(r"x_1 \odot x_2")
def product(*x: Tensor) -> Tensor:
    """Coordinate by coordinate multiplied, [N, d]. Shown in 07."""
    return math.prod(x)


@fusion(r"\textstyle\sum_i z_i \odot \tanh(W_i x_i),\ \ "
        r"z = \mathrm{softmax}_i(V_i \langle x_1, x_2\rangle)",
        "Arevalo et al. 2017, whose z and 1 - z are a softmax over two")
class Gated(nn.Module):
    """A gate for each coordinate says how much of each representation goes on, [N, d]. Shown in 07.
    """

    def __init__(self, width: int, n: int):
        super().__init__()
        self.read = nn.ModuleList(nn.Linear(width, width) for _ in range(n))
        self.gates = nn.Linear(n * width, n * width)

    def forward(self, *x: Tensor) -> Tensor:
        read = torch.stack([torch.tanh(w(rows)) for w, rows in zip(self.read, x)], 1)
        gates = self.gates(torch.cat(x, -1)).view_as(read).softmax(1)
        return (gates * read).sum(1)


@fusion(r"\textstyle\sum_{r=1}^{4} \prod_i W_{i,r} \langle x_i, 1\rangle",
        "low-rank bilinear: Liu et al. 2018")
class LowRank(nn.Module):
    """The products of all coordinates of one with all of the other, in four ranks, [N, d]. Shown in
    07.
    """

    def __init__(self, width: int, n: int, rank: int = 4):
        super().__init__()
        self.rank = rank
        self.factors = nn.ModuleList(nn.Linear(width, rank * width) for _ in range(n))

    def forward(self, *x: Tensor) -> Tensor:
        factors = [w(rows).unflatten(-1, (self.rank, -1)) for w, rows in zip(self.factors, x)]
        return math.prod(factors).sum(1)


@fusion(r"\textstyle\sum_i \alpha_i x_i,\ \ \alpha = \mathrm{softmax}_i(v \cdot \tanh(W x_i))",
        "attention as pooling: Bahdanau et al. 2015, Yang et al. 2016")
class Attention(nn.Module):
    """A weight for each representation of a product, from what it holds, [N, d]. Shown in 07."""

    def __init__(self, width: int, n: int):
        super().__init__()
        self.weigh = nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, *x: Tensor) -> Tensor:
        rows = torch.stack(x, 1)
        return (self.weigh(rows).softmax(1) * rows).sum(1)


# --- by name --------------------------------------------------------------------------------------
def _fusions_digest(run: Run, stage: str) -> str:
    """The hash of both Z of a stage `fusion-<variant>`; other stages stand on such stages."""
    kind, *names = stage.split("-")
    if kind != "fusion":
        return ""
    known = [fusion_of(run, name) for name in names[:2]]
    code = [each.code or fingerprint.code_of(each.z).hash for each in known]
    return hash_json([*code, fingerprint.code_of(Fusion).hash])


@fingerprint.content(_fusions_digest, of_stage=True)
def fusion_of(run: Run, name: str) -> Fusion:
    """The Z of that name: of this room, of a notebook, or of the file that the setting `fusions`
    names; ValueError lists those known.
    """
    if name in run.own_fusions:
        path = from_root(run.profile.fusions)
        FUSIONS[name] = _load(path, path.read_text(encoding="utf-8"))[name]
    return FUSIONS[one_of("fusion", name, FUSIONS)]


@lru_cache
def _load(path: Path, text: str) -> dict[str, Fusion]:
    """What a file of this text enters; each depends on the whole text."""
    before = dict(FUSIONS)
    exec(compile(text, str(path), "exec"), {"__name__": "own_fusions", "__file__": str(path)})
    entered = {name: replace(known, code=text) for name, known in FUSIONS.items()
               if before.get(name) is not known}
    FUSIONS.clear()
    FUSIONS.update(before)
    return entered
