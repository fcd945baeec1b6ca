"""A fusion of one's own, as a user would write it: `--set fusions=tests/own_fusions.py`."""
import math

import helpers as h


@h.fusion(r"\sqrt{|x_1 x_2|}")
def geometric(*x):
    """The square root of what two multiply to."""
    return math.prod(x).abs().sqrt()
