"""Progress bar in optimiser steps."""

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar

LOG_REFRESH_RATE = 50  # steps


class StepProgressBar(TQDMProgressBar):
    """Shows the completed optimiser steps out of ``max_steps``, also in a resumed run.

    Lightning's bar counts batches since the first start against the steps that remain, so a resumed
    run can end at "40/9". Where the output is no terminal, such as the log of a job, the bar is
    printed every 50 steps, since each time adds a line of 100 bytes to the file.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else LOG_REFRESH_RATE)

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.max_steps if self.trainer.max_steps > 0 else super().total_train_batches

    @property
    def train_description(self) -> str:
        return "step"

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*arguments)
        metrics.pop("v_num", None)  # the last four letters of the run's name
        return metrics

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer, *_)
        bar = self.train_progress_bar
        bar.set_description(self.train_description, refresh=False)
        bar.initial = bar.n = trainer.global_step  # earlier steps do not count for the speed
        bar.refresh()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)
