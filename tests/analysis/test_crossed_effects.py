"""The standard error against REML of statsmodels, and known variances against simulation."""

import numpy as np
import pytest
from scipy import stats

from segformer_pl.analysis.crossed_effects import interval_over_seeds, mean_difference


def differences(generator, num_seeds, num_images, sd_seeds, sd_images, sd_both, mean=0.0):
    """Differences (S, M) with crossed random effects of the given standard deviations."""
    return (
        mean
        + sd_seeds * generator.standard_normal((num_seeds, 1))
        + sd_images * generator.standard_normal((1, num_images))
        + sd_both * generator.standard_normal((num_seeds, num_images))
    )


def estimate(table):
    """Estimate from a table whose row means are the values, so that the jackknife is exact."""
    num_images = table.shape[1]
    left_out = (table.sum(axis=1, keepdims=True) - table) / (num_images - 1)
    return mean_difference(table.mean(axis=1), left_out)


@pytest.mark.slow
def test_standard_error_equals_that_of_a_mixed_model():
    import pandas as pd
    from statsmodels.regression.mixed_linear_model import MixedLM

    table = differences(np.random.default_rng(0), 6, 25, 0.5, 1.0, 1.5, mean=0.3)
    seed, image = (index.ravel() for index in np.indices(table.shape))
    data = pd.DataFrame({"d": table.ravel(), "seed": seed, "image": image, "all": 1})
    fit = MixedLM.from_formula(
        "d ~ 1",
        groups="all",
        vc_formula={"seed": "0 + C(seed)", "image": "0 + C(image)"},
        re_formula="0",
        data=data,
    ).fit(reml=True)
    ours = estimate(table)
    # In a balanced design REML is the analysis of variance, if no component is at its bound 0.
    assert ours.se_seeds > 0
    assert ours.se_images > 0
    assert ours.value == pytest.approx(fit.params["Intercept"], rel=1e-6)
    assert np.hypot(ours.se_seeds, ours.se_images) == pytest.approx(fit.bse["Intercept"], rel=1e-3)


def test_one_source_alone_is_the_t_test_of_that_source():
    generator = np.random.default_rng(1)
    seeds = differences(generator, 4, 50, 1.0, 0.0, 0.0, mean=0.7)
    result, expected = estimate(seeds), stats.ttest_1samp(seeds[:, 0], 0)
    assert result.se_images == 0
    assert (result.p_value, result.df) == pytest.approx((expected.pvalue, 3))
    low, high = expected.confidence_interval()
    assert (result.low, result.high) == pytest.approx((low, high))
    assert interval_over_seeds(seeds[:, 0]) == pytest.approx((low, high))

    images = differences(generator, 4, 50, 0.0, 1.0, 0.0, mean=0.3)
    result, expected = estimate(images), stats.ttest_1samp(images[0], 0)
    assert result.se_seeds == pytest.approx(0, abs=1e-12)
    assert (result.p_value, result.df) == pytest.approx((expected.pvalue, 49))


def test_one_seed_covers_images_alone():
    table = differences(np.random.default_rng(2), 1, 30, 1.0, 1.0, 1.0)
    result = estimate(table)
    low, high = stats.ttest_1samp(table[0], 0).confidence_interval()
    assert (result.low, result.high) == pytest.approx((low, high))
    assert np.isnan([result.se_seeds, result.p_value]).all()
    assert np.isnan(interval_over_seeds(table[:, 0])).all()


def test_equal_runs_and_undefined_values():
    same = mean_difference(np.zeros(3), np.zeros((3, 10)))
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    left_out = np.zeros((3, 10))
    left_out[0, 0] = np.nan
    undefined = mean_difference(np.array([0.1, 0.2, 0.3]), left_out)
    assert undefined.value == pytest.approx(0.2)
    assert np.isnan([undefined.low, undefined.p_value, undefined.df]).all()


SPREADS = [
    (0.0, 0.0, 1.0),  # noise alone
    (0.1, 0.0, 1.0),
    (0.3, 0.0, 1.0),
    (0.0, 1.0, 1.0),
    (0.1, 1.0, 1.0),
    (0.2, 1.0, 0.3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("num_seeds", "least"), [(2, 0.88), (3, 0.925), (5, 0.925)])
def test_coverage_of_the_true_difference(num_seeds, least):
    """At most 0.98 as well: the interaction, counted twice, would give 0.987 for noise alone."""
    generator = np.random.default_rng(3)
    num_studies = 1000
    for spreads in SPREADS:
        covered = 0
        for _ in range(num_studies):
            result = estimate(differences(generator, num_seeds, 100, *spreads, mean=0.4))
            covered += result.low <= 0.4 <= result.high
        # The standard deviation of a share of 0.95 is 0.007.
        assert least <= covered / num_studies <= 0.98, spreads
