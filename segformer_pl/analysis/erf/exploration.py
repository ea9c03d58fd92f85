"""The receptive fields of many units of one image, small enough for a page in a browser.

One forward pass serves all units and layers. Each unit of a layer costs one backward pass, and its
map is stored in 8 bits::

    image --> units on a grid --> map (H, W) --> means over blocks --> 8 bits on a log scale
                                     |
                                     +--> radius and share, of the exact map

The blocks of a layer are as small as :data:`LAYER_BYTES` allow. Narrow fields are zero almost
everywhere and compress well, so they are stored in the smallest blocks.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from segformer_pl.analysis.erf.feature_extractor import (
    FeatureExtractor,
    device_and_dtype,
    measuring,
)
from segformer_pl.analysis.erf.layer import LayerERF
from segformer_pl.analysis.erf.measure import NoFieldError, check_layer, map_of_gradient
from segformer_pl.analysis.erf.units import (
    Gradient,
    Grid,
    Position,
    Reduction,
    check_reduction,
    cuts_patches,
    reduce_channels,
    selecting_pixels,
    unit_position,
    units_at_pixels,
)
from segformer_pl.errors import UserError, counted

LONGER_SIDE = 10  # units of the grid along the longer side of the image
NEAR = 16.0  # pixels; the share of the field within this distance is stored
DECADES = 3  # of the stored scale, from the largest value of a field down
LAYER_BYTES = 250_000  # of the compressed maps of a layer
MAX_SIDE = 256  # values along the longer side of a stored map

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class LayerFields:
    """The receptive fields of one layer, for the n units of an :class:`Exploration`.

    Attributes:
        name: Name of the layer.
        grid: Height and width of the feature map in units.
        block: Side of the blocks in pixels that one stored value stands for.
        values: (n, h, w), stored maps, see :func:`quantize`.
        radius: (n,), radius in pixels of the disc about the unit that holds half of its field; nan
            where no pixel influences the unit.
        share: (n,), share of the field within :data:`NEAR` pixels of the unit; nan likewise.
        positions: Positions of the units in pixels, from which distances count.
    """

    name: str
    grid: tuple[int, int]
    block: int
    values: Bytes
    radius: npt.NDArray[np.float64]
    share: npt.NDArray[np.float64]
    positions: list[Position]

    def __repr__(self) -> str:
        num_units, height, width = self.values.shape
        blocks = f"maps of {height}x{width} blocks of {self.block} px"
        return f"LayerFields({self.name!r}, {counted(num_units, 'unit')}, {blocks})"


@dataclass(frozen=True)
class Exploration:
    """The receptive fields of the units that a grid of pixels selects, for one image.

    Attributes:
        layers: Receptive fields by layer.
        rows: Rows of the pixels.
        columns: Columns of the pixels. Unit ``i * len(columns) + j`` is that of row i and column j.
        size: Height and width of the image.
        settings: Reduction and gradient.
    """

    layers: list[LayerFields]
    rows: list[int]
    columns: list[int]
    size: tuple[int, int]
    settings: dict[str, Any]

    def __repr__(self) -> str:
        layers = ", ".join(layer.name for layer in self.layers)
        units = f"{len(self.rows)}x{len(self.columns)} units"
        return f"Exploration({layers}; {units}, image of {self.size[0]}x{self.size[1]} pixels)"


def explore(
    model: nn.Module,
    image: Tensor,
    *,
    layers: Sequence[str] | None = None,
    grid: Grid | None = None,
    reduction: Reduction = "relu",
    gradient: Gradient = "abs",
    preprocess: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> Exploration:
    """Measure the receptive fields of many units of one image.

    They are those of :func:`~segformer_pl.analysis.erf.effective_receptive_field` with one pixel as
    ``units``, and so are the arguments. The network does not change.

    Args:
        model: The network.
        image: (C, H, W) or (1, C, H, W).
        layers: Names of the layers; all feature maps by default.
        grid: Pixels that select the units; by default evenly spaced, :data:`LONGER_SIDE` along the
            longer side of the image.
        reduction: How the channels of a unit become one number.
        gradient: ``"abs"`` or ``"relu"``.
        preprocess: Function that the image goes through first.
        seed: Seed of the random projection.
        progress: Label of a progress bar; none by default.

    Raises:
        NoFieldError: A value or a gradient is not finite.
        UserError: An argument or a layer does not fit.
    """
    check_reduction(reduction, gradient)
    batch = image[None] if image.dim() == 3 else image
    if batch.dim() != 4 or len(batch) != 1:
        raise UserError(f"image: give one image (C, H, W), not shape {tuple(image.shape)}")
    size = (batch.shape[2], batch.shape[3])
    grid = grid or _grid_of(size)
    pixels = selecting_pixels(grid, size)
    extractor = FeatureExtractor(model, layers)
    device, dtype = device_and_dtype(model, batch)
    in_patches = cuts_patches(model)
    with measuring(model, device):
        # Clone it, because a tensor made in inference mode cannot carry a gradient.
        inputs = batch.to(device).clone()
        inputs = inputs if preprocess is None else preprocess(inputs)
        inputs = inputs.detach().to(dtype).requires_grad_()
        units = extractor.units(inputs, extractor.state(dtype), pixels)
        bar = tqdm(
            total=len(units) * len(pixels),
            desc=progress,
            unit="unit",
            leave=False,
            disable=progress is None,
        )
        fields = []
        for name, (vectors, shape) in units.items():
            check_layer(name, vectors, reduction)
            values = reduce_channels(vectors[0].T, reduction, name, seed)
            positions = [
                unit_position(unit, size, shape, in_patches)
                for unit in zip(*units_at_pixels(pixels, size, shape))
            ]
            packing = _Packing(size)
            for value, position in zip(values, positions):
                (slope,) = torch.autograd.grad(value, inputs, retain_graph=True)
                field = map_of_gradient(slope, gradient)[0]
                if not (value.isfinite() and field.isfinite().all()):
                    raise NoFieldError(
                        f"layer {name!r}: the value or the gradient of a unit is not finite; check "
                        "the weights and the image"
                    )
                packing.add(_layer_erf(name, field, position, shape, gradient))
                bar.update()
            fields.append(packing.result(name, shape, positions))
        bar.close()
    settings = {"reduction": reduction, "gradient": gradient}
    rows = [row for row, _ in pixels[:: grid.columns]]
    columns = [column for _, column in pixels[: grid.columns]]
    return Exploration(fields, rows, columns, size, settings)


def _grid_of(size: tuple[int, int]) -> Grid:
    rows, columns = (min(max(round(LONGER_SIDE * side / max(size)), 1), side) for side in size)
    return Grid(rows, columns)


def _layer_erf(
    name: str, field: Tensor, position: Position, grid: tuple[int, int], gradient: Gradient
) -> LayerERF:
    mean = field.cpu().numpy().astype(np.float64)
    unknown = np.full_like(mean, np.nan)
    counts = np.ones(1, np.int64)
    groups = mean[None].astype(np.float32)
    return LayerERF(name, mean, unknown, groups, counts, position, grid, gradient)


class _Packing:
    """The maps of one layer, stored in blocks of several sizes until it is known which fit.

    Args:
        size: Height and width of the image.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        smallest = -(-max(size) // MAX_SIDE)
        # Coarser by a factor of two each, down to some eight values along the longer side
        count = max((max(size) // (8 * smallest)).bit_length(), 1)
        self.values: dict[int, list[Bytes]] = {smallest << n: [] for n in range(count)}
        self.radius: list[float] = []
        self.share: list[float] = []

    def add(self, erf: LayerERF) -> None:
        self.radius.append(erf.radius(0.5))
        self.share.append(erf.center_share(NEAR))
        for block, maps in self.values.items():
            maps.append(quantize(block_means(erf.mean, block)))

    def result(self, name: str, grid: tuple[int, int], positions: list[Position]) -> LayerFields:
        block, values = self._finest()
        return LayerFields(
            name, grid, block, values, np.array(self.radius), np.array(self.share), positions
        )

    def _finest(self) -> tuple[int, Bytes]:
        stored = {block: np.stack(maps) for block, maps in self.values.items()}
        fitting = (
            block
            for block, values in stored.items()
            if len(zlib.compress(values.tobytes())) <= LAYER_BYTES
        )
        block = next(fitting, max(stored))
        return block, stored[block]


def block_means(field: npt.NDArray[np.float64], block: int) -> npt.NDArray[np.float64]:
    """Return the means (h, w) of a map (H, W) over blocks of pixels, which the border cuts."""
    sums = field
    for axis, side in enumerate(field.shape):
        starts = np.arange(0, side, block)
        counts = np.diff([*starts, side])
        sums = np.add.reduceat(sums, starts, axis) / np.expand_dims(counts, 1 - axis)
    return sums


def quantize(field: npt.NDArray[np.float64]) -> Bytes:
    """Store a map in 8 bits, relative to its largest value and on a logarithmic scale.

    Byte b from 1 to 255 stands for ``10 ** (-DECADES * (255 - b) / 254)`` of the largest value, and
    byte 0 for everything that is smaller. Neighbouring bytes differ by 2.8 %.
    """
    largest = field.max()
    if not largest > 0:
        return np.zeros(field.shape, np.uint8)
    with np.errstate(divide="ignore"):
        decades = np.log10(field / largest)
    return np.rint(np.clip(255 + 254 * decades / DECADES, 0, 255)).astype(np.uint8)
