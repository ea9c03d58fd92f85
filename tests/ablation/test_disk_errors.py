"""Full disks, folders that are read-only, and writers that were killed: one sentence each."""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from segformer_pl.ablation.folder import State, copy_run, find_state, find_twin, locked
from segformer_pl.ablation.job import RunJob
from segformer_pl.ablation.launchers import LocalLauncher
from segformer_pl.ablation.progress import RunProgress
from segformer_pl.ablation.runner import StudyRunner
from segformer_pl.errors import UserError

RECORD = {"study": "s", "variant": "a", "seed": 0, "budget": "b", "digest": "c"}
EVALUATION = Path("evaluation", "val_step_0000004.npz")


@contextmanager
def full_disk():
    """Every file may have no more than this many bytes, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Silent:
    """A display that shows nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def show(self, runs, seconds_left):
        pass

    def note(self, text):
        pass


def make_run(folder, seed=0):
    run = SimpleNamespace(
        variant=SimpleNamespace(name="a"), seed=seed, max_steps=4, folder=folder / f"run{seed}"
    )
    return RunProgress(run)


def complete(folder):
    (folder / EVALUATION).parent.mkdir(parents=True)
    (folder / EVALUATION).touch()


def test_a_job_that_cannot_be_written_is_one_sentence(tmp_path):
    launcher = LocalLauncher(tmp_path / "jobs", 2)
    job = RunJob(tmp_path / "run", {}, {}, 4, RECORD)
    with full_disk(), pytest.raises(UserError) as error:
        launcher.submit([job])
    assert str(error.value) == (
        f"cannot start a job, because nothing can be written to '{tmp_path / 'jobs'}': File too "
        "large; free space or give a folder that can be written, and start the command again"
    )


@pytest.mark.slow
def test_running_jobs_go_on_when_another_one_cannot_be_started(tmp_path):
    runs = [make_run(tmp_path, seed) for seed in (0, 1)]
    limit = full_disk()

    def make_job(progress):
        if progress is runs[0]:
            complete(progress.run.folder)  # found by the job
        else:
            limit.__enter__()
        return RunJob(progress.run.folder, {}, {}, 4, RECORD)

    launcher = LocalLauncher(tmp_path / "jobs", 2)
    try:
        StudyRunner(runs, make_job, launcher, Silent()).run()
    finally:
        limit.__exit__(None, None, None)
    assert [run.state for run in runs] == [State.DONE, State.FAILED]
    assert runs[1].sentence.startswith("cannot start a job, because nothing can be written to")


def test_with_no_job_running_the_command_ends(tmp_path):
    run = make_run(tmp_path)
    launcher = LocalLauncher(tmp_path / "jobs", 2)
    runner = StudyRunner(
        [run], lambda _: RunJob(run.run.folder, {}, {}, 4, RECORD), launcher, Silent()
    )
    with full_disk(), pytest.raises(UserError, match="cannot start a job"):
        runner.run()


@pytest.mark.slow
def test_an_error_outside_of_the_training_is_the_sentence_of_the_run(tmp_path):
    run = make_run(tmp_path)
    (tmp_path / ".jobs").write_text("a file in place of the folder of the logs")
    launcher = LocalLauncher(tmp_path / "jobs", 1)
    StudyRunner(
        [run], lambda _: RunJob(run.run.folder, {}, {}, 4, RECORD), launcher, Silent()
    ).run()
    assert run.state == State.FAILED
    assert f"File exists: '{tmp_path / '.jobs'}'" in run.sentence
    assert "Traceback" not in run.sentence


LOOK = """
import os, sys
from pathlib import Path
from segformer_pl.ablation.folder import find_state
if not os.geteuid():
    os.setuid(65534)
print(find_state(Path(sys.argv[1]), 4, []))
"""


@pytest.mark.slow
def test_a_study_of_another_user_can_be_looked_at():
    folder = Path(tempfile.mkdtemp())  # pytest's are closed to other users
    try:
        complete(folder)
        lock = folder / ".lock"
        lock.touch()
        lock.chmod(0o444)
        folder.chmod(0o555)

        def look():
            command = [sys.executable, "-c", LOOK, str(folder)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        assert look().strip() == State.DONE
        lock.chmod(0o644)
        with locked(folder):
            assert look().strip() == State.RUNNING
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.fixture
def twin(tmp_path):
    folder = tmp_path / "first" / "a.seed0.small.0f3a9c1e"
    complete(folder)
    (folder / EVALUATION).write_bytes(b"x" * 1000)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    (folder / "ablation.json").write_text('{"seed": 0, "digest": "0f3a9c1e"}')
    (folder / "config.yaml").write_text("data: {path: here}")
    return folder


def test_a_damaged_run_of_another_study_is_no_twin(twin, tmp_path):
    folder = tmp_path / "second" / twin.name
    arguments = (folder, 0, "0f3a9c1e", 4, "here")
    assert find_twin(*arguments) == twin
    for name in ("ablation.json", "config.yaml"):
        before = (twin / name).read_text()
        for text in ("{", "- 1", "data: here", "\0"):
            (twin / name).write_text(text)
            assert find_twin(*arguments) is None
        (twin / name).write_text(before)
    (twin / "config.yaml").unlink()
    assert find_twin(*arguments) is None


def test_an_interrupted_copy_does_not_count_as_trained(twin, tmp_path):
    folder = tmp_path / "second" / twin.name
    folder.mkdir(parents=True)
    with full_disk(), pytest.raises(OSError, match="File too large"):
        copy_run(twin, folder)
    assert find_state(folder, 4, []) != State.DONE
    copy_run(twin, folder)
    assert (folder / EVALUATION).read_bytes() == b"x" * 1000
    assert find_state(folder, 4, []) == State.DONE
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "evaluation",
    }
    assert os.listdir(folder / "evaluation") == [EVALUATION.name]
