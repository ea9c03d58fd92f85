"""The report of a run, written when the run ends, fails or is interrupted."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from segformer_pl.analysis.report import summary, write_report
from segformer_pl.analysis.run import Run
from segformer_pl.callbacks.media import send_report


class RunReport(pl.Callback):
    """Writes ``report.html`` into the run folder after ``fit``, ``validate`` and ``test``.

    The report is also written when the run is interrupted or fails, if something has been logged.
    Rank 0 writes it and prints one line with the result and the path. A CSVLogger must be the first
    logger; otherwise a message says so. A WandbLogger gets the report as an artifact.
    """

    def __init__(self) -> None:
        self.run_dir: Path | None = None
        self.remedy = ""
        self._has_begun = False  # a failure before that is not reported

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # trainer.log_dir waits for all ranks. All ranks call setup, but not on_exception.
        fast_dev_run = getattr(trainer, "fast_dev_run", False)
        log_dir = None if fast_dev_run or stage == "predict" else trainer.log_dir
        self.run_dir = None if log_dir is None else Path(log_dir)
        self.remedy = {
            "validate": "evaluate at least one batch (trainer.limit_val_batches)",
            "test": "evaluate at least one batch (trainer.limit_test_batches)",
        }.get(stage, "train for at least trainer.log_every_n_steps steps")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._has_begun = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._has_begun = True

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._has_begun = True

    # Not on_fit_end and the like, since progress bar and table of metrics are printed after these.
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.run_dir is None or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        try:
            self._write(trainer, Run(self.run_dir))
        except FileNotFoundError:
            rank_zero_info(
                f"no report: nothing was logged to {Run(self.run_dir).metrics_file}; "
                f"{self.remedy}, with a CSVLogger as the first logger"
            )
        except Exception as error:  # the run itself has succeeded
            rank_zero_warn(f"The report could not be written: {error}")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self.run_dir is None or not trainer.is_global_zero or trainer.sanity_checking:
            return
        if not self._has_begun:
            return
        try:
            for logger in trainer.loggers:
                logger.save()
            if Run(self.run_dir).metrics_file.is_file():
                self._write(trainer, Run(self.run_dir))
        except Exception as error:  # must not hide the exception of the run
            rank_zero_warn(f"The report could not be written: {error}")

    def _write(self, trainer: pl.Trainer, run: Run) -> None:
        report = write_report(run)
        send_report(trainer, report)
        step = trainer.global_step if trainer.state.fn == TrainerFn.FITTING else None
        rank_zero_info("   ".join(filter(None, [summary(run, step), f"report: {report}"])))
