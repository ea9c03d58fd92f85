"""Segmentation scores of a whole set, from counts that are summed over batches and ranks."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

NUM_BINS = 15  # of the calibration, as in Guo et al. 2017


class _Counts(Metric):
    """A metric whose state is one table of counts, summed over batches and ranks."""

    full_state_update = False
    counts: Tensor

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")


class SegmentationScores(_Counts):
    """IoU and accuracy, from one confusion matrix.

    Scores are those of the reference protocol: IoU_c = I / (P + L - I), Acc_c = I / L,
    aAcc = sum I / sum L, mIoU and mAcc are means over the classes present. A class that is neither
    labelled nor predicted anywhere has no score (nan) and is left out of the means, not counted
    as 0.

    Args:
        num_classes: Number of classes.

    Attributes:
        counts: (num_classes, num_classes) int64 pixels, rows label, columns prediction.
        picture_counts: Of the last batch, (B, num_classes, 3) int64: pixels of the intersection,
            labelled pixels, predicted pixels, of every picture and class.
    """

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__((num_classes, num_classes), torch.int64, **kwargs)
        self.num_classes = num_classes
        self.picture_counts: Tensor | None = None

    def update(self, truth: Tensor, found: Tensor) -> None:
        """Count a batch: labels and predictions (B, H, W) from :func:`as_classes`."""
        matrices = confusion_matrices(truth, found, self.num_classes)
        self.picture_counts = counts_of(matrices)
        self.counts += matrices.sum(0)

    def compute(self) -> dict[str, Tensor]:
        """The scores; fractions, float64.

        Returns:
            ``miou``, ``macc``, ``aacc``, ``fwiou`` (IoU weighted by the classes' shares of the
            labelled pixels), all scalars; ``iou`` (num_classes,); and ``num_labelled``, the number
            of pixels that counted. Without any, the rest is nan.
        """
        confusion = self.counts.double()
        intersection = confusion.diagonal()
        labelled = confusion.sum(dim=1)
        iou = _iou(torch.stack([intersection, labelled, confusion.sum(dim=0)], dim=1))
        total = labelled.sum()
        return {
            "miou": iou.nanmean(),
            "macc": (intersection / labelled).nanmean(),
            "aacc": intersection.sum() / total,
            "fwiou": (labelled * iou.nan_to_num()).sum() / total,
            "iou": iou,
            "num_labelled": total,
        }


class BoundaryIoU(_Counts):
    """IoU within bands along the outlines (Cheng et al. 2021), mean over the classes present.

    Args:
        num_classes: Number of classes.
        ratio: Width of the bands over the picture's diagonal (the paper's 0.02).

    Attributes:
        counts: (num_classes, 3) int64, see :func:`boundary_counts`.
    """

    def __init__(self, num_classes: int, ratio: float = 0.02, **kwargs: Any) -> None:
        super().__init__((num_classes, 3), torch.int64, **kwargs)
        self.num_classes = num_classes
        self.ratio = ratio

    def update(self, truth: Tensor, found: Tensor) -> None:
        """Count a batch: labels and predictions (B, H, W) from :func:`as_classes`."""
        width = max(round(self.ratio * math.hypot(*truth.shape[1:])), 1)
        self.counts += boundary_counts(truth, found, self.num_classes, width)

    def compute(self) -> Tensor:
        """A fraction, float64; nan without a labelled pixel."""
        return _iou(self.counts.double()).nanmean()


class CalibrationError(_Counts):
    """Expected calibration error (Guo et al. 2017), over pixels.

    The gap between confidence and accuracy, mean over 15 equal bins of confidence, weighted by
    their pixels. torchmetrics' class keeps every confidence it is given; this one keeps counts.

    Args:
        num_classes: Number of classes.

    Attributes:
        counts: (15, 3) float64, see :func:`calibration_counts`.
    """

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__((NUM_BINS, 3), torch.float64, **kwargs)
        self.num_classes = num_classes

    def update(self, truth: Tensor, found: Tensor, confidence: Tensor) -> None:
        """Count a batch: labels and predictions (B, H, W) from :func:`as_classes`, and the
        probability of the predicted class."""
        self.counts += calibration_counts(truth, found, confidence, self.num_classes)

    def compute(self) -> Tensor:
        """A fraction, float64; nan without a labelled pixel."""
        pixels, confidence, right = self.counts.unbind(1)
        return (confidence - right).abs().sum() / pixels.sum()


def _iou(counts: Tensor) -> Tensor:
    """(C, 3) intersection, labelled, predicted -> (C,), nan where a class is absent (0 / 0)."""
    intersection, labelled, predicted = counts.unbind(1)
    return intersection / (labelled + predicted - intersection)


def as_classes(
    predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Labels and predictions with the ignored pixels as one more class, ``num_classes``, in both.

    So nothing has to be picked out, which would cost more than all the counting.

    Args:
        predictions: (B, H, W) int64 train ids.
        labels: (B, H, W) int64 train ids.
        num_classes: Number of classes.
        ignore_index: The label that does not count.

    Returns:
        (B, H, W) int32 each, labels first.

    Raises:
        ValueError: a label or prediction is not a train id.
    """
    ignored = labels == ignore_index
    both = []
    for what, ids in (("label", labels.masked_fill(ignored, 0)), ("prediction", predictions)):
        low, high = (extreme.item() for extreme in ids.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{what} {low if low < 0 else high} is not a train id: there are {num_classes} "
                f"classes, 0 to {num_classes - 1}, and the ignored label {ignore_index}"
            )
        both.append(ids.int().masked_fill_(ignored, num_classes))
    return both[0], both[1]


def confusion_matrices(truth: Tensor, found: Tensor, num_classes: int) -> Tensor:
    """The confusion matrix of every picture.

    Args:
        truth, found: (B, H, W) from :func:`as_classes`.
        num_classes: Number of classes.

    Returns:
        (B, num_classes, num_classes) int64 pixels, rows label, columns prediction.
    """
    side = num_classes + 1
    shape = (len(truth), side, side)
    pictures = torch.arange(len(truth), dtype=truth.dtype, device=truth.device)
    if math.prod(shape) > torch.iinfo(truth.dtype).max:
        pictures = pictures.long()
    cells = (pictures[:, None, None] * side + truth) * side + found
    counts = torch.bincount(cells.ravel(), minlength=math.prod(shape)).view(shape)
    return counts[:, :num_classes, :num_classes]


def counts_of(matrices: Tensor) -> Tensor:
    """(B, C, C) confusion -> (B, C, 3) pixels of the intersection, labelled, predicted."""
    return torch.stack([matrices.diagonal(dim1=1, dim2=2), matrices.sum(2), matrices.sum(1)], dim=2)


def boundary_counts(truth: Tensor, found: Tensor, num_classes: int, width: int) -> Tensor:
    """What boundary IoU is made of (Cheng et al. 2021): counts within bands along the outlines.

    A pixel is in its class's band if it is at most ``width`` pixels (in rows and columns) away
    from one of another class or from the picture's border. Ignored pixels are a class of their
    own in label and prediction alike, and are not scored.

    Args:
        truth, found: (B, H, W) from :func:`as_classes`.
        num_classes: Number of classes.
        width: Of the bands, in pixels.

    Returns:
        (num_classes, 3) int64 pixels of the intersection, labelled, predicted.
    """
    in_truth, in_found = near_others(truth, width), near_others(found, width)
    both = in_truth & in_found & (truth == found)
    # Of the labels: outside the bands, inside, inside and right.
    side = num_classes + 1
    kinds = (in_truth.int().add_(both)).mul_(side).add_(truth)
    _, missed, right = torch.bincount(kinds.ravel(), minlength=3 * side).view(3, side)
    predicted = torch.bincount(in_found.int().mul_(side).add_(found).ravel(), minlength=2 * side)
    return torch.stack([right, missed + right, predicted[side:]], dim=1)[:num_classes]


def near_others(ids: Tensor, width: int) -> Tensor:
    """(B, H, W) -> whether the square of 2 width + 1 pixels around holds anything else.

    It does if two neighbours in it differ, and that is a question about single bits.
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
    truth: Tensor, found: Tensor, confidence: Tensor, num_classes: int
) -> Tensor:
    """Counts by confidence, in bins of equal width.

    Args:
        truth, found: (B, H, W) from :func:`as_classes`.
        confidence: (B, H, W) probability of the predicted class.
        num_classes: Number of classes.

    Returns:
        (NUM_BINS, 3) float64: labelled pixels, sum of their confidence, pixels that are right.
    """
    # Of a network that diverged the confidence is nan, and so the sum of its bin shall be.
    bins = (confidence * NUM_BINS).nan_to_num().int().clamp_(max=NUM_BINS - 1)
    bins.masked_fill_(truth == num_classes, NUM_BINS)
    right = torch.bincount((2 * bins + (truth == found)).ravel(), minlength=2 * NUM_BINS + 2)
    right = right.view(-1, 2)
    sums = torch.bincount(bins.ravel(), confidence.double().ravel(), minlength=NUM_BINS + 1)
    return torch.stack([right.sum(1), sums, right[:, 1]], dim=1)[:NUM_BINS]
