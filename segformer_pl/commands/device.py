"""The option ``--device`` of the commands."""

import torch

from segformer_pl.errors import UserError


def resolve_device(name: str) -> str:
    """Return ``"cpu"`` or ``"cuda"`` for the value of ``--device``.

    Args:
        name: ``"cpu"``, ``"cuda"``, or ``"auto"`` for CUDA where it is available.

    Raises:
        UserError: The name is ``"cuda"`` and torch has no CUDA device.
    """
    is_available = torch.cuda.is_available()
    if name == "cuda" and not is_available:
        raise UserError(
            "--device cuda: this machine has no CUDA device that torch can use; give --device cpu"
        )
    return ("cuda" if is_available else "cpu") if name == "auto" else name
