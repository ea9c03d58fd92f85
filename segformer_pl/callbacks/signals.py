"""What SIGTERM and Ctrl-C do to a run: it ends after a whole step and says how to go on."""

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
    """A signal ended the run; the exit status is 128 and the signal's number.

    Args:
        code: The exit status.
        message: What the user must read last, or nothing.
    """

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(code)
        self.message = message


class StopOnSignal(pl.Callback):
    """Ends ``fit`` after the step in which SIGTERM or Ctrl-C arrives at any of its ranks.

    The handler only takes a note. After every optimiser step the ranks compare their notes, so
    that all of them end after the same one; in a validation they do so before every batch that
    all of them have. :class:`~segformer_pl.callbacks.LastCheckpoint` saves, the exit status is 143
    or 130, and the last line is the command that goes on. Before the first step, and on a second
    Ctrl-C, the run ends at once.

    Args:
        command: The command line of this run, to be told with the checkpoint to resume from.

    Attributes:
        stopping: The signal, once all ranks know of it; 0 before.
        begun: Whether a first step was begun.
    """

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.stopping = 0
        self._received = 0  # by this rank
        self._requeue = 0  # by this rank; SLURM's signal, if it was received
        self._requeuing = 0  # all ranks know of it
        self.begun = False
        self._num_common_batches = 0

    def attach(self, trainer: pl.Trainer) -> None:
        """Be the first callback of a trainer, and receive its signals."""
        trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]
        # A partial, since launchers that spawn processes pickle the trainer.
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
            if trainer.is_global_zero:
                note = f"\n{_name(signum)}: stopping after this step; Ctrl-C now stops at once\n"
                os.write(2, note.encode())  # Python's buffers are not for handlers

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begun, self._received, self.stopping = False, 0, 0

    def on_train_batch_start(self, trainer: pl.Trainer, *arguments: Any) -> None:
        self._act(trainer)
        self.begun = True

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if not is_accumulating(trainer):
            self._compare(trainer)

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
            self._compare(trainer)
            self._act(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """A disk that is full costs no more than the steps since the last checkpoint; say so."""
        if not isinstance(exception, OSError) or trainer.state.fn != TrainerFn.FITTING:
            return
        callbacks: list[Any] = trainer.checkpoint_callbacks
        for callback in callbacks:
            # Not one that another run left in the same place.
            if getattr(callback, "has_saved", False) and callback.file.exists():
                command = [*_without_ckpt_path(self.command), f"--ckpt_path={callback.file}"]
                exception.add_note(f"then go on with\n{shlex.join(command)}")
                return

    def _compare(self, trainer: pl.Trainer) -> None:
        """Learn of the signals that any rank received; on all ranks."""
        self.stopping, self._requeuing = self._received, self._requeue
        if trainer.world_size > 1:
            notes = torch.tensor(
                [self.stopping, self._requeuing], device=trainer.strategy.root_device
            )
            dist.all_reduce(notes, dist.ReduceOp.MAX)
            self.stopping, self._requeuing = notes.tolist()

    def _act(self, trainer: pl.Trainer) -> None:
        if self._requeuing:
            self._handlers.save_and_requeue(self._requeuing)
            self._requeuing = self._requeue = 0
        if self.stopping:
            raise _interrupted(trainer, self.stopping, self._how_to_go_on(trainer))

    def _how_to_go_on(self, trainer: pl.Trainer) -> str:
        stopped = f"{_name(self.stopping)}: stopped after step {trainer.global_step}"
        files = [one.file for one in trainer.checkpoint_callbacks if hasattr(one, "file")]
        if not files:
            return f"{stopped}; nothing was saved, trainer.enable_checkpointing is false"
        # A resumed run that made no step has saved none: what it was resumed from holds.
        saved = files[0] if files[0].exists() else trainer.ckpt_path
        command, how = _without_ckpt_path(self.command), "go on with"
        if _is_last_step(trainer):
            how = "all steps were made, score them with"
            command = ["validate" if argument == "fit" else argument for argument in command]
        command.append(f"--ckpt_path={saved}")
        return f"{stopped}, saved in {saved}; {how}\n{shlex.join(command)}"


def _is_last_step(trainer: pl.Trainer) -> bool:
    """Whether no step follows. Where batches are counted, an epoch can end before that."""
    is_last_epoch = trainer.max_epochs is not None and 0 < trainer.max_epochs <= (
        trainer.current_epoch + 1
    )
    has_all_steps = 0 <= trainer.max_steps <= trainer.global_step
    return has_all_steps or (is_last_epoch and is_end_of_epoch(trainer))


def _num_common_batches(trainer: pl.Trainer) -> int:
    """Batches of the validation that every rank has; 0 if that cannot be told beforehand."""
    if trainer.world_size == 1:
        return sys.maxsize
    loader, num = trainer.val_dataloaders, 0
    if isinstance(loader, DataLoader) and loader.batch_sampler is not None:
        num = int(min(sum(1 for _ in loader.batch_sampler), trainer.num_val_batches[0]))
    common = torch.tensor(num, device=trainer.strategy.root_device)
    dist.all_reduce(common, dist.ReduceOp.MIN)
    return int(common)


def _signal_children(trainer: pl.Trainer, signum: int) -> None:
    """To the ranks that this process started."""
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signum)


def _interrupted(trainer: pl.Trainer, signum: int, message: str) -> Interrupted:
    if trainer.is_global_zero:
        return Interrupted(128 + signum, message)
    environment = getattr(trainer.strategy, "cluster_environment", None)
    external = environment is not None and environment.creates_processes_externally
    # Rank 0 is killed if a process that it started fails before it has ended itself.
    return Interrupted(128 + signum if external else 0)


def _name(signum: int) -> str:
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def _without_ckpt_path(arguments: list[str]) -> list[str]:
    pairs = zip(["", *arguments], arguments)
    return [
        argument
        for before, argument in pairs
        if "--ckpt_path" not in (before, argument) and not argument.startswith("--ckpt_path=")
    ]
