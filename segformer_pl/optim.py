"""Optimisers, parameter groups and learning-rate schedules of the published training recipes.

They follow the configurations of the reference code and mmcv's optimiser constructor. Two options
come from elsewhere: the schedule of mmsegmentation 1.x, and layer-wise learning rates (BEiT, Bao et
al. 2022). For an exponential moving average of the weights use Lightning's callback
``lightning.pytorch.callbacks.EMAWeightAveraging``.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, Protocol, cast, get_args

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from segformer_pl.errors import UserError

WARMUP_RATIO = 1e-6  # learning rate at step 0, as a fraction of the base rate

OptimizerName = Literal["adamw", "sgd"]
Schedule = Literal["paper", "mmseg1"]

MOMENTUM = 0.9  # default of SGD in every published recipe


def check_settings(
    optimizer: str, momentum: float, reference_batch_size: int | None = None, **others: float
) -> None:
    """Check settings of the optimiser and the schedule.

    Args:
        optimizer: Name of the optimiser.
        momentum: Momentum of SGD; AdamW has to have the default.
        reference_batch_size: Images per step for which the learning rate is stated; at least 1.
        others: Further settings by their names, which have to be finite and not negative.

    Raises:
        UserError: The optimiser does not exist, or a setting is out of range or would be ignored.
    """
    if optimizer not in get_args(OptimizerName):
        raise UserError(
            f"model.optimizer is {optimizer!r}; choose one of {', '.join(get_args(OptimizerName))}"
        )
    for name, value in {"momentum": momentum, **others}.items():
        if not 0 <= value < math.inf:  # NaN compares as false
            raise UserError(f"model.{name} is {value}; give a finite number of at least 0")
    if momentum >= 1:
        raise UserError(f"model.momentum is {momentum}; give a number below 1")
    if optimizer != "sgd" and momentum != MOMENTUM:
        raise UserError(
            f"model.momentum is {momentum}, but {optimizer} has no such setting; leave it out, or "
            "give --model.optimizer sgd"
        )
    if reference_batch_size is not None and reference_batch_size < 1:
        raise UserError(
            f"model.reference_batch_size is {reference_batch_size}; give the number of images per "
            "step, over all devices, for which model.lr is stated"
        )


def lr_factor(reference_batch_size: int | None, data: Any) -> float:
    """Return the factor of linear scaling on learning rates (Goyal et al. 2017).

    Args:
        reference_batch_size: Images per step for which the rates are stated; None for any number.
        data: Data module of the run, whose ``samples_per_step`` is compared with it.

    Raises:
        UserError: The data module does not state the number of images per step.
    """
    if reference_batch_size is None:
        return 1.0
    if not hasattr(data, "samples_per_step"):
        raise UserError(
            f"model.reference_batch_size is {reference_batch_size}, but {type(data).__name__} has "
            "no samples_per_step to compare it with; use a data module that states it, or leave "
            "model.reference_batch_size out"
        )
    return data.samples_per_step / reference_batch_size


def build_optimizer(
    name: OptimizerName, groups: list[dict[str, Any]], momentum: float, *, is_fused: bool
) -> Optimizer:
    """Return AdamW, or SGD with momentum, over parameter groups.

    Weight decay is decoupled in AdamW. SGD adds it to the gradient, as an L2 penalty would.

    Args:
        name: ``"adamw"`` or ``"sgd"``.
        groups: Parameter groups with their learning rates and weight decays.
        momentum: Momentum of SGD, without dampening and not Nesterov's.
        is_fused: Whether a step is one fused kernel.
    """
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=momentum, fused=is_fused)
    return torch.optim.AdamW(groups, fused=is_fused)


class HasOptimizerHints(Protocol):
    """Interface of a network that :func:`parameter_groups` reads."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def layer_ids(self) -> dict[str, int]:
        """Return name -> depth of every parameter outside the head; 0 is next to the image."""
        ...

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay."""
        ...


def parameter_groups(
    network: HasOptimizerHints,
    lr: float,
    weight_decay: float,
    head_lr_mult: float,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Return parameter groups for the optimiser; each parameter is in exactly one.

    ====================  =================================  =====================  ==============
    group                 parameters                         learning rate          weight decay
    ====================  =================================  =====================  ==============
    ``encoder``           in ``layer_ids()``                 ``lr``                 ``weight_decay``
    ``encoder_no_decay``  of these, ``no_weight_decay()``    ``lr``                 0
    ``head``              all others                         ``lr * head_lr_mult``  ``weight_decay``
    ``head_no_decay``     of these, ``no_weight_decay()``    ``lr * head_lr_mult``  0
    ====================  =================================  =====================  ==============

    With ``layer_decay`` below 1, the encoder has two groups for each layer instead, such as
    ``encoder_03`` and ``encoder_03_no_decay``, with learning rate
    ``lr * layer_decay ** (number of layers above)``. Empty groups are left out. Within a group the
    parameters keep the order of ``named_parameters()``, because the optimiser's state is stored in
    that order.

    Args:
        network: Network with ``layer_ids()`` and ``no_weight_decay()``.
        lr: Base learning rate, used in the encoder.
        weight_decay: Weight decay.
        head_lr_mult: Factor on ``lr`` for all parameters outside the encoder.
        layer_decay: Factor on the learning rate per encoder layer, counted down from the last.

    Raises:
        UserError: ``layer_decay`` is not in (0, 1], the network has fewer than two layers for it,
            or its ``layer_ids()`` or ``no_weight_decay()`` name parameters that do not exist.
    """
    if not 0 < layer_decay <= 1:
        raise UserError(
            f"layer_decay={layer_decay}: give a factor above 0 and at most 1; 1 means no decay"
        )
    kind = type(network).__name__
    parameters = dict(network.named_parameters())
    layers, undecayed = network.layer_ids(), network.no_weight_decay()
    if unknown := sorted((layers.keys() | undecayed) - parameters.keys()):
        raise UserError(
            f"{kind} has no parameter {unknown[0]!r}, which its layer_ids() or no_weight_decay() "
            "names; correct them"
        )
    num_layers = max(layers.values(), default=-1) + 1
    if layer_decay < 1 and num_layers < 2:
        raise UserError(
            f"layer_decay={layer_decay} needs an encoder with at least 2 layers, but {kind} has "
            f"{num_layers}: leave it at 1"
        )
    groups: list[dict[str, Any]] = []

    def add(name: str, members: list[str], rate: float) -> None:
        for suffix, decay, is_undecayed in (("", weight_decay, False), ("_no_decay", 0.0, True)):
            params = [parameters[m] for m in members if (m in undecayed) == is_undecayed]
            if params:
                groups.append(
                    {"name": name + suffix, "params": params, "lr": rate, "weight_decay": decay}
                )

    if layer_decay == 1:
        add("encoder", [name for name in parameters if name in layers], lr)
    else:
        for layer in range(num_layers):
            members = [name for name in parameters if layers.get(name) == layer]
            rate = lr * layer_decay ** (num_layers - 1 - layer)
            add(f"encoder_{layer:02d}", members, rate)
    add("head", [name for name in parameters if name not in layers], lr * head_lr_mult)
    return groups


def poly_factor(
    step: int,
    max_steps: int,
    warmup_steps: int,
    power: float = 1.0,
    schedule: Schedule = "paper",
    floor: float = 0.0,
) -> float:
    """Return the learning rate of a step as a fraction of the base rate.

    ``"paper"``
        Polynomial decay from step 0, multiplied by a linear warm-up, as in mmcv 1, which the
        reference code uses.
    ``"mmseg1"``
        Linear warm-up to the full rate, then polynomial decay over the remaining steps to exactly
        the floor in the last one, as in mmsegmentation 1.x.

    The decay goes from 1 to the floor f as ``(1 - f) * decay + f``. It is scaled and not clipped.

    Args:
        step: 0-based index of the optimiser step.
        max_steps: Number of steps of the training.
        warmup_steps: Number of linear warm-up steps.
        power: Exponent of the polynomial decay.
        schedule: ``"paper"`` or ``"mmseg1"``.
        floor: End of the decay as a fraction of the base rate.

    Raises:
        UserError: The schedule does not exist.
    """
    if schedule not in get_args(Schedule):
        raise UserError(f"schedule={schedule!r}: choose one of {', '.join(get_args(Schedule))}")
    is_warmup = step < warmup_steps
    if schedule == "paper":
        factor = (1 - floor) * (1 - min(step / max_steps, 1)) ** power + floor
        if is_warmup:
            factor *= 1 - (1 - step / warmup_steps) * (1 - WARMUP_RATIO)
        return cast(float, factor)
    if is_warmup:
        # mmengine's LinearLR reaches the full rate in the last warm-up step, not the step after.
        return WARMUP_RATIO + (1 - WARMUP_RATIO) * step / max(warmup_steps - 1, 1)
    decay_steps = max(max_steps - 1 - warmup_steps, 1)
    decay = (1 - min((step - warmup_steps) / decay_steps, 1)) ** power
    return cast(float, (1 - floor) * decay + floor)


def poly_with_warmup(
    optimizer: Optimizer,
    max_steps: int,
    warmup_steps: int,
    power: float = 1.0,
    schedule: Schedule = "paper",
    min_lr: float = 0.0,
) -> LambdaLR:
    """Return a scheduler that applies :func:`poly_factor` to every group.

    Call its ``step()`` after every optimiser step. All groups decay to the same ``min_lr``,
    whatever their base rates, as in mmcv's ``PolyLrUpdaterHook`` and mmengine's ``PolyLR``: SETR's
    encoder from 0.001 and its head from 0.01, both to 0.0001.

    Args:
        optimizer: Optimiser whose groups have their base learning rates.
        max_steps: Number of steps of the training.
        warmup_steps: Number of linear warm-up steps.
        power: Exponent of the polynomial decay.
        schedule: ``"paper"`` or ``"mmseg1"``, see :func:`poly_factor`.
        min_lr: Learning rate at the end of the decay.

    Raises:
        UserError: ``min_lr`` is above the base rate of a group, whose rate would grow.
    """

    def factor_of(group: dict[str, Any]) -> Callable[[int], float]:
        base = group.get("initial_lr", group["lr"])
        if min_lr > base:
            raise UserError(
                f"model.min_lr is {min_lr:g}, but the learning rate of the parameter group "
                f"{group['name']} begins at {base:g}; lower model.min_lr, or raise model.lr, "
                "model.head_lr_mult or model.layer_decay"
            )
        return partial(
            poly_factor,
            max_steps=max_steps,
            warmup_steps=warmup_steps,
            power=power,
            schedule=schedule,
            floor=min_lr / base if min_lr else 0.0,
        )

    return LambdaLR(optimizer, [factor_of(group) for group in optimizer.param_groups])
