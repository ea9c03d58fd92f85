"""One run, one history: what is logged is kept, also where a run was interrupted and goes on."""

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import (
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from torch import Tensor

from segformer_pl.analysis.evaluation import EVALUATION_FOLDER
from segformer_pl.analysis.run import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    FIGURE_FOLDERS,
    FINDINGS_FILE,
    METRICS_FILE,
    TRAINING_DATA,
    TRAINING_DATA_FILE,
    Run,
    numbered_files,
    read_table,
)
from segformer_pl.atomic import WriteError, atomic_write_text, make_writable_folder
from segformer_pl.callbacks.figures import run_folder


class RunLogger(CSVLogger):
    """Lightning's CSVLogger, which goes on with a ``metrics.csv`` that is there.

    Lightning's own deletes it. A disk that is full for a while costs no values either: they are
    written once there is room. Arguments are those of CSVLogger.

    Attributes:
        trainer: The one that is training, once it is.
    """

    trainer: pl.Trainer | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            make_writable_folder(self.log_dir)
            self._experiment = MetricsWriter(self.log_dir)
        return self._experiment

    @rank_zero_only
    def log_metrics(  # type: ignore[override]
        self, metrics: dict[str, Tensor | float], step: int | None = None
    ) -> None:
        # Lightning logs the index of the step that is being made. Of a validation that is the last
        # step made or, in the midst of an accumulation, the one after it.
        if self.trainer is not None and self.trainer.validating:
            step = self.trainer.global_step - 1
        super().log_metrics(metrics, step)

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

    When training starts from a checkpoint, what the folder holds of later steps is set aside
    (:func:`rewind`): it comes from steps that are trained again. Logged values are on the disk
    soon after each checkpoint, so that no value between two checkpoints is lost when the process is
    killed. What the data module says of the training data is kept in ``training_data.json``, by
    which runs are compared.

    What its checkpoint callbacks know of the best checkpoints holds as well, also if the folder was
    moved.

    Attributes:
        findings: Sentences about settings that are most likely not meant. They are kept in
            ``findings.json`` for the report.
    """

    def __init__(self) -> None:
        self.findings: list[str] = []
        self._is_unsaved = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.trainer = trainer

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.trainer = None  # a validation of its own is no part of the training

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        run = Run.of(trainer.ckpt_path) if trainer.ckpt_path else None
        if trainer.state.fn != TrainerFn.FITTING or run is None:
            return
        if run.folder.resolve() != run_folder(trainer).resolve():
            return
        # Lightning forgets which checkpoint is the best, and writes a worse one over it, where the
        # folder is spelt in another way than before: it was relative, or the run was moved.
        checkpoints = run.folder.resolve() / CHECKPOINT_FOLDER
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            folder = getattr(callback, "dirpath", None)
            if state and folder and Path(folder).resolve() == checkpoints:
                checkpoint["callbacks"][callback.state_key] = _in_folder(state, folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_kept = any(isinstance(logger, RunLogger) for logger in trainer.loggers)
        if not trainer.is_global_zero or not is_kept:
            return
        folder = run_folder(trainer)
        if trainer.ckpt_path is not None:
            aside = rewind(folder, trainer.global_step)
            if aside is not None:
                rank_zero_info(
                    f"what the run had left of steps after {trainer.global_step} is kept in {aside}"
                )
        atomic_write_text(folder / FINDINGS_FILE, json.dumps(self.findings, indent=1) + "\n")
        data = getattr(trainer, "datamodule", None)
        state = {} if data is None else data.state_dict()
        if all(key in state for key in TRAINING_DATA):
            known = json.dumps({key: state[key] for key in TRAINING_DATA}, indent=1)
            atomic_write_text(folder / TRAINING_DATA_FILE, f"{known}\n")

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


def rewind(run_dir: Path, step: int) -> Path | None:
    """Set aside what a run left behind after this step, of which training goes on.

    Nothing is lost: rows and files are moved into a folder of their own in that of the run.

    Returns:
        That folder; None if nothing was left behind.

    Raises:
        WriteError: A file cannot be written.
    """
    aside = _unused_folder(run_dir / f"superseded_after_step_{step:07d}")
    metrics = run_dir / METRICS_FILE
    if metrics.is_file():
        table = read_table(metrics)
        later = [row.cells for row in table.rows if row.num_steps > step]
        if later:
            make_writable_folder(aside)
            atomic_write_text(aside / METRICS_FILE, _as_csv(table.header, later))
        kept = [row.cells for row in table.rows if row.num_steps <= step]
        atomic_write_text(metrics, _as_csv(table.header, kept))
    for name in (".", EVALUATION_FOLDER, *FIGURE_FOLDERS):
        for number, file in numbered_files(run_dir / name):
            # The configuration of a resumption at this very step is that of the one at hand.
            if number > step:
                make_writable_folder(aside / name)
                file.rename(aside / name / file.name)
    return aside if aside.is_dir() else None


def _unused_folder(folder: Path) -> Path:
    """This one, or one with a number after it: a run can be killed again before it gets ahead."""
    names = (folder.with_name(f"{folder.name}_{number}") for number in count(2))
    return next(one for one in chain([folder], names) if not one.exists())


def _as_csv(header: list[str], rows: list[list[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    return text.getvalue()


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


def _in_folder(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """The state of a ModelCheckpoint whose files are in another folder than they were."""
    before = state.get("dirpath")
    if before is None or Path(before).name != CHECKPOINT_FOLDER:  # the user's own folder
        return state

    def here(path: str) -> str:
        is_below = bool(path) and Path(path).is_relative_to(before)
        return str(Path(folder) / Path(path).relative_to(before)) if is_below else path

    paths = ("best_model_path", "kth_best_model_path", "last_model_path")
    return {
        **state,
        "dirpath": folder,
        "best_k_models": {here(path): score for path, score in state["best_k_models"].items()},
        **{name: here(state[name]) for name in paths},
    }


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
