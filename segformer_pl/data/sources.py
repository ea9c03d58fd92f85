"""Where the rows of a split are stored, and how many: the row groups that everything is read in.

A source knows, before anything is read, how many rows each of its row groups has. Parquet says so
in its footers (on this machine, on the hub or behind a URL), a folder of pictures by its listing.
For anything else that ``datasets`` can stream, the stream is read through once and its places are
kept in the user's cache folder.
"""

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import datasets
import huggingface_hub
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from segformer_pl.data.catalog import DatasetEntry
from segformer_pl.data.files import (
    UnreadableRows,
    check_one_reading,
    check_shards,
    file_name,
    files_of_pattern,
    files_of_split,
    is_folder,
)
from segformer_pl.data.image_folder import PictureFolder
from segformer_pl.data.parquet import ParquetSource
from segformer_pl.data.remote import file_system, first_line, is_remote, patiently
from segformer_pl.data.streamed import StreamedSource
from segformer_pl.errors import UserError

Split = Literal["train", "validation", "test"]
Row = Mapping[str, Any]
KEYWORDS = {str(split): words for split, words in datasets.data_files.SPLIT_KEYWORDS.items()}


class Source(Protocol):
    """Rows of one split, in row groups.

    Attributes:
        group_rows: Rows of each row group.
        group_bytes: Size of each row group in bytes, 0 where it is small or unknown.
        columns: Names of the columns; None if rows are only known once they are read.
        fingerprint: Tells two data sets apart; independent of where they are stored.
        remarks: What was not read, as (``error`` or ``warning``, sentence).
    """

    group_rows: list[int]
    group_bytes: list[int]
    columns: list[str] | None
    fingerprint: str
    remarks: list[tuple[str, str]]

    def read(self, group: int) -> Sequence[Row]:
        """The rows of a row group, pictures still encoded."""

    def read_file(self, path: str) -> bytes:
        """A file that a cell names in place of its bytes, if it is one of the data set's."""

    def name(self, group: int, row: int) -> str:
        """What to call a row whose data set has no ids."""


def open_split(
    entry: DatasetEntry, path: str | Mapping[str, Sequence[str]] | None, split: Split
) -> Source:
    """Find the rows of a split, and how they are grouped.

    Args:
        entry: The data set.
        path: A folder, a hub name ``owner/name`` or ``owner/name@revision``, a pattern with
            ``{split}`` of Parquet files (``hf://...``, ``https://...`` or local), or the files of
            each split. By default the hub location of the entry.
        split: Which part; the entry says what it is called in the data.

    Raises:
        UserError: There is no such place or split, a shard is damaged, there is no row, or a
            column of the entry is missing.
    """
    source = _find(entry, path, split)
    if not sum(source.group_rows):
        raise UserError(
            f"data.path: the {split} shards of {_where(entry, path)} hold no row; give a place "
            "with data"
        )
    for _, remark in source.remarks:
        _warn_once(remark)
    columns = source.columns  # of Parquet, every shard's were compared already
    wanted = [entry.image_column, entry.label_column, entry.id_column]
    for column in filter(None, wanted):
        if columns is not None and column not in columns:
            raise UserError(
                f"data.path: the {split} shards of {_where(entry, path)} have no column "
                f"{column!r}, which data set {entry.name!r} needs; they have: {', '.join(columns)}"
            )
    return source


@cache
def _warn_once(remark: str) -> None:
    rank_zero_warn(remark)


def _where(entry: DatasetEntry, path: Any) -> str:
    return repr(entry.hub if path is None else path)


def _find(entry: DatasetEntry, path: Any, split: Split) -> Source:
    stored = entry.splits.get(split, split)
    if isinstance(path, Mapping):
        if split not in path:
            raise UserError(
                f"data.path: it names no files for the {split} split, only for "
                f"{', '.join(path)}; add them"
            )
        return ParquetSource(list(path[split]), entry)
    if path is None and entry.hub is None:
        raise UserError(
            f"data.path: data set {entry.name!r} is read from a place of yours; give --data.path "
            "with a folder, a hub name or a URL pattern of its Parquet shards"
        )
    if path is not None and "{split}" in path:
        pattern = path.replace("{split}", stored)
        if "*" not in pattern:
            return ParquetSource([pattern], entry)
        files = patiently(lambda: _glob(pattern), pattern) if is_remote(pattern) else _glob(pattern)
        if not files:
            raise UserError(f"data.path: no file matches {pattern!r}; correct the pattern")
        # A pattern such as {split}* is for one split, and may meet the shards of others.
        files = files_of_pattern(path, stored, files)
        check_one_reading(files, stored)
        check_shards(files)
        return ParquetSource(files, entry)
    if path is not None and is_folder(path):
        folder = Path(path)
        shards, in_data = _shards(folder, stored), _shards(folder / "data", stored)
        if shards and in_data:
            raise _two_readings(shards[0], in_data[0], stored)
        shards = shards or in_data
        if shards:
            check_one_reading(shards, stored)
            check_shards(shards)
            source = ParquetSource(shards, entry, folder)
            images, labels = folder / "images" / stored, folder / "labels" / stored
            if images.is_dir() and labels.is_dir() and _holds_images(source, entry):
                raise _two_readings(shards[0], str(images), stored)
            return source
        if (folder / "images").is_dir():
            _check_other_name(folder, split, stored)
            return PictureFolder(folder, stored, entry)
        others = sorted(file_name(str(file)) for file in folder.rglob("[!.]*.parquet"))
        if others or not any(folder.iterdir()):
            hint = f" (there is {others[0]!r})" if others else ""
            _check_other_name(folder, split, stored)
            raise UserError(
                f"data.path: {path!r} holds no {stored}*.parquet{hint}; give a folder with Parquet "
                f"shards named {stored}-00000-of-00001.parquet and so on, or with pictures in "
                f"images/{stored} and labels/{stored}"
            )
    return _from_library(entry, path, split, stored)


def _shards(folder: Path, stored: str) -> list[str]:
    folder, name = (folder / stored).parent, PurePosixPath(stored).name
    return files_of_split(sorted(str(file) for file in folder.glob("[!.]*.parquet")), name)


def _two_readings(one: str, other: str, stored: str) -> UserError:
    return UserError(
        f"data.path: the split {stored!r} is in {one!r} and in {other!r}, and only one of them "
        "would be read; move the other away, or list the files of each split in data.path"
    )


def _holds_images(source: ParquetSource, entry: DatasetEntry) -> bool:
    """Whether the first image is in the shards, not in a file that its row names."""
    group = next((group for group, rows in enumerate(source.group_rows) if rows), None)
    if group is None:
        return False
    try:
        cell = source.read(group)[0][entry.image_column]
    except UnreadableRows:  # it may, so neither place is certain
        return True
    return bool(cell.get("bytes") if isinstance(cell, Mapping) else cell)


def _check_other_name(folder: Path, split: Split, stored: str) -> None:
    """Refuse a folder that has the split under another of its usual names, such as ``val``."""
    if (folder / "images" / stored).is_dir():
        return
    for name in KEYWORDS.get(split, []):
        if name == stored:
            continue
        place = folder / "images" / name
        files = _shards(folder, name) or _shards(folder / "data", name)
        if files or place.is_dir():
            there = file_name(files[0]) if files else f"images/{name}"
            raise UserError(
                f"data.path: {str(folder)!r} holds no split {stored!r}, but there is {there!r}; if "
                f"that is the {split} split, write `splits: {{{split}: {name}}}` in the data set's "
                "YAML"
            )


def _glob(pattern: str) -> list[str]:
    fs, path = file_system(pattern)
    try:
        names = (fs.unstrip_protocol(path) for path in fs.glob(path))
        return sorted(name for name in names if not file_name(name).startswith("."))
    except OSError as error:
        if is_remote(pattern):
            raise
        raise UserError(
            f"data.path: {pattern!r} cannot be searched ({error.strerror or error}); correct it"
        ) from error


def _from_library(entry: DatasetEntry, path: str | None, split: Split, stored: str) -> Source:
    """A hub data set, or a local one in a format of the library's."""
    is_local = path is not None and is_folder(path)
    if path is not None and is_local:
        name, revision = path, ""
    else:
        name, _, revision = (path or f"{entry.hub}@{entry.revision or ''}").partition("@")
    if not is_local:
        try:
            huggingface_hub.utils.validate_repo_id(name)
        except huggingface_hub.errors.HFValidationError:
            name = ""
        if name.count("/") != 1 or name.startswith((".", "~")):
            raise UserError(
                f"data.path: there is no folder {path!r}; give the folder that holds the Parquet "
                "shards, a hub name owner/name, or a pattern with {split} of files or URLs"
            )
    try:
        builder = datasets.load_dataset_builder(
            name, entry.config if path is None else None, revision=revision or None
        )
        files = dict(builder.config.data_files or {})
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data.path: {name!r} cannot be opened as a data set ({first_line(error)}); check "
            "the name and the network, or give a local folder"
        ) from error
    if files and stored not in files:
        raise UserError(
            f"data.path: {name!r} has no split {stored!r}, which is where data set "
            f"{entry.name!r} has its {split} pictures; it has: {', '.join(map(str, files))}"
        )
    shards = list(files.get(stored, []))
    commit = re.match(rf"hf://datasets/{name}@([0-9a-f]{{40}})/", shards[0]) if shards else None
    if commit and not revision:
        rank_zero_info(
            f"data set {name!r} is streamed as of its present commit; to stay with that, give "
            f"--data.path {name}@{commit[1]}"
        )
    check_shards(shards)
    if is_local:
        _check_split(shards, Path(name), stored)
    if shards and all(shard.endswith(".parquet") for shard in shards):
        return ParquetSource(shards, entry, Path(name) if is_local else None)
    try:
        stream = builder.as_streaming_dataset(split=stored)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data.path: {name!r} cannot be opened as a data set ({first_line(error)})"
        ) from error
    key = [name, revision, stored, shards, getattr(files.get(stored), "origin_metadata", None)]
    return StreamedSource(stream, key, entry, shards)


def _check_split(files: Sequence[str], folder: Path, stored: str) -> None:
    """Whether the library's rules for names have put files of another split into this one.

    They count ``train_extra/`` and ``train_extra.tar`` in with ``train/`` and ``train.tar``.

    Raises:
        UserError: They have, and the data set does not say itself which files a split has.
    """
    readme = folder / "README.md"
    if readme.is_file() and "data_files" in readme.read_text(encoding="utf-8", errors="replace"):
        return
    words = "|".join(map(re.escape, KEYWORDS.get(stored, [stored])))
    exact = re.compile(rf"(?:{words})(?:[-._ ]?\d.*)?(?:\..*)?")
    parts = {file: Path(os.path.relpath(file, folder)).parts for file in files}
    others = [file for file in files if not any(map(exact.fullmatch, parts[file]))]
    if others and len(others) < len(files):
        ours = next(file for file in files if file not in others)
        raise UserError(
            f"data.path: {'/'.join(parts[others[0]])!r} would be read as split {stored!r} as well "
            f"as {'/'.join(parts[ours])!r}; move one of them to a folder of its own, or list the "
            "files of each split under data_files in the folder's README.md"
        )
