"""Uses of private names of Lightning 2.6, each with its reason.

Other modules use private names of Lightning only in subclasses of its classes: ``LastCheckpoint``,
``RunLogger``, ``SegmentationTask`` and ``StepProgressBar``. So a new version of Lightning breaks
these and this file first.
"""

import logging
import signal
import subprocess
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

# Beginnings of messages of Lightning that tell a user of this package nothing: an advertisement, a
# device that was not asked for, the reason of every regular end.
NOISE = ("💡 Tip:", "TPU available: False", "`Trainer.fit` stopped: `max_steps=")


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)


def silence_noise() -> None:
    """Leave out messages and warnings of Lightning that a user can do nothing about."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_noise)
    # Lightning 2.6 uses names that torch 2.15 has deprecated.
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", module="lightning")
    # That of a resumed run is never empty, and that of an evaluation is another one.
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", "The dirpath has changed from")


class SettingsWinCLI(LightningCLI):
    """A LightningCLI whose settings are not changed by a checkpoint.

    Lightning silently overrides configuration files and command line with the hyperparameters of
    the checkpoint. No argument turns that off.
    """

    def _parse_ckpt_path(self) -> None:
        pass


class SignalHandlers(_SignalConnector):
    """Signal handlers for a trainer that only call one function.

    Lightning's handler for SIGTERM communicates with the other ranks inside the handler, ends the
    run with status 0 in the middle of a step, and ignores the signal outside of a training. Its
    handler for Slurm's signal, SIGUSR1 by default, saves and requeues in the middle of a step, also
    in the data-loader workers. The trainer accepts handlers only through its signal connector.

    Args:
        trainer: Trainer to install the handlers in.
        stop: Function that receives the number of SIGTERM, SIGINT or Slurm's signal.
    """

    def __init__(self, trainer: pl.Trainer, stop: Callable[[int], None]) -> None:
        super().__init__(trainer)
        self._stop = stop
        trainer._signal_connector = self

    def register_signal_handlers(self) -> None:
        super().register_signal_handlers()
        # A shell makes background processes ignore Ctrl-C; leave that as it is.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._register_signal(signal.SIGINT, self._sigterm_notifier_fn)
        # Other schedulers and torchrun send it too, and without a handler it kills.
        usr1 = getattr(signal, "SIGUSR1", None)
        if usr1 is not None and not self._has_already_handler(usr1):
            self._register_signal(usr1, self._sigterm_notifier_fn)

    def _sigterm_notifier_fn(self, signum: Any, _: Any) -> None:
        self._stop(int(signum))

    def _slurm_sigusr_handler_fn(self, signum: Any, _: Any) -> None:
        self._stop(int(signum))


class _OwnCheckpoints(_CheckpointConnector):
    _hpc_resume_path = None


def ignore_checkpoints_of_other_jobs(trainer: pl.Trainer) -> None:
    """Load no checkpoint but that of ``ckpt_path``.

    In a job of Slurm without ``ckpt_path``, Lightning loads the newest ``hpc_ckpt_*.ckpt`` in
    ``trainer.default_root_dir``, which all tasks of an array and all experiments share.
    """
    trainer._checkpoint_connector = _OwnCheckpoints(trainer)


def replaces_samplers(trainer: pl.Trainer) -> bool:
    """Return whether the trainer replaces the samplers by ``DistributedSampler``.

    ``use_distributed_sampler`` is not a public attribute of the trainer.
    """
    return trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler


def synchronizes_batch_norm(trainer: pl.Trainer) -> bool:
    """Return whether BatchNorm computes its statistics over all ranks (``sync_batchnorm``).

    The argument is stored only in the strategy, under a private name.
    """
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def turn_off_synchronized_batch_norm(trainer: pl.Trainer) -> None:
    """Train with plain BatchNorm, as without ``sync_batchnorm``."""
    trainer.strategy._layer_sync = None  # type: ignore[attr-defined]


def take_child_processes(trainer: pl.Trainer) -> list[subprocess.Popen[bytes]]:
    """Return the processes of ranks 1, 2, ... that rank 0 has started, and observe them no longer.

    Lightning's observer kills rank 0 by SIGKILL up to five seconds after another rank has failed,
    and so before rank 0 has written why. It holds the launcher's list of processes.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return []
    processes = list(launcher.procs)
    launcher.procs.clear()  # the observer ends, as there is nothing left to observe
    launcher.procs = processes  # for signals to the processes
    return list(processes)


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Return whether more batches follow before the next optimiser step.

    The rules (``accumulate_grad_batches``, the end of an epoch, strategies that accumulate
    themselves) are in a private method.
    """
    return trainer.fit_loop._should_accumulate()


def is_end_of_epoch(trainer: pl.Trainer) -> bool:
    """Return whether the training part of an epoch, or of the run, has no batch left."""
    return trainer.fit_loop.epoch_loop._is_training_done


def run_missed_validation(trainer: pl.Trainer) -> None:
    """Run the validation that is due at the step of a resumed training, if one is.

    A run that is interrupted in a validation has completed the step before it, so the resumed
    trainer would continue with the next step and skip the validation. It has no public method that
    validates within a training.
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

    The count restored from a checkpoint can include a step that was not completed.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = number


def came_from_restoring(error: BaseException) -> bool:
    """Return whether an exception was raised while the trainer restored a checkpoint.

    Lightning does not validate a checkpoint, so parts that do not fit raise exceptions of any type.
    It does not wrap them, and no pair of hooks encloses the restoring. So search the frames of the
    traceback for Lightning's restoring methods.
    """
    return any(
        isinstance(frame.f_locals.get("self"), _CheckpointConnector)
        and frame.f_code.co_name.lstrip("_").startswith(("restore", "resume"))
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
