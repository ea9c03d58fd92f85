"""Put weights of any layout into a network of ours, all of them or none."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, cast, get_args

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from segformer_pl.models import mit
from segformer_pl.models.checkpoints.layouts import (
    NATIVE,
    TRANSFORMERS_EPS,
    Layout,
    detect,
    from_parts,
    to_parts,
)
from segformer_pl.models.checkpoints.sources import Source, Weights, WeightsError, read_weights
from segformer_pl.models.mit import MixTransformer, NormEps
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

    def __str__(self) -> str:
        what = "the encoder" if self.parts == "encoder" else "the model"
        lines = [f"{self.num_tensors} tensors of {what} set from {self.source}: {self.layout}"]
        lines.append(
            f"LayerNorm epsilon {self.norm_eps.norm:g} in blocks and stages, "
            f"{self.norm_eps.conv_norm:g} after convolutions: {self.norm_eps_reason}"
        )
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
    model: nn.Module, source: Source | Weights, *, parts: Parts = "all", strict: bool = True
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
            :func:`~segformer_pl.models.checkpoints.sources.read_weights`.
        parts: ``"encoder"`` sets the encoder alone and drops the source's head.
        strict: Whether a tensor that is missing or left over is an error; otherwise it is named
            in the report. Another shape is always an error.

    Raises:
        WeightsError: the source cannot be read or does not fit the model.
    """
    if parts not in get_args(Parts):
        raise WeightsError(f"parts={parts!r}: choose one of {', '.join(get_args(Parts))}")
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
    reinitialized = {}
    if all(name in found and name in wanted for name in CLASSIFIER):
        theirs, ours = (_shape(tensors[CLASSIFIER[1]])[0] for tensors in (found, wanted))
        if theirs != ours and _shape(found[CLASSIFIER[0]])[1:] == _shape(wanted[CLASSIFIER[0]])[1:]:
            reason = f"{theirs} classes in the source, {ours} in the model"
            reinitialized = dict.fromkeys(CLASSIFIER, reason)
            for name in CLASSIFIER:
                del found[name], wanted[name]

    missing = [name for name in wanted if name not in found]
    unexpected = [*unknown, *(name for name in found if name not in wanted)]
    if strict:
        _check_complete(weights, parts, kind, found, missing, unexpected)
    fitting = {name: tensor for name, tensor in found.items() if name in wanted}
    _check_shapes(weights, fitting, wanted)
    broken = [
        name
        for name, tensor in fitting.items()
        if not tensor.is_meta and not torch.isfinite(tensor).all()
    ]
    if broken:
        raise WeightsError(
            f"{weights.name} holds nan or infinity in {len(broken)} tensors (the first is "
            f"{broken[0]}); it comes from a training that diverged: give an earlier checkpoint"
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
        cast(SegFormer, model).head.classifier.reset_parameters()
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
