"""Failed data-loader workers: one sentence, from real workers and in a real training."""

import json
import os
import resource
import signal
import threading

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from segformer_pl.data import shapes
from segformer_pl.worker_errors import explain_worker_failure, wait_for_cause


class Failing(Dataset):
    """Samples of which the third one fails by calling a function."""

    def __init__(self, fail):
        self.fail = fail

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 2:
            self.fail()
        return torch.zeros(2)


@pytest.fixture(autouse=True)
def _handler_of_torch(monkeypatch):
    """Let torch install its handler of SIGCHLD, which Lightning removes after a training."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)


def read_all(loader):
    """Return all batches, and end the workers here.

    Garbage collection would end them, and where it happens to run in the thread that sends them
    their last message, torch waits for 5 s for each worker.
    """
    batches = iter(loader)
    try:
        return list(batches)
    finally:
        batches._shutdown_workers()


def sentence(fail):
    """Return the sentence on a real worker that fails, or None."""
    with pytest.raises(Exception) as error:  # noqa: PT011  torch decides on the class
        read_all(DataLoader(Failing(fail), num_workers=1, collate_fn=str))
    return explain_worker_failure(error.value)


@pytest.mark.parametrize(
    ("signum", "part"),
    [
        (signal.SIGKILL, "was killed by SIGKILL, as the system does when memory runs out; give"),
        (signal.SIGBUS, "was killed by a bus error, as happens when the shared memory in /dev/"),
        (signal.SIGABRT, "was ended by a signal (Aborted); --data.num_workers 0 shows where"),
    ],
)
def test_a_killed_worker(signum, part):
    def fail():
        if signum != signal.SIGKILL:
            signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    assert part in sentence(fail)


class LostConnection:
    """A queue whose worker has been killed while the main process received a tensor of it."""

    def get(self, timeout):
        raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize("is_pinned", [False, True])
def test_the_signal_of_a_lost_worker_is_waited_for(monkeypatch, is_pinned):
    """It may come after the error of its connection, while callbacks handle that error."""
    loader = iter(DataLoader([1, 2], num_workers=1))
    (worker,) = torch.multiprocessing.active_children()
    monkeypatch.setattr(loader, "_data_queue", LostConnection())
    with pytest.raises(ConnectionResetError) as raised:
        next(loader)
    error = raised.value
    if is_pinned:
        error = RuntimeError("Caught ConnectionResetError in pin memory thread for device 0.")
    killer = threading.Timer(0.2, worker.kill)
    killer.start()
    wait_for_cause(error)
    monkeypatch.undo()
    loader._shutdown_workers()
    assert explain_worker_failure(error).startswith(f"data-loader worker {worker.pid} was killed")


def test_a_worker_that_is_killed_while_it_sends(monkeypatch):
    loader = iter(DataLoader([1, 2], num_workers=1))
    monkeypatch.setattr(loader, "_data_queue", LostConnection())
    with pytest.raises(ConnectionResetError) as error:
        next(loader)
    monkeypatch.undo()
    loader._shutdown_workers()
    assert explain_worker_failure(error.value).startswith("a data-loader worker ended unexpectedly")
    assert explain_worker_failure(ConnectionResetError(104, "of another connection")) is None


def test_a_worker_that_ends_without_a_signal():
    assert "ended unexpectedly" in sentence(lambda: os._exit(3))


def raise_key():
    {}["absent"]


def raise_lines():
    raise ValueError("first line\n  second line")


def raise_memory():
    raise MemoryError


@pytest.mark.parametrize(
    ("fail", "part"),
    [
        (raise_key, "a data-loader worker failed: KeyError: 'absent' ("),
        (raise_lines, "a data-loader worker failed: ValueError: first line ("),
        # An exception that torch cannot build again
        (
            lambda: b"\xff".decode(),
            "a data-loader worker failed: UnicodeDecodeError: 'utf-8' codec",
        ),
        (lambda: os.stat("absent"), "a data-loader worker failed: FileNotFoundError: [Errno 2]"),
        (raise_memory, "a data-loader worker has run out of memory ("),
    ],
)
def test_a_worker_that_raises(fail, part):
    explained = sentence(fail)
    assert explained.startswith(part)
    assert "test_worker_errors.py, line " in explained
    assert "\n" not in explained


def test_too_many_open_files():
    """Workers pass each tensor on by an open file."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    loader = DataLoader([torch.zeros(2) for _ in range(500)], num_workers=1, collate_fn=list)
    try:
        num_open = len(os.listdir("/dev/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 40, before[1]))
        with pytest.raises((RuntimeError, OSError)) as error:
            read_all(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "ulimit -n" in explain_worker_failure(error.value)


@pytest.mark.parametrize("error", [RuntimeError("a shape"), KeyError("x"), EOFError()])
def test_other_exceptions_are_left_alone(error):
    assert explain_worker_failure(error) is None


class KillWorker(pl.Callback):
    """Kills the data-loader workers in step 4, as the system does when memory runs out."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 3:
            for child in torch.multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_training_whose_worker_is_killed_says_how_to_go_on(start_command, tmp_path):
    shapes.generate(tmp_path / "shapes", {"train": 12, "validation": 2})
    settings = {
        "model.network": "toy_segmenter.ToySegmenter",
        "data.path": tmp_path / "shapes",
        "data.batch_size": 2,
        "data.num_workers": 1,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2000,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.logger.save_dir": tmp_path / "runs",
        "last_checkpoint.every_n_train_steps": 1,
        "run_name": "first",
    }
    options = [f"--{key}={value}" for key, value in settings.items()]
    callback = json.dumps({"class_path": "test_worker_errors.KillWorker"})
    command = start_command(
        ["fit", *options, f"--trainer.callbacks+={callback}"], folder=tmp_path, figures=False
    )
    assert command.wait() == 1
    assert "Traceback" not in command.output
    line = command.output.splitlines()[-1]
    assert line.startswith("error: data-loader worker ")
    assert line.endswith(
        "was killed by SIGKILL, as the system does when memory runs out; give fewer "
        "data.num_workers or a smaller data.batch_size; then resume with the same command"
    )
