"""Statistics of an ablation study: what its seeds and its images resolve, and what they do not.

Every variant is trained with the same seeds and evaluated on the same images. So the difference to
the reference is taken within each seed and each image, and its error has two sources: other seeds,
and other images. :mod:`.crossed_effects` separates them. For three seeds and mIoU in percent::

    seed              0      1      2      mean   standard deviation between seeds
    reference       64.1   65.0   63.6    64.23   0.71
    variant         65.2   66.3   64.5    65.33
    difference      +1.1   +1.3   +0.9    +1.10   0.20: pairing removes what seeds share

mIoU is a ratio of sums over all images. So images are left out for all variants and seeds alike,
and every measure is computed from the counts of the remaining ones.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

from segformer_pl import metrics
from segformer_pl.analysis.comparison import (
    ALPHA,
    ClassDifference,
    Estimate,
    block_starts,
    holm,
    matched,
)
from segformer_pl.analysis.crossed_effects import (
    MeanDifference,
    interval_over_seeds,
    mean_difference,
)
from segformer_pl.analysis.evaluation import Evaluation, ImageCount
from segformer_pl.analysis.study_power import (
    ONE_POINT,
    minimum_detectable_difference,
    seeds_for_difference,
)
from segformer_pl.analysis.study_results import StudyResults, read_results
from segformer_pl.analysis.study_verdicts import describe_method, describe_outcome
from segformer_pl.errors import UserError

__all__ = [
    "MEASURES",
    "LeaveOneOut",
    "Measure",
    "StudyResults",
    "StudySummary",
    "VariantDifference",
    "VariantSummary",
    "leave_one_out",
    "minimum_detectable_difference",
    "read_results",
    "summarize_measures",
    "summarize_study",
]

CHUNK_NUMBERS = 2**22  # elements of the largest array in memory: 32 MB

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """A metric of a set of images, which serves for all statistics of a study.

    Attributes:
        title: What it is, in a few words for tables, such as ``mIoU``.
        of: Function of the counts (N, C, 3) of N images and, optionally, of weights (R, N): how
            often each image occurs in each of R sets. It returns the metric (R,) of the sets.
    """

    title: str
    of: Callable[..., Floats]


MEASURES = {
    "miou": Measure("mIoU", metrics.miou),
    "image_miou": Measure("mIoU per image (mIoU^I)", metrics.miou_i),
    "class_miou": Measure("mIoU per image and class (mIoU^C)", metrics.miou_c),
    "worst_decile": Measure(
        "mIoU^I of the worst 10 % of images", partial(metrics.miou_i, worst=metrics.WORST)
    ),
    "worst_decile_by_class": Measure(
        "mIoU^C of the worst 10 % of images", partial(metrics.miou_c, worst=metrics.WORST)
    ),
}


@dataclass(frozen=True)
class VariantSummary:
    """A variant over its seeds.

    Attributes:
        variant: Name of the variant.
        values: Value of each seed, a fraction.
        mean: Mean over the seeds.
        low: Lower bound of the 95 % t interval over seeds; nan with one seed.
        high: Upper bound.
        sd: Standard deviation over seeds (n - 1); nan with one seed.
    """

    variant: str
    values: dict[int, float]
    mean: float
    low: float
    high: float
    sd: float


@dataclass(frozen=True)
class VariantDifference:
    """The difference of a variant from the reference, over the seeds that both have.

    Attributes:
        variant: Name of the variant.
        num_seeds: Number of common seeds.
        values: Difference of each seed, variant - reference, as fractions.
        value: Mean of the differences.
        low: Lower bound of the 95 % interval over seeds and images; over images alone with one
            seed.
        high: Upper bound.
        se_seeds: Standard error of ``value`` from the choice of seeds; nan with one seed.
        se_images: Standard error of ``value`` from the choice of images.
        df: Degrees of freedom of the t interval (Satterthwaite).
        p_value: Two-sided p-value of the t test; nan with one seed.
        p_holm: The same, Holm-corrected for the number of variants; nan with one seed.
        effect_size: Hedges' g: the difference divided by the standard deviation over seeds of
            one variant, pooled over both, with the correction for few seeds; nan with one seed.
        is_resolved: Whether ``p_holm`` is less than 5 %.
        seeds_for_one_point: Number of seeds, in total, that resolve a difference of one point with
            a power of 80 %; None if no number does, or if it is not known.
        verdict: The outcome in one sentence.
        classes: IoU of each class, averaged over seeds; A is the reference and B the variant.
    """

    variant: str
    num_seeds: int
    values: dict[int, float]
    value: float
    low: float
    high: float
    se_seeds: float
    se_images: float
    df: float
    p_value: float
    p_holm: float
    effect_size: float
    is_resolved: bool
    seeds_for_one_point: int | None
    verdict: str
    classes: tuple[ClassDifference, ...]

    @property
    def share_of_images(self) -> float:
        """Share of the variance of ``value`` that comes from the choice of images, not of seeds.

        It is nan with one seed, and if all runs are the same.
        """
        total = self.se_images**2 + self.se_seeds**2
        return self.se_images**2 / total if total else np.nan


@dataclass(frozen=True)
class StudySummary:
    """Statistics of a study in one measure.

    Attributes:
        measure: Key of :data:`MEASURES`.
        variants: The variants, the reference first, without those that have no finished run.
        differences: Differences of the other variants from the reference.
        num_images: Number of images.
        method: How intervals and p-values were computed, one paragraph.
        omitted: One sentence for each variant without a difference.
        split_size: Number of images of the whole split; None if it is not known.
    """

    measure: str
    variants: tuple[VariantSummary, ...]
    differences: tuple[VariantDifference, ...]
    num_images: int
    method: str
    omitted: tuple[str, ...]
    split_size: int | None = None

    @property
    def images(self) -> ImageCount:
        """How many images of the split were evaluated."""
        return ImageCount(self.num_images, self.split_size)


@dataclass(frozen=True)
class LeaveOneOut:
    """Metrics of one run on all images, and without each of M blocks.

    Attributes:
        value: Measure on all images.
        left_out: (M,), measure without each block.
        iou: (C,), IoU on all images.
        iou_left_out: (M, C), IoU without each block.
    """

    value: float
    left_out: Floats
    iou: Floats
    iou_left_out: Floats


def summarize_study(
    results: StudyResults,
    measure: str = "miou",
    evaluation: str | None = None,
    block_size: int = 1,
) -> StudySummary:
    """Compute the statistics of a study.

    Args:
        results: Runs of the study.
        measure: Key of :data:`MEASURES`.
        evaluation: Name of the additional evaluation to use; None for the validation at the end of
            the training.
        block_size: Number of contiguous images that are left out together, as neighbouring frames
            of a video are similar.

    Raises:
        UserError: There is nothing to compare, an argument names nothing, or images differ.
    """
    return summarize_measures(results, [measure], evaluation, block_size)[measure]


def summarize_measures(
    results: StudyResults,
    measures: Iterable[str] = MEASURES,
    evaluation: str | None = None,
    block_size: int = 1,
) -> dict[str, StudySummary]:
    """Compute the statistics of a study in several measures, reading every evaluation once.

    Args:
        results: See :func:`summarize_study`, as for the other arguments.
        measures: Keys of :data:`MEASURES`.
        evaluation: See there.
        block_size: See there.

    Raises:
        UserError: See there.
    """
    for measure in measures:
        if measure not in MEASURES:
            raise UserError(f"measure '{measure}' is unknown; give one of {', '.join(MEASURES)}")
    evaluations = _evaluations(results, evaluation)
    if not evaluations.get(results.reference):
        raise UserError(
            f"no run of the reference '{results.reference}' is finished, so there is nothing to "
            f"compare the variants of study '{results.name}' with; run `ablate` again"
        )
    first = next(iter(evaluations[results.reference].values()))
    starts = block_starts(len(first.ids), block_size)
    if len(starts) < 2:
        raise UserError(
            f"{len(first.ids)} images in blocks of {block_size} make {len(starts)} block, and "
            "the spread over images needs at least two; give a smaller --block_size or more images"
        )
    return {
        measure: _summarize(results, evaluations, measure, starts, block_size)
        for measure in measures
    }


def _summarize(
    results: StudyResults,
    evaluations: Mapping[str, Mapping[int, Evaluation]],
    measure: str,
    starts: npt.NDArray[np.int64],
    block_size: int,
) -> StudySummary:
    """Compute the statistics in one measure from evaluations of the same images."""
    first = next(iter(evaluations[results.reference].values()))
    chosen = MEASURES[measure]
    sets = {
        variant: {seed: leave_one_out(one, chosen, starts) for seed, one in by_seed.items()}
        for variant, by_seed in evaluations.items()
        if by_seed
    }
    pairs = {
        variant: [seed for seed in by_seed if seed in sets[results.reference]]
        for variant, by_seed in sets.items()
        if variant != results.reference
    }
    pairs = {variant: seeds for variant, seeds in pairs.items() if seeds}
    reference = sets[results.reference]
    estimates = {
        variant: mean_difference(
            np.array([sets[variant][seed].value - reference[seed].value for seed in seeds]),
            np.stack([sets[variant][seed].left_out - reference[seed].left_out for seed in seeds]),
        )
        for variant, seeds in pairs.items()
    }
    p_holm = dict(
        zip(
            estimates,
            holm(np.array([one.p_value for one in estimates.values()], dtype=np.float64)).tolist(),
        )
    )
    num_images = (first.counts[..., metrics.TARGET] > 0).sum(axis=0)
    differences = tuple(
        _difference(
            variant,
            [reference[seed] for seed in pairs[variant]],
            [sets[variant][seed] for seed in pairs[variant]],
            pairs[variant],
            estimate,
            p_holm[variant],
            len(estimates),
            list(zip(first.class_names, num_images)),
        )
        for variant, estimate in estimates.items()
    )
    return StudySummary(
        measure=measure,
        variants=tuple(_summary(variant, by_seed) for variant, by_seed in sets.items()),
        differences=differences,
        num_images=len(first.ids),
        method=describe_method(
            chosen.title,
            [one.num_seeds for one in differences],
            len(first.ids),
            block_size,
        ),
        omitted=tuple(_omitted(results, sets, pairs)),
        split_size=first.split_size,
    )


def _evaluations(results: StudyResults, evaluation: str | None) -> dict[str, dict[int, Evaluation]]:
    """Return the evaluations by variant and seed, with the images of the first one in its order."""
    loaded: dict[str, dict[int, Evaluation]] = {}
    first: Evaluation | None = None
    first_name = ""
    for variant, runs in results.runs.items():
        loaded[variant] = {}
        for seed, run in runs.items():
            source = run
            if evaluation is not None:
                if evaluation not in run.named_evaluations:
                    names = ", ".join(run.named_evaluations) or "none"
                    raise UserError(
                        f"'{run.folder}' has no evaluation '{evaluation}' (it has: {names}); add "
                        "it to `evaluations` of the study and run `ablate` again"
                    )
                source = run.named_evaluations[evaluation]
            files = [file for file in source.evaluations if file.split == "val"]
            if not files:
                raise UserError(f"'{source.folder}' holds no evaluation; run `ablate` again")
            one, name = files[-1].load(), f"'{run.folder.name}'"
            if first is None:
                first, first_name = one, name
            loaded[variant][seed] = matched(first, one, (first_name, name))
    return loaded


def leave_one_out(
    evaluation: Evaluation, measure: Measure, starts: npt.NDArray[np.int64]
) -> LeaveOneOut:
    """Compute a measure and the IoU on all images, and without each block of images.

    Args:
        evaluation: Evaluation of one run.
        measure: Value of :data:`MEASURES`.
        starts: Index of the first image of each block.
    """
    counts = evaluation.counts
    ends = np.append(starts[1:], len(counts))
    images = np.arange(len(counts))
    size = max(1, CHUNK_NUMBERS // max(len(counts), counts[0].size))
    left_out = []
    for first in range(0, len(starts), size):
        chunk = slice(first, first + size)
        is_in_block = (images >= starts[chunk, None]) & (images < ends[chunk, None])
        left_out.append(measure.of(counts, 1.0 - is_in_block))
    total, blocks = counts.sum(axis=0), np.add.reduceat(counts, starts, axis=0)
    return LeaveOneOut(
        value=float(measure.of(counts)[0]),
        left_out=np.concatenate(left_out),
        iou=metrics.class_iou(total),
        iou_left_out=metrics.class_iou(total - blocks),
    )


def _summary(variant: str, sets: dict[int, LeaveOneOut]) -> VariantSummary:
    values = np.array([one.value for one in sets.values()])
    low, high = interval_over_seeds(values)
    return VariantSummary(
        variant=variant,
        values={seed: one.value for seed, one in sets.items()},
        mean=float(values.mean()),
        low=low,
        high=high,
        sd=float(values.std(ddof=1)) if len(values) > 1 else np.nan,
    )


def _difference(
    variant: str,
    a: Sequence[LeaveOneOut],
    b: Sequence[LeaveOneOut],
    seeds: Sequence[int],
    estimate: MeanDifference,
    p_holm: float,
    num_comparisons: int,
    classes: Sequence[tuple[str, int]],
) -> VariantDifference:
    """Describe the difference of a variant (B) from the reference (A) on the same seeds."""
    values_a, values_b = (np.array([one.value for one in side]) for side in (a, b))
    num_seeds = len(seeds)
    needed = None
    if num_seeds > 1:
        sd_seeds = estimate.se_seeds * np.sqrt(num_seeds)
        needed = seeds_for_difference(ONE_POINT, sd_seeds, estimate.se_images, num_comparisons)
    return VariantDifference(
        variant=variant,
        num_seeds=num_seeds,
        values=dict(zip(seeds, (values_b - values_a).tolist())),
        **vars(estimate),
        p_holm=p_holm,
        effect_size=_hedges_g(values_a, values_b),
        is_resolved=p_holm < ALPHA,
        seeds_for_one_point=needed,
        verdict=describe_outcome(estimate, p_holm, num_seeds, needed, num_comparisons),
        classes=_classes(a, b, classes),
    )


def _classes(
    a: Sequence[LeaveOneOut], b: Sequence[LeaveOneOut], classes: Sequence[tuple[str, int]]
) -> tuple[ClassDifference, ...]:
    """Estimate the difference of each class's IoU, with p-values corrected for their number."""
    iou_a, iou_b = (np.stack([one.iou for one in side]) for side in (a, b))
    left_out = np.stack([y.iou_left_out - x.iou_left_out for x, y in zip(a, b)])
    estimates = [
        mean_difference((iou_b - iou_a)[:, c], left_out[..., c]) for c in range(len(classes))
    ]
    p_values = holm(np.array([one.p_value for one in estimates]))
    return tuple(
        ClassDifference(
            name=name,
            num_images=int(num_images),
            iou_a=float(iou_a[:, c].mean()),
            iou_b=float(iou_b[:, c].mean()),
            difference=Estimate(one.value, one.low, one.high),
            p_value=float(p_values[c]),
        )
        for c, ((name, num_images), one) in enumerate(zip(classes, estimates))
    )


def _hedges_g(a: Floats, b: Floats) -> float:
    """Return Hedges' g (1981) of two variants, with the exact correction for few seeds."""
    if len(a) < 2:
        return np.nan
    sd = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    if sd == 0:
        return np.nan
    df = 2 * (len(a) - 1)
    correction = np.exp(gammaln(df / 2) - gammaln((df - 1) / 2)) / np.sqrt(df / 2)
    return float(correction * (b.mean() - a.mean()) / sd)


def _omitted(
    results: StudyResults,
    sets: dict[str, dict[int, LeaveOneOut]],
    pairs: dict[str, list[int]],
) -> Iterator[str]:
    for variant in results.runs:
        if variant not in sets:
            yield f"no run of variant '{variant}' is finished"
        elif variant != results.reference and variant not in pairs:
            yield (
                f"no finished seed of variant '{variant}' is also one of the reference "
                f"'{results.reference}', so there is no difference"
            )
