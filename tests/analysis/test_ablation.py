"""Statistics of simulated studies with known truth, and of run folders."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from segformer_pl.analysis.ablation import (
    MEASURES,
    leave_one_out,
    read_results,
    summarize_study,
)
from segformer_pl.analysis.comparison import block_starts, compare_evaluations, holm
from segformer_pl.analysis.crossed_effects import mean_difference
from segformer_pl.errors import UserError
from segformer_pl.metrics import miou

BASE = np.array([1.8, 1.0, 0.2])  # logit of the share of correct pixels, by class


def simulate(
    generator, num_seeds, num_images, effects, seeds=0.0, shared=0.0, images=0.0, noise=0.3
):
    """Counts (V, S, N, C, 3) of variants with true effects on the logit of the correct share.

    Args:
        effects: Effect of each variant.
        seeds: Standard deviation of the effect of a seed on one variant.
        shared: Standard deviation of the effect of a seed on all variants alike.
        images: Standard deviation of the effect of an image on one variant, for all of its seeds.
        noise: Standard deviation of the effect of an image on one training.
    """
    num_variants, num_classes = len(effects), len(BASE)

    def effect(sd, *shape):
        return sd * generator.standard_normal(shape)

    logit = (
        BASE
        + np.reshape(effects, (-1, 1, 1, 1))
        + effect(seeds, num_variants, num_seeds, 1, 1)
        + effect(shared, 1, num_seeds, 1, 1)
        + effect(0.8, 1, 1, num_images, num_classes)  # images are hard or easy for all
        + effect(images, num_variants, 1, num_images, num_classes)
        + effect(noise, num_variants, num_seeds, num_images, num_classes)
    )
    labelled = generator.integers(0, 200, (num_images, num_classes))
    correct = generator.binomial(np.broadcast_to(labelled, logit.shape), expit(logit))
    # The wrong pixels of a class are predicted as the next one.
    predicted = correct + np.roll(labelled - correct, 1, axis=-1)
    return np.stack([correct, np.broadcast_to(labelled, logit.shape), predicted], axis=-1)


def estimate(make_evaluation, counts, measure="miou"):
    """Estimate of variant 1 - variant 0, as summarize_study makes it."""
    starts = block_starts(counts.shape[2], 1)
    a, b = (
        [leave_one_out(make_evaluation(one), MEASURES[measure], starts) for one in variant]
        for variant in counts
    )
    return mean_difference(
        np.array([y.value - x.value for x, y in zip(a, b)]),
        np.stack([y.left_out - x.left_out for x, y in zip(a, b)]),
    )


# Simulated studies with known truth

SCENARIOS = {
    # Trainings differ between seeds, and the same images are as good for both variants.
    "seeds": {"seeds": 0.15, "shared": 0.2},
    # Some images suit one variant, whatever the seed.
    "images": {"images": 0.8},
    "both": {"seeds": 0.06, "shared": 0.1, "images": 0.6},
    "noise": {"noise": 0.8},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "num_seeds", "most"),
    [*((scenario, 3, 0.095) for scenario in SCENARIOS), ("both", 2, 0.13)],
)
def test_false_alarms_without_a_difference(make_evaluation, scenario, num_seeds, most):
    """Both variants are the same in distribution, so the true difference is 0 exactly.

    A difference is a false alarm if and only if its interval does not cover 0.
    """
    generator = np.random.default_rng(0)
    num_studies, alarms, naive = 300, 0, {"seeds": 0, "images": 0}
    for _ in range(num_studies):
        counts = simulate(generator, num_seeds, 100, (0.0, 0.0), **SCENARIOS[scenario])
        result = estimate(make_evaluation, counts)
        assert (result.p_value < 0.05) == (not result.low <= 0 <= result.high)
        alarms += result.p_value < 0.05
        for source, error, df in (
            ("seeds", result.se_seeds, num_seeds - 1),
            ("images", result.se_images, 99),
        ):
            naive[source] += abs(result.value) > stats.t.ppf(0.975, df) * error
    # The standard deviation of a share of 0.05 is 0.013.
    assert 0.01 <= alarms / num_studies <= most
    # An interval from the other source alone is too narrow, and fails this test.
    if scenario == "seeds":
        assert naive["images"] / num_studies > 0.3
    if scenario == "images":
        assert naive["seeds"] / num_studies > 0.14


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["miou", "worst_decile"])
def test_coverage_of_a_true_difference(make_evaluation, measure):
    generator = np.random.default_rng(1)
    setting = {"effects": (0.0, 0.3), "seeds": 0.1, "images": 0.3}
    population = simulate(generator, 30, 4000, **setting)
    # The average over many seeds, each evaluated on many images. Metrics of finite sets have a
    # small bias, which both variants share.
    values = [[MEASURES[measure].of(one)[0] for one in variant] for variant in population]
    truth = np.diff(np.mean(values, axis=1))[0]
    assert truth > 0.03
    covered = 0
    for _ in range(150):
        result = estimate(make_evaluation, simulate(generator, 3, 100, **setting), measure)
        covered += result.low <= truth <= result.high
    # The standard deviation of a share of 0.95 is 0.018.
    assert 0.89 <= covered / 150 <= 0.99


def test_standard_errors_equal_those_of_a_hierarchical_bootstrap(make_evaluation):
    """Images and seeds are drawn with replacement, for all variants alike."""
    generator = np.random.default_rng(2)
    num_seeds, num_images = 30, 150
    counts = simulate(generator, num_seeds, num_images, (0.0, 0.2), seeds=0.1, images=0.5)
    result = estimate(make_evaluation, counts)
    weights = generator.multinomial(num_images, np.full(num_images, 1 / num_images), 1500)
    values = np.array([[miou(one, weights) for one in variant] for variant in counts])
    by_seed = values[1] - values[0]  # (S, R)
    drawn = generator.integers(num_seeds, size=(1500, num_seeds))
    means = np.array([by_seed[seeds, r].mean() for r, seeds in enumerate(drawn)])
    # With many seeds and little noise, the interaction that the bootstrap counts twice is small.
    assert by_seed.mean(axis=0).std() == pytest.approx(result.se_images, rel=0.1)
    assert means.std() == pytest.approx(math.hypot(result.se_seeds, result.se_images), rel=0.1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert (result.low, result.high) == pytest.approx((low, high), abs=0.15 * (high - low))


# Summaries of run folders


@pytest.fixture
def write_study(tmp_path, write_run):
    """Function (counts (V, S, N, C, 3)) -> results of a study with variants base, a, b, ..."""

    def write(counts, **options):
        for variant, (name, by_seed) in enumerate(zip(["base", "a", "b", "c"], counts)):
            changes = {"size": variant} if variant else {}
            for seed, one in enumerate(by_seed):
                write_run(tmp_path / "demo", name, seed, one, changes, **options)
        return read_results(tmp_path / "demo", "small")

    return write


@pytest.mark.slow
def test_summary_of_a_study(write_study, make_evaluation):
    counts = simulate(np.random.default_rng(3), 3, 60, (0.0, 0.6, 0.0), seeds=0.02, shared=0.1)
    summary = summarize_study(write_study(counts))
    assert [one.variant for one in summary.variants] == ["base", "a", "b"]
    assert (summary.measure, summary.num_images, summary.omitted) == ("miou", 60, ())
    values = np.array([[make_evaluation(one).miou for one in variant] for variant in counts])
    base = summary.variants[0]
    assert list(base.values) == [0, 1, 2]
    assert list(base.values.values()) == pytest.approx(values[0])
    interval = stats.ttest_1samp(values[0], 0).confidence_interval()
    assert (base.low, base.high) == pytest.approx(tuple(interval))
    assert base.sd == pytest.approx(values[0].std(ddof=1))

    a, b = summary.differences
    assert list(a.values.values()) == pytest.approx(values[1] - values[0])
    expected = estimate(make_evaluation, counts[:2])
    for name, value in vars(expected).items():
        assert getattr(a, name) == pytest.approx(value)
    assert (a.is_resolved, b.is_resolved) == (True, False)
    assert a.verdict.startswith("resolved: +")
    assert b.verdict.startswith("not resolved: ")
    assert [a.p_holm, b.p_holm] == pytest.approx(holm(np.array([a.p_value, b.p_value])))
    assert 0 < b.share_of_images < 1
    sd = np.sqrt((values[0].var(ddof=1) + values[1].var(ddof=1)) / 2)
    # 1 - 3 / (4 df - 1), the usual approximation of the correction, with df = 4
    assert a.effect_size == pytest.approx(a.value / sd * (1 - 3 / 15), rel=5e-3)
    assert "Satterthwaite" in summary.method
    assert "comparisons (2, Holm)" in summary.method


@pytest.mark.slow
def test_the_correction_of_p_values_is_that_of_statsmodels():
    from statsmodels.stats.multitest import multipletests

    for p_values in np.random.default_rng(0).random((3, 9)) ** 3:
        expected = multipletests(p_values, method="holm")[1]
        assert holm(p_values) == pytest.approx(expected)


@pytest.mark.slow
def test_classes_of_a_difference(write_study, make_evaluation):
    counts = simulate(np.random.default_rng(4), 3, 60, (0.0, 0.4))
    counts[..., 2, :] = 0
    counts[:, :, 0, 2, :] = 9, 10, 10  # class 2 is in one image alone
    (difference,) = summarize_study(write_study(counts)).differences
    iou = np.array([[make_evaluation(one).iou for one in variant] for variant in counts])
    assert [one.name for one in difference.classes] == ["class 0", "class 1", "class 2"]
    for c, one in enumerate(difference.classes):
        assert (one.iou_a, one.iou_b) == pytest.approx(tuple(iou[..., c].mean(axis=1)))
        assert one.difference.value == pytest.approx(one.iou_b - one.iou_a)
    first, _, last = difference.classes
    assert first.is_significant
    assert first.difference.low < first.difference.value < first.difference.high
    assert last.num_images == 1
    assert np.isnan([last.p_value, last.difference.low]).all()  # nothing is known of other images


def test_images_alone_agree_with_the_paired_bootstrap_of_two_runs(write_study, make_evaluation):
    counts = simulate(np.random.default_rng(5), 1, 150, (0.0, 0.2), images=0.3)
    summary = summarize_study(write_study(counts))
    (one,) = summary.differences
    pair = compare_evaluations(*(make_evaluation(variant[0]) for variant in counts))
    expected = (pair.difference.low, pair.difference.high)
    width = pair.difference.high - pair.difference.low
    assert (one.low, one.high) == pytest.approx(expected, abs=0.1 * width)
    assert (one.num_seeds, one.is_resolved, one.seeds_for_one_point) == (1, False, None)
    assert np.isnan([one.p_value, one.p_holm, one.effect_size, one.se_seeds]).all()
    assert "with one seed nothing is known about the spread between seeds" in one.verdict
    assert np.isnan([summary.variants[0].low, summary.variants[0].sd]).all()
    assert "With one seed" in summary.method


@pytest.mark.slow
def test_verdict_says_what_more_seeds_would_resolve(write_study):
    generator = np.random.default_rng(6)
    counts = simulate(generator, 3, 400, (0.0, 0.0), seeds=0.05, noise=0.1)
    (one,) = summarize_study(write_study(counts)).differences
    assert one.seeds_for_one_point > 3
    more = one.seeds_for_one_point - 3
    assert one.verdict.endswith(f"; {more} more seeds would resolve a difference of 1 point")


@pytest.mark.slow
def test_verdict_says_that_images_alone_are_too_few(write_study):
    counts = simulate(np.random.default_rng(7), 3, 20, (0.0, 0.0), images=0.8)
    (one,) = summarize_study(write_study(counts)).differences
    assert one.seeds_for_one_point is None
    assert "no number of seeds would resolve a difference of 1 point" in one.verdict


@pytest.mark.slow
def test_runs_without_any_difference(write_study):
    counts = simulate(np.random.default_rng(8), 2, 20, (0.0,))
    (one,) = summarize_study(write_study(np.concatenate([counts, counts]))).differences
    assert (one.value, one.p_value) == (0, 1)
    assert one.verdict == "not resolved: all runs give the same values as the reference"
    assert np.isnan(one.share_of_images)


def test_only_common_seeds_are_paired(write_study, write_run, tmp_path):
    counts = simulate(np.random.default_rng(9), 3, 20, (0.0, 0.1, 0.2, 0.3))
    write_study(counts[:1, :2])
    for variant, seed in (("a", 1), ("a", 2), ("b", 2)):
        write_run(tmp_path / "demo", variant, seed, counts[1, seed], {"size": variant})
    write_run(tmp_path / "demo", "c", 0, None, {"size": 3})
    summary = summarize_study(read_results(tmp_path / "demo", "small"))
    (one,) = summary.differences
    assert (one.variant, list(one.values)) == ("a", [1])
    assert list(summary.variants[1].values) == [1, 2]
    assert summary.omitted == (
        "no finished seed of variant 'b' is also one of the reference 'base', so there is no "
        "difference",
        "no run of variant 'c' is finished",
    )


@pytest.mark.slow
def test_named_evaluation(write_study, tmp_path, make_evaluation):
    counts = simulate(np.random.default_rng(10), 2, 20, (0.0, 0.1, 0.2))
    results = write_study(counts[:2], named=["at_96"])
    for run in results.runs["a"].values():
        file = run.folder / "evaluations" / "at_96" / "evaluation" / "val_step_0000000.npz"
        make_evaluation(counts[2, 0]).save(file)
    results = read_results(tmp_path / "demo", "small")
    summary = summarize_study(results, evaluation="at_96")
    assert set(summary.variants[1].values.values()) == {make_evaluation(counts[2, 0]).miou}
    with pytest.raises(UserError, match=r"no evaluation 'at_48' \(it has: at_96\)"):
        summarize_study(results, evaluation="at_48")


@pytest.mark.slow
def test_images_in_another_order_are_paired_by_id(tmp_path, write_run, make_evaluation):
    counts = simulate(np.random.default_rng(11), 2, 20, (0.0, 0.1))
    for seed, (variant, name) in product((0, 1), enumerate(("base", "a"))):
        one = make_evaluation(counts[variant, seed])
        if variant:
            one = make_evaluation(one.counts[::-1], ids=one.ids[::-1])
        write_run(tmp_path, name, seed, changes={"size": variant}, written=one)
    (difference,) = summarize_study(read_results(tmp_path, "small")).differences
    expected = estimate(make_evaluation, counts)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.slow
def test_neighbouring_images_are_left_out_together(write_study):
    counts = simulate(np.random.default_rng(12), 3, 30, (0.0, 0.2), images=0.5)
    results = write_study(np.repeat(counts, 4, axis=2))  # each image four times, as in a video
    single, blocks = (summarize_study(results, block_size=size) for size in (1, 4))
    # Treating four equal images as independent halves the standard error.
    ratio = blocks.differences[0].se_images / single.differences[0].se_images
    assert ratio == pytest.approx(2, rel=0.05)
    assert "blocks of 4 neighbours" in blocks.method


@pytest.mark.parametrize("measure", MEASURES)
def test_left_out_images_are_not_counted(make_evaluation, measure):
    counts = simulate(np.random.default_rng(13), 1, 25, (0.0,))[0, 0]
    result = leave_one_out(make_evaluation(counts), MEASURES[measure], block_starts(25, 10))
    for block, start in enumerate((0, 10, 20)):
        rest = np.delete(counts, np.s_[start : start + 10], axis=0)
        assert result.left_out[block] == pytest.approx(MEASURES[measure].of(rest)[0])
        assert result.iou_left_out[block] == pytest.approx(make_evaluation(rest).iou)


def test_what_cannot_be_summarized(write_study, tmp_path, write_run):
    counts = simulate(np.random.default_rng(14), 2, 10, (0.0, 0.1))
    results = write_study(counts)
    with pytest.raises(UserError, match="measure 'dice' is unknown; give one of miou, "):
        summarize_study(results, "dice")
    with pytest.raises(UserError, match="10 images in blocks of 10 make 1 block"):
        summarize_study(results, block_size=10)
    with pytest.raises(UserError, match="--block_size is 0"):
        summarize_study(results, block_size=0)
    write_run(tmp_path / "early", "a", 0, counts[1, 0], {"size": 1})
    with pytest.raises(UserError, match="no run of the reference 'base' is finished"):
        summarize_study(read_results(tmp_path / "early", "small"))
