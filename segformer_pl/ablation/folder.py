"""The run folder of a study: its state and its lock.

The state of a study is in its run folders alone::

    NAME.seed0.small.0f3a9c1e/              everything that a fit writes
      .lock                                 locked by the job and by the process that it started
      ablation.json                         variant, seed, digest, environment
      failure.txt                           last sentence of a failure
      checkpoints/last.ckpt                 training can be resumed
      evaluation/val_step_0000800.npz       training is complete: 800 is its last step
      evaluations/at_96/                    folder of a validate, with an evaluation of its own
        settings.yaml                       in what it differs from the training, as in the study

This module looks at names of files. It does not import :mod:`segformer_pl.analysis.run`, which
imports torch, because a job would import it only to wait for a process that imports it again.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from segformer_pl.atomic import atomic_write_text
from segformer_pl.errors import UserError

JOBS_FOLDER = ".jobs"
LOCK_FILE = ".lock"
RECORD_FILE = "ablation.json"
FAILURE_FILE = "failure.txt"
LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
EVALUATIONS = "evaluations"
SETTINGS_FILE = "settings.yaml"
COPIED = ".evaluation.partial"  # until it is complete
# Another invocation that looks at the lock holds it for less than a millisecond.
LOCK_TIMEOUT = 1.0  # seconds
POLL = 0.05  # seconds
IDENTITY = ("study", "variant", "seed", "budget", "digest")


class State(StrEnum):
    """State of a run folder, and the word that is shown for it."""

    WAITING = "waiting"
    INTERRUPTED = "interrupted"  # has a checkpoint
    RUNNING = "running"  # in this invocation or another one
    FAILED = "failed"
    DONE = "done"


def find_state(folder: Path, max_steps: int, evaluations: Iterable[str]) -> State:
    """Return the state of a run folder, which need not exist.

    Args:
        folder: Run folder.
        max_steps: Number of training steps.
        evaluations: Names of its additional evaluations.
    """
    if is_locked(folder):
        return State.RUNNING  # also while a complete run writes its last files
    if is_done(folder, max_steps, evaluations):
        return State.DONE
    if (folder / FAILURE_FILE).is_file():
        return State.FAILED
    return State.INTERRUPTED if (folder / LAST_CHECKPOINT).is_file() else State.WAITING


def is_done(folder: Path, max_steps: int, evaluations: Iterable[str]) -> bool:
    """Return whether a run is complete, with its additional evaluations."""
    return is_trained(folder, max_steps) and all(is_evaluated(folder, name) for name in evaluations)


def is_trained(folder: Path, max_steps: int) -> bool:
    """Return whether a run has made all its steps and has been validated after the last one."""
    return (folder / "evaluation" / f"val_step_{max_steps:07d}.npz").is_file()


def find_twin(
    folder: Path, seed: int, digest: str, max_steps: int, data_path: str | None
) -> Path | None:
    """Return a complete run of the same settings and seed in another study; None without one.

    Several studies can have the same reference, which then is trained once.

    Args:
        folder: Run folder, in the folder of its study.
        seed: Seed of the run.
        digest: Digest of its settings.
        max_steps: Number of training steps.
        data_path: Its ``data.path``, which the digest does not cover.
    """
    for twin in sorted(folder.parent.parent.glob(f"*/*.seed{seed}.*.{digest}")):
        is_other_study = twin.parent != folder.parent
        if is_other_study and is_trained(twin, max_steps) and (twin / LAST_CHECKPOINT).is_file():
            try:
                record = read_record(twin)
                config = yaml.safe_load((twin / "config.yaml").read_text(encoding="utf-8"))
                found = (record.get("seed"), record.get("digest"), config["data"].get("path"))
            except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
                continue  # damaged, which is no matter of this study
            if found == (seed, digest, data_path):
                return twin
    return None


def copy_run(twin: Path, folder: Path) -> None:
    """Copy a training into another run folder, without what belongs to its study.

    The evaluation is copied last and renamed when it is whole, so that an interrupted copy does not
    count as trained.
    """
    own = {LOCK_FILE, RECORD_FILE, FAILURE_FILE, EVALUATIONS, "evaluation", COPIED}
    for entry in twin.iterdir():
        if entry.name in own:
            continue
        if entry.is_dir():
            shutil.copytree(entry, folder / entry.name, dirs_exist_ok=True)
        else:
            shutil.copy2(entry, folder / entry.name)
    for name in ("evaluation", COPIED):  # of an interrupted copy
        shutil.rmtree(folder / name, ignore_errors=True)
    shutil.copytree(twin / "evaluation", folder / COPIED)
    (folder / COPIED).rename(folder / "evaluation")


def is_evaluated(folder: Path, name: str) -> bool:
    """Return whether a run has an additional evaluation."""
    return any((folder / EVALUATIONS / name / "evaluation").glob("*.npz"))


def write_evaluation_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Store the settings of an additional evaluation in its folder, once it has been made."""
    atomic_write_text(folder / SETTINGS_FILE, yaml.safe_dump(settings))


def check_evaluation_settings(folder: Path, evaluations: Mapping[str, dict[str, Any]]) -> None:
    """Check that the additional evaluations of a run were made with the settings of the study.

    Args:
        folder: Run folder.
        evaluations: Settings of ``validate`` of each evaluation, as nested dictionaries.

    Raises:
        UserError: The settings of an evaluation have changed since it was made.
    """
    for name, settings in evaluations.items():
        made = folder / EVALUATIONS / name
        try:
            stored = yaml.safe_load((made / SETTINGS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue  # not made yet, or by an earlier version
        if stored != settings and is_evaluated(folder, name):
            raise UserError(
                f"'{made}' was made with the settings {stored}, but the study has {settings} under "
                f"that name; give the evaluation another name to have both, or make it anew after "
                f"rm -r {folder.parent}/*/{EVALUATIONS}/{name}"
            )


@contextmanager
def locked(folder: Path, timeout: float = LOCK_TIMEOUT) -> Iterator[int | None]:
    """Lock a run folder, which must exist, until the block ends.

    The lock is ``flock``'s, of an open file: the system releases it when the last process that has
    the file open ends, however it ends. A process that inherits the descriptor holds the lock, too.

    Args:
        folder: Run folder.
        timeout: Seconds to wait for the lock.

    Returns:
        The descriptor of the lock, or None if another process holds it.

    Raises:
        UserError: The file system has no locks, or the folder is not writable.
    """
    file = folder / LOCK_FILE
    deadline = time.monotonic() + timeout
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot write {str(file)!r}: {error.strerror}") from error
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    yield None
                    return
                time.sleep(POLL)
            except OSError as error:
                raise _no_locks(file, error) from error
            else:
                yield descriptor
                return
    finally:
        os.close(descriptor)


def _no_locks(file: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot lock {str(file)!r} ({error.strerror}), so two processes could train the same "
        "run; give an --output on a file system with locks"
    )


def is_locked(folder: Path) -> bool:
    """Return whether a process is training or evaluating a run."""
    file = folder / LOCK_FILE
    try:
        # Only to read, because a study may be in a folder that is read-only.
        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"cannot read {str(file)!r}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        raise _no_locks(file, error) from error
    finally:
        os.close(descriptor)
    return False


def check_record(folder: Path, record: dict[str, Any]) -> None:
    """Check that a folder holds the run that its name states.

    Args:
        folder: Run folder.
        record: What its ``ablation.json`` must state.

    Raises:
        UserError: It holds another run, or ``ablation.json`` cannot be read.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        if any((folder / "evaluation").glob("*.npz")):
            raise UserError(
                f"'{folder}' holds a training, but not its {RECORD_FILE}, which says what was "
                "trained; restore the file, or move the folder away, and the run is trained anew"
            )
        return
    stored = read_record(folder)
    for key in IDENTITY:
        if stored.get(key) != record[key]:
            raise UserError(
                f"{file}: {key} is {stored.get(key)!r}, but the folder's name and the study say "
                f"{record[key]!r}; the folder was edited or renamed: move it away, and the run is "
                "trained anew"
            )


def read_record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{file}' cannot be read ({error}); move its folder away") from error
    return content if isinstance(content, dict) else {}
