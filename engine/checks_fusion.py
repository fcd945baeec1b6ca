"""The exercises of notebook 07."""
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.exercises import Unanswered, exercise, expect, same
from engine.fusions import FUSIONS

BY_HAND = {"add": lambda a, b: a + b, "concat": lambda a, b: np.concatenate([a, b]),
           "average": lambda a, b: (a + b) / 2}
TEXTS = ("T_f", "D_f", "T_c", "D_c")


# --- what addition forgets ------------------------------------------------------------------------
@exercise(hint="Take any t that is not 0, and move it from one vector to the other: a + t, b - t.",
          insight="Whatever one vector gains and the other loses, addition forgets: it keeps d "
                  "numbers of 2d.")
def told_apart(answer: Sequence) -> None:
    """Give two pairs of vectors, [(a, b), (c, d)], that addition cannot tell apart and
    concatenation can, and that are not one pair in two orders.
    """
    expect(len(answer) == 2 and all(len(pair) == 2 for pair in answer),
           "The answer should be two pairs of vectors: [(a, b), (c, d)].")
    a, b, c, d = (np.atleast_1d(np.asarray(x, dtype=float)) for pair in answer for x in pair)
    expect(len({x.shape for x in (a, b, c, d)}) == 1, "The four vectors differ in their width.")
    expect(not np.allclose([a, b], [c, d]),
           "Both pairs are the same, so concatenation cannot tell them apart either.")
    expect(not np.allclose([a, b], [d, c]),
           "That is one pair in two orders. Find one where no vector stays what it was.")
    same(a + b, c + d, "Addition tells these pairs apart: a + b is not c + d.")


# --- equation (1) ---------------------------------------------------------------------------------
def by_equation(x: dict[str, list[float]], text_z: str, final_z: str) -> np.ndarray:
    """Z(P, Z(Z(T_f, D_f), Z(T_c, D_c))) in NumPy, of vectors by name."""
    text, final = BY_HAND[text_z], BY_HAND[final_z]
    t_f, d_f, t_c, d_c, p = (np.array(x[name]) for name in (*TEXTS, "P"))
    return final(p, text(text(t_f, d_f), text(t_c, d_c)))


def alike(found: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays have one shape and the same numbers."""
    return found.shape == other.shape and np.allclose(found, other)


@exercise(hint="Write a function z(name, a, b) first, with NumPy's or PyTorch's vectors, then call "
               "it four times, from the inside out; P is the first argument of the last.",
          insight="All nine pairs of Z agree with the equation worked out apart from yours.")
def equation_one(answer: Callable) -> None:
    """Write a function of five vectors by name, {"T_f": [1.0, 0.0], ..., "P": [...]}, and of the
    names of two Z, text_z and final_z (add, concat or average), that returns equation (1).

    Each vector is a list of numbers; P has been fitted to the width of what it joins.
    """
    rng, pairs = np.random.default_rng(7), itertools.product(BY_HAND, BY_HAND)
    for text_z, final_z in sorted(pairs, key=lambda pair: pair.count("concat")):
        x = {name: rng.integers(-9, 9, 2).astype(float).tolist() for name in TEXTS}
        x["P"] = rng.integers(1, 9, 8 if text_z == "concat" else 2).astype(float).tolist()
        found = answer({name: list(v) for name, v in x.items()}, text_z, final_z)
        name_the_mistake(np.asarray(found, dtype=float), x, text_z, final_z)


def name_the_mistake(found: np.ndarray, x: dict, text_z: str, final_z: str) -> None:
    """NotYet unless it is equation (1), with what is wrong where that can be seen."""
    wanted, pair = by_equation(x, text_z, final_z), f"({text_z}, {final_z}): "
    five = [np.array(x[name]) for name in (*TEXTS, "P")]
    if text_z == final_z == "average":
        expect(not alike(found, np.mean(five, 0)), f"{pair}that is the mean of all five at once. "
               "Equation (1) takes two at a time: P has half of the say.")
    if "concat" not in (text_z, final_z):
        expect(found.size <= wanted.size, f"{pair}the result is too wide. A + between two lists "
               "sets one behind the other; vectors are added number by number.")
    if text_z != final_z and (text_z == "concat") == (final_z == "concat"):
        expect(not alike(found, by_equation(x, final_z, text_z)),
               f"{pair}text_z and final_z have changed places.")
    if found.ndim == 1 and not alike(found, wanted):
        expect(not alike(np.sort(found), np.sort(wanted)), f"{pair}the numbers are right and their "
               "order is not: P stands first, then what T_f and D_f give.")
    same(found, wanted, f"{pair}the result is not equation (1).")


# --- an average is a concatenation ----------------------------------------------------------------
@exercise(hint="How much of each of the five is in the result? Set so much of V for each, side by "
               "side.",
          insight="The picture weighs a half and each text an eighth, in these weights as in the "
                  "average. A layer after a concatenation is free to choose others.")
def tied_weights(answer: Callable) -> None:
    """Write a function of V [c, d] that returns W [c, 5d], such that W times the concatenation of
    P, T_f, D_f, T_c and D_c is V times equation (1) with the average as both Z.
    """
    for c, d in ((4, 3), (2, 2)):
        draw = torch.Generator().manual_seed(c)
        v, five = torch.randn(c, d, generator=draw), torch.randn(5, d, generator=draw)
        found = torch.as_tensor(answer(v.clone()), dtype=torch.float32)
        expect(found.shape == (c, 5 * d), f"W should be [c, 5d], {[c, 5 * d]} for V {[c, d]}, and "
               f"is {list(found.shape)}.")
        seen = found @ five.flatten()
        mean = v @ five.mean(0)
        expect(not torch.allclose(seen, mean, atol=1e-5), "Each of the five weighs a fifth in it: "
               "that is the mean of all at once, and equation (1) takes two at a time.")
        text = five[1:].mean(0)
        same(seen, v @ (five[0] + text) / 2, "W does not give what V gives of equation (1).")


# --- a Z of one's own -----------------------------------------------------------------------------
@exercise(hint="torch.stack(x) is [n, N, d]; a mean, a maximum or a product over its first "
               "dimension minds no order and takes any n.",
          insight="Any number of representations, in any order, none of them changed, and with a "
                  "gradient everywhere. In a file of its own it is trained with the others.")
def own_z(answer: str) -> None:
    """Enter a Z of your own by @h.fusion, and give its name: of any number of representations
    [N, d] it makes one, [N, any width], and does not mind their order.
    """
    expect(isinstance(answer, str), "Give the name of the fusion, as a text.")
    expect(answer.lower() in FUSIONS, f"There is no fusion {answer!r}: write @h.fusion(\"its "
           "equation\") above it, and run that cell.")
    expect(FUSIONS[answer.lower()].z.__module__ != FUSIONS["add"].z.__module__,
           f"{answer!r} is a fusion of this study. Write one of your own.")
    for n in (2, 5):
        z = FUSIONS[answer.lower()].make(6, n)
        draw = torch.Generator().manual_seed(n)
        rows = [torch.randn(4, 6, generator=draw) for _ in range(n)]
        rows[0][0] = 0.0
        look_at_result(z, rows)
        look_at_gradient(z, rows)


def look_at_result(z: Callable, rows: list[Tensor]) -> None:
    """NotYet unless it is one vector a row, in any order of the representations, which stay."""
    before, of = [row.clone() for row in rows], f"Of {len(rows)} representations [4, 6] "
    found = z(*rows)
    if found is None:
        raise Unanswered
    expect(isinstance(found, Tensor), f"{of}it makes {type(found).__name__}, no tensor.")
    expect(all(map(torch.equal, rows, before)), f"{of}it changes one in place, as += and names "
           "that end in _ do. What reads them next would read what it left: make a new one.")
    expect(found.ndim == 2 and len(found) == 4, f"{of}it makes {list(found.shape)}, and should "
           "make [4, any width]: one vector for each product.")
    alone = z(*(row[1:2] for row in rows))
    same(alone.detach(), found[1:2].detach(), "What it makes of a product changes with the other "
         "products of the batch: fuse the representations, not the rows.", 1e-4)
    turned = z(*rows[::-1]).detach()
    same(turned, found.detach(), f"{of}in the opposite order it makes something else.", 1e-4)


def look_at_gradient(z: Callable, rows: list[Tensor]) -> None:
    """NotYet unless numbers and gradients are finite, at 0 and below it too."""
    rows = [row.clone().requires_grad_() for row in rows]
    found = z(*rows)
    expect(bool(found.isfinite().all()), "Its numbers are not all finite: representations hold 0 "
           "and numbers below 0 too.")
    expect(found.requires_grad, "No gradient comes through it, so what stands before it cannot "
           "learn: stay with PyTorch's functions, without detach and numpy.")
    found.sum().backward()
    expect(all(row.grad is None or bool(row.grad.isfinite().all()) for row in rows),
           "Its gradient is not finite where a representation is 0, as that of a root or a "
           "logarithm: add a small number first. One such step, and all weights are nan.")
