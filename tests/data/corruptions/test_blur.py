"""Blurs are those that their constants define."""

import numpy as np
import pytest

from segformer_pl.data.corruptions import GROUPS, blur


def delta(side=201):
    image = np.zeros((side, side, 3), np.float32)
    image[side // 2, side // 2] = 1
    return image


def moments(kernel):
    """Sum, mean position and standard deviation along rows and columns, relative to the centre."""
    rows, columns = np.indices(kernel.shape) - np.array(kernel.shape).reshape(2, 1, 1) // 2
    total = kernel.sum()
    means = [(kernel * offsets).sum() / total for offsets in (rows, columns)]
    stds = [
        np.sqrt((kernel * (offsets - mean) ** 2).sum() / total)
        for offsets, mean in zip((rows, columns), means)
    ]
    return total, means, stds


@pytest.mark.parametrize("severity", range(1, 6))
def test_blurred_delta(severity):
    rng = np.random.default_rng(severity)
    image = delta()
    sigma = (1, 2, 3, 4, 6)[severity - 1]
    total, means, stds = moments(blur.gaussian_blur(image, severity, rng)[..., 1])
    assert total == pytest.approx(1, abs=1e-5)
    assert means == pytest.approx([0, 0], abs=1e-4)
    assert stds == pytest.approx([sigma, sigma], rel=0.01)

    # A disk of radius r has a standard deviation of r / 2 along each axis.
    radius = (3, 4, 6, 8, 10)[severity - 1]
    alias = (0.1, 0.5, 0.5, 0.5, 0.5)[severity - 1]
    assert blur.disk(radius, alias).sum() == pytest.approx(1, abs=1e-6)
    total, means, stds = moments(blur.defocus_blur(image, severity, rng)[..., 0])
    assert total == pytest.approx(1, abs=1e-5)
    assert means == pytest.approx([0, 0], abs=1e-4)
    assert stds == pytest.approx([radius / 2] * 2, rel=0.06)

    # Each pixel is a mean of the pixels after it on a line, weighted by half a Gaussian.
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    for degrees in (-45, 0, 30):
        blurred = blur.smear(image, radius, sigma, degrees)[..., 2]
        total, means, _ = moments(blurred)
        steps = np.arange(2 * radius + 1)
        weights = np.exp(-(steps**2) / (2 * sigma**2))
        length = (weights * steps).sum() / weights.sum()
        assert total == pytest.approx(1, abs=1e-5)
        angle = np.radians(degrees)
        expected = [-length * np.sin(angle), -length * np.cos(angle)]
        assert means == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("name", GROUPS["blur"])
def test_blur_keeps_a_constant_image(name, flat, run):
    for severity in range(1, 6):
        assert np.array_equal(run(flat((10, 120, 250)), name, severity), flat((10, 120, 250)))


@pytest.mark.parametrize(("shift", "iterations"), [(1, 2), (2, 3), (4, 2)])
def test_replacements_equal_a_sequential_loop(shift, iterations):
    height, width = 30, 41
    indices = blur.replacements(height, width, shift, iterations, np.random.default_rng(0))
    # As in the original, `slow[here]` is a view, so this swap copies the neighbour and loses the
    # pixel.
    rng = np.random.default_rng(0)
    slow = np.arange(height * width).reshape(height, width, 1)
    rows, columns = (range(side - shift, shift, -1) for side in (height, width))
    for _ in range(iterations):
        right, down = rng.integers(-shift, shift, (2, len(rows), len(columns)), np.int32)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                here, there = (row, column), (row + down[i, j], column + right[i, j])
                slow[here], slow[there] = slow[there], slow[here]
    assert np.array_equal(indices, slow.ravel())
    assert len(np.unique(indices)) < height * width  # some colours are lost


def test_an_image_too_small_for_replacements_is_unchanged():
    indices = blur.replacements(3, 3, 4, 2, np.random.default_rng(0))
    assert np.array_equal(indices, np.arange(9))
