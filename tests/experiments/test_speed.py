"""A coarse guard of speed: ratios to transformers, in CPU time, so that other load matters little.

The bounds are about half of what the benchmarks measure, which are in the ledger.
"""

import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"


@pytest.fixture(scope="module")
def speed():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import speed
    finally:
        sys.path.remove(str(BENCHMARKS))
    return speed


def times_as_fast(ours, theirs, rounds=5):
    """Return the median ratio of CPU seconds on one thread, after a call to warm up."""
    ratios = []
    for _ in range(rounds + 1):
        start = time.process_time()
        ours()
        between = time.process_time()
        theirs()
        ratios.append((time.process_time() - between) / (between - start))
    return statistics.median(ratios[1:])


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "least"), [("inference", 1.7), ("training", 1.4)])
def test_b0_is_faster_than_transformers_at_equal_weights(speed, one_thread, task, least):
    torch.manual_seed(0)
    subjects = speed.build("b0", 150, with_smp=False)
    images = torch.randn(1, 3, 256, 256)
    target = torch.randint(150, (1, 256, 256))
    calls = [
        speed.training(subject, subjects[1], "float32", "eager", images, target)
        if task == "training"
        else speed.inference(subject, subjects[1], task, "float32", "eager", images)
        for subject in subjects
    ]
    ratio = times_as_fast(*calls)
    assert ratio > least, f"{ratio:.2f} times as fast as transformers"
