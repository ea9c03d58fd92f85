"""Sentences for failures of data-loader workers, which torch reports in various exceptions.

==================================  ==============================================================
what happens to a worker            what the main process raises
==================================  ==============================================================
it raises an exception              one of the same class with the worker's traceback as its text
it is killed, or ends by itself     a RuntimeError, in whatever line the main process is then
it is killed while it sends         a ConnectionError or EOFError
it has no files or memory left      an OSError or a RuntimeError
==================================  ==============================================================
"""

import errno
import re
import time
import traceback
from collections.abc import Iterator

NO_WORKERS = "--data.num_workers 0 shows where"
LESS_MEMORY = "give fewer data.num_workers or a smaller data.batch_size"

_RAISED = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\s+Original Traceback")
_LOST = re.compile(r"Caught (?:Connection\w*|EOF)Error in pin memory thread")
_KILLED = re.compile(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([^.]+)\.")
_ENDED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) exited unexpectedly")
_FRAME = re.compile(r'^  File "(.+)", line (\d+), in .+\n(?:    .*\n)*', re.MULTILINE)
_NO_FILES = ("Too many open files", "received 0 items of ancdata")
_MAX_TEXT = 300  # characters of a foreign exception in a sentence


def explain_worker_failure(error: BaseException) -> str | None:
    """Return one sentence on a failed data-loader worker; None for any other exception.

    Args:
        error: Exception of the main process. Those that caused it are searched too.
    """
    return next(filter(None, map(_explain, _causes(error))), None)


def wait_for_cause(error: BaseException) -> None:
    """Wait up to a second for the signal that a worker has ended, if its connection was lost.

    Torch's handler of this signal raises in whatever line the main process is then, which would cut
    off what handles the lost connection. So call this first; what is raised becomes the cause.
    """
    if _is_lost_connection(error):
        try:
            time.sleep(1)
        except RuntimeError as ended:
            error.__cause__ = ended


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that caused it, the first cause first."""
    if error.__cause__ is not None:
        yield from _causes(error.__cause__)
    yield error


def _explain(error: BaseException) -> str | None:
    text = str(error)
    if _RAISED.search(text):
        return _explain_raised(text)
    if killed := _KILLED.search(text):
        return _explain_killed(*killed.groups())
    ended = _ENDED.search(text)
    if ended or _is_lost_connection(error):
        name = f"data-loader worker {ended[1]}" if ended else "a data-loader worker"
        return (
            f"{name} ended unexpectedly, as happens when memory runs out; {LESS_MEMORY}, or "
            f"{NO_WORKERS}"
        )
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.EMFILE, errno.ENFILE) or (
        isinstance(error, RuntimeError) and text.startswith(_NO_FILES)
    ):
        return (
            "too many files are open, such as those by which data-loader workers pass images on; "
            "raise the limit, with ulimit -n 65536, or give fewer data.num_workers"
        )
    return None


def _is_lost_connection(error: BaseException) -> bool:
    """Return whether an exception was raised while torch received a batch from a worker."""
    return bool(_LOST.search(str(error))) or (
        isinstance(error, ConnectionError | EOFError)
        and any(
            frame.f_code.co_name == "_try_get_data" and "torch" in frame.f_code.co_filename
            for frame, _ in traceback.walk_tb(error.__traceback__)
        )
    )


def _explain_killed(worker: str, name: str) -> str:
    if name == "Killed":
        return (
            f"data-loader worker {worker} was killed by SIGKILL, as the system does when memory "
            f"runs out; {LESS_MEMORY}"
        )
    if name == "Bus error":
        return (
            f"data-loader worker {worker} was killed by a bus error, as happens when the shared "
            "memory in /dev/shm is full; enlarge it (docker run --shm-size 16g), or "
            f"{LESS_MEMORY}"
        )
    return f"data-loader worker {worker} was ended by a signal ({name}); {NO_WORKERS}"


def _explain_raised(text: str) -> str:
    """Return the worker's own exception and the line that raised it."""
    frames = list(_FRAME.finditer(text))
    position, raised = "", text
    if frames:
        file, line = frames[-1].groups()
        position, raised = f" ({file}, line {line})", text[frames[-1].end() :]
    first = next(filter(None, map(str.strip, raised.splitlines())), "")
    if first.startswith("MemoryError"):
        return f"a data-loader worker has run out of memory{position}; {LESS_MEMORY}"
    return (
        f"a data-loader worker failed: {first[:_MAX_TEXT]}{position}; --data.num_workers 0 shows "
        "the whole traceback"
    )
