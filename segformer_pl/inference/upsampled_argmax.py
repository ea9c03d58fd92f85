"""The most likely class of every pixel, where only some pixels need upsampled class maps.

The values of a pixel are a weighted mean of those of the four cells around it. If one class is the
most likely in all four, it is the most likely between them, too. So only squares between cells of
different classes are upsampled, and a trained network's class maps have few of them::

    most likely class of the cells        squares between cells, at a scale factor of 4
        a   a   b                             +---+---+
        a   a   b                             | a | ? |     a: all 4 x 4 pixels are a
        a   b   b                             +---+---+     ?: 4 x 4 pixels are upsampled
                                              | ? | ? |
                                              +---+---+

The result is exact, with upsampled values rounded like those of any other order of summation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from segformer_pl.bands import BAND_ELEMENTS

Size = tuple[int, int]


class _Axis(NamedTuple):
    """Output pixels along one axis, grouped by the two cells that they lie between.

    Group g lies between cells g - 1 and g. The first and the last group lie outside of the map,
    where both cells are the outermost one.

    Attributes:
        cells: The two cells of every group, (2, groups) int64.
        group: Group of every pixel, (pixels,) int64.
        pixels: Pixels of every group, (groups, n) int64; smaller groups repeat their last one.
        weights: Weight of the second cell for ``pixels``, (groups, n).
        is_regular: Whether the weights of group 1 serve for all groups, as with an integer scale
            factor. In the first and the last group weights do not matter.
        is_used: Whether a group has pixels, (groups,) bool.
    """

    cells: Tensor
    group: Tensor
    pixels: Tensor
    weights: Tensor
    is_regular: bool
    is_used: Tensor

    @classmethod
    def between(cls, num_cells: int, length: int, num_pixels: int, like: Tensor) -> "_Axis":
        """Group the first ``num_pixels`` of ``length`` pixels that ``num_cells`` are upsampled to.

        They are those of ``F.interpolate(mode="bilinear", align_corners=False)``.
        """
        pixel = torch.arange(num_pixels, dtype=torch.float64)
        position = (pixel + 0.5) * (num_cells / length) - 0.5
        before = position.floor()
        group = (before.long() + 1).clamp(0, num_cells)
        count = torch.bincount(group, minlength=num_cells + 1)
        start = count.cumsum(0) - count
        last = (count - 1).clamp(min=0)
        n = int(count.max())
        pixels = (start[:, None] + torch.arange(n).minimum(last[:, None])).clamp(max=num_pixels - 1)
        cells = torch.stack([torch.arange(-1, num_cells), torch.arange(num_cells + 1)])
        return cls(
            cells.clamp(0, num_cells - 1),
            group,
            pixels,
            (position - before)[pixels].to(like),
            num_pixels == length and length % num_cells == 0 and num_cells > 1,
            count > 0,
        )


def upsampled_argmax(maps: Tensor, full_size: Size, size: Size, dtype: torch.dtype) -> Tensor:
    """Return the most likely class of every pixel of bilinearly upsampled class maps, on the CPU.

    Args:
        maps: Class maps, (B, h, w, num_classes), contiguous.
        full_size: Height and width that the maps are upsampled to.
        size: Height and width of the result, its upper left part.
        dtype: Type of the result.

    Returns:
        Class indices, (B, height, width): those of
        ``F.interpolate(maps, full_size, mode="bilinear").argmax(1)``.
    """
    rows, columns = (_Axis.between(*n, like=maps) for n in zip(maps.shape[1:3], full_size, size))
    return torch.stack([_argmax(image, rows, columns, dtype) for image in maps])


def _argmax(cells: Tensor, rows: _Axis, columns: _Axis, dtype: torch.dtype) -> Tensor:
    """Return the most likely class of every pixel of one image, from cells (h, w, num_classes)."""
    width, num_classes = cells.shape[1:]
    flat = cells.flatten(0, 1)
    # Corners of the squares, (4, groups of rows, groups of columns): upper left, upper right, ...
    corners = (rows.cells[:, None, :, None] * width + columns.cells[:, None]).flatten(0, 1)
    corners = corners.broadcast_to(4, len(rows.is_used), len(columns.is_used))
    classes = most_likely(flat)[corners]
    labels = classes[0].to(dtype)[rows.group[:, None], columns.group]
    is_mixed = (classes[1:] != classes[0]).any(0) & rows.is_used[:, None] & columns.is_used
    per_square = rows.weights.shape[1] * columns.weights.shape[1] * num_classes
    at_a_time = max(BAND_ELEMENTS["cpu"] // per_square, 1)
    for row, column in (index.unbind(1) for index in is_mixed.nonzero().split(at_a_time)):
        values = flat[corners[:, row, column]]  # (4, squares, num_classes)
        upsampled = _upsample(values, rows, columns, row, column)
        pixels = rows.pixels[row].T[:, None], columns.pixels[column].T[None]
        labels[pixels] = most_likely(upsampled).to(dtype)
    return labels


def _upsample(values: Tensor, rows: _Axis, columns: _Axis, row: Tensor, column: Tensor) -> Tensor:
    """Upsample squares, from corners (4, n, C) to pixels (rows, columns, n, C)."""
    is_regular = rows.is_regular and columns.is_regular
    if is_regular:
        row = column = row.new_ones(1)
    down, right = rows.weights[row].T[:, None], columns.weights[column].T[None]
    weights = torch.stack(
        [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], dim=-1
    )  # (rows, columns, n or 1, 4)
    if is_regular:  # one large matrix product in place of many small ones
        return torch.tensordot(weights.squeeze(2), values, dims=1)
    return torch.einsum("rcnk,knd->rcnd", weights, values)


def most_likely(values: Tensor) -> Tensor:
    """Return the index of the largest value of the last dimension.

    On the CPU numpy needs a quarter of torch's time.
    """
    if values.is_cpu:
        return torch.from_numpy(values.numpy().argmax(-1))
    return values.argmax(-1)
