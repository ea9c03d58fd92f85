"""Parameter groups and learning-rate schedules of the paper's training recipe.

They follow the configurations of the reference code and mmcv's optimiser constructor. Two options
come from elsewhere: the schedule of mmsegmentation 1.x, and layer-wise learning rates (BEiT, Bao et
al. 2022). For an exponential moving average of the weights use Lightning's callback
``lightning.pytorch.callbacks.EMAWeightAveraging``.
"""

from collections.abc import Iterator
from typing import Any, Literal, Protocol, cast, get_args

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from segformer_pl.errors import UserError

WARMUP_RATIO = 1e-6  # learning rate at step 0, as a fraction of the base rate

Schedule = Literal["paper", "mmseg1"]


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
    """Return parameter groups for AdamW; each parameter is in exactly one.

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
        weight_decay: Decoupled weight decay.
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
) -> float:
    """Return the learning rate of a step as a fraction of the base rate.

    ``"paper"``
        Polynomial decay from step 0, multiplied by a linear warm-up, as in mmcv 1, which the
        reference code uses.
    ``"mmseg1"``
        Linear warm-up to the full rate, then polynomial decay over the remaining steps to exactly
        0 in the last one, as in mmsegmentation 1.x.

    Args:
        step: 0-based index of the optimiser step.
        max_steps: Number of steps of the training.
        warmup_steps: Number of linear warm-up steps.
        power: Exponent of the polynomial decay.
        schedule: ``"paper"`` or ``"mmseg1"``.

    Raises:
        UserError: The schedule does not exist.
    """
    if schedule not in get_args(Schedule):
        raise UserError(f"schedule={schedule!r}: choose one of {', '.join(get_args(Schedule))}")
    is_warmup = step < warmup_steps
    if schedule == "paper":
        factor = (1 - min(step / max_steps, 1)) ** power
        if is_warmup:
            factor *= 1 - (1 - step / warmup_steps) * (1 - WARMUP_RATIO)
        return cast(float, factor)
    if is_warmup:
        # mmengine's LinearLR reaches the full rate in the last warm-up step, not the step after.
        return WARMUP_RATIO + (1 - WARMUP_RATIO) * step / max(warmup_steps - 1, 1)
    decay_steps = max(max_steps - 1 - warmup_steps, 1)
    return cast(float, (1 - min((step - warmup_steps) / decay_steps, 1)) ** power)


def poly_with_warmup(
    optimizer: Optimizer,
    max_steps: int,
    warmup_steps: int,
    power: float = 1.0,
    schedule: Schedule = "paper",
) -> LambdaLR:
    """Return a scheduler that applies :func:`poly_factor` to every group.

    Call its ``step()`` after every optimiser step.

    Args:
        optimizer: Optimiser whose groups have their base learning rates.
        max_steps: Number of steps of the training.
        warmup_steps: Number of linear warm-up steps.
        power: Exponent of the polynomial decay.
        schedule: ``"paper"`` or ``"mmseg1"``, see :func:`poly_factor`.
    """
    return LambdaLR(
        optimizer, lambda step: poly_factor(step, max_steps, warmup_steps, power, schedule)
    )
