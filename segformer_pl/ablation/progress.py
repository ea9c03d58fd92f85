"""How far the runs of a study have come, read from their folders."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from segformer_pl.ablation.folder import FAILURE_FILE, State, find_state, is_locked
from segformer_pl.ablation.study import StudyRun
from segformer_pl.analysis.run import Run
from segformer_pl.errors import UserError

MIOU = "val/miou"


@dataclass
class RunProgress:
    """The progress of one run.

    Attributes:
        run: The run.
        evaluations: Names of its additional evaluations.
        state: Its state as of the last :meth:`look`.
        is_elsewhere: Whether another invocation, or a process that outlived one, runs it.
        has_started: Whether its job has been seen at work; on Slurm it may wait in the queue.
        step: Training steps done.
        miou: mIoU of the last validation, a fraction; None before the first one.
        sentence: Why it failed.
    """

    run: StudyRun
    evaluations: Sequence[str] = ()
    state: State = State.WAITING
    is_elsewhere: bool = False
    has_started: bool = False
    step: int = 0
    miou: float | None = None
    sentence: str | None = None
    _start: tuple[float, int] | None = field(default=None, repr=False)
    _stamp: tuple[int, int] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return f"{self.run.variant.name}, seed {self.run.seed}"

    @property
    def steps_per_second(self) -> float | None:
        """Training steps a second since the first logged step here; None before the second one."""
        if self.state != State.RUNNING or self._start is None or self._stamp is None:
            return None
        seconds, steps = self._stamp[0] / 1e9 - self._start[0], self.step - self._start[1]
        return steps / seconds if seconds > 0 and steps > 0 else None

    def look(self) -> State:
        """Read the state of the folder, why it failed, and how far it has come."""
        self.state = find_state(self.run.folder, self.run.max_steps, self.evaluations)
        self.sentence = None
        if self.state == State.FAILED:
            file = self.run.folder / FAILURE_FILE
            with suppress(OSError):
                self.sentence = file.read_text("utf-8", errors="replace").strip()
        self.read_metrics()
        if self.state == State.DONE:  # the last steps may not have been logged
            self.step = self.run.max_steps
        return self.state

    def follow(self) -> None:
        """Look at a run whose job has been submitted."""
        self.has_started = self.has_started or is_locked(self.run.folder)
        self.read_metrics()

    def read_metrics(self) -> None:
        """Read step and mIoU if ``metrics.csv`` has changed."""
        run = Run(self.run.folder)
        try:
            status = os.stat(run.metrics_file)
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp == self._stamp:
                return
            step = run.num_steps
        except (OSError, UserError):  # not there yet, or being replaced
            return
        if self._start is None or step < self._start[1]:
            self._start = (status.st_mtime_ns / 1e9, step)
        self.step, self._stamp = min(step, self.run.max_steps), stamp
        if MIOU in run.metrics:
            self.miou = run.metrics[MIOU].last
