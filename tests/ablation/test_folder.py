"""State and lock of a run folder, with real processes that hold the lock and are killed."""

import subprocess
import sys
import time

import pytest

from segformer_pl.ablation.folder import (
    State,
    check_record,
    find_state,
    is_locked,
    locked,
)
from segformer_pl.atomic import atomic_write_text
from segformer_pl.errors import UserError

# Locks a folder, starts a process that inherits the lock, and says so.
HOLD = """
import subprocess, sys, time
from pathlib import Path
from segformer_pl.ablation.folder import locked
with locked(Path(sys.argv[1])) as descriptor:
    child = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_the_state_follows_from_the_files(tmp_path):
    run = tmp_path / "run"

    def state():
        return find_state(run, 800, ["at_96"])

    assert state() == State.WAITING
    atomic_write_text(run / "metrics.csv", "step\n")
    assert state() == State.WAITING  # without a checkpoint nothing can be resumed
    atomic_write_text(run / "checkpoints" / "last.ckpt", "")
    assert state() == State.INTERRUPTED
    atomic_write_text(run / "failure.txt", "it failed\n")
    assert state() == State.FAILED
    (run / "failure.txt").unlink()
    atomic_write_text(run / "evaluation" / "val_step_0000400.npz", "")
    assert state() == State.INTERRUPTED  # not the last step
    atomic_write_text(run / "evaluation" / "val_step_0000800.npz", "")
    assert state() == State.INTERRUPTED  # the additional evaluation is missing
    atomic_write_text(run / "evaluations" / "at_96" / "evaluation" / "val_step_0000000.npz", "")
    assert state() == State.DONE
    with locked(run) as descriptor:
        assert descriptor is not None
        assert state() == State.RUNNING  # it may still write its report
    assert state() == State.DONE


def test_a_killed_process_leaves_no_lock_and_its_child_keeps_it(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    child = int(holder.stdout.readline())
    try:
        assert find_state(tmp_path, 1, []) == State.RUNNING
        with locked(tmp_path, timeout=0.1) as descriptor:
            assert descriptor is None
        holder.kill()
        holder.wait()
        assert is_locked(tmp_path)  # the training goes on
    finally:
        holder.kill()
        subprocess.run(["kill", "-9", str(child)], check=True)
    deadline = time.monotonic() + 10
    while is_locked(tmp_path):
        assert time.monotonic() < deadline
    assert (tmp_path / ".lock").is_file()
    assert find_state(tmp_path, 1, []) == State.WAITING


def test_looking_at_a_lock_does_not_take_it_from_another_process(tmp_path):
    looks = (
        "import sys\nfrom pathlib import Path\nfrom segformer_pl.ablation.folder import is_locked\n"
        "print('go', flush=True)\nwhile True: is_locked(Path(sys.argv[1]))"
    )
    looker = subprocess.Popen(
        [sys.executable, "-c", looks, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    (tmp_path / ".lock").touch()
    looker.stdout.readline()
    try:
        for _ in range(5):
            with locked(tmp_path) as descriptor:
                assert descriptor is not None
    finally:
        looker.kill()
        looker.wait()


def test_a_renamed_or_edited_folder_is_refused(tmp_path):
    record = {"study": "s", "variant": "a", "seed": 0, "budget": "small", "digest": "01234567"}
    check_record(tmp_path, record)
    atomic_write_text(tmp_path / "ablation.json", '{"study": "s", "variant": "b"}')
    with pytest.raises(UserError, match="variant is 'b', but the folder's name and the study say"):
        check_record(tmp_path, record)
    atomic_write_text(tmp_path / "ablation.json", '{"study"')
    with pytest.raises(UserError, match=r"cannot be read .*move its folder away"):
        check_record(tmp_path, record)
