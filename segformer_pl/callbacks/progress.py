"""Progress bar in optimiser steps."""

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, convert_inf

LOG_REFRESH_RATE = 50  # steps


class StepProgressBar(TQDMProgressBar):
    """Shows the completed optimiser steps out of ``max_steps``, also in a resumed run.

    Lightning's bar counts batches since the first start against the steps that remain, so a resumed
    run can end at "40/9", and it starts anew with each epoch. Where the output is no terminal, such
    as the log of a job, the bar is printed every 50 steps, since each time adds a line of 100 bytes
    to the file.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else LOG_REFRESH_RATE)

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.max_steps if self.trainer.max_steps > 0 else super().total_train_batches

    def init_train_tqdm(self) -> Tqdm:
        return Tqdm(
            desc="step",
            total=convert_inf(self.total_train_batches),
            initial=self.trainer.global_step,  # earlier steps do not count for the speed
            position=2 * self.process_position,
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*arguments)
        metrics.pop("v_num", None)  # the last four letters of the run's name
        names = {"train/loss": "loss", "val/miou": "mIoU"}
        metrics = {names.get(name, name): value for name, value in metrics.items()}
        return metrics | ({"mIoU": f"{metrics['mIoU']:.1%}"} if "mIoU" in metrics else {})

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Do nothing; Lightning starts a new bar here, and a stream has no epochs."""

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """End the line of the bar, so that the message does not follow it."""
        for bar in (self._val_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)
