"""From logits at the network's stride to one class per pixel."""

from torch import Tensor
from torch.nn import functional as F


def predict_labels(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The most likely class of every pixel, after bilinear upsampling of the logits.

    Args:
        logits: (B, num_classes, h, w).
        size: Height and width of the picture in pixels.

    Returns:
        (B, height, width) int64 train ids.
    """
    precise = logits.float() if logits.dtype.itemsize < 4 else logits
    return F.interpolate(precise, size=size, mode="bilinear", align_corners=False).argmax(dim=1)
