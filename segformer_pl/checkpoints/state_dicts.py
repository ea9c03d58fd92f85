"""Find the state dict in the content of a file, which may hold an averaged copy beside it.

::

    {"model.0.weight": ...}                          the state dict itself
    {"net": {...}, "epoch": 3}                       an entry of a training's file
    {"state_dict": {...}, "state_dict_ema": {...}}   entries: the weights, and their average
    {"model.0.weight": ..., "ema_model.0.weight": ...}   copies of one network, by prefix (DAFormer)
    {"conv.weight": ..., "ema_conv_weight": ...}     buffers of mmcv's EMAHook

Which copy is meant is never guessed: code bases disagree, and mmengine stores the average as
``state_dict`` and the weights before it as ``ema_state_dict``.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from segformer_pl.errors import UserError

# Entries that hold the network, in the order of preference.
ENTRIES = ("state_dict", "model", "model_state_dict", "net", "network")

_AVERAGED = re.compile(r"(.*_)?(ema|teacher)(_.*)?")
_AVERAGED_STEPS = ("steps", "n_averaged")  # counts of mmengine and torch beside an average
_BUFFER = "ema_"  # prefix of the buffers of mmcv's EMAHook
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")  # what torch.compile puts before the keys


def find_state_dict(name: str, content: Any, state: str | None = None) -> Mapping[str, Tensor]:
    """Return the state dict of a file's content.

    Args:
        name: Name of the file, for messages.
        content: Return value of ``torch.load``.
        state: Entry or prefix of the copy to return, where there are several.

    Raises:
        UserError: The content holds no state dict, or several and ``state`` names none of them.
    """
    states = _states(content)
    if not states:
        raise UserError(
            f"{name} holds a {type(content).__name__} with no state dict in it; give one that "
            "holds named tensors, alone or as its 'state_dict'"
        )
    if state is None and len(states) == 1:
        return uncompiled(next(iter(states.values())))
    if state not in states:
        missing = "" if state is None else f", and none is {state!r}"
        other = next((key for key in states if _AVERAGED.fullmatch(key)), next(iter(states)))
        raise UserError(
            f"{name} holds the state {'dict' if len(states) == 1 else 'dicts'} "
            f"{', '.join(states)}{missing}; choose one: --state {other}, of `fit` "
            f"--model.weights_state {other}, or state={other!r} of read_weights"
        )
    return uncompiled(states[state])


def uncompiled(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a state dict without the names that ``torch.compile`` puts into its keys."""
    return {_COMPILED.sub("", key): tensor for key, tensor in tensors.items()}


def _states(content: Any) -> dict[str, Mapping[str, Tensor]]:
    """Return the copies of the network by the names that choose them."""
    if not isinstance(content, Mapping):
        return {}
    if _is_state_dict(content):
        return _copies("state_dict", content)
    inside = {key: value for key, value in content.items() if _is_state_dict(value)}
    averaged = {
        key: {k: tensor for k, tensor in value.items() if k not in _AVERAGED_STEPS}
        for key, value in inside.items()
        if isinstance(key, str) and _AVERAGED.fullmatch(key)
    }
    entry = next((key for key in ENTRIES if key in inside), None)
    plain = {} if entry is None else _copies(entry, inside[entry])
    return plain | averaged


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _copies(entry: str, tensors: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    """Return the copies of a network in one state dict, which is one copy named ``entry`` if all
    keys belong to one network.
    """
    inside: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        first, dot, rest = key.partition(".")
        if dot:
            inside.setdefault(first, {})[rest] = tensor
    for prefix, copy in inside.items():
        alike = {key: other for key, other in inside.items() if other.keys() == copy.keys()}
        if _AVERAGED.fullmatch(prefix) and len(alike) > 1:
            return dict(alike)
    averaged = {
        key: _BUFFER + key.replace(".", "_")
        for key in tensors
        if _BUFFER + key.replace(".", "_") in tensors
    }
    if not averaged:
        return {entry: tensors}
    weights = {k: tensor for k, tensor in tensors.items() if k not in averaged.values()}
    average = {k: tensors[averaged.get(k, k)] for k in weights}
    return {entry: weights, "ema": average}
