"""SIGTERM, Ctrl-C and Slurm's signal: end a training after a complete step, to be resumed."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from segformer_pl.errors import Diverged, Interrupted, LostRank, UserError
from segformer_pl.lightning_workarounds import SignalHandlers, is_accumulating, is_end_of_epoch
from segformer_pl.worker_errors import explain_worker_failure, wait_for_cause


class StopOnSignal(pl.Callback):
    """Ends ``fit`` after the step in which any rank receives SIGTERM, Ctrl-C or SIGUSR1.

    The signal handler only stores the signal. After every optimiser step, the ranks take the
    maximum of their stored signals, so all ranks end after the same step::

        rank 0     step 7     max(0, 0) = 0      step 8              max(0, 15) = 15     end
        rank 1     step 7     max(0, 0) = 0      step 8, SIGTERM     max(0, 15) = 15     end

    In a validation, they exchange signals before every batch that all ranks have.
    :class:`~segformer_pl.callbacks.LastCheckpoint` then saves, and the exit status is 143
    (SIGTERM), 130 (Ctrl-C) or 138 (SIGUSR1). A single rank ends at once before the first step, and
    any number of ranks on a second Ctrl-C.

    SIGUSR1 is what ``sbatch --signal=USR1@120`` sends before the time limit. The job is then
    requeued, if its command resumes by itself; otherwise the last line of output is the command
    that resumes. In the validation after the last step the signal is ignored, since nothing would
    be left to train.

    Args:
        command: Command line of this run, from which the command that resumes it is made.
        resumes_by_itself: Whether the same command line continues the run.

    Attributes:
        stopping: Number of the signal once all ranks have exchanged it; 0 before.
        begun: Whether the first step has begun.
        is_announced: Whether a line of output confirms a signal.
    """

    def __init__(self, command: list[str], resumes_by_itself: bool = False) -> None:
        self.command = command
        self.resumes_by_itself = resumes_by_itself
        self.stopping = 0
        self._received = 0  # signal received by this rank
        self.begun = False
        self.is_announced = True
        self._num_common_batches = 0

    def attach(self, trainer: pl.Trainer) -> None:
        """Insert this as the first callback of a trainer and install its signal handlers."""
        trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]
        # Launchers that spawn processes pickle the trainer, and a lambda cannot be pickled.
        self._handlers = SignalHandlers(trainer, stop=partial(self.receive, trainer))

    def receive(self, trainer: pl.Trainer, signum: int) -> None:
        """Handle SIGTERM, SIGINT or SIGUSR1."""
        is_fit = trainer.state.fn == TrainerFn.FITTING
        if not is_fit and signum not in (signal.SIGTERM, signal.SIGINT):
            return  # the rest of an evaluation may take less time than is left
        # Of several ranks, one that ended at once would leave the others waiting for it.
        if not is_fit or (not self.begun and trainer.world_size == 1):
            _signal_children(trainer, signum)
            raise self._interrupted(trainer, signum, _nothing_trained(signum, is_fit))
        if self._received and signum == signal.SIGINT:
            _signal_children(trainer, signal.SIGKILL)
            os._exit(128 + signum)
        if not self._received:
            self._received = signum
            if trainer.is_global_zero and self.is_announced:
                note = (
                    f"\n{signal_name(signum)}: stopping after this step; Ctrl-C now stops at once\n"
                )
                os.write(2, note.encode())  # buffered writes are not safe in a signal handler

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begun, self._received, self.stopping = False, 0, 0

    def on_train_batch_start(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if not self.begun:
            self._exchange(trainer)
        self._act(trainer)
        self.begun = True

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if not is_accumulating(trainer):
            self._exchange(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_fit = trainer.state.fn == TrainerFn.FITTING
        self._num_common_batches = _num_common_batches(trainer) if is_fit else 0

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx < self._num_common_batches:
            self._exchange(trainer)
            self._act(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Add the command that resumes the run to an error such as a full disk or a bad image."""
        wait_for_cause(exception)
        is_outside = (
            isinstance(exception, OSError)
            or explain_worker_failure(exception)
            or (isinstance(exception, UserError) and not isinstance(exception, Diverged | LostRank))
        )
        if is_outside and (how := self.how_to_resume(trainer)) is not None:
            exception.add_note(f"then {how}")

    def how_to_resume(self, trainer: pl.Trainer) -> str | None:
        """Return ``resume with`` and the command; None if this run has no checkpoint yet."""
        callbacks: list[Any] = trainer.checkpoint_callbacks
        if trainer.state.fn == TrainerFn.FITTING:
            for callback in callbacks:
                # The file could also be from an earlier run in the same folder.
                if getattr(callback, "has_saved", False) and callback.file.exists():
                    if self.resumes_by_itself:
                        return "resume with the same command"
                    command = _without(self.command, "--ckpt_path")
                    command.append(f"--ckpt_path={callback.file}")
                    return f"resume with\n{shlex.join(command)}"
        return None

    def _exchange(self, trainer: pl.Trainer) -> None:
        """Take the signals that any rank has received. Call it on all ranks."""
        self.stopping = self._received
        if trainer.world_size > 1:
            stopping = torch.tensor(self.stopping, device=trainer.strategy.root_device)
            dist.all_reduce(stopping, dist.ReduceOp.MAX)
            self.stopping = int(stopping)
        if self.stopping not in (0, signal.SIGTERM, signal.SIGINT) and _is_last_step(trainer):
            self.stopping = self._received = 0

    def _act(self, trainer: pl.Trainer) -> None:
        if self.stopping:
            raise self._interrupted(trainer, self.stopping, self._where_it_stopped(trainer))

    def _interrupted(self, trainer: pl.Trainer, signum: int, message: str) -> Interrupted:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if not trainer.is_global_zero:
            # torchrun restarts ranks that failed. But `srun --kill-on-bad-exit` and Lightning kill
            # rank 0, which has not ended yet, if another rank fails.
            is_elastic = isinstance(environment, TorchElasticEnvironment)
            return Interrupted(128 + signum if is_elastic else 0)
        is_requeued = self.resumes_by_itself and signum not in (signal.SIGTERM, signal.SIGINT)
        return Interrupted(128 + signum, message, _slurm_job() if is_requeued else None)

    def _where_it_stopped(self, trainer: pl.Trainer) -> str:
        stopped = f"{signal_name(self.stopping)}: stopped after step {trainer.global_step}"
        callbacks = trainer.checkpoint_callbacks
        files = [callback.file for callback in callbacks if hasattr(callback, "file")]
        if not files:
            return f"{stopped}; nothing was saved, trainer.enable_checkpointing is false"
        # A resumed run that made no step has saved nothing: resume from the same file again.
        saved = files[0] if files[0].exists() else trainer.ckpt_path
        if saved is None:
            return _nothing_trained(self.stopping)
        command, how = _without(self.command, "--ckpt_path"), "resume with"
        if _is_last_step(trainer):
            how = "all steps are done, evaluate with"
            command = ["validate" if argument == "fit" else argument for argument in command]
            command = _without(command, "--run_name")  # the name of a training
        elif self.resumes_by_itself:
            return f"{stopped}, saved in {saved}; the same command resumes"
        command.append(f"--ckpt_path={saved}")
        return f"{stopped}, saved in {saved}; {how}\n{shlex.join(command)}"


def requeue(job: str) -> str | None:
    """Requeue a job of Slurm, which ends all its processes; -> why that failed, or None."""
    if shutil.which("scontrol") is None:
        return "there is no scontrol here, so the batch script has to do it"
    try:
        command = ["scontrol", "requeue", job]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else " ".join(done.stderr.split())


def _slurm_job() -> str | None:
    """Return the id by which Slurm requeues this job; None outside of one."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        # The job id of one of the tasks is that of the whole array.
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def _nothing_trained(signum: int, is_fit: bool = True) -> str:
    return f"{signal_name(signum)}: stopped{', nothing was trained' if is_fit else ''}"


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


def signal_name(signum: int) -> str:
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def _without(arguments: list[str], option: str) -> list[str]:
    """Return a command line without ``--option VALUE`` and ``--option=VALUE``."""
    pairs = zip(["", *arguments], arguments)
    return [
        argument
        for before, argument in pairs
        if option not in (before, argument) and not argument.startswith(f"{option}=")
    ]
