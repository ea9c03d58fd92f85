"""How far mIoU depends on the choice of pictures, and whether two runs differ by more than that.

mIoU is a mean of ratios of sums over the whole set, not a mean over pictures. So pictures are
resampled, and mIoU is computed anew from the sums of their counts: the bootstrap for intervals
(Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13: percentiles), swaps of
the two runs within pictures for the test (chapter 15: permutation). Everything is a fraction, and
repeatable: the same input gives the same numbers.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.errors import UserError
from segformer_pl.metrics import INTERSECTION, TARGET, class_union, mean_present, ratio

NUM_RESAMPLES = 10_000
ALPHA = 0.05  # level of the tests; intervals hold the rest, 95 %
CHUNK_NUMBERS = 2**21  # of the largest array in memory: 16 MB
# Different sums can give the same difference, but for rounding.
TIE = 1e-12

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A score or a difference of scores of the whole set, with its 95 % interval; fractions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassDifference:
    """One class in two runs.

    Attributes:
        name: Of the class.
        num_pictures: How many pictures have labelled pixels of it.
        iou_a, iou_b: Of the whole set; nan where the class is absent.
        difference: B - A; nan where one is.
        p_value: Of the permutation test, corrected by Holm's method for the number of classes.
    """

    name: str
    num_pictures: int
    iou_a: float
    iou_b: float
    difference: Estimate
    p_value: float

    @property
    def is_significant(self) -> bool:
        """Whether A and B differ, at 5 % for all classes together."""
        return self.p_value < ALPHA


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same pictures. See :func:`compare_evaluations`.

    Attributes:
        num_pictures, block_size, num_blocks: What was resampled.
        num_resamples: Of the bootstrap, and of the permutation test.
        miou_a, miou_b: mIoU of each run.
        difference: B - A, by the paired bootstrap.
        p_value: Of the paired permutation test, two-sided.
        is_identical: Whether every count of every picture is the same.
        classes: By difference, the largest first; those without one last.
    """

    num_pictures: int
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
        """The outcome in one sentence: which of the two networks scores higher on images like
        these, if test and interval both say so. It is silent about how they were trained."""
        numbers = (
            f"{points(self.difference.value)} points of mIoU, 95 % interval "
            f"{points(self.difference.low)} to {points(self.difference.high)}, "
            f"p = {self.p_value:.2g}"
        )
        excludes_zero = self.difference.low > 0 or self.difference.high < 0
        if self.is_identical:
            return "A and B are the same: every count of every image agrees"
        if self.p_value < ALPHA and excludes_zero:
            higher, lower = "BA" if self.difference.value > 0 else "AB"
            return f"{higher} scores higher than {lower} on images like these: B - A = {numbers}"
        if self.p_value < ALPHA or excludes_zero:
            return f"borderline, test and interval disagree: B - A = {numbers}"
        return f"no difference can be told from the choice of images: B - A = {numbers}"

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, nan as None."""
        known = asdict(self) | {"confidence": 1 - ALPHA, "verdict": self.verdict}
        for entry, difference in zip(known["classes"], self.classes):
            entry["is_significant"] = difference.is_significant
        return without_nan(known)


def miou_interval(
    evaluation: Evaluation,
    block_size: int = 1,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of mIoU over the choice of pictures, by the percentile bootstrap.

    Args:
        evaluation: Of one run.
        block_size: Contiguous blocks of so many pictures, in stored order, are drawn together.
        num_resamples: How many sets are drawn.
        seed: Of the draws.

    Returns:
        Low and high, fractions; nan if there are fewer than two blocks, or nothing is labelled.

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
    """Whether two runs differ by more than the choice of pictures explains.

    The intervals come from the paired bootstrap, where both runs are scored on the same drawn
    pictures. The p-values come from swapping A and B within pictures at random: how often is the
    difference at least as large as the one observed? p = (k + 1) / (num_resamples + 1), which is
    never 0 (Phipson and Smyth 2010).

    Args:
        a, b: Of the same pictures, in any order, with the same labels and classes.
        block_size: Contiguous blocks of so many pictures, in the order stored in ``a``, are drawn
            and swapped together. Pictures of one video resemble each other; taken for independent
            they make intervals too narrow and p-values too small.
        num_resamples: How many draws, and how many swaps.
        seed: Of draws and swaps.

    Raises:
        UserError: Classes, pictures or labels differ, nothing is labelled, or there are fewer
            than two blocks; one sentence says which.
    """
    b = matched(a, b)
    num_classes = len(a.class_names)
    overlaps_a, overlaps_b = _overlaps(a), _overlaps(b)
    blocks_a, blocks_b = _blocks(overlaps_a, block_size), _blocks(overlaps_b, block_size)
    if len(blocks_a) < 2:
        raise UserError(
            f"{len(a.ids)} pictures in blocks of {block_size} make {len(blocks_a)} block, and two "
            "are the least to draw from; give a smaller --block_size or more pictures"
        )
    drawn = _bootstrap(np.concatenate([blocks_a, blocks_b], axis=1), num_resamples, seed)
    drawn_a, drawn_b = drawn[:, :num_classes], drawn[:, num_classes:]
    miou_p, class_p = _permutation_test(blocks_a, blocks_b, num_resamples, seed)
    return Comparison(
        num_pictures=len(a.ids),
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
    """P-values corrected for their number by Holm's step-down method (1979); nan stays nan."""
    corrected = np.full_like(p_values, np.nan)
    order = [index for index in np.argsort(p_values) if not np.isnan(p_values[index])]
    least = 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def points(difference: float) -> str:
    """A difference of fractions in percentage points, with its sign; never a negative zero."""
    return f"{round(100 * difference, 2) + 0.0:+.2f}"


def matched(a: Evaluation, b: Evaluation, names: tuple[str, str] = ("A", "B")) -> Evaluation:
    """``b`` in the order of ``a``, once nothing speaks against a comparison.

    Args:
        a, b: Two evaluations.
        names: What messages call them.

    Raises:
        UserError: Classes, their order, images or labels differ, or nothing is labelled; one
            sentence says which.
    """
    if a.class_names != b.class_names:
        only = [sorted(set(x.class_names) - set(y.class_names)) for x, y in ((a, b), (b, a))]
        how = "in another order"
        if any(only):
            how = f"only {names[0]} has {_brief(only[0])}, only {names[1]} {_brief(only[1])}"
        raise UserError(
            f"{names[0]} has {len(a.class_names)} classes and {names[1]} {len(b.class_names)}, "
            f"{how}; give runs on the same data set"
        )
    for name, evaluation in zip(names, (a, b)):
        if len(set(evaluation.ids)) < len(evaluation.ids):
            twice = next(i for i in evaluation.ids if evaluation.ids.count(i) > 1)
            raise UserError(
                f"{name} holds image '{twice}' more than once, and images are matched by their "
                "ids; give every image an id of its own and validate again"
            )
    row_of = {image: row for row, image in enumerate(b.ids)}
    missing = [image for image in a.ids if image not in row_of]
    common = len(a.ids) - len(missing)
    if missing or common < len(b.ids):
        in_a = set(a.ids)
        more = [image for image in b.ids if image not in in_a]
        absent = [
            f"{len(images)} of {holder} are missing in {other}, such as '{images[0]}'"
            for holder, other, images in ((*names, missing), (*names[::-1], more))
            if images
        ]
        raise UserError(
            f"{names[0]} and {names[1]} hold {common} images in common, but "
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
    """(N, C, 2) intersection and union; doubles hold these whole numbers exactly."""
    counts = evaluation.counts.astype(np.float64)
    return np.stack([counts[..., INTERSECTION], class_union(counts)], axis=-1)


def _blocks(overlaps: Floats, block_size: int) -> Floats:
    """(M, C, 2) sums over contiguous blocks; the last may be shorter."""
    if block_size < 1:
        raise UserError(f"--block_size is {block_size}; give an integer of at least 1")
    return np.add.reduceat(overlaps, np.arange(0, len(overlaps), block_size), axis=0)


def _bootstrap(blocks: Floats, num_resamples: int, seed: int) -> Floats:
    """(R, C) IoU in sets of as many blocks, drawn with replacement; nan where a class is absent."""
    num_blocks = len(blocks)
    generator = np.random.default_rng(seed)
    drawn = []
    for size in _chunks(blocks, num_resamples, "bootstrap"):
        chosen = generator.integers(num_blocks, size=(size, num_blocks))
        chosen += num_blocks * np.arange(size)[:, None]
        times = np.bincount(chosen.ravel(), minlength=size * num_blocks)
        drawn.append(_weighted_iou(times.reshape(size, num_blocks), blocks))
    return np.concatenate(drawn)


def _permutation_test(
    blocks_a: Floats, blocks_b: Floats, num_resamples: int, seed: int
) -> tuple[float, Floats]:
    """Two-sided p-values of mIoU, and (C,) of IoU, nan where a class is absent in a run."""
    total_a, total_b = blocks_a.sum(axis=0), blocks_b.sum(axis=0)
    excess = blocks_b - blocks_a
    observed = _differences(total_a, total_b)
    generator = np.random.default_rng(seed)
    as_large = np.zeros_like(observed, dtype=np.int64)
    for size in _chunks(excess, num_resamples, "permutation test"):
        is_swapped = generator.integers(2, size=(size, len(excess)))
        moved = _weighted_sums(is_swapped, excess)
        differences = _differences(total_a + moved, total_b - moved)
        # A difference that is nan in a swap cannot be called smaller.
        as_large += (~(np.abs(differences) < np.abs(observed) - TIE)).sum(axis=0)
    p_values = (as_large + 1) / (num_resamples + 1)
    p_values[np.isnan(observed)] = np.nan
    return float(p_values[0]), p_values[1:]


def _differences(total_a: Floats, total_b: Floats) -> Floats:
    """(..., 1 + C) of (..., C, 2) sums: B - A in mIoU, then in the IoU of each class."""
    iou_a, iou_b = _iou(total_a), _iou(total_b)
    miou = mean_present(iou_b) - mean_present(iou_a)
    return np.concatenate([miou[..., None], iou_b - iou_a], axis=-1)


def _chunks(blocks: Floats, num_resamples: int, title: str) -> Iterator[int]:
    """Numbers of resamples that are affordable at once; shows progress where it takes long."""
    size = max(1, CHUNK_NUMBERS // max(len(blocks), blocks[0].size))
    with tqdm(total=num_resamples, desc=title, delay=2, leave=False, disable=None) as progress:
        for start in range(0, num_resamples, size):
            yield (length := min(size, num_resamples - start))
            progress.update(length)


def _weighted_sums(weights: npt.NDArray[np.int64], blocks: Floats) -> Floats:
    """Weights (R, M), blocks (M, C, 2) -> (R, C, 2)."""
    sums = weights.astype(np.float64) @ blocks.reshape(len(blocks), -1)
    return sums.reshape(len(weights), *blocks.shape[1:])


def _weighted_iou(weights: npt.NDArray[np.int64], blocks: Floats) -> Floats:
    return _iou(_weighted_sums(weights, blocks))


def _iou(overlaps: Floats) -> Floats:
    return ratio(overlaps[..., 0], overlaps[..., 1])


def _interval(drawn: Floats) -> Floats:
    """(2, ...) of (R, ...): low and high, over the resamples that have a value."""
    return np.nanquantile(drawn, [ALPHA / 2, 1 - ALPHA / 2], axis=0)


def _estimate(value: float, drawn: Floats) -> Estimate:
    low, high = (np.nan, np.nan) if np.isnan(value) else _interval(drawn)
    return Estimate(float(value), float(low), float(high))


def _class_differences(
    a: Evaluation, b: Evaluation, drawn: Floats, p_values: Floats
) -> tuple[ClassDifference, ...]:
    iou_a, iou_b = a.iou, b.iou
    num_pictures = (a.counts[..., TARGET] > 0).sum(axis=0)
    differences = [
        ClassDifference(
            name=name,
            num_pictures=int(num_pictures[c]),
            iou_a=float(iou_a[c]),
            iou_b=float(iou_b[c]),
            difference=_estimate(iou_b[c] - iou_a[c], drawn[:, c]),
            p_value=float(p_values[c]),
        )
        for c, name in enumerate(a.class_names)
    ]
    return tuple(sorted(differences, key=lambda d: np.nan_to_num(-d.difference.value, nan=np.inf)))


def without_nan(value: Any) -> Any:
    """JSON knows no nan."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _brief(names: list[str], most: int = 5) -> str:
    listed = ", ".join(map(repr, names[:most])) or "none more"
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")
