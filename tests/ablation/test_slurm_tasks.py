"""The tasks of a Slurm job are those that Lightning expects for the devices of a training."""

import re

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment
from submitit.slurm.slurm import _make_sbatch_string

from segformer_pl.ablation.launchers import COMMON_OPTIONS, slurm_tasks
from segformer_pl.errors import UserError


def trainer(devices="auto", num_nodes=1, accelerator="auto"):
    return {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes}


@pytest.mark.parametrize(
    ("settings", "options", "num_devices", "num_nodes"),
    [
        (trainer(), {}, 1, 1),
        (trainer(2), {"gpus_per_node": 2}, 2, 1),
        (trainer([0, 3], 2), {"gpus_per_node": 4}, 2, 2),
        (trainer("4"), {}, 4, 1),
        (trainer("0,1"), {"gpus_per_node": 2}, 2, 1),
        (trainer(-1), {"gpus_per_node": 8}, 8, 1),
        (trainer("auto", 3), {"gpus_per_node": 4, "nodes": 3}, 4, 3),
        (trainer("auto", accelerator="cpu"), {"gpus_per_node": 4}, 1, 1),
        (trainer(2, accelerator="cpu"), {"tasks_per_node": 2}, 2, 1),
    ],
)
def test_lightning_accepts_the_tasks_that_submitit_asks_for(
    tmp_path, monkeypatch, settings, options, num_devices, num_nodes
):
    tasks = slurm_tasks([settings, settings], options)
    assert tasks == {"tasks_per_node": num_devices, "nodes": num_nodes}
    assert set(tasks) <= COMMON_OPTIONS
    script = _make_sbatch_string(
        "x", tmp_path, nodes=tasks["nodes"], ntasks_per_node=tasks["tasks_per_node"]
    )
    # What Slurm puts into the environment of a job with these lines
    per_node = re.search(r"--ntasks-per-node=(\d+)", script)[1]
    nodes = re.search(r"--nodes=(\d+)", script)[1]
    monkeypatch.setenv("SLURM_JOB_NAME", "study")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", per_node)
    monkeypatch.setenv("SLURM_NNODES", nodes)
    monkeypatch.setenv("SLURM_NTASKS", str(int(per_node) * int(nodes)))
    environment = SLURMEnvironment()
    environment.validate_settings(num_devices, num_nodes)  # raises for other numbers
    assert environment.world_size() == num_devices * num_nodes


@pytest.mark.parametrize(
    ("trainers", "options", "message"),
    [
        ([trainer(1), trainer(2)], {}, "trainer.devices and trainer.num_nodes differ between"),
        ([trainer("two")], {}, "trainer.devices is 'two'; give a number of devices"),
        ([trainer(2)], {"tasks_per_node": 1}, "tasks_per_node is 1, but trainer.devices is 2"),
        ([trainer(1, 2)], {"nodes": 1}, "nodes is 1, but trainer.num_nodes is 2"),
        ([trainer(1)], {"tasks_per_node": 4}, "tasks_per_node is 4, but trainer.devices is 1"),
        ([trainer(4)], {"gpus_per_node": 2}, "gpus_per_node is 2, but trainer.devices is 4"),
        ([trainer(2)], {"gpus_per_task": 1}, "gpus_per_task hides a task's GPU"),
        ([trainer(2)], {"ntasks_per_node": 2}, "ntasks_per_node is set to trainer.devices"),
        ([trainer(2)], {"use_srun": False}, "use_srun false starts one task alone"),
    ],
)
def test_tasks_that_a_training_would_wait_for_are_refused(trainers, options, message):
    with pytest.raises(UserError, match=message) as error:
        slurm_tasks(trainers, options)
    assert "\n" not in str(error.value)
