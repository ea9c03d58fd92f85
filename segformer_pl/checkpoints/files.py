"""Read a file of tensors whole, or say in one sentence what is wrong with it.

torch's own reader does not compare the checksums that ``torch.save`` writes, so a flipped bit
becomes a weight; here they are compared first. The formats differ in what they can show:

- ``torch.save`` (``.ckpt``, ``.pth``, ``.pt``, ``.bin``) is a zip archive with a CRC-32 for every
  record. With ``torch.serialization.set_crc32_options(False)`` all of them are written as 0, and
  before torch 1.6 the format was another, without any: nothing can be compared then.
- ``.safetensors`` has no checksum. Its reader checks the header, and that shapes, types and offsets
  account for every byte.

Whatever the format, values are looked at where they are used: nan and infinity are refused
(:func:`non_finite`). Files are data: a pickle that would run code is refused.
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

from segformer_pl.errors import UserError

_ZIP = b"PK\x03\x04"


def load_file(path: Path) -> Any:
    """What ``torch.save`` wrote, on the CPU.

    Raises:
        UserError: It is no regular file, cannot be read, is damaged or cut short, or holds
            code.
    """
    with open_file(path) as stream:
        return load_stream(stream, path)


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file.

    Raises:
        UserError: It is something else, or may not be read.
    """
    check_regular(path)
    try:
        stream = path.open("rb")
    except PermissionError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}); change that") from error
    with stream:
        yield stream


def load_stream(stream: BufferedReader, path: Path) -> Any:
    """As :func:`load_file`, of a file that is open; ``path`` is its name for messages."""
    size = os.fstat(stream.fileno()).st_size
    try:
        is_archive = stream.read(len(_ZIP)) == _ZIP
        if is_archive and (record := _damaged_record(stream)):
            raise UserError(
                f"'{path}' is damaged: its record {record!r} does not agree with the checksum "
                "that was written with it; copy the file again or give another"
            )
        stream.seek(0)
        return torch.load(stream, weights_only=True, map_location="cpu")
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise damaged(path, size, error) from error
        raise UserError(
            f"'{path}' holds code ({code[1]}), which reading it would run, so it is refused; have "
            "whoever made it save tensors only: torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # of many types, depending on where the file breaks off
        raise damaged(path, size, error) from error


def check_regular(path: Path) -> int:
    """The size of a regular file in bytes; a pipe would be waited for, a device never ends.

    Raises:
        UserError: There is no such file, or it is something else.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:197]}..."
        raise UserError(f"{shown!r} cannot be opened ({reason}); give another") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise UserError(f"'{path}' is {kind}; give a file")
    return status.st_size


def damaged(path: Path, size: int, error: Exception) -> UserError:
    """The sentence for a file that cannot be understood."""
    return UserError(
        f"'{path}' is no file of tensors, or is cut short ({type(error).__name__}); compare its "
        f"size ({size:,} bytes) with the original and fetch it again"
    )


def _damaged_record(stream: BufferedReader) -> str | None:
    """The first record of an archive whose bytes do not have its CRC-32.

    Takes about half as long as ``torch.load``.
    """
    with zipfile.ZipFile(stream) as archive:
        records = archive.infolist()
        if not any(record.CRC for record in records):
            return None  # written without checksums
        return archive.testzip()


def non_finite(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Names of the tensors that hold nan or infinity -> how many values of them are.

    On a GPU it waits once, and again for every tensor that does.
    """
    flags: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not tensor.is_meta and (tensor.is_floating_point() or tensor.is_complex()):
            flags.setdefault(tensor.device, {})[name] = _is_finite(tensor).all()
    broken = {
        name
        for on_device in flags.values()
        for name, is_whole in zip(on_device, torch.stack(list(on_device.values())).tolist())
        if not is_whole
    }
    return {
        name: int((~_is_finite(tensor)).sum()) for name, tensor in tensors.items() if name in broken
    }


def check_usable(tensors: Mapping[str, Tensor], name: str) -> None:
    """Tensors have values, all of them, and no variance is negative: its root would be nan.

    Args:
        tensors: Of a state dict.
        name: Where they came from, for messages.

    Raises:
        UserError: One has not.
    """
    for key, tensor in tensors.items():
        if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
            kind = "without values (meta)" if tensor.is_meta else "sparse or nested"
            raise UserError(
                f"{name} holds {key} as a tensor that is {kind}; have whoever made it save plain "
                "tensors"
            )
        if key.endswith("running_var") and tensor.is_floating_point() and bool((tensor < 0).any()):
            raise UserError(
                f"{name} holds a negative variance in {key}, which no training leaves; it is "
                "damaged: give another"
            )


def wrong_kind(there: Tensor, here: Tensor) -> str | None:
    """The type of a tensor that stands for floating-point weights and is none of that kind."""
    is_wrong = here.is_floating_point() and not there.is_floating_point()
    return str(there.dtype).removeprefix("torch.") if is_wrong else None


def _is_finite(tensor: Tensor) -> Tensor:
    # Types of 8 bits have no isfinite.
    return torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)


def describe_non_finite(counts: Mapping[str, int]) -> str:
    """What :func:`non_finite` counted, as part of a sentence."""
    name, num_bad = next(iter(counts.items()))
    values = "value" if num_bad == 1 else "values"
    others = f", and in {len(counts) - 1} other tensors" if len(counts) > 1 else ""
    return f"nan or infinity in {num_bad:,} {values} of {name}{others}"
