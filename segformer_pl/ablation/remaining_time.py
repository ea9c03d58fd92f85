"""The time that is left for a study, from how long the parts of its runs take.

A run is followed by its last logged step::

    begun           first logged step               last logged step           done
    |---- start-up ----|---- steps, with validations ----|---- evaluations ----|

Runs that are done tell the lengths for those to come. The lengths are medians over runs, and
between two logged steps they are counted down by the clock, so that the estimate moves steadily.
"""

import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from segformer_pl.ablation.folder import State
from segformer_pl.ablation.progress import RunProgress


@dataclass
class _Watched:
    """What has been seen of a run that was at work: times in seconds, and steps."""

    begun: float
    step: int  # the last logged one
    first: tuple[float, int] | None = None  # when the first new step was seen, and which
    last: float = 0.0  # when the last one was
    is_validated: bool = False  # whether a validation lies before the last logged step
    end: float | None = None  # when it was seen to be done

    def look(self, now: float, step: int, is_validated: bool) -> None:
        if step > self.step:
            self.first = self.first or (now, step)
            self.step, self.last, self.is_validated = step, now, is_validated

    @property
    def start_up(self) -> float | None:
        return None if self.first is None else self.first[0] - self.begun

    @property
    def step_seconds(self) -> float | None:
        """Seconds per step between the logged ones; 0 if a run that is done logged only one."""
        if self.first is None:
            return None
        steps = self.step - self.first[1]
        if steps:
            return (self.last - self.first[0]) / steps
        return None if self.end is None else 0.0

    @property
    def evaluations(self) -> float | None:
        """Seconds from the last logged step to the end."""
        return None if self.end is None else self.end - self.last


class RemainingTime:
    """Estimates how long the unfinished runs of a study will take.

    Args:
        clock: Function that returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._watched: dict[str, _Watched] = {}
        self._variants: dict[str, str] = {}
        self._num_parallel = 1  # most runs at work at once so far

    def seconds_left(self, runs: Sequence[RunProgress]) -> float | None:
        """Look at the runs and return an estimate of the remaining seconds; None if unknown.

        Args:
            runs: All runs of the study, in the order of execution.
        """
        now = self._clock()
        at_work = [run for run in runs if _is_at_work(run)]
        for run in at_work:
            self._variants[run.name] = run.run.variant.name
            watched = self._watched.setdefault(run.name, _Watched(now, run.step))
            watched.look(now, run.step, run.miou is not None)
        for run in runs:
            seen = self._watched.get(run.name)
            if seen is not None and run.state == State.DONE and seen.end is None:
                seen.look(now, run.run.max_steps, True)
                seen.end = now
            elif run.state in (State.FAILED, State.INTERRUPTED, State.WAITING):
                self._watched.pop(run.name, None)  # begins anew, if at all
        self._num_parallel = max(self._num_parallel, len(at_work))
        left = [run for run in runs if run.state not in (State.DONE, State.FAILED)]
        if not left:
            return None
        lengths = [(run in at_work, self._length(run, now)) for run in left]
        known = [(is_at_work, length) for is_at_work, length in lengths if length is not None]
        if len(known) < len(lengths):
            return None
        ends = [length for is_at_work, length in known if is_at_work]
        ends += [0.0] * (self._num_parallel - len(ends))
        heapq.heapify(ends)
        for is_at_work, length in known:
            if not is_at_work:  # takes the place of the run that ends first
                heapq.heapreplace(ends, ends[0] + length)
        return max(ends)

    def _length(self, run: RunProgress, now: float) -> float | None:
        """Return the seconds that one run still takes; None if unknown."""
        watched = self._watched.get(run.name)
        step_seconds = self._step_seconds(run, watched)
        start_up = _median(one.start_up for one in self._watched.values())
        if step_seconds is None or start_up is None:
            return None
        length = (run.run.max_steps - run.step) * step_seconds
        length += _median(one.evaluations for one in self._watched.values()) or 0.0
        if watched is None:
            return start_up + length
        if watched.first is None:
            return max(start_up - (now - watched.begun), 0.0) + length
        return max(length - (now - watched.last), 0.0)

    def _step_seconds(self, run: RunProgress, watched: _Watched | None) -> float | None:
        """Return the seconds per step of a run: those of like runs, and more and more its own."""
        done = {name: one for name, one in self._watched.items() if one.end is not None}
        alike = [one for n, one in done.items() if self._variants[n] == run.run.variant.name]
        # Before its first validation, a run says too little about what is to come.
        validated = [one for one in self._watched.values() if one.is_validated]
        groups = (alike, done.values(), validated)
        medians = (_median(one.step_seconds for one in group) for group in groups)
        expected = next((value for value in medians if value is not None), None)
        own = None if watched is None else watched.step_seconds
        if own is None or expected is None or watched is None or watched.first is None:
            return expected
        share = (watched.step - watched.first[1]) / run.run.max_steps
        return share * own + (1 - share) * expected


def _is_at_work(run: RunProgress) -> bool:
    return run.state == State.RUNNING and (run.has_started or run.is_elsewhere)


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
