"""Build the network that some weights are for, and say in plain data what a network is.

A *network specification* is what an experiment file says of ``model.network``: a ``class_path`` in
:mod:`segformer_pl.models` and its ``init_args``. A checkpoint of a run states it; otherwise shapes
tell all but the number of heads and the strides, which transformers' ``config.json`` states and
which else are those of the published variants.
"""

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from segformer_pl import models
from segformer_pl.checkpoints.files import WeightsError
from segformer_pl.checkpoints.loading import (
    CLASSIFIER,
    STEM,
    LoadReport,
    dims_and_depths,
    load_weights,
    split,
    variants,
)
from segformer_pl.checkpoints.sources import Source, Weights, read_weights
from segformer_pl.models.mit import MixTransformer
from segformer_pl.models.segformer import SegFormer

_PACKAGE = "segformer_pl.models."

ENCODER_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(MixTransformer).parameters.items()
    if parameter.default is not inspect.Parameter.empty
} | {"paddings": (3, 1, 1, 1)}

# transformers leaves values out of config.json that equal these (SegformerConfig, 5.23).
_CONFIG_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": (1, 2, 5, 8),
    "strides": (4, 2, 2, 2),
    "hidden_act": "gelu",
    "drop_path_rate": 0.1,
    "classifier_dropout_prob": 0.1,
    "reshape_last_stage": True,
}


def load_network(source: Source | Weights) -> tuple[SegFormer | MixTransformer, LoadReport]:
    """Build the network that a source holds the weights of, and set them.

    Returns:
        A SegFormer, or a MixTransformer if the source holds no decode head, in the source's
        dtype; and the report.

    Raises:
        WeightsError: the source cannot be read, or does not say enough to build its network.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    network = cast(SegFormer | MixTransformer, build(network_spec(weights), weights.name))
    network.to(next(t.dtype for t in weights.tensors.values() if t.is_floating_point()))
    return network, load_weights(network, weights)


def build(spec: Mapping[str, Any], name: str) -> nn.Module:
    """Specification -> network. Classes outside :mod:`segformer_pl.models` are refused: a file of
    weights must not choose what code runs."""
    class_path = str(spec.get("class_path"))
    known = class_path.removeprefix(_PACKAGE)
    if not class_path.startswith(_PACKAGE) or known not in models.__all__:
        raise WeightsError(
            f"{name} was trained in a {class_path}, which is not in segformer_pl.models; build "
            "the network yourself and use load_weights"
        )
    arguments = {
        key: build(value, name) if isinstance(value, Mapping) and "class_path" in value else value
        for key, value in spec.get("init_args", {}).items()
    }
    try:
        return getattr(models, known)(**arguments)
    except (TypeError, ValueError) as error:
        raise WeightsError(
            f"{name} describes a network that cannot be built here ({error}); build it yourself "
            "and use load_weights"
        ) from error


def encoder_arguments(encoder: MixTransformer) -> dict[str, Any]:
    """All arguments of :class:`MixTransformer`, read off an encoder."""
    stages: Any = list(encoder.stages)
    first = [stage.blocks[0] for stage in stages]
    convolutions = [stage.patch_embed.proj for stage in stages]
    pos_encoding, image_size = "mix_ffn", None
    if stages[0].pos_embed is not None:
        pos_encoding, stem = "learned", convolutions[0]
        grid = stages[0].pos_embed.shape[-1]  # the smallest picture that gives it
        image_size = (grid - 1) * stem.stride[0] + stem.kernel_size[0] - 2 * stem.padding[0]
    elif isinstance(first[0].mlp.dwconv, nn.Identity):
        pos_encoding = "none"
    return {
        "embed_dims": encoder.out_channels,
        "depths": tuple(len(stage.blocks) for stage in stages),
        "num_heads": tuple(block.attn.num_heads for block in first),
        "mlp_ratio": first[0].mlp.fc1.out_features // first[0].mlp.fc1.in_features,
        "sr_ratios": tuple(block.attn.sr_ratio for block in first),
        "kv_border": first[0].attn.kv_border,
        "patch_sizes": tuple(convolution.kernel_size[0] for convolution in convolutions),
        "strides": tuple(convolution.stride[0] for convolution in convolutions),
        "paddings": tuple(convolution.padding[0] for convolution in convolutions),
        "pos_encoding": pos_encoding,
        "image_size": image_size,
        "in_channels": convolutions[0].in_channels,
        "drop_path_rate": stages[-1].blocks[-1].drop_path.drop_prob,
        "norm_eps": encoder.norm_eps.norm,
        "conv_norm_eps": encoder.norm_eps.conv_norm,
    }


def spec_of(model: SegFormer | MixTransformer) -> dict[str, Any]:
    """Network -> specification, from which :func:`build` makes its like."""
    if isinstance(model, MixTransformer):
        return _spec(encoder_arguments(model), None)
    head = {
        "num_classes": model.head.classifier.out_channels,
        "decoder_dim": model.head.classifier.in_channels,
        "in_indices": model.head.in_indices,
        "dropout": model.head.dropout.p,
    }
    return _spec(encoder_arguments(model.encoder), head)


# They change how a network is trained and not what it computes, or follow from the data set.
_FREE_ARGUMENTS = ("drop_path_rate", "dropout", "num_classes")


def function_arguments(spec: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """What a specified network computes by: its arguments, with defaults and what follows from
    others (``paddings``) filled in; None if it is of classes outside :mod:`segformer_pl.models`.

    Raises:
        WeightsError: there cannot be such a network.
    """
    nested = [value for value in spec.get("init_args", {}).values() if isinstance(value, Mapping)]
    if not all(str(of.get("class_path")).startswith(_PACKAGE) for of in (spec, *nested)):
        return None
    with torch.device("meta"):
        network = build(spec, name)
    if not isinstance(network, SegFormer | MixTransformer):
        return None
    if isinstance(network, MixTransformer):
        arguments = encoder_arguments(network)
    else:
        arguments = encoder_arguments(network.encoder)
        arguments["decoder_dim"] = network.head.classifier.in_channels
        arguments["in_indices"] = tuple(network.head.in_indices)
    return {key: value for key, value in arguments.items() if key not in _FREE_ARGUMENTS}


def network_spec(weights: Weights) -> dict[str, Any]:
    """The specification of the network that the weights are for."""
    if "network" in weights.task:
        return dict(weights.task["network"])
    parts = split(weights, "all")[2]
    config = weights.config if weights.config.get("model_type") == "segformer" else {}
    _check_config(weights.name, config, parts)
    head = None
    if CLASSIFIER[0] in parts:
        head = {
            "num_classes": parts[CLASSIFIER[0]].shape[0],
            "decoder_dim": parts[CLASSIFIER[0]].shape[1],
            "dropout": (_CONFIG_DEFAULTS | dict(config))["classifier_dropout_prob"],
        }
    return _spec(_arguments_from_shapes(weights, parts, config), head)


def _spec(encoder: dict[str, Any], head: dict[str, Any] | None) -> dict[str, Any]:
    """Name the variant if it is one, and leave out what is an encoder's default."""
    variant = variants().get((encoder["embed_dims"], encoder["depths"]))
    arguments = {
        key: value
        for key, value in encoder.items()
        if key not in ENCODER_DEFAULTS or value != ENCODER_DEFAULTS[key]
    }
    if variant is not None:
        del arguments["embed_dims"], arguments["depths"]
        if head is not None:
            return {
                "class_path": f"{_PACKAGE}segformer_{variant}",
                "init_args": head | arguments,
            }
    alone = {
        "class_path": _PACKAGE + (f"mit_{variant}" if variant else "MixTransformer"),
        "init_args": arguments,
    }
    if head is None:
        return alone
    return {"class_path": _PACKAGE + "SegFormer", "init_args": {"encoder": alone, **head}}


def _check_config(name: str, config: Mapping[str, Any], parts: Mapping[str, Tensor]) -> None:
    """What a config.json says of the shapes is what the tensors have: otherwise it belongs to
    other weights, and what only it tells (heads, strides) would be wrong too.

    Raises:
        WeightsError: it is not.
    """
    dims, depths = dims_and_depths(parts)
    stages = [f"encoder.stages.{s}." for s in range(4)]
    sr_names = [s + "blocks.0.attn.sr.weight" for s in stages]
    classifier = parts.get(CLASSIFIER[0])
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
            raise WeightsError(
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
        raise WeightsError(
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
        raise WeightsError(
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
