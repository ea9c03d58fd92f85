"""The job that trains and evaluates one run of a study.

A job starts ordinary processes, ``python -m segformer_pl fit`` and ``validate``, instead of calling
them. So a crash, or a kill for lack of memory, ends that process alone and is recorded; ranks that
Lightning starts are started as in any other ``fit``; and the job has time to wait for a checkpoint
when Slurm ends it.
:mod:`.folder` describes the folder, and the output goes to ``.jobs/<name of the run folder>.log``.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from submitit.helpers import DelayedSubmission

from segformer_pl.ablation.environment import describe_environment
from segformer_pl.ablation.folder import (
    EVALUATIONS,
    FAILURE_FILE,
    JOBS_FOLDER,
    LAST_CHECKPOINT,
    LOCK_FILE,
    RECORD_FILE,
    State,
    check_record,
    copy_run,
    find_twin,
    is_done,
    is_evaluated,
    is_trained,
    locked,
    read_record,
    write_evaluation_settings,
)
from segformer_pl.atomic import atomic_write_text
from segformer_pl.errors import UserError

VALIDATION = ".validation"  # folder of a validation that the training missed
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)
POLL = 0.05  # seconds


class _Failure(Exception):
    """A process of a job has failed; the message is the sentence to record."""


class _Stop(Exception):
    """A job was told to stop, or its process was."""


@dataclass
class RunJob:
    """Trains and evaluates one run in a process of submitit, unless another process does.

    With several tasks of Slurm (ranks), rank 0 decides and the others run the same commands::

        rank 0     lock     publish 0: fit ...      run it     publish 1: none     end
        rank 1     wait for 0                       run it     wait for 1          end

    Args:
        folder: Run folder.
        config: Complete settings of its ``fit``, with logger and seed.
        evaluations: Settings of ``validate`` of each additional evaluation, as nested dictionaries.
        max_steps: Number of training steps.
        record: Content of ``ablation.json``, without the environment.
        retried_failure: Time of change of the ``failure.txt`` that this job may remove, in
            nanoseconds. A later failure is another invocation's.
        variables: Environment variables of its processes.
    """

    folder: Path
    config: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]
    max_steps: int
    record: dict[str, Any]
    retried_failure: int | None = None
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._num_stops = 0
        self._num_published = 0
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A process cannot be pickled, and Slurm restarts a job from its pickle.
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()

    @property
    def log(self) -> Path:
        """File with the output of all processes of this run."""
        rank = f".rank{_rank()}" if _rank() else ""
        return self.folder.parent / JOBS_FOLDER / f"{self.folder.name}{rank}.log"

    def __call__(self) -> State:
        """Run the job and return the state in which it leaves or finds the folder."""
        signal.signal(signal.SIGTERM, self._stop)
        # Ctrl-C reaches all processes of a terminal: `fit` handles it, and the job waits for that.
        # A function and not SIG_IGN, which the processes would inherit.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if _rank():
            return self._follow()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.folder) as self._descriptor:
                return State.RUNNING if self._descriptor is None else self._work()
        finally:
            self._publish(None)

    def checkpoint(self) -> DelayedSubmission:
        """End the training with a checkpoint; submitit calls this before Slurm ends the job."""
        self._stop(signal.SIGTERM)
        if self._process is not None:
            # This runs in a signal handler, maybe inside of `Popen.wait`, which holds a lock.
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(self)

    def _work(self) -> State:
        failure = self.folder / FAILURE_FILE
        if is_done(self.folder, self.max_steps, self.evaluations):
            return State.DONE
        if failure.is_file() and failure.stat().st_mtime_ns != self.retried_failure:
            return State.FAILED
        try:
            check_record(self.folder, self.record)
            failure.unlink(missing_ok=True)
            self._write_record()
            if not is_trained(self.folder, self.max_steps) and not self._copy_twin():
                self._train()
            for name in self.evaluations:
                if not is_evaluated(self.folder, name):
                    self._evaluate(name, self.evaluations[name])
        except _Stop:
            return State.INTERRUPTED
        except (_Failure, UserError, OSError) as error:
            atomic_write_text(failure, f"{error}\n")
            return State.FAILED
        return State.DONE

    def _write_record(self) -> None:
        origin = {"environment": describe_environment(self.config, self.variables)}
        if is_trained(self.folder, self.max_steps):
            with suppress(UserError):
                origin |= _origin(self.folder)
        text = json.dumps({**self.record, **origin}, indent=1)
        atomic_write_text(self.folder / RECORD_FILE, f"{text}\n")

    def _copy_twin(self) -> bool:
        """Copy the same training from another study; return whether there is one."""
        seed, digest = self.record["seed"], self.record["digest"]
        data_path = self.config["data"]["path"]
        twin = find_twin(self.folder, seed, digest, self.max_steps, data_path)
        if twin is None:
            return False
        origin = {"copied_from": f"{twin.parent.name}/{twin.name}", **_origin(twin)}
        text = json.dumps({**self.record, **origin}, indent=1)
        atomic_write_text(self.folder / RECORD_FILE, f"{text}\n")
        copy_run(twin, self.folder)
        return True

    def _train(self) -> None:
        last = self.folder / LAST_CHECKPOINT
        if last.is_file():
            options = ["--ckpt_path", str(last)]
        else:
            _set_aside(self.folder)
            options = []
        self._run("fit", [self._write_config("", self.config)], options)
        if not is_trained(self.folder, self.max_steps):
            # The training ended between its last step and the end of the validation after it, and
            # a resumed `fit` without a step to make does not validate.
            self._validate_last_step()

    def _validate_last_step(self) -> None:
        folder = self.folder / VALIDATION
        self._validate(folder, {})
        files = sorted((folder / "evaluation").glob("*.npz"))
        if not files:
            raise _Failure(f"the validation wrote no evaluation (log: '{self.log}')")
        target = self.folder / "evaluation" / f"val_step_{self.max_steps:07d}.npz"
        target.parent.mkdir(exist_ok=True)
        files[0].rename(target)
        shutil.rmtree(folder)

    def _evaluate(self, name: str, settings: dict[str, Any]) -> None:
        folder = self.folder / EVALUATIONS / name
        self._validate(folder, settings)
        write_evaluation_settings(folder, settings)

    def _validate(self, folder: Path, settings: dict[str, Any]) -> None:
        """Run ``validate`` with the last checkpoint into a folder below the run folder."""
        last = self.folder / LAST_CHECKPOINT
        if not last.is_file():
            raise _Failure(
                f"the evaluation {folder.name} needs '{last}', which does not exist; move the run "
                "folder away to train it anew, or take the evaluation out of the study"
            )
        if folder.is_dir():  # it holds no evaluation, so an earlier attempt did not come to its end
            shutil.rmtree(folder)
        config = validation_settings(self.config, csv_logger(folder))
        files = [self._write_config(f".{folder.name}", config)]
        if settings:
            files.append(self._write_config(f".{folder.name}.settings", settings))
        self._run("validate", files, ["--ckpt_path", str(last)])

    def _write_config(self, suffix: str, settings: dict[str, Any]) -> Path:
        file = self.log.parent / f"{self.folder.name}{suffix}.yaml"
        atomic_write_text(file, yaml.safe_dump(settings, sort_keys=False))
        return file

    def _run(self, command: str, configs: list[Path], options: list[str]) -> None:
        """Run a command to its end.

        Raises:
            _Stop: It was stopped by a signal.
            _Failure: It failed.
        """
        arguments = [command, *(f"--config={config}" for config in configs), *options]
        self._publish(arguments)
        start = self.log.stat().st_size if self.log.is_file() else 0
        status = self._wait(arguments)
        if status == 0:
            return
        if self._num_stops or status in STOPPED:
            raise _Stop
        if status < 0:
            name = signal.Signals(-status).name
            memory = ", as the system does when memory runs out" if name == "SIGKILL" else ""
            raise _Failure(f"{command} was ended by {name}{memory} (log: '{self.log}')")
        with self.log.open("rb") as stream:
            stream.seek(start)
            text = stream.read().decode("utf-8", errors="replace")
        sentence = last_sentence(text) or f"{command} ended with exit status {status}"
        raise _Failure(f"{sentence} (log: '{self.log}')")

    def _wait(self, arguments: list[str]) -> int:
        """Start ``python -m segformer_pl`` and return its exit status."""
        if self._num_stops:
            raise _Stop
        inherited = () if self._descriptor is None else (self._descriptor,)
        with self.log.open("ab") as stream:
            stream.write(f"\n$ python -m segformer_pl {' '.join(arguments)}\n".encode())
            stream.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "segformer_pl", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | self.variables,
                # If this job is killed, its process still holds the lock.
                pass_fds=inherited,
                # Slurm's signal before the end of the time goes to all processes. This job answers
                # it, see `checkpoint`; `fit` would be killed by it.
                preexec_fn=_ignore_usr2,
            )
        if self._num_stops:  # the signal came before there was a process
            self._process.send_signal(signal.SIGTERM)
        status = self._process.wait()
        self._process = None
        return status

    def _stop(self, signum: int, frame: FrameType | None = None) -> None:
        """Pass SIGTERM on; a second one becomes Ctrl-C, with which a stopping fit ends at once."""
        self._num_stops += 1
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM if self._num_stops == 1 else signal.SIGINT)

    # Several tasks of one Slurm job

    def _publish(self, arguments: list[str] | None) -> None:
        """Tell the other ranks what to run; None is the end."""
        if _is_in_slurm_job() and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            atomic_write_text(self._published(self._num_published), json.dumps(arguments))
            self._num_published += 1

    def _published(self, number: int) -> Path:
        job = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        return self.log.parent / f"{job}.{number}.json"

    def _follow(self) -> State:
        """Run what rank 0 runs."""
        for number in count():
            file = self._published(number)
            while not file.is_file():
                if self._num_stops:
                    return State.INTERRUPTED
                time.sleep(POLL)
            arguments = json.loads(file.read_text(encoding="utf-8"))
            if arguments is None:
                break
            try:
                self._wait(arguments)
            except _Stop:
                return State.INTERRUPTED
        return State.RUNNING


def _origin(folder: Path) -> dict[str, Any]:
    """Return what ``ablation.json`` says about the process that trained a run."""
    record = read_record(folder)
    return {key: record[key] for key in ("environment", "copied_from") if key in record}


def validation_settings(config: dict[str, Any], logger: Any) -> dict[str, Any]:
    """Return complete settings of a ``fit`` as those of a ``validate`` of its network.

    Args:
        config: Settings of the ``fit``.
        logger: Logger of the ``validate``.
    """
    # Callbacks such as figures of receptive fields were part of the training.
    fixed = {"callbacks": None, "logger": logger, "default_root_dir": None}
    return {**config, "trainer": {**config["trainer"], **fixed}}


def csv_logger(folder: Path, **arguments: Any) -> dict[str, Any]:
    """Return the setting of a logger that writes into a folder."""
    place = {"save_dir": str(folder.parent.parent), "name": folder.parent.name}
    return {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {**place, "version": folder.name, **arguments},
    }


def last_sentence(text: str) -> str | None:
    """Return the error with which a command ended, from its output; None if it shows none.

    Args:
        text: Output of a command: ``error: <sentence>``, or a traceback.
    """
    lines = text.splitlines()
    errors = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    traces = [index for index, line in enumerate(lines) if line.startswith("Traceback (most")]
    if errors and errors[-1] > max(traces, default=-1):
        return lines[errors[-1]].removeprefix("error: ")
    if traces:
        for line in lines[traces[-1] + 1 :]:
            # The frames of a traceback are indented, and the message can have several lines.
            if re.match(r"[A-Za-z_][\w.]*(:|$)", line):
                return line
    return None


def _set_aside(folder: Path) -> None:
    """Move what a run without a checkpoint has left, because ``fit`` starts in an empty folder."""
    keep = {LOCK_FILE, RECORD_FILE}
    rest = [
        path
        for path in folder.iterdir()
        if path.name not in keep and not path.name.startswith("superseded_after_step_")
    ]
    if rest:
        names = ("", *(f"_{number}" for number in range(2, 1000)))
        places = (folder / f"superseded_after_step_0000000{name}" for name in names)
        aside = next(place for place in places if not place.exists())
        aside.mkdir()
        for path in rest:
            path.rename(aside / path.name)


def _rank() -> int:
    """Return the rank of this process among the tasks of a Slurm job."""
    return int(os.environ.get("SLURM_PROCID", "0")) if _is_in_slurm_job() else 0


def _is_in_slurm_job() -> bool:
    """Return whether submitit started this process through Slurm."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def _ignore_usr2() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
