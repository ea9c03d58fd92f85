"""Build the network that some weights belong to.

A *network specification* is the value of ``model.network`` in an experiment file: a ``class_path``
and its ``init_args``. The checkpoint of a run and a native file state it. For the other layouts it
is derived from the shapes of the tensors. Shapes do not show the number of heads and the strides:
they come from transformers' ``config.json``, or else are those of the published variants.
"""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from segformer_pl.checkpoints import maskformer_layout
from segformer_pl.checkpoints.layouts import detect
from segformer_pl.checkpoints.loading import (
    STEM,
    dims_and_depths,
    flat_arguments,
    free_arguments,
    load_weights,
    variants,
)
from segformer_pl.checkpoints.matching import split
from segformer_pl.checkpoints.report import LoadReport, listed
from segformer_pl.checkpoints.sources import Weights, WeightsSource, read_weights
from segformer_pl.errors import UserError, brief
from segformer_pl.models.mit import MixTransformer
from segformer_pl.models.segformer import SegFormer

CLASSIFIER = f"{SegFormer.classifier_paths[0]}.weight"

# Defaults of transformers' SegformerConfig (5.23), which its config.json leaves out.
_CONFIG_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": (1, 2, 5, 8),
    "strides": (4, 2, 2, 2),
    "hidden_act": "gelu",
    "drop_path_rate": 0.1,
    "classifier_dropout_prob": 0.1,
    "reshape_last_stage": True,
}


def load_network(source: WeightsSource | Weights) -> tuple[Any, LoadReport]:
    """Build the network that a source belongs to, and load the weights into it.

    Returns:
        The network in the source's dtype, and the report. It is a segmenter, or an encoder if the
        source holds no decode head.

    Raises:
        UserError: The source cannot be read, does not state enough to build its network, or
            describes another network than that of its tensors.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    network: Any = build(network_spec(weights), weights.name)
    dtypes = [tensor.dtype for tensor in weights.tensors.values() if tensor.is_floating_point()]
    network.to(dtypes[0] if dtypes else torch.float32)
    report = load_weights(network, weights)
    if adapted := {**report.reinitialized, **report.inflated}:
        key, reason = next(iter(adapted.items()))
        raise UserError(
            f"{weights.name} describes another network than that of its tensors ({key}: {reason}); "
            "correct its description, or build the network yourself and use load_weights"
        )
    return network, report


def build(spec: Mapping[str, Any], name: str) -> nn.Module:
    """Build a network from its specification.

    Args:
        spec: Class path and arguments. An argument that is a specification itself is built first.
        name: Name of the source that states it, for messages.

    Raises:
        UserError: The class path does not name a network, or the network cannot be built. To keep
            a file of weights from running arbitrary code, only subclasses of :class:`nn.Module`
            are called, and functions whose return annotation is such a class.
    """
    factory = _factory(str(spec.get("class_path")), name)
    arguments = {
        key: build(value, name) if isinstance(value, Mapping) and "class_path" in value else value
        for key, value in spec.get("init_args", {}).items()
    }
    if arguments.get("pretrained"):  # the source holds the weights, so do not download others
        arguments["pretrained"] = False
    try:
        return factory(**arguments)
    except Exception as error:  # any type: the constructor may be the user's
        raise UserError(
            f"{name} describes a network that cannot be built here ({brief(error)}); build it "
            "yourself and use load_weights"
        ) from error


def _factory(class_path: str, name: str) -> Any:
    """Import the class or function of a class path; refuse it if it builds no network."""
    module_name, _, attribute = class_path.rpartition(".")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the module is missing, lacks the attribute, or fails to import
        raise UserError(
            f"{name} was trained in a {class_path}, which cannot be imported here "
            f"({brief(error)}); make it importable, or build the network yourself and use "
            "load_weights"
        ) from error
    if not _is_network(factory):
        raise UserError(
            f"{name} was trained in a {class_path}, which is no subclass of torch.nn.Module and no "
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
    """Return the arguments that determine what a network computes, with defaults filled in.

    Arguments that are derived from others (``paddings``) are filled in too. None if the network
    does not state its arguments.

    Args:
        spec: Specification of the network.
        name: Name of the source that states it, for messages.

    Raises:
        UserError: The network cannot be built.
    """
    with torch.device("meta"):
        network: Any = build(spec, name)
    if not hasattr(network, "spec"):
        return None
    arguments, free = flat_arguments(network.spec()), free_arguments(network)
    return {key: value for key, value in arguments.items() if key not in free}


def network_spec(weights: Weights) -> dict[str, Any]:
    """Return the specification of the network that the weights belong to.

    Raises:
        UserError: The source does not determine its network, or contradicts itself.
    """
    if "network" not in weights.task:
        return _transformers_spec(weights)
    stated = dict(weights.task["network"])
    if weights.config.get("model_type") in ("segformer", "maskformer"):
        ours, theirs = flat_arguments(stated), flat_arguments(_transformers_spec(weights))
        for key in theirs:
            if key in ours and theirs[key] != ours[key]:
                raise UserError(
                    f"{weights.name} has a config.json that states {key} as {theirs[key]}, and its "
                    f"tensors state {ours[key]}; use the config.json that belongs to these weights"
                )
    return stated


def _transformers_spec(weights: Weights) -> dict[str, Any]:
    """Return the specification that tensors and a config.json of transformers show."""
    if maskformer_layout.is_transformers_maskformer(weights.tensors):
        return maskformer_layout.network_spec(weights.name, weights.tensors, weights.config)
    if detect(weights.tensors) is None:
        raise UserError(
            f"{weights.name} states no network, and its {len(weights.tensors)} tensors "
            f"({listed(list(weights.tensors))}) show none, as those of SegFormer, of MiT and of "
            "transformers' MaskFormer would; give a run's checkpoint or a native file, which state "
            "it, or build the network yourself and use load_weights"
        )
    tensors = split(weights, "all")[2]
    config = weights.config if weights.config.get("model_type") == "segformer" else {}
    _check_config(weights.name, config, tensors)
    encoder = {
        "class_path": f"{MixTransformer.__module__}.{MixTransformer.__qualname__}",
        "init_args": _arguments_from_shapes(weights, tensors, config),
    }
    if CLASSIFIER not in tensors:
        return encoder
    return {
        "class_path": f"{SegFormer.__module__}.{SegFormer.__qualname__}",
        "init_args": {
            "encoder": encoder,
            "num_classes": tensors[CLASSIFIER].shape[0],
            "decoder_dim": tensors[CLASSIFIER].shape[1],
            "dropout": (_CONFIG_DEFAULTS | dict(config))["classifier_dropout_prob"],
        },
    }


def _check_config(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Compare the sizes that a config.json states with the shapes of the tensors.

    If they differ, the file belongs to other weights, so its heads and strides would be wrong too.

    Raises:
        UserError: A size differs.
    """
    dims, depths = dims_and_depths(tensors)
    stages = [f"encoder.stages.{s}." for s in range(4)]
    sr_keys = [s + "blocks.0.attn.sr.weight" for s in stages]
    classifier = tensors.get(CLASSIFIER)
    known: dict[str, Any] = {
        "hidden_sizes": dims,
        "depths": depths,
        "sr_ratios": tuple(tensors[sr].shape[-1] if sr in tensors else 1 for sr in sr_keys),
        "patch_sizes": tuple(
            tensors[key].shape[-1]
            for s in stages
            if (key := s + "patch_embed.proj.weight") in tensors
        ),
    }
    if STEM in tensors:
        known["num_channels"] = tensors[STEM].shape[1]
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
                "{} has a config.json that states {} as {}, its tensors as {}; use the config.json "
                "that belongs to these weights".format(name, key, *texts)
            )


def _arguments_from_shapes(
    weights: Weights, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of the MiT that tensors with canonical keys belong to."""
    stated = _CONFIG_DEFAULTS | dict(config)
    dims, depths = dims_and_depths(tensors)
    stages = [f"encoder.stages.{s}." for s in range(4)]
    try:
        patch_sizes = tuple(tensors[s + "patch_embed.proj.weight"].shape[-1] for s in stages)
        hidden = [tensors[s + "blocks.0.mlp.fc1.weight"].shape[0] for s in stages]
        in_channels = tensors[STEM].shape[1]
    except KeyError as error:
        raise UserError(
            f"{weights.name} lacks {error}, so its network cannot be built; give complete weights"
        ) from error
    reductions = [tensors.get(s + "blocks.0.attn.sr.weight", torch.empty(1)) for s in stages]
    mlp_ratios = {width // dim for width, dim in zip(hidden, dims)}

    problem = None
    if not config and ((dims, depths) not in variants() or patch_sizes != (7, 3, 3, 3)):
        problem = (
            "an encoder that is none of MiT-B0 to B5, and tensors show neither its heads nor its "
            "strides"
        )
    elif len(mlp_ratios) > 1:
        problem = f"Mix-FFNs of several widths ({sorted(mlp_ratios)} times C); one is supported"
    elif stated["hidden_act"] != "gelu":
        problem = f"hidden_act {stated['hidden_act']!r} in its config.json, and SegFormer uses GELU"
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
