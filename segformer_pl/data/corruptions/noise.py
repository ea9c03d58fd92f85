"""Noise: what a sensor adds. Functions of :data:`segformer_pl.data.corruptions.GROUPS`."""

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.float32]  # (H, W, 3) RGB in 0 to 1


def gaussian_noise(picture: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """Adds N(0, std) to every channel of every pixel, independently."""
    std = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return picture + np.float32(std) * rng.standard_normal(picture.shape, np.float32)


def impulse_noise(picture: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """Salt and pepper: of a share of the values one half becomes 1, the other half 0.

    Each channel is drawn on its own, so the specks are coloured.
    """
    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    drawn = rng.random(picture.shape, np.float32)
    pepper, salt = drawn < amount / 2, drawn >= 1 - amount / 2
    return np.where(salt, 1, np.where(pepper, 0, picture)).astype(np.float32)


def shot_noise(picture: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """Photons are counted: a Poisson number of them with the mean ``rate`` where it is white."""
    rate = (60, 25, 12, 5, 3)[severity - 1]
    return (rng.poisson(picture * rate) / rate).astype(np.float32)


def speckle_noise(picture: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """Multiplies every value by 1 + N(0, std)."""
    std = (0.15, 0.20, 0.35, 0.45, 0.60)[severity - 1]
    return picture + picture * np.float32(std) * rng.standard_normal(picture.shape, np.float32)
