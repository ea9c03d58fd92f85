"""The jackknife against textbook intervals, for which scipy.stats is the reference."""

import numpy as np
import pytest
from scipy.stats import sem, t

from segformer_pl.analysis.erf.jackknife import jackknife


def of_mean(samples, level):
    """The jackknife of a mean, one sample per group."""
    leave_one_out = [np.delete(samples, group).mean() for group in range(len(samples))]
    return jackknife(samples.mean(), leave_one_out, np.ones(len(samples), int), level)


@pytest.mark.parametrize("num_groups", [2, 3, 4, 9, 16, 41])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_interval_of_a_mean_is_that_of_students_t(num_groups, level):
    samples = np.random.default_rng(num_groups).normal(size=num_groups)
    value, low, high = of_mean(samples, level)
    assert value == pytest.approx(samples.mean(), rel=1e-9)
    expected = t.interval(level, num_groups - 1, samples.mean(), sem(samples))
    assert (low, high) == pytest.approx(expected, rel=1e-9)


def test_students_t():
    """Two-sided 95 and 99 % quantiles from a table."""
    bounds = {1: 12.706, 2: 4.303, 3: 3.182, 7: 2.365, 15: 2.131, 30: 2.042}
    cases = [(0.95, freedom, bound) for freedom, bound in bounds.items()] + [(0.99, 15, 2.947)]
    for level, freedom, bound in cases:
        samples = np.random.default_rng(0).normal(size=freedom + 1)
        value, _, high = of_mean(samples, level)
        assert (high - value) / sem(samples) == pytest.approx(bound, abs=6e-4)


def test_bias_of_order_1_over_n_is_removed():
    """The variance with denominator N is biased by -1/N; the jackknife gives that with N - 1."""
    samples = np.random.default_rng(0).normal(size=12)
    leave_one_out = [np.delete(samples, group).var() for group in range(12)]
    value, _, _ = jackknife(samples.var(), leave_one_out, np.ones(12, int), 0.95)
    assert value == pytest.approx(samples.var(ddof=1), rel=1e-12)


def test_one_group_has_no_interval():
    value, low, high = jackknife([3.0, 4.0], [], np.array([5]), 0.95)
    assert [*value] == [3, 4]
    assert np.isnan([low, high]).all()


def test_groups_of_unequal_size_count_by_their_images():
    """The pseudo-values of a mean are the group means, so there is no bias to correct."""
    rng = np.random.default_rng(0)
    counts = np.array([3, 3, 2, 1])
    samples = [rng.normal(size=count) for count in counts]
    whole = np.concatenate(samples).mean()
    without = [
        np.concatenate([*samples[:group], *samples[group + 1 :]]).mean() for group in range(4)
    ]
    value, low, high = jackknife(whole, without, counts, 0.95)
    assert value == pytest.approx(whole)
    assert (low + high) / 2 == pytest.approx(whole)
