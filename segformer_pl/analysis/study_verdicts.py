"""The sentences of a study: what each difference shows, and how it was computed."""

from collections.abc import Sequence

import numpy as np

from segformer_pl.analysis.comparison import ALPHA, points
from segformer_pl.analysis.crossed_effects import MeanDifference
from segformer_pl.analysis.study_power import MAX_SEEDS, POWER, minimum_detectable_difference


def describe_outcome(
    estimate: MeanDifference,
    p_holm: float,
    num_seeds: int,
    needed: int | None,
    num_comparisons: int,
) -> str:
    """Return what the study says about one difference, as one sentence without a full stop.

    Args:
        estimate: The difference.
        p_holm: Its p-value, corrected for the number of comparisons.
        num_seeds: Number of seeds of both variants.
        needed: Number of seeds that would resolve a difference of one point; None if none would.
        num_comparisons: Number of variants that are compared with the reference.
    """
    if np.isnan(estimate.value):
        return "not resolved: the measure is not defined for all runs"
    numbers = f"{points(estimate.value)} points"
    if not np.isnan(estimate.low):
        numbers += f", 95 % CI {points(estimate.low)} to {points(estimate.high)}"
    if num_seeds == 1:
        return (
            f"not resolved: {numbers}, over images alone, holds for these two trained networks; "
            "with one seed nothing is known about the spread between seeds"
        )
    if np.isnan(estimate.p_value):
        return f"not resolved: {numbers}; the measure is not defined without some of the images"
    if estimate.se_seeds == estimate.se_images == 0 and estimate.value == 0:
        return "not resolved: all runs give the same values as the reference"
    numbers += f", p = {p_holm:.2g}"
    if p_holm < ALPHA:
        return f"resolved: {numbers}"
    if needed is None:
        least = minimum_detectable_difference(0, estimate.se_images, MAX_SEEDS, num_comparisons)
        advice = (
            "no number of seeds would resolve a difference of 1 point: the images alone leave "
            f"± {points(least)[1:]} points"
        )
    elif needed > num_seeds:
        more = needed - num_seeds
        seeds = "1 more seed" if more == 1 else f"{more:,} more seeds"
        advice = f"{seeds} would resolve a difference of 1 point"
    else:
        advice = f"{num_seeds} seeds would have resolved most differences of 1 point"
    return f"not resolved: {numbers}; {advice}"


def describe_method(title: str, num_seeds: Sequence[int], num_images: int, block_size: int) -> str:
    """Describe the method in one paragraph.

    Args:
        title: Name of the measure.
        num_seeds: Number of seeds of each difference.
        num_images: Number of images.
        block_size: Number of contiguous images that are left out together.
    """
    images = f"{num_images:,} images"
    if block_size > 1:
        images += f" in blocks of {block_size} neighbours"
    sentences = [
        f"The measure is {title}, at the end of the training, on {images}.",
        "The interval of a variant is the 95 % t interval of its mean over seeds, for these "
        "images.",
        "Differences from the reference are paired by seed and by image. Their variance is the sum "
        "of two parts: other seeds, from the spread of the differences between seeds, and other "
        "images, from the jackknife over images (crossed random effects, the interaction of seed "
        "and image counted once). Intervals and p-values are those of Student's t with "
        "Satterthwaite's degrees of freedom.",
        f"p is corrected for the number of comparisons ({len(num_seeds)}, Holm), intervals are "
        "not corrected. A difference is resolved if the corrected p is below 0.05.",
        "The effect size is Hedges' g: the difference divided by the pooled standard deviation "
        "over seeds.",
        f"The number of seeds that would resolve one point is that of a power of {POWER:.0%}, if "
        "the estimated spreads are true; with few seeds they are rough.",
    ]
    if 2 in num_seeds:
        sentences.append(
            "With two seeds the spread between seeds is hardly known: in simulations the nominal "
            "95 % interval then covers the true difference in 90 to 97 % of the studies."
        )
    if 1 in num_seeds:
        sentences.append(
            "With one seed the interval is over images alone, and says nothing about other seeds."
        )
    if block_size == 1:
        sentences.append(
            "Images are treated as independent, which makes intervals too narrow where neighbours "
            "resemble each other, as in a video."
        )
    return " ".join(sentences)
