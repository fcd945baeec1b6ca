"""The exercises of notebook 12."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.exercises import exercise, expect, same


@exercise(hint="`+=` writes into its left side, and the plus of two lists joins them. "
               "`np.sum(..., axis=0)` makes a new array of whatever it is given.",
          insight="What goes in is as it was, and every vector has a say.")
def fused_sum(answer: Callable) -> None:
    """Write a function of a list of vectors of one length, arrays or plain lists, that returns
    their sum and changes none of them.
    """
    title, description, picture = np.array([1.0, 2.0]), np.array([10.0, 20.0]), np.array([5.0, 0.0])
    given = [title, description, picture]
    found = np.array(answer(given))
    expect(len(given) == 3 and np.array_equal(title, [1.0, 2.0]),
           "The sum may be right, but the first vector is no longer what it was.")
    expect(np.array_equal([description, picture], [[10.0, 20.0], [5.0, 0.0]]),
           "A vector is no longer what it was.")
    same(found, [16.0, 22.0], "Three vectors have another sum.")
    same(answer([[1.0, 2.0], [10.0, 20.0]]), [11.0, 22.0],
         "Of two plain lists your function does not return the sum.")


@exercise(hint="Bring the ids into an order of their own first, for example sorted. Then draw with "
               "a generator that the seed makes.",
          insight="Text and picture of a product are now always in the same part, whoever loads "
                  "them.")
def part_by_id(answer: Callable) -> None:
    """Write a function of product ids and a seed that returns the ids of the test part, a fifth of
    them, the same in whatever order the ids come.
    """
    rng = np.random.default_rng(12)
    ids = 4_000_000 + 37 * rng.permutation(200)
    found = np.asarray(answer(ids.copy(), 0))
    expect(found.ndim == 1 and bool(np.isin(found, ids).all()),
           "Return ids, and only such as were given.")
    expect(len(found) == len(np.unique(found)) == 40,
           f"A fifth of {len(ids)} products are 40; yours are {len(np.unique(found))}.")
    expect(set(found) == set(answer(ids.copy(), 0)), "Called twice, it gives two test parts.")
    expect(all(set(found) == set(answer(rng.permutation(ids), 0)) for _ in range(5)),
           "In another order the same ids get another test part: a loader of pictures and a "
           "loader of texts would not agree.")
    expect(set(found) != set(answer(ids.copy(), 1)), "Another seed gives the same part.")


def fits(train: np.ndarray) -> list[tuple[str, Callable, bool]]:
    """(what is fitted, function of rows, whether it looks at rows that are not for training)."""
    return [("the mean of the training rows", lambda x: x[train].mean(0), False),
            ("the mean of all rows", lambda x: x.mean(0), True),
            ("the deviation of all rows", lambda x: x.std(0), True),
            ("the maximum of the training rows", lambda x: x[train].max(0), False),
            ("the maximum of all rows", lambda x: x.max(0), True),
            ("the minimum of all rows", lambda x: x.min(0), True)]


@exercise(hint="Copy x, write something into the copy's test rows that nobody could overlook, "
               "and compare what is fitted on both. A number that is not a number spreads.",
          insight="It works for any fit, whatever is inside: scaling, vocabulary, choice of "
                  "columns.")
def looks_at_test(answer: Callable) -> None:
    """Write a check of fit(x), rows x [n, d] and train [n], true for training rows: whether what
    is fitted depends on the other rows.
    """
    rng = np.random.default_rng(12)
    for _ in range(3):
        x, train = rng.normal(size=(50, 3)), rng.permutation(50) < 40
        before = x.copy()
        for fitted, fit, looks in fits(train):
            found = answer(fit, x, train)
            expect(np.array_equal(x, before),
                   "Your check changes x itself: whoever reads x afterwards reads something else.")
            expect(bool(found) or not looks, f"{fitted.capitalize()} is fitted, and your check "
                                             "does not see that this depends on test rows.")
            expect(looks or not found, f"{fitted.capitalize()} is fitted, and your check blames "
                                       "it.")
