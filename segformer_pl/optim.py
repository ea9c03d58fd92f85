"""The paper's optimiser settings: parameter groups and the learning-rate schedule.

Facts as in the reference code's configurations and mmcv's optimiser constructor.
"""

from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def parameter_groups(
    network: nn.Module, encoder: nn.Module, lr: float, weight_decay: float, head_lr_mult: float
) -> list[dict[str, Any]]:
    """Three groups, each parameter in exactly one of them.

    - ``encoder``: weights, and also the biases, of the encoder: ``lr``, decayed;
    - ``encoder_no_decay``: its norms and learned position tables: ``lr``, not decayed;
    - ``head``: everything outside the encoder, norms included: ``lr * head_lr_mult``, decayed.
    """
    no_decay = [
        parameter
        for module in encoder.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, NORMS) or name == "pos_embed"
    ]
    chosen = {id(parameter) for parameter in no_decay}
    decayed = [p for p in encoder.parameters() if id(p) not in chosen]
    chosen.update(map(id, decayed))
    head = [p for p in network.parameters() if id(p) not in chosen]
    return [
        {"name": "encoder", "params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"name": "encoder_no_decay", "params": no_decay, "lr": lr, "weight_decay": 0.0},
        {"name": "head", "params": head, "lr": lr * head_lr_mult, "weight_decay": weight_decay},
    ]


def poly_factor(
    step: int, max_steps: int, warmup_steps: int, power: float = 1.0, warmup_ratio: float = 1e-6
) -> float:
    """The learning rate at a 0-based step as a share of the base rate.

    The polynomial decay runs from step 0, and a linear warm-up multiplies it, as in the
    reference's mmcv; mmsegmentation 1.x re-bases the decay after the warm-up instead.
    """
    factor = (1 - min(step / max_steps, 1)) ** power
    if step < warmup_steps:
        factor *= 1 - (1 - step / warmup_steps) * (1 - warmup_ratio)
    return factor


def poly_with_warmup(
    optimizer: Optimizer, max_steps: int, warmup_steps: int, power: float = 1.0
) -> LambdaLR:
    """Scheduler that applies :func:`poly_factor` to every group; step it after every batch."""
    return LambdaLR(optimizer, lambda step: poly_factor(step, max_steps, warmup_steps, power))
