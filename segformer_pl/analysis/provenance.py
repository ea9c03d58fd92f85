"""Where the numbers of a run come from: command, code, package versions, hardware, duration."""

import platform
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import segformer_pl

PACKAGE = segformer_pl.__name__
FINISHED = "finished"


@dataclass(frozen=True)
class RunPart:
    """A process that trained or evaluated in a run folder; each resumption adds one.

    Attributes:
        stage: ``fit``, ``validate`` or ``test``.
        step: Number of training steps done at its start.
        command: Command line; empty for a run that was started in Python.
        started: Local time of its start, ISO 8601 with the offset from UTC.
        seconds: Duration up to its end or, if it was killed, up to its last validation.
        is_ended: Whether it ended by itself, by an error or by a signal, and not by a kill.
        hardware: Devices, such as ``8 x NVIDIA H100 80GB HBM3 on 2 nodes``.
        commit: Commit of the package's repository, with ``-dirty`` if files were changed; empty for
            an installed package.
        versions: Versions by name: Python, this package and those that it needs.
        end: How it ended: :data:`FINISHED`, a signal such as ``SIGTERM``, or ``error:`` and the
            sentence of the command line. Empty before the end, after a kill, and in files of
            earlier versions.
        last_step: Number of training steps done at its end or last validation; None in files of
            earlier versions.
    """

    stage: str
    step: int
    command: str
    started: str
    seconds: float
    is_ended: bool
    hardware: str
    commit: str
    versions: dict[str, str]
    end: str = ""
    last_step: int | None = None

    @classmethod
    def list_of(cls, content: Any) -> "list[RunPart]":
        """Return the parts stored as a list of dictionaries; empty if the content is damaged."""
        names = {field.name for field in fields(cls)}
        try:
            parts = [cls(**{name: one[name] for name in names if name in one}) for one in content]
            for part in parts:
                datetime.fromisoformat(part.started)
            return parts
        except (TypeError, ValueError):
            return []


def package_versions() -> dict[str, str]:
    """Return the versions of Python, of this package, and of the packages that it needs."""
    found = {"python": platform.python_version(), PACKAGE: segformer_pl.__version__}
    with suppress(PackageNotFoundError):
        for requirement in requires(PACKAGE) or []:
            name = re.match(r"[\w.-]+", requirement)
            if name and "extra ==" not in requirement:
                with suppress(PackageNotFoundError):
                    found[name[0]] = version(name[0])
    return found


def code_commit() -> str:
    """Return the commit of the package's repository, ``-dirty`` if tracked files were changed.

    Empty if the package is in no repository, as when it is installed from a wheel.
    """
    folder = Path(segformer_pl.__file__).parent
    if not _git(folder, "ls-files", "--error-unmatch", "__init__.py"):
        return ""  # another repository, whose files are not those of the package
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def cpu_name() -> str:
    """Return the model of the CPU."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
