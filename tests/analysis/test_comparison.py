"""Intervals and tests against exhaustive enumeration and against sets whose true mIoU is known."""

import dataclasses
import json
from itertools import product

import numpy as np
import pytest

from segformer_pl.analysis.comparison import compare_evaluations, holm, miou_interval
from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.metrics import class_iou, mean_present

NAN = float("nan")
ACCURACY = np.array([0.85, 0.7, 0.5])
# Of the sets that `draw` makes. The wrong pixels of a class are predicted as the next class, so for
# L labelled pixels I = accuracy * L and the union is L + P - I = L * (2 - accuracy of the class
# before).
TRUE_MIOU = (ACCURACY / (2 - np.roll(ACCURACY, 1))).mean()


def evaluation(counts, ids=None, names=None):
    counts = np.asarray(counts, np.int64)
    num_images, num_classes, _ = counts.shape
    return Evaluation(
        split="val",
        step=1600,
        class_names=names or [f"class {c}" for c in range(num_classes)],
        ids=ids or [f"image {n}" for n in range(num_images)],
        counts=counts,
        loss=np.full(num_images, 0.5),
        confusion=np.zeros((num_classes, num_classes), np.int64),
        calibration=np.zeros((15, 3)),
    )


def draw(generator, num_images, num_runs=1, gain=0.0):
    """Runs on the same images, hard and easy ones; the last run is better by ``gain``.

    Every class has 1 to 199 pixels per image, 100 on average, of which a beta-distributed share
    with mean ACCURACY is correct. Seven tenths of this share are common to all runs.
    """
    shape = (num_images, len(ACCURACY))
    labelled = generator.integers(1, 200, shape)
    shares = [generator.beta(4 * ACCURACY, 4 * (1 - ACCURACY), shape) for _ in range(num_runs + 1)]
    runs = []
    for index in range(num_runs):
        share = 0.7 * shares[-1] + 0.3 * shares[index] if num_runs > 1 else shares[0]
        if index == num_runs - 1:
            share = gain + (1 - gain) * share
        correct = generator.binomial(labelled, share)
        predicted = correct + np.roll(labelled - correct, 1, axis=1)
        runs.append(evaluation(np.stack([correct, labelled, predicted], axis=-1)))
    return runs


def miou_of(counts):
    return float(mean_present(class_iou(counts)))


@pytest.fixture
def four():
    """Two runs on four images with three classes, the last of which is in one image."""
    generator = np.random.default_rng(3)
    a, b = draw(generator, 4, num_runs=2, gain=0.1)
    for run in (a, b):
        run.counts[1:, 2] = 0
    return a, b


def test_interval_matches_enumeration_of_all_draws(four):
    run, _ = four
    drawn = [miou_of(run.counts[list(rows)].sum(axis=0)) for rows in product(range(4), repeat=4)]
    assert len(drawn) == 256
    low, high = miou_interval(run, num_resamples=200_000)
    # The distribution is discrete, so sampled percentiles lie within a step of the enumerated ones.
    assert np.quantile(drawn, 0.02) <= low <= np.quantile(drawn, 0.03)
    assert np.quantile(drawn, 0.97) <= high <= np.quantile(drawn, 0.98)


def test_p_value_matches_enumeration_of_all_permutations(four):
    a, b = four
    observed = b.miou - a.miou
    differences = []
    for swapped in product([False, True], repeat=4):
        keep = ~np.array(swapped)[:, None, None]
        counts_a = np.where(keep, a.counts, b.counts).sum(axis=0)
        counts_b = np.where(keep, b.counts, a.counts).sum(axis=0)
        differences.append(miou_of(counts_b) - miou_of(counts_a))
    exact = np.mean(np.abs(differences) >= abs(observed) - 1e-12)
    assert exact >= 2 / 16  # no swap and all swaps: the smallest p-value of four images
    result = compare_evaluations(a, b, num_resamples=40_000)
    assert result.p_value == pytest.approx(exact, abs=0.01)
    assert result.difference.value == pytest.approx(observed, rel=1e-12)


def test_p_value_counts_the_observed_assignment():
    # Forty images in which B is always better: none of 99 permutations reaches it, and p = 1 / 100.
    labels = np.full((40, 1), 100)
    a, b = (evaluation(np.stack([labels * s // 100, labels, labels], -1)) for s in (40, 60))
    result = compare_evaluations(a, b, num_resamples=99)
    assert result.p_value == pytest.approx(0.01)
    assert result.classes[0].p_value == pytest.approx(0.01)
    assert result.difference.value == pytest.approx(60 / 140 - 40 / 160)
    assert result.verdict.startswith(
        "B scores higher than A on images like these: B - A = +17.86 points of mIoU"
    )
    reverse = compare_evaluations(b, a).verdict
    assert reverse.startswith("A scores higher than B on images like these: B - A = -17.86 points")


def test_interval_covers_the_true_miou():
    generator = np.random.default_rng(0)
    num_sets, covered = 300, 0
    for _ in range(num_sets):
        (run,) = draw(generator, 60)
        low, high = miou_interval(run, num_resamples=400)
        covered += low <= TRUE_MIOU <= high
    # Binomial: 0.95 of 300 has a standard deviation of 0.0126.
    assert 0.91 <= covered / num_sets <= 0.98


def test_mean_over_images_is_another_quantity():
    # The mean of per-image mIoU has a textbook interval, but misses mIoU by ten standard errors.
    (run,) = draw(np.random.default_rng(0), 20_000)
    assert run.miou == pytest.approx(TRUE_MIOU, abs=2e-3)
    standard_error = run.image_miou.std() / np.sqrt(20_000)
    assert abs(run.image_miou.mean() - TRUE_MIOU) > 10 * standard_error


@pytest.mark.slow
def test_false_positive_rate_of_equally_good_runs():
    generator = np.random.default_rng(1)
    num_pairs = 300
    results = [
        compare_evaluations(*draw(generator, 40, num_runs=2), num_resamples=300)
        for _ in range(num_pairs)
    ]
    p_values = np.array([result.p_value for result in results])
    assert 0.02 <= (p_values < 0.05).mean() <= 0.085
    assert abs((p_values < 0.5).mean() - 0.5) < 0.1
    outside = [r.difference.low > 0 or r.difference.high < 0 for r in results]
    assert 0.02 <= np.mean(outside) <= 0.1
    # Family-wise rate over three classes: about 0.14 without the correction.
    significant = [any(c.is_significant for c in r.classes) for r in results]
    assert np.mean(significant) <= 0.085


def test_paired_comparison_detects_more_than_an_unpaired_one():
    generator = np.random.default_rng(2)
    detected, detected_unpaired = 0, 0
    for _ in range(40):
        a, b = draw(generator, 60, num_runs=2, gain=0.1)
        result = compare_evaluations(a, b, num_resamples=400)
        detected += result.verdict.startswith("B scores higher")
        # Two independent sets: half widths add in quadrature.
        widths = [run.high - run.low for run in (result.miou_a, result.miou_b)]
        detected_unpaired += result.difference.value > np.hypot(*widths) / 2
    assert detected >= 34
    assert detected_unpaired <= 20


def test_run_compared_with_itself():
    (run,) = draw(np.random.default_rng(4), 30)
    result = compare_evaluations(run, run)
    assert result.p_value == 1
    assert dataclasses.astuple(result.difference) == (0, 0, 0)
    assert result.is_identical
    assert [c.p_value for c in result.classes] == [1, 1, 1]
    assert "the same" in result.verdict
    low, high = miou_interval(run)
    assert (result.miou_a.low, result.miou_a.high) == (low, high)
    assert low < run.miou < high


def test_result_does_not_depend_on_the_order_of_images():
    a, b = draw(np.random.default_rng(5), 30, num_runs=2)
    order = np.arange(30)[::-1]
    shuffled = dataclasses.replace(
        b,
        ids=[b.ids[i] for i in order],
        counts=b.counts[order],
        loss=b.loss[order],
    )
    assert compare_evaluations(a, shuffled) == compare_evaluations(a, b)
    # Planted fault: rows matched by position.
    by_position = dataclasses.replace(shuffled, ids=a.ids)
    with pytest.raises(ValueError, match="labels of 30 of 30 images are not the same"):
        compare_evaluations(a, by_position)


def test_blocks_of_duplicated_images_give_the_interval_of_single_images():
    a, b = draw(np.random.default_rng(7), 80, num_runs=2, gain=0.03)
    twice = [evaluation(np.repeat(run.counts, 2, axis=0)) for run in (a, b)]
    single, blocks = compare_evaluations(a, b), compare_evaluations(*twice, block_size=2)
    for name in ("miou_a", "miou_b", "difference", "p_value", "classes"):
        if name != "classes":
            assert getattr(blocks, name) == getattr(single, name), name
    assert (blocks.num_images, blocks.num_blocks) == (160, 80)
    assert miou_interval(twice[0], block_size=2) == miou_interval(a)
    plain = compare_evaluations(*twice)
    assert plain.p_value < single.p_value
    for name in ("miou_a", "miou_b", "difference"):
        wide, narrow = getattr(single, name), getattr(plain, name)
        ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
        assert ratio == pytest.approx(np.sqrt(2), rel=0.05)


def test_last_block_may_be_shorter():
    (run,) = draw(np.random.default_rng(8), 11)
    assert compare_evaluations(run, run, block_size=4).num_blocks == 3
    assert np.isnan(miou_interval(run, block_size=11)).all()
    assert not np.isnan(miou_interval(run, block_size=10)).any()


def test_absent_classes():
    a, b = draw(np.random.default_rng(9), 30, num_runs=2, gain=0.3)
    counts_a = np.pad(a.counts, ((0, 0), (0, 3), (0, 0)))
    counts_b = np.pad(b.counts, ((0, 0), (0, 3), (0, 0)))
    counts_b[4, 4, 2] = 1  # class 4 is predicted by B alone
    counts_a[2, 5] = counts_b[3, 5] = 0, 0, 1  # class 5 is predicted by both, in different images
    result = compare_evaluations(evaluation(counts_a), evaluation(counts_b))
    plain = compare_evaluations(a, b)
    assert result.miou_a.value == pytest.approx(plain.miou_a.value * 3 / 4)
    assert result.miou_b.value == pytest.approx(plain.miou_b.value * 3 / 5)
    by_name = {c.name: c for c in result.classes}
    assert np.isnan([by_name["class 3"].iou_a, by_name["class 3"].iou_b]).all()
    assert np.isnan(by_name["class 4"].iou_a)
    assert by_name["class 4"].iou_b == 0
    for name in ("class 3", "class 4"):
        difference = dataclasses.astuple(by_name[name].difference)
        assert np.isnan([*difference, by_name[name].p_value]).all()
    assert dataclasses.astuple(by_name["class 5"].difference) == (0, 0, 0)
    assert by_name["class 5"].p_value == 1  # although some permutations leave it to one run alone
    assert [c.name for c in result.classes[-2:]] == ["class 3", "class 4"]
    # Absent classes do not count in the Holm correction; class 5 does.
    unseen = [evaluation(np.pad(r.counts, ((0, 0), (0, 9), (0, 0)))) for r in (a, b)]
    padded = compare_evaluations(*unseen)
    assert padded.classes[:3] == plain.classes
    assert padded.p_value == plain.p_value


def test_classes_are_sorted_by_difference_and_count_their_images():
    generator = np.random.default_rng(10)
    a, b = draw(generator, 40, num_runs=2)
    for run in (a, b):
        run.counts[7:, 1] = 0
    b.counts[:, 0, 0] //= 2
    result = compare_evaluations(a, b)
    values = [c.difference.value for c in result.classes]
    assert values == sorted(values, reverse=True)
    worst = result.classes[-1]
    assert (worst.name, worst.num_images) == ("class 0", 40)
    assert worst.is_significant
    assert worst.difference.low < worst.difference.value < worst.difference.high < 0
    assert worst.difference.value == pytest.approx(b.iou[0] - a.iou[0])
    assert {c.name: c.num_images for c in result.classes}["class 1"] == 7


def test_holm_correction_by_hand():
    corrected = holm(np.array([0.03, NAN, 0.01, 0.04, 0.9]))
    # Sorted: 0.01 x 4, 0.03 x 3, 0.04 x 2, 0.9 x 1, never decreasing; nan does not count.
    np.testing.assert_allclose(corrected, [0.09, NAN, 0.04, 0.09, 0.9])
    np.testing.assert_array_equal(holm(np.array([0.6, 0.7])), [1, 1])
    assert holm(np.array([])).size == 0


def test_as_dict():
    a, b = draw(np.random.default_rng(11), 30, num_runs=2)
    empty = [evaluation(np.pad(r.counts, ((0, 0), (0, 1), (0, 0)))) for r in (a, b)]
    result = compare_evaluations(*empty)
    data = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert data["difference"]["value"] == b.miou - a.miou
    assert data["verdict"] == result.verdict
    assert data["confidence"] == 0.95
    assert data["classes"][0].keys() >= {"name", "p_value", "is_significant", "num_images"}
    assert data["classes"][-1]["difference"] == {"value": None, "low": None, "high": None}


def test_verdict_where_test_and_interval_disagree():
    a, b = draw(np.random.default_rng(12), 30, num_runs=2)
    result = compare_evaluations(a, b)
    verdicts = {
        (p_value, low): dataclasses.replace(
            result,
            p_value=p_value,
            difference=dataclasses.replace(result.difference, low=low, value=0.01, high=0.02),
        ).verdict.split(":")[0]
        for p_value, low in product((0.01, 0.3), (0.001, -0.001))
    }
    assert verdicts == {
        (0.01, 0.001): "B scores higher than A on images like these",
        (0.01, -0.001): "borderline, test and interval disagree",
        (0.3, 0.001): "borderline, test and interval disagree",
        (0.3, -0.001): "no significant difference on images like these",
    }


def changed(run, **changes):
    return dataclasses.replace(run, **changes)


def test_refusals():
    a, b = draw(np.random.default_rng(13), 6, num_runs=2)
    ids = [f"image {n}" for n in (0, 1, 2, 3, 7, 8)]
    fewer = evaluation(b.counts[:4])
    relabelled = b.counts.copy()
    relabelled[2, 0, 1] += 1
    blank = evaluation(np.zeros((6, 3, 3)))
    for other, block_size, message in [
        (changed(b, ids=ids), 1, "4 images in common, but 2 of A are missing in B, such as "
         "'image 4', and 2 of B are missing in A, such as 'image 7'"),
        (fewer, 1, "hold 4 images in common, but 2 of A are missing in B, such as 'image 4';"),
        (changed(b, ids=["image 0"] * 6), 1, "B holds image 'image 0' more than once"),
        (changed(b, class_names=["x", "class 1", "class 2"]), 1, "only A has 'class 0', only"),
        (changed(b, class_names=b.class_names[::-1]), 1, "3 classes and B 3, in another order"),
        (evaluation(relabelled), 1, "labels of 1 of 6 images .* such as those of 'image 2'"),
        (b, 6, "6 images in blocks of 6 make 1 block"),
        (b, 0, "--block_size is 0; give an integer of at least 1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message) as error:
            compare_evaluations(a, other, block_size)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no labelled pixel"):
        compare_evaluations(blank, blank)
    assert np.isnan(miou_interval(blank)).all()
