"""The processes of a training, started by Lightning itself, by ``torchrun`` or by ``srun``.

Lightning takes the number of processes from the trainer's settings and waits for as many. So it
would wait for ever if the launcher has started another number, and there is nothing to wait for in
the shell of a Slurm job, whose variables are those of a process that ``srun`` has started.
"""

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from segformer_pl.errors import UserError

OPTIONS = {"torchrun": "--nproc-per-node", "srun": "--ntasks-per-node"}


class Launch(NamedTuple):
    """What a launcher has started: its name, and the numbers of nodes and of processes on each."""

    program: str
    num_nodes: int
    num_local: int


def find_launch() -> Launch | None:
    """Return the launch that this process is part of; None if it starts its own ranks, if any.

    Raises:
        UserError: The nodes have different numbers of processes.
    """
    variables = os.environ
    if TorchElasticEnvironment.detect():
        num, num_local = int(variables["WORLD_SIZE"]), int(variables["LOCAL_WORLD_SIZE"])
        if num % num_local:
            raise _uneven("torchrun", f"{num} processes in all, {num_local} on this node")
        return Launch("torchrun", num // num_local, num_local)
    # A batch script, or the shell of salloc, is no step; that of `srun --pty` is one of one task.
    if int(variables.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None
    tasks = variables["SLURM_STEP_TASKS_PER_NODE"]  # 2, 2(x3) for three nodes, or 2,1
    if (match := re.fullmatch(r"(\d+)(?:\(x\d+\))?", tasks)) is None:
        raise _uneven("srun", f"{tasks} tasks on the nodes")
    return Launch("srun", int(variables["SLURM_STEP_NUM_NODES"]), int(match[1]))


def launch_arguments(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of the trainer that replace its settings, so that they fit the launch.

    ``devices: auto`` becomes the number of processes on a node. ``num_nodes`` is always that of the
    launch, since it can change when ``torchrun`` restarts or Slurm requeues a training.

    Args:
        trainer: Arguments of the trainer, with plugins as objects.

    Raises:
        UserError: ``trainer.devices`` is another number than the launcher has started.
    """
    # Lightning says it wherever srun is installed, and find_launch takes care of the case.
    warnings.filterwarnings("ignore", "The `srun` command is available")
    plugins = trainer["plugins"] or []
    plugins = list(plugins) if isinstance(plugins, list) else [plugins]
    launch = find_launch()
    if any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        return {}
    if launch is None:
        if "SLURM_NTASKS" not in os.environ:
            return {}
        return {"plugins": [*plugins, LightningEnvironment()]}
    program, num_nodes, num_local = launch
    devices = trainer["devices"]
    given = _count(devices)
    if given not in (None, num_local):
        raise UserError(
            f"trainer.devices is {devices}, but {program} has started {num_local} processes on "
            f"each node; give {program} {OPTIONS[program]}={given}, or --trainer.devices="
            f"{num_local}, and keep the product with data.batch_size"
        )
    if trainer["num_nodes"] not in (1, num_nodes):
        rank_zero_info(
            f"trainer.num_nodes is {trainer['num_nodes']}, but {program} has started processes on "
            f"{num_nodes}, which is used"
        )
    arguments: dict[str, Any] = {"num_nodes": num_nodes}
    if devices == "auto":
        arguments["devices"] = num_local
    if program == "srun":
        # Lightning reads variables of the job, and a step can have fewer tasks. It detects no step
        # of a job that is called bash, and refuses `srun --ntasks` without --ntasks-per-node.
        os.environ["SLURM_NTASKS"] = os.environ["SLURM_STEP_NUM_TASKS"]
        os.environ["SLURM_NTASKS_PER_NODE"] = str(num_local)
        os.environ["SLURM_NNODES"] = str(num_nodes)
        os.environ["SLURM_NODELIST"] = os.environ["SLURM_STEP_NODELIST"]
        # StopOnSignal requeues.
        arguments["plugins"] = [*plugins, SLURMEnvironment(auto_requeue=False)]
    return arguments


def _count(devices: Any) -> int | None:
    """Return the number of devices of ``trainer.devices``; None if it depends on the machine."""
    if isinstance(devices, str) and "," in devices:
        return sum(1 for part in devices.split(",") if part.strip())
    if isinstance(devices, list):
        return len(devices)
    is_number = str(devices).isdecimal()  # neither auto nor -1
    return int(devices) if is_number else None


def _uneven(program: str, found: str) -> UserError:
    return UserError(
        f"{program} has started different numbers of processes on the nodes ({found}), but "
        f"training needs the same number on each; give {program} {OPTIONS[program]}"
    )
