"""Definitions of the ERF that are in use, as data, and the numbers that order networks by it.

Two publications that both report "the ERF" can mean different maps, and different numbers of a map.
A :class:`Definition` says how images become one map, a :class:`Number` how a map becomes one
number, and a :class:`Protocol` is a pair of them, as a publication uses it::

    unit's channels --reduction--> scalar --autograd--> gradient (3, H, W)
                                                            |  part, rgb
    map of the network <--mean over images, normalize-- map (H, W) of one image
         |  log, about, kind, amount
       number

The definitions share what they can: one forward pass for all, and one backward pass for all that
have the same reduction. :func:`gradient_maps` returns the map of every image, so that the images
can be resampled. The unit is that in row h // 2 and column w // 2 of the feature map.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from segformer_pl.analysis.erf import extent
from segformer_pl.analysis.erf.feature_extractor import (
    FeatureExtractor,
    batch_dependent_norms,
    device_and_dtype,
    measuring,
)
from segformer_pl.analysis.erf.measure import PIXELS_PER_BATCH
from segformer_pl.analysis.erf.units import (
    Position,
    cuts_patches,
    reduce_channels,
    unit_position,
    units_at_pixels,
)
from segformer_pl.errors import UserError

# Below this share of the gradient of single channels, that of their sum is a rounding error.
ROUNDING = 1e-4
COLUMNS = 2**16  # pixels of all images that are converted to float64 at a time


@dataclass(frozen=True)
class Definition:
    """How the gradients of several images become the map of a network.

    Attributes:
        reduction: What is differentiated: ``relu`` (sum of the unit's positive channels), ``l1``
            (sum of their magnitudes) or ``mean`` (mean of all channels with their signs).
        part: Part of the gradient that counts: ``relu`` (the positive part), ``abs`` or ``square``.
        rgb: Order of the two steps that remove the image's channels: ``part then sum``, or ``mean
            then part``, in which gradients of opposite sign cancel.
        normalize: Map that is divided by its sum: ``never`` any, the ``mean`` over the images, or
            that of ``every image``, so that images with large gradients count no more than others.
    """

    reduction: Literal["relu", "l1", "mean"]
    part: Literal["relu", "abs", "square"]
    rgb: Literal["part then sum", "mean then part"] = "part then sum"
    normalize: Literal["never", "mean", "every image"] = "never"


DEFINITIONS: Mapping[str, Definition] = {
    # RepLKNet (Ding et al. 2022), erf/visualize_erf.py
    "replknet": Definition("relu", "relu"),
    # openerf 0.6.1, erf.py
    "openerf": Definition("mean", "relu", "mean then part", "mean"),
    # effective_receptive_field of this package
    "magnitude": Definition("relu", "abs"),
    # squared gradients, the energy of the map
    "energy": Definition("relu", "square"),
    # this package's, with the same weight for every image
    "equal_images": Definition("relu", "abs", normalize="every image"),
}


@dataclass(frozen=True)
class Number:
    """How a map becomes one number, larger for a larger receptive field.

    Attributes:
        kind: ``radius`` of the disc that holds a share of the map, in pixels
            (:func:`.extent.energy_radius`); ``area`` of the strongest pixels that do
            (:func:`.extent.smallest_area_ratio`) or of the ``square`` that does
            (:func:`.extent.square_area_ratio`), each as a share of the image; ``outside``, the
            share of the map farther away than a number of pixels.
        amount: The share, or the number of pixels.
        about: Where disc and square have their middle: the position of the ``unit``, or pixel
            (H // 2, W // 2) of the ``image``. Strongest pixels have none.
        log: Whether the number is that of log10(map + 1), which depends on the map's scale.
    """

    kind: Literal["radius", "area", "square", "outside"]
    amount: float
    about: Literal["unit", "image"] = "unit"
    log: bool = False

    def of(self, erf: extent.ERFMap, position: Position) -> float:
        """Return the number of a map (H, W) of the unit at ``position``; nan for a map of zeros."""
        center = position if self.about == "unit" else None
        if self.kind == "square":
            # square_area_ratio takes the logarithm, which this undoes.
            given = erf if self.log else np.expm1(erf / (erf.max() or 1.0) * np.log(10))
            return extent.square_area_ratio(given, self.amount, center)
        values = np.log10(erf + 1.0) if self.log else erf
        if self.kind == "radius":
            return extent.energy_radius(values, self.amount, center)
        if self.kind == "area":
            return extent.smallest_area_ratio(values, self.amount)
        total = values.sum()
        inside = values[extent.distances(values.shape, center) <= self.amount].sum()
        return float(1 - inside / total) if total > 0 else float("nan")


NUMBERS: Mapping[str, Number] = {
    "radius_50": Number("radius", 0.5),
    "radius_90": Number("radius", 0.9),
    "radius_50_image": Number("radius", 0.5, "image"),
    "area_50": Number("area", 0.5),
    "area_95": Number("area", 0.95),
    "square_50": Number("square", 0.5, "image"),
    "square_50_log": Number("square", 0.5, "image", log=True),
    "square_99_log": Number("square", 0.99, "image", log=True),
    "outside_10": Number("outside", 10, "image"),
    "outside_20": Number("outside", 20, "image"),
}


class Protocol(NamedTuple):
    """A definition with a number, by their names in :data:`DEFINITIONS` and :data:`NUMBERS`."""

    definition: str
    number: str


PROTOCOLS: Mapping[str, Protocol] = {
    "RepLKNet, 50 %": Protocol("replknet", "square_50_log"),
    "RepLKNet, 99 %": Protocol("replknet", "square_99_log"),
    "openerf, 10 px": Protocol("openerf", "outside_10"),
    "openerf, 20 px": Protocol("openerf", "outside_20"),
    "magnitude, radius": Protocol("magnitude", "radius_50"),
    "energy, radius": Protocol("energy", "radius_50"),
}


class LayerMaps(NamedTuple):
    """The maps of one layer for a batch of images.

    Attributes:
        position: (row, column) of the unit in pixels.
        maps: Maps (B, H, W) by name of the definition, one for each image. Definitions that differ
            in ``normalize`` alone share one tensor.
    """

    position: Position
    maps: dict[str, Tensor]


def gradient_maps(
    model: nn.Module,
    images: Iterable[Mapping[str, Any]],
    layers: Sequence[str],
    definitions: Mapping[str, Definition] = DEFINITIONS,
    *,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    batch_size: int | None = None,
) -> Iterator[tuple[list[str], dict[str, LayerMaps]]]:
    """Yield ids and maps of every image under several definitions, batch by batch.

    Args:
        model: The network.
        images: Batches ``{"image": (B, C, H, W), "id": [B names]}``.
        layers: Keys of the network's ``feature_maps``, dotted module names, or ``output``.
        definitions: The definitions by name.
        preprocess: Function that every batch goes through first, such as ``task.normalize``.
        batch_size: Images per forward pass; by default as many as make up 512x512 pixels.

    Raises:
        UserError: A layer does not exist, its middle unit is not that of the image's middle pixel,
            an image or a gradient is not finite, or the mean of the channels has no gradient, as
            after a LayerNorm with equal weights.
    """
    if batch_size != 1 and (norms := batch_dependent_norms(model)):
        raise UserError(
            f"{norms[0]!r} has no running statistics and normalises with those of the batch; give "
            "batch_size=1"
        )
    extractor = FeatureExtractor(model, layers)
    in_patches = cuts_patches(model)
    state: dict[str, Tensor] | None = None
    checked = False
    for batch in images:
        pixels = batch["image"].shape[2] * batch["image"].shape[3]
        step = batch_size or max(PIXELS_PER_BATCH // pixels, 1)
        for start in range(0, len(batch["image"]), step):
            chunk, ids = (batch[key][start : start + step] for key in ("image", "id"))
            device, dtype = device_and_dtype(model, chunk)
            with measuring(model, device):
                state = extractor.state(dtype) if state is None else state
                inputs = chunk.to(device).clone()
                if preprocess is not None:
                    inputs = preprocess(inputs)
                inputs = inputs.detach().to(dtype).requires_grad_()
                size = (inputs.shape[2], inputs.shape[3])
                middle = [(size[0] // 2, size[1] // 2)]
                result = {}
                for name, (vectors, grid) in extractor.units(inputs, state, middle).items():
                    rows, columns = units_at_pixels(middle, size, grid)
                    unit = (rows[0], columns[0])
                    if unit != (grid[0] // 2, grid[1] // 2):
                        raise UserError(
                            f"layer {name!r} has {grid[0]}x{grid[1]} units at {size[0]}x{size[1]} "
                            "pixels, so the published scripts measure another unit than that in "
                            "the middle of the image; give a size that the stride divides"
                        )
                    maps = _layer_maps(vectors[..., 0], inputs, definitions, name, not checked)
                    result[name] = LayerMaps(unit_position(unit, size, grid, in_patches), maps)
            # The gradients of linear layers are finite even for an image of nan.
            checks = {"the image": inputs.detach()} | {
                f"layer {name!r} under definition {definition!r}": maps_
                for name, layer in result.items()
                for definition, maps_ in layer.maps.items()
            }
            for what, values in checks.items():
                finite = values.isfinite().flatten(1).all(1)
                if not finite.all():
                    raise UserError(
                        f"image {ids[int(finite.int().argmin())]!r}: {what} is not finite, so that "
                        "networks would be compared over different images; leave the image out"
                    )
            checked = True
            yield list(ids), result


def _layer_maps(
    vectors: Tensor, inputs: Tensor, definitions: Mapping[str, Definition], layer: str, check: bool
) -> dict[str, Tensor]:
    """Return the maps (B, H, W) of units (B, C) under every definition.

    Args:
        vectors: Channels of the unit of every image.
        inputs: The images (B, C, H, W), from which the units were computed.
        definitions: The definitions by name.
        layer: Name of the layer, for messages.
        check: Whether to check that the mean of the channels has a gradient.
    """
    gradients: dict[str, Tensor] = {}
    for definition in definitions.values():
        if definition.reduction not in gradients:
            gradients[definition.reduction] = _gradient(vectors, inputs, definition.reduction)
    if check and "mean" in gradients:
        single = gradients["relu"] if "relu" in gradients else _gradient(vectors, inputs, "l1")
        typical = single.abs().sum() / vectors.shape[1]
        if gradients["mean"].abs().sum() <= ROUNDING * typical:
            raise UserError(
                f"layer {layer!r}: the mean of its channels has no gradient but rounding errors, "
                "as after a LayerNorm whose weights are equal; leave out the definitions with "
                "this reduction (openerf), or give a layer before the norm"
            )
    maps: dict[tuple[str, str, str], Tensor] = {}
    result = {}
    for name, definition in definitions.items():
        key = (definition.reduction, definition.part, definition.rgb)
        if key not in maps:
            gradient = gradients[definition.reduction]
            if definition.rgb == "mean then part":
                maps[key] = _part(gradient.mean(1), definition.part)
            else:
                maps[key] = _part(gradient, definition.part).sum(1)
        result[name] = maps[key]
    return result


def _gradient(vectors: Tensor, inputs: Tensor, reduction: str) -> Tensor:
    """Return the gradient (B, C, H, W) of every image's scalar."""
    if reduction == "mean":
        scalars = reduce_channels(vectors, "sum", "", 0) / vectors.shape[1]
    else:
        scalars = reduce_channels(vectors, reduction, "", 0)  # type: ignore[arg-type]
    return torch.autograd.grad(scalars.sum(), inputs, retain_graph=True)[0]


def _part(gradient: Tensor, part: str) -> Tensor:
    if part == "square":
        return gradient.square()
    return gradient.abs() if part == "abs" else gradient.relu()


def weighted_maps(
    maps: npt.NDArray[np.floating], weights: npt.NDArray[np.float64], definition: Definition
) -> npt.NDArray[np.float64]:
    """Average the maps of single images, with several sets of weights.

    Args:
        maps: (N, H, W), maps of N images that :func:`gradient_maps` returned.
        weights: (R, N), weights of the images, each row with sum 1.
        definition: The definition that the maps were measured with.

    Returns:
        (R, H, W), maps of the network. Where the gradients of all images with a weight are zero,
        the map is zero.
    """
    flat = maps.reshape(len(maps), -1)
    if definition.normalize == "every image":
        sums = flat.sum(1, dtype=np.float64)
        weights = weights * np.divide(1, sums, out=np.zeros_like(sums), where=sums > 0)
    means = np.empty((len(weights), flat.shape[1]))
    for start in range(0, flat.shape[1], COLUMNS):
        columns = slice(start, start + COLUMNS)
        means[:, columns] = weights @ flat[:, columns].astype(np.float64)
    if definition.normalize == "mean":
        totals = means.sum(1, keepdims=True)
        means = np.divide(means, totals, out=np.zeros_like(means), where=totals > 0)
    return means.reshape(len(weights), *maps.shape[1:])
