"""The outcome of a study in words, written from its numbers."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from segformer_pl.analysis.ablation import MEASURES, StudySummary, VariantDifference
from segformer_pl.analysis.report.study_style import signed

MAX_NAMED = 6  # variants that a sentence lists by name


def outcome(summaries: Mapping[str, StudySummary], reference: str) -> list[str]:
    """Return the sentences that say what a study resolves, and what it does not.

    Args:
        summaries: Summaries by measure. The first one is the main measure; the others are only
            compared with it.
        reference: Name of the variant that the others are compared with.
    """
    main, *others = summaries.values()
    if not main.differences:
        return ["There is no other variant with a finished run to compare with the reference."]
    sentences = [_scope(main, reference)]
    if all(math.isnan(one.p_value) for one in main.differences):
        sentences += [_without_test(main), _images_only(main)]
    else:
        sentences += [_resolved(main), _unresolved(main), _sources(main), _seeds(main)]
    sentences += [_agreement(main, other) for other in others]
    return [sentence for sentence in sentences if sentence]


def _scope(main: StudySummary, reference: str) -> str:
    counts = [len(variant.values) for variant in main.variants]
    seeds = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])
    return (
        f"{len(main.variants)} variants were trained with {seeds} "
        f"{'seed' if max(counts) == 1 else 'seeds'} each and evaluated on {main.num_images:,} "
        f"images. The reference is {_named([reference])}."
    )


def _without_test(main: StudySummary) -> str:
    values = [one.value for one in main.differences]
    return (
        f"No difference in {MEASURES[main.measure].title} is tested, because one seed does not "
        f"show how much the result changes from training to training. The differences lie "
        f"between {_points(min(values))} and {_points(max(values))} points."
    )


def _images_only(main: StudySummary) -> str:
    errors = [one.se_images for one in main.differences if math.isfinite(one.se_images)]
    if not errors:
        return ""
    return (
        "Their standard errors from the choice of images are "
        f"{_range([100 * error for error in errors])} points; the spread between seeds comes on "
        "top of it."
    )


def _resolved(main: StudySummary) -> str:
    found = [one for one in main.differences if one.is_resolved]
    number, title = len(main.differences), MEASURES[main.measure].title
    if not found:
        subject = f"None of the {number} differences" if number > 1 else "The difference"
        verb = "is" if number > 1 else "is not"
        return f"{subject} in {title} {verb} resolved (Holm-corrected p < 0.05)."
    found.sort(key=lambda one: -abs(one.value))
    parts = [
        f"{_named([one.variant])} is {abs(100 * one.value):.2f} points "
        f"{'higher' if one.value > 0 else 'lower'} (95 % CI {_points(one.low)} to "
        f"{_points(one.high)}, p {_p(one.p_holm)})"
        for one in found[:MAX_NAMED]
    ]
    more = f"; and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    if number == 1:
        return f"The difference in {title} is resolved: {parts[0]}."
    return (
        f"Of {number} differences in {title}, {len(found)} "
        f"{'is' if len(found) == 1 else 'are'} resolved (Holm-corrected p < 0.05): "
        f"{'; '.join(parts)}{more}."
    )


def _unresolved(main: StudySummary) -> str:
    rest = [one for one in main.differences if not one.is_resolved]
    if not rest:
        return ""
    low, high = min(one.low for one in rest), max(one.high for one in rest)
    names = _named([one.variant for one in rest])
    what = "the difference" if len(rest) == 1 else "differences"
    sentence = (
        f"Not resolved {'is' if len(rest) == 1 else 'are'} {what} of {names}: "
        f"{_differences(rest)}"
    )
    if math.isfinite(low) and math.isfinite(high):
        bounds = f"{_points(low)} to {_points(high)} points"
        if len(rest) == 1:
            sentence += f", and every true difference from {bounds} is compatible with the runs"
        else:
            sentence += f", with intervals that together cover {bounds}"
    return sentence + "."


def _differences(rest: Sequence[VariantDifference]) -> str:
    values = [one.value for one in rest]
    if len(rest) == 1:
        return f"{_points(values[0])} points"
    return f"between {_points(min(values))} and {_points(max(values))} points"


def _sources(main: StudySummary) -> str:
    """Say how much of the uncertainty seeds and images contribute."""
    both = [
        one
        for one in main.differences
        if math.isfinite(one.se_seeds) and math.isfinite(one.se_images)
    ]
    seeds = float(np.mean([one.se_seeds**2 for one in both])) if both else 0.0
    images = float(np.mean([one.se_images**2 for one in both])) if both else 0.0
    if not seeds + images:
        return ""
    share = seeds / (seeds + images)
    advice = ""
    if share > 0.7:
        advice = ", so more seeds would narrow the intervals, and more images would not"
    elif share < 0.3:
        advice = ", so more images would narrow the intervals, and more seeds would not"
    return (
        f"On average over the differences, seeds contribute {100 * share:.0f} % of the variance "
        f"and images {100 * (1 - share):.0f} % (standard errors "
        f"{100 * math.sqrt(seeds):.2f} and {100 * math.sqrt(images):.2f} points){advice}."
    )


def _seeds(main: StudySummary) -> str:
    """Say how many seeds a difference of one point needs."""
    rest = [one for one in main.differences if not one.is_resolved]
    known = [one.seeds_for_one_point for one in rest if one.seeds_for_one_point is not None]
    if not known:
        return ""
    seeds = max(known)
    if seeds <= min(one.num_seeds for one in rest):
        return "The seeds at hand resolve a difference of one point with a power of 80 %."
    return f"A difference of one point would take {seeds} seeds, with a power of 80 %."


def _agreement(main: StudySummary, other: StudySummary) -> str:
    """Compare a further measure with the main one."""
    title = MEASURES[other.measure].title
    pairs = [
        (one, twin)
        for one in main.differences
        for twin in other.differences
        if one.variant == twin.variant
    ]
    if not pairs:
        return ""
    opposed = [
        one.variant
        for one, twin in pairs
        if one.value * twin.value < 0 and (one.is_resolved or twin.is_resolved)
    ]
    only = [twin.variant for one, twin in pairs if twin.is_resolved and not one.is_resolved]
    lost = [one.variant for one, twin in pairs if one.is_resolved and not twin.is_resolved]
    parts = []
    if opposed:
        parts.append(f"has the opposite sign for {_named(opposed)}")
    if only:
        parts.append(f"also resolves {_named(only)}")
    if lost:
        parts.append(f"does not resolve {_named(lost)}")
    if not parts:
        is_any = any(one.is_resolved for one, _ in pairs)
        parts = ["agrees: it resolves the same differences" if is_any else "resolves none either"]
    return f"{title} {_listed(parts)}."


def _points(difference: float) -> str:
    return signed(100 * difference)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _p(p_value: float) -> str:
    return "< 0.0001" if p_value < 1e-4 else f"= {p_value:.2g}"


def _named(names: Sequence[str]) -> str:
    quoted = [f"\u201c{name}\u201d" for name in names]
    if len(quoted) > MAX_NAMED:
        return f"{', '.join(quoted[:MAX_NAMED])} and {len(quoted) - MAX_NAMED} more"
    return _listed(quoted)


def _listed(parts: Sequence[str]) -> str:
    """Join parts by commas, the last two by "and"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
