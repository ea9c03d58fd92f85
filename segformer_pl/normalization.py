"""Normalisation of images before they enter a network."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Per channel (RGB), for images in 0 to 1; the values of torchvision and timm
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Normalization:
    """Normalisation ``(image - mean) / std`` per channel.

    Args:
        mean: Mean of each channel, for images in 0 to 1.
        std: Standard deviation of each channel, for images in 0 to 1.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, images: "Tensor") -> "Tensor":
        """Normalise images (B, C, H, W) in 0 to 1; dtype and device stay."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std
