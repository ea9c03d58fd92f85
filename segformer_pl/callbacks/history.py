"""One run, one history: what is logged is kept, also where a run was interrupted and goes on."""

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from segformer_pl.analysis.run_history import CONFIG_FILE, FINDINGS_FILE, rewind
from segformer_pl.analysis.run_metrics import read_table
from segformer_pl.atomic import WriteError, atomic_write_text, make_writable_folder
from segformer_pl.callbacks.figures import run_folder


class RunLogger(CSVLogger):
    """Lightning's CSVLogger, which goes on with a ``metrics.csv`` that is there.

    Lightning's own deletes it. A disk that is full for a while costs no values either: they are
    written once there is room. Arguments are those of CSVLogger.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            make_writable_folder(self.log_dir)
            self._experiment = MetricsWriter(self.log_dir)
        return self._experiment

    def save(self) -> None:
        try:
            super().save()
        except WriteError as error:
            rank_zero_warn(f"{error}. Logged values are kept in memory until they can be written.")


class MetricsWriter(ExperimentWriter):
    """Appends rows to a ``metrics.csv``; a file with more columns replaces it whole."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.file = Path(self.metrics_file_path)
        if self.file.is_file():
            self.metrics_keys = read_table(self.file).header

    def _check_log_dir_exists(self) -> None:
        """Lightning's deletes the file here."""

    def save(self) -> None:
        """Write the rows that were logged since the last call.

        Raises:
            WriteError: They cannot be written; they are kept for the next call.
        """
        if not self.metrics:
            return
        names = sorted({*self.metrics_keys, *(name for row in self.metrics for name in row)})
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names)
        if names == self.metrics_keys and self.file.is_file():
            writer.writerows(self.metrics)
            self._append(text.getvalue())
        else:
            writer.writeheader()
            if self.file.is_file():
                table = read_table(self.file)
                writer.writerows(dict(zip(table.header, row.cells)) for row in table.rows)
            writer.writerows(self.metrics)
            atomic_write_text(self.file, text.getvalue())
        self.metrics_keys, self.metrics = names, []

    def _append(self, text: str) -> None:
        size = self.file.stat().st_size
        try:
            with self.file.open("ab") as stream:
                stream.write(text.encode())
        except OSError as error:
            os.truncate(self.file, size)  # no part of a row stays behind
            raise WriteError(f"cannot write {str(self.file)!r}: {error.strerror}") from error


class RunHistory(pl.Callback):
    """Makes a resumed run one history with what came before it, in the same folder.

    When training starts from a checkpoint, what the folder holds of later steps is removed
    (:func:`~segformer_pl.analysis.run_history.rewind`): it comes from steps that are trained again.
    Logged values are on the disk soon after each checkpoint, so that no value between two
    checkpoints is lost when the process is killed.

    Attributes:
        findings: Sentences about settings that are most likely not meant. They are kept in
            ``findings.json`` for the report.
    """

    def __init__(self) -> None:
        self.findings: list[str] = []
        self._is_unsaved = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_kept = any(isinstance(logger, RunLogger) for logger in trainer.loggers)
        if not trainer.is_global_zero or not is_kept:
            return
        folder = run_folder(trainer)
        if trainer.ckpt_path is not None:
            rewind(folder, trainer.global_step)
        atomic_write_text(folder / FINDINGS_FILE, json.dumps(self.findings, indent=1) + "\n")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._is_unsaved = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not when the checkpoint is saved: the values of its step are logged only after that.
        if self._is_unsaved:
            for logger in trainer.loggers:
                logger.save()
            self._is_unsaved = False


class RunConfig(SaveConfigCallback):
    """Saves the configuration into the run folder, as Lightning's does, but completely or not."""

    def __init__(self, parser: Any, config: Any, config_filename: str = CONFIG_FILE) -> None:
        super().__init__(parser, config, config_filename, save_to_log_dir=False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.config_filename == CONFIG_FILE:  # a resumption can still be refused
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        atomic_write_text(run_folder(trainer) / self.config_filename, text)


def keep_history(loggers: Any, run_dir: Path | None) -> Any:
    """What is given as ``trainer.logger``, its CSVLogger replaced by a :class:`RunLogger`.

    Args:
        loggers: A logger, several, a switch, or nothing.
        run_dir: The folder of the run that goes on; None for the logger's own.
    """
    if isinstance(loggers, Sequence):
        return [keep_history(loggers[0], run_dir), *loggers[1:]] if loggers else loggers
    if type(loggers) is not CSVLogger or "://" in str(loggers.save_dir):
        return loggers
    place: dict[str, Any] = {
        "save_dir": loggers.save_dir,
        "name": loggers.name,
        "version": loggers._version,
    }
    if run_dir is not None:
        number = re.fullmatch(r"version_(0|[1-9]\d*)", run_dir.name)
        place = {
            "save_dir": run_dir.parent.parent,
            "name": run_dir.parent.name,
            "version": int(number[1]) if number else run_dir.name,
        }
    return RunLogger(
        **place,
        prefix=loggers._prefix,
        flush_logs_every_n_steps=loggers._flush_logs_every_n_steps,
    )
