"""Catching the feature maps of any network, without leaving a trace on it.

A layer is named by a key of the network's ``feature_maps`` (the project's segmenters), by the
dotted name of a module as in ``named_modules``, or ``output`` for what the network returns.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from segformer_pl.analysis.erf.units import Pixels, units_of

Layout = Literal["auto", "channels_first", "channels_last", "tokens"]
OUTPUT = "output"
MAX_PREFIX_TOKENS = 8  # class, distillation and register tokens of vision transformers


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, gradients on, full precision; afterwards mode and random state as before."""
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


def place_of(model: nn.Module, fallback: Tensor) -> tuple[torch.device, torch.dtype]:
    """Where the network computes, and in which precision its ERF is measured: float32, or
    float64 if its parameters are."""
    floating = (t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    tensor = next(floating, fallback)
    return tensor.device, torch.float64 if tensor.dtype == torch.float64 else torch.float32


def norms_of_the_batch(model: nn.Module) -> list[str]:
    """Names of the BatchNorms that look at the batch in evaluation mode too, because they keep no
    running statistics."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is None
    ]


class Taps:
    """Runs a network and returns the named feature maps as (B, C, h, w).

    Parameters and buffers stand in detached and in full precision, so that a backward pass goes to
    the picture alone and nothing of the network is changed.

    Args:
        model: The network.
        layers: Names; default all of ``feature_maps``.
        layout: Of the layers that are modules, where the sizes do not tell.

    Raises:
        ValueError: there is no such layer, or none is named and the network has no
            ``feature_maps``.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str] | None = None, layout: Layout = "auto"
    ) -> None:
        if layout not in get_args(Layout):
            raise ValueError(f"layout={layout!r}: give one of {', '.join(get_args(Layout))}")
        if layers is not None and (
            isinstance(layers, str) or not layers or len(set(layers)) != len(layers)
        ):
            raise ValueError(f"layers={layers!r}: give a list of at least one name, each once")
        self.model = model
        self.layers = None if layers is None else list(layers)
        self.layout = layout
        self.modules = dict(model.named_modules())
        # Single units of feature maps at less cost, where the network knows how.
        self.gives_units = hasattr(model, "unit_features") and not any(
            "." in name or name == OUTPUT for name in layers or ()
        )
        if layers is None and not hasattr(model, "feature_maps"):
            some = [name for name in self.modules if name.count(".") < 2 and name][:12]
            raise ValueError(
                f"layers: {type(model).__name__} has no feature_maps, so name the modules to look "
                f"at, as in named_modules(); the first are {', '.join(some) or 'none'}"
            )

    def __call__(self, images: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Feature maps (B, C, h, w) of pictures (B, C_in, H, W), by layer, in the order asked for.

        Args:
            images: In the precision of ``state``.
            state: From :meth:`state`.

        Raises:
            ValueError: a layer did not run, ran twice, returned no tensor, or its layout cannot
                be told.
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
                raise ValueError(self._no_such_layer(name, maps))
        if rest:
            with _hooks({name: hooked[name] for name in rest if name in hooked}, caught):
                output = functional_call(_Forward(self.model), state, (images,))
            if OUTPUT in rest and OUTPUT not in hooked:
                caught[OUTPUT] = _tensor_of(output, OUTPUT)
        for name in rest:
            if name not in caught:
                raise ValueError(f"layer {name!r} did not run in the forward pass; name another")
        size = (images.shape[2], images.shape[3])
        return {
            name: maps[name]
            if name in maps
            else channels_first(
                caught[name], size, self.layout, name, is_convolutional(self._module(name))
            )
            for name in wanted or maps
        }

    @property
    def may_name_maps(self) -> bool:
        """Whether a layer can be a key of ``feature_maps``. One that is wins over the module of
        the same name: SegFormer's ``head`` is the fused map, its module returns logits."""
        return self.layers is None or any("." not in n and n != OUTPUT for n in self.layers)

    def units(
        self, images: Tensor, state: dict[str, Tensor], pixels: Pixels
    ) -> dict[str, tuple[Tensor, tuple[int, int]]]:
        """Layer -> ((B, C, n) of the units that n pixels belong to, grid of the layer).

        Raises:
            ValueError: see :meth:`__call__`.
        """
        size = (images.shape[2], images.shape[3])
        if self.gives_units:
            grids: list[tuple[int, int]] = []

            def places(grid: tuple[int, int]) -> tuple[list[int], list[int]]:
                grids.append(grid)
                return units_of(pixels, size, grid)

            vectors = functional_call(_UnitFeatures(self.model), state, (images, places))
            found = dict(zip(vectors, grids, strict=True))
            if found.keys() >= set(self.layers or ()):
                return {name: (vectors[name], found[name]) for name in self.layers or vectors}
            self.gives_units = False  # the rest are modules, or mistakes
        return {
            name: (feature[:, :, rows, columns], grid)
            for name, feature in self(images, state).items()
            for grid in [(feature.shape[2], feature.shape[3])]
            for rows, columns in [units_of(pixels, size, grid)]
        }

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Parameters and buffers, detached, floating-point ones in ``dtype``."""
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        return {
            f"model.{name}": t.detach().to(dtype) if t.is_floating_point() else t.detach()
            for name, t in tensors
        }

    def _module(self, name: str) -> nn.Module:
        return self.modules.get(name, self.model)

    def _no_such_layer(self, name: str, maps: dict[str, Tensor]) -> str:
        known = [*maps, *filter(None, self.modules)]
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"; close are {', '.join(close)}" if close else ""
        if maps:
            hint += f"; its feature maps are {', '.join(maps)}"
        return f"layers: {type(self.model).__name__} has no layer {name!r}{hint}"


class _Forward(nn.Module):
    """A network one level down, as ``functional_call`` wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


class _FeatureMaps(_Forward):
    def forward(self, images: Tensor) -> Any:
        return self.model.feature_maps(images)


class _UnitFeatures(_Forward):
    def forward(self, images: Tensor, places: Any) -> Any:  # type: ignore[override]
        return self.model.unit_features(images, places)


@contextmanager
def _hooks(modules: dict[str, nn.Module], caught: dict[str, Tensor]) -> Iterator[None]:
    handles = []

    def catch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if name in caught:
                raise ValueError(
                    f"layer {name!r} runs more than once in a forward pass, so it has no one "
                    "feature map; name the module around it"
                )
            # A copy: the next module may work in place.
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
    raise ValueError(
        f"layer {name!r} returns a {type(output).__name__} and not one tensor; name a module "
        "inside it"
    )


def is_convolutional(module: nn.Module) -> bool:
    """Whether a module is, or is made of, 2-d convolutions, and not of layers that work on the
    last axis: what it returns has its channels first."""
    inner = list(module.modules())
    on_last = (nn.Linear, nn.LayerNorm, nn.MultiheadAttention)
    two_d = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.GroupNorm)
    return any(isinstance(one, two_d) for one in inner) and not any(
        isinstance(one, on_last) for one in inner
    )


def channels_first(
    tensor: Tensor,
    size: tuple[int, int],
    layout: Layout,
    name: str,
    of_convolutions: bool = False,
) -> Tensor:
    """A view (B, C, h, w) of a layer's output.

    Four axes are channels first or last, three are tokens (B, N, C), row by row, those in front of
    the grid (class token, registers) left out. The grid is the one whose sides are those of the
    picture over one stride. Where both axes of a map could be the channels, those of a layer
    ``of_convolutions`` come first.

    Raises:
        ValueError: that fits in no way, or in two.
    """
    if tensor.dim() == 4 and layout != "tokens":
        first = _is_grid(tensor.shape[2:], size)
        last = _is_grid(tensor.shape[1:3], size)
        if layout == "channels_first" or (
            layout == "auto" and first and (not last or of_convolutions)
        ):
            return tensor
        if layout == "channels_last" or (layout == "auto" and last and not first):
            return tensor.permute(0, 3, 1, 2)
        if first and last:
            raise ValueError(
                f"layer {name!r}: its shape {tuple(tensor.shape)} can be read with channels first "
                "or last; say which with layout='channels_first' or 'channels_last'"
            )
    elif tensor.dim() == 3 and layout in ("auto", "tokens"):
        grids = _token_grids(tensor.shape[1], size)
        if len(grids) > 1:
            ways = " or ".join(
                f"{h}x{w} behind {tensor.shape[1] - h * w} others" for h, w in sorted(grids)
            )
            raise ValueError(
                f"layer {name!r}: its {tensor.shape[1]} tokens can be read as {ways}; give "
                "pictures of another size"
            )
        for grid in grids:
            tokens = tensor[:, tensor.shape[1] - grid[0] * grid[1] :]
            return tokens.transpose(1, 2).reshape(len(tensor), -1, *grid)
    raise ValueError(
        f"layer {name!r}: its shape {tuple(tensor.shape)} is no feature map of pictures of "
        f"{size[0]}x{size[1]} pixels with layout={layout!r}; name another layer"
    )


def _token_grids(num_tokens: int, size: tuple[int, int]) -> set[tuple[int, int]]:
    """Grids (h, w) that so many tokens of a picture can be.

    Patches behind other tokens divide the picture; padded ones stand alone. A grid of one unit is
    taken only if there is no other.
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
    """Whether both sides are those of the picture over the same stride, rounded, give or take a
    row or column for what padding adds or takes away."""
    for stride in range(1, max(size) + 1):
        if all(abs(side - pixels / stride) <= 1 for side, pixels in zip(grid, size)):
            return True
    return False
