"""Minimum detectable differences against statsmodels and simulated t tests."""

import numpy as np
import pytest
from scipy import stats

from segformer_pl.analysis import study_power
from segformer_pl.analysis.study_power import (
    minimum_detectable_difference,
    seeds_for_difference,
)


@pytest.mark.parametrize("num_comparisons", [1, 6])
@pytest.mark.parametrize("num_seeds", [3, 5, 30])
def test_power_of_the_detectable_difference_is_that_of_statsmodels(num_seeds, num_comparisons):
    from statsmodels.stats.power import TTestPower

    difference = minimum_detectable_difference(0.02, 0.0, num_seeds, num_comparisons)
    power = TTestPower().power(difference / 0.02, num_seeds, 0.05 / num_comparisons)
    assert power == pytest.approx(0.8, abs=1e-4)


def test_detectable_difference_is_found_in_four_of_five_simulated_studies():
    generator = np.random.default_rng(0)
    num_seeds, sd_seeds, sd_images = 4, 0.01, 0.006
    difference = minimum_detectable_difference(sd_seeds, sd_images, num_seeds, 3)
    shape = (20_000, num_seeds)
    drawn = difference + sd_seeds * generator.standard_normal(shape)
    mean = drawn.mean(axis=1) + sd_images * generator.standard_normal(len(drawn))
    of_seeds = drawn.var(axis=1, ddof=1) / num_seeds
    variance = of_seeds + sd_images**2
    df = variance**2 / (of_seeds**2 / (num_seeds - 1))
    found = 2 * stats.t.sf(np.abs(mean) / np.sqrt(variance), df) < 0.05 / 3
    # The degrees of freedom are estimated in every study, so the power is not exactly 0.8.
    assert found.mean() == pytest.approx(0.8, abs=0.04)


def test_images_alone_bound_what_seeds_can_find():
    detectable = [minimum_detectable_difference(0.01, 0.005, n, 2) for n in (1, 2, 3, 10, 10**6)]
    assert detectable[0] == np.inf  # one seed does not show the spread between seeds
    assert detectable == sorted(detectable, reverse=True)
    bound = (stats.norm.ppf(1 - 0.025 / 2) + stats.norm.ppf(0.8)) * 0.005
    assert detectable[-1] == pytest.approx(bound, rel=1e-3)
    assert minimum_detectable_difference(0, 0, 3, 1) == 0


def test_number_of_seeds_is_the_smallest_that_suffices():
    needed = seeds_for_difference(0.01, 0.02, 0.002, 4)
    assert minimum_detectable_difference(0.02, 0.002, needed, 4) <= 0.01
    assert minimum_detectable_difference(0.02, 0.002, needed - 1, 4) > 0.01
    assert seeds_for_difference(0.01, 0.0, 0.0, 4) == 2
    assert seeds_for_difference(0.01, 0.02, 0.004, 4) is None


def test_the_smallest_number_of_seeds_is_found_with_few_trials(monkeypatch):
    """The noncentral t of every trial took a third of the time of a report."""
    trials = []
    detectable = study_power.minimum_detectable_difference

    def counted(*arguments):
        trials.append(arguments)
        return detectable(*arguments)

    monkeypatch.setattr(study_power, "minimum_detectable_difference", counted)
    for difference, sd_seeds, sd_images, num in (
        (0.01, 0.0001, 0.0, 1),
        (0.01, 0.01, 0.001, 1),
        (0.01, 0.02, 0.002, 4),
        (0.01, 0.08, 0.0026, 7),
        (0.02, 0.6, 0.0, 30),
    ):
        trials.clear()
        needed = seeds_for_difference(difference, sd_seeds, sd_images, num)
        assert len(trials) <= 8
        assert detectable(sd_seeds, sd_images, needed, num) <= difference
        assert needed == 2 or detectable(sd_seeds, sd_images, needed - 1, num) > difference
    trials.clear()
    assert seeds_for_difference(0.01, 0.02, 0.004, 4) is None
    assert seeds_for_difference(0.01, 1000.0, 0.0, 4) is None
    assert seeds_for_difference(0.01, 0.02, float("nan"), 4) is None
    assert seeds_for_difference(0.01, float("nan"), 0.0, 4) is None
    assert not trials
