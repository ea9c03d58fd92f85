"""Any stream of ``datasets``: read through once, then read again from any of its row groups."""

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
from segformer_pl.data.remote import first_line, is_remote, patiently
from segformer_pl.errors import UserError

Row = Mapping[str, Any]

STREAM_GROUP = 64  # rows that are read together from a source that has no row groups


class StreamedSource:
    """Any stream of ``datasets``, read through once to learn its length and its places.

    Going to a place means what it means for the format: a seek, or reading from the beginning of
    a shard. A checksum of every row group shows that it leads to the rows that were counted.

    Args:
        stream: The stream.
        key: What identifies it, for the cache.
        entry: The data set, for the columns to keep.
        files: The files that it is made of: those that cells may name.

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
        self.stream = stream.decode(False)
        self.entry = entry
        self.remarks: list[tuple[str, str]] = []
        self.columns: list[str] | None = list(stream.features) if stream.features else None
        self._files = frozenset(files)
        self._is_remote = any(map(is_remote, files))
        wanted = (entry.image_column, entry.label_column, entry.id_column)
        self._wanted = [column for column in wanted if column is not None]
        # The number is of the form of what is cached.
        index = cached([2, key, self._wanted], self._read_through)
        self.group_rows, self._states = index["rows"], index["states"]
        self._checks = index["checks"]
        self.group_bytes = index["bytes"]
        self.fingerprint = fingerprint([key, self.group_rows], [self.group_rows, self._checks])

    def _read_through(self) -> dict[str, Any]:
        rank_zero_info(
            f"data set {self.entry.name!r} is stored in a format that does not say how many rows "
            "it has: it is read through once to count them; convert it to Parquet to spare this"
        )
        index: dict[str, Any] = {"rows": [], "bytes": [], "states": [], "checks": []}
        state = self.stream.state_dict()
        rows: Iterator[Row] = self._rows()

        def read() -> list[Row]:
            nonlocal rows
            try:
                return list(islice(rows, STREAM_GROUP))
            except Exception:
                self._go_to(state)
                rows = self._rows()
                raise

        with tqdm(desc="counting", unit=" rows", leave=False) as progress:
            while True:
                group = self._retried(read, f"row group {len(index['rows'])} of the stream")
                if not group:
                    return index
                index["states"].append(state)
                index["rows"].append(len(group))
                index["checks"].append(self._check(group))
                index["bytes"].append(
                    sum(len(cell["bytes"]) for row in group for cell in _pictures(row))
                )
                progress.update(len(group))
                state = self.stream.state_dict()

    def _go_to(self, state: Any) -> None:
        self.stream.load_state_dict(json.loads(json.dumps(state)))  # it changes what it is given

    def _rows(self) -> Iterator[Row]:
        # Not iter(stream): in a loader process that would read the shards of this process alone, as
        # ``datasets`` divides them, and the places of the whole stream would mean other rows.
        for batch in self.stream.iter(batch_size=1):
            yield {name: values[0] for name, values in batch.items()}

    def read(self, group: int) -> Sequence[Row]:
        where = f"row group {group} of the stream"

        def read() -> list[Row]:
            self._go_to(self._states[group])
            rows = list(islice(self._rows(), self.group_rows[group]))
            if len(rows) < self.group_rows[group]:
                raise EOFError("the stream ended early")
            return rows

        rows = self._retried(read, where)
        if self._check(rows) != self._checks[group]:
            raise UserError(
                f"data.path: {where} of data set {self.entry.name!r} holds other rows than when "
                "they were counted; the files were replaced meanwhile: start again"
            )
        return [{column: row.get(column) for column in self._wanted} for row in rows]

    def _retried(self, read: Any, where: str) -> list[Row]:
        """Over the network again and again; a fault on disk stays one."""
        where = f"{where} of data set {self.entry.name!r}"
        if self._is_remote:
            return patiently(read, where)
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
        """A checksum of rows: of encoded images, of names of files, of ids."""
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
        """A file that a cell names: one of the stream's own, or a member of an archive of them."""
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
            return patiently(read, path)
        try:
            return read()
        except Exception as error:
            raise UserError(f"{path!r} cannot be read ({first_line(error)})") from error

    def name(self, group: int, row: int) -> str:
        return f"{group * STREAM_GROUP + row}"


def _pictures(row: Row) -> Iterator[dict[str, Any]]:
    return (cell for cell in row.values() if isinstance(cell, dict) and cell.get("bytes"))
