"""Read a file of tensors, and refuse it with a clear message if it is damaged.

``torch.load`` does not compare the checksums that ``torch.save`` writes, so a flipped bit would
silently change a weight. This module compares them first. What can be checked depends on the
format:

- ``torch.save`` (``.ckpt``, ``.pth``, ``.pt``, ``.bin``) writes a zip archive with a CRC-32 for
  every record. Nothing can be compared in a file without checksums: one written after
  ``torch.serialization.set_crc32_options(False)``, or by a torch before 1.6.
- ``.safetensors`` has no checksum. Its reader checks the header, and that shapes, types and offsets
  account for every byte.

Values are checked where they are used: :func:`non_finite` counts nan and infinity. A pickle that
would run code is refused; ``inert.py`` says what is read beside tensors.
"""

import os
import pickle
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segformer_pl.checkpoints.inert import plain_data
from segformer_pl.errors import UserError, counted

_ZIP = b"PK\x03\x04"


def load_file(path: Path) -> Any:
    """Read a file that ``torch.save`` wrote, to the CPU.

    Raises:
        UserError: The path is not a regular file, or the file cannot be read, is damaged or cut
            short, or holds code.
    """
    with open_file(path) as stream:
        return load_stream(stream, path)


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading.

    Raises:
        UserError: The path is not a regular file, or its permissions forbid reading.
    """
    check_regular(path)
    try:
        stream = path.open("rb")
    except PermissionError as error:
        raise UserError(
            f"'{path}' cannot be read ({error.strerror}); change its permissions"
        ) from error
    with stream:
        yield stream


def load_stream(stream: BufferedReader, path: Path) -> Any:
    """Read an open file like :func:`load_file`; ``path`` is its name for messages."""
    size = os.fstat(stream.fileno()).st_size
    try:
        is_archive = stream.read(len(_ZIP)) == _ZIP
        if is_archive and (record := _damaged_record(stream)):
            raise UserError(
                f"'{path}' is damaged: its record {record!r} does not agree with the checksum "
                "that was written with it; copy the file again or give another"
            )
        stream.seek(0)
        with plain_data():
            return torch.load(stream, weights_only=True, map_location="cpu")
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise damaged(path, size, error) from error
        raise UserError(
            f"'{path}' holds code ({code[1]}) that reading it would run, so it is refused; save "
            "tensors only: torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # the type depends on where the file is cut short
        raise damaged(path, size, error) from error


def check_regular(path: Path) -> int:
    """Return the size of a regular file in bytes.

    Other kinds are refused: reading a pipe can block, and a device has no end.

    Raises:
        UserError: The path does not exist, or is not a regular file.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:197]}..."
        raise UserError(f"{shown!r} cannot be opened ({reason}); give another") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise UserError(f"'{path}' is {kind}; give a file")
    return status.st_size


def damaged(path: Path, size: int, error: Exception) -> UserError:
    """Return the error for a file that cannot be parsed."""
    return UserError(
        f"'{path}' is no file of tensors, or is cut short ({type(error).__name__}); compare its "
        f"size ({size:,} bytes) with the original and fetch it again"
    )


def _damaged_record(stream: BufferedReader) -> str | None:
    """Return the first record of an archive that does not match its CRC-32, None if all do.

    This takes about half as long as ``torch.load``.
    """
    with zipfile.ZipFile(stream) as archive:
        records = archive.infolist()
        if not any(record.CRC for record in records):  # written without checksums
            return None
        return archive.testzip()


def non_finite(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Count nan and infinite values: key of each tensor that holds any -> their number.

    On a GPU this synchronises once, and once more for each tensor that holds any.
    """
    flags: dict[torch.device, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if not tensor.is_meta and (tensor.is_floating_point() or tensor.is_complex()):
            flags.setdefault(tensor.device, {})[key] = _is_finite(tensor).all()
    broken = {
        key
        for on_device in flags.values()
        for key, is_finite in zip(on_device, torch.stack(list(on_device.values())).tolist())
        if not is_finite
    }
    return {
        key: int((~_is_finite(tensor)).sum()) for key, tensor in tensors.items() if key in broken
    }


def check_usable(tensors: Mapping[str, Tensor], name: str) -> None:
    """Check that all tensors are dense and have values, and that no variance is negative.

    Args:
        tensors: A state dict.
        name: Name of its source, for messages.

    Raises:
        UserError: A tensor is on the meta device, sparse or nested, or a ``running_var`` holds a
            negative value, whose square root would be nan.
    """
    for key, tensor in tensors.items():
        if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
            kind = "without values (meta)" if tensor.is_meta else "sparse or nested"
            raise UserError(
                f"{name} holds {key} as a tensor that is {kind}; save it as a dense tensor with "
                "values"
            )
        if key.endswith("running_var") and tensor.is_floating_point() and bool((tensor < 0).any()):
            raise UserError(
                f"{name} holds a negative variance in {key}, which no training produces; it is "
                "damaged: give another"
            )


def wrong_kind(there: Tensor, here: Tensor) -> str | None:
    """Return the dtype of ``there`` if it is not floating-point while that of ``here`` is."""
    is_wrong = here.is_floating_point() and not there.is_floating_point()
    return str(there.dtype).removeprefix("torch.") if is_wrong else None


def _is_finite(tensor: Tensor) -> Tensor:
    # torch.isfinite does not support 8-bit floating-point types.
    return torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)


def describe_non_finite(counts: Mapping[str, int]) -> str:
    """Describe the counts of :func:`non_finite`, as part of a sentence."""
    key, num_bad = next(iter(counts.items()))
    values = "value" if num_bad == 1 else "values"
    others = f", and in {counted(len(counts) - 1, 'other tensor')}" if len(counts) > 1 else ""
    return f"nan or infinity in {num_bad:,} {values} of {key}{others}"
