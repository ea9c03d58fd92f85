"""Row groups of Parquet files, on disk or behind a URL."""

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
from segformer_pl.data.remote import is_remote, marks, open_remote, patiently
from segformer_pl.errors import UserError

T = TypeVar("T")


class ParquetSource:
    """Row groups of Parquet files, wherever ``fsspec`` can open them.

    Args:
        files: Paths or URLs, in order.
        entry: The data set, for the columns to read.
        folder: Where the files are that cells may name; the shards' own folders by default.

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
        # The number is of the form of what is cached.
        index = cached([2, marks(remote)], self._read_footers) if remote else self._read_footers()
        footers = index["files"]
        for file, footer in zip(self.files, footers):
            _check_columns(footer["columns"], file, entry)
        names = [name for name, *_ in footers[0]["columns"]] if footers else []
        self.columns: list[str] | None = names
        self._groups: list[tuple[int, int, int]] = []  # file, row group in it, its first row
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
        return {"files": [_retried(lambda file=file: _footer(file), file) for file in files]}  # type: ignore[misc]

    def read(self, group: int) -> Sequence[Mapping[str, Any]]:
        number, index, _ = self._groups[group]
        file = self.files[number]

        def read() -> Any:
            try:
                parquet = _kept_open(file)
                if index >= parquet.num_row_groups:
                    return None
                return parquet.read_row_group(index, self._wanted, use_threads=False)
            except Exception:
                _kept_open.cache_clear()
                raise

        table = _retried(read, file, f" (row group {index})")
        if table is None or table.num_rows != self.group_rows[group]:
            raise UserError(
                f"{file!r} has other row groups than when they were counted; it was replaced "
                "meanwhile: start again"
            )
        return _TableRows(table)

    def read_file(self, path: str) -> bytes:
        return read_file(file_below(path, self.folders))

    def name(self, group: int, row: int) -> str:
        number, _, first = self._groups[group]
        return f"{self._names[number]}:{first + row}"


class _TableRows(Sequence[Mapping[str, Any]]):
    """Rows of an Arrow table; a row is copied out when it is asked for."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: Any) -> Any:
        return {name: self.table[name][row].as_py() for name in self.table.column_names}


def _short_names(files: Sequence[str]) -> list[str]:
    """Names of shards without suffix, with as many folders as it takes to tell them apart."""
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
        if depth > max(len(path.parts) for path in paths):  # a.parquet and a.pq in one folder
            return [str(path) for path in paths]
    return names


def _check_columns(columns: list[Any], file: str, entry: DatasetEntry) -> None:
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
        or pa.types.is_null(kind)  # a shard of which every row lacks it
    )


def _footer(file: str) -> dict[str, Any]:
    with _handle(file) as handle:
        parquet = _opened(handle, file)
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        schema = parquet.schema_arrow
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
    file_size(Path(path))  # a pipe would block
    return pa.OSFile(path, "rb")


def _local_path(file: str) -> str:
    return LocalFileSystem._strip_protocol(file) if "://" in file else file


def _open(file: str) -> pq.ParquetFile:
    return _opened(_handle(file), file)


def _opened(handle: Any, file: str) -> pq.ParquetFile:
    """A Parquet file; of a remote one, whether it is a web page."""
    try:
        return pq.ParquetFile(handle, pre_buffer=True)
    except pa.ArrowException as error:
        if is_remote(file):
            handle.seek(0)
            begin = handle.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
            # A proxy that is at fault may cut content or leave it empty; a page stays a page.
            if begin and not begin.startswith(b"PAR1") and begin.isascii() and begin[0] >= 0x20:
                shown = begin.decode().splitlines()[0][:40]
                raise UserError(
                    f"{file} is no Parquet file, it begins with {shown!r}; if the server asks for "
                    "a login, download the shards and give their folder, else correct the address"
                ) from error
        raise


# Of a process. A few, because a lane reads its shard group after group.
_kept_open = lru_cache(maxsize=16)(_open)
_of_the_parent: list[Any] = []


def _begin_anew() -> None:
    """In a forked process: open files anew, for an open file has one position for both processes.

    The parent's objects are kept, never used: to close them here would close its connections.
    """
    global _kept_open
    _of_the_parent.append(_kept_open)
    _kept_open = lru_cache(maxsize=16)(_open)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def _retried(read: Callable[[], T], file: str, part: str = "") -> T:
    """Read from a file, again and again if it is remote."""
    if is_remote(file):
        return patiently(read, file)
    try:
        return read()
    except UserError as error:
        raise UserError(f"data.path: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # of the system, not about the content
            raise UserError(f"data.path: {file!r} cannot be read ({error.strerror})") from error
        raise UnreadableRows(
            f"data.path: {file!r} is not a complete Parquet file{part}; fetch or write it again"
        ) from error
