"""Training losses: logits at the network's own stride, labels at pixel size."""

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy on bilinearly upsampled logits, averaged over the labelled pixels.

    Without a single labelled pixel the loss is 0 with a gradient of 0, not nan.

    Args:
        logits: (B, num_classes, h, w).
        labels: (B, H, W) int64 train ids.
        ignore_index: The label that does not count.

    Returns:
        The loss, a float32 (or float64) scalar.
    """
    upsampled = F.interpolate(
        logits.float() if logits.dtype.itemsize < 4 else logits,
        size=labels.shape[1:],
        mode="bilinear",
        align_corners=False,
    )
    total = F.cross_entropy(upsampled, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)
