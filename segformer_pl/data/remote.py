"""Network reads that retry with exponential back-off.

A failed read is retried for up to :data:`RETRY_SECONDS` if another attempt may succeed: after a
read timeout, a dropped connection or a busy server. Errors that would repeat, such as a missing
file, a server without range requests or a redirect loop, are raised at once.
"""

import asyncio
import logging
import random
import socket
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import fsspec
import pyarrow as pa
import tenacity
from fsspec.implementations.http import HTTPStreamFile

from segformer_pl.errors import UserError

T = TypeVar("T")

RETRY_SECONDS = 600.0  # from the first failure until reading is given up; also limits Retry-After
FIRST_WAIT = 1.0  # seconds before the second attempt, doubled from attempt to attempt
MAX_WAIT = 60.0  # seconds between two attempts
READ_TIMEOUT = 60.0  # seconds without a byte after which a connection counts as lost
MIN_RATE = 1024  # bytes per second over READ_TIMEOUT; a slower connection counts as lost, too

# HTTP statuses after which another attempt may succeed: these, and all from 500 on but for two.
TRANSIENT_STATUS = {408, 425, 429}
PERMANENT_STATUS = {501, 505}

log = logging.getLogger(__name__)

# A forked process that garbage-collected its copy of a file system would close the connections of
# its parent. Keep a reference to each file system, so that no process ever collects one.
_file_systems: dict[int, Any] = {}
_reached: set[str] = set()  # hosts that have answered


def is_remote(file: str) -> bool:
    """Return whether a path is a URL other than ``file://``."""
    return "://" in file and not file.startswith("file://")


class _Response(aiohttp.ClientResponse):
    """A response that checks its range and enforces a minimum transfer rate."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        async with asyncio.timeout(READ_TIMEOUT):
            await super().start(connection)
        requested = self.request_info.headers.get("Range", "").removeprefix("bytes=")
        first, _, last = requested.partition("-")
        if self.status == 200 and first.isdecimal() and last.isdecimal():
            # 200 instead of 206: the server ignores ranges and sends the whole file.
            size = self.content_length
            if size is None or size > int(last) - int(first) + 1:
                raise _no_ranges(str(self.url))
        return self

    async def read(self) -> bytes:
        # aiohttp limits the pause between two bytes and the total time, but not the rate: a server
        # that sends a byte every few seconds would pass for ever. So check the rate at intervals.
        reading = asyncio.ensure_future(super().read())
        try:
            while True:
                before = self.content.total_bytes
                done, _ = await asyncio.wait({reading}, timeout=READ_TIMEOUT)
                if done:
                    return reading.result()
                rate = (self.content.total_bytes - before) / READ_TIMEOUT
                if rate < MIN_RATE:
                    self.close()
                    raise TimeoutError(f"{rate:.1f} bytes per second, less than {MIN_RATE}")
        finally:
            reading.cancel()


def _no_ranges(url: str) -> UserError:
    return UserError(
        f"{url} cannot be read: its server does not answer requests for a part of a file (HTTP "
        "ranges); download the shards and give their folder"
    )


def options(file: str) -> dict[str, Any]:
    """Return the ``fsspec`` options for a URL: timeouts and response class over HTTP."""
    if not file.startswith(("http://", "https://")):
        return {}
    # aiohttp's default is five minutes for a whole file, which a large shard may exceed.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=READ_TIMEOUT, sock_read=READ_TIMEOUT)
    return {"client_kwargs": {"timeout": timeout, "response_class": _Response}}


def file_system(file: str) -> tuple[Any, str]:
    """Return the ``fsspec`` file system of a URL or pattern, and the path within it."""
    fs, path = fsspec.core.url_to_fs(file, **options(file))
    _file_systems[id(fs)] = fs
    return fs, path


def open_remote(file: str) -> Any:
    """Open the file behind a URL for random access.

    Raises:
        UserError: The server does not support range requests.
    """
    fs, path = file_system(file)
    handle = fs.open(path, "rb")
    if isinstance(handle, HTTPStreamFile):  # fsspec's fallback without ranges or without a size
        raise _no_ranges(file)
    return handle


def read_with_retries(read: Callable[[], T], where: str) -> T:
    """Call a function that reads over the network, and retry with exponential back-off.

    Args:
        read: Function to call; each attempt must start from the beginning.
        where: URL or description of what is read, for messages.

    Returns:
        What ``read`` returns.

    Raises:
        UserError: The file is missing or forbidden, or reading has failed for
            :data:`RETRY_SECONDS`.
    """
    host = urlsplit(where).hostname or ""
    first_failure: list[float] = []

    def seconds_of_failure() -> float:
        if not first_failure:
            first_failure.append(time.monotonic())
        return time.monotonic() - first_failure[0]

    retrying = tenacity.Retrying(
        stop=lambda _: seconds_of_failure() >= RETRY_SECONDS,
        wait=_wait,
        retry=tenacity.retry_if_exception(lambda error: _is_transient(error, host)),
        before_sleep=lambda state: log.warning(
            "%s: %s; attempt %d in %.0f s",
            where,
            first_line(state.outcome.exception()) if state.outcome else "",
            state.attempt_number + 1,
            state.upcoming_sleep,
        ),
        reraise=True,
    )
    try:
        value = retrying(read)
    except UserError:
        raise
    except Exception as error:
        if not _is_transient(error, host):
            raise UserError(
                f"{where} cannot be read ({first_line(error)}); correct the address or the "
                "access rights"
            ) from error
        raise UserError(
            f"{where} could not be read for {seconds_of_failure():.0f} s ({first_line(error)}); "
            "once the network or the server is back, resume from the last checkpoint"
        ) from error
    _reached.add(host)
    return value


def _wait(state: tenacity.RetryCallState) -> float:
    """Return the seconds until the next attempt: the server's ``Retry-After``, or back-off."""
    error = state.outcome.exception() if state.outcome else None
    headers = _response_attribute(_cause(error), "headers") or {}
    retry_after = _seconds(headers.get("Retry-After", ""))
    # Jitter, or all workers would come back at the same moment.
    if retry_after is not None:
        return min(retry_after, RETRY_SECONDS) + random.uniform(0, FIRST_WAIT)
    return tenacity.wait_exponential_jitter(multiplier=FIRST_WAIT, max=MAX_WAIT, jitter=FIRST_WAIT)(
        state
    )


def _seconds(retry_after: str) -> float | None:
    """Parse ``Retry-After``, which holds seconds or a date (RFC 9110, section 10.2.3)."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max((date - datetime.now(UTC)).total_seconds(), 0.0)


def _is_transient(error: BaseException, host: str) -> bool:
    """Return whether another attempt may succeed."""
    cause = _cause(error)
    if not isinstance(cause, Exception):
        return False
    status = _response_attribute(cause, "status") or _response_attribute(cause, "status_code")
    if isinstance(status, int) and status >= 400:
        return status in TRANSIENT_STATUS or (status >= 500 and status not in PERMANENT_STATUS)
    permanent = (
        UserError,
        FileNotFoundError,
        PermissionError,
        aiohttp.ClientConnectorCertificateError,
    )
    # Every HTTP library has its own class TooManyRedirects.
    if isinstance(cause, permanent) or type(cause).__name__ == "TooManyRedirects":
        return False
    dns_error = getattr(cause, "os_error", None)
    if isinstance(dns_error, socket.gaierror) and dns_error.errno == socket.EAI_NONAME:
        return host in _reached  # a host that has never answered is a mistake in the address
    if isinstance(cause, pa.ArrowException):
        return True  # a proxy may have cut or replaced the content
    return not isinstance(cause, ValueError | LookupError | TypeError | AttributeError)


def _cause(error: BaseException | None) -> BaseException | None:
    """Return the error behind fsspec's ``FileNotFoundError``, which wraps any failure to open."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _response_attribute(error: Any, name: str) -> Any:
    """Return an attribute of an HTTP exception, or of the response that it holds."""
    value = getattr(error, name, None)
    return getattr(getattr(error, "response", None), name, None) if value is None else value


def first_line(error: BaseException | None) -> str:
    """Return class and first line of an exception, for a message of one line."""
    error = _cause(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def file_versions(files: Sequence[str]) -> list[Any]:
    """Return URL, size and version (ETag or modification time) of each file."""
    versions = []
    for file in files:

        def info(file: str = file) -> dict[str, Any]:
            fs, path = file_system(file)
            return fs.info(path)

        entry = read_with_retries(info, file)
        version = next(filter(None, map(entry.get, ("ETag", "mtime", "Last-Modified"))), "")
        versions.append([file, entry.get("size"), str(version)])
    return versions
