"""Put weights of any layout into a network of ours, all of them or none."""

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, cast, get_args

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from segformer_pl.checkpoints.facts import (
    MatchClasses,
    normalization_difference,
    rows_of_classifier,
)
from segformer_pl.checkpoints.files import (
    WeightsError,
    describe_non_finite,
    non_finite,
    wrong_kind,
)
from segformer_pl.checkpoints.layouts import (
    NATIVE,
    TRANSFORMERS_EPS,
    Layout,
    detect,
    from_parts,
    to_parts,
)
from segformer_pl.checkpoints.sources import Source, Weights, read_weights
from segformer_pl.models import mit
from segformer_pl.models.mit import MixTransformer, NormEps, default_paddings
from segformer_pl.models.segformer import SegFormer

Parts = Literal["all", "encoder"]

STEM = "encoder.stages.0.patch_embed.proj.weight"
CLASSIFIER = ("head.classifier.weight", "head.classifier.bias")


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_weights` did; ``str()`` of it is for people.

    Attributes:
        source: Where the weights came from.
        layout: Whose names they had, and whether it was a segmenter or an encoder.
        parts: What was to be loaded.
        num_tensors: How many tensors of the model were set.
        norm_eps: The LayerNorm epsilons that the model has now.
        norm_eps_reason: Why these.
        dropped: Names in the source that were left out on purpose -> why.
        reinitialized: Our names that were drawn anew -> why.
        inflated: Our names that were adapted to other input channels -> by which rule.
        missing: Our names that the source does not have; empty if strict.
        unexpected: Names in the source that the model has no place for; empty if strict.
        remarks: What the source states about itself and how it agrees with the run.
        changed: Arguments of the encoder that differ from those of the training, which no tensor
            shows, one sentence each: the network computes something else than it was trained to.
        data: What the source states about the data that its classifier was trained on, for the
            classes that the model has now, in the model's order; empty if the classifier is new.
    """

    source: str
    layout: str
    parts: Parts
    num_tensors: int
    norm_eps: NormEps
    norm_eps_reason: str
    dropped: Mapping[str, str] = field(default_factory=dict)
    reinitialized: Mapping[str, str] = field(default_factory=dict)
    inflated: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        what = "the encoder" if self.parts == "encoder" else "the model"
        lines = [f"{self.num_tensors} tensors of {what} set from {self.source}: {self.layout}"]
        lines.append(
            f"LayerNorm epsilon {self.norm_eps.norm:g} in blocks and stages, "
            f"{self.norm_eps.conv_norm:g} after convolutions: {self.norm_eps_reason}"
        )
        lines += self.remarks
        for title, reasons in (
            ("left out", self.dropped),
            ("drawn anew", self.reinitialized),
            ("adapted", self.inflated),
        ):
            for why in dict.fromkeys(reasons.values()):
                names = [name for name, reason in reasons.items() if reason == why]
                lines.append(f"{title}: {_listed(names)}: {why}")
        if self.missing:
            lines.append(f"NOT in the source, left as they were: {_listed(self.missing)}")
        if self.unexpected:
            lines.append(f"NOT in the model, left out: {_listed(self.unexpected)}")
        return "\n  ".join(lines)


def load_weights(
    model: nn.Module,
    source: Source | Weights,
    *,
    parts: Parts = "all",
    strict: bool = True,
    class_names: Sequence[str] | None = None,
    match_classes: MatchClasses = "exact",
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> LoadReport:
    """Set a model's weights, and the LayerNorm epsilons they were trained with.

    The source's layout is found out from its names. If anything does not fit, the model is left
    as it was. Two differences do fit, and are reported:

    - another number of classes: the classifier is drawn anew, everything else is loaded;
    - an image with other than three channels: the stem's filters are adapted as in timm and
      segmentation_models_pytorch: for one channel those of R, G and B are summed; otherwise new
      channel c takes that of channel c mod 3, and all are scaled by 3 / number of channels.

    Args:
        model: A segmenter with a :class:`MixTransformer` as ``encoder``, or such an encoder.
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
            are drawn anew.
        normalization: Mean and standard deviation that the model's images are normalised with,
            which the source's must be if it states them. None: not compared.

    Raises:
        WeightsError: the source cannot be read, does not fit the model, means other classes or
            other images, or holds nan or infinity.
    """
    for name, value, known in (
        ("parts", parts, Parts),
        ("match_classes", match_classes, MatchClasses),
    ):
        if value not in get_args(known):
            raise WeightsError(f"{name}={value!r}: choose one of {', '.join(get_args(known))}")
    encoder = encoder_of(model)
    weights = source if isinstance(source, Weights) else read_weights(source)
    layout, kind, found, dropped, unknown = split(weights, parts)

    wanted = parts_of(model)
    if parts == "encoder":
        wanted = {name: tensor for name, tensor in wanted.items() if name.startswith("encoder.")}
    _check_variant(weights, found, wanted)

    inflated = {}
    if STEM in found and _shape(found[STEM])[1] == 3 != _shape(wanted[STEM])[1]:
        num_channels = _shape(wanted[STEM])[1]
        found[STEM] = adapt_input_conv(num_channels, found[STEM])
        inflated[STEM] = f"from 3 to {num_channels} input channels, " + (
            "the sum over R, G and B"
            if num_channels == 1
            else f"channel c from channel c mod 3, times 3/{num_channels}"
        )
    border, changed = _compare_arguments(weights, encoder)
    remarks = [*_compare_images(weights, normalization), *border]
    reinitialized, rows, remark = _match_classifier(
        weights, found, wanted, class_names, match_classes
    )
    remarks += remark
    new_classes = [number for number, row in enumerate(rows or []) if row is None]

    missing = [name for name in wanted if name not in found]
    unexpected = [*unknown, *(name for name in found if name not in wanted)]
    if strict:
        _check_complete(weights, parts, kind, found, missing, unexpected)
    fitting = {name: tensor for name, tensor in found.items() if name in wanted}
    _check_shapes(weights, fitting, wanted)
    empty = [name for name, tensor in fitting.items() if tensor.is_meta > wanted[name].is_meta]
    if empty:
        raise WeightsError(
            f"{weights.name} holds {empty[0]} as a tensor that is without values (meta); give the "
            "state dict of a network that has weights"
        )
    if broken := non_finite(fitting):
        raise WeightsError(
            f"{weights.name} holds {describe_non_finite(broken)}; it comes from a training that "
            "diverged, or is damaged: give an earlier checkpoint"
        )

    # From here on nothing can fail.
    prefix = "" if model is encoder else "encoder."
    state, _ = from_parts(NATIVE, prefix, fitting)
    # Not by load_state_dict, which would reset the step count of a BatchNorm that is not named.
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    if reinitialized:
        classifier = cast(SegFormer, model).head.classifier
        fresh = copy.deepcopy(classifier)
        fresh.reset_parameters()
        drawn = new_classes or slice(None)
        with torch.no_grad():
            for name, tensor in classifier.named_parameters():
                tensor[drawn] = fresh.get_parameter(name)[drawn]
    eps, reason = _norm_eps(layout, weights)
    if eps is not None:
        encoder.norm_eps = eps
    return LoadReport(
        source=weights.name,
        layout=f"{layout.name} {kind}",
        parts=parts,
        num_tensors=len(state),
        norm_eps=encoder.norm_eps,
        norm_eps_reason=reason,
        dropped=dropped,
        reinitialized=reinitialized,
        inflated=inflated,
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        remarks=(*remarks, *changed),
        changed=tuple(changed),
        data={} if rows is None else _data_of_rows(weights, rows, class_names),
    )


def encoder_of(model: nn.Module) -> MixTransformer:
    """The MiT encoder of a segmenter, or the encoder itself.

    Raises:
        WeightsError: there is none.
    """
    encoder = model if isinstance(model, MixTransformer) else getattr(model, "encoder", None)
    if not isinstance(encoder, MixTransformer):
        raise WeightsError(
            f"SegFormer weights go into a MixTransformer, and a {type(model).__name__} has none"
        )
    return encoder


def parts_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors as parts."""
    prefix = "" if isinstance(model, MixTransformer) else "encoder."
    return to_parts(NATIVE, prefix, model.state_dict())[0]


def split(
    weights: Weights, parts: Parts
) -> tuple[Layout, str, dict[str, Tensor], dict[str, str], list[str]]:
    """Find the layout of some weights and split them into parts.

    Returns:
        Layout; what they are (segmenter, encoder, ...); parts; what was dropped -> why; unknown
        names.

    Raises:
        WeightsError: no layout fits, or the head is another network and was asked for.
    """
    detected = detect(weights.tensors)
    if detected is None:
        raise WeightsError(
            f"{weights.name} is no SegFormer of a layout that is known here: it holds "
            f"{len(weights.tensors)} tensors, such as {_listed(list(weights.tensors))}"
        )
    layout, prefix, wrapper = detected
    inside = {
        name.removeprefix(wrapper): tensor
        for name, tensor in weights.tensors.items()
        if name.startswith(wrapper)
    }
    outside = [name for name in weights.tensors if not name.startswith(wrapper)]
    found, dropped, unknown = to_parts(layout, prefix, inside)

    pattern = layout.other_head
    other_head = [name for name in unknown if pattern and re.fullmatch(pattern, name)]
    if other_head and parts == "all":
        raise WeightsError(
            f"{weights.name} has {layout.name}'s own head ({_listed(other_head)}), a different "
            "network from SegFormer's (BatchNorm and ReLU on every projection, stages in the other "
            "order), so it cannot be loaded; its backbone can: parts='encoder'"
        )
    if parts == "encoder":
        heads = [name for name in found if not name.startswith("encoder.")]
        for name in heads:
            del found[name]
        dropped |= dict.fromkeys([*heads, *other_head], "only the encoder was asked for")
    unknown = [name for name in unknown if name not in dropped]
    return layout, layout.encoder_prefixes[prefix], found, dropped, outside + unknown


def _match_classifier(
    weights: Weights,
    found: dict[str, Tensor],
    wanted: dict[str, Tensor],
    class_names: Sequence[str] | None,
    how: MatchClasses,
) -> tuple[dict[str, str], list[int | None] | None, list[str]]:
    """Give the source's classifier the model's classes, or leave it out of both.

    Returns:
        Our names that are to be drawn anew -> why; the source's output for each of our classes,
        None for one that is drawn anew, or None if outputs and classes were not compared; lines
        for the report.
    """
    if not all(name in found and name in wanted for name in CLASSIFIER):
        return {}, None, []
    (weight, bias), ours = (found[name] for name in CLASSIFIER), _shape(wanted[CLASSIFIER[1]])[0]
    fits = _shape(weight)[1:] == _shape(wanted[CLASSIFIER[0]])[1:]
    if not fits or bias.ndim != 1 or len(bias) != len(weight):
        return {}, None, []  # left to the check of shapes
    theirs = len(bias)
    if theirs != ours and (class_names is None or how == "exact"):
        for name in CLASSIFIER:
            del found[name], wanted[name]
        reason = f"{theirs} classes in the source, {ours} in the model"
        return dict.fromkeys(CLASSIFIER, reason), None, []
    if class_names is None:
        return {}, None, []
    if len(class_names) != ours:
        raise WeightsError(
            f"the model has {ours} classes, but there are {len(class_names)} class names; give one "
            "for each"
        )
    rows, remark = rows_of_classifier(
        weights.name, weights.task.get("class_names"), theirs, class_names, how
    )
    index = torch.tensor([row or 0 for row in rows])
    found |= {name: found[name][index] for name in CLASSIFIER}
    new = [number for number, row in enumerate(rows) if row is None]
    if not new:
        return {}, rows, [remark]
    names = [class_names[number] for number in new]
    reason = f"the rows of {len(new)} classes that the source does not have: {_listed(names, 12)}"
    return dict.fromkeys(CLASSIFIER, reason), rows, [remark]


def _data_of_rows(
    weights: Weights, rows: Sequence[int | None], class_names: Sequence[str] | None
) -> dict[str, Any]:
    """What the source states about its data, the raw values of its classes in our order."""
    labels = weights.data.get("labels")
    if labels is None:
        return {}
    try:
        raw = [[] if row is None else labels["raw"][row] for row in rows]
    except (KeyError, TypeError, IndexError) as error:
        raise WeightsError(
            f"{weights.name} does not describe its labels as this version does; give another"
        ) from error
    return dict(weights.data) | {"labels": {**labels, "names": list(class_names or ()), "raw": raw}}


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
        raise WeightsError(f"{weights.name}: {difference}")
    return ["normalisation: as in the source"]


def _compare_arguments(weights: Weights, encoder: MixTransformer) -> tuple[list[str], list[str]]:
    """What no shape tells: another number of heads makes nonsense of the weights; strides,
    paddings and padded keys can be changed on purpose.

    Returns:
        Sentences on the keys at the border, which trained weights can be used with either way; and
        on all others that differ.
    """
    stages: Any = list(encoder.stages)
    ours = {
        "num_heads": tuple(stage.blocks[0].attn.num_heads for stage in stages),
        "strides": tuple(stage.patch_embed.proj.stride[0] for stage in stages),
        "paddings": tuple(stage.patch_embed.proj.padding[0] for stage in stages),
        "kv_border": stages[0].blocks[0].attn.kv_border,
    }
    theirs = _stated_arguments(weights)
    differing = [key for key in ours if key in theirs and theirs[key] != ours[key]]
    if "num_heads" in differing:
        raise WeightsError(
            f"{weights.name} was trained with num_heads {theirs['num_heads']}, and the model has "
            f"{ours['num_heads']}; build the model that the weights are for"
        )
    told = {key: f"{key} is {ours[key]} here and {theirs[key]} in the source" for key in differing}
    border = [told.pop("kv_border")] if "kv_border" in told else []
    return border, list(told.values())


def _stated_arguments(weights: Weights) -> dict[str, Any]:
    """Encoder arguments that the source states, those left at their defaults included."""
    spec = weights.task.get("network", {})
    arguments = spec.get("init_args", {})
    if isinstance(arguments.get("encoder"), Mapping):
        spec = arguments["encoder"]
        arguments = spec.get("init_args", {})
    if str(spec.get("class_path")).startswith("segformer_pl.models."):
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
            raise WeightsError(
                f"{weights.name} describes a network with patch_sizes {sizes} and strides "
                f"{stated['strides']}; both have to be lists of whole numbers"
            ) from error
    return stated


def _norm_eps(layout: Layout, weights: Weights) -> tuple[NormEps | None, str]:
    if weights.norm_eps is not None:
        return NormEps(*weights.norm_eps), "stated in the source"
    if layout is NATIVE and "network" in weights.task:
        arguments = weights.task["network"].get("init_args", {})
        arguments = arguments.get("encoder", {}).get("init_args", arguments)
        eps = NormEps()
        stated = arguments.get("norm_eps", eps.norm), arguments.get("conv_norm_eps", eps.conv_norm)
        return NormEps(*stated), "the arguments of the run that the source is of"
    if layout.norm_eps == TRANSFORMERS_EPS:
        return layout.norm_eps, (
            "what transformers computes with, whatever its configuration says; weights converted "
            "from NVIDIA's were trained with 1e-06 in blocks and stages (logits differ by 1e-6 "
            "of their size)"
        )
    if layout.norm_eps is not None:
        return layout.norm_eps, f"what {layout.name} trains with"
    return None, "the model's own, the source does not say"


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
    raise WeightsError(
        f"{weights.name} holds {described[0]}, but the model is {described[1]}; "
        "build the model that the weights are for"
    )


def _check_complete(
    weights: Weights,
    parts: Parts,
    kind: str,
    found: Mapping,
    missing: list[str],
    unexpected: list[str],
) -> None:
    if missing and all(name.startswith("head.") for name in missing) and kind != "segmenter":
        raise WeightsError(
            f"{weights.name} holds an encoder and no decode head; load it with parts='encoder' "
            "(model.encoder_weights on the command line)"
        )
    if unexpected and parts == "all" and all(name.startswith("head.") for name in unexpected):
        raise WeightsError(
            f"{weights.name} holds a whole segmenter and the model is an encoder; load it with "
            "parts='encoder'"
        )
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} tensors of the model ({_listed(missing)})")
    if unexpected:
        problems.append(
            f"holds {len(unexpected)} tensors that the model has no place for "
            f"({_listed(unexpected)})"
        )
    if problems:
        raise WeightsError(
            f"{weights.name} {' and '.join(problems)}; give the weights of this network, or the "
            "arguments that the weights were trained with"
        )


def _check_shapes(weights: Weights, found: Mapping, wanted: Mapping) -> None:
    for name, tensor in found.items():
        if kind := wrong_kind(tensor, wanted[name]):
            raise WeightsError(
                f"{weights.name} has {name} as {kind}, and the model computes with floating-point "
                "numbers; give weights that are not quantised or converted"
            )
    unfit = [name for name in found if _shape(found[name]) != _shape(wanted[name])]
    if not unfit:
        return
    first = unfit[0]
    others = f", and {len(unfit) - 1} more differ" if len(unfit) > 1 else ""
    raise WeightsError(
        f"{weights.name} has {first} as {_numbers(_shape(found[first]), 'x')}, the model as "
        f"{_numbers(_shape(wanted[first]), 'x')}{others}; build the model with the arguments that "
        "the weights were trained with"
    )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _numbers(values: tuple[int, ...], separator: str = ",") -> str:
    return separator.join(map(str, values)) or "a single number"


def _listed(names: list[str] | tuple[str, ...], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
