"""The exercises of notebook 11."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from engine.exercises import exercise, expect, same


@exercise(hint="Take the class from the first table alone, and look it up in both.",
          insight="A change of the highest probability alone would hide that the decision has "
                  "become another one.")
def change_without(answer: Callable) -> None:
    """Write a function of two tables of probabilities [N, classes], of the same products with
    everything and without one modality, that returns by how much the probability of the class
    decided with everything changes, [N].
    """
    whole = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
    without = torch.tensor([[0.3, 0.6, 0.1], [0.1, 0.5, 0.4], [0.1, 0.3, 0.6]])
    wanted = np.array([-0.4, -0.1, 0.2])
    found = np.asarray(answer(whole, without), dtype=float)
    expect(found.shape == (3,), f"Three products give 3 numbers, not a shape of {found.shape}.")
    expect(not np.allclose(found, -wanted),
           "The sign is the other way round: what is lost is below zero.")
    same(found, wanted, "In the first of three cases another class wins without the modality: the "
                        "class to follow is the one decided with everything.")
    same(answer(without, whole), [-0.4, 0.1, -0.2], "With the two tables exchanged it goes wrong.")


@exercise(hint="Divide each vector, and the query, by its length before you multiply.",
          insight="A cosine asks for the direction alone, so that a long vector is not near to "
                  "everything.")
def nearest_by_cosine(answer: Callable) -> None:
    """Write a function of vectors [N, d], a query [d] and a number k that returns the row numbers
    of the k vectors with the highest cosine to the query, the nearest first.
    """
    vectors, query = torch.tensor([[10.0, 10], [1, 0.1], [0, 2], [-3, 0]]), torch.tensor([1.0, 0])
    found = np.asarray(answer(vectors, query, 3))
    expect(found.shape == (3,), f"For k = 3 it should return 3 row numbers, not {found.shape}.")
    expect(found.tolist() != [0, 1, 2], "The longest vector wins: its length still counts.")
    expect(found.tolist() != [3, 2, 0], "These are the farthest, not the nearest.")
    same(found, [1, 0, 2], "Of (10, 10), (1, 0.1), (0, 2) and (-3, 0), the second points most "
                           "nearly as (1, 0) does, then the first, then the third.")
    random = np.random.default_rng(0)
    vectors, query = random.normal(size=(40, 5)), random.normal(size=5)
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1)
    rows = answer(torch.tensor(vectors), torch.tensor(query), 7)
    same(rows, np.argsort(-cosines)[:7], "With 40 vectors in five dimensions other rows are near.")
