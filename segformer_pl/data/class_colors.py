"""Colours of classes: packing into integers, and a palette for data sets without one."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from segformer_pl.errors import UserError

Color: TypeAlias = tuple[int, int, int]  # RGB, 0-255

OKABE_ITO: tuple[Color, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


def pack_color(color: Color) -> int:
    """Pack an RGB colour into one integer, ``0xRRGGBB``."""
    return color[0] << 16 | color[1] << 8 | color[2]


def unpack_color(number: int) -> Color:
    """Unpack an integer ``0xRRGGBB`` to RGB; inverse of :func:`pack_color`."""
    return number >> 16, number >> 8 & 255, number & 255


def pack_colors(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Pack an (H, W, 3) RGB image into (H, W) integers, see :func:`pack_color`."""
    red, green, blue = (image[..., channel].astype(np.int32) for channel in range(3))
    return red << 16 | green << 8 | blue


def distinct_colors(num_classes: int) -> tuple[Color, ...]:
    """Return class colours that are easy to distinguish, also with red-green colour blindness.

    The first seven are those of Okabe and Ito 2008 ("Color Universal Design"). Each further colour
    is the one of a regular RGB grid that is farthest from the previous ones in OKLab (Ottosson
    2020), where red-green differences count a third. The first colours do not depend on
    ``num_classes``.

    Args:
        num_classes: Number of colours.

    Returns:
        ``num_classes`` RGB colours in 0 to 255.

    Raises:
        UserError: ``num_classes`` exceeds the number of colours in the grid.
    """
    steps = np.linspace(0, 255, 16, dtype=np.int64)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    grid = np.concatenate([np.array(OKABE_ITO), grid[_oklab(grid)[:, 0] > 0.3]])  # no near-blacks
    if num_classes > len(grid):
        raise UserError(
            f"there are {len(grid)} distinct colours but {num_classes} classes; give labels.colors"
        )
    points = _oklab(grid) * (1, 1 / 3, 1)
    chosen: list[int] = []
    distance = np.full(len(grid), np.inf)
    for index in range(num_classes):
        chosen.append(index if index < len(OKABE_ITO) else int(distance.argmax()))
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(-1))
    return tuple((red, green, blue) for red, green, blue in grid[chosen].tolist())


def _oklab(rgb: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Convert sRGB 0-255, (N, 3), to OKLab: lightness, green-red and blue-yellow, (N, 3)."""
    srgb = rgb / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )
