"""Bias-corrected estimates and confidence intervals by the delete-a-group jackknife.

The area or the radius of an averaged map is not the average of areas or radii. Noise that more
images would have averaged out makes a receptive field look smaller than it is, by an amount that
falls as 1/N in the number of images N. Computing the number again with one group left out shows how
large this bias is, and how uncertain the number is. With four groups of equal size::

    theta      from groups  1 2 3 4
    theta_(1)  from groups    2 3 4
    theta_(2)  from groups  1   3 4        pseudo-value  J_g = 4 theta - 3 theta_(g)
    theta_(3)  from groups  1 2   4        estimate      mean of the J_g
    theta_(4)  from groups  1 2 3          error         std of the J_g / sqrt(4)

If theta = true + b / N, leaving out a quarter gives true + 4/3 b / N on average, and
4 theta - 3 theta_(g) has no b left.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit


class Interval(NamedTuple):
    """A value with the bounds of its confidence interval: numbers, or arrays of one shape.

    The bounds are nan where there is only one group of images.
    """

    value: Any
    low: Any
    high: Any


def jackknife(
    estimate: Any, leave_one_out: Any, counts: npt.NDArray[np.int64], level: float
) -> Interval:
    """Bias-correct an estimate and give its interval, for groups of unequal size.

    See Busing, Meijer and van der Leeden 1999, "Delete-m jackknife for unequal m".

    Args:
        estimate: Number, or (K,) numbers, computed from all images.
        leave_one_out: (G,) or (G, K), the same computed with one group left out.
        counts: (G,), number of images in each group.
        level: Confidence level of the interval, from Student's t with G - 1 degrees of freedom.
    """
    estimate = np.asarray(estimate, dtype=np.float64)
    if len(counts) < 2:
        nothing = np.full_like(estimate, np.nan)
        return Interval(estimate, nothing, nothing)
    leave_one_out = np.asarray(leave_one_out)
    inverse = (counts.sum() / counts).reshape(-1, *[1] * estimate.ndim)
    pseudo = inverse * estimate - (inverse - 1) * leave_one_out
    value = estimate + ((1 - 1 / inverse) * (estimate - leave_one_out)).sum(0)
    error = np.sqrt(((pseudo - value) ** 2 / (inverse - 1)).mean(0))
    reach = stdtrit(len(counts) - 1, (1 + level) / 2) * error
    return Interval(value, value - reach, value + reach)
