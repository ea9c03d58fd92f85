"""Fingerprints of data sets, and the cache of their row counts.

A fingerprint has two parts, ``layout-contents``. The layout part hashes names, row groups and
sizes; checkpoints of earlier versions hold this part alone. The contents part hashes what is cheap
to read: the footers of Parquet shards (offsets, sizes and statistics of every column), the sizes of
image and label files, or every row of a stream, which has to be read through anyway.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from segformer_pl.atomic import WriteError, atomic_write_text


def fingerprint(layout: Any, contents: Any) -> str:
    """Return the fingerprint of a source from its layout and contents, both JSON values."""
    return f"{digest(layout)}-{digest(contents)}"


def same_data(one: str, other: str) -> bool:
    """Return whether two fingerprints stand for the same data.

    Compares the contents parts, or the layout parts if a fingerprint of an earlier version has no
    contents part.
    """
    (layout, _, contents), (other_layout, _, other_contents) = map(_parts, (one, other))
    if contents and other_contents:
        return contents == other_contents
    return layout == other_layout


def _parts(text: str) -> tuple[str, str, str]:
    return text.partition("-")


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def cached(key: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the value for a key from the user's cache folder; compute and store it if missing."""
    file = Path(platformdirs.user_cache_dir("segformer_pl")) / "indices" / f"{digest(key)}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing or incomplete
        value = compute()
    try:
        atomic_write_text(file, json.dumps(value))
    except WriteError as error:
        rank_zero_warn(f"{error}; every process and every run counts the rows again")
    return value
