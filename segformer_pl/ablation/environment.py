"""The versions and the hardware that a run of a study is trained with, without importing torch."""

import os
import platform
import subprocess
from importlib.metadata import version
from typing import Any

from segformer_pl import __version__
from segformer_pl.analysis.provenance import cpu_name


def describe_environment(config: dict[str, Any], variables: dict[str, str]) -> dict[str, Any]:
    """Return what a run is trained with: versions, device and number of threads.

    Args:
        config: Complete settings of ``fit``.
        variables: Environment variables of ``fit`` that differ from those of this process.
    """
    environment = os.environ | variables
    affinity = getattr(os, "sched_getaffinity", None)
    num_threads = environment.get("OMP_NUM_THREADS") or environment.get("SLURM_CPUS_PER_TASK")
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    is_cpu = config.get("trainer", {}).get("accelerator") == "cpu"
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "lightning": version("lightning"),
        "segformer_pl": __version__,
        "device": (None if is_cpu else _gpu(environment)) or cpu_name(),
        "num_threads": int(num_threads) if num_threads else cores,
        "platform": platform.platform(),
    }


def _gpu(environment: dict[str, str]) -> str | None:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible:
        command.append(f"--id={visible.split(',')[0]}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)
