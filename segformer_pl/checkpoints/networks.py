"""Build the network that some weights are for.

A *network specification* is what an experiment file says of ``model.network``: a ``class_path`` and
its ``init_args``. A checkpoint of a run and a native file state it. For the published SegFormers
shapes tell all but the number of heads and the strides, which transformers' ``config.json`` states
and which else are those of the published variants.
"""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from segformer_pl.checkpoints.loading import (
    FREE_ARGUMENTS,
    STEM,
    dims_and_depths,
    flat_arguments,
    load_weights,
    variants,
)
from segformer_pl.checkpoints.matching import split
from segformer_pl.checkpoints.report import LoadReport
from segformer_pl.checkpoints.sources import Source, Weights, read_weights
from segformer_pl.errors import UserError
from segformer_pl.models.mit import MixTransformer
from segformer_pl.models.segformer import SegFormer

CLASSIFIER = f"{SegFormer.classifier_path}.weight"

# transformers leaves values out of config.json that equal these (SegformerConfig, 5.23).
_CONFIG_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": (1, 2, 5, 8),
    "strides": (4, 2, 2, 2),
    "hidden_act": "gelu",
    "drop_path_rate": 0.1,
    "classifier_dropout_prob": 0.1,
    "reshape_last_stage": True,
}


def load_network(source: Source | Weights) -> tuple[Any, LoadReport]:
    """Build the network that a source holds the weights of, and set them.

    Returns:
        A segmenter, or an encoder if the source holds no decode head, in the source's dtype; and
        the report.

    Raises:
        UserError: The source cannot be read, does not say enough to build its network, or
            describes another one than its tensors are of.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    network: Any = build(network_spec(weights), weights.name)
    dtypes = [tensor.dtype for tensor in weights.tensors.values() if tensor.is_floating_point()]
    network.to(dtypes[0] if dtypes else torch.float32)
    report = load_weights(network, weights)
    if adapted := {**report.reinitialized, **report.inflated}:
        name, reason = next(iter(adapted.items()))
        raise UserError(
            f"{weights.name} describes another network than the one that its tensors are of "
            f"({name}: {reason}); correct its description, or build the network yourself and use "
            "load_weights"
        )
    return network, report


def build(spec: Mapping[str, Any], name: str) -> nn.Module:
    """Build a network from its specification.

    Args:
        spec: Class path and arguments. An argument that is a specification itself is built first.
        name: The file that states it, for messages.

    Raises:
        UserError: The class path is not that of a network, or it cannot be built. A file of
            weights must not choose what other code runs, so only classes of :class:`nn.Module` are
            called, and functions whose return annotation is one.
    """
    factory = _factory(str(spec.get("class_path")), name)
    arguments = {
        key: build(value, name) if isinstance(value, Mapping) and "class_path" in value else value
        for key, value in spec.get("init_args", {}).items()
    }
    try:
        return factory(**arguments)
    except Exception as error:  # of any kind, from whatever the arguments are given to
        raise UserError(
            f"{name} describes a network that cannot be built here ({brief(error)}); build it "
            "yourself and use load_weights"
        ) from error


def brief(error: Exception) -> str:
    """The first line of an exception, for a sentence; with its type where that says more."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return (text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")[:200]


def _factory(class_path: str, name: str) -> Any:
    """Import what a class path names, and refuse what is no network."""
    module_name, _, attribute = class_path.rpartition(".")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the module is not installed, has no such name, or fails
        raise UserError(
            f"{name} was trained in a {class_path}, which cannot be imported here "
            f"({brief(error)}); make it importable, or build the network yourself and use "
            "load_weights"
        ) from error
    if not _is_network(factory):
        raise UserError(
            f"{name} was trained in a {class_path}, which is no class of torch.nn.Module and no "
            "function that is annotated to return one, so it is not called; build the network "
            "yourself and use load_weights"
        )
    return factory


def _is_network(factory: Any) -> bool:
    if inspect.isfunction(factory):
        try:
            factory = get_type_hints(factory).get("return")
        except (NameError, TypeError):  # annotations that cannot be evaluated
            return False
    return inspect.isclass(factory) and issubclass(factory, nn.Module)


def function_arguments(spec: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return what a specified network computes by: its arguments, with defaults and what follows
    from others (``paddings``) filled in; None if the network does not state its arguments.

    Raises:
        UserError: There cannot be such a network.
    """
    with torch.device("meta"):
        network: Any = build(spec, name)
    if not hasattr(network, "spec"):
        return None
    arguments = flat_arguments(network.spec())
    return {key: value for key, value in arguments.items() if key not in FREE_ARGUMENTS}


def network_spec(weights: Weights) -> dict[str, Any]:
    """Return the specification of the network that the weights are for."""
    if "network" in weights.task:
        return dict(weights.task["network"])
    parts = split(weights, "all")[2]
    config = weights.config if weights.config.get("model_type") == "segformer" else {}
    _check_config(weights.name, config, parts)
    encoder = {
        "class_path": f"{MixTransformer.__module__}.{MixTransformer.__qualname__}",
        "init_args": _arguments_from_shapes(weights, parts, config),
    }
    if CLASSIFIER not in parts:
        return encoder
    return {
        "class_path": f"{SegFormer.__module__}.{SegFormer.__qualname__}",
        "init_args": {
            "encoder": encoder,
            "num_classes": parts[CLASSIFIER].shape[0],
            "decoder_dim": parts[CLASSIFIER].shape[1],
            "dropout": (_CONFIG_DEFAULTS | dict(config))["classifier_dropout_prob"],
        },
    }


def _check_config(name: str, config: Mapping[str, Any], parts: Mapping[str, Tensor]) -> None:
    """Compare what a config.json says of the shapes with the tensors: if they differ it belongs to
    other weights, and what only it tells (heads, strides) would be wrong too.

    Raises:
        UserError: They differ.
    """
    dims, depths = dims_and_depths(parts)
    stages = [f"encoder.stages.{s}." for s in range(4)]
    sr_names = [s + "blocks.0.attn.sr.weight" for s in stages]
    classifier = parts.get(CLASSIFIER)
    known: dict[str, Any] = {
        "hidden_sizes": dims,
        "depths": depths,
        "sr_ratios": tuple(parts[sr].shape[-1] if sr in parts else 1 for sr in sr_names),
        "patch_sizes": tuple(
            parts[key].shape[-1] for s in stages if (key := s + "patch_embed.proj.weight") in parts
        ),
    }
    if STEM in parts:
        known["num_channels"] = parts[STEM].shape[1]
    if classifier is not None:
        known |= {"decoder_hidden_size": classifier.shape[1], "num_labels": len(classifier)}
    for key, value in known.items():
        stated = config.get(key)
        if isinstance(stated, list):
            stated = tuple(stated)
        if stated is not None and stated != value:
            texts = (
                ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in (stated, value)
            )
            raise UserError(
                "{} has a config.json that states {} as {}, its tensors as {}; put the two files "
                "together that belong together".format(name, key, *texts)
            )


def _arguments_from_shapes(
    weights: Weights, parts: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Any]:
    stated = _CONFIG_DEFAULTS | dict(config)
    dims, depths = dims_and_depths(parts)
    stages = [f"encoder.stages.{s}." for s in range(4)]
    try:
        patch_sizes = tuple(parts[s + "patch_embed.proj.weight"].shape[-1] for s in stages)
        hidden = [parts[s + "blocks.0.mlp.fc1.weight"].shape[0] for s in stages]
        in_channels = parts[STEM].shape[1]
    except KeyError as error:
        raise UserError(
            f"{weights.name} lacks {error}, so its network cannot be built; give complete weights"
        ) from error
    reductions = [parts.get(s + "blocks.0.attn.sr.weight", torch.empty(1)) for s in stages]
    mlp_ratios = {width // dim for width, dim in zip(hidden, dims)}

    problem = None
    if not config and ((dims, depths) not in variants() or patch_sizes != (7, 3, 3, 3)):
        problem = (
            "an encoder that is none of MiT-B0 to B5, and tensors tell neither its heads nor its "
            "strides"
        )
    elif len(mlp_ratios) > 1:
        problem = f"Mix-FFNs of several widths ({sorted(mlp_ratios)} times C), one is possible here"
    elif stated["hidden_act"] != "gelu":
        problem = f"hidden_act {stated['hidden_act']!r} in its config.json, and SegFormer has GELU"
    elif not stated["reshape_last_stage"]:
        problem = "reshape_last_stage false in its config.json, which is not SegFormer"
    if problem is not None:
        raise UserError(
            f"{weights.name} holds {problem}; build the network yourself and use load_weights"
        )
    return {
        "embed_dims": dims,
        "depths": depths,
        "num_heads": tuple(stated["num_attention_heads"]),
        "mlp_ratio": mlp_ratios.pop(),
        "sr_ratios": tuple(sr.shape[-1] for sr in reductions),
        "patch_sizes": patch_sizes,
        "strides": tuple(stated["strides"]),
        "paddings": tuple(k // 2 for k in patch_sizes),
        "in_channels": in_channels,
        "drop_path_rate": stated["drop_path_rate"],
    }
