"""The source for formats without row counts: any stream of ``datasets``, indexed in one pass."""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm import tqdm

from segformer_pl.data.catalog import DatasetEntry
from segformer_pl.data.files import UnreadableRows, read_file
from segformer_pl.data.index import cached, fingerprint
from segformer_pl.data.remote import first_line, is_remote, read_with_retries
from segformer_pl.errors import UserError

Row = Mapping[str, Any]

STREAM_GROUP = 64  # rows of a row group, for formats that have no row groups


class StreamedSource:
    """A stream of ``datasets``; implements :class:`~segformer_pl.data.sources.Source`.

    One pass counts the rows and stores the stream's state at the start of every row group. Loading
    such a state costs what it costs in the format: a seek, or reading from the start of a shard. A
    checksum of each row group verifies that it holds the rows that were counted.

    Args:
        stream: Stream of one split.
        key: JSON value that identifies the stream, for the cache.
        entry: Catalogue entry with the names of the columns to keep.
        files: Paths or URLs of the stream's files, which cells may name.

    Raises:
        UserError: The stream cannot be read.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        key: Any,
        entry: DatasetEntry,
        files: Sequence[str],
    ) -> None:
        # Formats such as CSV have no schema in advance, and then there is nothing to decode.
        self.stream = stream.decode(False) if stream.features else stream
        self.entry = entry
        self.remarks: list[tuple[str, str]] = []
        self.columns: list[str] | None = list(stream.features) if stream.features else None
        self._files = frozenset(files)
        self._is_remote = any(map(is_remote, files))
        wanted = (entry.image_column, entry.label_column, entry.id_column)
        self._wanted = [column for column in wanted if column is not None]
        # 2 is the version of the cached format.
        index = cached([2, key, self._wanted], self._read_through)
        self.group_rows, self._states = index["rows"], index["states"]
        self._checks = index["checks"]
        self.group_bytes = index["bytes"]
        self.fingerprint = fingerprint([key, self.group_rows], [self.group_rows, self._checks])

    def _read_through(self) -> dict[str, Any]:
        """Return rows, bytes, stream state and checksum of every row group."""
        rank_zero_info(
            f"data set {self.entry.name!r} is stored in a format without row counts: "
            "it is read through once to count them; convert it to Parquet to avoid this"
        )
        index: dict[str, Any] = {"rows": [], "bytes": [], "states": [], "checks": []}
        state = self.stream.state_dict()
        rows: Iterator[Row] = self._rows()

        def read() -> list[Row]:
            nonlocal rows
            try:
                return list(islice(rows, STREAM_GROUP))
            except Exception:  # a retry starts at the row group's first row
                self._load_state(state)
                rows = self._rows()
                raise

        with tqdm(desc="counting", unit=" rows", leave=False) as progress:
            while True:
                group = self._read_or_raise(read, f"row group {len(index['rows'])} of the stream")
                if not group:
                    return index
                index["states"].append(state)
                index["rows"].append(len(group))
                index["checks"].append(self._check(group))
                index["bytes"].append(
                    sum(len(cell["bytes"]) for row in group for cell in _image_cells(row))
                )
                progress.update(len(group))
                state = self.stream.state_dict()

    def _load_state(self, state: Any) -> None:
        # ``load_state_dict`` modifies its argument, so give it a copy.
        self.stream.load_state_dict(json.loads(json.dumps(state)))

    def _rows(self) -> Iterator[Row]:
        # In a worker, iter(stream) would read only the shards that ``datasets`` assigns to this
        # worker, and the states of the whole stream would lead to other rows. iter() of batches
        # always reads the whole stream.
        for batch in self.stream.iter(batch_size=1):
            yield {name: values[0] for name, values in batch.items()}

    def read(self, group: int) -> Sequence[Row]:
        """Return the rows of a row group; images stay encoded.

        Raises:
            UserError: The files were replaced, or cannot be read over the network.
            UnreadableRows: The local files of the row group cannot be read.
        """
        where = f"row group {group} of the stream"

        def read() -> list[Row]:
            self._load_state(self._states[group])
            rows = list(islice(self._rows(), self.group_rows[group]))
            if len(rows) < self.group_rows[group]:
                raise EOFError("the stream ended early")
            return rows

        rows = self._read_or_raise(read, where)
        if self._check(rows) != self._checks[group]:
            raise UserError(
                f"data.path: {where} of data set {self.entry.name!r} holds other rows than when "
                "they were counted, so the files were replaced; start the run again"
            )
        return [{column: row.get(column) for column in self._wanted} for row in rows]

    def _read_or_raise(self, read: Any, where: str) -> list[Row]:
        """Call a function that reads rows, with retries if the stream is remote."""
        where = f"{where} of data set {self.entry.name!r}"
        if self._is_remote:
            return read_with_retries(read, where)
        try:
            return read()
        except UserError:
            raise
        except Exception as error:
            raise UnreadableRows(
                f"data.path: {where} cannot be read ({first_line(error)}); fetch or write its "
                "files again"
            ) from error

    def _check(self, rows: Sequence[Row]) -> int:
        """Return a CRC-32 of rows: of their encoded images or file names, and their ids."""
        check = 0
        for row in rows:
            for column in self._wanted:
                cell = row.get(column)
                if isinstance(cell, dict):
                    path = str(cell.get("path") or "")
                    cell = cell.get("bytes") or path.split("::")[0].rsplit("/", 1)[-1]
                content = cell if isinstance(cell, bytes) else str(cell).encode()
                check = zlib.crc32(content, check)
        return check

    def read_file(self, path: str) -> bytes:
        """Return the content of a file that a cell names, which may be a member of an archive.

        Raises:
            UserError: The file is not one of the stream's, or cannot be read.
        """
        if path.split("::")[-1] not in self._files:
            raise UserError(
                f"the row names the file {path!r}, which is not one of the data set's; store the "
                "images in the shards"
            )
        if "://" not in path:
            return read_file(Path(path))

        def read() -> bytes:
            with fsspec.open(path, "rb") as file:
                return file.read()

        if self._is_remote:
            return read_with_retries(read, path)
        try:
            return read()
        except Exception as error:
            raise UserError(f"{path!r} cannot be read ({first_line(error)})") from error

    def name(self, group: int, row: int) -> str:
        """Return the index of a row in the stream."""
        return f"{group * STREAM_GROUP + row}"


def _image_cells(row: Row) -> Iterator[dict[str, Any]]:
    return (cell for cell in row.values() if isinstance(cell, dict) and cell.get("bytes"))
