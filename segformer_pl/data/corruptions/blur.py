"""Blur: what optics and motion take. Functions of :data:`segformer_pl.data.corruptions.GROUPS`.

Beyond its border a picture goes on with the pixels of the border.
"""

import math

import cv2
import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.float32]  # (H, W, 3) RGB in 0 to 1, or one channel (H, W)


def motion_blur(picture: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """The picture is drawn out along a line of an angle from -45 to 45 degrees."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    return smear(picture, radius, sigma, rng.uniform(-45, 45))


def defocus_blur(picture: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """Every point becomes a disk. Nothing is drawn."""
    radius, alias = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    return _filter(picture, disk(radius, alias))


def glass_blur(picture: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """Pixels are replaced by neighbours, between two Gaussian blurs: frosted glass.

    The original means to exchange each pixel with one that is -shift to shift - 1 rows and columns
    away, one after the other from the lower right. But it exchanges views of one array, so that the
    first assignment already overwrites what the second reads: the pixel gets its neighbour's colour
    and the neighbour keeps it. :func:`replacements` follows that, draw by draw.
    """
    sigma, shift, iterations = (
        (0.7, 1, 2),
        (0.9, 2, 1),
        (1.0, 2, 3),
        (1.1, 3, 2),
        (1.5, 4, 2),
    )[severity - 1]
    smooth = gaussian(picture, sigma)
    height, width = picture.shape[:2]
    places = replacements(height, width, shift, iterations, rng)
    return gaussian(smooth.reshape(-1, 3)[places].reshape(picture.shape), sigma)


def gaussian_blur(picture: Picture, severity: int, rng: np.random.Generator) -> Picture:
    """A Gaussian of 1 to 6 pixels. Nothing is drawn."""
    return gaussian(picture, (1, 2, 3, 4, 6)[severity - 1])


def gaussian(picture: Picture, sigma: float) -> Picture:
    """Gaussian blur, cut off at four standard deviations; ``sigma`` in pixels."""
    side = 2 * int(4 * sigma + 0.5) + 1
    return cv2.GaussianBlur(  # type: ignore[return-value]
        picture, (side, side), sigma, borderType=cv2.BORDER_REPLICATE
    )


def smear(picture: Picture, radius: int, sigma: float, degrees: float) -> Picture:
    """Blur in one direction: a pixel becomes the mean of those that follow it on a line.

    Args:
        picture: (H, W) or (H, W, 3).
        radius: The line has 2 radius + 1 pixels, each the nearest to its place.
        sigma: Their weights are half a Gaussian of this standard deviation, in pixels.
        degrees: Direction, clockwise from the right.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    angle = math.radians(degrees)
    rows, columns = (
        np.rint(steps * part).astype(int) for part in (math.sin(angle), math.cos(angle))
    )
    kernel = np.zeros((np.ptp(rows) + 1, np.ptp(columns) + 1), np.float32)
    np.add.at(kernel, (rows - rows.min(), columns - columns.min()), weights / weights.sum())
    return _filter(picture, kernel, (-int(columns.min()), -int(rows.min())))


def disk(radius: int, alias: float) -> npt.NDArray[np.float32]:
    """The kernel of defocus: a disk that integrates to 1, its edge softened.

    Args:
        radius: In pixels.
        alias: Standard deviation in pixels of the Gaussian that softens the edge.

    Our own: the softened edge has room, and the sum is 1 exactly. In the original the kernels of
    radius 8 and 10 are cut off and brighten a picture by a percent.
    """
    reach = 1 if radius <= 8 else 2
    offsets = np.arange(-radius - reach, radius + reach + 1)
    inside = (offsets**2 + offsets[:, None] ** 2 <= radius**2).astype(np.float32)
    soft = cv2.GaussianBlur(inside, (2 * reach + 1, 2 * reach + 1), alias)
    return soft / soft.sum()


def replacements(
    height: int, width: int, shift: int, iterations: int, rng: np.random.Generator
) -> npt.NDArray[np.int32]:
    """Where each pixel's colour comes from after the replacements of :func:`glass_blur`.

    A pixel takes the colour that its neighbour has at that moment: the new one if the neighbour
    came before, below or to the right, otherwise the old one. So every pixel is at the end of a
    chain of neighbours that came before. Chains are followed for all pixels at once, twice as far
    in every round. Pixels whose neighbours may lie outside the picture keep their colour.

    Args:
        height: In pixels.
        width: In pixels.
        shift: The farthest that a neighbour may be, in pixels.
        iterations: How often this is done.
        rng: Where the neighbours come from. Of each iteration it draws the columns and rows, (2,
            rows, columns), in the order in which the original goes through the pixels.

    Returns:
        (H W) flat indices.
    """
    start = np.arange(height * width, dtype=np.int32)
    places = start
    # From the lower right to the upper left, the outermost first: the original's own limits.
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
        while not np.array_equal(link, further := link[link]):
            link = further
        places = places[neighbour[link]]
    return places


def _filter(
    picture: Picture, kernel: npt.NDArray[np.float32], anchor: tuple[int, int] = (-1, -1)
) -> Picture:
    return cv2.filter2D(  # type: ignore[return-value]
        picture, -1, kernel, anchor=anchor, borderType=cv2.BORDER_REPLICATE
    )
