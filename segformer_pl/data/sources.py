"""Where the rows of a split are stored and how many there are, as row groups.

A :class:`Source` knows the number of rows of each row group before it reads any row. Parquet states
it in the footers (local, on the hub or behind a URL), and a folder of image files in its listing.
Any other format that ``datasets`` can stream is read through once, and the stream's states are kept
in the user's cache folder.
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
    check_no_duplicates,
    check_readable,
    check_shards,
    file_name,
    files_of_pattern,
    files_of_split,
    is_folder,
)
from segformer_pl.data.image_folder import ImageFolder
from segformer_pl.data.parquet import ParquetSource
from segformer_pl.data.remote import file_system, first_line, is_remote, read_with_retries
from segformer_pl.data.streamed import StreamedSource
from segformer_pl.errors import UserError

Split = Literal["train", "validation", "test"]
Row = Mapping[str, Any]
# Names that ``datasets`` accepts for a split, such as val, valid and dev for validation.
SPLIT_NAMES = {str(split): names for split, names in datasets.data_files.SPLIT_KEYWORDS.items()}


class Source(Protocol):
    """The rows of one split, in row groups.

    Attributes:
        group_rows: Number of rows of each row group.
        group_bytes: Size of each row group in bytes; 0 if it is small or unknown.
        columns: Names of the columns; None if the source has no schema.
        fingerprint: Hash of the data, independent of its location; see
            :mod:`segformer_pl.data.index`.
        remarks: Files that are left out, as (``error`` or ``warning``, message).
    """

    group_rows: list[int]
    group_bytes: list[int]
    columns: list[str] | None
    fingerprint: str
    remarks: list[tuple[str, str]]

    def read(self, group: int) -> Sequence[Row]:
        """Return the rows of a row group; images stay encoded."""

    def read_file(self, path: str) -> bytes:
        """Return the content of a file that a cell names instead of holding its bytes."""

    def name(self, group: int, row: int) -> str:
        """Return the name of a row in a data set without ids."""


def open_split(
    entry: DatasetEntry, path: str | Mapping[str, Sequence[str]] | None, split: Split
) -> Source:
    """Open the source of a split.

    Args:
        entry: Catalogue entry of the data set.
        path: Folder, hub name ``owner/name`` or ``owner/name@revision``, pattern of Parquet files
            with ``{split}`` (``hf://...``, ``https://...`` or local), or the Parquet files of each
            split. Default: the hub location of the entry.
        split: Split to open; ``entry.splits`` has its name as stored.

    Raises:
        UserError: The location or the split does not exist or may not be read, a shard is damaged,
            there are no rows, or a column of the entry is missing.
    """
    source = _open_source(entry, path, split)
    if not sum(source.group_rows):
        raise UserError(
            f"data.path: the {split} shards of {_where(entry, path)} have no rows; give a location "
            "with data"
        )
    for _, remark in source.remarks:
        _warn_once(remark)
    # For streams: a Parquet source has already checked the columns of every shard.
    columns = source.columns
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


def _open_source(entry: DatasetEntry, path: Any, split: Split) -> Source:
    """Choose the source by the kind of path: files, pattern, folder or hub name."""
    stored = entry.splits.get(split, split)
    if isinstance(path, Mapping):
        if split not in path:
            raise UserError(
                f"data.path: no files for split {split!r}, only for {', '.join(path)}; add them"
            )
        return ParquetSource(list(path[split]), entry)
    if path is None and entry.hub is None:
        raise UserError(
            f"data.path: not given, and data set {entry.name!r} has no hub location; give "
            "--data.path with a folder, a hub name or a URL pattern of its Parquet shards"
        )
    if path is not None and "{split}" in path:
        pattern = path.replace("{split}", stored)
        if "*" not in pattern:
            return ParquetSource([pattern], entry)
        if is_remote(pattern):
            files = read_with_retries(lambda: _glob(pattern), pattern)
        else:
            files = _glob(pattern)
        if not files:
            raise UserError(f"data.path: no file matches {pattern!r}; correct the pattern")
        # A pattern such as {split}* may also match the shards of other splits.
        files = files_of_pattern(path, stored, files)
        check_no_duplicates(files, stored)
        check_shards(files)
        return ParquetSource(files, entry)
    if path is not None and is_folder(path):
        folder = Path(path)
        for part in (folder, folder / "data", folder / "images", folder / "labels"):
            check_readable(part, "data.path")
        stored = _name_in_folder(folder, split, stored)
        shards, in_data = _shards(folder, stored), _shards(folder / "data", stored)
        if shards and in_data:
            raise _stored_twice(shards[0], in_data[0], stored)
        shards = shards or in_data
        if shards:
            check_no_duplicates(shards, stored)
            check_shards(shards)
            source = ParquetSource(shards, entry, folder)
            images, labels = folder / "images" / stored, folder / "labels" / stored
            if images.is_dir() and labels.is_dir() and _holds_images(source, entry):
                raise _stored_twice(shards[0], str(images), stored)
            return source
        if (folder / "images").is_dir():
            _check_other_name(folder, split, stored)
            return ImageFolder(folder, stored, entry)
        others = sorted(file_name(str(file)) for file in folder.rglob("[!.]*.parquet"))
        if others or not any(folder.iterdir()):
            hint = f" (there is {others[0]!r})" if others else ""
            _check_other_name(folder, split, stored)
            raise UserError(
                f"data.path: no {stored}*.parquet or images/{stored}/ in {path!r}{hint}; give a "
                f"folder with Parquet shards {stored}-00000-of-00001.parquet and so on, or with "
                f"images in images/{stored} and labels in labels/{stored}"
            )
    return _from_library(entry, path, split, stored)


def _name_in_folder(folder: Path, split: Split, stored: str) -> str:
    """Return the name of a split in a folder: as stored, or its only other usual name there."""
    if _is_in_folder(folder, stored):
        return stored
    # "eval" may be either of the two splits.
    others = [name for name in SPLIT_NAMES.get(split, []) if not name.startswith("eval")]
    found = [name for name in others if _is_in_folder(folder, name)]
    return found[0] if len(found) == 1 else stored


def _is_in_folder(folder: Path, name: str) -> bool:
    if (folder / "images" / name).is_dir():
        return True
    return bool(_shards(folder, name) or _shards(folder / "data", name))


def _shards(folder: Path, stored: str) -> list[str]:
    """Return the Parquet files of a folder that hold a split."""
    folder, name = (folder / stored).parent, PurePosixPath(stored).name
    return files_of_split(sorted(str(file) for file in folder.glob("[!.]*.parquet")), name)


def _stored_twice(one: str, other: str, stored: str) -> UserError:
    return UserError(
        f"data.path: the split {stored!r} is in {one!r} and in {other!r}, and only one of them "
        "would be read; move the other away, or list the files of each split in data.path"
    )


def _holds_images(source: ParquetSource, entry: DatasetEntry) -> bool:
    """Return whether the first row holds its image, instead of the name of an image file."""
    group = next((group for group, rows in enumerate(source.group_rows) if rows), None)
    if group is None:
        return False
    try:
        cell = source.read(group)[0][entry.image_column]
    except UnreadableRows:  # unknown: assume that it does, so that the conflict is reported
        return True
    return bool(cell.get("bytes") if isinstance(cell, Mapping) else cell)


def _check_other_name(folder: Path, split: Split, stored: str) -> None:
    """Raise if a folder has the split under another of its usual names, such as ``val``."""
    if (folder / "images" / stored).is_dir():
        return
    for name in SPLIT_NAMES.get(split, []):
        if name == stored:
            continue
        images = folder / "images" / name
        files = _shards(folder, name) or _shards(folder / "data", name)
        if files or images.is_dir():
            existing = file_name(files[0]) if files else f"images/{name}"
            raise UserError(
                f"data.path: no split {stored!r} in {str(folder)!r}, but there is {existing!r}; if "
                f"that is the {split} split, write `splits: {{{split}: {name}}}` in the data set's "
                "YAML file"
            )


def _glob(pattern: str) -> list[str]:
    """Return the paths or URLs that match a pattern, without hidden files."""
    fs, path = file_system(pattern)
    try:
        names = (fs.unstrip_protocol(path) for path in fs.glob(path))
        return sorted(name for name in names if not file_name(name).startswith("."))
    except OSError as error:
        if is_remote(pattern):
            raise
        raise UserError(
            f"data.path: {pattern!r} cannot be searched ({error.strerror or error}); correct "
            "the pattern"
        ) from error


def _from_library(entry: DatasetEntry, path: str | None, split: Split, stored: str) -> Source:
    """Open a hub data set, or a local folder in a format that ``datasets`` reads."""
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
                f"data.path: there is no folder {path!r}; give the folder that holds images/ and "
                "labels/ or Parquet shards, a hub name owner/name, or a pattern with {split} of "
                "files or URLs"
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
            f"{entry.name!r} has its {split} images; it has: {', '.join(map(str, files))}"
        )
    shards = list(files.get(stored, []))
    commit = re.match(rf"hf://datasets/{name}@([0-9a-f]{{40}})/", shards[0]) if shards else None
    if commit and not revision:
        rank_zero_info(
            f"data set {name!r} is streamed at its latest commit; to pin this commit, give "
            f"--data.path {name}@{commit[1]}"
        )
    check_shards(shards)
    if is_local:
        _check_folder_names(shards, Path(name), stored)
    if shards and all(shard.endswith(".parquet") for shard in shards):
        return ParquetSource(shards, entry, Path(name) if is_local else None)
    try:
        stream = builder.as_streaming_dataset(split=stored)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data.path: {name!r} cannot be streamed ({first_line(error)}); check its files and "
            "the network, or give a local folder"
        ) from error
    key = [name, revision, stored, shards, getattr(files.get(stored), "origin_metadata", None)]
    return StreamedSource(stream, key, entry, shards)


def _check_folder_names(files: Sequence[str], folder: Path, stored: str) -> None:
    """Check that ``datasets`` has not put files of another split into this one.

    By its rules, ``train_extra/`` and ``train_extra.tar`` belong to ``train`` if there is also
    ``train/`` or ``train.tar``.

    Args:
        files: Files that ``datasets`` assigns to the split.
        folder: Folder of the data set.
        stored: Name of the split as stored.

    Raises:
        UserError: It has, and the folder's README.md does not list the files of each split.
    """
    readme = folder / "README.md"
    if readme.is_file() and "data_files" in readme.read_text(encoding="utf-8", errors="replace"):
        return
    names = "|".join(map(re.escape, SPLIT_NAMES.get(stored, [stored])))
    exact = re.compile(rf"(?:{names})(?:[-._ ]?\d.*)?(?:\..*)?")
    parts = {file: Path(os.path.relpath(file, folder)).parts for file in files}
    others = [file for file in files if not any(map(exact.fullmatch, parts[file]))]
    if others and len(others) < len(files):
        ours = next(file for file in files if file not in others)
        raise UserError(
            f"data.path: {'/'.join(parts[others[0]])!r} would be read as split {stored!r} as well "
            f"as {'/'.join(parts[ours])!r}; move one of them to a folder of its own, or list the "
            "files of each split under data_files in the folder's README.md"
        )
