"""Where jobs run: as processes of this machine or as a Slurm array, both started by submitit."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import submitit

from segformer_pl.ablation.folder import State
from segformer_pl.ablation.job import RunJob
from segformer_pl.atomic import advice
from segformer_pl.errors import UserError

# submitit ends a local job after 2 minutes by default.
NO_LIMIT_MIN = 60 * 24 * 3650
# Options that submitit has for all its executors; the others get the prefix "slurm_".
COMMON_OPTIONS = {
    "cpus_per_task",
    "gpus_per_node",
    "mem_gb",
    "name",
    "nodes",
    "stderr_to_stdout",
    "tasks_per_node",
    "timeout_min",
}
# Slurm ends a job after its time, and the job is requeued with a checkpoint, this often.
MAX_NUM_TIMEOUTS = 1000
QUEUE_INTERVAL = 5.0  # seconds between two calls of squeue


class Launcher(Protocol):
    """Starts jobs and says which of them have ended."""

    def num_free(self) -> int:
        """Return how many jobs can be submitted now."""

    def submit(self, jobs: Sequence[RunJob]) -> list[submitit.Job[State]]:
        """Start jobs, no more than :meth:`num_free`.

        Raises:
            UserError: None of them has been started, for example because the disk is full.
        """

    def is_over(self, job: submitit.Job[State]) -> bool:
        """Return whether a job has ended, however it ended."""

    def stop(self, job: submitit.Job[State]) -> None:
        """Ask a job to end with a checkpoint; a second time, at once."""


class LocalLauncher:
    """Runs at most a number of jobs at a time on this machine.

    Args:
        folder: Folder for submitit's files.
        max_parallel: Number of jobs at a time.
        gpus: Sets of GPUs, each for one job at a time; if there are fewer sets than jobs, jobs
            share them. Empty: jobs use no GPU.
    """

    def __init__(self, folder: Path, max_parallel: int, gpus: Sequence[str] = ()) -> None:
        self._executor = submitit.LocalExecutor(folder)
        self._executor.update_parameters(timeout_min=NO_LIMIT_MIN)
        self._gpus = gpus
        self._slots: list[submitit.Job[State] | None] = [None] * max_parallel
        self._num_threads = max(1, num_cores() // max_parallel)

    def num_free(self) -> int:
        self._slots = [None if job is None or self.is_over(job) else job for job in self._slots]
        # One at a time, so that either all jobs of a call are started or none.
        return min(self._slots.count(None), 1)

    def submit(self, jobs: Sequence[RunJob]) -> list[submitit.Job[State]]:
        with _writing(self._executor.folder):
            return [self._submit(job) for job in jobs]

    def _submit(self, run_job: RunJob) -> submitit.Job[State]:
        slot = self._slots.index(None)
        # submitit gives a job CUDA_VISIBLE_DEVICES="" unless it counts GPUs itself, from 0.
        gpus = self._gpus[slot % len(self._gpus)] if self._gpus else ""
        run_job.variables = {
            "OMP_NUM_THREADS": str(self._num_threads),
            "CUDA_VISIBLE_DEVICES": gpus,
        }
        # Ctrl-C in a terminal reaches all its processes, and submitit's would kill the training
        # one second later. They inherit this mask; the training does not, see RunJob.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            job = self._executor.submit(run_job)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self._slots[slot] = job
        return job

    def is_over(self, job: submitit.Job[State]) -> bool:
        return job.done()

    def stop(self, job: submitit.Job[State]) -> None:
        # LocalJob.cancel() sends SIGINT, after which submitit waits one second and kills. The id is
        # that of the process that submitit started, and SIGTERM is passed on.
        if not job.done():
            with suppress(ProcessLookupError):
                os.kill(int(job.job_id), signal.SIGTERM)


class SlurmLauncher:
    """Submits all jobs as one array of Slurm, of which a number run at a time.

    Each device of a training is a task of Slurm, see :func:`slurm_tasks`.

    Args:
        folder: Folder for submitit's files, on a disk that the nodes share.
        name: Name of the jobs.
        max_parallel: Number of jobs at a time; None for as many as Slurm allows.
        options: Options of submitit or Slurm, such as ``{"partition": "gpu", "timeout_min": 240}``.
        trainers: Settings of the trainer of every variant.

    Raises:
        UserError: There is no Slurm here, there is no such option, or the options do not give each
            device of a training a task.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        max_parallel: int | None,
        options: Mapping[str, Any],
        trainers: Sequence[Mapping[str, Any]],
    ) -> None:
        for program in ("sbatch", "squeue"):
            if shutil.which(program) is None:
                raise UserError(
                    f"launcher: there is no program '{program}' on this machine; start the command "
                    "on a login node of a Slurm cluster, or give --launcher local"
                )
        given = {"name": name, **options, **slurm_tasks(trainers, options)}
        if max_parallel is not None:
            given["array_parallelism"] = max_parallel
        self._executor = submitit.AutoExecutor(
            folder, cluster="slurm", slurm_max_num_timeout=MAX_NUM_TIMEOUTS
        )
        try:
            self._executor.update_parameters(
                **{
                    key if key in COMMON_OPTIONS else f"slurm_{key}": value
                    for key, value in given.items()
                }
            )
        except (NameError, TypeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"slurm: {reason}") from error
        self._queue: set[str] | None = None
        self._asked = 0.0

    def num_free(self) -> int:
        return 1_000_000

    def submit(self, jobs: Sequence[RunJob]) -> list[submitit.Job[State]]:
        try:
            with _writing(self._executor.folder), self._executor.batch():
                submitted = [self._executor.submit(job) for job in jobs]
        except submitit.core.utils.FailedJobError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"slurm: sbatch refused the jobs ({reason})") from error
        self._asked = 0.0
        return submitted

    def is_over(self, job: submitit.Job[State]) -> bool:
        # submitit asks sacct, which not every cluster has, and which it trusts for ten minutes.
        if job.paths.result_pickle.exists():
            return True
        if time.monotonic() - self._asked > QUEUE_INTERVAL:
            self._queue = _read_queue()
            self._asked = time.monotonic()
        return self._queue is not None and job.job_id not in self._queue

    def stop(self, job: submitit.Job[State]) -> None:
        job.cancel()  # SIGTERM, or removal from the queue


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn an error of submitit when it writes its files into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot start a job, because nothing can be written to '{folder}': "
            f"{error.strerror or error}; {advice(error.errno)}, and start the command again"
        ) from error


def slurm_tasks(
    trainers: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> dict[str, int]:
    """Return the numbers of nodes and of tasks per node with which Slurm has to start trainings.

    Lightning starts no processes in a job of Slurm. It expects one task for each device, with
    ``--ntasks-per-node`` equal to ``trainer.devices`` and ``--nodes`` to ``trainer.num_nodes``, and
    all GPUs of a node visible to each of its tasks. With fewer tasks a training would wait for
    ranks that never come.

    Args:
        trainers: Settings of the trainer of every variant, which all run in one array.
        options: Options of submitit or Slurm.

    Raises:
        UserError: The trainers differ in their devices, or the options contradict them.
    """
    gpus = options.get("gpus_per_node")
    wanted = {(_devices(trainer, gpus), int(trainer["num_nodes"])) for trainer in trainers}
    if len(wanted) > 1:
        raise UserError(
            "trainer.devices and trainer.num_nodes differ between the variants, whose runs are one "
            "array of Slurm with the same tasks; give all variants the same"
        )
    ((num_devices, num_nodes),) = wanted
    uses_gpus = any(trainer["accelerator"] != "cpu" for trainer in trainers)
    tasks = {"tasks_per_node": num_devices, "nodes": num_nodes}
    settings = {"tasks_per_node": "trainer.devices", "nodes": "trainer.num_nodes"}
    for option, number in tasks.items():
        if options.get(option, number) != number:
            raise UserError(
                f"slurm: {option} is {options[option]}, but {settings[option]} is {number}, and "
                f"each device is a task of Slurm; leave {option} out, or set {settings[option]} in "
                "the budget"
            )
    if uses_gpus and isinstance(gpus, int) and gpus < num_devices:
        raise UserError(
            f"slurm: gpus_per_node is {gpus}, but trainer.devices is {num_devices}; give "
            f"gpus_per_node: {num_devices}, or set trainer.devices in the budget"
        )
    if num_devices * num_nodes > 1:
        for option, reason in (
            ("gpus_per_task", "hides a task's GPU from the others; give gpus_per_node"),
            ("ntasks_per_node", "is set to trainer.devices; leave it out"),
            ("use_srun", "false starts one task alone; leave it out"),
        ):
            if option in options:
                raise UserError(
                    f"slurm: the trainings run on {num_devices * num_nodes} devices, and {option} "
                    f"{reason}"
                )
    return tasks


def _devices(trainer: Mapping[str, Any], gpus: Any) -> int:
    """Return the number of devices of a training on each node, as Lightning counts them."""
    devices = trainer["devices"]
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list):
        return len(devices)
    if devices in ("auto", "-1", -1):  # all GPUs that the job has, and one process on the CPU
        is_cpu = trainer["accelerator"] == "cpu"
        return gpus if isinstance(gpus, int) and gpus > 0 and not is_cpu else 1
    try:
        return int(devices)
    except ValueError as error:
        raise UserError(f"trainer.devices is {devices!r}; give a number of devices") from error


def _read_queue() -> set[str] | None:
    """Return the ids of the jobs that wait or run; None if Slurm does not answer."""
    user = str(os.getuid())
    command = ["squeue", "--noheader", "--array", f"--user={user}", "--format=%i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return set(done.stdout.split())


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def gpu_sets(num_gpus: int, num_each: int) -> list[str]:
    """Divide the visible GPUs into sets, one per job, as values of ``CUDA_VISIBLE_DEVICES``.

    Args:
        num_gpus: Number of GPUs that torch sees.
        num_each: GPUs of one job.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(num_gpus)]
    starts = range(0, len(names) - num_each + 1, num_each)
    return [",".join(names[start : start + num_each]) for start in starts]
