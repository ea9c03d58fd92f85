"""Launchers: GPUs, options of Slurm, and a local job that outlasts submitit's default limits."""

import os
import stat
import time
from pathlib import Path

import pytest

from segformer_pl.ablation.folder import State
from segformer_pl.ablation.job import RunJob
from segformer_pl.ablation.launchers import LocalLauncher, SlurmLauncher, gpu_sets
from segformer_pl.errors import UserError

pytestmark = pytest.mark.slow

TRAINER = {"accelerator": "auto", "devices": "auto", "num_nodes": 1}
RECORD = {"study": "s", "variant": "a", "seed": 0, "budget": "b", "digest": "c"}


def test_gpus_are_divided_among_jobs(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_sets(4, 1) == ["0", "1", "2", "3"]
    assert gpu_sets(5, 2) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-7a")
    assert gpu_sets(2, 1) == ["2", "GPU-7a"]


def test_local_jobs_share_slots_gpus_and_cores(tmp_path):
    """Real processes of submitit, whose job finds a complete run and ends."""
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    (run / "evaluation" / "val_step_0000004.npz").touch()
    launcher = LocalLauncher(tmp_path / "jobs", 2, ["0", "1"])
    jobs = [RunJob(run, {}, {}, 4, RECORD) for _ in range(2)]
    started = []
    for job in jobs:  # one at a time, so that an error leaves none behind
        assert launcher.num_free() == 1
        started += launcher.submit([job])
    assert [job.variables["CUDA_VISIBLE_DEVICES"] for job in jobs] == ["0", "1"]
    assert launcher.num_free() == 0
    deadline = time.monotonic() + 60
    while not all(job.done() for job in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [job.result() for job in started] == [State.DONE, State.DONE]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder of programs with Slurm's names: sbatch keeps the script, squeue answers a file."""
    programs = {
        "sbatch": f'cp "$1" {tmp_path}/script; echo "Submitted batch job 17"',
        "squeue": f"cat {tmp_path}/queue",
        "srun": "",
        "scancel": f'echo "$@" >> {tmp_path}/cancelled',
    }
    for name, text in programs.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def test_all_runs_are_one_slurm_array(slurm):
    options = {"partition": "gpu", "timeout_min": 240, "gpus_per_node": 1, "mem_gb": 16}
    launcher = SlurmLauncher(slurm / "jobs", "reduction_ratio", 3, options, [TRAINER])
    (slurm / "queue").write_text("17_0\n17_2\n")
    jobs = launcher.submit([RunJob(Path("run"), {}, {}, 4, RECORD) for _ in range(3)])
    script = (slurm / "script").read_text()
    for line in (
        "--array=0-2%3",
        "--partition=gpu",
        "--time=240",
        "--gpus-per-node=1",
        "--mem=16GB",
        "--job-name=reduction_ratio",
    ):
        assert f"#SBATCH {line}\n" in script
    assert [launcher.is_over(job) for job in jobs] == [False, True, False]
    launcher.stop(jobs[0])
    assert "17_0" in (slurm / "cancelled").read_text()


def test_slurm_options_that_do_not_exist_are_refused(slurm, monkeypatch):
    with pytest.raises(UserError, match=r"slurm: .*partitoin"):
        SlurmLauncher(slurm / "jobs", "s", None, {"partitoin": "gpu"}, [TRAINER])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no program 'sbatch' on this machine"):
        SlurmLauncher(slurm / "jobs", "s", None, {}, [TRAINER])
