"""Digital processing in a camera: corruptions of :data:`segformer_pl.data.corruptions.GROUPS`.

All are deterministic. Brightness changes V of HSV, and saturation changes S. Hue stays the same, so
the result is computed from RGB without a conversion: V is the largest channel, and S is the
difference between the largest and the smallest channel, divided by V.
"""

from io import BytesIO

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

FloatImage = npt.NDArray[np.float32]  # (H, W, 3) RGB in 0 to 1


def brightness(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Add 0.1 to 0.5 to V in HSV, at most 1; hue and saturation do not change."""
    added = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    value = np.maximum.reduce(cv2.split(image))[..., None]
    brighter = np.minimum(value + np.float32(added), 1)
    # Black has no hue, so it becomes grey.
    factor = np.divide(brighter, value, where=value > 0, out=np.zeros_like(value))
    return np.where(value > 0, image * factor, brighter)


def contrast(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Scale each channel's deviation from its mean over the image by 0.4 to 0.05."""
    factor = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    mean = image.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    return (image - mean) * np.float32(factor) + mean


def saturate(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Multiply S in HSV by a factor and add a constant: pale at severity 1 and 2, vivid from 3 on.

    Pale and vivid are two scales: whether 2 or 3 is the stronger depends on the image. Grey has
    hue 0, as in the original, so the constant added at severity 4 and 5 makes it reddish.
    """
    factor, added = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[severity - 1]
    value = np.maximum.reduce(cv2.split(image))[..., None]
    chroma = value - np.minimum.reduce(cv2.split(image))[..., None]
    saturation = np.divide(chroma, value, where=value > 0, out=np.zeros_like(value))
    new_saturation = np.clip(saturation * np.float32(factor) + np.float32(added), 0, 1)
    # Distance of each channel from V, relative to the chroma. For grey it is that of hue 0 (red):
    # 0 for red, 1 for green and blue.
    below = np.tile(np.array([0, 1, 1], np.float32), (*value.shape[:2], 1))
    np.divide(value - image, chroma, where=chroma > 0, out=below)
    return value * (1 - new_saturation * below)


def jpeg_compression(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Compress as JPEG of quality 25 to 7 with Pillow's encoder and chroma subsampling 4:2:0."""
    buffer = BytesIO()
    levels = np.rint(image * 255).astype(np.uint8)
    Image.fromarray(levels).save(buffer, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    return np.asarray(Image.open(buffer), np.float32) / np.float32(255)
