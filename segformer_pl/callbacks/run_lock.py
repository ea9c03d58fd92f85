"""A lock on a run folder, so that two jobs of one name do not train the same run."""

import time
from pathlib import Path
from typing import BinaryIO

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from segformer_pl.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".training.lock"
# The data-loader workers of a killed training hold its lock for some seconds, and a file server
# holds that of a node that failed for up to 90.
TIMEOUT = 120.0  # seconds
POLL = 0.2  # seconds


class RunLock:
    """Lock of a run folder; the system releases it when the processes that hold it end.

    On file systems without locks, it does nothing.

    Args:
        folder: Run folder, created if needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stream: BinaryIO | None = None

    def acquire(self, timeout: float = TIMEOUT) -> None:
        """Wait for the lock.

        Args:
            timeout: Seconds to wait.

        Raises:
            UserError: Another process holds it.
        """
        if fcntl is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stream = (self.folder / LOCK_FILE).open("ab")
        deadline = time.monotonic() + timeout
        has_waited = False
        while not self._try():
            if not has_waited:
                rank_zero_info(f"another process trains in {self.folder}; waiting for its end")
            has_waited = True
            if time.monotonic() > deadline:
                self.release()
                raise UserError(
                    f"run_name: another process trains in '{self.folder}'; wait for its end, or "
                    "give another name"
                )
            time.sleep(POLL)

    def _try(self) -> bool:
        assert self._stream is not None
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # the file system has no locks
            pass
        return True

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
