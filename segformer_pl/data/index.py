"""What is known of a source: kept on this machine once it was read, and its fingerprint.

A fingerprint has two parts, ``layout-contents``. The layout is of names, row groups and sizes; it
is all that checkpoints of earlier versions hold. The contents part hashes what is cheap to read:
the footers of Parquet shards (offsets, sizes and statistics of every column), the sizes of image
and label files, every row of a stream, which is read through anyway.
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
    """The fingerprint of what JSON can hold of a source."""
    return f"{digest(layout)}-{digest(contents)}"


def same_data(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same data.

    One of an earlier version has no contents part: then the layouts are compared.
    """
    (layout, _, contents), (other_layout, _, other_contents) = map(_parts, (one, other))
    if contents and other_contents:
        return contents == other_contents
    return layout == other_layout


def _parts(text: str) -> tuple[str, str, str]:
    return text.partition("-")


def digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def cached(key: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was computed for this key before, on this machine."""
    file = Path(platformdirs.user_cache_dir("segformer_pl")) / "indices" / f"{digest(key)}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or not whole
        value = compute()
    try:
        atomic_write_text(file, json.dumps(value))
    except WriteError as error:
        rank_zero_warn(f"{error}; the row counts are read anew in every process and every run")
    return value
