"""A rank that fails or hangs ends all others, with a sentence that names it."""

import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from jsonargparse.typing import NonNegativeFloat
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from segformer_pl.callbacks.hangs import Lines, describe_hang, position_of
from segformer_pl.callbacks.rank_status import (
    Failure,
    RankStatus,
    ServerAddress,
    StatusClient,
    StatusServer,
    end_of,
)
from segformer_pl.callbacks.signals import StopOnSignal
from segformer_pl.errors import LostRank, find_user_error
from segformer_pl.lightning_workarounds import take_child_processes
from segformer_pl.worker_errors import explain_worker_failure

INTERVAL = 1.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one; a thread of its own sends them, so long steps do not delay it
GRACE = 10  # intervals that a rank has to end by itself once another one has failed
# Intervals that a process has to close its connections after an error. NCCL can wait without end
# for operations of a rank that is gone.
FAREWELL = 300

BEGIN = "before the first step"
COMMUNICATION_ERROR = re.compile(r"\bgloo\b|nccl", re.IGNORECASE)
MAX_MESSAGE = 300  # characters


class RankWatchdog(pl.Callback):
    """Ends all ranks when one of them fails or hangs, with a sentence that names it.

    ===============================================  ==========================================
    what happens to a rank                           when the others are told
    ===============================================  ==========================================
    it raises an exception                           at once
    it is killed, for example for lack of memory     at once
    it is stopped, or its machine cannot be reached  after 60 s, or ``timeout`` if that is less
    it hangs, so that all ranks stand still          after ``timeout``
    ===============================================  ==========================================

    They end by themselves if they can: between two batches, or when gloo reports the lost
    connection. 10 s later they are ended, which is the rule with NCCL, whose collectives cannot be
    interrupted. Without the watchdog they wait in a collective for 30 minutes, the timeout of the
    process group, or end with an error of the network that names no rank.

    The command line attaches the callback to every run of several ranks. Training is not slowed
    down: a thread of each rank sends a sign of life to rank 0 every second (:mod:`.rank_status`),
    and samples where the main thread stands. ``torch.distributed.monitored_barrier`` would stop all
    ranks in every step instead.

    A rank hangs only if the main threads of all ranks stay in the same lines of code. One that
    validates, draws figures or compiles moves, so the others may wait for it. The rank to blame is
    the one that loads data or computes while others communicate; it prints its stack.

    The timeouts of the collectives stay as they are; ``DDPStrategy(timeout=...)`` sets them.

    Args:
        timeout: Seconds for which all main threads may stand still. With 0, a rank may hang or be
            stopped for any time, as in a debugger; one that raises or is killed ends the others.
    """

    def __init__(self, timeout: NonNegativeFloat = 600.0) -> None:
        self.timeout = float(timeout)
        self.interval = min(INTERVAL, self.timeout / 10 or INTERVAL)
        self.silence = min(SILENCE, self.timeout) if self.timeout else math.inf
        self._server: StatusServer | None = None
        self._client: StatusClient | None = None
        self._children: list[subprocess.Popen[bytes]] = []  # ranks that this process has started
        self._moment = BEGIN
        self._lines: Lines = ()
        self._still = 0.0
        self._is_leaving = False
        self._is_printed = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
            return
        self._trainer = trainer
        self._rank, self._local_rank = trainer.global_rank, trainer.local_rank
        self._name = f"rank {self._rank} (process {os.getpid()} on {socket.gethostname()})"
        self._moment, self._is_leaving, self._is_printed = BEGIN, False, False
        self._main_thread = threading.get_ident()
        self._printing = threading.Lock()  # not in __init__, as spawned processes unpickle this
        address = None
        if trainer.is_global_zero:
            self._children = take_child_processes(trainer)
            self._server = StatusServer(
                self.interval, self.silence, self._find_hang, self._describe_end
            )
            self._server.start()
            host = trainer.strategy.cluster_environment.main_address  # type: ignore[attr-defined]
            address = ServerAddress(host, self._server.port, self._server.token, self._name)
        address = trainer.strategy.broadcast(address)
        assert address is not None
        reason = None
        try:
            arguments = (address, self._rank, self.interval, self.silence)
            self._client = StatusClient(*arguments, self._status, self._on_failure)
        except OSError as error:
            reason = str(error)
        # All ranks or none: one that is not watched would be taken for lost.
        if trainer.strategy.reduce_boolean_decision(reason is None):
            assert self._client is not None
            self._client.start()
            return
        rank_zero_warn(
            f"the ranks are not watched, as not all of them reach {address.host}:{address.port}, "
            f"where rank 0 listens ({reason or 'see the other ranks'}); if one hangs, the others "
            "wait for the timeout of their collectives"
        )
        self.teardown(trainer, pl_module, stage)

    # The part of the run, for sentences

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._moment = f"in step {trainer.global_step + 1}"

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        self._moment = f"in step {trainer.global_step + 1}"

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        after = f" after step {trainer.global_step}" if _is_fit(trainer) else ""
        self._moment = f"in the validation{after}"

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _is_fit(trainer):
            self._moment = f"in step {trainer.global_step + 1}"

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._moment = "in the test"

    # The end of the run on this rank

    def on_train_batch_start(self, *arguments: Any) -> None:
        self._raise_if_lost()

    def on_validation_batch_start(self, *arguments: Any) -> None:
        self._raise_if_lost()

    def on_test_batch_start(self, *arguments: Any) -> None:
        self._raise_if_lost()

    def _raise_if_lost(self) -> None:
        if self._client is not None and self._client.failure is not None:
            raise self._lost_rank(self._client.failure)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Tell the other ranks, or find out which of them has caused the exception."""
        self._is_leaving = True
        is_consequence = _is_of_communication(exception)
        if self._client is None:
            if is_consequence and trainer.world_size > 1:
                exception.__cause__ = LostRank(
                    "another rank ended before the run began; its own output says why"
                )
            return
        if isinstance(exception, LostRank) or _is_agreed(trainer):
            return
        threading.Thread(target=self._end_at_exit, daemon=True).start()
        if is_consequence and (failure := self._client.wait_for_failure(2 * self.interval)):
            exception.__cause__ = self._lost_rank(failure)
            return
        record_for_torchrun(exception)
        self._client.report(f"{self._name} failed {self._moment}: {_describe(exception)}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._client is not None:
            self._client.end()
        if self._server is not None:
            self._server.close(GRACE * self.interval)
        self._client = self._server = None

    # In threads

    def _status(self) -> RankStatus:
        """Return what this rank is doing. It is called once per interval."""
        position = position_of(sys._current_frames()[self._main_thread])
        self._still = self._still + self.interval if position.lines == self._lines else 0.0
        self._lines = position.lines
        return RankStatus(self._name, self._still, self._moment, position.activity, position.where)

    def _find_hang(self, statuses: Mapping[int, RankStatus]) -> Failure | None:
        if not self.timeout or min(status.still for status in statuses.values()) < self.timeout:
            return None
        return describe_hang(statuses)

    def _describe_end(self, rank: int, status: RankStatus) -> str:
        """Return the sentence about a rank whose connection was closed."""
        exit_status = None
        if 0 < rank <= len(self._children):
            with suppress(subprocess.TimeoutExpired):
                exit_status = self._children[rank - 1].wait(1)
        # Its last status can be of an earlier step, but all ranks are in the same one.
        name, moment = status.name, self._moment
        if exit_status is None:
            return end_of(name, moment)
        if exit_status >= 0:
            return f"{name} ended {moment} with exit status {exit_status}"
        how = signal.Signals(-exit_status).name
        why = "; the system does that when memory runs out" if how == "SIGKILL" else ""
        return f"{name} was killed {moment} by {how}{why}"

    def _on_failure(self, failure: Failure) -> None:
        """Print the sentence, and end this process if its main thread does not."""
        if (signals := _stop_on_signal(self._trainer)) is not None:
            signals.is_announced = False  # launchers send SIGTERM to the other ranks
        if self._rank in failure.ranks and not self._is_leaving:
            stack = traceback.format_stack(sys._current_frames()[self._main_thread])
            _write(f"\n{self._name} stands still here:\n{''.join(stack)}")
        for _ in range(GRACE):
            time.sleep(self.interval)
            if self._is_leaving:  # it prints the sentence, or an error of its own
                return
            self._print(failure)
        self._end()

    def _print(self, failure: Failure) -> None:
        """Print the sentence once, on the first rank of each machine that has not failed."""
        before = range(self._rank - self._local_rank, self._rank)
        is_first = self._rank not in failure.ranks and all(rank in failure.ranks for rank in before)
        with self._printing:
            is_due, self._is_printed = is_first and not self._is_printed, True
        if is_due:
            signals = _stop_on_signal(self._trainer)
            resume = None if signals is None else signals.how_to_resume(self._trainer)
            _write("\nerror: " + "; ".join(filter(None, [failure.sentence, resume])) + "\n")

    def _lost_rank(self, failure: Failure) -> LostRank:
        self._print(failure)
        error = LostRank(failure.sentence)
        error.is_printed = True
        return error

    def _end_at_exit(self) -> None:
        """End the process if it does not end by itself once its main thread has returned."""
        threading.main_thread().join()
        time.sleep(FAREWELL * self.interval)
        self._end()

    def _end(self) -> None:
        """End this process, and those that it has started and that do not end by themselves."""
        for worker in multiprocessing.active_children():  # one may hang in a sample
            worker.kill()
        for rank in self._children:  # one may be stopped; the others end as this process does
            try:
                rank.wait(2 * self.interval)
            except subprocess.TimeoutExpired:
                rank.kill()
        os._exit(1)


def record_for_torchrun(exception: BaseException) -> None:
    """Let torchrun's closing table show the traceback of this rank, unless it has one already.

    Call it where the exception is handled.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None and not os.path.exists(file):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(exception)


def _is_fit(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING


def _is_of_communication(exception: BaseException) -> bool:
    """Return whether an exception tells of a lost connection, which another rank has caused."""
    # gloo's errors are plain RuntimeErrors with the path of gloo's source file.
    return isinstance(exception, dist.DistError) or (
        isinstance(exception, RuntimeError) and bool(COMMUNICATION_ERROR.search(str(exception)))
    )


def _is_agreed(trainer: pl.Trainer) -> bool:
    """Return whether all ranks end after this step because of a signal."""
    signals = _stop_on_signal(trainer)
    return signals is not None and bool(signals.stopping)


def _stop_on_signal(trainer: pl.Trainer) -> StopOnSignal | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, StopOnSignal)), None)


def _describe(exception: BaseException) -> str:
    if (error := find_user_error(exception)) is not None:
        return str(error)
    if (sentence := explain_worker_failure(exception)) is not None:
        return sentence
    lines = str(exception).strip().splitlines()
    first = f"{type(exception).__name__}: {lines[0][:MAX_MESSAGE]}" if lines else repr(exception)
    return f"{first}; its own output has the traceback"


def _write(text: str) -> None:
    os.write(2, text.encode(errors="replace"))  # whole, beside the output of other processes
