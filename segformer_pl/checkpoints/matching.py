"""Bring the tensors of a source and of a model to common keys.

::

    source: a state dict                                model: a network
      |                                                   |
      |  its keys are the model's, perhaps                |  another network:
      |  after a prefix such as "module."                 |  its own keys
      |                                                   |
      |  another layout of SegFormer:                     |  our SegFormer or MiT:
      |  canonical keys (layouts.py)                      |  canonical keys
      v                                                   v
    Matched.source_tensors  <---- the same keys ---->   Matched.model_tensors

A state dict with the model's own keys fits any network. A layout of a published SegFormer fits any
network whose keys are those of our SegFormer or MiT, whatever its class.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from segformer_pl.checkpoints.classifier import classifier_keys
from segformer_pl.checkpoints.layouts import (
    NATIVE,
    Layout,
    detect,
    from_canonical,
    to_canonical,
)
from segformer_pl.checkpoints.maskformer_layout import (
    check_heads,
    is_transformers_maskformer,
    own_keys,
)
from segformer_pl.checkpoints.report import Parts, listed
from segformer_pl.checkpoints.sources import Weights
from segformer_pl.errors import UserError, counted
from segformer_pl.models.segmenter import Encoder

OWN_KEYS = "keys of the model"

_LOSS = re.compile(r"(.+\.)?(criterion|loss|loss_fn)\..+")  # what code bases name a training loss


@dataclass
class Matched:
    """The tensors of a source and of a model under common keys.

    Attributes:
        layout: Layout of the source. None: its keys are the model's own, and none is translated.
        kind: What the source holds: ``"segmenter"``, ``"encoder"`` or ``"backbone"``.
        source_tensors: Tensors of the source.
        model_tensors: Tensors of the model that are to be set.
        dropped: Keys of the source that are left out on purpose -> reason.
        unknown: Keys of the source that belong to no known tensor.
        native_prefix: Prefix of the encoder's keys in the model, if keys are translated.
    """

    layout: Layout | None
    kind: str
    source_tensors: dict[str, Tensor]
    model_tensors: dict[str, Tensor]
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    native_prefix: str = ""

    @property
    def description(self) -> str:
        """Layout and kind of the source, for the report."""
        return OWN_KEYS if self.layout is None else f"{self.layout.name} {self.kind}"

    def state_dict(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate some of :attr:`source_tensors` to the keys of the model."""
        if self.layout is None:
            return dict(tensors)
        return from_canonical(NATIVE, self.native_prefix, tensors)[0]


def match(weights: Weights, model: Any, parts: Parts) -> Matched:
    """Match the tensors of a source with those of a model.

    Raises:
        UserError: The source's keys are neither the model's nor those of a known layout that fits
            it, or ``parts`` is ``"encoder"`` and the model has none.
    """
    prefix = native_prefix(model)
    if prefix is None:
        matched = _match_own_keys(weights, model, parts)
    else:
        layout, kind, source_tensors, dropped, unknown = split(weights, parts)
        model_tensors = canonical_tensors(model)
        if parts == "encoder":
            model_tensors = {k: v for k, v in model_tensors.items() if k.startswith("encoder.")}
        matched = Matched(layout, kind, source_tensors, model_tensors, dropped, unknown, prefix)
    _leave_out_loss(matched)
    return matched


def _leave_out_loss(matched: Matched) -> None:
    """Drop what a registered training loss stores, such as its class weights."""
    surplus = [key for key in matched.source_tensors if key not in matched.model_tensors]
    for key in filter(_LOSS.fullmatch, [*matched.unknown, *surplus]):
        matched.dropped[key] = "part of the training loss"
        matched.source_tensors.pop(key, None)
    matched.unknown = [key for key in matched.unknown if key not in matched.dropped]


def native_prefix(model: Any) -> str | None:
    """Return the prefix of the encoder's keys in a network with the keys of our SegFormer or MiT.

    It is ``"encoder."`` in a segmenter, ``""`` in an encoder, and None in any other network.
    """
    detected = detect(model.state_dict())
    if detected is None:
        return None
    layout, prefix, wrapper = detected
    return prefix if layout is NATIVE and not wrapper else None


def canonical_tensors(model: Any) -> dict[str, Tensor]:
    """Return the tensors of a SegFormer or MiT under their canonical keys."""
    return to_canonical(NATIVE, native_prefix(model) or "", model.state_dict())[0]


def split(
    weights: Weights, parts: Parts
) -> tuple[Layout, str, dict[str, Tensor], dict[str, str], list[str]]:
    """Detect the layout of some weights and translate them to canonical keys.

    Returns:
        Layout; what the weights hold (segmenter, encoder, backbone); tensors by canonical key;
        dropped keys -> reason; unknown keys.

    Raises:
        UserError: No layout fits, or ``parts`` is ``"all"`` and the head is another network.
    """
    detected = detect(weights.tensors)
    if detected is None:
        raise UserError(
            f"{weights.name} is no SegFormer of a known layout: it holds {len(weights.tensors)} "
            f"tensors, such as {listed(list(weights.tensors))}; give SegFormer's weights, "
            "or build the network that these belong to"
        )
    layout, prefix, wrapper = detected
    inside, outside = _unwrapped(weights.tensors, wrapper)
    tensors, dropped, unknown = to_canonical(layout, prefix, inside)

    pattern = layout.other_head
    other_head = [key for key in unknown if pattern and re.fullmatch(pattern, key)]
    if other_head and parts == "all":
        raise UserError(
            f"{weights.name} has its own head ({listed(other_head)}), a different network from "
            "SegFormer's, so it cannot be loaded; its backbone can: parts='encoder' "
            "(model.encoder_weights on the command line)"
        )
    if parts == "encoder":
        head = [key for key in tensors if not key.startswith("encoder.")]
        for key in head:
            del tensors[key]
        dropped |= dict.fromkeys([*head, *other_head], "only the encoder was asked for")
    unknown = [key for key in unknown if key not in dropped]
    return layout, layout.encoder_prefixes[prefix], tensors, dropped, outside + unknown


def _match_own_keys(weights: Weights, model: Any, parts: Parts) -> Matched:
    own = dict(model.state_dict())
    dropped, unknown = dict[str, str](), list[str]()
    if is_transformers_maskformer(weights.tensors):
        check_heads(weights.name, weights.config, model)
        tensors, dropped, unknown = own_keys(weights.tensors)
        weights = replace(weights, tensors=tensors)
    matched = (
        _match_encoder(weights, model, own)
        if parts == "encoder"
        else _match_all(weights, model, own)
    )
    matched.dropped |= dropped
    matched.unknown += unknown
    return matched


def _match_all(weights: Weights, model: Any, own: dict[str, Tensor]) -> Matched:
    wrapper = _wrapper(weights.tensors, own)
    if wrapper is None:
        raise _no_tensor(weights, model, own)
    tensors, outside = _unwrapped(weights.tensors, wrapper)
    dropped = _auxiliary_keys(tensors, model)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in dropped}
    return Matched(None, "segmenter", tensors, own, dropped, outside)


def leave_out_auxiliary(state: dict[str, Tensor], model: Any, prefix: str) -> str | None:
    """Delete the tensors of auxiliary heads from a state dict if the network has none.

    Args:
        state: State dict, changed in place.
        model: The network.
        prefix: Prefix of the network's keys in the state dict.

    Returns:
        What was deleted and why; None if nothing was.
    """
    left_out = _auxiliary_keys(state, model, prefix)
    for key in left_out:
        del state[key]
    if not left_out:
        return None
    return (
        f"{len(left_out)} tensors are left out ({listed(list(left_out))}): {min(left_out.values())}"
    )


def _auxiliary_keys(keys: Iterable[str], model: Any, prefix: str = "") -> dict[str, str]:
    """Return the keys of submodules that only a training loss uses and that a network lacks.

    Each comes with the reason why it can be left out.
    """
    own = model.state_dict()
    lacking = tuple(
        f"{prefix}{path}."
        for path in getattr(model, "auxiliary_paths", ())
        if not any(key.startswith(f"{path}.") for key in own)
    )
    reason = "only the training loss uses it, and the network was built without it"
    return {key: reason for key in keys if key.startswith(lacking)}


def _match_encoder(weights: Weights, model: Any, own: dict[str, Tensor]) -> Matched:
    """Match the encoder alone, with that of any segmenter or with a file of a backbone alone.

    Both may hold other modules, such as another head or a classification layer. Those are left out
    if the encoder has no module of their name::

        model           encoder.backbone.conv1.weight
        a segmenter     encoder.backbone.conv1.weight   head.bn.weight: left out
        an encoder      backbone.conv1.weight
        a backbone      conv1.weight                    fc.weight: left out

    All keys of the last two may come after a prefix such as ``module.``.
    """
    names = _encoder_keys(model, own)
    encoder = {key: tensor for key, tensor in own.items() if key in names}
    wrapper, prefix = _wrapper(weights.tensors, encoder), ""
    if wrapper is not None:
        tensors, outside = _unwrapped(weights.tensors, wrapper)
    else:
        inside, _ = _unwrapped(weights.tensors, _shared_wrapper(weights.tensors, encoder))
        of_backbone = _renamed(inside, model)
        prefix = _wrapper(encoder, of_backbone) or ""
        tensors = {prefix + key: tensor for key, tensor in of_backbone.items()}
        outside = []
        common = len(tensors.keys() & encoder.keys())
        # Few keys of both are equal by chance. Of a deeper backbone only the first blocks are used.
        if 2 * common < min(len(tensors), len(encoder)):
            raise _no_tensor(weights, model, own)

    def module_of(key: str) -> str:
        return key.removeprefix(prefix).partition(".")[0]

    modules = {module_of(key) for key in encoder if key.startswith(prefix)}
    dropped = {
        key: "only the encoder was asked for"
        for key in tensors
        if key not in encoder and (key in own or module_of(key) not in modules)
    }
    tensors = {key: tensor for key, tensor in tensors.items() if key not in dropped}
    return Matched(None, "segmenter", tensors, encoder, dropped, outside)


def _renamed(tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return the tensors of a file of a backbone alone under the keys of the network's encoder."""
    encoders = [module for module in model.modules() if isinstance(module, Encoder)]
    renamed = {}
    for key, tensor in tensors.items():
        for encoder in encoders:
            key = encoder.own_key(key)
        renamed[key] = tensor
    return renamed


def _no_tensor(weights: Weights, model: Any, own: Mapping[str, Tensor]) -> UserError:
    return UserError(
        f"{weights.name} holds no tensor of a {type(model).__name__} ({listed(list(own))}): it "
        f"holds {counted(len(weights.tensors), 'tensor')}, such as "
        f"{listed(list(weights.tensors))}; give "
        "weights that were trained in this network"
    )


def _encoder_keys(model: Any, own: Iterable[str]) -> set[str]:
    """Return the keys of the encoder: its parameters and the buffers of their modules.

    Classifiers inside of the encoder, as in SeMask, depend on the classes, so they are left out.

    Raises:
        UserError: The network has no encoder and no ``layer_ids()``.
    """
    names = model.encoder_parameters()
    if not names:
        raise UserError(
            f"a {type(model).__name__} has no encoder that could be loaded alone: its layer_ids() "
            "are empty; load the whole network (model.weights on the command line)"
        )
    names = names - {*classifier_keys(model)}
    modules = {key.rpartition(".")[0] for key in names}
    parameters = dict(model.named_parameters())
    return {
        key
        for key in own
        if key in names or (key not in parameters and key.rpartition(".")[0] in modules)
    }


def _wrapper(keys: Iterable[str], own: Mapping[str, object]) -> str | None:
    """Return the prefix before most of the model's keys, None if none of the keys is there.

    Usually ``""``; ``"module."`` or ``"network."`` in the state dict of a wrapped network.
    """
    count: Counter[str] = Counter()
    for key in keys:
        steps = key.split(".")
        for number in range(len(steps)):
            if ".".join(steps[number:]) in own:
                count["".join(f"{step}." for step in steps[:number])] += 1
    return min(count, key=lambda wrapper: (-count[wrapper], len(wrapper)), default=None)


def _shared_wrapper(keys: Iterable[str], own: Iterable[str]) -> str:
    """Return the prefix that all keys share, up to the first name that the model's keys have too.

    It is ``"module."`` in the state dict of ``DataParallel(backbone)``, else usually ``""``.
    """
    names = {name for key in own for name in key.split(".")}
    wrapper = ""
    for steps in zip(*(key.split(".")[:-1] for key in keys)):
        if len(set(steps)) > 1 or steps[0] in names:
            break
        wrapper += f"{steps[0]}."
    return wrapper


def _unwrapped(tensors: Mapping[str, Tensor], wrapper: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors under a prefix, which is cut off, and the keys that do not have it."""
    inside = {
        key.removeprefix(wrapper): tensor
        for key, tensor in tensors.items()
        if key.startswith(wrapper)
    }
    return inside, [key for key in tensors if not key.startswith(wrapper)]
