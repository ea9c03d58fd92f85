"""Freeze a part of a network, so that a fine-tuning trains the rest."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from segformer_pl.errors import UserError

Freeze = Literal["encoder"]


def check_freeze(freeze: Freeze | None, layer_decay: float) -> None:
    """Raise a UserError if the argument ``freeze`` is unknown or contradicts ``layer_decay``."""
    if freeze not in (None, "encoder"):
        raise UserError(f"model.freeze is {freeze!r}; give encoder, or leave it out")
    if freeze is not None and layer_decay != 1:
        raise UserError(
            f"model.layer_decay {layer_decay} sets the learning rates of the encoder, and "
            "model.freeze freezes it; leave one of them out"
        )


def check_complete(source: str, missing: Sequence[str]) -> None:
    """Raise a UserError if weights lack tensors of the encoder, which would never be trained."""
    if missing:
        raise UserError(
            f"model.freeze encoder: {source} lacks {len(missing)} tensors of the encoder, such as "
            f"{missing[0]}, which would keep their initial values; leave model.freeze out"
        )


def start_frozen(has_weights: bool) -> None:
    """Warn of an encoder that is frozen as it was built, and of nothing that is meant to be.

    Args:
        has_weights: Whether the network has weights of a file or of earlier steps.
    """
    # Lightning's warning of modules that are in evaluation mode when a training starts
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")
    if not has_weights:
        rank_zero_warn(
            "model.freeze encoder without model.weights or model.encoder_weights: the encoder "
            "keeps the weights that it was built with, which are random unless it is pretrained"
        )


def freeze_encoder(network: Any) -> list[nn.Module]:
    """Take the encoder's parameters out of the training.

    They need no gradients any more. Modules that hold no others are set to evaluation mode, so that
    BatchNorm keeps its statistics, and dropout and drop path rest. Classifiers inside the encoder,
    as in SeMask, are trained on.

    Args:
        network: Segmenter (:class:`segformer_pl.models.segmenter.Segmenter`).

    Returns:
        The modules in evaluation mode, for the caller to keep in it.

    Raises:
        UserError: The network names no parameters of an encoder.
    """
    classifiers = tuple(f"{path}." for path in network.classifier_paths)
    names = {n for n in network.encoder_parameters() if not n.startswith(classifiers)}
    if not names:
        raise UserError(
            f"model.freeze encoder: a {type(network).__name__} names no parameters of an encoder; "
            "leave model.freeze out, or return them from encoder_parameters()"
        )
    for name, parameter in network.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    frozen = list(_frozen_modules(network))
    for module in frozen:
        module.eval()
    return frozen


def _frozen_modules(module: nn.Module) -> list[nn.Module]:
    """Return the largest submodules whose parameters are all frozen."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [module]
    return [found for child in module.children() for found in _frozen_modules(child)]


def trained_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return an optimiser's groups without the frozen parameters; groups of no others go."""
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    return [group for group in groups if group["params"]]
