"""What a planned study can find: the minimum detectable difference, and the seeds it takes."""

import numpy as np
from scipy.optimize import brentq
from scipy.stats import nct, norm
from scipy.stats import t as student

from segformer_pl.analysis.comparison import ALPHA

POWER = 0.8
ONE_POINT = 0.01
MAX_SEEDS = 1_000_000
# Of more degrees of freedom Student's t is normal to four digits, and scipy's noncentral t slow.
MANY_DEGREES = 10_000


def minimum_detectable_difference(
    sd_seeds: float,
    sd_images: float,
    num_seeds: int,
    num_comparisons: int,
    power: float = POWER,
) -> float:
    """Return the smallest true difference that the study finds with the given power.

    It is found if the t test of :mod:`.crossed_effects` has a p-value below 5 % divided by the
    number of comparisons, which is Holm's first and strictest step.

    Args:
        sd_seeds: Standard deviation between seeds of the difference to the reference.
        sd_images: Standard error of that difference from the choice of images, of the whole set.
        num_seeds: Number of seeds of each variant.
        num_comparisons: Number of variants that are compared with the reference.
        power: Probability of finding the difference.

    Returns:
        A difference in the unit of the standard deviations. Infinity with one seed, which says
        nothing about the spread between seeds.
    """
    if num_seeds < 2:
        return np.inf
    of_seeds = sd_seeds**2 / num_seeds
    variance = of_seeds + sd_images**2
    if variance == 0:
        return 0.0
    df = variance**2 / (of_seeds**2 / (num_seeds - 1)) if of_seeds else np.inf
    return float(np.sqrt(variance) * _detectable_ratio(df, ALPHA / num_comparisons, power))


def seeds_for_difference(
    difference: float, sd_seeds: float, sd_images: float, num_comparisons: int
) -> int | None:
    """Return the number of seeds that find a difference with a power of 80 %; None if none does.

    Args:
        difference: True difference to find.
        sd_seeds: See :func:`minimum_detectable_difference`.
        sd_images: See there. More seeds do not reduce it.
        num_comparisons: See there.
    """

    def is_enough(num_seeds: int) -> bool:
        detectable = minimum_detectable_difference(sd_seeds, sd_images, num_seeds, num_comparisons)
        return detectable <= difference

    # No number of seeds is enough that is not enough with known standard deviations. Starting from
    # there saves most evaluations of scipy's noncentral t, which took a third of a report's time.
    normal = _detectable_ratio(np.inf, ALPHA / num_comparisons, POWER)
    of_seeds = (difference / normal) ** 2 - sd_images**2
    if not (of_seeds > 0 and sd_seeds**2 <= of_seeds * MAX_SEEDS):  # also if one of them is nan
        return None
    too_few = max(1, int(sd_seeds**2 / of_seeds) - 1)
    enough, step = too_few + 1, 1
    while not is_enough(enough):
        if enough >= MAX_SEEDS:
            return None
        too_few, enough, step = enough, enough + step, 2 * step
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if is_enough(middle) else (middle, enough)
    return enough


def _detectable_ratio(df: float, alpha: float, power: float) -> float:
    """Return the difference, in standard errors, that a two-sided t test finds."""
    if df > MANY_DEGREES:
        return float(norm.ppf(1 - alpha / 2) + norm.ppf(power))
    critical = student.ppf(1 - alpha / 2, df)

    def excess(ratio: float) -> float:
        # Without the tail of the wrong sign: it is negligible, and scipy's is sometimes nan.
        return float(nct.sf(critical, df, ratio) - power)

    # With few degrees of freedom the ratio can be some multiples of the critical value.
    high = 2 * critical + 10
    return float(brentq(excess, 0, high, xtol=1e-6))
