"""Run a segmenter and check what it returns against the contract, :mod:`.segmenter`.

The ``forward`` of a user's network may raise any exception, or return class maps over which a later
step would stumble. Where a network is examined, and not trained, the user gets one sentence: which
network, which images, what happened where, and what the contract asks for.
"""

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segformer_pl.errors import UserError, brief
from segformer_pl.models.segmenter import Segmenter


def class_maps_of(network: Any, images: Tensor) -> Tensor:
    """Return the class maps of images, after a check of their shape.

    Args:
        network: Segmenter, or any module with ``num_classes``.
        images: (B, in_channels, H, W).

    Returns:
        (B, num_classes, h, w).

    Raises:
        UserError: The network fails, or returns something else.
    """
    maps = _call(network, "forward", network, images, _wanted(network))
    check_class_maps(network, maps, images)
    return maps


def check_class_maps(network: Any, maps: Any, images: Tensor) -> None:
    """Check what a network returned for images.

    Raises:
        UserError: It is no tensor (B, num_classes, h, w).
    """
    expected = (len(images), network.num_classes)
    if not isinstance(maps, Tensor) or maps.dim() != 4 or maps.shape[:2] != expected:
        raise _wrong_result(network, "forward", maps, images, _wanted(network))


def feature_maps_of(network: Segmenter, images: Tensor) -> dict[str, Tensor]:
    """Return the feature maps of images (B, in_channels, H, W), after a check of their shapes.

    Raises:
        UserError: The network fails, or returns something else.
    """
    wanted = "a dict of maps (B, C_i, h_i, w_i)"
    maps = _call(network, "feature_maps", network.feature_maps, images, wanted)
    if not isinstance(maps, Mapping):
        raise _wrong_result(network, "feature_maps", maps, images, wanted)
    for feature_map in maps.values():
        if not isinstance(feature_map, Tensor) or feature_map.dim() != 4:
            raise _wrong_result(network, "feature_maps", feature_map, images, wanted)
    return dict(maps)


def _wanted(network: Any) -> str:
    return f"class maps (B, {network.num_classes}, h, w)"


def _call(
    network: Any, method: str, call: Callable[[Tensor], Any], images: Tensor, wanted: str
) -> Any:
    try:
        return call(images)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # any type: the network may be the user's
        raise UserError(
            f"{type(network).__name__}.{method} fails on images of shape {tuple(images.shape)} "
            f"with {_described(error)}; let it return {wanted} of images (B, "
            f"{network.in_channels}, H, W), see {Segmenter.__module__}"
        ) from error


def _wrong_result(network: Any, method: str, result: Any, images: Tensor, wanted: str) -> UserError:
    kind = f"a {type(result).__name__}"
    if isinstance(result, Tensor):
        kind = f"a tensor of shape {tuple(result.shape)}"
    return UserError(
        f"{type(network).__name__}.{method} returns {kind} for images of shape "
        f"{tuple(images.shape)}; let it return {wanted}, see {Segmenter.__module__}"
    )


def _described(error: Exception) -> str:
    """Return type, message and place of an exception; the place is not inside of a library."""
    libraries = str(Path(torch.__file__).parents[1])
    places = [
        f" ({Path(frame.filename).name}, line {frame.lineno})"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith((libraries, "<"))
    ]
    text = brief(error)
    kind = type(error).__name__
    described = text if text.startswith(kind) else f"{kind}: {text}"
    return described + (places[-1] if places else "")
