"""Load weights of any layout into a network; on an error the network stays unchanged."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import torch
from torch import Tensor

from segformer_pl.checkpoints.backbones import adapt_encoder, innermost
from segformer_pl.checkpoints.classifier import (
    data_of_rows,
    match_classifier,
    reinitialize_classifier,
)
from segformer_pl.checkpoints.facts import MatchClasses, normalization_difference
from segformer_pl.checkpoints.files import describe_non_finite, non_finite, wrong_kind
from segformer_pl.checkpoints.layouts import NATIVE, REFERENCE_EPS, TRANSFORMERS_EPS
from segformer_pl.checkpoints.matching import Matched, match
from segformer_pl.checkpoints.report import LoadReport, Parts, listed
from segformer_pl.checkpoints.sources import Weights, WeightsSource, read_weights
from segformer_pl.errors import UserError, counted
from segformer_pl.models import mit
from segformer_pl.models.mit import MixTransformer
from segformer_pl.models.mit_arguments import default_paddings
from segformer_pl.models.segmenter import Network

STEM = "encoder.stages.0.patch_embed.proj.weight"


def load_weights(
    model: Any,
    source: WeightsSource | Weights,
    *,
    parts: Parts = "all",
    strict: bool = True,
    class_names: Sequence[str] | None = None,
    match_classes: MatchClasses = "exact",
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> LoadReport:
    """Set a network's weights, and the constants that they were trained with.

    A state dict with the model's own keys, alone or after a prefix such as ``network.`` or
    ``module.``, fits any network. Other layouts are detected from their keys and fit a network with
    the keys of our SegFormer or MiT. If anything does not fit, the model is left as it was.

    Three differences are allowed, and reported:

    - Another number of classes: the classifiers are re-initialised, everything else is loaded.
    - Another number of input channels than three, in a SegFormer: the stem's filters are adapted as
      in timm and segmentation_models_pytorch. For one channel, those of R, G and B are summed.
      Otherwise channel c takes the filter of channel c mod 3, and all are scaled by 3 / number of
      channels.
    - With ``parts="encoder"``, what the encoder itself adapts, such as a position table for another
      size of images (:meth:`~segformer_pl.models.segmenter.Encoder.adapt_weights`).

    Args:
        model: A segmenter or an encoder (:mod:`segformer_pl.models.segmenter`).
        source: File, folder, hub name ``owner/name@commit`` or state dict; see
            :func:`~segformer_pl.checkpoints.sources.read_weights`.
        parts: Parts of the model to load. ``"encoder"`` leaves the model's head as it is and drops
            the source's, and so it does with classifiers inside of the encoder.
        strict: Whether a missing or unexpected tensor is an error. If not, it is listed in the
            report. Another shape is always an error.
        class_names: The model's classes, to be compared with those that the source states. None:
            not compared.
        match_classes: Rule by which the source's classes become the model's, see
            :func:`~segformer_pl.checkpoints.facts.rows_of_classifier`. ``"by_name"`` reorders the
            classifiers' rows and re-initialises those of classes that the source lacks.
        normalization: Mean and standard deviation of the model's images, to be compared with those
            that the source states. None: not compared.

    Returns:
        Report on what was loaded, adapted and left out.

    Raises:
        UserError: The source cannot be read, does not fit the model, was trained on other classes
            or with another normalisation, or holds nan or infinity.
    """
    for name, value, known in (
        ("parts", parts, Parts),
        ("match_classes", match_classes, MatchClasses),
    ):
        if value not in get_args(known):
            raise UserError(f"{name}={value!r}: choose one of {', '.join(get_args(known))}")
    if not isinstance(model, Network):
        raise UserError(
            "weights can be loaded into a network that keeps the contract of "
            f"segformer_pl.models.segmenter, and a {type(model).__name__} does not; inherit from "
            "its Segmenter or Encoder"
        )
    weights = source if isinstance(source, Weights) else read_weights(source)
    matched = match(weights, model, parts)
    is_similar = parts == "encoder" and matched.layout is None
    adapted = adapt_encoder(weights, model, matched) if is_similar else None
    report = load_matched(
        model,
        weights,
        matched,
        parts=parts,
        strict=strict,
        class_names=class_names,
        match_classes=match_classes,
        normalization=normalization,
    )
    if adapted is None:
        return report
    return replace(report, resampled=adapted.resampled, initialized=adapted.initialized)


def load_matched(
    model: Any,
    weights: Weights,
    matched: Matched,
    *,
    parts: Parts = "all",
    strict: bool = True,
    class_names: Sequence[str] | None = None,
    match_classes: MatchClasses = "exact",
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> LoadReport:
    """Load weights whose tensors were matched with the model's.

    :mod:`~segformer_pl.checkpoints.transplant` changes tensors in between. The arguments that are
    not listed are those of :func:`load_weights`.

    Args:
        weights: The source.
        matched: Its tensors and the model's under common keys. Changed in place.
    """
    source_tensors, model_tensors = matched.source_tensors, matched.model_tensors
    if matched.layout is not None:
        _check_variant(weights, source_tensors, model_tensors)

    inflated = _adapt_stem(source_tensors, model_tensors)
    free, changed = _compare_arguments(weights, model, matched)
    remarks = [*_compare_images(weights, normalization), *free]
    reinitialized, rows, remark = match_classifier(
        weights, model, source_tensors, model_tensors, class_names, match_classes
    )
    remarks += remark

    missing = [key for key in model_tensors if key not in source_tensors]
    unexpected = [*matched.unknown, *(key for key in source_tensors if key not in model_tensors)]
    if strict:
        _check_complete(weights, parts, matched, missing, unexpected)
    fitting = {key: tensor for key, tensor in source_tensors.items() if key in model_tensors}
    _check_shapes(weights, fitting, model_tensors)
    empty = [key for key, tensor in fitting.items() if tensor.is_meta > model_tensors[key].is_meta]
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
    data = {} if rows is None else data_of_rows(weights, rows, class_names)
    constants, reason = _constants(weights, model, matched)
    model.set_weight_constants(constants)

    # Nothing below this line can fail, so the model is changed as a whole or not at all.
    state = matched.state_dict(fitting)
    # load_state_dict would reset the step count of a BatchNorm whose count is not in the source.
    own = model.state_dict()
    with torch.no_grad():
        for key, tensor in state.items():
            own[key].copy_(tensor)
    if reinitialized:
        reinitialize_classifier(model, reinitialized, rows)
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
        data=data,
    )


def _adapt_stem(
    source_tensors: dict[str, Tensor], model_tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """Adapt the stem's filters from three to the model's channels; return key -> rule."""
    if STEM not in source_tensors or STEM not in model_tensors:
        return {}
    num_channels = model_tensors[STEM].shape[1]
    if source_tensors[STEM].shape[1] != 3 or num_channels == 3:
        return {}
    from timm.models import adapt_input_conv  # slow to import

    source_tensors[STEM] = adapt_input_conv(num_channels, source_tensors[STEM])
    rule = (
        "the sum over R, G and B"
        if num_channels == 1
        else f"channel c from channel c mod 3, times 3/{num_channels}"
    )
    return {STEM: f"from 3 to {num_channels} input channels, {rule}"}


def encoder_arguments(network: Any) -> dict[str, Any]:
    """Return the arguments of a segmenter's encoder, or those of an encoder itself."""
    return innermost({"init_args": network.init_args()})[1]


def free_arguments(network: Any) -> set[str]:
    """Return the arguments that a comparison of networks ignores, by their names.

    They are the number of classes, which follows from the data set, and the
    :attr:`~segformer_pl.models.segmenter.Network.training_arguments` of the network and of those
    inside it.
    """
    networks = [module for module in network.modules() if isinstance(module, Network)]
    return {"num_classes", *(name for one in networks for name in one.training_arguments)}


def flat_arguments(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a specification and of all networks nested in it, in one dict.

    Lists become tuples: files hold lists where networks have tuples.
    """
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
        return ["the source does not state how its images were normalised"]
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
    """Compare the arguments that no tensor's shape shows.

    Another number of heads makes trained weights meaningless. Strides, paddings, ``kv_border`` and
    ``merged_queries`` can be changed on purpose.

    Returns:
        Two lists of sentences for the report: on ``kv_border`` and ``merged_queries``, of which
        trained weights work with any value; and on all other arguments that differ.

    Raises:
        UserError: The number of heads differs.
    """
    if matched.layout is None:
        ours = flat_arguments(model.spec())
        compared_elsewhere = {*free_arguments(model), *model.weight_constants()}
        theirs = flat_arguments(weights.task.get("network", {}))
        theirs = {key: value for key, value in theirs.items() if key not in compared_elsewhere}
    else:
        ours = flat_arguments({"init_args": encoder_arguments(model)})
        theirs = _stated_arguments(weights)
    differing = [key for key in theirs if key in ours and theirs[key] != ours[key]]
    for key in ("num_heads", "decoder_heads"):  # no tensor's shape depends on them
        if key in differing:
            raise UserError(
                f"{weights.name} was trained with {key} {theirs[key]}, and the model has "
                f"{ours[key]}; build the model that the weights are for"
            )
    sentences = {
        key: f"{key} is {ours[key]} here and {theirs[key]} in the source" for key in differing
    }
    free = [sentences.pop(key) for key in ("kv_border", "merged_queries") if key in sentences]
    return free, list(sentences.values())


def _stated_arguments(weights: Weights) -> dict[str, Any]:
    """Return the encoder arguments that a source states, with our defaults for the others.

    Sources of other code bases state the number of heads and the strides at most.
    """
    class_path, arguments = innermost(weights.task.get("network", {}))
    if class_path.startswith("segformer_pl.models."):
        defaults = inspect.signature(MixTransformer).parameters
        known = (
            *("num_heads", "strides", "patch_sizes", "paddings"),
            *("kv_border", "merged_queries"),
        )
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
                f"{stated['strides']}; both have to be lists of integers"
            ) from error
    return stated


def _constants(weights: Weights, model: Any, matched: Matched) -> tuple[dict[str, float], str]:
    """Return the constants to set with the weights, and their origin for the report."""
    layout, ours = matched.layout, model.weight_constants()
    if weights.constants:
        constants, reason = weights.constants, "stated in the source"
    elif layout in (None, NATIVE) and "network" in weights.task:
        arguments = innermost(weights.task["network"])[1]
        defaults = {} if layout is None else REFERENCE_EPS
        constants = {key: arguments[key] for key in ours if key in arguments}
        constants = {**defaults, **constants}
        reason = "the arguments of the run that the source comes from"
    elif layout is None or not layout.constants:
        return {}, "the model's own, the source does not state any"
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
    """Return the published variants: (embed_dims, depths) -> "b0" ... "b5"."""
    with torch.device("meta"):
        encoders = {f"b{n}": getattr(mit, f"mit_b{n}")() for n in range(6)}
    return {
        (encoder.out_channels, tuple(len(stage.blocks) for stage in encoder.stages)): name
        for name, encoder in encoders.items()
    }


def dims_and_depths(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (embed_dims, depths) of the encoder in a dict of tensors with canonical keys."""
    dims, depths = [], []
    for s in range(4):
        stage = f"encoder.stages.{s}."
        dims.append(len(tensors.get(stage + "patch_embed.norm.weight", ())))
        blocks = {key.split(".")[4] for key in tensors if key.startswith(stage + "blocks.")}
        depths.append(len(blocks))
    return tuple(dims), tuple(depths)


def _check_variant(
    weights: Weights, source_tensors: Mapping[str, Tensor], model_tensors: Mapping[str, Tensor]
) -> None:
    theirs, ours = dims_and_depths(source_tensors), dims_and_depths(model_tensors)
    # A zero means that the source has gaps; the check for missing tensors lists them.
    if theirs == ours or 0 in theirs[0] + theirs[1]:
        return
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
    is_encoder = matched.kind != "segmenter"
    if missing and all(key.startswith("head.") for key in missing) and is_encoder:
        raise UserError(
            f"{weights.name} holds an encoder and no decode head; load it with parts='encoder' "
            "(model.encoder_weights on the command line)"
        )
    is_whole = matched.layout is not None and parts == "all"
    if unexpected and is_whole and all(key.startswith("head.") for key in unexpected):
        raise UserError(
            f"{weights.name} holds a whole segmenter and the model is an encoder; load it with "
            "parts='encoder'"
        )
    problems = []
    if missing:
        problems.append(f"lacks {counted(len(missing), 'tensor')} of the model ({listed(missing)})")
    if unexpected:
        problems.append(
            f"holds {counted(len(unexpected), 'tensor')} that the model has no place for "
            f"({listed(unexpected)})"
        )
    if problems:
        raise UserError(
            f"{weights.name} {' and '.join(problems)}; give the weights of this network, or the "
            "arguments that the weights were trained with"
        )


def _check_shapes(
    weights: Weights, source_tensors: Mapping[str, Tensor], model_tensors: Mapping[str, Tensor]
) -> None:
    for key, tensor in source_tensors.items():
        if kind := wrong_kind(tensor, model_tensors[key]):
            raise UserError(
                f"{weights.name} has {key} as {kind}, and the model computes with floating-point "
                "numbers; give weights that are not quantised or converted"
            )
    unfit = [key for key in source_tensors if source_tensors[key].shape != model_tensors[key].shape]
    if not unfit:
        return
    first = unfit[0]
    others = f", and {len(unfit) - 1} more differ" if len(unfit) > 1 else ""
    raise UserError(
        f"{weights.name} has {first} as {_numbers(source_tensors[first].shape, 'x')}, the model as "
        f"{_numbers(model_tensors[first].shape, 'x')}{others}; build the model with the arguments "
        "that the weights were trained with"
    )


def _numbers(values: tuple[int, ...], separator: str = ",") -> str:
    return separator.join(map(str, values)) or "a single number"
