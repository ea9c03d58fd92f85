"""Weights of a similar backbone in the encoder of a network."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from segformer_pl.checkpoints.matching import Matched
from segformer_pl.checkpoints.sources import Weights
from segformer_pl.models.segmenter import AdaptedWeights, Encoder


def innermost(spec: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return class path and arguments of a specification's encoder, or of itself if it has none."""
    arguments = spec.get("init_args", {})
    if isinstance(arguments.get("encoder"), Mapping):
        return innermost(arguments["encoder"])
    return str(spec.get("class_path")), dict(arguments)


def adapt_encoder(weights: Weights, model: Any, matched: Matched) -> AdaptedWeights:
    """Let the encoders of a network adapt the tensors that were matched with theirs.

    See :meth:`~segformer_pl.models.segmenter.Encoder.adapt_weights`.

    Args:
        weights: The source.
        model: The network.
        matched: Tensors of the source and of the network. Changed in place: tensors that an encoder
            leaves out become dropped ones, and those that it initialises are no longer set.

    Returns:
        What was adapted, by the keys of the network.
    """
    stated = innermost(weights.task.get("network", {}))[1]
    merged: dict[str, dict[str, Any]] = {"resampled": {}, "initialized": {}}
    for path, module in model.named_modules():
        if not isinstance(module, Encoder):
            continue
        prefix = f"{path}." if path else ""
        inside: dict[str, Tensor] = {}
        for key in [key for key in matched.source_tensors if key.startswith(prefix)]:
            inside[key.removeprefix(prefix)] = matched.source_tensors.pop(key)
        adapted = module.adapt_weights(inside, stated)
        matched.source_tensors |= {prefix + key: t for key, t in adapted.tensors.items()}
        matched.dropped |= {prefix + key: why for key, why in adapted.left_out.items()}
        for key, why in adapted.initialized.items():
            matched.model_tensors.pop(prefix + key, None)
            merged["initialized"][prefix + key] = why
        merged["resampled"] |= {prefix + key: how for key, how in adapted.resampled.items()}
    return AdaptedWeights(matched.source_tensors, matched.dropped, **merged)
