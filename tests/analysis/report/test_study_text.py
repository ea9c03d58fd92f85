"""The words of a study's report follow from the numbers."""

import math

import pytest

from segformer_pl.analysis.ablation import StudySummary, VariantDifference, VariantSummary
from segformer_pl.analysis.report.study_text import outcome


def difference(variant, value, p_holm=0.5, half=0.02, **changes):
    values = {
        "variant": variant,
        "num_seeds": 3,
        "values": {0: value, 1: value, 2: value},
        "value": value,
        "low": value - half,
        "high": value + half,
        "se_seeds": 0.003,
        "se_images": 0.004,
        "df": 4.0,
        "p_value": p_holm,
        "p_holm": p_holm,
        "effect_size": 1.0,
        "is_resolved": p_holm < 0.05,
        "seeds_for_one_point": 9,
        "verdict": "",
        "classes": (),
    }
    return VariantDifference(**(values | changes))


def summary(*differences, measure="miou", seeds=3):
    names = ["base", *(one.variant for one in differences)]
    values = dict.fromkeys(range(seeds), 0.5)
    variants = tuple(VariantSummary(name, values, 0.5, 0.4, 0.6, 0.01) for name in names)
    return StudySummary(measure, variants, differences, 101, "", ())


def words(*differences, others=(), **changes):
    summaries = {"miou": summary(*differences, **changes)}
    summaries |= {one.measure: one for one in others}
    return " ".join(outcome(summaries, "base"))


def test_resolved_and_unresolved():
    text = words(difference("up", 0.031, 0.004), difference("flat", -0.002))
    assert "3 variants were trained with 3 seeds each and evaluated on 101 images" in text
    assert (
        "Of 2 differences in mIoU, 1 is resolved (Holm-corrected p < 0.05): “up” is 3.10 points "
        "higher (95 % CI +1.10 to +5.10, p = 0.004)."
    ) in text
    assert "That of “flat” is not: it is −0.20 points" in text
    assert "from −2.20 to +1.80 points are compatible with the runs" in text
    assert "A difference of one point takes 9 seeds to be resolved (power 80 %)." in text


def test_sources_of_the_spread():
    text = words(difference("a", 0.0))
    assert "seeds contribute 36 % of the variance and images 64 %" in text  # 9 : 16
    assert "(standard errors 0.30 and 0.40 points)." in text
    text = words(difference("a", 0.0, se_images=0.0001))
    assert "more seeds would narrow the intervals, more images hardly" in text
    text = words(difference("a", 0.0, se_seeds=0.0001))
    assert "more images would narrow the intervals, more seeds hardly" in text


def test_nothing_resolved():
    text = words(difference("a", 0.001), difference("b", -0.004, seeds_for_one_point=20))
    assert "None of the 2 differences in mIoU is resolved" in text
    assert "They lie between −0.40 and +0.10 points" in text
    assert "together cover −2.40 to +2.10 points" in text
    assert "takes 9 to 20 seeds" in text


def test_only_one_difference():
    text = words(difference("a", -0.06, 0.001))
    assert "The difference in mIoU is resolved: “a” is 6.00 points lower" in text
    text = words(difference("a", -0.01))
    assert "The difference in mIoU is not resolved" in text
    assert "It is −1.00 points" in text


def test_seeds_at_hand_suffice_or_none_do():
    text = words(difference("a", 0.0, seeds_for_one_point=3))
    assert "These seeds suffice" in text
    text = words(difference("a", 0.0, seeds_for_one_point=None))
    assert "one point" not in text
    text = words(difference("a", 0.0), difference("b", 0.0, seeds_for_one_point=None))
    assert "for some variants no number of seeds would do" in text


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ((0.02, 0.01), "the same differences are resolved as in mIoU"),
        ((0.02, 0.3), "unlike in mIoU, the difference of “a” is not resolved"),
        ((-0.02, 0.01), "unlike in mIoU, the difference of “a” has the opposite sign"),
    ],
)
def test_other_measures(others, expected):
    value, p_holm = others
    twin = summary(difference("a", value, p_holm), measure="image_miou")
    text = words(difference("a", 0.03, 0.01), others=(twin,))
    assert f" In mIoU per image (mIoU^I), {expected}." in text


def test_other_measure_resolves_more():
    twins = [
        summary(difference("a", 0.03, 0.01), measure=measure)
        for measure in ("image_miou", "worst_decile")
    ]
    text = words(difference("a", 0.03, 0.3), others=twins)
    assert (
        " In mIoU per image (mIoU^I) and mIoU^I of the worst 10 % of images, unlike in mIoU, the "
        "difference of “a” is resolved."
    ) in text


def test_other_measure_resolves_more_and_less():
    names = {"a": (0.3, 0.01), "b": (0.01, 0.3), "c": (0.01, 0.3), "d": (0.01, 0.01)}
    twin = summary(
        *(difference(name, 0.03, p_holm) for name, (_, p_holm) in names.items()),
        measure="worst_decile",
    )
    text = words(*(difference(name, 0.03, p) for name, (p, _) in names.items()), others=(twin,))
    assert (
        " In mIoU^I of the worst 10 % of images, unlike in mIoU, the difference of “a” is resolved "
        "and the differences of “b” and “c” are not resolved."
    ) in text


def test_other_measure_resolves_nothing_either():
    twin = summary(difference("a", 0.03, 0.3), measure="worst_decile")
    text = words(difference("a", 0.03, 0.3), others=(twin,))
    assert " In mIoU^I of the worst 10 % of images, no difference is resolved either." in text


def test_one_seed():
    one = difference(
        "a", 0.03, math.nan, num_seeds=1, values={0: 0.03}, se_seeds=math.nan, se_images=0.005
    )
    text = words(one, seeds=1)
    assert "with 1 seed each" in text
    assert "cannot be tested" in text
    assert "+3.00 points; the standard error is 0.50 points from the choice of images" in text
    assert "nan" not in text
    assert "resolved" not in text


def test_a_variant_with_one_seed_among_others():
    one = difference("single", 0.03, math.nan, num_seeds=1, se_seeds=math.nan)
    text = words(difference("a", 0.05, 0.01), one)
    assert "The difference in mIoU is resolved: “a”" in text
    assert "The difference of “single” in mIoU cannot be tested" in text


def test_many_variants_are_not_all_named():
    resolved = [difference(f"up{i}", 0.05 + i / 100, 0.01) for i in range(6)]
    rest = [difference(f"flat{i}", i / 1000) for i in range(7)]
    text = words(*resolved, *rest)
    assert "“up5” is 10.00 points higher" in text  # the largest first
    assert "the other 2 differ by +5.00 to +6.00 points" in text
    assert "flat" not in text
    assert "The other 7 are not: they lie between +0.00 and +0.60 points" in text


def test_nothing_to_compare():
    assert outcome({"miou": summary()}, "base") == [
        "There is no other variant with a finished run to compare with the reference."
    ]
