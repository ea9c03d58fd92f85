"""What Lightning 2.6 has no public way for, each with its reason.

Nothing else in the package reads or overrides a private name of Lightning, except where a class of
ours derives from one of its classes (:class:`~segformer_pl.callbacks.LastCheckpoint`). When a new
version of Lightning breaks something, it breaks here.
"""

import signal
import traceback
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector


class SettingsWinCLI(LightningCLI):
    """A LightningCLI whose settings stay as they are when a checkpoint is given.

    Lightning lets the checkpoint's hyperparameters override the configuration files and the command
    line, without a word. No argument turns that off.
    """

    def _parse_ckpt_path(self) -> None:
        pass


class SignalHandlers(_SignalConnector):
    """Lightning's signal handlers, except that they do nothing but call two functions.

    Lightning's handler for SIGTERM talks to the other ranks inside the handler, lets the run end
    with status 0 in the middle of a step, and swallows the signal outside of a training. Its
    handler for SLURM's signal saves wherever the training happens to be. The trainer takes no
    other handlers than those of its connector.

    Args:
        trainer: Trainer whose handlers these become.
        stop: Called with the number of SIGTERM or SIGINT.
        requeue: Called with the number of SLURM's signal.
    """

    def __init__(
        self, trainer: pl.Trainer, stop: Callable[[int], None], requeue: Callable[[int], None]
    ) -> None:
        super().__init__(trainer)
        self._stop = stop
        self._requeue = requeue
        trainer._signal_connector = self

    def register_signal_handlers(self) -> None:
        super().register_signal_handlers()
        # A process in the background of a script ignores Ctrl-C, and goes on doing so.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._register_signal(signal.SIGINT, self._sigterm_notifier_fn)

    def _sigterm_notifier_fn(self, signum: Any, _: Any) -> None:
        self._stop(int(signum))

    def _slurm_sigusr_handler_fn(self, signum: Any, _: Any) -> None:
        self._requeue(int(signum))

    def save_and_requeue(self, signum: int) -> None:
        """Save for the requeued job and requeue this one, as Lightning does; on all ranks."""
        super()._slurm_sigusr_handler_fn(signum, None)  # type: ignore[arg-type]


def replaces_samplers(trainer: pl.Trainer) -> bool:
    """Whether the trainer puts a ``DistributedSampler`` in place of the data loaders' samplers.

    The trainer keeps ``use_distributed_sampler`` nowhere public.
    """
    return trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler


def synchronizes_batch_norm(trainer: pl.Trainer) -> bool:
    """Whether BatchNorm takes its statistics over all ranks (``sync_batchnorm``).

    The trainer keeps the argument nowhere but in its strategy, under a private name.
    """
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether the gradients of the batches so far still wait for the rest of their step.

    The rules (``accumulate_grad_batches``, the end of an epoch, strategies that accumulate
    themselves) have no public name.
    """
    return trainer.fit_loop._should_accumulate()


def is_end_of_epoch(trainer: pl.Trainer) -> bool:
    """Whether the training part of an epoch, or of the run, has no batch left."""
    return trainer.fit_loop.epoch_loop._is_training_done


def run_missed_validation(trainer: pl.Trainer) -> None:
    """Run the validation that is due after the step that a resumed training stands at, if any.

    A run that was interrupted in its validation has made the step, so the resumed trainer goes on
    with the next step and leaves the validation out. It has no method that validates in a training.
    """
    loop = trainer.fit_loop.epoch_loop
    assert trainer.fit_loop._data_fetcher is not None
    if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
        trainer.validating = True
        loop.val_loop.restarting = False
        loop.val_loop.run()
        trainer.training = True


def set_batches_that_stepped(trainer: pl.Trainer, number: int) -> None:
    """Set the count of optimiser steps that loggers receive as ``step``.

    It is restored from the checkpoint, where it may include a step that was never completed.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = number


def came_from_restoring(error: BaseException) -> bool:
    """Whether an exception arose while the trainer restored a checkpoint.

    Lightning takes a checkpoint apart without looking at its parts first, so a part that does not
    fit raises anything from anywhere below. Nor does it wrap the exception, and no pair of hooks
    encloses the restoring alone. What remains is to ask the frames of the traceback.
    """
    return any(
        isinstance(frame.f_locals.get("self"), _CheckpointConnector)
        and frame.f_code.co_name.lstrip("_").startswith(("restore", "resume"))
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
