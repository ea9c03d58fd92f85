"""Reading over the network: long silences, dropped connections and busy servers are waited out."""

import logging
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import fsspec
import tenacity
from aiohttp import ClientTimeout

from segformer_pl.data.labels import DataError

T = TypeVar("T")

# Waits double from a second to a minute: two minutes of silence before a run gives up.
ATTEMPTS = 8
FIRST_WAIT = 1.0
LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 600.0
SILENCE = 60.0  # seconds without a byte after which a connection counts as lost

log = logging.getLogger(__name__)


def is_remote(file: str) -> bool:
    return "://" in file and not file.startswith("file://")


def options(file: str) -> dict[str, Any]:
    if not file.startswith(("http://", "https://")):
        return {}
    # The library's own limit is five minutes for a whole file, however well it comes.
    timeout = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    return {"client_kwargs": {"timeout": timeout}}


def patiently(read: Callable[[], T], where: str) -> T:
    """Read something over the network, again and again if need be.

    Raises:
        DataError: it is not there, is forbidden, or failed :data:`ATTEMPTS` times.
    """
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=_wait,
        retry=tenacity.retry_if_exception(_may_pass),
        before_sleep=lambda state: log.warning(
            "%s: %s; attempt %d of %d in %.0f s",
            where,
            first_line(state.outcome.exception()) if state.outcome else "",
            state.attempt_number + 1,
            ATTEMPTS,
            state.upcoming_sleep,
        ),
        reraise=True,
    )
    try:
        return retrying(read)
    except DataError:
        raise
    except Exception as error:
        if not _may_pass(error):
            raise DataError(
                f"{where} cannot be read ({first_line(error)}); correct the address or the "
                "access rights"
            ) from error
        raise DataError(
            f"{where} could not be read in {ATTEMPTS} attempts ({first_line(error)}); when the "
            "network or the server is well again, resume from the last checkpoint"
        ) from error


def _wait(state: tenacity.RetryCallState) -> float:
    """Longer from attempt to attempt, unless the server says how long."""
    error = state.outcome.exception() if state.outcome else None
    asked = (_response(error, "headers") or {}).get("Retry-After", "")
    # With jitter, or all readers come back at one moment.
    wait = tenacity.wait_exponential_jitter(
        multiplier=FIRST_WAIT, max=LONGEST_WAIT, jitter=FIRST_WAIT
    )(state)
    if asked.isdecimal():
        return min(float(asked), LONGEST_RETRY_AFTER) + random.uniform(0, FIRST_WAIT)
    return wait


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return _may_pass(error.__cause__)  # fsspec calls every failure of a first look so
    if isinstance(error, DataError | FileNotFoundError | PermissionError | KeyboardInterrupt):
        return False
    status = _response(error, "status") or _response(error, "status_code")
    return not isinstance(status, int) or status in {408, 425, 429} or status >= 500


def _response(error: Any, attribute: str) -> Any:
    """An attribute of the answer that an HTTP library's exception is about."""
    found = getattr(error, attribute, None)
    return getattr(getattr(error, "response", None), attribute, None) if found is None else found


def first_line(error: BaseException | None) -> str:
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def marks(files: Sequence[str]) -> list[Any]:
    """Files and what tells their versions apart."""
    marks = []
    for file in files:
        fs, path = fsspec.core.url_to_fs(file, **options(file))
        info = patiently(lambda fs=fs, path=path: fs.info(path), file)  # type: ignore[misc]
        marks.append([file, info.get("size"), str(info.get("ETag") or info.get("mtime") or "")])
    return marks
