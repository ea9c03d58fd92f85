"""Two processes do not train in one run folder."""

import subprocess
import sys
from functools import partialmethod

import pytest

from segformer_pl.callbacks.run_lock import LOCK_FILE, RunLock
from segformer_pl.cli import main
from segformer_pl.errors import UserError

HOLD = "import fcntl, sys, time; file = open(sys.argv[1], 'ab'); fcntl.flock(file, fcntl.LOCK_EX);"
HOLD += "print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a run folder."""
    (tmp_path / "runs" / "name" / "first").mkdir(parents=True)
    file = tmp_path / "runs" / "name" / "first" / LOCK_FILE
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, file], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_lock_of_a_killed_process_is_free(holder, tmp_path):
    lock = RunLock(tmp_path / "runs" / "name" / "first")
    with pytest.raises(UserError, match="another process trains in"):
        lock.acquire(timeout=0.3)
    holder.kill()
    lock.acquire(timeout=10)
    with pytest.raises(UserError, match="another process trains in"):
        RunLock(lock.folder).acquire(timeout=0)
    lock.release()
    RunLock(lock.folder).acquire(timeout=0)


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_a_named_run_is_trained_by_one_process(holder, fit, tmp_path, monkeypatch):
    monkeypatch.setattr(RunLock, "acquire", partialmethod(RunLock.acquire, timeout=0.3))
    named = ["--trainer.logger.save_dir", str(tmp_path / "runs"), "--trainer.logger.name=name"]
    named += ["--run_name=first", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    with pytest.raises(SystemExit, match=r"run_name: another process trains in .*name/first"):
        main([*fit, *named])
    holder.kill()
    holder.wait()
    for _ in range(2):  # it is released at the end of a training
        main([*fit, *named])


@pytest.mark.slow
def test_a_run_that_another_process_has_continued_meanwhile_is_not_set_back(
    holder, fit, tmp_path, start_command
):
    named = [f"--trainer.logger.save_dir={tmp_path / 'runs'}", "--trainer.logger.name=name"]
    named += ["--run_name=first", "--trainer.max_steps=2"]
    waiting = start_command([*fit, *named], figures=False)
    waiting.wait_for(lambda: "waiting for its end" in waiting.output)
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir(exist_ok=True)
    last.write_bytes(b"of the other process")
    holder.kill()
    assert waiting.wait() == 1
    assert "another process has trained in" in waiting.output.splitlines()[-1]
    assert last.read_bytes() == b"of the other process"
