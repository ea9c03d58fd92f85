"""Check the content of a run's checkpoint before any of it is used.

Lightning restores the entries of a checkpoint one after the other without checking them: a missing
entry ends in a ``KeyError`` half-way, and a wrong counter goes unnoticed. A checkpoint is plain
data, so this module does not need Lightning.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from segformer_pl.checkpoints.files import check_usable, describe_non_finite, non_finite, wrong_kind
from segformer_pl.errors import UserError, counted

# Lightning's weight averaging stores the average as "state_dict" and the trained weights beside it.
STATE_DICTS = ("state_dict", "current_model_state")
# Numbers of every parameter group, by the name of the optimiser
GROUP_SETTINGS = {
    "adamw": ("lr", "betas", "eps", "weight_decay"),
    "sgd": ("lr", "momentum", "weight_decay"),
}
# State of every parameter, each tensor with the shape of the parameter
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}

REMEDY = "give another checkpoint, or start a new run from its weights with --model.weights"


def check_content(content: Any, name: str) -> dict[str, Any]:
    """Check that content is a Lightning checkpoint whose entries have the right types; return it.

    Args:
        content: Content of the file.
        name: Name of the file, for messages.

    Raises:
        UserError: The content is no checkpoint, an entry has the wrong type or value, or the
            weights hold nan or infinity.
    """
    if not isinstance(content, dict):
        raise UserError(
            f"{name} holds a {type(content).__name__} and is no checkpoint of a run; give a run's "
            "checkpoint"
        )
    if content and all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"{name} holds bare weights and is no checkpoint of a run; start from them with "
            "--model.weights"
        )
    missing = [key for key in ("state_dict", "pytorch-lightning_version") if key not in content]
    if missing:
        raise UserError(
            f"{name} has no {missing[0]!r} and is no checkpoint of a run; give a run's checkpoint, "
            "or load its weights with --model.weights"
        )
    kinds: dict[str, tuple[type, str]] = {
        "pytorch-lightning_version": (str, "a version"),
        "state_dict": (dict, "a dict of tensors"),
        "current_model_state": (dict, "a dict of tensors"),
        "hyper_parameters": (dict, "a dict of settings"),
        "datamodule_hyper_parameters": (dict, "a dict of settings"),
        "StreamingSegmentationData": (dict, "the position in the data"),
        "loops": (dict, "the trainer's counters"),
        "callbacks": (dict, "a dict of states"),
        "optimizer_states": (list, "a list of states"),
        "lr_schedulers": (list, "a list of states"),
        "global_step": (int, "the number of steps"),
        "epoch": (int, "a number"),
    }
    for key, (kind, what) in kinds.items():
        value = content.get(key)
        if key in content and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(_wrong(name, key, value, what))
        if isinstance(value, int) and value < 0:
            raise UserError(_wrong(name, key, value, "at least 0"))
    version = content["pytorch-lightning_version"]
    if not re.match(r"\d+\.\d+", version):
        raise UserError(_wrong(name, "pytorch-lightning_version", version, "a version"))
    for key in STATE_DICTS:
        for tensor_name, tensor in content.get(key, {}).items():
            if not isinstance(tensor_name, str) or not isinstance(tensor, Tensor):
                raise UserError(_wrong(name, f"{key}, {tensor_name}", tensor, "a tensor"))
        check_usable(content.get(key, {}), name)
        if counts := non_finite(content.get(key, {})):
            raise UserError(
                f"{name} holds {describe_non_finite(counts)}; it comes from a training that "
                "diverged, or is damaged: give an earlier checkpoint"
            )
    return content


def _wrong(name: str, key: str, value: Any, what: str) -> str:
    shown = repr(value) if isinstance(value, int | float | str) else f"a {type(value).__name__}"
    return f"{name} holds {shown[:60]} as {key}, which has to be {what}; {REMEDY}"


def check_tensors(
    there: Mapping[str, Tensor], here: Mapping[str, Tensor], name: str, strict: bool = True
) -> None:
    """Check that the tensors of a checkpoint fit a model.

    Args:
        there: State dict of the checkpoint.
        here: State dict of the model.
        name: Name of the checkpoint, for messages.
        strict: Whether a missing or unexpected key is an error.

    Raises:
        UserError: A tensor has another shape, or is not floating-point where the model's is; or, if
            strict, a key is missing or unexpected.
    """
    missing = [key for key in here if strict and key not in there]
    unexpected = [key for key in there if strict and key not in here]
    reshaped = [key for key in here if key in there and there[key].shape != here[key].shape]
    problems = [f"lacks {_some(missing)}"] if missing else []
    problems += [f"has {_some(unexpected)}, which the model lacks"] if unexpected else []
    if reshaped:
        theirs, ours = (tuple(tensors[reshaped[0]].shape) for tensors in (there, here))
        problems.append(f"has {_some(reshaped)} of another shape, {theirs} and not {ours}")
    kinds = {
        key: kind for key in here if key in there and (kind := wrong_kind(there[key], here[key]))
    }
    if kinds:
        kind = next(iter(kinds.values()))
        problems.append(f"has {_some(list(kinds))} as {kind}, no floating-point numbers")
    if problems:
        raise UserError(
            f"{name} {', '.join(problems)}; make model.network the network that was trained"
        )


def _some(keys: list[str]) -> str:
    """Name the first key and count the others."""
    rest = f" and {counted(len(keys) - 1, 'other tensor')}" if len(keys) > 1 else ""
    return f"{keys[0]}{rest}"


def check_resumable(checkpoint: Mapping[str, Any], name: str) -> None:
    """Check that a checkpoint holds more than weights.

    Args:
        checkpoint: Content of the checkpoint, after :func:`check_content`.
        name: Name of the checkpoint, for messages.

    Raises:
        UserError: The state of the optimiser, the schedule or the trainer's counters are missing.
    """
    for key in ("optimizer_states", "lr_schedulers", "loops"):
        if key not in checkpoint:
            raise UserError(f"{name} has no {key!r}, so training cannot resume from it; {REMEDY}")


def check_training_state(
    checkpoint: Mapping[str, Any],
    optimizer: str,
    groups: Sequence[Mapping[str, Any]],
    name: str,
) -> None:
    """Check that optimiser, schedule and counters are there, fit this run and agree on the step.

    Args:
        checkpoint: Content of the checkpoint, after :func:`check_content`.
        optimizer: Name of this run's optimiser, ``"adamw"`` or ``"sgd"``.
        groups: Parameter groups of this run's optimiser.
        name: Name of the checkpoint, for messages.

    Raises:
        UserError: An entry is missing, does not fit, or counts another number of steps.
    """
    check_resumable(checkpoint, name)
    step = _check_counters(checkpoint, name)
    try:
        (stored,) = checkpoint["optimizer_states"]
        (schedule,) = checkpoint["lr_schedulers"]
        theirs = [list(group["params"]) for group in stored["param_groups"]]
        trained_with = {
            "sgd" if "momentum" in group else "adamw" for group in stored["param_groups"]
        }
        state, last_epoch = dict(stored["state"]), schedule["last_epoch"]
        rates = schedule.get("_last_lr", [])
        if any(not isinstance(values, Mapping) for values in state.values()):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{name} does not hold the state of one optimiser and one schedule; {REMEDY}"
        ) from error
    if trained_with != {optimizer}:
        raise UserError(
            f"{name} was trained with {min(trained_with)}, whose state does not fit {optimizer}; "
            f"give --model.optimizer {min(trained_with)}, or start a new run from its weights with "
            "--model.weights"
        )
    sizes = [[len(params) for params in of] for of in (theirs, [g["params"] for g in groups])]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{name} has an optimiser of {sizes[0]} parameters in its groups, and this run one of "
            f"{sizes[1]}; {REMEDY}"
        )
    if last_epoch != step:
        raise UserError(
            f"{name} was written after {counted(step, 'step')}, but its schedule is at step "
            f"{last_epoch}; "
            f"{REMEDY}"
        )
    for path, value in _leaves(rates, "the schedule's _last_lr"):
        if not _is_rate(value):
            raise UserError(_wrong(name, path, value, "a finite number of at least 0"))
    for number, group in enumerate(stored["param_groups"]):
        for path, value in _leaves(
            {key: group.get(key) for key in GROUP_SETTINGS[optimizer]}, f"group {number}"
        ):
            if not _is_rate(value):
                raise UserError(_wrong(name, path, value, "a finite number of at least 0"))
        betas = group.get("betas", (0, 0))
        if not isinstance(betas, list | tuple) or len(betas) != 2 or not _are_below_1(betas):
            raise UserError(_wrong(name, f"group {number}.betas", betas, "two numbers below 1"))
    _check_moments(optimizer, state, theirs, groups, step, name)


def _are_below_1(values: Sequence[Any]) -> bool:
    return all(_is_rate(value) and value < 1 for value in values)


def _is_rate(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0


def _check_counters(checkpoint: Mapping[str, Any], name: str) -> int:
    """Check the trainer's counters; return the number of optimiser steps."""
    for path, value in _leaves(checkpoint["loops"], "loops"):
        if isinstance(value, int) and value < 0:
            raise UserError(_wrong(name, path, value, "at least 0"))
    try:
        progress = checkpoint["loops"]["fit_loop"][
            "epoch_loop.automatic_optimization.optim_progress"
        ]
        step = progress["optimizer"]["step"]["total"]["completed"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{name} does not hold the counters of a training; {REMEDY}") from error
    stated = checkpoint.get("global_step")
    if not isinstance(step, int) or stated != step:
        raise UserError(
            f"{name} states that it was written after {stated} steps, but its trainer counted "
            f"{step}; {REMEDY}"
        )
    return step


def _check_moments(
    optimizer: str,
    state: Mapping[Any, Mapping[str, Any]],
    theirs: list[list[Any]],
    groups: Sequence[Mapping[str, Any]],
    num_steps: int,
    name: str,
) -> None:
    """Check the moments of every parameter, and AdamW's step count.

    Args:
        optimizer: Name of the optimiser.
        state: State of the optimiser by parameter id; may be empty, as before the first step, and
            always in SGD without momentum.
        theirs: Parameter ids of each group in the checkpoint.
        groups: Parameter groups of this run's optimiser.
        num_steps: Number of optimiser steps that the trainer counted.
        name: Name of the checkpoint, for messages.
    """
    flat: dict[str, Tensor] = {}
    for ids, group in zip(theirs, groups):
        for key, parameter in zip(ids, group["params"]):
            if not state:
                continue
            for moment in MOMENTS[optimizer]:
                tensor = state.get(key, {}).get(moment)
                if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
                    shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else "nothing"
                    raise UserError(
                        f"{name} has {shape} as the optimiser's {moment} of parameter {key}, whose "
                        f"shape is {tuple(parameter.shape)}; {REMEDY}"
                    )
                flat[f"{moment} of parameter {key}"] = tensor
            if optimizer != "adamw":
                continue
            step = state.get(key, {}).get("step")
            if not (isinstance(step, Tensor) and step.numel() == 1 and step.item() >= 0):
                raise UserError(_wrong(name, f"the step of parameter {key}", step, "a number"))
            # The optimiser may have counted fewer steps than the trainer: a gradient scaler skips
            # some, and a second fit starts from 0.
            if not (step.item() <= num_steps and float(step).is_integer()):
                raise UserError(
                    f"{name} was written after {counted(num_steps, 'step')}, but its optimiser "
                    "counted "
                    f"{step.item():.12g} for parameter {key}; {REMEDY}"
                )
    if counts := non_finite(flat):
        raise UserError(
            f"{name}, optimiser: {describe_non_finite(counts)}; it comes from a training that "
            "diverged: give an earlier checkpoint"
        )


def tensors_of(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the weights and the optimisers, with its path for messages."""
    for entry in (*STATE_DICTS, "optimizer_states"):
        for path, value in _leaves(checkpoint.get(entry, {}), ""):
            if isinstance(value, Tensor):
                yield path if entry == "state_dict" else f"{entry}.{path}", value


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the path (keys and indices joined by dots) and value of every leaf of nested data."""
    if isinstance(tree, Mapping):
        items: Any = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        yield path, tree
        return
    for key, value in items:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))
