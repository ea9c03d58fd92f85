"""Where the rows of a split are stored, and how many: the row groups that everything is read in.

A source knows, before anything is read, how many rows each of its row groups has. Parquet says so
in its footers (on this machine, on the hub or behind a URL), a folder of pictures by its listing.
For anything else that ``datasets`` can stream, the stream is read through once and its places are
kept in the user's cache folder.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import datasets
import fsspec
import huggingface_hub
import platformdirs
import pyarrow.parquet as pq
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm import tqdm

from segformer_pl.data.catalog import DatasetEntry
from segformer_pl.data.labels import DataError
from segformer_pl.data.remote import first_line, is_remote, marks, options, patiently

Split = Literal["train", "validation", "test"]
Row = Mapping[str, Any]
T = TypeVar("T")

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
STREAM_GROUP = 64  # rows that are read together from a source that has no row groups


class Source(Protocol):
    """Rows of one split, in row groups.

    Attributes:
        group_rows: Rows of each row group.
        group_bytes: Size of each row group in bytes, 0 where it is small or unknown.
        columns: Names of the columns; None if rows are only known once they are read.
        fingerprint: Tells two data sets apart; independent of where they are stored.
    """

    group_rows: list[int]
    group_bytes: list[int]
    columns: list[str] | None
    fingerprint: str

    def read(self, group: int) -> Sequence[Row]:
        """The rows of a row group, pictures still encoded."""

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
        DataError: there is no such place or split, a shard is damaged, there is no row, or a
            column of the entry is missing.
    """
    source = _find(entry, path, split)
    if not sum(source.group_rows):
        raise DataError(
            f"data.path: the {split} shards of {_where(entry, path)} hold no row; give a place "
            "with data"
        )
    columns = source.columns
    wanted = [entry.image_column, entry.label_column, entry.id_column]
    for column in filter(None, wanted):
        if columns is not None and column not in columns:
            raise DataError(
                f"data.path: the {split} shards of {_where(entry, path)} have no column "
                f"{column!r}, which data set {entry.name!r} needs; they have: {', '.join(columns)}"
            )
    return source


def _where(entry: DatasetEntry, path: Any) -> str:
    return repr(entry.hub if path is None else path)


def _find(entry: DatasetEntry, path: Any, split: Split) -> Source:
    stored = entry.splits.get(split, split)
    if isinstance(path, Mapping):
        if split not in path:
            raise DataError(
                f"data.path: it names no files for the {split} split, only for "
                f"{', '.join(path)}; add them"
            )
        return ParquetSource(list(path[split]), entry)
    if path is None and entry.hub is None:
        raise DataError(
            f"data.path: data set {entry.name!r} is read from a place of yours; give --data.path "
            "with a folder, a hub name or a URL pattern of its Parquet shards"
        )
    if path is not None and "{split}" in path:
        pattern = path.replace("{split}", stored)
        if "*" not in pattern:
            return ParquetSource([pattern], entry)
        files = patiently(lambda: _glob(pattern), pattern)
        if not files:
            raise DataError(f"data.path: no file matches {pattern!r}; correct the pattern")
        return ParquetSource(files, entry)
    if path is not None and Path(path).is_dir():
        folder = Path(path)
        shards = sorted(folder.glob(f"{stored}*.parquet")) or sorted(
            folder.glob(f"data/{stored}*.parquet")
        )
        if shards:
            return ParquetSource([str(shard) for shard in shards], entry)
        if (folder / "images").is_dir():
            return PictureFolder(folder, stored, entry)
        if any(folder.rglob("*.parquet")) or not any(folder.iterdir()):
            raise DataError(
                f"data.path: {path!r} holds no {stored}*.parquet; give a folder with Parquet "
                f"shards named {stored}-00000-of-00001.parquet and so on, or with pictures in "
                f"images/{stored} and labels/{stored}"
            )
    return _from_library(entry, path, split, stored)


def _glob(pattern: str) -> list[str]:
    fs, _, _ = fsspec.get_fs_token_paths(pattern, storage_options=options(pattern), expand=False)
    return sorted(fs.unstrip_protocol(path) for path in fs.glob(pattern))


def _from_library(entry: DatasetEntry, path: str | None, split: Split, stored: str) -> Source:
    """A hub data set, or a local one in a format of the library's."""
    name, _, revision = (path or f"{entry.hub}@{entry.revision or ''}").partition("@")
    if not Path(name).is_dir():
        try:
            huggingface_hub.utils.validate_repo_id(name)
        except huggingface_hub.errors.HFValidationError:
            name = ""
        if name.count("/") != 1 or name.startswith((".", "~")):
            raise DataError(
                f"data.path: there is no folder {path!r}; give the folder that holds the Parquet "
                "shards, a hub name owner/name, or a pattern with {split} of files or URLs"
            )
    try:
        builder = datasets.load_dataset_builder(
            name, entry.config if path is None else None, revision=revision or None
        )
        files = dict(builder.config.data_files or {})
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data.path: {name!r} cannot be opened as a data set ({first_line(error)}); check "
            "the name and the network, or give a local folder"
        ) from error
    if files and stored not in files:
        raise DataError(
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
    if shards and all(shard.endswith(".parquet") for shard in shards):
        return ParquetSource(shards, entry)
    stream = builder.as_streaming_dataset(split=stored)
    key = [name, revision, stored, shards, getattr(files.get(stored), "origin_metadata", None)]
    return StreamedSource(stream, key, entry)


class ParquetSource:
    """Row groups of Parquet files, wherever ``fsspec`` can open them.

    Args:
        files: Paths or URLs, in order.
        entry: The data set, for the columns to read.
    """

    def __init__(self, files: Sequence[str], entry: DatasetEntry) -> None:
        self.files = list(files)
        columns = (entry.image_column, entry.label_column, entry.id_column)
        self._wanted = [column for column in columns if column is not None]
        remote = [file for file in self.files if is_remote(file)]
        index = _cached(marks(remote), self._read_footers) if remote else self._read_footers()
        self.columns = index["columns"]
        self._groups: list[tuple[int, int, int]] = []  # file, row group in it, its first row
        self.group_rows: list[int] = []
        self.group_bytes: list[int] = []
        for number, groups in enumerate(index["files"]):
            first = 0
            for group, (num_rows, num_bytes) in enumerate(groups):
                self._groups.append((number, group, first))
                self.group_rows.append(num_rows)
                self.group_bytes.append(num_bytes)
                first += num_rows
        names = [file.rsplit("/", 1)[-1] for file in self.files]
        self.fingerprint = _digest([names, index["files"]])

    def _read_footers(self) -> dict[str, Any]:
        columns: list[str] = []
        files = []
        for file in tqdm(
            self.files, "reading footers", leave=False, disable=not is_remote(self.files[0])
        ):
            with _opened(file) as parquet:
                groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
                files.append([[group.num_rows, group.total_byte_size] for group in groups])
                columns = parquet.schema_arrow.names
        return {"columns": columns, "files": files}

    def read(self, group: int) -> Sequence[Row]:
        number, index, _ = self._groups[group]
        file = self.files[number]

        def read() -> Sequence[Row]:
            try:
                table = _kept_open(file).read_row_group(index, self._wanted, use_threads=False)
            except Exception:
                _kept_open.cache_clear()
                raise
            return _TableRows(table)

        return patiently(read, file) if is_remote(file) else _or_damaged(read, file)

    def name(self, group: int, row: int) -> str:
        number, _, first = self._groups[group]
        return f"{Path(self.files[number]).stem}:{first + row}"


class PictureFolder:
    """Pictures ``images/<split>/<name>.jpg`` with labels ``labels/<split>/<name>.png``.

    Every pair is a row group of its own. A name may lie in sub-folders, the same for both; the
    image may have any of the usual suffixes.
    """

    columns: list[str] | None = None

    def __init__(self, folder: Path, split: str, entry: DatasetEntry) -> None:
        images, labels = folder / "images" / split, folder / "labels" / split
        self.entry = entry
        self._pairs: list[tuple[Path, Path, str]] = []
        for image in sorted(images.rglob("*")):
            if image.suffix.lower() in PICTURES:
                name = image.relative_to(images).with_suffix("")
                self._pairs.append((image, labels / name.with_suffix(".png"), str(name)))
        if not self._pairs:
            raise DataError(
                f"data.path: there is no picture in {str(images)!r}; give a folder with pictures "
                f"in images/{split} and labels of the same names, .png, in labels/{split}"
            )
        unlabelled = [image for image, label, _ in self._pairs if not label.is_file()]
        if unlabelled:
            raise DataError(
                f"data.path: {len(unlabelled)} of {len(self._pairs)} pictures in {str(images)!r} "
                f"have no label in {str(labels)!r}, the first is {unlabelled[0].name!r}; add "
                "them, or take the pictures away"
            )
        self.group_rows = [1] * len(self._pairs)
        self.group_bytes = [0] * len(self._pairs)
        sizes = [[name, image.stat().st_size] for image, _, name in self._pairs]
        self.fingerprint = _digest(sizes)

    def read(self, group: int) -> Sequence[Row]:
        image, label, name = self._pairs[group]
        row = {
            self.entry.image_column: image.read_bytes(),
            self.entry.label_column: label.read_bytes(),
        }
        return [row if self.entry.id_column is None else row | {self.entry.id_column: name}]

    def name(self, group: int, row: int) -> str:
        return self._pairs[group][2]


class StreamedSource:
    """Any stream of ``datasets``, read through once to learn its length and its places.

    Going to a place means what it means for the format: a seek, or reading from the beginning of
    a shard.

    Args:
        stream: The stream.
        key: What identifies it, for the cache.
        entry: The data set, for the columns to keep.
    """

    def __init__(self, stream: datasets.IterableDataset, key: Any, entry: DatasetEntry) -> None:
        self.stream = stream.decode(False)
        self.columns = list(stream.features) if stream.features else None
        wanted = (entry.image_column, entry.label_column, entry.id_column)
        self._wanted = [column for column in wanted if column is not None]
        index = _cached(key, lambda: self._read_through(entry.name))
        self.group_rows, self._states = index["rows"], index["states"]
        self.group_bytes = index["bytes"]
        self.fingerprint = _digest([key, self.group_rows])

    def _read_through(self, name: str) -> dict[str, Any]:
        rank_zero_info(
            f"data set {name!r} is stored in a format that does not say how many rows it has: it "
            "is read through once to count them; convert it to Parquet to spare this"
        )
        index: dict[str, Any] = {"rows": [], "bytes": [], "states": []}
        rows = iter(tqdm(self.stream, "counting", unit=" rows", leave=False))
        while True:
            state = self.stream.state_dict()
            group = list(islice(rows, STREAM_GROUP))
            if not group:
                return index
            index["states"].append(state)
            index["rows"].append(len(group))
            index["bytes"].append(
                sum(len(cell["bytes"]) for row in group for cell in _pictures(row))
            )

    def read(self, group: int) -> Sequence[Row]:
        def read() -> Sequence[Row]:
            self.stream.load_state_dict(json.loads(json.dumps(self._states[group])))
            rows = list(islice(self.stream, self.group_rows[group]))
            if len(rows) < self.group_rows[group]:
                raise EOFError("the stream ended early")
            return [{column: row.get(column) for column in self._wanted} for row in rows]

        return patiently(read, f"row group {group} of the stream")

    def name(self, group: int, row: int) -> str:
        return f"{group * STREAM_GROUP + row}"


def _pictures(row: Row) -> Iterator[dict[str, Any]]:
    return (cell for cell in row.values() if isinstance(cell, dict) and cell.get("bytes"))


class _TableRows(Sequence[Row]):
    """Rows of an Arrow table; a row is copied out when it is asked for."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: Any) -> Any:
        return {name: self.table[name][row].as_py() for name in self.table.column_names}


def _parquet_file(file: str) -> pq.ParquetFile:
    return pq.ParquetFile(fsspec.open(file, "rb", **options(file)).open(), pre_buffer=True)


def _opened(file: str) -> pq.ParquetFile:
    if is_remote(file):
        return patiently(lambda: _parquet_file(file), file)
    return _or_damaged(lambda: _parquet_file(file), file)


# Of a process: workers open their own. A few, because a lane reads its shard group after group.
_kept_open = lru_cache(maxsize=16)(_parquet_file)


def _or_damaged(read: Callable[[], T], file: str) -> T:
    try:
        return read()
    except FileNotFoundError as error:
        raise DataError(f"data.path: there is no file {file!r}; correct the path") from error
    except Exception as error:
        raise DataError(
            f"data.path: {file!r} is not a complete Parquet file; fetch or write it again"
        ) from error


def _cached(key: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was computed for this key before, on this machine."""
    folder = Path(platformdirs.user_cache_dir("segformer_pl")) / "indices"
    file = folder / f"{_digest(key)}.json"
    if file.is_file():
        return json.loads(file.read_text())
    value = compute()
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{_digest([str(id(value))])[:8]}.partial")
    partial.write_text(json.dumps(value))
    partial.replace(file)
    return value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]
