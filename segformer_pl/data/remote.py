"""Reading over the network: silences, dropped connections and busy servers are waited out.

What a repetition may cure is repeated for :data:`PATIENCE` seconds; what it cannot, such as a
missing file, a server without range requests or redirects in a circle, is said at once.
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

PATIENCE = 600.0  # seconds from the first failure until a run gives up, or a server asks for
FIRST_WAIT = 1.0  # seconds, doubled from attempt to attempt
LONGEST_WAIT = 60.0
SILENCE = 60.0  # seconds without a byte after which a connection counts as lost
MIN_RATE = 1024  # bytes per second, over SILENCE: a connection that brings less is lost too

PASSING_STATUS = {408, 425, 429}  # and those from 500 on, but for these:
LASTING_STATUS = {501, 505}

log = logging.getLogger(__name__)

# Kept for good: a process forked from this one must not close the connections of these, which it
# would if they were let go of there.
_file_systems: dict[int, Any] = {}
_reached: set[str] = set()  # hosts that have answered


def is_remote(file: str) -> bool:
    return "://" in file and not file.startswith("file://")


class _Response(aiohttp.ClientResponse):
    """An answer that has to keep coming, and to be of the range that was asked for."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        async with asyncio.timeout(SILENCE):
            await super().start(connection)
        asked = self.request_info.headers.get("Range", "").removeprefix("bytes=")
        first, _, last = asked.partition("-")
        if self.status == 200 and first.isdecimal() and last.isdecimal():
            size = self.content_length
            if size is None or size > int(last) - int(first) + 1:
                raise _without_ranges(str(self.url))
        return self

    async def read(self) -> bytes:
        # The limits of aiohttp are on a pause between bytes, and on the whole, however large.
        reading = asyncio.ensure_future(super().read())
        try:
            while True:
                before = self.content.total_bytes
                done, _ = await asyncio.wait({reading}, timeout=SILENCE)
                if done:
                    return reading.result()
                rate = (self.content.total_bytes - before) / SILENCE
                if rate < MIN_RATE:
                    self.close()
                    raise TimeoutError(f"{rate:.1f} bytes per second, less than {MIN_RATE}")
        finally:
            reading.cancel()


def _without_ranges(url: str) -> UserError:
    return UserError(
        f"{url} cannot be read: its server does not answer requests for a part of a file (HTTP "
        "ranges); download the shards and give their folder"
    )


def options(file: str) -> dict[str, Any]:
    if not file.startswith(("http://", "https://")):
        return {}
    # The library's own limit is five minutes for a whole file, however well it comes.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    return {"client_kwargs": {"timeout": timeout, "response_class": _Response}}


def file_system(file: str) -> tuple[Any, str]:
    """The file system of a URL or pattern, and the path in it."""
    fs, path = fsspec.core.url_to_fs(file, **options(file))
    _file_systems[id(fs)] = fs
    return fs, path


def open_remote(file: str) -> Any:
    """Open the file behind a URL, to be read in parts."""
    fs, path = file_system(file)
    handle = fs.open(path, "rb")
    if isinstance(handle, HTTPStreamFile):  # the server says so, or does not say the size
        raise _without_ranges(file)
    return handle


def patiently(read: Callable[[], T], where: str) -> T:
    """Read something over the network, again and again if need be.

    Raises:
        UserError: It is not there, is forbidden, or has failed for :data:`PATIENCE` seconds.
    """
    host = urlsplit(where).hostname or ""
    begin: list[float] = []

    def failing() -> float:
        if not begin:
            begin.append(time.monotonic())
        return time.monotonic() - begin[0]

    retrying = tenacity.Retrying(
        stop=lambda _: failing() >= PATIENCE,
        wait=_wait,
        retry=tenacity.retry_if_exception(lambda error: _may_pass(error, host)),
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
        if not _may_pass(error, host):
            raise UserError(
                f"{where} cannot be read ({first_line(error)}); correct the address or the "
                "access rights"
            ) from error
        raise UserError(
            f"{where} could not be read for {failing():.0f} s ({first_line(error)}); once the "
            "network or the server is back, resume from the last checkpoint"
        ) from error
    _reached.add(host)
    return value


def _wait(state: tenacity.RetryCallState) -> float:
    """Longer from attempt to attempt, unless the server says how long."""
    error = state.outcome.exception() if state.outcome else None
    headers = _response(_cause(error), "headers") or {}
    asked = _seconds(headers.get("Retry-After", ""))
    if asked is not None:
        return min(asked, PATIENCE) + random.uniform(0, FIRST_WAIT)
    # With jitter, or all readers come back at one moment.
    return tenacity.wait_exponential_jitter(
        multiplier=FIRST_WAIT, max=LONGEST_WAIT, jitter=FIRST_WAIT
    )(state)


def _seconds(retry_after: str) -> float | None:
    """What ``Retry-After`` says: seconds, or a date (RFC 9110, 10.2.3)."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max((date - datetime.now(UTC)).total_seconds(), 0.0)


def _may_pass(error: BaseException, host: str) -> bool:
    """Whether reading again may bring what failed."""
    cause = _cause(error)
    if not isinstance(cause, Exception):
        return False
    status = _response(cause, "status") or _response(cause, "status_code")
    if isinstance(status, int) and status >= 400:
        return status in PASSING_STATUS or (status >= 500 and status not in LASTING_STATUS)
    lasting = (
        UserError,
        FileNotFoundError,
        PermissionError,
        aiohttp.ClientConnectorCertificateError,
    )
    if isinstance(cause, lasting) or type(cause).__name__ == "TooManyRedirects":  # of any library
        return False
    unresolved = getattr(cause, "os_error", None)
    if isinstance(unresolved, socket.gaierror) and unresolved.errno == socket.EAI_NONAME:
        return host in _reached  # else it is a slip in the address
    if isinstance(cause, pa.ArrowException):
        return True  # a proxy's idea of the content
    return not isinstance(cause, ValueError | LookupError | TypeError | AttributeError)


def _cause(error: BaseException | None) -> BaseException | None:
    """fsspec calls every failure to open a file one to find it."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _response(error: Any, attribute: str) -> Any:
    """An attribute of the answer that an HTTP library's exception is about."""
    found = getattr(error, attribute, None)
    return getattr(getattr(error, "response", None), attribute, None) if found is None else found


def first_line(error: BaseException | None) -> str:
    error = _cause(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def marks(files: Sequence[str]) -> list[Any]:
    """Files and what tells their versions apart."""
    marks = []
    for file in files:

        def info(file: str = file) -> dict[str, Any]:
            fs, path = file_system(file)
            return fs.info(path)

        found = patiently(info, file)
        version = next(filter(None, map(found.get, ("ETag", "mtime", "Last-Modified"))), "")
        marks.append([file, found.get("size"), str(version)])
    return marks
