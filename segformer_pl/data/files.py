"""Files: which of them hold a split, whether all shards are there, and reading one safely."""

import os
import re
import stat
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from segformer_pl.errors import UserError

MAX_FILE_BYTES = 1 << 30  # of one image or label: more than Pillow would decode

SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d+)-of-(?P<total>\d+)(?P<rest>.*)")
NUMBERED = r"(?:[-._ ](?:part|shard|chunk|file|batch))?[-._ ]?(?P<number>\d+).*"
SHOWN = 3  # names in a message


class UnreadableRows(UserError):
    """Rows that are damaged on disk: reading them again does not help, others are not concerned.

    ``on_bad_sample: skip`` skips them. It does not skip other errors of a source, such as a network
    that is down: every row would be skipped.
    """


def read_file(file: Path) -> bytes:
    """The content of a regular file of at most :data:`MAX_FILE_BYTES`.

    Links are followed; a pipe or a device, which could block or never end, is not opened.

    Raises:
        UserError: There is no such file, it is not a regular one, too large, or cannot be read.
    """
    size = file_size(file)
    if size > MAX_FILE_BYTES:
        raise UserError(
            f"{str(file)!r} has {size:,} bytes, but an image may have {MAX_FILE_BYTES:,}; "
            "replace it"
        )
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{_brief(file)} cannot be read ({error.strerror or error})") from error


def file_size(file: Path) -> int:
    """The size in bytes of a regular file.

    Raises:
        UserError: It is missing, a link to nowhere, a folder, a pipe or a device.
    """
    try:
        status = file.stat()
    except FileNotFoundError as error:
        if file.is_symlink():
            raise UserError(
                f"{str(file)!r} is a link to {os.readlink(file)!r}, which is not there; restore "
                "that file or remove the link"
            ) from error
        raise UserError(f"there is no file {str(file)!r}; correct the path") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{_brief(file)} cannot be read ({why}); correct the path") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{str(file)!r} is a folder, a pipe or a device; give a regular file")
    return status.st_size


def is_folder(path: str) -> bool:
    """Whether there is such a folder.

    Raises:
        UserError: The path cannot be one, such as one of more characters than the system allows.
    """
    try:
        return Path(path).is_dir()
    except OSError as error:
        raise UserError(
            f"data.path: {_brief(path)} cannot be opened ({error.strerror}); correct the path"
        ) from error


def file_below(path: str, folders: Sequence[Path]) -> Path:
    """The file that a cell of a data set names, which has to lie in one of the data set's folders.

    Otherwise a data set from the internet could have any file of this machine read. Links inside of
    the folders are followed: whoever set them up has access to that machine.

    Raises:
        UserError: It lies elsewhere.
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
    raise UserError(
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
        UserError: Beside files of the split there is one like ``train_extra.parquet``. ``datasets``
            would count it in, a reader of the names would not.
    """
    ours, unclear = [], []
    for file in files:
        belongs = _belongs(file_name(file), split)
        if belongs is None:
            unclear.append(file)
        elif belongs:
            ours.append(file)
    if ours and unclear:
        raise _unclear(file_name(ours[0]), file_name(unclear[0]), split)
    return ours


def files_of_pattern(pattern: str, split: str, files: Sequence[str]) -> list[str]:
    """Those of the files that hold a split, told by what stands where the pattern has ``{split}``.

    The rule of :func:`files_of_split` holds for the whole name of the file or folder in which
    ``{split}`` stands, from there on: ``{split}*/*.parquet`` means ``train/`` and ``train-1/``, not
    ``train_extra/``. If no name fits it, the pattern is taken at its word.

    Args:
        pattern: With ``{split}`` and wildcards.
        split: Name of the split as stored.
        files: What matches the pattern once ``{split}`` is replaced.

    Raises:
        UserError: Names do not say whether they belong to the split.
    """
    parts = pattern.split("/")
    first = next(number for number, part in enumerate(parts) if "{split}" in part)
    expression = re.compile("/(" + _expression("/".join(parts[first:]), split) + ")$")
    ours: list[str] = []
    plain: list[str] = []  # these three hold what the pattern matched, for messages
    prefixed: list[str] = []
    unclear: list[str] = []
    for file in files:
        match = expression.search("/" + file)
        places = [_place(match, group, split) for group in match.groupdict()] if match else []
        belongs = [_belongs(name, split.rpartition("/")[2]) for _, name in places]
        if False in belongs or any(before[-1:].isalnum() for before, _ in places):
            continue
        shown = match[1] if match else file
        if None in belongs:
            unclear.append(shown)
            continue
        ours.append(file)
        (prefixed if any(before for before, _ in places) else plain).append(shown)
    unclear += prefixed if plain else []  # *{split}* of train-0 and extra_train-0
    if ours and unclear:
        raise _unclear((plain or prefixed)[0], unclear[0], split)
    return ours or list(files)


def _expression(pattern: str, split: str) -> str:
    """A regular expression of a pattern, with a group for each ``{split}``.

    A group is named after whether a wildcard stands before it.
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


def _place(match: re.Match[str], group: str, split: str) -> tuple[str, str]:
    """What stands before the split in its file's or folder's name, if it is free; and from it."""
    begin, text = match.end(group) - len(split.rpartition("/")[2]), match.string
    end = text.find("/", begin)
    before = text[text.rfind("/", 0, begin) + 1 : begin] if group.startswith("free") else ""
    return before, text[begin : end if end >= 0 else len(text)].split("?")[0]


def _belongs(name: str, split: str) -> bool | None:
    """Whether a name is that of a file or folder of a split; None if it does not say."""
    stem = name.removesuffix(".parquet")
    shard = SHARD.fullmatch(stem)
    if shard:
        return shard["name"] == split
    if re.fullmatch(f"{re.escape(split)}(?:{NUMBERED})?", stem):
        return True
    return None if re.match(f"{re.escape(split)}[-._ ]", stem) else False


def _unclear(ours: str, other: str, split: str) -> UserError:
    return UserError(
        f"data.path: beside {ours!r} there is {other!r}, and the name does not say whether it "
        f"belongs to the split {split!r}; rename it, or list the files of each split in data.path"
    )


def check_one_reading(files: Sequence[str], split: str) -> None:
    """Check that the files of a split are its parts, not the same rows several times.

    Args:
        files: Of one folder or pattern; only names that begin with the split are compared.
        split: Name of the split as stored.

    Raises:
        UserError: A whole file stands beside parts, parts beside shards ``-00000-of-00002``, or
            the numbers of parts have gaps, so that some are missing or the numbers mean something
            else, such as sizes of images.
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
                    f"data.path: no number lies between those of {one!r} and {other!r}, so either "
                    "parts are missing or these are versions of one set; fetch the missing ones, "
                    "or list the files of each split in data.path"
                )


def check_shards(files: Sequence[str]) -> None:
    """Check that shards ``NAME-00000-of-00002`` are all there, once.

    Raises:
        UserError: Some are missing, or there are shards of two versions.
    """
    groups: dict[str, dict[int, list[int]]] = {}
    width = 0  # of the numbers in names
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
                "so they are of two versions; remove the old ones"
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
            twice = next(number for number in numbers if numbers.count(number) > 1)
            raise UserError(
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
