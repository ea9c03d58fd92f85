"""Blur by optics and motion: corruptions of :data:`segformer_pl.data.corruptions.GROUPS`.

Every filter pads an image by repeating its border pixels.
"""

import math

import cv2
import numpy as np
import numpy.typing as npt

FloatImage = npt.NDArray[np.float32]  # (H, W, 3) RGB in 0 to 1, or one channel (H, W)


def motion_blur(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Blur along a line at a random angle from -45 to 45 degrees."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    return smear(image, radius, sigma, rng.uniform(-45, 45))


def defocus_blur(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Blur with a disk. Deterministic."""
    radius, alias = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    return _filter(image, disk(radius, alias))


def glass_blur(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Replace pixels by random neighbours, between two Gaussian blurs: frosted glass.

    The original is written to swap each pixel with one that is -shift to shift - 1 rows and
    columns away, starting at the lower right. But it swaps two views of one array::

        a, b = b, a     # a and b are views: `a = b` overwrites what `b = a` reads

    so the pixel gets its neighbour's colour and the neighbour keeps its own. :func:`replacements`
    reproduces this with the same random numbers.
    """
    sigma, shift, iterations = (
        (0.7, 1, 2),
        (0.9, 2, 1),
        (1.0, 2, 3),
        (1.1, 3, 2),
        (1.5, 4, 2),
    )[severity - 1]
    smooth = gaussian(image, sigma)
    height, width = image.shape[:2]
    indices = replacements(height, width, shift, iterations, rng)
    return gaussian(smooth.reshape(-1, 3)[indices].reshape(image.shape), sigma)


def gaussian_blur(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Blur with a Gaussian of 1 to 6 pixels. Deterministic."""
    return gaussian(image, (1, 2, 3, 4, 6)[severity - 1])


def gaussian(image: FloatImage, sigma: float) -> FloatImage:
    """Blur with a Gaussian that is cut off at four standard deviations.

    Args:
        image: (H, W) or (H, W, 3).
        sigma: Standard deviation in pixels.
    """
    side = 2 * int(4 * sigma + 0.5) + 1
    return cv2.GaussianBlur(  # type: ignore[return-value]
        image, (side, side), sigma, borderType=cv2.BORDER_REPLICATE
    )


def smear(image: FloatImage, radius: int, sigma: float, degrees: float) -> FloatImage:
    """Blur in one direction: each pixel becomes a weighted mean of the pixels after it on a line.

    Args:
        image: (H, W) or (H, W, 3).
        radius: Half length of the line, which has 2 * radius + 1 pixels, rounded to the grid.
        sigma: Standard deviation in pixels of the half Gaussian that weights the pixels.
        degrees: Direction of the line, clockwise from the right.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    angle = math.radians(degrees)
    rows, columns = (
        np.rint(steps * component).astype(int) for component in (math.sin(angle), math.cos(angle))
    )
    kernel = np.zeros((np.ptp(rows) + 1, np.ptp(columns) + 1), np.float32)
    np.add.at(kernel, (rows - rows.min(), columns - columns.min()), weights / weights.sum())
    return _filter(image, kernel, (-int(columns.min()), -int(rows.min())))


def disk(radius: int, alias: float) -> npt.NDArray[np.float32]:
    """Return the kernel of the defocus blur: a disk with a soft edge and a sum of 1.

    Unlike the original, the kernel has a margin for the soft edge and sums to exactly 1. The
    original crops the kernels of radius 8 and 10, which brightens an image by one percent.

    Args:
        radius: Radius of the disk in pixels.
        alias: Standard deviation in pixels of the Gaussian that softens the edge.
    """
    margin = 1 if radius <= 8 else 2
    offsets = np.arange(-radius - margin, radius + margin + 1)
    inside = (offsets**2 + offsets[:, None] ** 2 <= radius**2).astype(np.float32)
    soft = cv2.GaussianBlur(inside, (2 * margin + 1, 2 * margin + 1), alias)
    return soft / soft.sum()


def replacements(
    height: int, width: int, shift: int, iterations: int, rng: np.random.Generator
) -> npt.NDArray[np.int32]:
    """Return the source index of each pixel after the replacements of :func:`glass_blur`.

    Pixels are processed from the lower right to the upper left. A pixel takes the current colour
    of its neighbour: the new colour if the neighbour has been processed already (it comes later in
    memory order), else the old one. Following processed neighbours gives a chain, whose last pixel
    takes an old colour. An example of four pixels, processed in the order 3, 2, 1, 0::

        pixel        0  1  2  3
        neighbour    1  3  1  2
        link         1  3  2  3    the neighbour if it was processed before, else the pixel itself
        link[link]   3  3  2  3    end of the chain
        result       2  2  1  2    neighbour of the end of the chain

    A Python loop over pixels would be slow, so all chains are followed at once. Replacing ``link``
    by ``link[link]`` doubles the number of steps along each chain.

    Pixels near the border, whose neighbours may lie outside the image, keep their colour.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        shift: Maximum distance of a neighbour in pixels along each axis.
        iterations: Number of passes over the image.
        rng: Source of the neighbours. Each iteration draws the column and row offsets, (2, rows,
            columns), in the original's order of pixels.

    Returns:
        (H * W,) flat indices into the image.
    """
    start = np.arange(height * width, dtype=np.int32)
    indices = start
    # The original's limits: from the lower right to the upper left, without the border.
    rows = np.arange(height - shift, shift, -1, dtype=np.int32)
    columns = np.arange(width - shift, shift, -1, dtype=np.int32)
    here = rows[:, None] * width + columns
    is_replaced = np.zeros(height * width, bool)
    is_replaced[here] = True
    for _ in range(iterations):
        right, down = rng.integers(-shift, shift, (2, *here.shape), np.int32)
        neighbour = start.copy()
        neighbour[here] = here + down * width + right
        link = np.where(is_replaced[neighbour] & (neighbour > start), neighbour, start)
        while not np.array_equal(link, doubled := link[link]):
            link = doubled
        indices = indices[neighbour[link]]
    return indices


def _filter(
    image: FloatImage, kernel: npt.NDArray[np.float32], anchor: tuple[int, int] = (-1, -1)
) -> FloatImage:
    return cv2.filter2D(  # type: ignore[return-value]
        image, -1, kernel, anchor=anchor, borderType=cv2.BORDER_REPLICATE
    )
