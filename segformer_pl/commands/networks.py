"""Build the networks that are named on the command line."""

import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from segformer_pl import models
from segformer_pl.commands.options.networks import SEGMENTERS
from segformer_pl.errors import UserError, brief, did_you_mean
from segformer_pl.models.segmenter import Segmenter, check_segmenter


def find_segmenter(name: str) -> Callable[..., Segmenter]:
    """Return the class or function that builds a network.

    Args:
        name: One of ``SEGMENTERS``, or an import path such as ``package.module.Class``.

    Raises:
        UserError: The name does not exist, or its function or class has no argument
            ``num_classes``.
    """
    if name in SEGMENTERS:
        return getattr(models, name)
    try:
        build = pkgutil.resolve_name(name)
        parameters = inspect.signature(build).parameters
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"there is no network {name!r} ({error}){did_you_mean(name, SEGMENTERS)}; give an "
            f"import path such as package.module.Class, or one of {', '.join(SEGMENTERS)}"
        ) from error
    if "num_classes" not in parameters:
        raise UserError(
            f"{name!r} has no argument num_classes, so it is not a segmentation network of this "
            "package; see segformer_pl.models.segmenter"
        )
    return build


def build_network(name: str, build: Callable[..., Segmenter], **arguments: Any) -> Segmenter:
    """Build the network that a command names, and check that it is a segmenter.

    Args:
        name: Name of the network, for messages.
        build: Its class or function.
        arguments: Arguments of ``build``.

    Raises:
        UserError: The arguments do not fit, or the result is no segmenter.
    """
    try:
        network = build(**arguments)
    except Exception as error:  # any type: the constructor may be the user's
        raise UserError(f"{name} cannot be built with these arguments: {brief(error)}") from error
    check_segmenter(network)
    return network
