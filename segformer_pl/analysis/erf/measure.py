"""Measuring effective receptive fields.

One forward pass serves all layers. Each unit then costs one backward pass, through the part of the
network below it. Images do not influence each other in evaluation mode, so one backward pass of the
sum over a batch gives the gradient of every image::

    images (B, C, H, W) --> stage1 --> stage2 --> stage3 --> stage4 --> head      1 forward pass
                              |          |          |          |          |
                             y_1        y_2        y_3        y_4        y_5      (B,) each, one
                              |          |          |          |          |       number per image
    d sum(y_k) / d images  <--+----------+----------+----------+----------+      5 backward passes

Batches are streamed: only the running moments of the maps stay in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from segformer_pl.analysis.erf.feature_extractor import (
    AxisLayout,
    FeatureExtractor,
    batch_dependent_norms,
    device_and_dtype,
    measuring,
)
from segformer_pl.analysis.erf.layer import LayerERF
from segformer_pl.analysis.erf.moments import Moments
from segformer_pl.analysis.erf.result import ERF
from segformer_pl.analysis.erf.units import (
    ClassUnits,
    Gradient,
    Grid,
    PixelList,
    Position,
    Reduction,
    Units,
    check_reduction,
    class_mask,
    cuts_patches,
    reduce_channels,
    refuse_sum_after_norm,
    selecting_pixels,
    shift,
    unit_position,
    units_at_pixels,
)
from segformer_pl.errors import UserError


class NoFieldError(UserError):
    """No image has a finite receptive field, or that of a layer is zero everywhere."""


Images = Tensor | Iterable[Tensor | Mapping[str, Any]]
PIXELS_PER_BATCH = 512 * 512


def effective_receptive_field(
    model: nn.Module,
    images: Images,
    *,
    layers: Sequence[str] | None = None,
    units: Units = "center",
    reduction: Reduction = "relu",
    gradient: Gradient = "abs",
    preprocess: Callable[[Tensor], Tensor] | None = None,
    num_images: int | None = None,
    batch_size: int | None = None,
    layout: AxisLayout = "auto",
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> ERF:
    """Measure which input pixels influence an output unit, averaged over images.

    The method is that of Luo et al. 2016. For a unit with channels z the map is the sum over input
    channels of ``gradient(dy / dx)``, where ``reduction`` makes y of z. Each image gets its own
    map and the maps are averaged, so the result does not depend on the batch size. The network's
    state, gradients and mode and torch's random state do not change; autocast and half precision
    are off.

    SegFormer's Figure 3 states neither unit nor reduction. The defaults are those of RepLKNet's
    published script except for ``gradient``, which is ``"relu"`` there and drops negative
    gradients. The script takes unit (h // 2, w // 2) of the map. ``"center"`` is the unit that
    pixel (H // 2, W // 2) selects, a different one where the image has an odd side and the map an
    even one.

    Args:
        model: Any network that maps (B, C, H, W) to something.
        images: (N, C, H, W), or an iterable of such batches or of
            ``{"image": (B, C, H, W), "label": (B, H, W), "id": [B names]}``, read once and only as
            far as needed. All images have one size.
        layers: Keys of the network's ``feature_maps``, dotted module names, or ``output``; all
            feature maps by default.
        units: ``"center"``; a list of (row, column) pixels, which select units; a :class:`Grid` of
            units; or :class:`ClassUnits`. Distances count from the position of the unit and not
            from the pixel that selects it (:mod:`~segformer_pl.analysis.erf.units`). With several
            units, every map is shifted from the position of its unit to that of the unit in the
            middle, and zeros enter from outside the image. A class is one gradient of the mean
            over its units, without a shift.
        reduction: How the channels of a unit become one number: ``"relu"`` (sum of the positive
            ones), ``"l1"``, ``"sum"`` (refused straight after a LayerNorm), ``"random"`` (a fixed
            Gaussian projection), or the number of a channel or class.
        gradient: ``"abs"``, ``"relu"`` (positive part) or ``"signed"``.
        preprocess: Function that every batch goes through first, such as ``task.normalize``.
        num_images: Largest number of images; all by default.
        batch_size: Images per forward pass; bounds the memory. On the CPU, the default is as many
            as make up 512x512 pixels, at least one, because larger batches spill the caches; on
            other devices, eight times that.
        layout: Order of the axes of layers that are modules, where their shape leaves it open.
        seed: Seed of the random projection.
        about: Facts that the result stores: model, weights, data.

    Raises:
        NoFieldError: No image could be measured, or the receptive field of a layer is zero
            everywhere.
        UserError: An argument or a layer does not fit, or a BatchNorm has no running statistics
            and the batch size is not 1.
    """
    check_reduction(reduction, gradient)
    if (batch_size is not None and batch_size < 1) or (num_images is not None and num_images < 1):
        raise UserError("batch_size and num_images: give integers of at least 1")
    if batch_size != 1 and (norms := batch_dependent_norms(model)):
        raise UserError(
            f"{norms[0]!r} has no running statistics and normalises with those of the batch, so "
            "that images change each other's receptive fields; give batch_size=1"
        )
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    pixels = PIXELS_PER_BATCH * (1 if on_cpu else 8)
    extractor = FeatureExtractor(model, layers, layout)
    measurement = _Measurement(model, extractor, units, reduction, gradient, preprocess, seed)
    for ids, batch, labels in _batches(images, batch_size, pixels, num_images):
        measurement.add(ids, batch, labels)
    return measurement.result(dict(about or {}))


class _Measurement:
    """The running state of one measurement: moments of the maps, by layer."""

    def __init__(
        self,
        model: nn.Module,
        extractor: FeatureExtractor,
        units: Units,
        reduction: Reduction,
        gradient: Gradient,
        preprocess: Callable[[Tensor], Tensor] | None,
        seed: int,
    ) -> None:
        self.model, self.extractor = model, extractor
        self.units, self.reduction, self.gradient = units, reduction, gradient
        self.preprocess, self.seed = preprocess, seed
        self.moments: dict[str, Moments] = {}
        self.grids: dict[str, tuple[int, int]] = {}
        self.positions: dict[str, Position] = {}
        self.in_patches = cuts_patches(model)
        self.size: tuple[int, int] | None = None
        self.image_ids: list[str] = []
        self.not_finite: list[str] = []
        self.without_units: list[str] = []
        self.state: dict[str, Tensor] | None = None

    def add(self, ids: list[str], images: Tensor, labels: Tensor | None) -> None:
        """Measure a batch (B, C, H, W) and add its maps to the moments."""
        device, dtype = device_and_dtype(self.model, images)
        if self.size is None:
            self.size = (images.shape[2], images.shape[3])
        if tuple(images.shape[2:]) != self.size:
            raise UserError(
                f"image {ids[0]!r} has {images.shape[2]}x{images.shape[3]} pixels and "
                f"those before had {self.size[0]}x{self.size[1]}, which cannot be averaged; "
                "resize or crop them to one size"
            )
        with measuring(self.model, device):
            self.state = self.extractor.state(dtype) if self.state is None else self.state
            # Clone it, because a tensor made in inference mode cannot carry a gradient.
            inputs = images.to(device).clone()
            if self.preprocess is not None:
                inputs = self.preprocess(inputs)
            inputs = inputs.detach().to(dtype).requires_grad_()
            present = torch.ones(len(ids), dtype=torch.bool, device=device)
            # The gradients of linear layers are finite even for an image of nan, so check the
            # image itself, too.
            finite = inputs.isfinite().flatten(1).all(1)
            if isinstance(self.units, ClassUnits):
                maps = self._class_maps(inputs, self._classes(inputs, labels), present, finite)
            else:
                maps = self._unit_maps(inputs, selecting_pixels(self.units, self.size), finite)
        self._add_maps(ids, maps, present.cpu(), finite.cpu())

    def _classes(self, inputs: Tensor, labels: Tensor | None) -> Tensor:
        """Return train ids (B, h, w), those of the label or of the prediction."""
        assert isinstance(self.units, ClassUnits)
        if self.units.source == "label":
            if labels is None:
                raise UserError(
                    "units: the pixels of a class need labels; give batches with 'image' and "
                    "'label', or take the class in the prediction (source='prediction')"
                )
            return labels.to(inputs.device)
        with torch.no_grad():
            logits = self.model(inputs.to(next(self.model.parameters()).dtype))
        if not isinstance(logits, Tensor) or logits.dim() != 4:
            raise UserError(
                f"units: {type(self.model).__name__} returns no logits (B, classes, h, w) to take "
                "a predicted class from"
            )
        return logits.argmax(1)

    def _class_maps(
        self, inputs: Tensor, classes: Tensor, present: Tensor, finite: Tensor
    ) -> dict[str, Tensor]:
        """Return the maps (B, H, W) of every layer.

        Clears ``present`` where an image has no unit of the class, and ``finite`` where a value of
        an image is not finite.
        """
        assert isinstance(self.units, ClassUnits)
        assert self.state is not None
        maps = {}
        for name, feature in self.extractor(inputs, self.state).items():
            check_layer(name, feature, self.reduction)
            grid = self.grids[name] = (feature.shape[2], feature.shape[3])
            mask = class_mask(classes, self.units.train_id, grid)
            present &= mask.any(2).any(1)
            values = self._reduce(feature.permute(0, 2, 3, 1), name)
            means = (values * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)
            finite &= means.isfinite()
            maps[name] = self._backward(means.sum(), inputs)
        return maps

    def _unit_maps(self, inputs: Tensor, pixels: PixelList, finite: Tensor) -> dict[str, Tensor]:
        """Return the maps (B, H, W) of every layer, averaged over the units that pixels select.

        Clears ``finite`` where a value of a unit is not finite.
        """
        assert self.state is not None
        assert self.size is not None
        maps = {}
        for name, (vectors, grid) in self.extractor.units(inputs, self.state, pixels).items():
            check_layer(name, vectors, self.reduction)
            self.grids[name] = grid
            finite &= vectors.isfinite().flatten(1).all(1)
            values = self._reduce(vectors.transpose(1, 2), name)
            units = list(zip(*units_at_pixels(pixels, self.size, grid)))
            # The maps of several units are shifted onto the unit in the middle.
            middle = units[0] if len(units) == 1 else (grid[0] // 2, grid[1] // 2)
            row, column = self.positions[name] = self._position(middle, grid)
            total = torch.zeros_like(inputs[:, 0])
            for index, unit in enumerate(units):
                unit_row, unit_column = self._position(unit, grid)
                unit_map = self._backward(values[:, index].sum(), inputs)
                total += shift(unit_map, round(row - unit_row), round(column - unit_column))
            maps[name] = total / len(pixels)
        return maps

    def _position(self, unit: tuple[int, int], grid: tuple[int, int]) -> Position:
        assert self.size is not None
        return unit_position(unit, self.size, grid, self.in_patches)

    def _reduce(self, vectors: Tensor, name: str) -> Tensor:
        return reduce_channels(vectors, self.reduction, name, self.seed)

    def _backward(self, value: Tensor, inputs: Tensor) -> Tensor:
        """Return the maps (B, H, W) of the gradient of a scalar, the sum over the images."""
        (slope,) = torch.autograd.grad(value, inputs, retain_graph=True)
        return map_of_gradient(slope, self.gradient)

    def _add_maps(
        self, ids: list[str], maps: dict[str, Tensor], present: Tensor, finite: Tensor
    ) -> None:
        maps = {layer: layer_maps.cpu() for layer, layer_maps in maps.items()}
        for layer_maps in maps.values():
            finite &= layer_maps.isfinite().flatten(1).all(1)
        # An image counts in every layer or in none, so that layers are compared over the same
        # images.
        measured = present & finite
        not_finite = present & ~finite
        self.without_units += [name for name, is_ in zip(ids, present.tolist()) if not is_]
        self.not_finite += [name for name, is_ in zip(ids, not_finite.tolist()) if is_]
        self.image_ids += [name for name, is_ in zip(ids, measured.tolist()) if is_]
        for layer, layer_maps in maps.items():
            if layer not in self.moments:
                self.moments[layer] = Moments.zeros(*layer_maps.shape[1:])
            self.moments[layer].add(layer_maps[measured].numpy())

    def result(self, about: dict[str, Any]) -> ERF:
        if self.size is None:
            raise NoFieldError("images: there was no image to measure an ERF on")
        num_images = next(iter(self.moments.values())).count
        if num_images == 0:
            raise NoFieldError(
                "no image could be measured: the value or the gradient of "
                f"{len(self.not_finite)} was not finite and {len(self.without_units)} had no unit "
                "of the class; check the weights and the images"
            )
        empty = [name for name, moments in self.moments.items() if not moments.mean.any()]
        if empty:
            raise NoFieldError(
                f"the receptive field of {', '.join(empty)} is zero everywhere, in every image: "
                f"with reduction={self.reduction!r} and gradient={self.gradient!r} no pixel "
                "influences the unit; try reduction='l1' or 'random', or another unit"
            )
        layers = {
            name: LayerERF.from_moments(
                name, moments, self.positions.get(name), self.grids[name], self.gradient
            )
            for name, moments in self.moments.items()
        }
        settings = {
            "units": units_setting(self.units),
            "reduction": self.reduction,
            "gradient": self.gradient,
            "image_size": list(self.size),
        }
        if self.reduction == "random":
            settings["seed"] = self.seed
        return ERF(
            layers,
            num_images,
            self.not_finite,
            self.without_units,
            settings,
            about,
            self.image_ids,
        )


def check_layer(name: str, feature: Tensor, reduction: Reduction) -> None:
    """Check that a feature map, or units of it, has the gradient that is measured.

    Raises:
        UserError: It has none, or its channels cannot be reduced in this way.
    """
    if not feature.requires_grad:
        raise UserError(
            f"layer {name!r} does not depend on the image in a way that has a gradient "
            "(detached, or computed without gradients); name another"
        )
    if reduction == "sum":
        refuse_sum_after_norm(feature, name)


def map_of_gradient(slope: Tensor, gradient: Gradient) -> Tensor:
    """Gradients (B, C, H, W) of the images -> maps (B, H, W)."""
    if gradient == "abs":
        slope = slope.abs()
    elif gradient == "relu":
        slope = slope.relu()
    return slope.sum(1)


def units_setting(units: Literal["center"] | PixelList | Grid | ClassUnits) -> Any:
    """Return units as plain data, for :attr:`ERF.settings`."""
    if isinstance(units, str):
        return units
    if isinstance(units, Grid):
        return f"grid of {units.rows}x{units.columns}"
    if isinstance(units, ClassUnits):
        return f"class {units.train_id} in the {units.source}"
    return [[int(row), int(column)] for row, column in units]


def _batches(
    images: Images, batch_size: int | None, pixels: int, num_images: int | None
) -> Iterator[tuple[list[str], Tensor, Tensor | None]]:
    """Yield ids, images and labels, ``batch_size`` or about ``pixels`` at a time.

    Reads no batch that is not needed. Batches of 3, 3 and 2 images come out as follows::

        given                        a b c | d e f | g h
        batch_size=2                 a b | c | d e | f | g h
        batch_size=2, num_images=5   a b | c | d e              the third batch is not read
    """
    num_read = 0
    for batch in [images] if isinstance(images, Tensor) else images:
        tensor = batch if isinstance(batch, Tensor) else batch["image"]
        labels = None if isinstance(batch, Tensor) else batch.get("label")
        if tensor.dim() != 4:
            raise UserError(
                f"images: give batches (B, C, H, W), not a tensor of shape {tuple(tensor.shape)}"
            )
        ids = [f"image {num_read + number}" for number in range(len(tensor))]
        if not isinstance(batch, Tensor) and "id" in batch:
            ids = [str(name) for name in batch["id"]]
            # The data module puts blank images in place of unreadable ones, and names them here.
            kept = [i for i, name in enumerate(ids) if name not in batch.get("skipped", {})]
            ids, tensor = [ids[i] for i in kept], tensor[kept]
            labels = None if labels is None else labels[kept]
        left = len(tensor) if num_images is None else num_images - num_read
        step = batch_size or max(pixels // (tensor.shape[2] * tensor.shape[3]), 1)
        for start in range(0, min(len(tensor), left), step):
            stop = min(start + step, left, len(tensor))
            yield (
                ids[start:stop],
                tensor[start:stop],
                None if labels is None else labels[start:stop],
            )
        num_read += len(tensor)
        if num_images is not None and num_read >= num_images:
            return
