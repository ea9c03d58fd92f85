"""Segmentation scores of a whole set, from one confusion matrix."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class SegmentationScores(Metric):
    """mIoU, mAcc, aAcc and per-class IoU, accumulated over a set and summed over ranks.

    The state is one (num_classes, num_classes) int64 matrix, rows label, columns prediction, on
    the device. Scores are those of the reference protocol: IoU_c = I / (P + L - I),
    Acc_c = I / L, aAcc = sum I / sum L, mIoU and mAcc are means over the classes present. A class
    that is neither labelled nor predicted anywhere has no score (nan) and is left out of the
    means, not counted as 0.

    Args:
        num_classes: Number of classes.
        ignore_index: The label that does not count.
    """

    full_state_update = False
    confusion: Tensor

    def __init__(self, num_classes: int, ignore_index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        empty = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("confusion", empty, dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count a batch: predictions and labels (B, H, W), int64 train ids."""
        counted = labels != self.ignore_index
        cells = labels[counted] * self.num_classes + predictions[counted]
        self.confusion += torch.bincount(cells, minlength=self.num_classes**2).view_as(
            self.confusion
        )

    def compute(self) -> dict[str, Tensor]:
        """``miou``, ``macc``, ``aacc`` (scalars) and ``iou`` (num_classes,), fractions, float64.

        Without any labelled pixel all of them are nan. ``num_labelled`` is the number of pixels
        that counted.
        """
        confusion = self.confusion.double()
        intersection = confusion.diagonal()
        labelled = confusion.sum(dim=1)
        union = labelled + confusion.sum(dim=0) - intersection
        iou = intersection / union  # 0 / 0 = nan where a class is absent
        return {
            "miou": iou.nanmean(),
            "macc": (intersection / labelled).nanmean(),
            "aacc": intersection.sum() / labelled.sum(),
            "iou": iou,
            "num_labelled": labelled.sum(),
        }
