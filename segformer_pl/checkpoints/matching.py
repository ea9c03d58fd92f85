"""Bring a source's tensors and a model's under the same names.

A state dict with the model's own names fits any network. Foreign layouts are those of published
SegFormers: by way of their *parts* (:mod:`~segformer_pl.checkpoints.layouts`) they fit a network
whose own names are those of our SegFormer or MiT, whatever its class.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from segformer_pl.checkpoints.layouts import NATIVE, Layout, detect, from_parts, to_parts
from segformer_pl.checkpoints.report import Parts, listed
from segformer_pl.checkpoints.sources import Weights
from segformer_pl.errors import UserError

OWN_NAMES = "names of the model"


@dataclass
class Matched:
    """The tensors of a source and those of a model under common names.

    Attributes:
        layout: The source's layout. None: its names are the model's own, nothing is translated.
        kind: What the source is: ``"segmenter"``, ``"encoder"``, ...
        found: The source's tensors.
        wanted: The model's tensors that are to be set.
        dropped: Names in the source that were left out on purpose -> why.
        unknown: Names in the source that nothing is known of.
        native_prefix: Prefix of the encoder's names in the model, if it is translated into.
    """

    layout: Layout | None
    kind: str
    found: dict[str, Tensor]
    wanted: dict[str, Tensor]
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    native_prefix: str = ""

    @property
    def description(self) -> str:
        """The source's layout and kind, for people."""
        return OWN_NAMES if self.layout is None else f"{self.layout.name} {self.kind}"

    def state_dict(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give tensors of :attr:`found` the names that they have in the model."""
        if self.layout is None:
            return dict(tensors)
        return from_parts(NATIVE, self.native_prefix, tensors)[0]


def match(weights: Weights, model: Any, parts: Parts) -> Matched:
    """Match a source with a model.

    Raises:
        UserError: The source's names are neither the model's nor those of a known layout that
            fits it, or the model has no encoder and that alone was asked for.
    """
    prefix = native_prefix(model)
    if prefix is None:
        return _match_own_names(weights, model, parts)
    layout, kind, found, dropped, unknown = split(weights, parts)
    wanted = parts_of(model)
    if parts == "encoder":
        wanted = {name: tensor for name, tensor in wanted.items() if name.startswith("encoder.")}
    return Matched(layout, kind, found, wanted, dropped, unknown, prefix)


def native_prefix(model: Any) -> str | None:
    """Return the prefix of the encoder's names if they are those of our MiT: ``"encoder."`` in a
    segmenter, ``""`` in an encoder. None: the network is another."""
    detected = detect(model.state_dict())
    if detected is None:
        return None
    layout, prefix, wrapper = detected
    return prefix if layout is NATIVE and not wrapper else None


def parts_of(model: Any) -> dict[str, Tensor]:
    """Return the tensors of a network with the names of our SegFormer or MiT, as parts."""
    return to_parts(NATIVE, native_prefix(model) or "", model.state_dict())[0]


def split(
    weights: Weights, parts: Parts
) -> tuple[Layout, str, dict[str, Tensor], dict[str, str], list[str]]:
    """Find the layout of some weights and split them into parts.

    Returns:
        Layout; what they are (segmenter, encoder, ...); parts; what was dropped -> why; unknown
        names.

    Raises:
        UserError: No layout fits, or the head is another network and was asked for.
    """
    detected = detect(weights.tensors)
    if detected is None:
        raise UserError(
            f"{weights.name} is no SegFormer of a layout that is known here: it holds "
            f"{len(weights.tensors)} tensors, such as {listed(list(weights.tensors))}"
        )
    layout, prefix, wrapper = detected
    inside, outside = _unwrapped(weights.tensors, wrapper)
    found, dropped, unknown = to_parts(layout, prefix, inside)

    pattern = layout.other_head
    other_head = [name for name in unknown if pattern and re.fullmatch(pattern, name)]
    if other_head and parts == "all":
        raise UserError(
            f"{weights.name} has {layout.name}'s own head ({listed(other_head)}), a different "
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


def _match_own_names(weights: Weights, model: Any, parts: Parts) -> Matched:
    own = dict(model.state_dict())
    wrapper = _wrapper(weights.tensors, own)
    if wrapper is None:
        raise UserError(
            f"{weights.name} holds no tensor of a {type(model).__name__} ({listed(list(own))}): it "
            f"holds {len(weights.tensors)} tensors, such as {listed(list(weights.tensors))}; give "
            "weights that were trained in this network"
        )
    found, outside = _unwrapped(weights.tensors, wrapper)
    dropped: dict[str, str] = {}
    if parts == "encoder":
        names = _encoder_names(model, own)
        rest = [name for name in found if name in own and name not in names]
        dropped = dict.fromkeys(rest, "only the encoder was asked for")
        found = {name: tensor for name, tensor in found.items() if name not in dropped}
        own = {name: tensor for name, tensor in own.items() if name in names}
    return Matched(None, "segmenter", found, own, dropped, outside)


def _encoder_names(model: Any, own: Iterable[str]) -> set[str]:
    """Return the encoder's parameters, which ``layer_ids()`` names, and the buffers beside them.

    Raises:
        UserError: The network names none.
    """
    layers = model.layer_ids()
    if not layers:
        raise UserError(
            f"a {type(model).__name__} has no encoder that could be loaded alone: its layer_ids() "
            "are empty; load the whole network (model.weights on the command line)"
        )
    modules = {name.rpartition(".")[0] for name in layers}
    parameters = dict(model.named_parameters())
    return {
        name
        for name in own
        if name in layers or (name not in parameters and name.rpartition(".")[0] in modules)
    }


def _wrapper(names: Iterable[str], own: Mapping[str, object]) -> str | None:
    """Return what stands before most of the model's names (``"module."``, ``"network."``, usually
    nothing); None if none of them is there."""
    count: Counter[str] = Counter()
    for name in names:
        steps = name.split(".")
        for number in range(len(steps)):
            if ".".join(steps[number:]) in own:
                count["".join(f"{step}." for step in steps[:number])] += 1
    return min(count, key=lambda wrapper: (-count[wrapper], len(wrapper)), default=None)


def _unwrapped(tensors: Mapping[str, Tensor], wrapper: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors inside a wrapper by their names there, and the names outside of it."""
    inside = {
        name.removeprefix(wrapper): tensor
        for name, tensor in tensors.items()
        if name.startswith(wrapper)
    }
    return inside, [name for name in tensors if not name.startswith(wrapper)]
