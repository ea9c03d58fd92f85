"""Put weights of any layout into a network, all of them or none."""

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, get_args

import torch
from timm.models import adapt_input_conv
from torch import Tensor

from segformer_pl.checkpoints.classifier import (
    classifier_names,
    data_of_rows,
    match_classifier,
    reinitialize_classifier,
)
from segformer_pl.checkpoints.facts import MatchClasses, normalization_difference
from segformer_pl.checkpoints.files import describe_non_finite, non_finite, wrong_kind
from segformer_pl.checkpoints.layouts import NATIVE, REFERENCE_EPS, TRANSFORMERS_EPS
from segformer_pl.checkpoints.matching import Matched, match
from segformer_pl.checkpoints.report import LoadReport, Parts, listed
from segformer_pl.checkpoints.sources import Source, Weights, read_weights
from segformer_pl.errors import UserError
from segformer_pl.models import mit
from segformer_pl.models.mit import MixTransformer, default_paddings

STEM = "encoder.stages.0.patch_embed.proj.weight"


def load_weights(
    model: Any,
    source: Source | Weights,
    *,
    parts: Parts = "all",
    strict: bool = True,
    class_names: Sequence[str] | None = None,
    match_classes: MatchClasses = "exact",
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> LoadReport:
    """Set a network's weights, and the constants that they were trained with.

    A state dict with the model's own names, alone or after a prefix such as ``network.`` or
    ``module.``, fits any network. Weights of other layouts, which are detected from their names,
    fit a network with the names of our SegFormer or MiT. If anything does not fit, the model is
    left as it was. Two differences do fit, and are reported:

    - another number of classes: the classifier is initialised again, everything else is loaded;
    - a SegFormer for images with other than three channels: the stem's filters are adapted as in
      timm and segmentation_models_pytorch: for one channel those of R, G and B are summed;
      otherwise new channel c takes that of channel c mod 3, and all are scaled by 3 / number of
      channels.

    Args:
        model: A segmenter or an encoder (:mod:`segformer_pl.models.segmenter`).
        source: File, folder, hub name ``owner/name@commit`` or state dict; see
            :func:`~segformer_pl.checkpoints.sources.read_weights`.
        parts: ``"encoder"`` sets the encoder alone and drops the source's head.
        strict: Whether a tensor that is missing or left over is an error; otherwise it is named
            in the report. Another shape is always an error.
        class_names: The model's classes, which the source's must be if it names them and has as
            many. None: not compared.
        match_classes: How the source's classes become these: see
            :func:`~segformer_pl.checkpoints.facts.rows_of_classifier`. By name the
            classifier's outputs are reordered, and those of classes that the source does not have
            are initialised again.
        normalization: Mean and standard deviation that the model's images are normalised with,
            which the source's must be if it states them. None: not compared.

    Raises:
        UserError: The source cannot be read, does not fit the model, means other classes or
            other images, or holds nan or infinity.
    """
    for name, value, known in (
        ("parts", parts, Parts),
        ("match_classes", match_classes, MatchClasses),
    ):
        if value not in get_args(known):
            raise UserError(f"{name}={value!r}: choose one of {', '.join(get_args(known))}")
    if not hasattr(model, "weight_constants"):
        raise UserError(
            "weights go into a network that keeps the contract of segformer_pl.models.segmenter, "
            f"and a {type(model).__name__} does not; inherit from its Segmenter or Encoder"
        )
    weights = source if isinstance(source, Weights) else read_weights(source)
    matched = match(weights, model, parts)
    found, wanted = matched.found, matched.wanted
    if matched.layout is not None:
        _check_variant(weights, found, wanted)

    inflated = {}
    if STEM in found and STEM in wanted and found[STEM].shape[1] == 3 != wanted[STEM].shape[1]:
        num_channels = wanted[STEM].shape[1]
        found[STEM] = adapt_input_conv(num_channels, found[STEM])
        inflated[STEM] = f"from 3 to {num_channels} input channels, " + (
            "the sum over R, G and B"
            if num_channels == 1
            else f"channel c from channel c mod 3, times 3/{num_channels}"
        )
    border, changed = _compare_arguments(weights, model, matched)
    remarks = [*_compare_images(weights, normalization), *border]
    reinitialized, rows, remark = match_classifier(
        weights, classifier_names(model), found, wanted, class_names, match_classes
    )
    remarks += remark

    missing = [name for name in wanted if name not in found]
    unexpected = [*matched.unknown, *(name for name in found if name not in wanted)]
    if strict:
        _check_complete(weights, parts, matched, missing, unexpected)
    fitting = {name: tensor for name, tensor in found.items() if name in wanted}
    _check_shapes(weights, fitting, wanted)
    empty = [name for name, tensor in fitting.items() if tensor.is_meta > wanted[name].is_meta]
    if empty:
        raise UserError(
            f"{weights.name} holds {empty[0]} as a tensor that is without values (meta); give the "
            "state dict of a network that has weights"
        )
    if broken := non_finite(fitting):
        raise UserError(
            f"{weights.name} holds {describe_non_finite(broken)}; it comes from a training that "
            "diverged, or is damaged: give an earlier checkpoint"
        )
    constants, reason = _constants(weights, model, matched)
    model.set_weight_constants(constants)

    # From here on nothing can fail.
    state = matched.state_dict(fitting)
    # Not by load_state_dict, which would reset the step count of a BatchNorm that is not named.
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    if reinitialized:
        reinitialize_classifier(model, rows)
    return LoadReport(
        source=weights.name,
        layout=matched.description,
        parts=parts,
        num_tensors=len(state),
        constants=model.weight_constants(),
        constants_reason=reason,
        dropped=matched.dropped,
        reinitialized=reinitialized,
        inflated=inflated,
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        remarks=(*remarks, *changed),
        changed=tuple(changed),
        data={} if rows is None else data_of_rows(weights, rows, class_names),
    )


def encoder_arguments(network: Any) -> dict[str, Any]:
    """Return the arguments of a segmenter's encoder, or those of an encoder itself."""
    return _innermost({"init_args": network.init_args()})[1]


def _innermost(spec: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return class path and arguments of the encoder in a specification, or of the network."""
    arguments = spec.get("init_args", {})
    if isinstance(arguments.get("encoder"), Mapping):
        return _innermost(arguments["encoder"])
    return str(spec.get("class_path")), dict(arguments)


# They change how a network is trained and not what it computes, or follow from the data set.
FREE_ARGUMENTS = ("drop_path_rate", "dropout", "num_classes")


def flat_arguments(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments in a specification, those of nested networks among them; lists, which
    files hold, as tuples."""
    arguments: dict[str, Any] = {}
    for key, value in spec.get("init_args", {}).items():
        if isinstance(value, Mapping) and "class_path" in value:
            arguments |= flat_arguments(value)
        else:
            arguments[key] = tuple(value) if isinstance(value, list) else value
    return arguments


def _compare_images(
    weights: Weights, normalization: tuple[Sequence[float], Sequence[float]] | None
) -> list[str]:
    if normalization is None:
        return []
    stated = [weights.task[key] for key in ("image_mean", "image_std") if key in weights.task]
    if not stated:
        return ["the source does not say how its images were normalised"]
    if any(len(values) != len(normalization[0]) for values in stated):
        return [
            f"normalisation not compared: for {len(stated[0])} channels in the source, for "
            f"{len(normalization[0])} here"
        ]
    if difference := normalization_difference(weights.task, *normalization):
        raise UserError(f"{weights.name}: {difference}")
    return ["normalisation: as in the source"]


def _compare_arguments(
    weights: Weights, model: Any, matched: Matched
) -> tuple[list[str], list[str]]:
    """Compare the arguments that no shape tells: another number of heads makes nonsense of the
    weights; strides, paddings and padded keys can be changed on purpose.

    Returns:
        Sentences on the keys at the border, which trained weights can be used with either way; and
        on all others that differ.
    """
    if matched.layout is None:
        ours = flat_arguments(model.spec())
        told_elsewhere = {*FREE_ARGUMENTS, *model.weight_constants()}
        theirs = flat_arguments(weights.task.get("network", {}))
        theirs = {key: value for key, value in theirs.items() if key not in told_elsewhere}
    else:
        ours = flat_arguments({"init_args": encoder_arguments(model)})
        theirs = _stated_arguments(weights)
    differing = [key for key in theirs if key in ours and theirs[key] != ours[key]]
    if "num_heads" in differing:
        raise UserError(
            f"{weights.name} was trained with num_heads {theirs['num_heads']}, and the model has "
            f"{ours['num_heads']}; build the model that the weights are for"
        )
    told = {key: f"{key} is {ours[key]} here and {theirs[key]} in the source" for key in differing}
    border = [told.pop("kv_border")] if "kv_border" in told else []
    return border, list(told.values())


def _stated_arguments(weights: Weights) -> dict[str, Any]:
    """Return the encoder arguments that a source of our SegFormer states, defaults included."""
    class_path, arguments = _innermost(weights.task.get("network", {}))
    if class_path.startswith("segformer_pl.models."):
        defaults = inspect.signature(MixTransformer).parameters
        known = ("num_heads", "strides", "patch_sizes", "paddings", "kv_border")
        stated = {key: arguments.get(key, defaults[key].default) for key in known}
    else:
        names = {"num_attention_heads": "num_heads", "strides": "strides"}
        stated = {ours: weights.config[key] for key, ours in names.items() if key in weights.config}
    stated = {key: tuple(v) if isinstance(v, list) else v for key, v in stated.items()}
    sizes = stated.pop("patch_sizes", None)
    if sizes is not None and stated["paddings"] is None:
        try:
            stated["paddings"] = default_paddings(sizes, stated["strides"])
        except TypeError as error:
            raise UserError(
                f"{weights.name} describes a network with patch_sizes {sizes} and strides "
                f"{stated['strides']}; both have to be lists of whole numbers"
            ) from error
    return stated


def _constants(weights: Weights, model: Any, matched: Matched) -> tuple[dict[str, float], str]:
    """Return the constants that the weights were trained with, and why these."""
    layout, ours = matched.layout, model.weight_constants()
    if weights.constants:
        constants, reason = weights.constants, "stated in the source"
    elif layout in (None, NATIVE) and "network" in weights.task:
        arguments = _innermost(weights.task["network"])[1]
        defaults = {} if layout is None else REFERENCE_EPS
        constants = {key: arguments[key] for key in ours if key in arguments}
        constants = {**defaults, **constants}
        reason = "the arguments of the run that the source is of"
    elif layout is None or not layout.constants:
        return {}, "the model's own, the source does not say"
    elif layout.constants == TRANSFORMERS_EPS:
        constants = layout.constants
        reason = (
            "what transformers computes with, whatever its configuration says; weights converted "
            "from NVIDIA's were trained with 1e-06 in blocks and stages (logits differ by 1e-6 of "
            "their size)"
        )
    else:
        constants, reason = layout.constants, f"what {layout.name} trains with"
    if unknown := [key for key in constants if key not in ours]:
        raise UserError(
            f"{weights.name} was trained with {unknown[0]} {constants[unknown[0]]:g}, and a "
            f"{type(model).__name__} has no such constant; return it from weight_constants()"
        )
    return dict(constants), reason


@cache
def variants() -> dict[tuple[tuple[int, ...], tuple[int, ...]], str]:
    """(embed_dims, depths) -> "b0" ... "b5"."""
    with torch.device("meta"):
        encoders = {f"b{n}": getattr(mit, f"mit_b{n}")() for n in range(6)}
    return {
        (encoder.out_channels, tuple(len(stage.blocks) for stage in encoder.stages)): name
        for name, encoder in encoders.items()
    }


def dims_and_depths(parts: Mapping[str, Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(embed_dims, depths) of the encoder that these parts make up."""
    dims, depths = [], []
    for s in range(4):
        stage = f"encoder.stages.{s}."
        dims.append(len(parts.get(stage + "patch_embed.norm.weight", ())))
        blocks = {name.split(".")[4] for name in parts if name.startswith(stage + "blocks.")}
        depths.append(len(blocks))
    return tuple(dims), tuple(depths)


def _check_variant(weights: Weights, found: Mapping, wanted: Mapping) -> None:
    theirs, ours = dims_and_depths(found), dims_and_depths(wanted)
    if theirs == ours or 0 in theirs[0] + theirs[1]:
        return  # the latter is a file with gaps, whose missing tensors are named
    described = [
        (f"MiT-{variants()[both].upper()}" if both in variants() else "an encoder")
        + f" (embed_dims {_numbers(both[0])}; depths {_numbers(both[1])})"
        for both in (theirs, ours)
    ]
    raise UserError(
        f"{weights.name} holds {described[0]}, but the model is {described[1]}; "
        "build the model that the weights are for"
    )


def _check_complete(
    weights: Weights,
    parts: Parts,
    matched: Matched,
    missing: list[str],
    unexpected: list[str],
) -> None:
    is_alone = matched.kind != "segmenter"
    if missing and all(name.startswith("head.") for name in missing) and is_alone:
        raise UserError(
            f"{weights.name} holds an encoder and no decode head; load it with parts='encoder' "
            "(model.encoder_weights on the command line)"
        )
    is_whole = matched.layout is not None and parts == "all"
    if unexpected and is_whole and all(name.startswith("head.") for name in unexpected):
        raise UserError(
            f"{weights.name} holds a whole segmenter and the model is an encoder; load it with "
            "parts='encoder'"
        )
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} tensors of the model ({listed(missing)})")
    if unexpected:
        problems.append(
            f"holds {len(unexpected)} tensors that the model has no place for "
            f"({listed(unexpected)})"
        )
    if problems:
        raise UserError(
            f"{weights.name} {' and '.join(problems)}; give the weights of this network, or the "
            "arguments that the weights were trained with"
        )


def _check_shapes(weights: Weights, found: Mapping, wanted: Mapping) -> None:
    for name, tensor in found.items():
        if kind := wrong_kind(tensor, wanted[name]):
            raise UserError(
                f"{weights.name} has {name} as {kind}, and the model computes with floating-point "
                "numbers; give weights that are not quantised or converted"
            )
    unfit = [name for name in found if found[name].shape != wanted[name].shape]
    if not unfit:
        return
    first = unfit[0]
    others = f", and {len(unfit) - 1} more differ" if len(unfit) > 1 else ""
    raise UserError(
        f"{weights.name} has {first} as {_numbers(found[first].shape, 'x')}, the model as "
        f"{_numbers(wanted[first].shape, 'x')}{others}; build the model with the arguments that "
        "the weights were trained with"
    )


def _numbers(values: tuple[int, ...], separator: str = ",") -> str:
    return separator.join(map(str, values)) or "a single number"
