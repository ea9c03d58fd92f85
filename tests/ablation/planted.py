"""A callback for the trainings of the tests: it fails or waits while a file exists."""

import os
import time
from pathlib import Path

import lightning.pytorch as pl


class Planted(pl.Callback):
    """Raises or waits after a step, or waits in the validation.

    Args:
        folder: Folder with the files ``fail``, ``hold.step.<seed>`` and ``hold.validation.<seed>``.
            A process that waits writes a file ``held.*``.
        step: Training step after which it acts.
        fails: Whether it raises while the file ``fail`` exists.
    """

    def __init__(self, folder: str, step: int = 2, fails: bool = False) -> None:
        self.folder, self.step, self.fails = Path(folder), step, fails

    def _hold(self, trainer, name):
        hold = self.folder / f"hold.{name}.{trainer.datamodule.seed}"
        if hold.exists():
            (self.folder / f"held.{name}.{os.getpid()}").touch()
        while hold.exists():
            time.sleep(0.02)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            if self.fails and (self.folder / "fail").exists():
                raise RuntimeError("planted\nsecond line of the message")
            self._hold(trainer, "step")

    def on_validation_start(self, trainer, module):
        self._hold(trainer, "validation")
