"""Runs the unfinished runs of a study and follows them until the last one has ended.

The state of a study is in its run folders alone, so any number of invocations can work on one study
at the same time::

    plan       read every folder: done | failed | locked by another process | to do
    start      the next job when one has ended; the job locks its folder and looks again
    at the end wait for the folders that others have locked, and start what they have not finished
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import submitit

from segformer_pl.ablation.folder import FAILURE_FILE, State
from segformer_pl.ablation.job import RunJob, last_sentence
from segformer_pl.ablation.launchers import Launcher
from segformer_pl.ablation.live import Display
from segformer_pl.ablation.progress import RunProgress
from segformer_pl.ablation.remaining_time import RemainingTime
from segformer_pl.errors import UserError

POLL = 0.2  # seconds between two looks at the jobs
LOOK = 2.0  # seconds between two looks at the folders


class StudyRunner:
    """Executes runs of a study.

    Args:
        runs: All runs of the study, in the order of execution.
        make_job: Function that returns the job of a run.
        launcher: Where jobs run.
        display: Where the progress is shown.
        retry_failed: Whether to start runs that have failed before.

    Attributes:
        signal: Number of the signal that ended the study; 0 if none did.
    """

    def __init__(
        self,
        runs: Sequence[RunProgress],
        make_job: Callable[[RunProgress], RunJob],
        launcher: Launcher,
        display: Display,
        retry_failed: bool = False,
    ) -> None:
        self.signal: int = 0
        self._runs = runs
        self._make_job = make_job
        self._launcher = launcher
        self._display = display
        self._retry_failed = retry_failed
        self._queue: list[RunProgress] = []
        self._active: list[tuple[RunProgress, submitit.Job[State]]] = []
        self._elsewhere: list[RunProgress] = []
        self._num_signals = 0
        self._num_passed_on = 0

    def run(self) -> None:
        """Run until every run is done or failed, or a signal has ended them.

        Raises:
            UserError: No job can be started, and none is running.
        """
        for run in self._runs:
            run.look()
            if run.state == State.RUNNING:
                self._wait_for(run)
            elif run.state in (State.WAITING, State.INTERRUPTED) or (
                run.state == State.FAILED and self._retry_failed
            ):
                run.state = State.INTERRUPTED if run.step else State.WAITING
                self._queue.append(run)
        remaining = RemainingTime()
        next_look = 0.0
        with self._display, self._signals():
            while (self._queue and not self.signal) or self._active or self._elsewhere:
                self._pass_signals_on()
                if self.signal and not self._active:
                    break
                if not self.signal:
                    self._start()
                self._collect()
                if time.monotonic() >= next_look:
                    next_look = time.monotonic() + LOOK
                    self._check_elsewhere()
                    for run, _ in self._active:
                        run.follow()
                    self._display.show(self._runs, remaining.seconds_left(self._runs))
                time.sleep(POLL)
            self._display.show(self._runs, None)

    def _start(self) -> None:
        num = min(self._launcher.num_free(), len(self._queue))
        if not num:
            return
        runs, self._queue = self._queue[:num], self._queue[num:]
        try:
            submitted = self._launcher.submit([self._prepare(run) for run in runs])
        except UserError as error:
            if not self._active:
                raise
            for run in runs:  # those that are running go on
                run.state, run.sentence = State.FAILED, str(error)
            return
        for run in runs:
            run.state, run.is_elsewhere, run.has_started = State.RUNNING, False, False
            run.sentence = None
        self._active += zip(runs, submitted)

    def _prepare(self, run: RunProgress) -> RunJob:
        job = self._make_job(run)
        failure = run.run.folder / FAILURE_FILE
        with suppress(OSError):
            job.retried_failure = failure.stat().st_mtime_ns
        return job

    def _collect(self) -> None:
        """Look at the folders of jobs that have ended."""
        ended = [(run, job) for run, job in self._active if self._launcher.is_over(job)]
        self._active = [pair for pair in self._active if pair not in ended]
        for run, job in ended:
            state, (outcome, error) = run.look(), _outcome(job)
            # Without an outcome, the job was killed. Its process may have outlived it and then
            # holds the lock.
            if state == State.RUNNING or outcome == State.RUNNING:
                self._wait_for(run)
            elif state in (State.WAITING, State.INTERRUPTED) and not self.signal:
                run.state = State.FAILED
                reason = error or (
                    "the job ended without a result, as when it is killed or the disk is full"
                )
                run.sentence = f"{reason} (files of the job: '{job.paths.folder}')"

    def _wait_for(self, run: RunProgress) -> None:
        run.state, run.is_elsewhere = State.RUNNING, True
        self._elsewhere.append(run)

    def _check_elsewhere(self) -> None:
        """Look at runs that other invocations execute, and queue what they have not finished."""
        for run in list(self._elsewhere):
            if run.look() != State.RUNNING:
                self._elsewhere.remove(run)
                run.is_elsewhere = False
                if run.state in (State.WAITING, State.INTERRUPTED):
                    self._queue.insert(0, run)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Store SIGINT and SIGTERM instead of acting on them inside of other calls."""

        def receive(signum: int, frame: FrameType | None) -> None:
            self._num_signals += 1
            self.signal = self.signal or int(signum)

        before: dict[int, Any] = {}
        for signum in (signal.SIGINT, signal.SIGTERM):
            # A shell makes background processes ignore Ctrl-C; leave that as it is.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                before[signum] = signal.signal(signum, receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_signals_on(self) -> None:
        while self._num_passed_on < self._num_signals:
            self._num_passed_on += 1
            if self._num_passed_on == 1 and self._active:
                self._display.note(
                    f"{signal_name(self.signal)}: {len(self._active)} running; each ends after its "
                    "step with a checkpoint. Ctrl-C now ends them at once"
                )
            for _, job in self._active:
                self._launcher.stop(job)


def signal_name(signum: int) -> str:
    """Return the name of a signal for users."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def _outcome(job: submitit.Job[State]) -> tuple[State | None, str | None]:
    """Return what a job has returned, and the error that it raised; None if it was killed."""
    if not job.paths.result_pickle.exists():
        return None, _error_of(job.stderr() or "")
    try:
        return job.task(0).result(), None  # of rank 0, if Slurm runs several tasks
    except Exception as error:  # submitit raises an exception of its own for that of the job
        return None, _error_of(str(error)) or str(error)


def _error_of(text: str) -> str | None:
    """Return the last error in an output of a job, without the name of this package's class."""
    sentence = last_sentence(text)
    return None if sentence is None else str(UserError(sentence))
