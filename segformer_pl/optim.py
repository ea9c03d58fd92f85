"""The paper's optimiser settings: parameter groups and the learning-rate schedule.

Facts as in the reference code's configurations and mmcv's optimiser constructor. Beside them are
two options of others: mmsegmentation 1.x's schedule and layer-wise learning rates (BEiT's, which
fine-tune transformers). A moving average of the weights is Lightning's callback
``lightning.pytorch.callbacks.EMAWeightAveraging``.
"""

from collections.abc import Iterator
from typing import Any, Literal, Protocol, cast, get_args

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from segformer_pl.errors import UserError

WARMUP_RATIO = 1e-6  # of the base rate, at step 0

Schedule = Literal["paper", "mmseg1"]


class HasOptimizerHints(Protocol):
    """What :func:`parameter_groups` reads of a segmenter."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def layer_ids(self) -> dict[str, int]:
        """Name -> depth of every parameter outside the head, 0 next to the image."""
        ...

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed."""
        ...


def parameter_groups(
    network: HasOptimizerHints,
    lr: float,
    weight_decay: float,
    head_lr_mult: float,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Return parameter groups for AdamW, each parameter in exactly one of them.

    - ``encoder``, the parameters in the network's ``layer_ids()``: ``lr``, decayed;
    - ``encoder_no_decay``, those of them that are in its ``no_weight_decay()``: ``lr``, not
      decayed;
    - ``head`` and ``head_no_decay``, all others likewise: ``lr * head_lr_mult``.

    With ``layer_decay`` below 1 the encoder has two groups for each of its layers, such as
    ``encoder_03`` and ``encoder_03_no_decay``: the rate of a layer is
    ``lr * layer_decay ** (number of layers above it)``. Groups without parameters are left out.
    Inside a group parameters keep the order of ``named_parameters()``, by which an optimiser's
    state is stored.

    Raises:
        UserError: ``layer_decay`` is not in (0, 1], the network has fewer than two layers for it,
            or its hints name parameters that it does not have.
    """
    if not 0 < layer_decay <= 1:
        raise UserError(
            f"layer_decay={layer_decay}: give a factor above 0 and at most 1; 1 is no decay"
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
            f"layer_decay={layer_decay} is for encoders of several layers, and {kind} tells of "
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
    """The learning rate at a 0-based step as a share of the base rate.

    ``"paper"``: the polynomial decay runs from step 0, and a linear warm-up multiplies it, as in
    the reference's mmcv. ``"mmseg1"``: mmsegmentation 1.x warms up linearly to the full rate, and
    then decays over the steps that are left, to exactly 0 in the last one.

    Raises:
        UserError: There is no such schedule.
    """
    if schedule not in get_args(Schedule):
        raise UserError(f"schedule={schedule!r}: choose one of {', '.join(get_args(Schedule))}")
    warming = step < warmup_steps
    if schedule == "paper":
        factor = (1 - min(step / max_steps, 1)) ** power
        if warming:
            factor *= 1 - (1 - step / warmup_steps) * (1 - WARMUP_RATIO)
        return cast(float, factor)
    if warming:
        # mmengine's LinearLR reaches its end factor in the last of the warm-up steps.
        return WARMUP_RATIO + (1 - WARMUP_RATIO) * step / max(warmup_steps - 1, 1)
    left = max(max_steps - 1 - warmup_steps, 1)
    return cast(float, (1 - min((step - warmup_steps) / left, 1)) ** power)


def poly_with_warmup(
    optimizer: Optimizer,
    max_steps: int,
    warmup_steps: int,
    power: float = 1.0,
    schedule: Schedule = "paper",
) -> LambdaLR:
    """Scheduler that applies :func:`poly_factor` to every group; step it after every batch."""
    return LambdaLR(
        optimizer, lambda step: poly_factor(step, max_steps, warmup_steps, power, schedule)
    )
