"""State and lock of a run folder, with real processes that hold the lock and are killed."""

import json
import subprocess
import sys
import time

import pytest

from segformer_pl.ablation.folder import (
    State,
    check_record,
    copy_run,
    find_state,
    find_twin,
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


def test_a_training_without_its_record_is_refused(tmp_path):
    record = dict.fromkeys(("study", "variant", "seed", "budget", "digest"), "x")
    check_record(tmp_path / "run", record)  # nothing there yet
    atomic_write_text(tmp_path / "run" / "evaluation" / "val_step_0000008.npz", "")
    with pytest.raises(UserError, match=r"holds a training, but not its ablation\.json"):
        check_record(tmp_path / "run", record)


@pytest.fixture
def twin(tmp_path):
    """A complete run of another study: seed 0, 8 steps, digest 0f3a9c1e."""
    run = tmp_path / "first" / "base.seed0.small.0f3a9c1e"
    files = {
        "ablation.json": json.dumps({"study": "first", "seed": 0, "digest": "0f3a9c1e"}),
        "config.yaml": "data: {path: here}\n",
        "metrics.csv": "step\n",
        "checkpoints/last.ckpt": "weights",
        "evaluation/val_step_0000008.npz": "counts",
        "evaluations/at_96/evaluation/val_step_0000000.npz": "",
        ".lock": "",
    }
    for name, text in files.items():
        atomic_write_text(run / name, text)
    return run


def test_the_same_training_is_found_in_another_study_alone(twin, tmp_path):
    folder = tmp_path / "second" / "reference.seed0.long.0f3a9c1e"
    same = {"seed": 0, "digest": "0f3a9c1e", "max_steps": 8, "data_path": "here"}
    assert find_twin(folder, **same) == twin
    assert find_twin(twin.parent / "other.seed0.small.0f3a9c1e", **same) is None
    for change in ({"seed": 1}, {"digest": "00000000"}, {"max_steps": 9}, {"data_path": None}):
        assert find_twin(folder, **same | change) is None, change
    atomic_write_text(twin / "ablation.json", json.dumps({"seed": 1, "digest": "0f3a9c1e"}))
    assert find_twin(folder, **same) is None  # renamed by hand


def test_a_copy_holds_the_training_and_nothing_of_the_study(twin, tmp_path):
    folder = tmp_path / "second" / "reference.seed0.small.0f3a9c1e"
    atomic_write_text(folder / "ablation.json", "its own")
    copy_run(twin, folder)
    files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert files == {
        "ablation.json",
        "config.yaml",
        "metrics.csv",
        "checkpoints/last.ckpt",
        "evaluation/val_step_0000008.npz",
    }
    assert (folder / "ablation.json").read_text() == "its own"
    assert find_state(folder, 8, []) == State.DONE
    assert find_state(folder, 8, ["at_96"]) == State.INTERRUPTED
