"""Confidence interval of mIoU over images, and significance of the difference between two runs.

mIoU is a mean of ratios of sums over the whole set, not a mean over images. So images are
resampled, and mIoU is computed from the sums of the counts of the resampled images. For one class
and four images with intersection I and union U::

    image                0      1      2      3      IoU of the set
    I / U of run A      8/10   2/10   0/5    6/10    16/35
    bootstrap           images 0, 0, 2, 3 drawn      22/35: one draw of many, for the interval
    permutation         image 1 swapped: A gets the counts of B for it, and B those of A

Intervals are percentiles of the bootstrap (Efron and Tibshirani, *An Introduction to the
Bootstrap*, 1993, chapter 13), p-values those of the permutation test (chapter 15). All metrics are
fractions. The resampling is seeded, so the same input gives the same numbers.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.errors import UserError, counted
from segformer_pl.metrics import INTERSECTION, TARGET, class_union, mean_present, ratio

NUM_RESAMPLES = 10_000
ALPHA = 0.05  # significance level of the tests; the confidence level of intervals is 1 - ALPHA
CHUNK_NUMBERS = 2**21  # elements of the largest array in memory: 16 MB
# Equal differences that come from different sums differ by rounding.
TIE = 1e-12

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A metric of the whole set, or a difference of two, with its 95 % interval; fractions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassDifference:
    """IoU of one class in two runs.

    Attributes:
        name: Name of the class.
        num_images: Number of images with labelled pixels of the class.
        iou_a: IoU of run A over the whole set; nan where the class is absent.
        iou_b: IoU of run B, likewise.
        difference: B - A; nan where one of them is nan.
        p_value: p-value of the permutation test, Holm-corrected for the number of classes.
    """

    name: str
    num_images: int
    iou_a: float
    iou_b: float
    difference: Estimate
    p_value: float

    @property
    def is_significant(self) -> bool:
        """Whether A and B differ significantly, at a family-wise error rate of 5 %."""
        return self.p_value < ALPHA


@dataclass(frozen=True)
class Comparison:
    """Comparison of two runs on the same images, see :func:`compare_evaluations`.

    Attributes:
        num_images: Number of images.
        block_size: Number of contiguous images that are resampled together.
        num_blocks: Number of such blocks.
        num_resamples: Number of bootstrap draws, and of permutations.
        miou_a: mIoU of run A.
        miou_b: mIoU of run B.
        difference: B - A, with the interval of the paired bootstrap.
        p_value: p-value of the paired permutation test, two-sided.
        is_identical: Whether every count of every image is the same.
        classes: Classes by difference, the largest first, those without a difference last.
    """

    num_images: int
    block_size: int
    num_blocks: int
    num_resamples: int
    miou_a: Estimate
    miou_b: Estimate
    difference: Estimate
    p_value: float
    is_identical: bool
    classes: tuple[ClassDifference, ...]

    @property
    def verdict(self) -> str:
        """The outcome in one sentence.

        One network scores higher than the other if both the test and the interval say so. The
        sentence holds for these two trained networks, not for the ways in which they were trained.
        """
        numbers = (
            f"{points(self.difference.value)} points of mIoU, 95 % CI over images "
            f"{points(self.difference.low)} to {points(self.difference.high)} (paired bootstrap), "
            f"p = {self.p_value:.2g} (permutation test)"
        )
        excludes_zero = self.difference.low > 0 or self.difference.high < 0
        if self.is_identical:
            return "A and B are the same: every count of every image agrees"
        if self.p_value < ALPHA and excludes_zero:
            higher, lower = "BA" if self.difference.value > 0 else "AB"
            return f"{higher} scores higher than {lower} on images like these: B - A = {numbers}"
        if self.p_value < ALPHA or excludes_zero:
            return f"borderline, test and interval disagree: B - A = {numbers}"
        return f"no significant difference on images like these: B - A = {numbers}"

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as plain data for JSON; nan becomes None."""
        data = asdict(self) | {"confidence": 1 - ALPHA, "verdict": self.verdict}
        for entry, difference in zip(data["classes"], self.classes):
            entry["is_significant"] = difference.is_significant
        return without_nan(data)


def miou_interval(
    evaluation: Evaluation,
    block_size: int = 1,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % confidence interval of mIoU over images, by the percentile bootstrap.

    Args:
        evaluation: Evaluation of one run.
        block_size: Number of contiguous images, in stored order, that are drawn together.
        num_resamples: Number of bootstrap draws.
        seed: Seed of the draws.

    Returns:
        Lower and upper bound, fractions; nan with fewer than two blocks, or without a labelled
        pixel.

    Raises:
        UserError: ``block_size`` is less than 1.
    """
    blocks = _blocks(_overlaps(evaluation), block_size)
    if len(blocks) < 2 or np.isnan(evaluation.miou):
        return np.nan, np.nan
    low, high = _interval(mean_present(_bootstrap(blocks, num_resamples, seed)))
    return float(low), float(high)


def compare_evaluations(
    a: Evaluation,
    b: Evaluation,
    block_size: int = 1,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare two runs on the same images.

    The intervals come from the paired bootstrap: both runs are evaluated on the same drawn images.
    The p-values come from the paired permutation test: each image swaps its counts of A
    and B with probability 1/2, and k is the number of permutations whose difference is at least as
    large as the observed one. Then p = (k + 1) / (num_resamples + 1), which is never 0 (Phipson
    and Smyth 2010).

    Args:
        a: Evaluation of run A.
        b: Evaluation of run B on the same images, in any order, with the same labels and classes.
        block_size: Number of contiguous images, in the order stored in ``a``, that are drawn and
            swapped together. Frames of one video are similar; treating them as independent makes
            intervals too narrow and p-values too small.
        num_resamples: Number of bootstrap draws, and of permutations.
        seed: Seed of both.

    Raises:
        UserError: Classes, images or labels differ, nothing is labelled, ``block_size`` is less
            than 1, or there are fewer than two blocks.
    """
    b = matched(a, b)
    num_classes = len(a.class_names)
    overlaps_a, overlaps_b = _overlaps(a), _overlaps(b)
    blocks_a, blocks_b = _blocks(overlaps_a, block_size), _blocks(overlaps_b, block_size)
    if len(blocks_a) < 2:
        raise UserError(
            f"{len(a.ids)} images in blocks of {block_size} make {len(blocks_a)} block, and "
            "resampling needs at least two; give a smaller --block_size or more images"
        )
    drawn = _bootstrap(np.concatenate([blocks_a, blocks_b], axis=1), num_resamples, seed)
    drawn_a, drawn_b = drawn[:, :num_classes], drawn[:, num_classes:]
    miou_p, class_p = _permutation_test(blocks_a, blocks_b, num_resamples, seed)
    return Comparison(
        num_images=len(a.ids),
        block_size=block_size,
        num_blocks=len(blocks_a),
        num_resamples=num_resamples,
        miou_a=_estimate(a.miou, mean_present(drawn_a)),
        miou_b=_estimate(b.miou, mean_present(drawn_b)),
        difference=_estimate(b.miou - a.miou, mean_present(drawn_b) - mean_present(drawn_a)),
        p_value=miou_p,
        is_identical=bool((a.counts == b.counts).all()),
        classes=_class_differences(a, b, drawn_b - drawn_a, holm(class_p)),
    )


def holm(p_values: Floats) -> Floats:
    """Correct p-values for their number by Holm's step-down method (1979); nan stays nan."""
    corrected = np.full_like(p_values, np.nan)
    order = [index for index in np.argsort(p_values) if not np.isnan(p_values[index])]
    highest = 0.0  # corrected p-values never decrease along the order
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def points(difference: float) -> str:
    """Format a difference of fractions in percentage points with its sign, zero as +0.00."""
    return f"{round(100 * difference, 2) + 0.0:+.2f}"


def matched(a: Evaluation, b: Evaluation, names: tuple[str, str] = ("A", "B")) -> Evaluation:
    """Return ``b`` with its images in the order of ``a``, after checking that both are comparable.

    Args:
        a: First evaluation.
        b: Second evaluation.
        names: Names of both in messages.

    Raises:
        UserError: Classes, their order, images or labels differ, or nothing is labelled.
    """
    if a.class_names != b.class_names:
        only = [sorted(set(x.class_names) - set(y.class_names)) for x, y in ((a, b), (b, a))]
        detail = "in another order"
        if any(only):
            detail = f"only {names[0]} has {_brief(only[0])}, only {names[1]} {_brief(only[1])}"
        raise UserError(
            f"{names[0]} has {len(a.class_names)} classes and {names[1]} {len(b.class_names)}, "
            f"{detail}; give runs on the same data set"
        )
    for name, evaluation in zip(names, (a, b)):
        if len(set(evaluation.ids)) < len(evaluation.ids):
            repeated = next(i for i in evaluation.ids if evaluation.ids.count(i) > 1)
            raise UserError(
                f"{name} holds image '{repeated}' more than once, and images are matched by their "
                "ids; give every image a unique id and validate again"
            )
    row_of = {image: row for row, image in enumerate(b.ids)}
    missing = [image for image in a.ids if image not in row_of]
    common = len(a.ids) - len(missing)
    if missing or common < len(b.ids):
        in_a = set(a.ids)
        extra = [image for image in b.ids if image not in in_a]
        absent = [
            f"{len(images)} of {holder} are missing in {other}, such as '{images[0]}'"
            for holder, other, images in ((*names, missing), (*names[::-1], extra))
            if images
        ]
        raise UserError(
            f"{names[0]} and {names[1]} hold {counted(common, 'image')} in common, but "
            f"{', and '.join(absent)}; validate both on the same images"
        )
    rows = [row_of[image] for image in a.ids]
    ordered = replace(b, ids=a.ids, counts=b.counts[rows], loss=b.loss[rows])
    labelled_a, labelled_b = a.counts[..., TARGET], ordered.counts[..., TARGET]
    if (differs := (labelled_a != labelled_b).any(axis=1)).any():
        raise UserError(
            f"the labels of {differs.sum()} of {len(a.ids)} images are not the same in {names[0]} "
            f"and {names[1]}, such as those of '{a.ids[int(differs.argmax())]}'; validate both "
            "with the same labels and label mapping, at the same size"
        )
    if not labelled_a.any():
        raise UserError(
            f"{names[0]} and {names[1]} hold no labelled pixel; there is nothing to compare"
        )
    return ordered


def _overlaps(evaluation: Evaluation) -> Floats:
    """Return intersections and unions (N, C, 2); float64 holds these integers exactly."""
    counts = evaluation.counts.astype(np.float64)
    return np.stack([counts[..., INTERSECTION], class_union(counts)], axis=-1)


def block_starts(num_images: int, block_size: int) -> npt.NDArray[np.int64]:
    """Return the first index of each contiguous block, of which the last may be shorter."""
    if block_size < 1:
        raise UserError(f"--block_size is {block_size}; give an integer of at least 1")
    return np.arange(0, num_images, block_size)


def _blocks(overlaps: Floats, block_size: int) -> Floats:
    """Return sums (M, C, 2) over contiguous blocks."""
    return np.add.reduceat(overlaps, block_starts(len(overlaps), block_size), axis=0)


def _bootstrap(blocks: Floats, num_resamples: int, seed: int) -> Floats:
    """Return the IoU (R, C) of sets of M blocks drawn with replacement; nan for absent classes.

    A set is stored as the number of times that each block was drawn. Blocks 0, 0, 2, 3 of four
    are the weights 2 0 1 1, and one matrix product gives the sums of many sets.
    """
    num_blocks = len(blocks)
    generator = np.random.default_rng(seed)
    drawn = []
    for size in _chunks(blocks, num_resamples, "bootstrap"):
        chosen = generator.integers(num_blocks, size=(size, num_blocks))
        chosen += num_blocks * np.arange(size)[:, None]  # so that one bincount serves all sets
        weights = np.bincount(chosen.ravel(), minlength=size * num_blocks)
        drawn.append(_weighted_iou(weights.reshape(size, num_blocks), blocks))
    return np.concatenate(drawn)


def _permutation_test(
    blocks_a: Floats, blocks_b: Floats, num_resamples: int, seed: int
) -> tuple[float, Floats]:
    """Return two-sided p-values of mIoU and of each IoU (C,); nan for classes absent in a run.

    Swapping a block moves ``B - A`` of its counts from B to A.
    """
    total_a, total_b = blocks_a.sum(axis=0), blocks_b.sum(axis=0)
    excess = blocks_b - blocks_a
    observed = _differences(total_a, total_b)
    generator = np.random.default_rng(seed)
    num_as_large = np.zeros_like(observed, dtype=np.int64)
    for size in _chunks(excess, num_resamples, "permutation test"):
        is_swapped = generator.integers(2, size=(size, len(excess)))
        moved = _weighted_sums(is_swapped, excess)
        differences = _differences(total_a + moved, total_b - moved)
        # Count nan (the class is absent in one run after the swap) as at least as large: the test
        # stays conservative.
        num_as_large += (~(np.abs(differences) < np.abs(observed) - TIE)).sum(axis=0)
    p_values = (num_as_large + 1) / (num_resamples + 1)
    p_values[np.isnan(observed)] = np.nan
    return float(p_values[0]), p_values[1:]


def _differences(total_a: Floats, total_b: Floats) -> Floats:
    """Sums (..., C, 2) of A and B -> differences B - A (..., 1 + C): of mIoU, then of each IoU."""
    iou_a, iou_b = _iou(total_a), _iou(total_b)
    miou = mean_present(iou_b) - mean_present(iou_a)
    return np.concatenate([miou[..., None], iou_b - iou_a], axis=-1)


def _chunks(blocks: Floats, num_resamples: int, title: str) -> Iterator[int]:
    """Yield numbers of resamples that fit into memory at once; show a progress bar after 2 s."""
    size = max(1, CHUNK_NUMBERS // max(len(blocks), blocks[0].size))
    with tqdm(total=num_resamples, desc=title, delay=2, leave=False, disable=None) as progress:
        for start in range(0, num_resamples, size):
            yield (length := min(size, num_resamples - start))
            progress.update(length)


def _weighted_sums(weights: npt.NDArray[np.int64], blocks: Floats) -> Floats:
    """Weights (R, M), blocks (M, C, 2) -> weighted sums (R, C, 2)."""
    sums = weights.astype(np.float64) @ blocks.reshape(len(blocks), -1)
    return sums.reshape(len(weights), *blocks.shape[1:])


def _weighted_iou(weights: npt.NDArray[np.int64], blocks: Floats) -> Floats:
    return _iou(_weighted_sums(weights, blocks))


def _iou(overlaps: Floats) -> Floats:
    return ratio(overlaps[..., 0], overlaps[..., 1])


def _interval(drawn: Floats) -> Floats:
    """Resamples (R, ...) -> lower and upper bound (2, ...), over the resamples that are not nan."""
    return np.nanquantile(drawn, [ALPHA / 2, 1 - ALPHA / 2], axis=0)


def _estimate(value: float, drawn: Floats) -> Estimate:
    low, high = (np.nan, np.nan) if np.isnan(value) else _interval(drawn)
    return Estimate(float(value), float(low), float(high))


def _class_differences(
    a: Evaluation, b: Evaluation, drawn: Floats, p_values: Floats
) -> tuple[ClassDifference, ...]:
    iou_a, iou_b = a.iou, b.iou
    num_images = (a.counts[..., TARGET] > 0).sum(axis=0)
    differences = [
        ClassDifference(
            name=name,
            num_images=int(num_images[c]),
            iou_a=float(iou_a[c]),
            iou_b=float(iou_b[c]),
            difference=_estimate(iou_b[c] - iou_a[c], drawn[:, c]),
            p_value=float(p_values[c]),
        )
        for c, name in enumerate(a.class_names)
    ]
    return tuple(sorted(differences, key=lambda d: np.nan_to_num(-d.difference.value, nan=np.inf)))


def without_nan(value: Any) -> Any:
    """Replace nan by None in nested dictionaries and lists, because JSON has no nan."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _brief(names: list[str], max_names: int = 5) -> str:
    listed = ", ".join(map(repr, names[:max_names])) or "none more"
    return listed + (f" and {len(names) - max_names} more" if len(names) > max_names else "")
