"""Estimates without their bias of order 1/N, and confidence intervals, from leaving groups out.

An area or a radius of an averaged map is no average: noise that more pictures would have averaged
out makes a field look smaller than it is, by an amount that falls as 1/N. What is seen when one
group of pictures after the other is left out tells how much, and how sure the number is.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Estimate(NamedTuple):
    """Values, as numbers or arrays, with the bounds of their confidence interval; these are nan
    where there is but one group."""

    value: Any
    low: Any
    high: Any


def jackknife(whole: Any, without: Any, counts: npt.NDArray[np.int64], level: float) -> Estimate:
    """The delete-a-group jackknife for groups of unequal size (Busing et al. 1999).

    Args:
        whole: The number, or (K,) of them, of all pictures.
        without: (G,) or (G, K), with one group left out.
        counts: (G,), pictures in each group.
        level: Of confidence, for Student's t with G - 1 degrees of freedom.
    """
    whole = np.asarray(whole, dtype=np.float64)
    if len(counts) < 2:
        nothing = np.full_like(whole, np.nan)
        return Estimate(whole, nothing, nothing)
    inverse = (counts.sum() / counts).reshape(-1, *[1] * whole.ndim)
    pseudo = inverse * whole - (inverse - 1) * np.asarray(without)
    value = whole + ((1 - 1 / inverse) * (whole - np.asarray(without))).sum(0)
    error = np.sqrt(((pseudo - value) ** 2 / (inverse - 1)).mean(0))
    reach = student_t(level, len(counts) - 1) * error
    return Estimate(value, value - reach, value + reach)


def student_t(level: float, freedom: int) -> float:
    """The bound that Student's t stays within, on either side, with this probability.

    The probability is a finite sum of powers of the cosine for whole degrees of freedom
    (Abramowitz and Stegun 26.7.3 and 26.7.4); the bound is found by bisection of the angle.
    """

    def probability(angle: float) -> float:
        sine, cosine = math.sin(angle), math.cos(angle)
        is_odd = freedom % 2
        term, total = (cosine, 0.0) if is_odd else (1.0, 0.0)
        for k in range(1 + is_odd, freedom, 2):
            total += term
            term *= cosine**2 * k / (k + 1)
        return 2 / math.pi * (angle + sine * total) if is_odd else sine * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
