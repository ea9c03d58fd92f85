"""Which output units an ERF is measured for, and how the channels of a unit become one number.

Coordinates are (row, column). Two questions have different answers:

Which unit does a pixel select?
    The image is divided into as many equal cells as the feature map has units, and a pixel selects
    the unit whose cell it lies in. Pixel (H // 2, W // 2) selects unit (h // 2, w // 2) wherever
    the stride divides the image::

        pixels   0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 14 15     16 pixels, 4 units:
        units       0    |    1    |     2     |      3          pixel 6 selects unit 1

Where is that unit?
    Distances count from the position of the unit (:func:`unit_position`), not from the pixel that
    selected it. Strided layers with padding (SegFormer, ResNet) centre unit k on pixel
    ``stride * k``. Layers that cut the image into patches without padding (ViT, ConvNeXt, Swin)
    centre it on the middle of its patch, ``stride * k + (stride - 1) / 2``, which can lie between
    two pixels. Unit 1 above is at pixel 4 in SegFormer and at 5.5 in a ViT.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segformer_pl.errors import UserError

NamedReduction = Literal["relu", "l1", "sum", "random"]
Reduction = NamedReduction | int
Gradient = Literal["abs", "relu", "signed"]


@dataclass(frozen=True)
class Grid:
    """``rows`` x ``columns`` units, spread evenly over the image."""

    rows: int
    columns: int


@dataclass(frozen=True)
class ClassUnits:
    """All units of one class together: the gradient of the mean over them.

    Args:
        train_id: Index of the class.
        source: Whether the label or the network's own prediction says which units have the class.

    Raises:
        UserError: The class index or the source is not valid.
    """

    train_id: int
    source: Literal["label", "prediction"] = "label"

    def __post_init__(self) -> None:
        if not is_integer(self.train_id) or self.train_id < 0:
            raise UserError(f"ClassUnits: train_id={self.train_id!r}: give a train id, from 0 up")
        if self.source not in ("label", "prediction"):
            raise UserError(f"ClassUnits: source={self.source!r}: give 'label' or 'prediction'")


PixelList = Sequence[tuple[int, int]]  # (row, column) each
Position = tuple[float, float]  # (row, column) in pixels, also between pixels
Units = Literal["center"] | PixelList | Grid | ClassUnits


def is_integer(value: object) -> bool:
    """Return whether a value is an integer; True and False do not count as 1 and 0."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def selecting_pixels(
    units: Literal["center"] | PixelList | Grid, size: tuple[int, int]
) -> PixelList:
    """Return the pixels (row, column) that select the units in an image.

    Args:
        units: The middle of the image, pixels, or a grid.
        size: Height and width of the image in pixels.

    Raises:
        UserError: There are no pixels, or one lies outside the image.
    """
    height, width = size
    if isinstance(units, str) and units == "center":
        return [(height // 2, width // 2)]
    if isinstance(units, Grid):
        if not (1 <= units.rows <= height and 1 <= units.columns <= width):
            raise UserError(f"units={units}: an image of {height}x{width} pixels has no such grid")
        return [
            ((2 * i + 1) * height // (2 * units.rows), (2 * j + 1) * width // (2 * units.columns))
            for i in range(units.rows)
            for j in range(units.columns)
        ]
    pixels = _pixel_list(units)
    for row, column in pixels:
        if not (0 <= row < height and 0 <= column < width):
            raise UserError(
                f"units: pixel ({row}, {column}) lies outside the image of {height}x{width} "
                "pixels; rows and columns count from 0"
            )
    return pixels


def _pixel_list(units: object) -> PixelList:
    message = (
        f"units={units!r}: give 'center', a list of (row, column) pixels, a Grid or ClassUnits"
    )
    if isinstance(units, str) or not isinstance(units, (Sequence, np.ndarray)) or len(units) == 0:
        raise UserError(message)
    try:
        return [(operator.index(row), operator.index(column)) for row, column in units]
    except (TypeError, ValueError) as error:  # a number in place of a pair, or fractions
        raise UserError(message) from error


def units_at_pixels(
    pixels: PixelList, size: tuple[int, int], grid: tuple[int, int]
) -> tuple[list[int], list[int]]:
    """Return rows and columns of the units that pixels select in a map of ``grid`` units."""
    rows = [row * grid[0] // size[0] for row, _ in pixels]
    columns = [column * grid[1] // size[1] for _, column in pixels]
    return rows, columns


def unit_position(
    unit: tuple[int, int], size: tuple[int, int], grid: tuple[int, int], in_patches: bool
) -> Position:
    """Return (row, column) of the centre of a unit in pixels, as explained above.

    Args:
        unit: Row and column of the unit in the feature map.
        size: Height and width of the image.
        grid: Height and width of the feature map.
        in_patches: Whether the network cuts patches without padding, :func:`cuts_patches`.
    """
    position = []
    for index, pixels, units in zip(unit, size, grid):
        stride = _stride(pixels, units)
        first = -(-index * pixels // units) if stride is None else index * stride
        middle = ((stride or pixels / units) - 1) / 2 if in_patches and pixels > units else 0
        position.append(first + middle)
    return position[0], position[1]


def unit_at_position(
    position: Position, size: tuple[int, int], grid: tuple[int, int]
) -> tuple[int, int]:
    """Return row and column of the unit at a position, the inverse of :func:`unit_position`."""
    row, column = (
        int(coordinate // (_stride(pixels, units) or pixels / units))
        for coordinate, pixels, units in zip(position, size, grid)
    )
    return row, column


def _stride(pixels: int, units: int) -> int | None:
    """Return the stride of a layer that makes ``units`` of ``pixels``, or None if none does.

    Where it does not divide the image, it is the power of two that gives the number of units,
    rounded up (padding) or down (no padding): 65 pixels and 17 units have stride 4.
    """
    if pixels % units == 0:
        return pixels // units
    powers = [2**n for n in range(1, pixels.bit_length())]
    padded = [power for power in powers if -(-pixels // power) == units]
    cut = [power for power in powers if pixels // power == units]
    return next(iter(padded + cut), None)


def cuts_patches(model: nn.Module) -> bool:
    """Return whether the windows of all strided layers neither overlap nor are padded."""
    strided = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            kernel, stride, padding = (
                _pair(value) for value in (module.kernel_size, module.stride, module.padding)
            )
            if max(stride) > 1:
                strided.append(kernel == stride and padding == (0, 0))
    return bool(strided) and all(strided)


def _pair(value: object) -> tuple[int, int]:
    if isinstance(value, str):  # padding='valid'; torch refuses 'same' with a stride
        return (0, 0)
    return (value[0], value[1]) if isinstance(value, tuple) else (value, value)  # type: ignore[return-value]


def class_mask(classes: Tensor, train_id: int, grid: tuple[int, int]) -> Tensor:
    """Train ids (B, H, W) of pixels -> (B, h, w) bool, which units have the class.

    A unit has the class of the pixel in the middle of its cell.
    """
    resized = F.interpolate(classes[:, None].float(), size=grid, mode="nearest-exact")
    return resized[:, 0] == train_id


def check_reduction(reduction: Reduction, gradient: Gradient) -> None:
    """Check that both are known.

    Raises:
        UserError: One of them is not.
    """
    if not is_integer(reduction) and reduction not in get_args(NamedReduction):
        raise UserError(
            f"reduction={reduction!r}: give one of {', '.join(get_args(NamedReduction))}, or the "
            "number of a channel"
        )
    if gradient not in get_args(Gradient):
        raise UserError(f"gradient={gradient!r}: give one of {', '.join(get_args(Gradient))}")


def reduce_channels(vectors: Tensor, reduction: Reduction, layer: str, seed: int) -> Tensor:
    """(..., C) -> (...), one number per unit.

    Raises:
        UserError: The layer has no such channel.
    """
    if not isinstance(reduction, str):
        if not 0 <= reduction < vectors.shape[-1]:
            raise UserError(
                f"reduction={reduction}: layer {layer!r} has channels 0 to {vectors.shape[-1] - 1}"
            )
        return vectors[..., reduction]
    if reduction == "relu":
        return vectors.relu().sum(-1)
    if reduction == "l1":
        return vectors.abs().sum(-1)
    if reduction == "sum":
        return vectors.sum(-1)
    # A separate generator makes the same projection for every image and every batch, and leaves
    # torch's random state alone.
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(vectors.shape[-1], generator=generator, dtype=torch.float64)
    projection /= vectors.shape[-1] ** 0.5
    return vectors @ projection.to(vectors)


def refuse_sum_after_norm(feature: Tensor, layer: str) -> None:
    """Check that a feature map does not come straight out of a LayerNorm.

    The sum of normalised channels is constant where the weights of the norm are equal, so its
    gradient is zero. With trained weights a small gradient remains, which does not describe the
    receptive field. The check follows the autograd graph back over operations that only change the
    memory layout.

    Raises:
        UserError: The feature map does.
    """
    node = feature.grad_fn
    while node is not None:
        name = node.name()
        if name.startswith("NativeLayerNormBackward"):
            raise UserError(
                f"reduction='sum': layer {layer!r} ends in a LayerNorm, after which the plain sum "
                "of the channels is constant and has no gradient; use 'relu' or 'l1', or a layer "
                "before the norm"
            )
        if not name.startswith(_LAYOUT_CHANGES):
            return
        node = node.next_functions[0][0]


_LAYOUT_CHANGES = tuple(
    f"{name}Backward"
    for name in (
        *("Permute", "View", "Transpose", "Clone", "Reshape", "UnsafeView", "ReshapeAlias"),
        *("Slice", "Select", "Index", "Contiguous", "Alias", "T", "Unsqueeze", "Squeeze"),
        *("AsStrided", "Copy", "Stack", "ToCopy"),
    )
)


def shift(maps: Tensor, down: int, right: int) -> Tensor:
    """Move maps (B, H, W) by ``down`` rows and ``right`` columns; zeros enter from outside."""
    if down == right == 0:
        return maps
    height, width = maps.shape[1:]
    shifted = torch.zeros_like(maps)
    if abs(down) >= height or abs(right) >= width:
        return shifted
    target_rows = slice(max(down, 0), height + min(down, 0))
    source_rows = slice(max(-down, 0), height + min(-down, 0))
    target_columns = slice(max(right, 0), width + min(right, 0))
    source_columns = slice(max(-right, 0), width + min(-right, 0))
    shifted[:, target_rows, target_columns] = maps[:, source_rows, source_columns]
    return shifted
