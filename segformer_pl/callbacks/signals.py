"""SIGTERM and Ctrl-C: end a training after a complete step, and print how to resume it."""

import os
import shlex
import signal
import sys
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from segformer_pl.lightning_workarounds import SignalHandlers, is_accumulating, is_end_of_epoch


class Interrupted(SystemExit):
    """Raised to end the run after a signal.

    Args:
        code: Exit status, usually 128 + signal number.
        message: Last message to the user; may be empty.
    """

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(code)
        self.message = message


class StopOnSignal(pl.Callback):
    """Ends ``fit`` after the step in which any rank receives SIGTERM or Ctrl-C.

    The signal handler only stores the signal. After every optimiser step, the ranks take the
    maximum of their stored signals, so all ranks end after the same step::

        rank 0     step 7     max(0, 0) = 0      step 8              max(0, 15) = 15     end
        rank 1     step 7     max(0, 0) = 0      step 8, SIGTERM     max(0, 15) = 15     end

    In a validation, they exchange signals before every batch that all ranks have.
    :class:`~segformer_pl.callbacks.LastCheckpoint` then saves, the exit status is 143 (SIGTERM) or
    130 (Ctrl-C), and the last line of output is the command that resumes the run. Before the first
    step, and on a second Ctrl-C, the run ends at once.

    Args:
        command: Command line of this run, from which the command that resumes it is made.

    Attributes:
        stopping: Number of the signal once all ranks have exchanged it; 0 before.
        begun: Whether the first step has begun.
        is_announced: Whether a line of output confirms a signal.
    """

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.stopping = 0
        self._received = 0  # signal received by this rank
        self._requeue = 0  # SLURM's signal received by this rank
        self._requeuing = 0  # SLURM's signal received by any rank
        self.begun = False
        self.is_announced = True
        self._num_common_batches = 0

    def attach(self, trainer: pl.Trainer) -> None:
        """Insert this as the first callback of a trainer and install its signal handlers."""
        trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]
        # Launchers that spawn processes pickle the trainer, and a lambda cannot be pickled.
        receive = partial(self.receive, trainer)
        self._handlers = SignalHandlers(trainer, stop=receive, requeue=self._note_requeue)

    def _note_requeue(self, signum: int) -> None:
        self._requeue = signum

    def receive(self, trainer: pl.Trainer, signum: int) -> None:
        """Handle SIGTERM or SIGINT."""
        if trainer.state.fn != TrainerFn.FITTING or not self.begun:
            _signal_children(trainer, signum)
            nothing = ", nothing was trained" if trainer.state.fn == TrainerFn.FITTING else ""
            raise _interrupted(trainer, signum, f"{_name(signum)}: stopped{nothing}")
        if self._received and signum == signal.SIGINT:
            _signal_children(trainer, signal.SIGKILL)
            os._exit(128 + signum)
        if not self._received:
            self._received = signum
            if trainer.is_global_zero and self.is_announced:
                note = f"\n{_name(signum)}: stopping after this step; Ctrl-C now stops at once\n"
                os.write(2, note.encode())  # buffered writes are not safe in a signal handler

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begun, self._received, self.stopping = False, 0, 0

    def on_train_batch_start(self, trainer: pl.Trainer, *arguments: Any) -> None:
        self._act(trainer)
        self.begun = True

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if not is_accumulating(trainer):
            self._exchange(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._num_common_batches = _num_common_batches(trainer) if self.begun else 0

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.begun and batch_idx < self._num_common_batches:
            self._exchange(trainer)
            self._act(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Add the command that resumes the run to an error such as that of a full disk."""
        if isinstance(exception, OSError) and (how := self.how_to_resume(trainer)) is not None:
            exception.add_note(f"then {how}")

    def how_to_resume(self, trainer: pl.Trainer) -> str | None:
        """Return ``resume with`` and the command; None if this run has no checkpoint yet."""
        callbacks: list[Any] = trainer.checkpoint_callbacks
        if trainer.state.fn == TrainerFn.FITTING:
            for callback in callbacks:
                # The file could also be from an earlier run in the same folder.
                if getattr(callback, "has_saved", False) and callback.file.exists():
                    command = [*_without_ckpt_path(self.command), f"--ckpt_path={callback.file}"]
                    return f"resume with\n{shlex.join(command)}"
        return None

    def _exchange(self, trainer: pl.Trainer) -> None:
        """Take the signals that any rank has received. Call it on all ranks."""
        self.stopping, self._requeuing = self._received, self._requeue
        if trainer.world_size > 1:
            signals = torch.tensor(
                [self.stopping, self._requeuing], device=trainer.strategy.root_device
            )
            dist.all_reduce(signals, dist.ReduceOp.MAX)
            self.stopping, self._requeuing = signals.tolist()

    def _act(self, trainer: pl.Trainer) -> None:
        if self._requeuing:
            self._handlers.save_and_requeue(self._requeuing)
            self._requeuing = self._requeue = 0
        if self.stopping:
            raise _interrupted(trainer, self.stopping, self._where_it_stopped(trainer))

    def _where_it_stopped(self, trainer: pl.Trainer) -> str:
        stopped = f"{_name(self.stopping)}: stopped after step {trainer.global_step}"
        callbacks = trainer.checkpoint_callbacks
        files = [callback.file for callback in callbacks if hasattr(callback, "file")]
        if not files:
            return f"{stopped}; nothing was saved, trainer.enable_checkpointing is false"
        # A resumed run that made no step has saved nothing: resume from the same file again.
        saved = files[0] if files[0].exists() else trainer.ckpt_path
        command, how = _without_ckpt_path(self.command), "resume with"
        if _is_last_step(trainer):
            how = "all steps are done, evaluate with"
            command = ["validate" if argument == "fit" else argument for argument in command]
        command.append(f"--ckpt_path={saved}")
        return f"{stopped}, saved in {saved}; {how}\n{shlex.join(command)}"


def _is_last_step(trainer: pl.Trainer) -> bool:
    """Return whether no step follows, by ``max_steps`` or, with ``max_epochs``, by epochs."""
    is_last_epoch = trainer.max_epochs is not None and 0 < trainer.max_epochs <= (
        trainer.current_epoch + 1
    )
    has_all_steps = 0 <= trainer.max_steps <= trainer.global_step
    return has_all_steps or (is_last_epoch and is_end_of_epoch(trainer))


def _num_common_batches(trainer: pl.Trainer) -> int:
    """Return the number of validation batches that every rank has; 0 if it is unknown."""
    if trainer.world_size == 1:
        return sys.maxsize
    loader, num = trainer.val_dataloaders, 0
    if isinstance(loader, DataLoader) and loader.batch_sampler is not None:
        num = int(min(sum(1 for _ in loader.batch_sampler), trainer.num_val_batches[0]))
    common = torch.tensor(num, device=trainer.strategy.root_device)
    dist.all_reduce(common, dist.ReduceOp.MIN)
    return int(common)


def _signal_children(trainer: pl.Trainer, signum: int) -> None:
    """Send a signal to the ranks that this process has started."""
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signum)


def _interrupted(trainer: pl.Trainer, signum: int, message: str) -> Interrupted:
    if trainer.is_global_zero:
        return Interrupted(128 + signum, message)
    environment = getattr(trainer.strategy, "cluster_environment", None)
    external = environment is not None and environment.creates_processes_externally
    # If a process that rank 0 started exits with an error, Lightning kills rank 0 before it has
    # ended by itself. So these processes exit with 0.
    return Interrupted(128 + signum if external else 0)


def _name(signum: int) -> str:
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def _without_ckpt_path(arguments: list[str]) -> list[str]:
    """Return a command line without ``--ckpt_path FILE`` and ``--ckpt_path=FILE``."""
    pairs = zip(["", *arguments], arguments)
    return [
        argument
        for before, argument in pairs
        if "--ckpt_path" not in (before, argument) and not argument.startswith("--ckpt_path=")
    ]
