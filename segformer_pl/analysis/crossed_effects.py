"""Standard error of a difference that was measured with few seeds on many images.

Both seeds and images are samples, and every seed is evaluated on every image. So the difference
d between two variants has crossed random effects (Searle, Casella and McCulloch, *Variance
Components*, 1992, chapter 5): of seed s, of image i, and of both together::

    d[s, i] = difference + seed[s] + image[i] + interaction[s, i]

                    image 0   image 1   ...   mean of the row: the difference of one seed
    seed 0            d         d               their spread: seeds, and interaction / num_images
    seed 1            d         d
    mean of the column: their spread: images, and interaction / num_seeds

mIoU is no mean over images, so d[s, i] is the jackknife influence of image i: the change of the
difference of seed s when the image is left out (Efron and Tibshirani, *An Introduction to the
Bootstrap*, 1993, chapter 11). The mean squares of a two-way analysis of variance give::

    se_seeds^2  = MS_seeds / (S M)                              with S seeds and M blocks of images
    se_images^2 = max(MS_images - MS_interaction, 0) / (S M)
    variance of the mean difference = se_seeds^2 + se_images^2

The interaction is in both mean squares, so it is subtracted once. The degrees of freedom of the
sum are Satterthwaite's (1946).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats is 50 times slower

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class MeanDifference:
    """Mean difference over seeds, with the two sources of its error.

    Attributes:
        value: Mean difference.
        low: Lower bound of the 95 % t interval; with one seed it is over images alone.
        high: Upper bound.
        se_seeds: Standard error from the choice of seeds; nan with one seed.
        se_images: Standard error from the choice of images. With one seed it includes the
            interaction.
        df: Degrees of freedom.
        p_value: Two-sided p-value of the t test; nan with one seed.
    """

    value: float
    low: float
    high: float
    se_seeds: float
    se_images: float
    df: float
    p_value: float


def mean_difference(values: Floats, left_out: Floats) -> MeanDifference:
    """Estimate the mean difference over seeds and images.

    Args:
        values: (S,), difference of each seed on all images.
        left_out: (S, M), the same without each of M blocks of images, M at least 2.
    """
    num_seeds, num_blocks = left_out.shape
    if np.isnan(values).any() or np.isnan(left_out).any():
        return MeanDifference(float(values.mean()), *[np.nan] * 6)
    value = float(values.mean())
    influence = (num_blocks - 1) * (left_out.mean(axis=1, keepdims=True) - left_out)
    common = influence.mean(axis=0)  # over seeds; its mean over images is 0
    total = num_seeds * num_blocks
    of_images = num_seeds * float((common**2).sum()) / (num_blocks - 1) / total
    if num_seeds == 1:
        se_images, df = np.sqrt(of_images), float(num_blocks - 1)
        half = stdtrit(df, (1 + CONFIDENCE) / 2) * se_images
        return MeanDifference(
            value, value - half, value + half, np.nan, float(se_images), df, np.nan
        )
    of_seeds = float(values.var(ddof=1)) / num_seeds
    degrees = (num_seeds - 1, num_blocks - 1, (num_seeds - 1) * (num_blocks - 1))
    interaction = float(((influence - common) ** 2).sum()) / degrees[2] / total
    parts = [of_seeds, of_images, -interaction] if of_images > interaction else [of_seeds]
    variance = sum(parts)
    if variance <= 0:  # all runs are the same, or all seeds
        p_value = 1.0 if value == 0 else 0.0
        return MeanDifference(value, value, value, 0.0, 0.0, np.inf, p_value)
    df = variance**2 / sum(part**2 / n for part, n in zip(parts, degrees))
    error = np.sqrt(variance)
    half = float(stdtrit(df, (1 + CONFIDENCE) / 2) * error)
    return MeanDifference(
        value=value,
        low=value - half,
        high=value + half,
        se_seeds=float(np.sqrt(of_seeds)),
        se_images=float(np.sqrt(max(variance - of_seeds, 0.0))),
        df=float(df),
        p_value=float(2 * stdtr(df, -abs(value) / error)),
    )


def interval_over_seeds(values: Floats) -> tuple[float, float]:
    """Return the 95 % t interval of the mean of values of different seeds; nan with one seed."""
    if len(values) < 2:
        return np.nan, np.nan
    error = values.std(ddof=1) / np.sqrt(len(values))
    half = stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2) * error
    return float(values.mean() - half), float(values.mean() + half)
