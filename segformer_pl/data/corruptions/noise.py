"""Sensor noise: corruptions of :data:`segformer_pl.data.corruptions.GROUPS`."""

import numpy as np
import numpy.typing as npt

FloatImage = npt.NDArray[np.float32]  # (H, W, 3) RGB in 0 to 1


def gaussian_noise(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Add N(0, std) to every channel of every pixel, independently."""
    std = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return image + np.float32(std) * rng.standard_normal(image.shape, np.float32)


def impulse_noise(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Salt and pepper noise: set a random share of the values, one half to 1 and the other to 0.

    Channels are independent, so the specks are coloured.
    """
    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    drawn = rng.random(image.shape, np.float32)
    pepper, salt = drawn < amount / 2, drawn >= 1 - amount / 2
    return np.where(salt, 1, np.where(pepper, 0, image)).astype(np.float32)


def shot_noise(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Poisson noise of a photon count whose mean is ``rate`` for white."""
    rate = (60, 25, 12, 5, 3)[severity - 1]
    return (rng.poisson(image * rate) / rate).astype(np.float32)


def speckle_noise(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Multiply every value by 1 + N(0, std)."""
    std = (0.15, 0.20, 0.35, 0.45, 0.60)[severity - 1]
    return image + image * np.float32(std) * rng.standard_normal(image.shape, np.float32)
