"""The outcome of a study in words, written from its numbers."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from segformer_pl.analysis.ablation import MEASURES, StudySummary, VariantDifference
from segformer_pl.analysis.report.study_style import p_text, signed

MAX_NAMED = 4  # variants that a sentence lists by name


def outcome(summaries: Mapping[str, StudySummary], reference: str) -> list[str]:
    """Return the sentences that say what a study resolves, and what it does not.

    Args:
        summaries: Summaries by measure. The first one is the main measure; the others are only
            compared with it.
        reference: Name of the variant that the others are compared with.
    """
    main, *others = summaries.values()
    known = [one for one in main.differences if math.isfinite(one.value)]
    if not known:
        return ["There is no other variant with a finished run to compare with the reference."]
    sentences = [_scope(main, reference)]
    tested = [one for one in known if math.isfinite(one.p_holm)]
    if tested:
        sentences += [_resolved(main, tested), _unresolved(tested), _sources(tested)]
        sentences += [_seeds(tested), *_agreement(tested, main, others)]
    if len(tested) < len(known):
        sentences.append(_untested([one for one in known if one not in tested], main))
    return [sentence for sentence in sentences if sentence]


def _scope(main: StudySummary, reference: str) -> str:
    counts = [len(variant.values) for variant in main.variants]
    seeds = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])
    return (
        f"{len(main.variants)} variants were trained with {seeds} "
        f"{'seed' if max(counts) == 1 else 'seeds'} each and evaluated on {main.images}; "
        f"the reference is {_named([reference])}."
    )


def _untested(rest: Sequence[VariantDifference], main: StudySummary) -> str:
    """Describe the differences of variants with one seed."""
    title = MEASURES[main.measure].title
    errors = [100 * one.se_images for one in rest if math.isfinite(one.se_images)]
    spread = ""
    if errors:
        plural = "s are" if len(errors) > 1 else " is"
        spread = f"; the standard error{plural} {_range(errors)} points from the choice of images"
        spread += " alone"
    what = "Differences" if len(rest) > 1 else "The difference"
    return (
        f"{what} of {_named([one.variant for one in rest])} in {title} cannot be tested, because "
        f"one seed does not show how much the result changes from training to training: "
        f"{_values(rest)} points{spread}."
    )


def _resolved(main: StudySummary, tested: Sequence[VariantDifference]) -> str:
    found = sorted((one for one in tested if one.is_resolved), key=lambda one: -abs(one.value))
    number, title = len(tested), MEASURES[main.measure].title
    if not found:
        subject = f"None of the {number} differences" if number > 1 else "The difference"
        verb = "is" if number > 1 else "is not"
        return f"{subject} in {title} {verb} resolved (that takes a Holm-corrected p below 0.05)."
    parts = [
        f"{_named([one.variant])} is {abs(100 * one.value):.2f} points "
        f"{'higher' if one.value > 0 else 'lower'} (95 % CI {_interval(one)}, p "
        f"{_p(one.p_holm)})"
        for one in found[:MAX_NAMED]
    ]
    if rest := found[MAX_NAMED:]:
        others = f"the other {len(rest)} differ" if len(rest) > 1 else "the last one differs"
        parts.append(f"{others} by {_values(rest)} points")
    if number == 1:
        return f"The difference in {title} is resolved: {parts[0]}."
    return (
        f"Of {number} differences in {title}, {len(found)} "
        f"{'is' if len(found) == 1 else 'are'} resolved (Holm-corrected p < 0.05): "
        f"{'; '.join(parts)}."
    )


def _unresolved(tested: Sequence[VariantDifference]) -> str:
    rest = [one for one in tested if not one.is_resolved]
    if not rest:
        return ""
    if len(rest) == 1:
        (one,) = rest
        verb = "It is" if len(tested) == 1 else f"That of {_named([one.variant])} is not: it is"
        return (
            f"{verb} {_values(rest)} points, and true differences from {_interval(one)} points are "
            "compatible with the runs."
        )
    bounds = f"{_points(min(one.low for one in rest))} to {_points(max(one.high for one in rest))}"
    names = "" if len(rest) > MAX_NAMED else f" ({_named([one.variant for one in rest])})"
    subject = "They lie" if len(rest) == len(tested) else f"The other {len(rest)}{names} are not: "
    subject += "" if len(rest) == len(tested) else "they lie"
    return (
        f"{subject} between {_values(rest, ' and ')} points, with intervals that together cover "
        f"{bounds} points."
    )


def _sources(tested: Sequence[VariantDifference]) -> str:
    """Say how much of the uncertainty seeds and images contribute."""
    both = [one for one in tested if math.isfinite(one.se_seeds) and math.isfinite(one.se_images)]
    seeds = float(np.mean([one.se_seeds**2 for one in both])) if both else 0.0
    images = float(np.mean([one.se_images**2 for one in both])) if both else 0.0
    if not seeds + images:
        return ""
    share = seeds / (seeds + images)
    advice = ""
    if share > 0.8:
        advice = "; more seeds would narrow the intervals, more images hardly"
    elif share < 0.2:
        advice = "; more images would narrow the intervals, more seeds hardly"
    where = "Over the differences" if len(both) > 1 else "Of its uncertainty"
    return (
        f"{where}, seeds contribute {100 * share:.0f} % of the variance and images "
        f"{100 * (1 - share):.0f} % (standard errors {100 * math.sqrt(seeds):.2f} and "
        f"{100 * math.sqrt(images):.2f} points){advice}."
    )


def _seeds(tested: Sequence[VariantDifference]) -> str:
    """Say how many seeds a difference of one point needs."""
    rest = [one for one in tested if not one.is_resolved]
    known = [one.seeds_for_one_point for one in rest if one.seeds_for_one_point is not None]
    if not known:
        return ""
    if all((one.seeds_for_one_point or math.inf) <= one.num_seeds for one in rest):
        return "These seeds suffice for most true differences of one point (power 80 %)."
    low, high = min(known), max(known)
    seeds = f"{low:,} seeds" if low == high else f"{low:,} to {high:,} seeds"
    sentence = f"A difference of one point takes {seeds} to be resolved (power 80 %)"
    if len(known) < len(rest):
        sentence += "; for some variants no number of seeds would do"
    return f"{sentence}."


def _agreement(
    tested: Sequence[VariantDifference], main: StudySummary, others: Sequence[StudySummary]
) -> list[str]:
    """Compare further measures with the main one; those that say the same share a sentence."""
    first = MEASURES[main.measure].title
    by_text: dict[str, list[str]] = {}
    for other in others:
        text = _compared(tested, {one.variant: one for one in other.differences}, first)
        by_text.setdefault(text, []).append(MEASURES[other.measure].title)
    return [f"In {_listed(titles)}, {text}." for text, titles in by_text.items() if text]


def _compared(
    tested: Sequence[VariantDifference], twins: Mapping[str, VariantDifference], first: str
) -> str:
    """Say in which differences another measure disagrees with the first one.

    The result follows the name of the other measure: "unlike in mIoU, the difference of "a" is not
    resolved".
    """
    pairs = [(one, twins[one.variant]) for one in tested if one.variant in twins]
    if not pairs:
        return ""
    opposed = [
        one.variant
        for one, twin in pairs
        if one.value * twin.value < 0 and (one.is_resolved or twin.is_resolved)
    ]
    gained = [twin.variant for one, twin in pairs if twin.is_resolved and not one.is_resolved]
    lost = [one.variant for one, twin in pairs if one.is_resolved and not twin.is_resolved]
    parts = [
        f"the difference{'s' if len(names) > 1 else ''} of {_named(names)} {verb[len(names) > 1]}"
        for names, verb in (
            (opposed, ("has the opposite sign", "have the opposite sign")),
            (gained, ("is resolved", "are resolved")),
            (lost, ("is not resolved", "are not resolved")),
        )
        if names
    ]
    if parts:
        return f"unlike in {first}, {_listed(parts)}"
    is_any = any(one.is_resolved for one, _ in pairs)
    same = f"the same differences are resolved as in {first}"
    return same if is_any else "no difference is resolved either"


def _points(difference: float) -> str:
    return signed(100 * difference)


def _interval(one: VariantDifference) -> str:
    return f"{_points(one.low)} to {_points(one.high)}"


def _values(differences: Sequence[VariantDifference], to: str = " to ") -> str:
    """Return the range of the differences in points; a single number for one."""
    values = [one.value for one in differences]
    low, high = _points(min(values)), _points(max(values))
    return low if len(values) == 1 else f"{low}{to}{high}"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _p(p_value: float) -> str:
    text = p_text(p_value)
    return text if text.startswith("<") else f"= {text}"


def _named(names: Sequence[str]) -> str:
    quoted = [f"\u201c{name}\u201d" for name in names]
    if len(quoted) > MAX_NAMED + 1:
        return f"{', '.join(quoted[:MAX_NAMED])} and {len(quoted) - MAX_NAMED} more"
    return _listed(quoted)


def _listed(parts: Sequence[str]) -> str:
    """Join parts by commas, the last two by "and"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
