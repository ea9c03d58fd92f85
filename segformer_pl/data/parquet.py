"""The source that reads row groups of Parquet files, on disk or behind a URL."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from segformer_pl.data.catalog import DatasetEntry
from segformer_pl.data.files import UnreadableRows, file_below, file_name, file_size, read_file
from segformer_pl.data.index import cached, fingerprint
from segformer_pl.data.remote import file_versions, is_remote, open_remote, read_with_retries
from segformer_pl.errors import UserError

T = TypeVar("T")


class ParquetSource:
    """Row groups of Parquet files; implements :class:`~segformer_pl.data.sources.Source`.

    Args:
        files: Paths or URLs that ``fsspec`` can open, in order.
        entry: Catalogue entry with the names of the columns to read.
        folder: Folder of the image files that cells may name; default: the folders of the shards.

    Raises:
        UserError: A shard is missing, damaged, or lacks a column of the entry.
    """

    def __init__(
        self, files: Sequence[str], entry: DatasetEntry, folder: Path | None = None
    ) -> None:
        self.files = list(files)
        self.remarks: list[tuple[str, str]] = []
        local = [Path(_local_path(file)) for file in self.files if not is_remote(file)]
        self.folders = [folder] if folder else list(dict.fromkeys(file.parent for file in local))
        columns = (entry.image_column, entry.label_column, entry.id_column)
        self._wanted = [column for column in columns if column is not None]
        remote = [file for file in self.files if is_remote(file)]
        # 2 is the version of the cached format.
        if remote:
            index = cached([2, file_versions(remote)], self._read_footers)
        else:
            index = self._read_footers()
        footers = index["files"]
        for file, footer in zip(self.files, footers):
            _check_columns(footer["columns"], file, entry)
        names = [name for name, *_ in footers[0]["columns"]] if footers else []
        self.columns: list[str] | None = names
        # Of each row group: index of its file, index in the file, and index of its first row there.
        self._groups: list[tuple[int, int, int]] = []
        self.group_rows: list[int] = []
        self.group_bytes: list[int] = []
        for number, footer in enumerate(footers):
            first = 0
            for group, (num_rows, num_bytes) in enumerate(footer["groups"]):
                self._groups.append((number, group, first))
                self.group_rows.append(num_rows)
                self.group_bytes.append(num_bytes)
                first += num_rows
        self._names = _short_names(self.files)
        self.fingerprint = fingerprint(
            [[file.rsplit("/", 1)[-1] for file in self.files], [f["groups"] for f in footers]],
            [[file_name(file), f["digest"], f["groups"]] for file, f in zip(self.files, footers)],
        )

    def _read_footers(self) -> dict[str, Any]:
        hidden = not self.files or not is_remote(self.files[0])
        files = tqdm(self.files, "reading footers", leave=False, disable=hidden)
        footers = [_read_or_raise(lambda file=file: _footer(file), file) for file in files]  # type: ignore[misc]
        return {"files": footers}

    def read(self, group: int) -> Sequence[Mapping[str, Any]]:
        """Return the rows of a row group; images stay encoded.

        Raises:
            UserError: The file was replaced, or cannot be read.
            UnreadableRows: The row group is damaged.
        """
        number, index, _ = self._groups[group]
        file = self.files[number]

        def read() -> Any:
            try:
                parquet = _open_cached(file)
                if index >= parquet.num_row_groups:
                    return None
                return parquet.read_row_group(index, self._wanted, use_threads=False)
            except Exception:
                _open_cached.cache_clear()
                raise

        table = _read_or_raise(read, file, f" (row group {index})")
        if table is None or table.num_rows != self.group_rows[group]:
            raise UserError(
                f"{file!r} has other row groups than when they were counted, so it was replaced "
                "during the run; start the run again"
            )
        return _TableRows(table)

    def read_file(self, path: str) -> bytes:
        """Return the content of a file that a cell names instead of holding its bytes.

        Raises:
            UserError: The file lies outside the data set's folders, or cannot be read.
        """
        return read_file(file_below(path, self.folders))

    def name(self, group: int, row: int) -> str:
        """Return ``shard:row``, with the index of the row in its shard."""
        number, _, first = self._groups[group]
        return f"{self._names[number]}:{first + row}"


class _TableRows(Sequence[Mapping[str, Any]]):
    """Rows of an Arrow table; a row becomes Python objects when it is accessed."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: Any) -> Any:
        return {name: self.table[name][row].as_py() for name in self.table.column_names}


def _short_names(files: Sequence[str]) -> list[str]:
    """Return the file names without suffix, each with the folders that make it unique."""
    paths = [PurePosixPath(file.split("?")[0] if "://" in file else file) for file in files]
    names = [path.stem for path in paths]
    depth = 1
    while len(set(names)) < len(set(paths)):
        depth += 1
        repeated = {name for name, count in Counter(names).items() if count > 1}
        names = [
            "/".join((*path.parts[-depth:-1], path.stem)) if name in repeated else name
            for name, path in zip(names, paths)
        ]
        if depth > max(len(path.parts) for path in paths):  # a.parquet and a.pq in a folder
            return [str(path) for path in paths]
    return names


def _check_columns(columns: list[Any], file: str, entry: DatasetEntry) -> None:
    """Raise unless a file has the columns of an entry and can hold images in two of them."""
    types = {name: (kind, fits) for name, kind, fits in columns}
    for column in filter(None, (entry.image_column, entry.label_column, entry.id_column)):
        if column not in types:
            raise UserError(
                f"data.path: {file!r} has no column {column!r}, which data set {entry.name!r} "
                f"needs; it has: {', '.join(types)}"
            )
    for column in (entry.image_column, entry.label_column):
        kind, fits = types[column]
        if not fits:
            raise UserError(
                f"data.path: column {column!r} of {file!r} holds {kind}, and data set "
                f"{entry.name!r} needs encoded images there: binary, or a struct with bytes"
            )


def _may_hold_images(kind: pa.DataType) -> bool:
    """Return whether a column type can hold encoded images: binary, or a struct with them."""
    if pa.types.is_dictionary(kind):
        return _may_hold_images(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _may_hold_images(kind.storage_type)
    if pa.types.is_struct(kind):
        return bool({field.name for field in kind} & {"bytes", "path"})
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_null(kind)  # a shard in which every value is null
    )


def _footer(file: str) -> dict[str, Any]:
    """Return columns, row groups (rows, bytes) and SHA-256 of a file's footer."""
    with _handle(file) as handle:
        parquet = _opened(handle, file)
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        schema = parquet.schema_arrow
        # A Parquet file ends with: footer | length of the footer (4 bytes) | "PAR1".
        size = handle.seek(0, os.SEEK_END)
        handle.seek(size - 8)
        length = int.from_bytes(handle.read(4), "little")
        handle.seek(size - 8 - length)
        return {
            "columns": [[f.name, str(f.type), _may_hold_images(f.type)] for f in schema],
            "groups": [[group.num_rows, group.total_byte_size] for group in groups],
            "digest": hashlib.sha256(handle.read(length)).hexdigest(),
        }


def _handle(file: str) -> Any:
    if is_remote(file):
        return open_remote(file)
    path = _local_path(file)
    file_size(Path(path))  # raises for a pipe, which would block
    return pa.OSFile(path, "rb")


def _local_path(file: str) -> str:
    return LocalFileSystem._strip_protocol(file) if "://" in file else file


def _open(file: str) -> pq.ParquetFile:
    return _opened(_handle(file), file)


def _opened(handle: Any, file: str) -> pq.ParquetFile:
    """Open a Parquet file; raise a clear error if the server sent a web page instead."""
    try:
        return pq.ParquetFile(handle, pre_buffer=True)
    except pa.ArrowException as error:
        if is_remote(file):
            handle.seek(0)
            begin = handle.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
            # Cut, empty or zeroed content may come from a faulty proxy and is retried. Text is a
            # login or error page, which would come again.
            if begin and not begin.startswith(b"PAR1") and begin.isascii() and begin[0] >= 0x20:
                shown = begin.decode().splitlines()[0][:40]
                raise UserError(
                    f"{file} is no Parquet file, it begins with {shown!r}; if the server asks for "
                    "a login, download the shards and give their folder, else correct the address"
                ) from error
        raise


# Open files of this process. A few are enough, because a lane reads a shard from start to end.
_open_cached = lru_cache(maxsize=16)(_open)
_caches_of_parents: list[Any] = []


def _reopen_after_fork() -> None:
    """Start with no open files in a forked process.

    A file that was opened before the fork has one position for both processes. The parent's objects
    are kept but never used, because closing a copy of them would close the parent's connections.
    """
    global _open_cached
    _caches_of_parents.append(_open_cached)
    _open_cached = lru_cache(maxsize=16)(_open)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reopen_after_fork)


def _read_or_raise(read: Callable[[], T], file: str, part: str = "") -> T:
    """Call a function that reads from a file, with retries if the file is remote.

    Args:
        read: Function to call.
        file: Path or URL, for messages.
        part: Which part of the file is read, for messages.

    Raises:
        UserError: The file cannot be read.
        UnreadableRows: The content of a local file is damaged.
    """
    if is_remote(file):
        return read_with_retries(read, file)
    try:
        return read()
    except UserError as error:
        raise UserError(f"data.path: {error}") from error
    except Exception as error:
        # An errno is an error of the file system. Without one, the content is damaged.
        if isinstance(error, OSError) and error.errno:
            raise UserError(
                f"data.path: {file!r} cannot be read ({error.strerror}); check its access rights"
            ) from error
        raise UnreadableRows(
            f"data.path: {file!r} is not a complete Parquet file{part}; fetch or write it again"
        ) from error
