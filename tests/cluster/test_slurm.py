"""A job of a real Slurm is pre-empted and requeued, and ends as if nothing had happened."""

import re
import sys
import time
from pathlib import Path

import pytest

from segformer_pl.analysis.run import Run
from tests.cluster.one_machine import Slurm, reason_against
from tests.cluster.tiny_training import NUM_STEPS, read_records, write_config

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "experiments" / "cluster" / "slurm.sbatch"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if reason := reason_against():
        pytest.skip(reason)
    try:
        cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    except RuntimeError as error:
        pytest.skip(str(error))
    yield cluster
    cluster.stop()


class Job:
    """A submitted job, whose log is in a folder."""

    def __init__(self, slurm, folder, *arguments, **variables):
        self.slurm, self.log = slurm, folder / "slurm.log"
        variables |= {"PYTHON": sys.executable, "PYTHONPATH": str(Path(__file__).parent)}
        options = ["--parsable", f"--output={self.log}", f"--chdir={folder}"]
        output = slurm.call("sbatch", *options, *arguments, OMP_NUM_THREADS="1", **variables)
        assert re.fullmatch(r"\d+\n", output), output
        self.number = output.strip()

    @property
    def details(self):
        text = self.slurm.call("scontrol", "show", "job", self.number)
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def wait_for(self, condition, timeout=240):
        deadline = time.monotonic() + timeout
        while not condition():
            state = self.details["JobState"]
            if time.monotonic() > deadline or state in ("FAILED", "CANCELLED", "TIMEOUT"):
                pytest.fail(f"{self.details}\n{self.log.read_text()}\n{self.slurm.logs()}")
            time.sleep(0.5)

    def wait_for_state(self, state):
        self.wait_for(lambda: self.details["JobState"] == state)


def test_a_preempted_job_is_requeued_and_ends_like_an_uninterrupted_one(
    slurm, data, uninterrupted, tmp_path
):
    config = write_config(tmp_path / "preempted", data, hold=5)
    folder = config.parent
    (folder / "hold").touch()
    options = ["--ntasks-per-node=2", "--time=20"]
    job = Job(slurm, folder, *options, SCRIPT, "first", f"--config={config}")
    records = [folder / f"rank{rank}.jsonl" for rank in (0, 1)]
    job.wait_for(lambda: all(r.exists() and r.read_text().count("\n") == 5 for r in records))
    slurm.call("scancel", "--signal=USR1", job.number)
    (folder / "hold").unlink()
    job.wait_for_state("PENDING")
    assert job.details["Restarts"] == "1"
    slurm.call("scontrol", "update", f"JobId={job.number}", "StartTime=now")  # not in two minutes
    job.wait_for_state("COMPLETED")

    log = job.log.read_text()
    last = folder / "runs" / "first" / "checkpoints" / "last.ckpt"
    # Step 5 had been done when the signal came, and a validation follows step 6.
    assert f"SIGUSR1: stopped after step 6, saved in {last}; the same command resumes" in log
    assert f"requeuing Slurm's job {job.number}" in log
    assert f"the run in {folder / 'runs' / 'first'} continues from step 6" in log
    assert "Traceback" not in log
    run = Run(folder / "runs" / "first")
    assert [resumption.step for resumption in run.resumptions] == [6]
    assert [file.step for file in run.evaluations] == [6, 12]
    assert len(run.metrics["train/loss"].step) == NUM_STEPS
    report = (run.folder / "report.html").read_text()
    assert "dotted: resumed at 6" in report
    assert read_records(folder, 2) == uninterrupted
