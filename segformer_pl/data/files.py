"""Files: which of them hold a split, whether all shards are there, and reading one safely."""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from segformer_pl.data.labels import DataError

MAX_FILE_BYTES = 1 << 30  # of one image or label: more than Pillow would decode

SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5,})-of-(?P<total>\d{5,})(?P<rest>.*)")
NUMBERED = r"(?:[-._ ](?:part|shard|chunk|file|batch))?[-._ ]?\d.*"
SHOWN = 3  # names in a message


class UnreadableRows(DataError):
    """Rows that are damaged on disk: reading them again does not help, others are not concerned.

    ``on_bad_sample: skip`` skips them. It does not skip other errors of a source, such as a network
    that is down: every row would be skipped.
    """


def read_file(file: Path) -> bytes:
    """The content of a regular file of at most :data:`MAX_FILE_BYTES`.

    Links are followed; a pipe or a device, which could block or never end, is not opened.

    Raises:
        DataError: There is no such file, it is not a regular one, too large, or cannot be read.
    """
    size = file_size(file)
    if size > MAX_FILE_BYTES:
        raise DataError(
            f"{str(file)!r} has {size:,} bytes, but an image may have {MAX_FILE_BYTES:,}; "
            "replace it"
        )
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{_brief(file)} cannot be read ({error.strerror or error})") from error


def file_size(file: Path) -> int:
    """The size in bytes of a regular file.

    Raises:
        DataError: It is missing, a link to nowhere, a folder, a pipe or a device.
    """
    try:
        status = file.stat()
    except FileNotFoundError as error:
        if file.is_symlink():
            raise DataError(
                f"{str(file)!r} is a link to {os.readlink(file)!r}, which is not there; restore "
                "that file or remove the link"
            ) from error
        raise DataError(f"there is no file {str(file)!r}; correct the path") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{_brief(file)} cannot be read ({why}); correct the path") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{str(file)!r} is a folder, a pipe or a device; give a regular file")
    return status.st_size


def is_folder(path: str) -> bool:
    """Whether there is such a folder.

    Raises:
        DataError: The path cannot be one, such as one of more characters than the system allows.
    """
    try:
        return Path(path).is_dir()
    except OSError as error:
        raise DataError(
            f"data.path: {_brief(path)} cannot be opened ({error.strerror}); correct the path"
        ) from error


def file_below(path: str, folders: Sequence[Path]) -> Path:
    """The file that a cell of a data set names, which has to lie in one of the data set's folders.

    Otherwise a data set from the internet could have any file of this machine read. Links inside of
    the folders are followed: whoever set them up has access to that machine.

    Raises:
        DataError: It lies elsewhere.
    """
    found = []
    for folder in folders:
        root = os.path.abspath(folder)
        file = os.path.normpath(os.path.join(root, path))
        if file.startswith(root + os.sep):
            found.append(Path(file))
    if found:
        return next((file for file in found if os.path.lexists(file)), found[0])
    where = " or ".join(sorted({repr(str(folder)) for folder in folders})) or "any folder"
    raise DataError(
        f"the row names the file {_brief(path)}, which is not in {where}; store the images in the "
        "shards, or their files below that folder"
    )


def files_of_split(files: Sequence[str], split: str) -> list[str]:
    """Those of the files that hold a split, told by their names.

    ``train-00000-of-00002`` belongs to the split ``train``, and ``train_extra-00000-of-00002`` to
    ``train_extra``, which is the rule of ``datasets`` for shards. Other files belong to a split if
    their name is that of the split, or that and a number: ``train``, ``train_07``,
    ``train-part-1``.

    Args:
        files: Paths or URLs.
        split: Name of the split as stored.

    Raises:
        DataError: Beside files of the split there is one like ``train_extra.parquet``. ``datasets``
            would count it in, a reader of the names would not.
    """
    ours, unclear = [], []
    for file in files:
        stem = file_name(file).removesuffix(".parquet")
        shard = SHARD.fullmatch(stem)
        if shard:
            if shard["name"] == split:
                ours.append(file)
        elif re.fullmatch(f"{re.escape(split)}(?:{NUMBERED})?", stem):
            ours.append(file)
        elif re.match(f"{re.escape(split)}[-._ ]", stem):
            unclear.append(file)
    if ours and unclear:
        raise DataError(
            f"data.path: beside {file_name(ours[0])!r} there is {file_name(unclear[0])!r}, and the "
            f"name does not say whether it belongs to the split {split!r}; rename it, or list the "
            "files of each split in data.path"
        )
    return ours


def check_shards(files: Sequence[str]) -> None:
    """Check that shards ``NAME-00000-of-00002`` are all there, once.

    Raises:
        DataError: Some are missing, or there are shards of two versions.
    """
    groups: dict[str, dict[int, list[int]]] = {}
    for file in files:
        shard = SHARD.fullmatch(file_name(file))
        if shard:
            name = file[: -len(file_name(file))] + shard["name"]
            numbers = groups.setdefault(name, {}).setdefault(int(shard["total"]), [])
            numbers.append(int(shard["number"]))
    for name, totals in groups.items():
        if len(totals) > 1:
            raise DataError(
                f"data.path: {name!r} has shards of {' and of '.join(map(str, sorted(totals)))}, "
                "so they are of two versions; remove the old ones"
            )
        ((total, numbers),) = totals.items()
        missing = sorted(set(range(total)) - set(numbers))
        if missing:
            raise DataError(
                f"data.path: {len(missing)} of the {total} shards of {name!r} are missing, the "
                f"first is -{missing[0]:05d}-of-{total:05d}; fetch them, or list the files to read "
                "in data.path"
            )
        if len(numbers) > total:
            twice = next(number for number in numbers if numbers.count(number) > 1)
            raise DataError(
                f"data.path: shard {twice} of {name!r} is there more than once; remove the others"
            )


def file_name(file: str) -> str:
    """The last part of a path or URL, without a query."""
    return (file.split("?")[0] if "://" in file else file).rsplit("/", 1)[-1]


def listed(names: Sequence[str]) -> str:
    """The first of some names, for a message."""
    shown = ", ".join(map(repr, names[:SHOWN]))
    return shown if len(names) <= SHOWN else f"{shown} ..."


def _brief(path: object) -> str:
    text = repr(str(path))
    return text if len(text) <= 120 else f"{text[:80]}...' ({len(text)} characters)"
