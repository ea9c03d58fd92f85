"""Segmentation metrics of a whole split, from pixel counts summed over batches and ranks.

The module has three parts, in this order:

1. functions that compute metrics from counts, of a split or of any part of it;
2. functions of ``(pred, target)`` that count the pixels of a batch;
3. :class:`SegmentationMetrics`, which accumulates the counts of a split.

The functions of part 1 accept tensors and NumPy arrays, so that training, the report and the
bootstrap of a comparison share one definition of every metric. A class that is neither in the
target nor in the prediction has no IoU (nan) and is left out of the means, instead of counting as
0.

The fine-grained metrics average over images: :func:`image_miou`, :func:`miou_i` and
:func:`miou_c`. They follow Wang et al., "Revisiting Evaluation Metrics for Semantic Segmentation"
(NeurIPS 2023) and ``metrics/miouic_metric.py`` of github.com/zifuwanggg/JDTLosses: an image counts
for the classes that are labelled in it, while a class that is only predicted lowers the IoU of the
labelled class whose pixels it takes. The special case of that code for two classes, the foreground
alone, does not apply here.
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

NUM_BINS = 15  # confidence bins of the calibration error, as in Guo et al. 2017
BOUNDARY_RATIO = 0.02  # boundary width as a fraction of the image diagonal, Cheng et al. 2021
WORST = 0.1  # fraction of the images in the metrics of the worst images
INTERSECTION, TARGET, PRED = range(3)  # entries of the last axis of class counts

Array = TypeVar("Array", Tensor, npt.NDArray[Any])


# Metrics from counts, all as fractions in 0 to 1


def ratio(part: Array, whole: Array) -> Array:
    """Divide counts; 0 / 0 is nan, which stands for an absent class."""
    with np.errstate(invalid="ignore"):
        return part / whole


def mean_present(values: Array) -> Array:
    """Mean over the last axis ignoring nan; nan where all entries are."""
    return ratio(_nansum(values), (values == values).sum(-1))


def class_union(counts: Array) -> Array:
    """Size of the union of target and prediction: counts (..., 3) -> (...)."""
    return counts[..., TARGET] + counts[..., PRED] - counts[..., INTERSECTION]


def class_iou(counts: Array) -> Array:
    """Intersection over union of each class.

    Args:
        counts: (..., 3) pixels of intersection, target and prediction.

    Returns:
        (...), nan where a class is neither in the target nor in the prediction.
    """
    return ratio(counts[..., INTERSECTION], class_union(counts))


def class_accuracy(counts: Array) -> Array:
    """Recall of each class: counts (..., 3) -> (...), nan where the target lacks the class."""
    return ratio(counts[..., INTERSECTION], counts[..., TARGET])


def pixel_accuracy(counts: Array) -> Array:
    """Share of the labelled pixels that are correct: counts (..., C, 3) -> (...)."""
    return ratio(counts[..., INTERSECTION].sum(-1), counts[..., TARGET].sum(-1))


def frequency_weighted_iou(counts: Array) -> Array:
    """Mean IoU weighted by the target frequency of each class: counts (..., C, 3) -> (...)."""
    target = counts[..., TARGET]
    return ratio(_nansum(target * class_iou(counts)), target.sum(-1))


def labelled_iou(counts: Array) -> Array:
    """IoU of each class: counts (..., 3) -> (...), nan where the target lacks the class."""
    target = counts[..., TARGET]
    return class_iou(counts) * ratio(target, target)


def image_miou(counts: Array) -> Array:
    """mIoU of each image by itself, over the classes labelled in it: (..., C, 3) -> (...)."""
    return mean_present(labelled_iou(counts))


def miou(counts: npt.NDArray[Any], weights: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    """mIoU of sets of images, from the sums of their counts (mIoU^D of Wang et al.).

    Args:
        counts: (N, C, 3) pixels of intersection, target and prediction of each image.
        weights: (R, N), how often each image occurs in each of R sets. Default: one set with every
            image once.

    Returns:
        (R,), nan without a labelled or predicted class.
    """
    weights = _weights(counts, weights)
    sums = weights @ counts.reshape(len(counts), -1).astype(np.float64)
    return mean_present(class_iou(sums.reshape(len(weights), *counts.shape[1:])))


def miou_i(
    counts: npt.NDArray[Any], weights: npt.NDArray[Any] | None = None, worst: float = 1.0
) -> npt.NDArray[Any]:
    """Mean of :func:`image_miou` over the images of a set (mIoU^I of Wang et al.).

    Args:
        counts: (N, C, 3) pixels of intersection, target and prediction of each image.
        weights: (R, N), see :func:`miou`.
        worst: Fraction of the images that count, those with the lowest mIoU. At least one counts.

    Returns:
        (R,), nan without a labelled image.
    """
    return _mean_of_worst(image_miou(counts), _weights(counts, weights), worst)


def miou_c(
    counts: npt.NDArray[Any], weights: npt.NDArray[Any] | None = None, worst: float = 1.0
) -> npt.NDArray[Any]:
    """Mean over classes of the mean IoU over images (mIoU^C of Wang et al.).

    Args:
        counts: (N, C, 3) pixels of intersection, target and prediction of each image.
        weights: (R, N), see :func:`miou`.
        worst: Fraction of the images with a class that count for it, those with its lowest IoU. At
            least one counts.

    Returns:
        (R,), nan without a labelled image.
    """
    weights = _weights(counts, weights)
    columns = [_mean_of_worst(values, weights, worst) for values in labelled_iou(counts).T]
    return mean_present(np.stack(columns, axis=-1))


def _weights(counts: npt.NDArray[Any], weights: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    return np.ones((1, len(counts))) if weights is None else weights


def _mean_of_worst(
    values: npt.NDArray[Any], weights: npt.NDArray[Any], worst: float
) -> npt.NDArray[Any]:
    """Mean of the lowest values of weighted sets: values (N,), weights (R, N) -> (R,).

    Of n values that are not nan, the lowest ``max(1, floor(worst * n))`` count, as in JDTLosses.
    """
    present = np.flatnonzero(values == values)
    order = present[np.argsort(values[present], kind="stable")]
    weights = weights[:, order].astype(np.float64)
    num_values = weights.sum(-1)
    num_counted = np.minimum(np.maximum(np.floor(worst * num_values), 1), num_values)
    before = weights.cumsum(-1) - weights
    counted = np.clip(num_counted[:, None] - before, 0, weights)
    return ratio(counted @ values[order], num_counted)


def expected_calibration_error(calibration: Array) -> Array:
    """Expected calibration error (ECE, Guo et al. 2017).

    The mean over the confidence bins of ``|confidence - accuracy|``, weighted by the pixels of each
    bin. torchmetrics' class stores every confidence; this one needs sums per bin only.

    Args:
        calibration: (bins, 3) from :func:`calibration_counts`.

    Returns:
        Scalar, nan if no pixel is labelled.
    """
    pixels, confidence, correct = calibration[:, 0], calibration[:, 1], calibration[:, 2]
    return ratio(abs(confidence - correct).sum(-1), pixels.sum(-1))


def _nansum(values: Array) -> Array:
    if isinstance(values, Tensor):
        return values.nansum(-1)
    total: npt.NDArray[Any] = np.nansum(values, axis=-1)
    return total


# Counts from label maps


def as_classes(
    pred: Tensor, target: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Set ignored pixels to an additional class, ``num_classes``, in prediction and target.

    Boolean indexing of the labelled pixels would take longer than all of the counting.

    Args:
        pred: (B, H, W) int64 train ids.
        target: (B, H, W) int64 train ids or ``ignore_index``.
        num_classes: Number of classes.
        ignore_index: Target of the pixels that do not count.

    Returns:
        ``(pred, target)``, (B, H, W) int32 each.

    Raises:
        UserError: A value of the target or of the prediction is not a train id.
    """
    ignored = target == ignore_index
    classes = []
    for name, ids in (("label", target.masked_fill(ignored, 0)), ("prediction", pred)):
        low, high = (extreme.item() for extreme in ids.aminmax())
        if low < 0 or high >= num_classes:
            raise UserError(
                f"{name} {low if low < 0 else high} is not a train id: there are {num_classes} "
                f"classes, 0 to {num_classes - 1}, and the ignored label {ignore_index}"
            )
        classes.append(ids.int().masked_fill_(ignored, num_classes))
    return classes[1], classes[0]


def confusion_matrices(pred: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix of each image.

    Args:
        pred: (B, H, W) from :func:`as_classes`.
        target: (B, H, W) from :func:`as_classes`.
        num_classes: Number of classes.

    Returns:
        (B, num_classes, num_classes) int64 pixels; rows are the target, columns the prediction.
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
    """Reduce confusion matrices to counts of each class.

    Args:
        confusion: (..., C, C) pixels; rows are the target, columns the prediction.

    Returns:
        (..., C, 3) pixels of intersection, target and prediction.
    """
    intersection = confusion.diagonal(dim1=-2, dim2=-1)
    return torch.stack([intersection, confusion.sum(-1), confusion.sum(-2)], dim=-1)


def boundary_counts(pred: Tensor, target: Tensor, num_classes: int, width: int) -> Tensor:
    """Counts of each class near its boundary, for the boundary IoU (Cheng et al. 2021).

    A pixel is near the boundary if another class or the border of the image is at most ``width``
    pixels away, in rows and in columns. Ignored pixels are a class of their own in target and
    prediction, and are not counted.

    Args:
        pred: (B, H, W) from :func:`as_classes`.
        target: (B, H, W) from :func:`as_classes`.
        num_classes: Number of classes.
        width: Width of the boundary region in pixels.

    Returns:
        (num_classes, 3) int64 pixels of intersection, target and prediction.
    """
    near_target, near_pred = boundary_mask(target, width), boundary_mask(pred, width)
    intersection = near_target & near_pred & (target == pred)
    # One histogram over three groups of pixels by target class: 0 not near the target's boundary,
    # 1 near it and not in the intersection, 2 in the intersection.
    side = num_classes + 1
    groups = (near_target.int().add_(intersection)).mul_(side).add_(target)
    _, missed, correct = torch.bincount(groups.ravel(), minlength=3 * side).view(3, side)
    predicted = torch.bincount(near_pred.int().mul_(side).add_(pred).ravel(), minlength=2 * side)
    return torch.stack([correct, missed + correct, predicted[side:]], dim=1)[:num_classes]


def boundary_mask(ids: Tensor, width: int) -> Tensor:
    """Mark pixels with another class, or the border of the image, at most ``width`` pixels away.

    The window of ``2 * width + 1`` pixels squared around a pixel holds another class if any two
    neighbours inside it differ. So compare neighbours once, and dilate the resulting edges along
    one axis and then along the other. For one row and ``width=1``::

        ids       0 0 0 0 1 1 1 1
        edges    |       |       |    neighbours that differ; the padding is a class of its own
        mask      1 0 0 1 1 0 0 1

    Args:
        ids: (B, H, W) class of every pixel.
        width: Width of the boundary region in pixels.

    Returns:
        (B, H, W) bool.
    """
    padded = F.pad(ids, (width,) * 4, value=-1)
    side = 2 * width + 1
    down = padded[:, 1:] != padded[:, :-1]
    right = padded[:, :, 1:] != padded[:, :, :-1]
    down = _any_in_window(_any_in_window(down, side - 1, 1), side, 2)
    return down | _any_in_window(_any_in_window(right, side - 1, 2), side, 1)


def _any_in_window(bits: Tensor, length: int, dim: int) -> Tensor:
    """Sliding maximum of bits over windows of ``length`` entries, in about log2(length) steps.

    Every step combines two windows of ``span`` entries into a larger one: 1, 2, 4, ..., length.
    """
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
    """Counts by confidence in ``NUM_BINS`` bins of equal width.

    Args:
        pred: (B, H, W) from :func:`as_classes`.
        target: (B, H, W) from :func:`as_classes`.
        confidence: (B, H, W) probability of the predicted class.
        num_classes: Number of classes.

    Returns:
        (NUM_BINS, 3) float64: labelled pixels, sum of their confidence, correct pixels.
    """
    # A diverged network has nan confidence. It is counted in bin 0, whose sum becomes nan.
    bins = (confidence * NUM_BINS).nan_to_num().int().clamp_(max=NUM_BINS - 1)
    bins.masked_fill_(target == num_classes, NUM_BINS)
    pixels = torch.bincount((2 * bins + (target == pred)).ravel(), minlength=2 * NUM_BINS + 2)
    pixels = pixels.view(-1, 2)  # columns: wrong, correct
    sums = torch.bincount(bins.ravel(), confidence.double().ravel(), minlength=NUM_BINS + 1)
    return torch.stack([pixels.sum(1), sums, pixels[:, 1]], dim=1)[:NUM_BINS]


# Metrics of a split


class BatchCounts(TypedDict):
    """Counts of a batch of B images.

    Attributes:
        counts: (B, num_classes, 3) int64 pixels of intersection, target and prediction per image.
        loss: (B,) float64 mean loss over the labelled pixels of each image, nan if it has none.
        confusion: (num_classes, num_classes) int64 pixels; rows are the target, columns the
            prediction.
        calibration: (NUM_BINS, 3) float64, see :func:`calibration_counts`.
    """

    counts: Tensor
    loss: Tensor
    confusion: Tensor
    calibration: Tensor


class StepOutput(BatchCounts):
    """Output of a validation or test step, for callbacks.

    Attributes:
        pred: (B, H, W) int64 train ids at the size of the label maps.
    """

    pred: Tensor


class TensorSum(Metric):
    """Sum of tensors of one shape over batches and ranks.

    Args:
        shape: Shape of the tensors.
        dtype: Data type of the sum.
    """

    full_state_update = False
    total: Tensor

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.add_state("total", torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def update(self, value: Tensor) -> None:
        """Add a tensor of the shape of the sum."""
        self.total += value

    def compute(self) -> Tensor:
        """Return the sum over all ranks; torchmetrics squeezes a single element to a scalar."""
        return self.total


class SegmentationMetrics(nn.Module):
    """Metrics of a split: mIoU, mAcc, aAcc, fwIoU, boundary IoU, ECE and loss.

    It consists of torchmetrics ``Metric`` objects but is none itself, because ``Metric.update``
    returns nothing, and callbacks need the counts of each batch.

    Args:
        num_classes: Number of classes.
        ignore_index: Target of the pixels that do not count.
    """

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.confusion = TensorSum((num_classes, num_classes), torch.int64)
        self.boundary = TensorSum((num_classes, 3), torch.int64)
        self.calibration = TensorSum((NUM_BINS, 3), torch.float64)
        # The nan check of MeanMetric synchronises with the GPU in every batch, and without it
        # (`nan_strategy="disable"`) torchmetrics 1.9 ignores the weights. So keep a sum.
        self.loss = SumMetric(nan_strategy="disable")

    def update(self, pred: Tensor, target: Tensor, confidence: Tensor, loss: Tensor) -> BatchCounts:
        """Add a batch and return its counts.

        Args:
            pred: (B, H, W) int64 train ids.
            target: (B, H, W) int64 train ids or ``ignore_index``.
            confidence: (B, H, W) probability of the predicted class.
            loss: (B, H, W) loss of every pixel, 0 where ignored.

        Raises:
            UserError: A value of the target or of the prediction is not a train id.
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
        """Return the metrics over all batches and ranks; every rank must call it.

        Returns:
            Float64 scalars, nan if no pixel is labelled:

            - ``miou``, ``macc`` and ``boundary_iou``, means over the classes present;
            - ``aacc``, the pixel accuracy, and ``fwiou``, the frequency-weighted IoU;
            - ``loss``, the mean over labelled pixels;
            - ``ece``, the expected calibration error.

            Further, ``iou`` (num_classes,) float64, and ``num_labelled``, the number of labelled
            pixels.
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
        """Reset all counts to 0."""
        for part in (self.confusion, self.boundary, self.calibration, self.loss):
            part.reset()
