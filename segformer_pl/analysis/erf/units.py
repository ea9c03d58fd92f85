"""Which output units an ERF is measured for, and how a unit's channels become one number.

Coordinates are (row, column). A pixel of the picture belongs to the unit whose cell holds it when
the picture is divided into as many cells as the feature map has units: pixel (H // 2, W // 2)
belongs to unit (h // 2, w // 2) wherever the stride divides the picture.

A unit has a place of its own, from which distances count (:func:`place_of_unit`): of networks whose
strided layers are padded (SegFormer, ResNet) unit k is centred on pixel ``stride * k``; of those
that cut the picture into patches without padding (ViT, ConvNeXt, Swin) on the middle of its patch,
``stride * k + (stride - 1) / 2``, which lies between pixels.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NamedReduction = Literal["relu", "l1", "sum", "random"]
Reduction = NamedReduction | int
Gradient = Literal["abs", "relu", "signed"]


@dataclass(frozen=True)
class Grid:
    """``rows`` x ``columns`` units, spread evenly over the picture."""

    rows: int
    columns: int


@dataclass(frozen=True)
class ClassPixels:
    """All units of one class together: the gradient of the mean over them.

    Attributes:
        train_id: The class.
        source: Whether the label or the network's own prediction says which units they are.
    """

    train_id: int
    source: Literal["label", "prediction"] = "label"

    def __post_init__(self) -> None:
        if not is_integer(self.train_id) or self.train_id < 0:
            raise ValueError(f"ClassPixels: train_id={self.train_id!r}: give a train id, from 0 up")
        if self.source not in ("label", "prediction"):
            raise ValueError(f"ClassPixels: source={self.source!r}: give 'label' or 'prediction'")


Pixels = Sequence[tuple[int, int]]
Place = tuple[float, float]
Units = Literal["center"] | Pixels | Grid | ClassPixels


def is_integer(value: object) -> bool:
    """True and False, which Python counts as 1 and 0, are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def pixels_of(units: Literal["center"] | Pixels | Grid, size: tuple[int, int]) -> Pixels:
    """The pixels (row, column) in a picture of this (height, width) whose units are meant.

    Raises:
        ValueError: there are none, or one lies outside.
    """
    height, width = size
    if isinstance(units, str) and units == "center":
        return [(height // 2, width // 2)]
    if isinstance(units, Grid):
        if not (1 <= units.rows <= height and 1 <= units.columns <= width):
            raise ValueError(
                f"units={units}: a picture of {height}x{width} pixels has no such grid"
            )
        return [
            ((2 * i + 1) * height // (2 * units.rows), (2 * j + 1) * width // (2 * units.columns))
            for i in range(units.rows)
            for j in range(units.columns)
        ]
    pixels = _pairs(units)
    for row, column in pixels:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(
                f"units: pixel ({row}, {column}) lies outside the picture of {height}x{width} "
                "pixels; rows and columns count from 0"
            )
    return pixels


def _pairs(units: object) -> Pixels:
    words = f"units={units!r}: give 'center', a list of (row, column) pixels, a Grid or ClassPixels"
    if isinstance(units, str) or not isinstance(units, (Sequence, np.ndarray)) or len(units) == 0:
        raise ValueError(words)
    try:
        return [(operator.index(row), operator.index(column)) for row, column in units]
    except (TypeError, ValueError) as error:  # a number in place of a pair, or fractions
        raise ValueError(words) from error


def units_of(
    pixels: Pixels, size: tuple[int, int], grid: tuple[int, int]
) -> tuple[list[int], list[int]]:
    """Rows and columns of the units that pixels belong to, in a map of ``grid`` units."""
    rows = [row * grid[0] // size[0] for row, _ in pixels]
    columns = [column * grid[1] // size[1] for _, column in pixels]
    return rows, columns


def place_of_unit(
    unit: tuple[int, int], size: tuple[int, int], grid: tuple[int, int], in_patches: bool
) -> Place:
    """(row, column) in pixels of the unit's own centre, as the module says.

    Args:
        unit: Its row and column in the map.
        size: Of the picture, (height, width).
        grid: Of the map, (h, w).
        in_patches: Whether the network cuts without padding: :func:`cuts_patches`.
    """
    places = []
    for number, pixels, units in zip(unit, size, grid):
        stride = _stride(pixels, units)
        first = -(-number * pixels // units) if stride is None else number * stride
        middle = ((stride or pixels / units) - 1) / 2 if in_patches and pixels > units else 0
        places.append(first + middle)
    return places[0], places[1]


def unit_at(place: Place, size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the unit whose own centre this is: the inverse of :func:`place_of_unit`."""
    row, column = (
        int(at // (_stride(pixels, units) or pixels / units))
        for at, pixels, units in zip(place, size, grid)
    )
    return row, column


def _stride(pixels: int, units: int) -> int | None:
    """Whole stride of a layer with so many units. Where it does not divide the picture, the power
    of two that gives so many, rounded up (padding) or down (no padding), and None if none does."""
    if pixels % units == 0:
        return pixels // units
    powers = [2**n for n in range(1, pixels.bit_length())]
    padded = [power for power in powers if -(-pixels // power) == units]
    cut = [power for power in powers if pixels // power == units]
    return next(iter(padded + cut), None)


def cuts_patches(model: nn.Module) -> bool:
    """Whether every layer with a stride has windows that neither overlap nor are padded."""
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
    if isinstance(value, str):  # padding='valid'; 'same' is refused with a stride
        return (0, 0)
    return (value[0], value[1]) if isinstance(value, tuple) else (value, value)  # type: ignore[return-value]


def class_mask(classes: Tensor, train_id: int, grid: tuple[int, int]) -> Tensor:
    """Train ids (B, H, W) of pixels -> (B, h, w) bool, which units belong to the class.

    A unit has the class of the pixel in the middle of its cell.
    """
    resized = F.interpolate(classes[:, None].float(), size=grid, mode="nearest-exact")
    return resized[:, 0] == train_id


def check_reduction(reduction: Reduction, gradient: Gradient) -> None:
    """Raises:
    ValueError: one of the two is no known one.
    """
    if not is_integer(reduction) and reduction not in get_args(NamedReduction):
        raise ValueError(
            f"reduction={reduction!r}: give one of {', '.join(get_args(NamedReduction))}, or the "
            "number of a channel"
        )
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient={gradient!r}: give one of {', '.join(get_args(Gradient))}")


def reduce_channels(vectors: Tensor, reduction: Reduction, layer: str, seed: int) -> Tensor:
    """(..., C) -> (...): one number a unit.

    Raises:
        ValueError: the layer has no such channel.
    """
    if not isinstance(reduction, str):
        if not 0 <= reduction < vectors.shape[-1]:
            raise ValueError(
                f"reduction={reduction}: layer {layer!r} has channels 0 to {vectors.shape[-1] - 1}"
            )
        return vectors[..., reduction]
    if reduction == "relu":
        return vectors.relu().sum(-1)
    if reduction == "l1":
        return vectors.abs().sum(-1)
    if reduction == "sum":
        return vectors.sum(-1)
    # A generator of its own: the projection is the same for every picture and every batch, and
    # torch's random state is left alone.
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(vectors.shape[-1], generator=generator, dtype=torch.float64)
    projection /= vectors.shape[-1] ** 0.5
    return vectors @ projection.to(vectors)


def refuse_sum_after_norm(feature: Tensor, layer: str) -> None:
    """Raises:
    ValueError: the feature map comes straight out of a LayerNorm. The sum of normalised channels
        is constant where the norm's weights are equal, and its gradient zero; with trained
        weights what is left of it says nothing of the receptive field.
    """
    node = feature.grad_fn
    while node is not None:
        name = node.name()
        if name.startswith("NativeLayerNormBackward"):
            raise ValueError(
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
    """(B, H, W) -> (B, H, W), moved by so many pixels, with zeros from outside."""
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
