"""The estimate of the time that is left, over simulated studies with a simulated clock."""

from itertools import pairwise
from types import SimpleNamespace

import pytest

from segformer_pl.ablation.folder import State
from segformer_pl.ablation.progress import RunProgress
from segformer_pl.ablation.remaining_time import RemainingTime

LOOK = 2.0  # seconds
MAX_STEPS = 800


class SimulatedRun:
    """A run with a start-up, steps that are logged by fifties, validations and an evaluation.

    Args:
        name: Variant and seed.
        step_seconds: Seconds of a step.
        start_up: Seconds before the first step.
    """

    def __init__(self, name, step_seconds=0.1, start_up=20.0):
        variant, seed = name
        run = SimpleNamespace(
            variant=SimpleNamespace(name=variant), seed=seed, max_steps=MAX_STEPS, folder=None
        )
        self.progress = RunProgress(run)
        self.start_up, self.step_seconds = start_up, step_seconds
        self.logged = []  # (seconds after the begin, step)
        seconds = start_up
        for step in range(50, MAX_STEPS + 1, 50):
            seconds += 50 * step_seconds
            self.logged.append((seconds, step))
            if step % 200 == 0:
                seconds += 100 * step_seconds  # validation
        self.length = seconds + 15  # evaluation
        self.begun = None
        self.validated = start_up + 300 * step_seconds  # end of the first validation

    def move(self, now):
        elapsed = now - self.begun
        run = self.progress
        run.step = max((step for seconds, step in self.logged if seconds <= elapsed), default=0)
        run.state = State.DONE if elapsed >= self.length else State.RUNNING
        run.has_started = elapsed > 1
        run.miou = 0.5 if elapsed >= self.validated else None
        if run.state == State.DONE:
            run.step = MAX_STEPS


def simulate(runs, num_parallel):
    """Return the times of all looks, and the estimates then; the last time is the end."""
    now, estimates = 1000.0, []
    remaining = RemainingTime(lambda: now)
    progress = [run.progress for run in runs]
    while any(run.progress.state != State.DONE for run in runs):
        for run in runs:
            if run.begun is not None and run.progress.state != State.DONE:
                run.move(now)
        free = num_parallel - sum(run.progress.state == State.RUNNING for run in runs)
        for run in [run for run in runs if run.begun is None][:free]:
            run.begun, run.progress.state = now, State.RUNNING
        estimates.append((now, remaining.seconds_left(progress)))
        now += LOOK
    return estimates


def names(num_variants=3, num_seeds=4):
    return [(f"v{v}", seed) for seed in range(num_seeds) for v in range(num_variants)]


def check(estimates, first_end, tolerance, jump):
    """Check estimates after the first end of a run: they are near the truth and do not jump."""
    end = estimates[-1][0]
    total = end - estimates[0][0]
    known = [(now, left) for now, left in estimates if left is not None and now >= first_end]
    assert len(known) > 100
    for now, left in known:
        assert left == pytest.approx(end - now, abs=tolerance * total), now
    changes = [later - earlier + LOOK for (_, earlier), (_, later) in pairwise(known)]
    assert max(map(abs, changes)) < jump * total


@pytest.mark.parametrize("num_parallel", [1, 2, 5])
def test_runs_of_one_speed(num_parallel):
    runs = [SimulatedRun(name) for name in names()]
    estimates = simulate(runs, num_parallel)
    first_end = 1000.0 + runs[0].length + LOOK
    check(estimates, first_end, 0.05, 0.04)


@pytest.mark.parametrize("num_parallel", [1, 2])
def test_variants_of_different_speed(num_parallel):
    speeds = {"v0": 0.1, "v1": 0.2, "v2": 0.15}
    runs = [SimulatedRun(name, speeds[name[0]]) for name in names()]
    estimates = simulate(runs, num_parallel)
    # Once each variant has a run that is done, all lengths are known.
    first_round = 1000.0 + max(run.begun + run.length - 1000.0 for run in runs[:3]) + LOOK
    check(estimates, first_round, 0.06, 0.04)


def test_before_a_run_is_done_the_estimate_waits_for_a_validation():
    runs = [SimulatedRun(name) for name in names()]
    estimates = simulate(runs, 1)
    end = estimates[-1][0]
    first = next(now for now, left in estimates if left is not None)
    assert 1000 + runs[0].validated < first < 1000 + runs[0].validated + 10
    early = [(now, left) for now, left in estimates if first <= now < 1000 + runs[0].length]
    for now, left in early:
        assert left == pytest.approx(end - now, rel=0.25)


def test_a_resumed_study_and_its_failed_runs():
    now = 0.0
    remaining = RemainingTime(lambda: now)
    done, resumed, failed, waiting = (SimulatedRun(("v", seed)).progress for seed in range(4))
    runs = [done, resumed, failed, waiting]
    done.state, done.step = State.DONE, MAX_STEPS
    resumed.state, resumed.step, resumed.has_started = State.RUNNING, 400, True
    failed.state, failed.step = State.FAILED, 50
    assert remaining.seconds_left(runs) is None  # earlier steps say nothing about the speed
    now, resumed.step, resumed.miou = 30.0, 500, 0.4
    assert remaining.seconds_left(runs) is None
    now, resumed.step = 40.0, 600
    # 200 steps of 0.1 s, then a start-up of 30 s and 800 steps
    assert remaining.seconds_left(runs) == pytest.approx(20 + 30 + 80)
    now = 45.0
    assert remaining.seconds_left(runs) == pytest.approx(15 + 30 + 80)
    resumed.state, waiting.state = State.DONE, State.FAILED
    assert remaining.seconds_left(runs) is None


def test_runs_that_log_once_count_by_their_lengths():
    now = 0.0
    remaining = RemainingTime(lambda: now)
    runs = [SimulatedRun(("v", seed)).progress for seed in range(3)]
    runs[0].state, runs[0].has_started = State.RUNNING, True
    assert remaining.seconds_left(runs) is None
    now = 60.0
    runs[0].state, runs[0].step = State.DONE, MAX_STEPS
    runs[1].state, runs[1].has_started = State.RUNNING, True
    assert remaining.seconds_left(runs) == pytest.approx(120)
    now = 90.0
    assert remaining.seconds_left(runs) == pytest.approx(90)
