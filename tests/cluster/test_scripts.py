"""The scripts of experiments/cluster refuse a command line without the name of a run."""

import os
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "cluster"


def start(script, *arguments, **changed):
    outer = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    # PYTHON shows whether the script goes on to start the training.
    variables = outer | {"PYTHON": "echo started"} | changed
    command = ["bash", FOLDER / script, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["slurm.sbatch", "torchrun.sh"])
@pytest.mark.parametrize("arguments", [[], [""], ["--config", "FILE"]])
def test_the_name_of_the_run_is_missing(script, arguments):
    done = start(script, *arguments)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: give the name of the run first: {script} RUN --config FILE [options of fit]\n"
    )
    assert "started" not in done.stdout


def test_the_batch_script_without_sbatch_says_so():
    done = start("slurm.sbatch", "first", "--config", "FILE")
    assert done.returncode != 0
    assert "start this script with sbatch" in done.stderr


def test_an_interpreter_without_the_package_is_named():
    done = start("slurm.sbatch", "first", "--config", "FILE", SLURM_JOB_ID="1", PYTHON="false")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'false' lacks segformer_pl or lightning; activate the ")


def test_torchrun_is_started_with_the_name_of_the_run():
    done = start("torchrun.sh", "first", "--config", "FILE")
    assert done.returncode == 0
    assert done.stdout.startswith("started -m torch.distributed.run ")
    assert done.stdout.endswith("-m segformer_pl fit --config FILE --run_name=first\n")
