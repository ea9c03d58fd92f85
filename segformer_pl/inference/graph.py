"""The graph of a predictor: its whole computation as one module without data-dependent Python.

::

    (B, H, W, C) uint8, RGB if C is 3                     (B, C, H, W) float32, normalised
      | normalise, resize or pad to a multiple              |
      | network                            or, alone:       | network
      | upsample to pixels, crop, argmax                    |
    (B, H, W) class indices                               (B, num_classes, h, w) class maps

Preprocessing is part of the graph, so that nobody has to repeat it: the commonest fault of an
exported network are images that were normalised otherwise. ``targets.py`` writes a graph to a file.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental import _config as symbolic_shapes
from torch.nn import functional as F

from segformer_pl import __version__
from segformer_pl.errors import UserError, brief, find_user_error
from segformer_pl.inference.predictor import Predictor
from segformer_pl.inference.protocol import Inference
from segformer_pl.models.segmenter import Network
from segformer_pl.normalization import Normalization

Size = tuple[int, int]


class PredictionGraph(nn.Module):
    """A network with everything around it: images of 8 bits in, class indices out.

    Shapes: (B, H, W, C) uint8 -> (B, H, W) uint8, or int32 if there are more than 256 classes.

    Args:
        network: Segmenter in evaluation mode.
        normalization: Normalisation of its images.
        protocol: Test-time protocol, see :func:`check_protocol`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: Any, normalization: Normalization, protocol: Inference) -> None:
        super().__init__()
        self.network = network
        # (x / 255 - mean) / std as one product and one sum. They stay outside of the first
        # convolution: its zero padding is the mean colour, so the shift would be wrong there.
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
            for values in (normalization.mean, normalization.std)
        )
        like = next(network.parameters())
        self.register_buffer("scale", (1 / (255 * std)).to(like))
        self.register_buffer("shift", (-mean / std).to(like))
        self.image_size = protocol.image_size
        self.resize_to, self.pad_to = protocol.resize_to, protocol.pad_to
        self.dtype = torch.uint8 if network.num_classes <= 256 else torch.int32

    def forward(self, images: Tensor) -> Tensor:
        """Return the class indices (B, H, W) of images (B, H, W, C)."""
        size = images.shape[1], images.shape[2]
        view = padded = _multiples(self.image_size or size, self.resize_to)
        x = images.permute(0, 3, 1, 2).to(self.scale.dtype) * self.scale + self.shift
        if self.image_size is not None:
            x = _resize(x, self.image_size, is_antialiased=True)
        if self.resize_to is not None:
            x = _resize(x, view)
        if self.pad_to is not None:
            padded = _multiples(view, self.pad_to)
            x = F.pad(x, (0, padded[1] - view[1], 0, padded[0] - view[0]))
        maps = _resize(self.network(x), padded)[:, :, : view[0], : view[1]]
        if self.image_size is not None or self.resize_to is not None:
            maps = _resize(maps, size)
        return maps.argmax(1).to(self.dtype)


def check_protocol(protocol: Inference) -> None:
    """Refuse a test-time protocol that a graph cannot hold: it takes one view of the whole image.

    Raises:
        UserError: The protocol has windows or several views, or fits images into a box.
    """
    kept = Inference(
        image_size=protocol.image_size, resize_to=protocol.resize_to, pad_to=protocol.pad_to
    )
    names = ("base_size", "window", "scales", "flip")
    others = [n for n in names if _plain(getattr(protocol, n)) != _plain(getattr(kept, n))]
    if others:
        defaults = {"scales": "[1]", "flip": "false"}
        remedy = " ".join(f"--inference.{name} {defaults.get(name, 'null')}" for name in others)
        raise UserError(
            f"the test-time protocol sets {', '.join(others)}, and a graph predicts whole images "
            f"in one pass; give {remedy}, or --network_only and compute the protocol around it"
        )


def trace(
    predictor: Predictor,
    network_only: bool = False,
    size: Size | None = None,
    any_batch: bool = False,
) -> ExportedProgram:
    """Trace the graph of a predictor, whose network is folded for inference.

    Args:
        predictor: Predictor on the CPU.
        network_only: Whether the graph is the network alone.
        size: Fixed height and width of the images in pixels. None: any size.
        any_batch: Whether the graph takes any number of images. If not, it takes one.

    Raises:
        UserError: The protocol does not fit into a graph, or the network cannot be traced.
    """
    network = predictor.network.for_inference()
    is_resized = not network_only and predictor.protocol.image_size is not None
    for part in network.modules() if size is None and not is_resized else ():
        if isinstance(part, Network) and not part.traces_any_size:
            raise UserError(
                f"torch cannot trace {type(part).__name__} for images of any size; give a fixed "
                "size, --size HEIGHT WIDTH"
            )
    graph: nn.Module = network
    if not network_only:
        check_protocol(predictor.protocol)
        graph = PredictionGraph(network, predictor.normalization, predictor.protocol).eval()
    # An example of odd sides, none of which could be mistaken for another number.
    height, width = size or (2 * max(network.min_size, 32) + 1, 3 * max(network.min_size, 32) + 1)
    batch = 2 if any_batch else 1
    if network_only:
        images = torch.zeros(batch, network.in_channels, height, width)
    else:
        images = torch.zeros(batch, height, width, network.in_channels, dtype=torch.uint8)
    first = 2 if network_only else 1
    free = [0] if any_batch else []
    free += [first, first + 1] if size is None else []
    shapes = (dict.fromkeys(free, Dim.DYNAMIC),)
    try:
        # Without this setting, torch would refuse sizes whose coarsest maps have a single row.
        settings = symbolic_shapes.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        with torch.no_grad(), settings:
            return export(graph, (images,), dynamic_shapes=shapes)
    except Exception as error:  # any type: the network may be the user's
        reason = find_user_error(error) or brief(error)
        how = "for images of any size" if size is None else f"for images of {height}x{width} pixels"
        remedy = "give a fixed size, --size HEIGHT WIDTH" if size is None else "give another size"
        raise UserError(
            f"{type(predictor.network).__name__} cannot be exported {how} ({reason}); {remedy}"
        ) from error


def describe(
    predictor: Predictor,
    network_only: bool = False,
    size: Size | None = None,
    any_batch: bool = False,
    ignore_index: int | None = None,
) -> dict[str, Any]:
    """Return what the user of an exported file has to know, as plain data.

    The arguments are those of :func:`trace`, and the label that training ignored, if known.
    """
    network, normalization = predictor.network, predictor.normalization
    channels = network.in_channels
    bands = "RGB" if channels == 3 else "RGB and fourth band"
    batch = "batch" if any_batch else "1"
    sides = "height, width" if size is None else f"{size[0]}, {size[1]}"
    if network_only:
        given = (
            f"({batch}, {channels}, {sides}) float32, (x / 255 - image_mean) / image_std, x {bands}"
        )
        result = f"({batch}, {network.num_classes}, h, w) float32, {network.output}"
    else:
        kind = "uint8" if network.num_classes <= 256 else "int32"
        given = f"({batch}, {sides}, {channels}) uint8, {bands}"
        result = f"({batch}, {sides}) {kind}, class indices"
    protocol = predictor.protocol
    return {
        "segformer_pl": __version__,
        "network": type(network).__name__,
        "input": given,
        "output": result,
        "image_mean": list(normalization.mean),
        "image_std": list(normalization.std),
        "class_names": predictor.class_names,
        "palette": predictor.palette,
        "ignore_index": ignore_index,
        "weight_constants": network.weight_constants(),
        "image_size": None if network_only else _plain(protocol.image_size),
        "resize_to": None if network_only else protocol.resize_to,
        "pad_to": None if network_only else protocol.pad_to,
    }


def _multiples(size: tuple[Any, Any], divisor: int | None) -> tuple[Any, Any]:
    # torch.export knows that this is a multiple, which it does not know of side + (-side % divisor)
    if divisor is None:
        return size
    height, width = ((side + divisor - 1) // divisor * divisor for side in size)
    return height, width


def _resize(maps: Tensor, size: tuple[Any, Any], is_antialiased: bool = False) -> Tensor:
    return F.interpolate(
        maps, size=size, mode="bilinear", align_corners=False, antialias=is_antialiased
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
