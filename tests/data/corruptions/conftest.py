"""Fixtures of the tests of corruptions: images, and a corruption with its generator."""

import numpy as np
import pytest

from segformer_pl.data.corruptions import corrupt


@pytest.fixture(scope="session")
def photograph():
    """Function (height, width, seed) -> an image of smooth colours, edges, grain and greys."""

    def call(height, width, seed=0):
        rng = np.random.default_rng(seed)
        rows, columns = np.mgrid[:height, :width] / 20
        waves = np.stack(
            [np.sin(rows * f + columns * g + seed) for f, g in ((1, 2), (2, -1), (0, 3))]
        )
        pixels = 128 + 80 * waves.transpose(1, 2, 0) + rng.normal(0, 4, (height, width, 3))
        pixels[height // 4 : height // 2, width // 4 : width // 2] = (200, 30, 40)
        pixels[height // 2 :, : width // 4] *= 0.3
        pixels[: height // 8] = np.linspace(0, 255, width)[:, None]
        return np.clip(pixels, 0, 255).astype(np.uint8)

    return call


@pytest.fixture(scope="session")
def flat():
    """Function (color, size) -> an image of one colour."""

    def call(color, size=(96, 128)):
        return np.full((*size, 3), color, np.uint8)

    return call


@pytest.fixture(scope="session")
def run():
    """Function (image, name, severity, *seed) -> the image with a corruption."""

    def call(image, name, severity, *seed):
        return corrupt(image, name, severity, np.random.default_rng([severity, *seed]))

    return call
