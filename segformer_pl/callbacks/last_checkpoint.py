"""The checkpoint that an interrupted run goes on from."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` of the latest steps, and of the end of the training.

    Lightning's own default writes at the end of an epoch, and a stream has none.

    Args:
        every_n_train_steps: Optimiser steps between two writings.
        dirpath: Folder of the file; default ``checkpoints`` in the run's folder.
    """

    def __init__(self, every_n_train_steps: PositiveInt = 100, dirpath: Path | None = None) -> None:
        self.num_steps = every_n_train_steps
        super().__init__(
            dirpath=dirpath,
            filename="last",
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        if self.dirpath is not None and trainer.global_step % self.num_steps:
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt")
