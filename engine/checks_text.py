"""The exercises of the notebooks 02 to 04."""
from __future__ import annotations

from collections.abc import Callable

import torch

from engine.exercises import exercise, expect, same


@exercise(hint="Multiply by the mask before you add, and divide by the sum of the mask.",
          insight="Padding has no say, so a text's vector does not depend on what it is batched "
                  "with.")
def masked_mean(answer: Callable) -> None:
    """Write a function of states [N, length, d] and mask [N, length], 1 for a token and 0 for
    padding, that returns the mean of each text's tokens, [N, d].
    """
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [90.0, 90.0]],
                           [[5.0, 6.0], [7.0, 8.0], [9.0, 1.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = answer(states, mask)
    same(found[1], [7.0, 5.0], "A text without padding should give the mean of its tokens.")
    same(found, [[2.0, 3.0], [7.0, 5.0]], "The padding of the first text still counts.")
    expect(bool(torch.isfinite(answer(states, mask * 0)).all()),
           "A text without any token gives no finite numbers: let the divisor be at least 1.")
