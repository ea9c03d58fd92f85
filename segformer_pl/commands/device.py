"""Where a command runs its network: the value of its ``--device``."""

import torch

from segformer_pl.errors import UserError


def resolve_device(name: str) -> str:
    """Return ``"cpu"`` or ``"cuda"`` for an option ``--device``; ``"auto"`` takes CUDA if it can.

    Raises:
        UserError: CUDA is asked for and torch finds no device.
    """
    is_there = torch.cuda.is_available()
    if name == "cuda" and not is_there:
        raise UserError("--device cuda: this machine has no CUDA device that torch can use")
    return ("cuda" if is_there else "cpu") if name == "auto" else name
