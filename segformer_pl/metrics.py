"""Segmentation metrics of a whole set, from counts of pixels that add up over batches and ranks.

In three layers: functions of ``(pred, target)`` that count the pixels of a batch; functions that
turn counts, of a set or of any part of it, into metrics; and :class:`SegmentationMetrics`, which
sums the counts of a split.

The functions of counts take tensors and NumPy arrays alike, so that a training, the report and
the bootstrap of a comparison share one definition of every metric. Counts are whole numbers, in
float64 where they are tensors. A class that is neither labelled nor predicted anywhere has no IoU
(nan) and is left out of the means, not counted as 0.
"""

import math
from typing import Any, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, SumMetric

from segformer_pl.errors import UserError

NUM_BINS = 15  # of the calibration, as in Guo et al. 2017
BOUNDARY_RATIO = 0.02  # width of the boundary bands over the image's diagonal, Cheng et al. 2021
INTERSECTION, TARGET, PRED = range(3)  # last axis of the counts of a class

Array = TypeVar("Array", Tensor, npt.NDArray[Any])


# From counts to metrics. All results are fractions.


def ratio(part: Array, whole: Array) -> Array:
    """Quotient of counts; 0 / 0 is nan, which marks what is absent."""
    with np.errstate(invalid="ignore"):
        return part / whole


def mean_present(values: Array) -> Array:
    """Mean over the last axis without the nan entries; nan where there are no others."""
    return ratio(_nansum(values), (values == values).sum(-1))


def class_union(counts: Array) -> Array:
    """Pixels that are labelled or predicted as a class, P + L - I: (..., 3) -> (...)."""
    return counts[..., TARGET] + counts[..., PRED] - counts[..., INTERSECTION]


def class_iou(counts: Array) -> Array:
    """Intersection over union.

    Args:
        counts: (..., 3) pixels of intersection, target and prediction.

    Returns:
        (...), nan where a class is neither labelled nor predicted.
    """
    return ratio(counts[..., INTERSECTION], class_union(counts))


def class_accuracy(counts: Array) -> Array:
    """Share of the labelled pixels that are right, I / L: (..., 3) -> (...), nan without any."""
    return ratio(counts[..., INTERSECTION], counts[..., TARGET])


def pixel_accuracy(counts: Array) -> Array:
    """Accuracy over all classes together, sum I / sum L: (..., C, 3) -> (...)."""
    return ratio(counts[..., INTERSECTION].sum(-1), counts[..., TARGET].sum(-1))


def frequency_weighted_iou(counts: Array) -> Array:
    """IoU weighted by the classes' shares of the labelled pixels: (..., C, 3) -> (...)."""
    target = counts[..., TARGET]
    return ratio(_nansum(target * class_iou(counts)), target.sum(-1))


def expected_calibration_error(calibration: Array) -> Array:
    """Gap between confidence and accuracy, mean over the bins weighted by their pixels.

    Guo et al. 2017. torchmetrics' class keeps every confidence it is given; this needs counts.

    Args:
        calibration: (bins, 3) from :func:`calibration_counts`.

    Returns:
        A scalar; nan without a labelled pixel.
    """
    pixels, confidence, right = calibration[:, 0], calibration[:, 1], calibration[:, 2]
    return ratio(abs(confidence - right).sum(-1), pixels.sum(-1))


def _nansum(values: Array) -> Array:
    if isinstance(values, Tensor):
        return values.nansum(-1)
    total: npt.NDArray[Any] = np.nansum(values, axis=-1)
    return total


# From label maps to counts


def as_classes(
    pred: Tensor, target: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Prediction and target with the ignored pixels as one more class, ``num_classes``, in both.

    Selecting the other pixels instead would take longer than all the counting.

    Args:
        pred: (B, H, W) int64 train ids.
        target: (B, H, W) int64 train ids.
        num_classes: Number of classes.
        ignore_index: Target that does not count.

    Returns:
        ``(pred, target)``, (B, H, W) int32 each.

    Raises:
        UserError: A target or a prediction is not a train id.
    """
    ignored = target == ignore_index
    classes = []
    for what, ids in (("label", target.masked_fill(ignored, 0)), ("prediction", pred)):
        low, high = (extreme.item() for extreme in ids.aminmax())
        if low < 0 or high >= num_classes:
            raise UserError(
                f"{what} {low if low < 0 else high} is not a train id: there are {num_classes} "
                f"classes, 0 to {num_classes - 1}, and the ignored label {ignore_index}"
            )
        classes.append(ids.int().masked_fill_(ignored, num_classes))
    return classes[1], classes[0]


def confusion_matrices(pred: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """The confusion matrix of every image.

    Args:
        pred, target: (B, H, W) from :func:`as_classes`.
        num_classes: Number of classes.

    Returns:
        (B, num_classes, num_classes) int64 pixels, rows target, columns prediction.
    """
    side = num_classes + 1
    shape = (len(target), side, side)
    images = torch.arange(len(target), dtype=target.dtype, device=target.device)
    if math.prod(shape) > torch.iinfo(target.dtype).max:
        images = images.long()
    cells = (images[:, None, None] * side + target) * side + pred
    counts = torch.bincount(cells.ravel(), minlength=math.prod(shape)).view(shape)
    return counts[:, :num_classes, :num_classes]


def class_counts(confusion: Tensor) -> Tensor:
    """(..., C, C) confusion -> (..., C, 3) pixels of intersection, target and prediction."""
    intersection = confusion.diagonal(dim1=-2, dim2=-1)
    return torch.stack([intersection, confusion.sum(-1), confusion.sum(-2)], dim=-1)


def boundary_counts(pred: Tensor, target: Tensor, num_classes: int, width: int) -> Tensor:
    """Counts for the boundary IoU (Cheng et al. 2021): those within bands along the outlines.

    A pixel is in its class's band if it is at most ``width`` pixels (in rows and columns) away
    from one of another class or from the image's border. Ignored pixels are a class of their own
    in target and prediction alike, and do not count.

    Args:
        pred, target: (B, H, W) from :func:`as_classes`.
        num_classes: Number of classes.
        width: Width of the bands in pixels.

    Returns:
        (num_classes, 3) int64 pixels of intersection, target and prediction.
    """
    in_target, in_pred = near_others(target, width), near_others(pred, width)
    both = in_target & in_pred & (target == pred)
    # Pixels of each target class: outside the bands, inside, inside and right.
    side = num_classes + 1
    kinds = (in_target.int().add_(both)).mul_(side).add_(target)
    _, missed, right = torch.bincount(kinds.ravel(), minlength=3 * side).view(3, side)
    predicted = torch.bincount(in_pred.int().mul_(side).add_(pred).ravel(), minlength=2 * side)
    return torch.stack([right, missed + right, predicted[side:]], dim=1)[:num_classes]


def near_others(ids: Tensor, width: int) -> Tensor:
    """(B, H, W) -> whether the square of 2 width + 1 pixels around holds another class.

    It does if any two neighbours inside it differ. So only the edges between neighbours, one bit
    each, have to be spread over the square, first along one axis and then along the other.
    """
    padded = F.pad(ids, (width,) * 4, value=-1)
    side = 2 * width + 1
    down = padded[:, 1:] != padded[:, :-1]
    right = padded[:, :, 1:] != padded[:, :, :-1]
    down = _any_in_run(_any_in_run(down, side - 1, 1), side, 2)
    return down | _any_in_run(_any_in_run(right, side - 1, 2), side, 1)


def _any_in_run(bits: Tensor, length: int, dim: int) -> Tensor:
    """Whether any of every ``length`` entries in a row is set, in about log2(length) steps."""
    span = 1
    while span < length:
        step = min(span, length - span)
        rest = bits.shape[dim] - step
        bits = bits.narrow(dim, 0, rest) | bits.narrow(dim, step, rest)
        span += step
    return bits


def calibration_counts(
    pred: Tensor, target: Tensor, confidence: Tensor, num_classes: int
) -> Tensor:
    """Counts by confidence, in bins of equal width.

    Args:
        pred, target: (B, H, W) from :func:`as_classes`.
        confidence: (B, H, W) probability of the predicted class.
        num_classes: Number of classes.

    Returns:
        (NUM_BINS, 3) float64: labelled pixels, sum of their confidence, pixels that are right.
    """
    # A network that diverged has a confidence of nan, and the sum of its bin must be nan too.
    bins = (confidence * NUM_BINS).nan_to_num().int().clamp_(max=NUM_BINS - 1)
    bins.masked_fill_(target == num_classes, NUM_BINS)
    right = torch.bincount((2 * bins + (target == pred)).ravel(), minlength=2 * NUM_BINS + 2)
    right = right.view(-1, 2)
    sums = torch.bincount(bins.ravel(), confidence.double().ravel(), minlength=NUM_BINS + 1)
    return torch.stack([right.sum(1), sums, right[:, 1]], dim=1)[:NUM_BINS]


# Of a split


class BatchCounts(TypedDict):
    """What a batch of B images adds to the metrics.

    Attributes:
        counts: (B, num_classes, 3) int64 pixels of intersection, target and prediction, by image.
        loss: (B,) float64 mean loss over an image's labelled pixels, nan without any.
        confusion: (num_classes, num_classes) int64 pixels, rows target, columns prediction.
        calibration: (NUM_BINS, 3) float64, see :func:`calibration_counts`.
    """

    counts: Tensor
    loss: Tensor
    confusion: Tensor
    calibration: Tensor


class StepOutput(BatchCounts):
    """What a step of validation or test returns, for callbacks.

    Attributes:
        pred: (B, H, W) int64 train ids at the size of the labels.
    """

    pred: Tensor


class TensorSum(Metric):
    """Sum of tensors of one shape over batches and ranks."""

    full_state_update = False
    total: Tensor

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.add_state("total", torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def update(self, value: Tensor) -> None:
        """Add a tensor."""
        self.total += value

    def compute(self) -> Tensor:
        """The sum over all ranks; torchmetrics turns one of a single element into a scalar."""
        return self.total


class SegmentationMetrics(nn.Module):
    """All metrics of a split: mIoU, mAcc, aAcc, fwIoU, boundary IoU, calibration error and loss.

    Not a torchmetrics ``Metric`` itself but made of them, because ``Metric.update`` returns
    nothing and the counts of a batch are wanted by callbacks too.

    Args:
        num_classes: Number of classes.
        ignore_index: Target that does not count.
    """

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.confusion = TensorSum((num_classes, num_classes), torch.int64)
        self.boundary = TensorSum((num_classes, 3), torch.int64)
        self.calibration = TensorSum((NUM_BINS, 3), torch.float64)
        # A sum, because a MeanMetric that skips its nan check (which waits for the GPU in every
        # batch) also ignores its weights in torchmetrics 1.9.
        self.loss = SumMetric(nan_strategy="disable")

    def update(self, pred: Tensor, target: Tensor, confidence: Tensor, loss: Tensor) -> BatchCounts:
        """Add a batch, and return its counts.

        Args:
            pred: (B, H, W) int64 train ids.
            target: (B, H, W) int64 train ids or ``ignore_index``.
            confidence: (B, H, W) probability of the predicted class.
            loss: (B, H, W) loss of every pixel, 0 where ignored.

        Raises:
            UserError: A target or a prediction is not a train id.
        """
        classes = as_classes(pred, target, self.num_classes, self.ignore_index)
        matrices = confusion_matrices(*classes, self.num_classes)
        confusion = matrices.sum(0)
        width = max(round(BOUNDARY_RATIO * math.hypot(*target.shape[1:])), 1)
        calibration = calibration_counts(*classes, confidence, self.num_classes)
        image_loss = loss.sum(dim=(1, 2), dtype=torch.float64)
        self.confusion.update(confusion)
        self.boundary.update(boundary_counts(*classes, self.num_classes, width))
        self.calibration.update(calibration)
        self.loss.update(image_loss.sum())
        counts = class_counts(matrices)
        return {
            "counts": counts,
            "loss": image_loss / counts[..., TARGET].sum(1),
            "confusion": confusion,
            "calibration": calibration,
        }

    def compute(self) -> dict[str, Tensor]:
        """The metrics over all batches and ranks; every rank must call it.

        Returns:
            ``miou`` and ``macc``, means over the classes present; ``aacc``; ``fwiou``; ``loss``,
            the mean over labelled pixels; ``boundary_iou``; ``ece``; all float64 scalars, nan
            without a labelled pixel. ``iou`` (num_classes,) float64, and ``num_labelled``, the
            number of pixels that counted.
        """
        confusion, boundary, calibration = (
            part.compute().view(part.shape).double()
            for part in (self.confusion, self.boundary, self.calibration)
        )
        counts = class_counts(confusion)
        iou = class_iou(counts)
        num_labelled = counts[:, TARGET].sum()
        return {
            "miou": mean_present(iou),
            "macc": mean_present(class_accuracy(counts)),
            "aacc": pixel_accuracy(counts),
            "fwiou": frequency_weighted_iou(counts),
            "loss": self.loss.compute() / num_labelled,
            "boundary_iou": mean_present(class_iou(boundary)),
            "ece": expected_calibration_error(calibration),
            "iou": iou,
            "num_labelled": num_labelled,
        }

    def reset(self) -> None:
        """Forget all batches."""
        for part in (self.confusion, self.boundary, self.calibration, self.loss):
            part.reset()
