"""Digital: what a camera's processing does. Functions of
:data:`segformer_pl.data.corruptions.GROUPS`; nothing is drawn.

Brightness and saturation are changed in HSV. Hue stays and the conversion is linear in the rest, so
both are written in RGB: V is the largest channel, S the distance of the smallest one from it, over
V.
"""

from io import BytesIO

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

Picture = npt.NDArray[np.float32]  # (H, W, 3) RGB in 0 to 1


def brightness(picture: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """V + 0.1 to 0.5 in HSV, at most 1; hue and saturation stay."""
    added = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    value = np.maximum.reduce(cv2.split(picture))[..., None]
    brighter = np.minimum(value + np.float32(added), 1)
    # Black has no hue: it becomes grey.
    factor = np.divide(brighter, value, where=value > 0, out=np.zeros_like(value))
    return np.where(value > 0, picture * factor, brighter)


def contrast(picture: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """Every channel's distance from its mean over the picture, times 0.4 to 0.05."""
    factor = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    mean = picture.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    return (picture - mean) * np.float32(factor) + mean


def saturate(picture: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """S times a factor plus a constant in HSV: pale at severity 1 and 2, gaudy from 3 on.

    Those are two scales: how 2 compares with 3 depends on how colourful the picture is.
    Grey has hue 0, as in the original: what is added at severity 4 and 5 makes it reddish.
    """
    factor, added = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[severity - 1]
    value = np.maximum.reduce(cv2.split(picture))[..., None]
    chroma = value - np.minimum.reduce(cv2.split(picture))[..., None]
    saturation = np.divide(chroma, value, where=value > 0, out=np.zeros_like(value))
    wanted = np.clip(saturation * np.float32(factor) + np.float32(added), 0, 1)
    # How far each channel lies below V, over the chroma: 0 for red and 1 for the others in grey.
    below = np.tile(np.array([0, 1, 1], np.float32), (*value.shape[:2], 1))
    np.divide(value - picture, chroma, where=chroma > 0, out=below)
    return value * (1 - wanted * below)


def jpeg_compression(picture: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """JPEG of quality 25 to 7 by Pillow's encoder, colours at half the size (4:2:0)."""
    buffer = BytesIO()
    levels = np.rint(picture * 255).astype(np.uint8)
    Image.fromarray(levels).save(buffer, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    return np.asarray(Image.open(buffer), np.float32) / np.float32(255)
