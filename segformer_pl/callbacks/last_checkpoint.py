"""The checkpoint from which an interrupted run is resumed."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from segformer_pl.atomic import keep_previous, remove_partial_files
from segformer_pl.callbacks.checkpoint_io import is_local
from segformer_pl.callbacks.signals import StopOnSignal
from segformer_pl.errors import UserError
from segformer_pl.lightning_workarounds import is_accumulating, run_missed_validation


def best_checkpoint(folder: Path | None) -> ModelCheckpoint:
    """Return a callback that keeps the checkpoint with the best mIoU of a validation.

    Args:
        folder: Folder of ``best.ckpt``. Default: ``checkpoints`` in the run folder.
    """
    return ModelCheckpoint(
        folder, filename="best", monitor="val/miou", mode="max", enable_version_counter=False
    )


class LastCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt`` every few steps and at the end of the training.

    Lightning's default writes at the end of an epoch, and a stream has no epochs. The checkpoint is
    also written when a signal ends the run, and before and after every validation. So an
    interrupted validation loses no training step and is repeated when the run is resumed.

    The checkpoint before it stays as ``last.ckpt.1``, the one before that as ``last.ckpt.2``. A
    training that is resumed from a damaged ``last.ckpt`` takes the newest of them that is intact.

    Args:
        every_n_train_steps: Optimiser steps between two checkpoints.
        dirpath: Folder of the checkpoint. Default: ``checkpoints`` in the run folder.
        keep: Number of checkpoints on the disk, ``last.ckpt`` included. At a remote path, such as
            ``s3://``, there is only ``last.ckpt``.
    """

    def __init__(
        self,
        every_n_train_steps: PositiveInt = 100,
        dirpath: Path | None = None,
        keep: PositiveInt = 2,
    ) -> None:
        self.keep = keep
        self._validated_step: int | None = None
        super().__init__(
            dirpath=dirpath,
            filename="last",
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    @property
    def file(self) -> Path:
        """The checkpoint file; known once the trainer has set up this callback."""
        assert self.dirpath is not None
        return Path(self.dirpath) / "last.ckpt"

    @property
    def has_saved(self) -> bool:
        """Whether this run saved the checkpoint, or was resumed from it."""
        return self._last_global_step_saved != 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.strategy.broadcast(trainer.ckpt_path) != trainer.ckpt_path:
            raise UserError(
                f"rank {trainer.global_rank} continues from {trainer.ckpt_path or 'no checkpoint'} "
                "and rank 0 does not; give all ranks the same ckpt_path or run_name, on a disk "
                "that all nodes share"
            )
        if trainer.is_global_zero:
            # This run is the only writer of these folders, so partial files are from a killed run.
            for callback in trainer.checkpoint_callbacks:
                folder = getattr(callback, "dirpath", None)
                if folder and is_local(folder):
                    remove_partial_files(folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if (step := trainer.strategy.broadcast(trainer.global_step)) != trainer.global_step:
            raise UserError(
                f"rank {trainer.global_rank} has read step {trainer.global_step} from "
                f"{trainer.ckpt_path!r} and rank 0 step {step}, so their nodes see different "
                "files; put it on a disk that all nodes share, or start again after a minute"
            )
        if not trainer.fit_loop.epoch_loop.restarting:
            return
        self._last_global_step_saved = trainer.global_step  # the loaded one
        if self._validated_step != trainer.global_step:
            run_missed_validation(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, *arguments)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, StopOnSignal) and callback.stopping for callback in callbacks):
            self._save_once(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_once(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Set it before other callbacks save checkpoints, so that these contain it too.
        if not trainer.sanity_checking and not is_accumulating(trainer):
            self._validated_step = trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Save again, since the validation has changed the state of other callbacks, such as which
        # checkpoint is the best.
        self._last_global_step_saved = -1
        self._save_once(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_once(trainer)

    def _save_once(self, trainer: pl.Trainer) -> None:
        # Neither before the first step, nor in a validation outside of a training.
        fitting = trainer.state.fn == TrainerFn.FITTING and trainer.global_step
        if fitting and not self._should_skip_saving_checkpoint(trainer):
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        is_writer = trainer.is_global_zero and is_local(filepath)
        with keep_previous(filepath, self.keep - 1) if is_writer else nullcontext():
            super()._save_checkpoint(trainer, filepath)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"validated_step": self._validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Ignore the stored paths, since a resumed run can have another folder.
        self._validated_step = state_dict.get("validated_step")
