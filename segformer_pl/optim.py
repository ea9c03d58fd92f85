"""The paper's optimiser settings: parameter groups and the learning-rate schedule.

Facts as in the reference code's configurations and mmcv's optimiser constructor. Beside them are
two options of others: mmsegmentation 1.x's schedule and layer-wise learning rates (BEiT's, which
fine-tune transformers). A moving average of the weights is Lightning's callback
``lightning.pytorch.callbacks.EMAWeightAveraging``.
"""

from typing import Any, Literal, cast, get_args

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
WARMUP_RATIO = 1e-6  # of the base rate, at step 0

Schedule = Literal["paper", "mmseg1"]


def parameter_groups(
    network: nn.Module,
    encoder: nn.Module,
    lr: float,
    weight_decay: float,
    head_lr_mult: float,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Three groups, each parameter in exactly one of them.

    - ``encoder``: weights, and also the biases, of the encoder: ``lr``, decayed;
    - ``encoder_no_decay``: its norms and learned position tables: ``lr``, not decayed;
    - ``head``: everything outside the encoder, norms included: ``lr * head_lr_mult``, decayed.

    With ``layer_decay`` below 1 the encoder's two groups become two for each of its layers, such
    as ``encoder_03``: the rate of a layer is ``lr * layer_decay ** (number of layers above it)``.
    A layer is a block with what leads to it (the stage's patch embedding and position table) or
    comes after it (the stage's norm); see :func:`layers`.

    Raises:
        ValueError: ``layer_decay`` is not in (0, 1], or the encoder has no layers that are known.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(
            f"layer_decay={layer_decay}: give a factor above 0 and at most 1; 1 is no decay"
        )
    parts = [("encoder", list(encoder.parameters()), lr)]
    if layer_decay < 1:
        found = layers(encoder)
        parts = [
            (f"encoder_{number:02d}", parameters, lr * layer_decay ** (len(found) - 1 - number))
            for number, parameters in enumerate(found)
        ]
    undecayed = {
        id(parameter)
        for module in encoder.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, NORMS) or name == "pos_embed"
    }
    groups = []
    for name, members, rate in parts:
        for suffix, decay, is_member in (
            ("", weight_decay, lambda p: id(p) not in undecayed),
            ("_no_decay", 0.0, lambda p: id(p) in undecayed),
        ):
            params = [parameter for parameter in members if is_member(parameter)]
            groups.append(
                {"name": name + suffix, "params": params, "lr": rate, "weight_decay": decay}
            )
    inside = {id(parameter) for parameter in encoder.parameters()}
    head = [parameter for parameter in network.parameters() if id(parameter) not in inside]
    return [
        *groups,
        {"name": "head", "params": head, "lr": lr * head_lr_mult, "weight_decay": weight_decay},
    ]


def layers(encoder: nn.Module) -> list[list[nn.Parameter]]:
    """The encoder's parameters layer by layer, from the image upwards, each in one layer.

    Raises:
        ValueError: it has parameters outside ``stages`` with ``blocks``.
    """
    found: list[list[nn.Parameter]] = []
    for stage in getattr(encoder, "stages", []):
        blocks, norm = list(getattr(stage, "blocks", [])), getattr(stage, "norm", nn.Identity())
        inside = {id(p) for module in (*blocks, norm) for p in module.parameters()}
        before = [p for p in stage.parameters() if id(p) not in inside]
        for block in blocks:
            found.append([*before, *block.parameters()])
            before = []
        if blocks:
            found[-1] += norm.parameters()
    missing = {id(p) for p in encoder.parameters()} - {id(p) for layer in found for p in layer}
    if missing:
        raise ValueError(
            f"layer_decay is for encoders that are stages of blocks and nothing else, and "
            f"{type(encoder).__name__} has {len(missing)} parameters elsewhere: leave it at 1"
        )
    return found


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
        ValueError: there is no such schedule.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule={schedule!r}: choose one of {', '.join(get_args(Schedule))}")
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
