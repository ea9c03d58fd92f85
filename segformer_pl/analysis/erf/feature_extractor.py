"""Feature maps of any network; the network itself is not changed.

A layer is named by a key of the network's ``feature_maps`` (the segmenters of this package), by the
dotted name of a module as in ``named_modules``, or by ``output`` for what the network returns.
A layer is read in one of three ways, which share one forward pass where possible::

    layer                           read by
    "stage2", "head"                feature_maps(images)["stage2"], or an adapter of head_units.py
    "encoder.stages.1.blocks.0"     forward hook on that module
    "output"                        network(images)
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from segformer_pl.analysis.erf.head_units import ChooseUnits, UnitAdapter, adapter_for
from segformer_pl.analysis.erf.units import PixelList, units_at_pixels
from segformer_pl.errors import UserError

AxisLayout = Literal["auto", "channels_first", "channels_last", "tokens"]
OUTPUT = "output"
MAX_PREFIX_TOKENS = 8  # class, distillation and register tokens of vision transformers


@contextmanager
def measuring(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluate in full precision with gradients; restore mode and random state afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        devices = [device] if device.type == "cuda" else []
        # Validation runs in inference mode, whose tensors cannot carry gradients.
        with (
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        for module in training:
            module.training = True


def device_and_dtype(model: nn.Module, fallback: Tensor) -> tuple[torch.device, torch.dtype]:
    """Return where a network computes, and the precision in which its ERF is measured.

    The precision is float64 if the parameters have it, and float32 otherwise. A network without
    parameters takes both from ``fallback``.
    """
    floating = (t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    tensor = next(floating, fallback)
    return tensor.device, torch.float64 if tensor.dtype == torch.float64 else torch.float32


def batch_dependent_norms(model: nn.Module) -> list[str]:
    """Return the names of the BatchNorms without running statistics.

    In evaluation mode, too, they normalise with the statistics of the batch.
    """
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is None
    ]


class FeatureExtractor:
    """Runs a network and returns named feature maps as (B, C, h, w).

    The network runs on detached copies of its parameters and buffers in full precision. So a
    backward pass reaches the images alone and changes nothing of the network.

    Args:
        model: The network.
        layers: Names of the layers; all of ``feature_maps`` by default.
        layout: Order of the axes of layers that are modules, where their sizes leave it open.

    Raises:
        UserError: The names or the layout are not valid, or none are given and the network has no
            ``feature_maps``.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str] | None = None, layout: AxisLayout = "auto"
    ) -> None:
        if layout not in get_args(AxisLayout):
            raise UserError(f"layout={layout!r}: give one of {', '.join(get_args(AxisLayout))}")
        if layers is not None and (
            isinstance(layers, str) or not layers or len(set(layers)) != len(layers)
        ):
            raise UserError(f"layers={layers!r}: give a list of at least one name, each once")
        self.model = model
        self.layers = None if layers is None else list(layers)
        self.layout = layout
        self.modules = dict(model.named_modules())
        # Modules and the output need a forward pass of the whole network anyway.
        needs_forward = any("." in name or name == OUTPUT for name in layers or ())
        self.adapter = None if needs_forward else adapter_for(model)
        if layers is None and not hasattr(model, "feature_maps"):
            some = [name for name in self.modules if name.count(".") < 2 and name][:12]
            raise UserError(
                f"layers: {type(model).__name__} has no feature_maps, so name modules, as in "
                f"named_modules(); the first are {', '.join(some) or 'none'}"
            )

    def __call__(self, images: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images (B, C_in, H, W) -> feature maps (B, C, h, w) by layer, in the order asked for.

        Args:
            images: Normalised images in the precision of ``state``.
            state: What :meth:`state` returned.

        Raises:
            UserError: A layer does not exist, did not run, ran twice, returned no tensor, or the
                order of its axes is ambiguous.
        """
        maps: dict[str, Tensor] = {}
        caught: dict[str, Tensor] = {}
        wanted = self.layers or []
        hooked = {name: self.modules[name] for name in wanted if name and name in self.modules}
        if self.may_name_maps and hasattr(self.model, "feature_maps"):
            with _hooks(hooked, caught):
                maps = functional_call(_FeatureMaps(self.model), state, (images,))
        rest = [name for name in wanted if name not in maps and name not in caught]
        for name in rest:
            if name not in hooked and name != OUTPUT:
                raise UserError(self._no_such_layer(name, maps))
        if rest:
            with _hooks({name: hooked[name] for name in rest if name in hooked}, caught):
                output = functional_call(_Forward(self.model), state, (images,))
            if OUTPUT in rest and OUTPUT not in hooked:
                caught[OUTPUT] = _tensor_of(output, OUTPUT)
        for name in rest:
            if name not in caught:
                raise UserError(f"layer {name!r} did not run in the forward pass; name another")
        size = (images.shape[2], images.shape[3])
        return {
            name: maps[name]
            if name in maps
            else channels_first(
                caught[name], size, self.layout, name, self._has_channels_first(name)
            )
            for name in wanted or maps
        }

    @property
    def may_name_maps(self) -> bool:
        """Whether a layer can be a key of ``feature_maps``.

        Such a key takes precedence over the module of the same name: the feature map ``head`` of
        SegFormer is the fused map, while its module ``head`` returns logits.
        """
        return self.layers is None or any("." not in n and n != OUTPUT for n in self.layers)

    def units(
        self, images: Tensor, state: dict[str, Tensor], pixels: PixelList
    ) -> dict[str, tuple[Tensor, tuple[int, int]]]:
        """Return the units that n pixels select, by layer.

        Args:
            images: As for :meth:`__call__`.
            state: As for :meth:`__call__`.
            pixels: The n pixels.

        Returns:
            Layer -> the vectors of its units (B, C, n), and the grid (h, w) of the layer.

        Raises:
            UserError: As for :meth:`__call__`.
        """
        size = (images.shape[2], images.shape[3])
        if self.adapter is not None:
            grids: list[tuple[int, int]] = []

            def choose(grid: tuple[int, int]) -> tuple[list[int], list[int]]:
                grids.append(grid)
                return units_at_pixels(pixels, size, grid)

            network = _SingleUnits(self.model, self.adapter)
            vectors = functional_call(network, state, (images, choose))
            grid_of = dict(zip(vectors, grids, strict=True))
            if grid_of.keys() >= set(self.layers or ()):
                return {name: (vectors[name], grid_of[name]) for name in self.layers or vectors}
            self.adapter = None  # the rest are modules, or misspelled
        return {
            name: (feature[:, :, rows, columns], grid)
            for name, feature in self(images, state).items()
            for grid in [(feature.shape[2], feature.shape[3])]
            for rows, columns in [units_at_pixels(pixels, size, grid)]
        }

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return parameters and buffers, detached, floating-point ones in ``dtype``."""
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        return {
            f"model.{name}": t.detach().to(dtype) if t.is_floating_point() else t.detach()
            for name, t in tensors
        }

    def _has_channels_first(self, name: str) -> bool:
        """Return whether a layer is known to have the channels first, whatever its sizes."""
        if name == OUTPUT and name not in self.modules and hasattr(self.model, "feature_maps"):
            return True  # class maps are (B, num_classes, h, w) in every segmenter
        return is_convolutional(self.modules.get(name, self.model))

    def _no_such_layer(self, name: str, maps: dict[str, Tensor]) -> str:
        known = [*maps, *filter(None, self.modules)]
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"; close are {', '.join(close)}" if close else ""
        if maps:
            hint += f"; its feature maps are {', '.join(maps)}"
        return f"layers: {type(self.model).__name__} has no layer {name!r}{hint}"


class _Forward(nn.Module):
    """A network as the submodule ``model``: ``functional_call`` calls ``forward`` only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


class _FeatureMaps(_Forward):
    def forward(self, images: Tensor) -> Any:
        return self.model.feature_maps(images)


class _SingleUnits(_Forward):
    def __init__(self, model: nn.Module, adapter: UnitAdapter) -> None:
        super().__init__(model)
        self.adapter = adapter

    def forward(self, images: Tensor, choose: ChooseUnits) -> Any:  # type: ignore[override]
        return self.adapter(self.model, images, choose)


@contextmanager
def _hooks(modules: dict[str, nn.Module], caught: dict[str, Tensor]) -> Iterator[None]:
    handles = []

    def catch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if name in caught:
                raise UserError(
                    f"layer {name!r} runs more than once in a forward pass, so it has no one "
                    "feature map; name the module around it"
                )
            # Clone it, because the next module may work in place.
            caught[name] = _tensor_of(output, name).clone()

        return hook

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(catch(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensor_of(output: Any, name: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    if isinstance(output, (tuple, list)) or hasattr(output, "values"):
        tensors = [value for value in values if isinstance(value, Tensor)]
        if len(tensors) == 1:
            return tensors[0]
    raise UserError(
        f"layer {name!r} returns a {type(output).__name__} and not one tensor; name a module "
        "inside it"
    )


def is_convolutional(module: nn.Module) -> bool:
    """Return whether a module consists of 2-d convolutions and of no layers on the last axis.

    Then its output has the channels first.
    """
    inner = list(module.modules())
    on_last = (nn.Linear, nn.LayerNorm, nn.MultiheadAttention)
    two_d = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.GroupNorm)
    return any(isinstance(one, two_d) for one in inner) and not any(
        isinstance(one, on_last) for one in inner
    )


def channels_first(
    tensor: Tensor,
    size: tuple[int, int],
    layout: AxisLayout,
    name: str,
    prefers_first: bool = False,
) -> Tensor:
    """Return a view (B, C, h, w) of the output of a layer.

    Four axes have the channels first or last. Three axes are tokens (B, N, C), row by row; tokens
    in front of the grid (class token, registers) are left out. The grid is the one whose sides are
    those of the image divided by one stride. Of 64x96 pixels::

        (1, 32, 16, 24)   stride 4, channels first
        (1, 16, 24, 32)   stride 4, channels last
        (1, 25, 192)      stride 16: 4x6 tokens behind one class token

    Args:
        tensor: Output of the layer.
        size: Height and width of the images.
        layout: Order of the axes, or ``auto``.
        name: Name of the layer, for messages.
        prefers_first: Whether the channels come first if both axes could be the channels, as in a
            layer that is made of convolutions.

    Raises:
        UserError: The shape fits in no way, or in two.
    """
    if tensor.dim() == 4 and layout != "tokens":
        first = _is_grid(tensor.shape[2:], size)
        last = _is_grid(tensor.shape[1:3], size)
        if layout == "channels_first" or (
            layout == "auto" and first and (not last or prefers_first)
        ):
            return tensor
        if layout == "channels_last" or (layout == "auto" and last and not first):
            return tensor.permute(0, 3, 1, 2)
        if first and last:
            raise UserError(
                f"layer {name!r}: its shape {tuple(tensor.shape)} can be read with channels first "
                "or last; say which with layout='channels_first' or 'channels_last'"
            )
    elif tensor.dim() == 3 and layout in ("auto", "tokens"):
        grids = _token_grids(tensor.shape[1], size)
        if len(grids) > 1:
            ways = " or ".join(
                f"{h}x{w} behind {tensor.shape[1] - h * w} others" for h, w in sorted(grids)
            )
            raise UserError(
                f"layer {name!r}: its {tensor.shape[1]} tokens can be read as {ways}; give "
                "images of another size"
            )
        for grid in grids:
            tokens = tensor[:, tensor.shape[1] - grid[0] * grid[1] :]
            return tokens.transpose(1, 2).reshape(len(tensor), -1, *grid)
    raise UserError(
        f"layer {name!r}: its shape {tuple(tensor.shape)} is no feature map of images of "
        f"{size[0]}x{size[1]} pixels with layout={layout!r}; name another layer"
    )


def _token_grids(num_tokens: int, size: tuple[int, int]) -> set[tuple[int, int]]:
    """Return the grids (h, w) that a number of tokens can be.

    Patches behind prefix tokens divide the image; padded ones have no prefix tokens. A grid of one
    unit counts only if there is no other.
    """
    grids = set()
    for stride in range(1, max(size) + 1):
        grid = (-(-size[0] // stride), -(-size[1] // stride))
        surplus = num_tokens - grid[0] * grid[1]
        divides = all(pixels % stride == 0 for pixels in size)
        if surplus == 0 or (divides and 0 < surplus <= MAX_PREFIX_TOKENS):
            grids.add(grid)
    return grids - {(1, 1)} or grids


def _is_grid(grid: Sequence[int], size: tuple[int, int]) -> bool:
    """Return whether both sides are those of the image divided by one stride.

    Padding may add a row or a column, or take one away.
    """
    for stride in range(1, max(size) + 1):
        if all(abs(side - pixels / stride) <= 1 for side, pixels in zip(grid, size)):
            return True
    return False
