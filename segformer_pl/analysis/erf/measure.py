"""Measuring effective receptive fields: one forward pass for all layers, one backward pass for
each unit, batched over pictures, streamed over any number of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from segformer_pl.analysis.erf.moments import Moments
from segformer_pl.analysis.erf.result import ERF, LayerERF
from segformer_pl.analysis.erf.taps import (
    Layout,
    Taps,
    norms_of_the_batch,
    place_of,
    undisturbed,
)
from segformer_pl.analysis.erf.units import (
    ClassPixels,
    Gradient,
    Grid,
    Pixels,
    Place,
    Reduction,
    Units,
    check_reduction,
    class_mask,
    cuts_patches,
    pixels_of,
    place_of_unit,
    reduce_channels,
    refuse_sum_after_norm,
    shift,
    units_of,
)


class NoFieldError(ValueError):
    """Not one picture gave a field, or all of them one of zeros."""


Batch = Tensor | Mapping[str, Any]
Images = Tensor | Iterable[Batch]
PIXELS_IN_A_PASS = 512 * 512


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
    layout: Layout = "auto",
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> ERF:
    """Which input pixels move an output unit, averaged over pictures (Luo et al. 2016).

    For a unit with channels z the map is the sum over input channels of ``gradient(dy / dx)``, y
    being what ``reduction`` makes of z. It is taken for every picture by itself, then averaged, so
    it does not depend on the batch size. The network's state, gradients, mode and the random state
    are left as they were; autocast and half precision are off.

    SegFormer's Figure 3 states neither unit nor reduction. The defaults are those of RepLKNet's
    published script but for ``gradient``, which is ``"relu"`` there and drops what is negative.
    The script's unit is (h // 2, w // 2) of the map. ``"center"`` is the unit that pixel
    (H // 2, W // 2) belongs to: another one where the image has an odd and the map an even side.

    Args:
        model: Any network that maps (B, C, H, W) to something.
        images: (N, C, H, W), or an iterable, read once and as far as needed, of such batches or of
            ``{"image": (B, C, H, W), "label": (B, H, W), "id": [B names]}``; all of one size.
        layers: Keys of the network's ``feature_maps``, dotted module names, or ``output``. By
            default all feature maps.
        units: ``"center"``; a list of (row, column) pixels, whose units are meant; a
            :class:`Grid` of units; or :class:`ClassPixels`. Distances count from the unit's own
            place (``units.py``) and not from the pixel that chose it. With several units every map
            is shifted from its unit's place to that of the unit in the middle, and what comes from
            outside the picture is zero; a class is one gradient of the mean over its units, and
            nothing is shifted.
        reduction: How a unit's channels become one number: ``"relu"`` (sum of the positive ones),
            ``"l1"``, ``"sum"`` (refused straight after a LayerNorm), ``"random"`` (a fixed
            Gaussian projection), or the number of a channel or class.
        gradient: ``"abs"``, ``"relu"`` (positive part) or ``"signed"``.
        preprocess: Applied to every batch first, such as ``task.normalize``.
        num_images: How many pictures to take at most.
        batch_size: Pictures in a pass; bounds the memory. By default as many as make up 512x512
            pixels, at least one, on the CPU, where more spill the caches; eight times that on
            other devices.
        layout: Of layers that are modules, where their shape leaves it open.
        seed: Of the random projection.
        about: What the result should say of itself: model, weights, data.

    Raises:
        ValueError: an argument or a layer that does not fit, or a BatchNorm without running
            statistics in passes of several pictures; :class:`NoFieldError`, no picture could be
            measured, or a layer's field is zero everywhere. One sentence says which and why.
    """
    check_reduction(reduction, gradient)
    if (batch_size is not None and batch_size < 1) or (num_images is not None and num_images < 1):
        raise ValueError("batch_size and num_images: give integers of at least 1")
    if batch_size != 1 and (norms := norms_of_the_batch(model)):
        raise ValueError(
            f"{norms[0]!r} has no running statistics and normalises with those of the batch, so "
            "that pictures change each other's fields; give batch_size=1"
        )
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    pixels = PIXELS_IN_A_PASS * (1 if on_cpu else 8)
    taps = Taps(model, layers, layout)
    pass_ = _Pass(model, taps, units, reduction, gradient, preprocess, seed)
    for names, pictures, labels in _chunks(images, batch_size, pixels, num_images):
        pass_.take(names, pictures, labels)
    return pass_.result(dict(about or {}))


class _Pass:
    """The sums of one measurement."""

    def __init__(
        self,
        model: nn.Module,
        taps: Taps,
        units: Units,
        reduction: Reduction,
        gradient: Gradient,
        preprocess: Callable[[Tensor], Tensor] | None,
        seed: int,
    ) -> None:
        self.model, self.taps = model, taps
        self.units, self.reduction, self.gradient = units, reduction, gradient
        self.preprocess, self.seed = preprocess, seed
        self.moments: dict[str, Moments] = {}
        self.grids: dict[str, tuple[int, int]] = {}
        self.places: dict[str, Place] = {}
        self.in_patches = cuts_patches(model)
        self.size: tuple[int, int] | None = None
        self.pictures: list[str] = []
        self.not_finite: list[str] = []
        self.without_units: list[str] = []
        self.state: dict[str, Tensor] | None = None

    def take(self, names: list[str], pictures: Tensor, labels: Tensor | None) -> None:
        device, dtype = place_of(self.model, pictures)
        if self.size is None:
            self.size = (pictures.shape[2], pictures.shape[3])
        if tuple(pictures.shape[2:]) != self.size:
            raise ValueError(
                f"picture {names[0]!r} has {pictures.shape[2]}x{pictures.shape[3]} pixels and "
                f"those before had {self.size[0]}x{self.size[1]}, which cannot be averaged; "
                "resize or crop them to one size"
            )
        with undisturbed(self.model, device):
            self.state = self.taps.state(dtype) if self.state is None else self.state
            # Cloned, for a tensor made in inference mode can carry no gradient.
            inputs = pictures.to(device).clone()
            if self.preprocess is not None:
                inputs = self.preprocess(inputs)
            inputs = inputs.detach().to(dtype).requires_grad_()
            present = torch.ones(len(names), dtype=torch.bool, device=device)
            # Gradients alone do not tell: those of linear layers are finite for a picture of NaN.
            finite = inputs.isfinite().flatten(1).all(1)
            if isinstance(self.units, ClassPixels):
                maps = self._class_maps(inputs, self._classes(inputs, labels), present, finite)
            else:
                maps = self._unit_maps(inputs, pixels_of(self.units, self.size), finite)
        self._add(names, maps, present.cpu(), finite.cpu())

    def _classes(self, inputs: Tensor, labels: Tensor | None) -> Tensor:
        """(B, h, w) train ids, those of the label or of the prediction."""
        assert isinstance(self.units, ClassPixels)
        if self.units.source == "label":
            if labels is None:
                raise ValueError(
                    "units: the pixels of a class need labels; give batches with 'image' and "
                    "'label', or take the class in the prediction (source='prediction')"
                )
            return labels.to(inputs.device)
        with torch.no_grad():
            logits = self.model(inputs.to(next(self.model.parameters()).dtype))
        if not isinstance(logits, Tensor) or logits.dim() != 4:
            raise ValueError(
                f"units: {type(self.model).__name__} returns no logits (B, classes, h, w) to take "
                "a predicted class from"
            )
        return logits.argmax(1)

    def _class_maps(
        self, inputs: Tensor, classes: Tensor, present: Tensor, finite: Tensor
    ) -> dict[str, Tensor]:
        """(B, H, W) of every layer. Clears ``present`` where a picture has no such unit, and
        ``finite`` where one has a value that is not."""
        assert isinstance(self.units, ClassPixels)
        assert self.state is not None
        maps = {}
        for name, feature in self.taps(inputs, self.state).items():
            self._check(name, feature)
            grid = self.grids[name] = (feature.shape[2], feature.shape[3])
            mask = class_mask(classes, self.units.train_id, grid)
            present &= mask.any(2).any(1)
            values = self._reduce(feature.permute(0, 2, 3, 1), name)
            means = (values * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)
            finite &= means.isfinite()
            maps[name] = self._backward(means.sum(), inputs)
        return maps

    def _unit_maps(self, inputs: Tensor, pixels: Pixels, finite: Tensor) -> dict[str, Tensor]:
        """(B, H, W) of every layer, the mean over the units of these pixels. Clears ``finite``
        where a unit has a value that is not."""
        assert self.state is not None
        assert self.size is not None
        maps = {}
        for name, (vectors, grid) in self.taps.units(inputs, self.state, pixels).items():
            self._check(name, vectors)
            self.grids[name] = grid
            finite &= vectors.isfinite().flatten(1).all(1)
            units = self._reduce(vectors.transpose(1, 2), name)
            chosen = list(zip(*units_of(pixels, self.size, grid)))
            # Several are moved onto the unit in the middle.
            middle = chosen[0] if len(chosen) == 1 else (grid[0] // 2, grid[1] // 2)
            row, column = self.places[name] = self._place(middle, grid)
            total = torch.zeros_like(inputs[:, 0])
            for number, unit in enumerate(chosen):
                at_row, at_column = self._place(unit, grid)
                one = self._backward(units[:, number].sum(), inputs)
                total += shift(one, round(row - at_row), round(column - at_column))
            maps[name] = total / len(pixels)
        return maps

    def _place(self, unit: tuple[int, int], grid: tuple[int, int]) -> Place:
        assert self.size is not None
        return place_of_unit(unit, self.size, grid, self.in_patches)

    def _check(self, name: str, feature: Tensor) -> None:
        if not feature.requires_grad:
            raise ValueError(
                f"layer {name!r} does not depend on the picture in a way that has a gradient "
                "(detached, or computed without gradients); name another"
            )
        if self.reduction == "sum":
            refuse_sum_after_norm(feature, name)

    def _reduce(self, vectors: Tensor, name: str) -> Tensor:
        return reduce_channels(vectors, self.reduction, name, self.seed)

    def _backward(self, unit: Tensor, inputs: Tensor) -> Tensor:
        # Pictures do not touch each other in evaluation mode, so the gradient of the sum over
        # them is each one's own.
        (slope,) = torch.autograd.grad(unit, inputs, retain_graph=True)
        if self.gradient == "abs":
            slope = slope.abs()
        elif self.gradient == "relu":
            slope = slope.relu()
        return slope.sum(1)

    def _add(
        self, names: list[str], maps: dict[str, Tensor], present: Tensor, finite: Tensor
    ) -> None:
        maps = {layer: layer_maps.cpu() for layer, layer_maps in maps.items()}
        for layer_maps in maps.values():
            finite &= layer_maps.isfinite().flatten(1).all(1)
        # A picture counts in every layer or in none: layers are compared over the same pictures.
        self.without_units += [name for name, is_ in zip(names, present.tolist()) if not is_]
        broken = present & ~finite
        self.not_finite += [name for name, is_ in zip(names, broken.tolist()) if is_]
        self.pictures += [n for n, is_ in zip(names, (present & finite).tolist()) if is_]
        for layer, layer_maps in maps.items():
            if layer not in self.moments:
                self.moments[layer] = Moments.zeros(*layer_maps.shape[1:])
            self.moments[layer].add(layer_maps[present & finite].numpy())

    def result(self, about: dict[str, Any]) -> ERF:
        if self.size is None:
            raise NoFieldError("images: there was no picture to measure an ERF on")
        num_images = next(iter(self.moments.values())).count
        if num_images == 0:
            raise NoFieldError(
                "no picture could be measured: the value or the gradient of "
                f"{len(self.not_finite)} was not finite and {len(self.without_units)} had no unit "
                "of the class; look at the weights and the pictures"
            )
        empty = [name for name, moments in self.moments.items() if not moments.mean.any()]
        if empty:
            raise NoFieldError(
                f"the field of {', '.join(empty)} is zero everywhere, in every picture: with "
                f"reduction={self.reduction!r} and gradient={self.gradient!r} no pixel moves the "
                "unit; try reduction='l1' or 'random', or another unit"
            )
        layers = {
            name: LayerERF.from_moments(
                name, moments, self.places.get(name), self.grids[name], self.gradient
            )
            for name, moments in self.moments.items()
        }
        recipe = {
            "units": describe_units(self.units),
            "reduction": self.reduction,
            "gradient": self.gradient,
            "image_size": list(self.size),
        }
        if self.reduction == "random":
            recipe["seed"] = self.seed
        return ERF(
            layers, num_images, self.not_finite, self.without_units, recipe, about, self.pictures
        )


def describe_units(units: Literal["center"] | Pixels | Grid | ClassPixels) -> Any:
    """As plain data, for files and titles."""
    if isinstance(units, str):
        return units
    if isinstance(units, Grid):
        return f"grid of {units.rows}x{units.columns}"
    if isinstance(units, ClassPixels):
        return f"class {units.train_id} in the {units.source}"
    return [[int(row), int(column)] for row, column in units]


def _chunks(
    images: Images, batch_size: int | None, pixels: int, num_images: int | None
) -> Iterator[tuple[list[str], Tensor, Tensor | None]]:
    """Names, pictures and labels, ``batch_size`` or so many ``pixels`` at a time, no batch read
    that is not needed."""
    num_read = 0
    for batch in [images] if isinstance(images, Tensor) else images:
        pictures = batch if isinstance(batch, Tensor) else batch["image"]
        labels = None if isinstance(batch, Tensor) else batch.get("label")
        if pictures.dim() != 4:
            raise ValueError(
                f"images: give batches (B, C, H, W), not a tensor of shape {tuple(pictures.shape)}"
            )
        names = [f"picture {num_read + number}" for number in range(len(pictures))]
        if not isinstance(batch, Tensor) and "id" in batch:
            names = [str(name) for name in batch["id"]]
            # Blanks in place of pictures that could not be read; the data module has named them.
            kept = [i for i, name in enumerate(names) if name not in batch.get("skipped", {})]
            names, pictures = [names[i] for i in kept], pictures[kept]
            labels = None if labels is None else labels[kept]
        left = len(pictures) if num_images is None else num_images - num_read
        step = batch_size or max(pixels // (pictures.shape[2] * pictures.shape[3]), 1)
        for start in range(0, min(len(pictures), left), step):
            stop = min(start + step, left, len(pictures))
            yield (
                names[start:stop],
                pictures[start:stop],
                None if labels is None else labels[start:stop],
            )
        num_read += len(pictures)
        if num_images is not None and num_read >= num_images:
            return
