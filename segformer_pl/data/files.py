"""File names and files: which of them hold a split, complete shards, safe reads."""

import os
import re
import stat
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from segformer_pl.errors import UserError

MAX_FILE_BYTES = 1 << 30  # largest image or label file, more than Pillow would decode

# train-00000-of-00002, as datasets and other writers name shards.
SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d+)-of-(?P<total>\d+)(?P<rest>.*)")
# What may follow the split in the name of a part: train2, train_07, train-part-1.
NUMBERED = r"(?:[-._ ](?:part|shard|chunk|file|batch))?[-._ ]?(?P<number>\d+).*"
MAX_LISTED = 3  # names in a message


class UnreadableRows(UserError):
    """Raised for rows that are damaged on disk while other rows of the data set can be read.

    ``on_bad_sample: skip`` skips such rows. It does not skip other errors of a source, such as a
    network that is down, because then it would skip every row.
    """


def read_file(file: Path) -> bytes:
    """Return the content of a regular file of at most :data:`MAX_FILE_BYTES`.

    Links are followed. A pipe or a device is not opened, because it could block or never end.

    Raises:
        UserError: The file is missing, is no regular file, is too large, or cannot be read.
    """
    size = file_size(file)
    if size > MAX_FILE_BYTES:
        raise UserError(
            f"{str(file)!r} has {size:,} bytes, but an image may have at most "
            f"{MAX_FILE_BYTES:,}; store a smaller file"
        )
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{_brief(file)} cannot be read ({error.strerror or error}); check its access rights"
        ) from error


def file_size(file: Path) -> int:
    """Return the size of a regular file in bytes.

    Raises:
        UserError: The file is missing, a broken link, a folder, a pipe or a device.
    """
    try:
        status = file.stat()
    except FileNotFoundError as error:
        if file.is_symlink():
            raise UserError(
                f"{str(file)!r} is a link to {os.readlink(file)!r}, which does not exist; "
                "restore that file or remove the link"
            ) from error
        raise UserError(f"there is no file {str(file)!r}; correct the path") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{_brief(file)} cannot be read ({why}); correct the path") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{str(file)!r} is a folder, a pipe or a device; give a regular file")
    return status.st_size


def is_folder(path: str) -> bool:
    """Return whether a path is an existing folder.

    Raises:
        UserError: The path cannot exist, for example because it is longer than the system allows.
    """
    try:
        return Path(path).is_dir()
    except OSError as error:
        raise UserError(
            f"data.path: {_brief(path)} cannot be opened ({error.strerror}); correct the path"
        ) from error


def check_readable(folder: Path, option: str) -> None:
    """Check that a folder may be read, if it exists; a glob takes one that may not for empty.

    Args:
        folder: Path of the folder.
        option: Option that the path comes from, for the message.

    Raises:
        UserError: The folder may not be listed, or its files may not be opened.
    """
    try:
        os.scandir(folder).close()
        os.stat(folder / "_")  # needs the right to open files, not the file
    except PermissionError as error:
        raise UserError(
            f"{option}: {_brief(folder)} cannot be read ({error.strerror}); change its access "
            "rights, or give another folder"
        ) from error
    except OSError:  # it does not exist or is no folder
        pass


def file_below(path: str, folders: Sequence[Path]) -> Path:
    """Return the file that a cell names, which must lie in one of the data set's folders.

    Otherwise a data set from the internet could make the program read any file of the computer.
    Links in the folders are followed: only a user of the computer can have made them.

    Args:
        path: Absolute path, or path relative to one of the folders.
        folders: Folders of the data set.

    Returns:
        The first file that exists; the first candidate if none exists.

    Raises:
        UserError: The path leads out of the folders.
    """
    candidates = []
    for folder in folders:
        root = os.path.abspath(folder)
        file = os.path.normpath(os.path.join(root, path))
        if file.startswith(root + os.sep):
            candidates.append(Path(file))
    if candidates:
        return next((file for file in candidates if os.path.lexists(file)), candidates[0])
    where = " or ".join(sorted({repr(str(folder)) for folder in folders})) or "any folder"
    raise UserError(
        f"the row names the file {_brief(path)}, which is not in {where}; store the images in the "
        "shards, or their files below that folder"
    )


def files_of_split(files: Sequence[str], split: str) -> list[str]:
    """Return those files whose names belong to a split.

    Shards follow the rule of ``datasets``: ``train-00000-of-00002`` belongs to ``train`` and
    ``train_extra-00000-of-00002`` to ``train_extra``. Any other file belongs to a split if its name
    is that of the split, alone or with a number. For the split ``train``::

        train.parquet                            belongs
        train_07.parquet, train-part-1.parquet   belong
        train-00000-of-00002.parquet             belongs
        train_extra-00000-of-00002.parquet       does not belong
        validation.parquet                       does not belong
        train_extra.parquet                      ambiguous

    Args:
        files: Paths or URLs.
        split: Name of the split as stored.

    Raises:
        UserError: Some files belong to the split and others are ambiguous, such as
            ``train_extra.parquet``, which ``datasets`` would include.
    """
    ours, ambiguous = [], []
    for file in files:
        belongs = _belongs(file_name(file), split)
        if belongs is None:
            ambiguous.append(file)
        elif belongs:
            ours.append(file)
    if ours and ambiguous:
        raise _ambiguous(file_name(ours[0]), file_name(ambiguous[0]), split)
    return ours


def files_of_pattern(pattern: str, split: str, files: Sequence[str]) -> list[str]:
    """Return those files that belong to a split, judged by their text in place of ``{split}``.

    The rule of :func:`files_of_split` applies to the name of the file or folder that contains
    ``{split}``, from ``{split}`` to its end. So ``{split}*/*.parquet`` means ``train/`` and
    ``train-1/``, but not ``train_extra/``. If no file belongs by this rule, all files that match
    the pattern are returned.

    Args:
        pattern: Pattern with ``{split}`` and wildcards.
        split: Name of the split as stored.
        files: Files that match the pattern with the split in the place of ``{split}``.

    Raises:
        UserError: Some files belong to the split and others are ambiguous.
    """
    parts = pattern.split("/")
    first = next(number for number, part in enumerate(parts) if "{split}" in part)
    expression = re.compile("/(" + _expression("/".join(parts[first:]), split) + ")$")
    ours: list[str] = []
    # For messages, the parts of the paths that the pattern matched: names that begin with the
    # split, names with a prefix before it, and ambiguous names.
    plain: list[str] = []
    prefixed: list[str] = []
    ambiguous: list[str] = []
    for file in files:
        match = expression.search("/" + file)
        names = [_split_name(match, group, split) for group in match.groupdict()] if match else []
        belongs = [_belongs(name, split.rpartition("/")[2]) for _, name in names]
        if False in belongs or any(prefix[-1:].isalnum() for prefix, _ in names):
            continue  # such as pretrain.parquet, where the split is a part of another word
        shown = match[1] if match else file
        if None in belongs:
            ambiguous.append(shown)
            continue
        ours.append(file)
        (prefixed if any(prefix for prefix, _ in names) else plain).append(shown)
    # *{split}* matches train-0 and extra_train-0, which may be another split.
    ambiguous += prefixed if plain else []
    if ours and ambiguous:
        raise _ambiguous((plain or prefixed)[0], ambiguous[0], split)
    return ours or list(files)


def _expression(pattern: str, split: str) -> str:
    """Return the regular expression of a pattern, with a named group for each ``{split}``.

    The group's name begins with ``free`` after a wildcard, and with ``fixed`` otherwise.
    """
    tokens = re.findall(r"\{split\}|\*\*/|\*+|\?|\[[^\]]+\]|.", pattern, re.DOTALL)
    wild = {"**/": "(?:.*/)?", "?": "[^/]"}
    expression = ""
    for number, token in enumerate(tokens):
        if token == "{split}":
            is_free = number > 0 and tokens[number - 1].startswith(("*", "?", "["))
            expression += f"(?P<{'free' if is_free else 'fixed'}{number}>{re.escape(split)})"
        elif token.startswith("[") and len(token) > 1:
            expression += token.replace("[!", "[^", 1)
        elif token in wild:
            expression += wild[token]
        else:
            expression += "[^/]*?" if token.startswith("*") else re.escape(token)
    return expression


def _split_name(match: re.Match[str], group: str, split: str) -> tuple[str, str]:
    """Return prefix and rest of the file or folder name that contains a group's split.

    The rest begins with the split. The prefix is empty unless a wildcard matched it.
    """
    begin, text = match.end(group) - len(split.rpartition("/")[2]), match.string
    end = text.find("/", begin)
    prefix = text[text.rfind("/", 0, begin) + 1 : begin] if group.startswith("free") else ""
    return prefix, text[begin : end if end >= 0 else len(text)].split("?")[0]


def _belongs(name: str, split: str) -> bool | None:
    """Return whether a file or folder name belongs to a split; None if it is ambiguous."""
    stem = name.removesuffix(".parquet")
    shard = SHARD.fullmatch(stem)
    if shard:
        return shard["name"] == split
    if re.fullmatch(f"{re.escape(split)}(?:{NUMBERED})?", stem):
        return True
    return None if re.match(f"{re.escape(split)}[-._ ]", stem) else False


def _ambiguous(ours: str, other: str, split: str) -> UserError:
    return UserError(
        f"data.path: beside {ours!r} there is {other!r}, and the name does not say whether it "
        f"belongs to the split {split!r}; rename it, or list the files of each split in data.path"
    )


def check_no_duplicates(files: Sequence[str], split: str) -> None:
    """Check that the files of a split are its parts, not several copies of it.

    Args:
        files: Files of one folder or pattern; only names that begin with the split are compared.
        split: Name of the split as stored.

    Raises:
        UserError: A folder mixes a whole file, numbered parts and shards ``-00000-of-00002``; or
            the numbers of its parts have gaps, so that parts are missing or the numbers mean
            something else, such as image sizes.
    """
    split = split.rpartition("/")[2]
    folders: dict[str, dict[str, list[tuple[int, str]]]] = {}
    for file in files:
        name = file_name(file)
        stem = name.removesuffix(".parquet")
        kind, number = "", 0
        if shard := SHARD.fullmatch(stem):
            kind = "-of-"
        elif numbered := re.fullmatch(f"{re.escape(split)}{NUMBERED}", stem):
            kind, number = "number", int(numbered["number"])
        elif stem != split:
            continue
        if shard and shard["name"] != split:
            continue
        kinds = folders.setdefault(file[: -len(name)], {})
        kinds.setdefault(kind, []).append((number, name))
    for kinds in folders.values():
        if len(kinds) > 1:
            (_, one), (_, other) = (names[0] for names in list(kinds.values())[:2])
            raise UserError(
                f"data.path: {one!r} and {other!r} are either two copies of the split {split!r} or "
                "parts of it; move one of them away, or list the files of each split in data.path"
            )
        parts = sorted(kinds.get("number", []))
        for (number, one), (following, other) in pairwise(parts):
            if following > number + 1:
                raise UserError(
                    f"data.path: no part lies between {one!r} and {other!r}, so either parts are "
                    "missing or these files are versions of one split; fetch the missing parts, "
                    "or list the files of each split in data.path"
                )


def check_shards(files: Sequence[str]) -> None:
    """Check that all shards ``NAME-00000-of-00002`` exist, each once.

    Raises:
        UserError: Shards are missing or repeated, or come from two versions of the split.
    """
    groups: dict[str, dict[int, list[int]]] = {}
    width = 0  # digits of the numbers in names
    for file in files:
        shard = SHARD.fullmatch(file_name(file))
        if shard:
            name, width = file[: -len(file_name(file))] + shard["name"], len(shard["total"])
            numbers = groups.setdefault(name, {}).setdefault(int(shard["total"]), [])
            numbers.append(int(shard["number"]))
    for name, totals in groups.items():
        if len(totals) > 1:
            raise UserError(
                f"data.path: {name!r} has shards of {' and of '.join(map(str, sorted(totals)))}, "
                "so they are of two versions; remove the old shards"
            )
        ((total, numbers),) = totals.items()
        first = int(0 not in numbers and total in numbers)  # some writers count from 1
        missing = sorted(set(range(first, first + total)) - set(numbers))
        if missing:
            raise UserError(
                f"data.path: {len(missing)} of the {total} shards of {name!r} are missing, the "
                f"first is -{missing[0]:0{width}d}-of-{total:0{width}d}; fetch them, or list the "
                "files to read in data.path"
            )
        if len(numbers) > total:
            repeated = next(number for number in numbers if numbers.count(number) > 1)
            raise UserError(
                f"data.path: shard {repeated} of {name!r} exists more than once; remove the copies"
            )


def file_name(file: str) -> str:
    """Return the last part of a path or URL, without a query."""
    return (file.split("?")[0] if "://" in file else file).rsplit("/", 1)[-1]


def listed(names: Sequence[str]) -> str:
    """Return up to :data:`MAX_LISTED` names as text, for a message."""
    shown = ", ".join(map(repr, names[:MAX_LISTED]))
    return shown if len(names) <= MAX_LISTED else f"{shown} ..."


def _brief(path: object) -> str:
    text = repr(str(path))
    return text if len(text) <= 120 else f"{text[:80]}...' ({len(text)} characters)"
