"""The trainer is given the numbers of nodes and devices that torchrun or srun have started."""

import os

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch import Trainer

from segformer_pl.cli.launching import Launch, find_launch, launch_arguments
from segformer_pl.errors import UserError


def torchrun(num_nodes, num_local):
    return {
        "TORCHELASTIC_RUN_ID": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": str(num_local),
        "WORLD_SIZE": str(num_nodes * num_local),
    }


def srun(tasks, num_nodes=1, per_node=None):
    """Variables of `srun --ntasks`, without --ntasks-per-node, in a larger job called bash."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "bash",
        "SLURM_NTASKS": "9",
        "SLURM_NNODES": "9",
        "SLURM_NODELIST": "other[1-9]",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": str(num_nodes),
        "SLURM_STEP_NODELIST": "host[3-4]",
        "SLURM_STEP_TASKS_PER_NODE": per_node or str(tasks // num_nodes),
    }


# The shell of `salloc --ntasks=2`, or a batch script
ALLOCATION = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "work", "SLURM_NTASKS": "2"}


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """Function that sets the variables of a launcher; those that tests add are removed."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return os.environ.update


def settings(devices="auto", num_nodes=1, plugins=None):
    return {"devices": devices, "num_nodes": num_nodes, "plugins": plugins}


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ({}, None),
        (ALLOCATION, None),
        (srun(1), None),  # such as the shell of `srun --pty`
        (torchrun(1, 1), Launch("torchrun", 1, 1)),
        (torchrun(3, 4), Launch("torchrun", 3, 4)),
        (srun(2), Launch("srun", 1, 2)),
        (srun(6, 3, "2(x3)"), Launch("srun", 3, 2)),
        (srun(6) | torchrun(2, 8), Launch("torchrun", 2, 8)),  # torchrun in a job of Slurm
    ],
)
def test_launches_are_recognised(variables, launcher, expected):
    variables(launcher)
    assert find_launch() == expected


def test_devices_and_nodes_are_those_of_the_launch(variables):
    assert launch_arguments(settings(4)) == {}
    variables(torchrun(2, 4))
    assert launch_arguments(settings()) == {"num_nodes": 2, "devices": 4}
    assert launch_arguments(settings(4, 3)) == {"num_nodes": 2}  # one node fewer than at the start
    assert launch_arguments(settings([0, 1, 2, 3])) == {"num_nodes": 2}
    assert launch_arguments(settings("0,1,2,3")) == {"num_nodes": 2}
    with pytest.raises(UserError, match=r"trainer\.devices is 8, but torchrun has started 4 proc"):
        launch_arguments(settings(8))


@pytest.mark.parametrize("launcher", [srun(3, 2, "2,1"), torchrun(1, 3) | {"WORLD_SIZE": "5"}])
def test_nodes_with_different_numbers_of_processes_are_refused(variables, launcher):
    variables(launcher)
    with pytest.raises(UserError, match="different numbers of processes on the nodes"):
        launch_arguments(settings())


def test_a_trainer_under_srun_waits_for_the_tasks_of_its_step(variables):
    variables(srun(4, 2, "2(x2)"))
    arguments = launch_arguments(settings())
    trainer = Trainer(accelerator="cpu", logger=False, **arguments)
    environment = trainer.strategy.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert trainer.world_size == environment.world_size() == 4
    assert environment.main_address == "host3"


def test_a_trainer_in_the_shell_of_a_job_starts_its_own_processes(variables):
    """Lightning would wait for a second task, or refuse `salloc --ntasks=2`."""
    variables(ALLOCATION)
    trainer = Trainer(accelerator="cpu", devices=2, logger=False, **launch_arguments(settings(2)))
    assert isinstance(trainer.strategy.cluster_environment, LightningEnvironment)
    assert not trainer.strategy.cluster_environment.creates_processes_externally


def test_an_environment_that_the_user_gives_is_left_alone(variables):
    variables(srun(2) | {"SLURM_NTASKS": "1"})
    assert launch_arguments(settings(8, plugins=[SLURMEnvironment()])) == {}
