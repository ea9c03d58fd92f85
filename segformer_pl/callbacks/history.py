"""The history of a run: logged values and files, kept consistent across resumptions."""

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
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import (
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from torch import Tensor

from segformer_pl.analysis.evaluation import EVALUATION_FOLDER
from segformer_pl.analysis.metrics_table import read_table
from segformer_pl.analysis.run import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    FIGURE_FOLDERS,
    FINDINGS_FILE,
    METRICS_FILE,
    RANKS_FILE,
    TRAINING_DATA,
    TRAINING_DATA_FILE,
    WANDB_FILE,
    Run,
    numbered_files,
)
from segformer_pl.atomic import WriteError, atomic_write_text, make_writable_folder
from segformer_pl.callbacks.figures import run_folder
from segformer_pl.callbacks.run_lock import RunLock
from segformer_pl.errors import UserError

Saved = tuple[int, int]  # size and time of modification


class RunLogger(CSVLogger):
    """A CSVLogger that appends to an existing ``metrics.csv``.

    Lightning's CSVLogger deletes the file. Values that cannot be written, such as on a full disk,
    are kept in memory and written later. The arguments are those of CSVLogger.

    Attributes:
        trainer: Trainer during a training, otherwise None.
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
        # Lightning logs the index of the current step. During gradient accumulation, that is the
        # step after the last completed one, so set it for validations.
        if self.trainer is not None and self.trainer.validating:
            step = self.trainer.global_step - 1
        super().log_metrics(metrics, step)

    def save(self) -> None:
        try:
            super().save()
        except WriteError as error:
            rank_zero_warn(f"{error}. Logged values are kept in memory until they can be written.")


class MetricsWriter(ExperimentWriter):
    """Appends rows to ``metrics.csv``, and rewrites the file when there are new columns."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.file = Path(self.metrics_file_path)
        if self.file.is_file():
            self.metrics_keys = read_table(self.file).header

    def _check_log_dir_exists(self) -> None:
        """Do nothing; Lightning deletes the file here."""

    def save(self) -> None:
        """Write the rows that were logged since the last call.

        Raises:
            WriteError: The rows cannot be written; they are kept for the next call.
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
            os.truncate(self.file, size)  # remove a partly written row
            raise WriteError(f"cannot write {str(self.file)!r}: {error.strerror}") from error


class RunHistory(pl.Callback):
    """Keeps one consistent history in the run folder of a resumed run.

    When training starts, rows and files of later steps are set aside (:func:`rewind`), since these
    steps are trained again::

        first process     1  2  3  4  5  6  killed     checkpoint at step 4
        resumed                       5  6  7  8       rows 5 and 6 of the first process set aside

    Logged values are written soon after each checkpoint, so a kill loses no value up to the
    checkpoint. The paths of the best checkpoints are kept valid if the run folder was moved. The
    facts that identify the training data are written to ``training_data.json``, for ``compare``;
    ranks and images per step of each part to ``ranks.json``, for the report; and the id of a
    WandbLogger's run to ``wandb_run_id.txt``, so that a resumption continues it.

    Attributes:
        findings: Messages about implausible settings, written to ``findings.json`` for the report.
        is_locked: Whether training waits until no other process trains in the run folder.
    """

    def __init__(self) -> None:
        self.findings: list[str] = []
        self.is_locked = False
        self._lock: RunLock | None = None
        self._found: Saved | None = None
        self._is_unsaved = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_locked and trainer.is_global_zero:
            self._lock = RunLock(run_folder(trainer))
            self._lock.acquire()
            # Some strategies read the checkpoint later, which then is the newest one.
            is_read = not trainer.strategy.restore_checkpoint_after_setup
            if is_read and _saved(trainer) != self._found:
                raise UserError(
                    f"run_name: another process has trained in '{self._lock.folder}' meanwhile; "
                    "start this one again, to continue from the last checkpoint"
                )
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.trainer = trainer

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.trainer = None  # a later validation is not part of it
        self._unlock()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._found = _saved(trainer)  # it was read just now, before on_fit_start
        run = Run.of(trainer.ckpt_path) if trainer.ckpt_path else None
        if trainer.state.fn != TrainerFn.FITTING or run is None:
            return
        if run.folder.resolve() != run_folder(trainer).resolve():
            return
        # If the path of the folder has changed (it was relative, or the run was moved), Lightning
        # discards the record of the best checkpoint and overwrites it with a worse one. So adapt
        # the paths.
        checkpoints = run.folder.resolve() / CHECKPOINT_FOLDER
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            folder = getattr(callback, "dirpath", None)
            if state and folder and Path(folder).resolve() == checkpoints:
                checkpoint["callbacks"][callback.state_key] = _in_folder(state, folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        has_history = any(isinstance(logger, RunLogger) for logger in trainer.loggers)
        if not trainer.is_global_zero or not has_history:
            return
        folder = run_folder(trainer)
        # Also without a checkpoint: a run that was killed before its first one may start anew.
        if (aside := rewind(folder, trainer.global_step)) is not None:
            rank_zero_info(
                f"rows and files of steps after {trainer.global_step} were moved to {aside}"
            )
        atomic_write_text(folder / FINDINGS_FILE, json.dumps(self.findings, indent=1) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                atomic_write_text(folder / WANDB_FILE, f"{logger.experiment.id}\n")
        data: Any = getattr(trainer, "datamodule", None)
        part = {"ranks": trainer.world_size}
        if hasattr(data, "samples_per_step"):
            part["images per step"] = data.samples_per_step
        step = trainer.global_step
        parts = {key: value for key, value in Run(folder).ranks.items() if key < step}
        atomic_write_text(folder / RANKS_FILE, json.dumps(parts | {step: part}, indent=1) + "\n")
        state = {} if data is None else data.state_dict()
        if all(key in state for key in TRAINING_DATA):
            text = json.dumps({key: state[key] for key in TRAINING_DATA}, indent=1)
            atomic_write_text(folder / TRAINING_DATA_FILE, f"{text}\n")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._is_unsaved = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not in on_save_checkpoint, since the values of its step are logged after that.
        if self._is_unsaved:
            for logger in trainer.loggers:
                logger.save()
            self._is_unsaved = False


def _saved(trainer: pl.Trainer) -> Saved | None:
    """Return what changes when the checkpoint of a named run is written; None if there is none."""
    files = [Path(trainer.ckpt_path)] if trainer.ckpt_path else []
    if not files:
        callbacks: list[Any] = trainer.checkpoint_callbacks
        files = [callback.file for callback in callbacks if hasattr(callback, "file")]
    for file in files:
        if file.is_file():
            status = file.stat()
            return status.st_size, status.st_mtime_ns
    return None


def rewind(run_dir: Path, step: int) -> Path | None:
    """Set aside the rows and files of a run folder that are of later steps.

    They are moved to a new folder ``superseded_after_step_<n>`` in the run folder; nothing is
    deleted.

    Args:
        run_dir: Run folder.
        step: Step from which training is resumed.

    Returns:
        The new folder; None if there was nothing of later steps.

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
            # A configuration at exactly this step belongs to the present resumption; keep it.
            if number > step:
                make_writable_folder(aside / name)
                file.rename(aside / name / file.name)
    return aside if aside.is_dir() else None


def _unused_folder(folder: Path) -> Path:
    """Return the folder, or its name with a number if it exists from an earlier resumption."""
    numbered = (folder.with_name(f"{folder.name}_{number}") for number in count(2))
    return next(path for path in chain([folder], numbered) if not path.exists())


def _as_csv(header: list[str], rows: list[list[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    return text.getvalue()


class RunConfig(SaveConfigCallback):
    """Saves the configuration to the run folder, as Lightning's callback does, but atomically.

    A resumed run saves it when training starts, since the resumption can be refused until then.
    """

    def __init__(self, parser: Any, config: Any, config_filename: str = CONFIG_FILE) -> None:
        super().__init__(parser, config, config_filename, save_to_log_dir=False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.config_filename == CONFIG_FILE:  # not a resumption
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        atomic_write_text(run_folder(trainer) / self.config_filename, text)


def _in_folder(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the state of a ModelCheckpoint with the paths of its files in another folder."""
    before = state.get("dirpath")
    if before is None or Path(before).name != CHECKPOINT_FOLDER:  # a folder that the user chose
        return state

    def relocate(path: str) -> str:
        is_below = bool(path) and Path(path).is_relative_to(before)
        return str(Path(folder) / Path(path).relative_to(before)) if is_below else path

    paths = ("best_model_path", "kth_best_model_path", "last_model_path")
    return {
        **state,
        "dirpath": folder,
        "best_k_models": {relocate(path): score for path, score in state["best_k_models"].items()},
        **{name: relocate(state[name]) for name in paths},
    }


def keep_history(loggers: Any, run_dir: Path | None) -> Any:
    """Replace the CSVLogger in a value of ``trainer.logger`` by a :class:`RunLogger`.

    Args:
        loggers: A logger, a list of loggers (the first is replaced), a bool, or None.
        run_dir: Run folder of a resumed run; None for a new folder of the logger.
    """
    if isinstance(loggers, Sequence):
        return [keep_history(loggers[0], run_dir), *loggers[1:]] if loggers else loggers
    if type(loggers) is not CSVLogger or "://" in str(loggers.save_dir):
        return loggers
    location: dict[str, Any] = {
        "save_dir": loggers.save_dir,
        "name": loggers.name,
        "version": loggers._version,
    }
    if run_dir is not None:
        number = re.fullmatch(r"version_(0|[1-9]\d*)", run_dir.name)
        location = {
            "save_dir": run_dir.parent.parent,
            "name": run_dir.parent.name,
            "version": int(number[1]) if number else run_dir.name,
        }
    return RunLogger(
        **location,
        prefix=loggers._prefix,
        flush_logs_every_n_steps=loggers._flush_logs_every_n_steps,
    )
