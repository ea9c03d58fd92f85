"""Settings of the trainer that cannot be honoured, refused before anything is built or written."""

from typing import Any

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry

from segformer_pl.errors import UserError

GPU = "gpu"  # the trainer's name for any GPU, beside the names of the accelerators


def check_trainer(trainer: Any) -> None:
    """Refuse numbers that there cannot be, and what an endless stream or a run cannot honour.

    Raises:
        UserError: There is such a setting.
    """
    for name, allowed in (("devices", (-1,)), ("num_nodes", ()), ("accumulate_grad_batches", ())):
        number = trainer[name]
        if isinstance(number, int) and number < 1 and number not in allowed:
            raise UserError(f"trainer.{name} is {number}; give a number of at least 1")
    if trainer["overfit_batches"]:
        raise UserError(
            f"trainer.overfit_batches is {trainer['overfit_batches']}, but training reads a "
            "stream, from which no fixed batches can be taken; leave it out, and give a data set "
            "with few images by --data.path"
        )
    if trainer["barebones"]:
        raise UserError(
            "trainer.barebones is true, but a run writes logs, checkpoints and a report; leave it "
            "out, and measure speed with `python -m segformer_pl profile`"
        )
    share = trainer["limit_train_batches"]
    if isinstance(share, int):  # defines an epoch as that many batches
        return
    if share not in (None, 1.0):
        raise UserError(
            f"trainer.limit_train_batches is {share}, but training reads a stream, which has no "
            "end to take a share of; give --trainer.max_steps, or a whole number of batches"
        )
    unset = {
        "max_epochs": (None, -1),
        "min_epochs": (None,),
        "check_val_every_n_epoch": (None,),
        "reload_dataloaders_every_n_epochs": (0,),
    }
    for name, values in unset.items():
        if trainer[name] not in values:
            raise UserError(
                f"trainer.{name} is {trainer[name]}, but training reads a stream, which has no "
                "epochs; give --trainer.max_steps, and --trainer.val_check_interval in batches"
            )


def check_accelerator(trainer: Any) -> None:
    """Refuse an accelerator that does not exist, or that this machine does not have.

    Raises:
        UserError: ``trainer.accelerator`` is such a name.
    """
    name = trainer["accelerator"]
    names = AcceleratorRegistry.available_accelerators()
    if not isinstance(name, str) or name == "auto":
        return
    if name not in (*names, GPU):
        raise UserError(
            f"trainer.accelerator is {name!r}, which does not exist; give auto, "
            f"{', '.join(sorted(names))} or {GPU}"
        )
    candidates = ("cuda", "mps") if name == GPU else (name,)
    if any(AcceleratorRegistry[kind]["accelerator"].is_available() for kind in candidates):
        return
    reason = "torch finds none on this machine"
    if name in (GPU, "cuda") and torch.version.cuda is None and torch.version.hip is None:
        reason = "the installed torch is built without GPUs"
    raise UserError(
        f"trainer.accelerator is {name!r}, but {reason}; give --trainer.accelerator=auto"
    )
