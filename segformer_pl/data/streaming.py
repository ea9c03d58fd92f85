"""From Parquet shards to samples: who reads what, and in which order.

Ranks and workers share the work through ``split_dataset_by_node`` and the worker split of
``datasets``; what they share are row groups, so that a few large files are enough for many
readers. Only the rows a reader keeps are decoded.

Training is endless and counted in steps: pass after pass over the data, each in an order drawn
from ``(seed, pass)``. Shards are permuted, and rows inside blocks of :data:`SHUFFLE_BLOCK`; a block
is permuted as a whole, so that, unlike with a shuffle buffer, no row waits longer than its block.
Exact resume is not there yet: a resumed run draws new orders rather than repeat old ones.
"""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image, UnidentifiedImageError
from torchvision import tv_tensors

from segformer_pl.data.catalog import DatasetEntry
from segformer_pl.data.labels import DataError

Split = Literal["train", "validation", "test"]

SHUFFLE_BLOCK = 512  # encoded rows held in memory by each worker


def find_shards(folder: Path, split: Split) -> list[str]:
    """The Parquet files ``<split>*.parquet`` of a folder, or of its ``data`` folder, by name.

    Raises:
        DataError: the folder does not exist or holds no such file.
    """
    if not folder.is_dir():
        raise DataError(
            f"data.path: there is no folder {str(folder)!r}; give the folder that holds the "
            "Parquet shards"
        )
    shards = sorted(folder.glob(f"{split}*.parquet")) or sorted(
        folder.glob(f"data/{split}*.parquet")
    )
    if not shards:
        raise DataError(
            f"data.path: {str(folder)!r} holds no {split}*.parquet; give a folder with Parquet "
            f"shards named {split}-00000-of-00001.parquet and so on"
        )
    return [str(shard) for shard in shards]


def open_split(entry: DatasetEntry, folder: Path, split: Split) -> datasets.IterableDataset:
    """Stream one split with its images still encoded, one shard per Parquet row group.

    Raises:
        DataError: no such split, an unreadable shard, no row, or a column of the catalogue's
            entry is missing.
    """
    shards = find_shards(folder, split)
    if sum(map(_num_rows, shards)) == 0:
        raise DataError(
            f"data.path: the {split} shards in {str(folder)!r} hold no row; give a folder with data"
        )
    stream = datasets.load_dataset(
        "parquet", data_files={split: shards}, split=split, streaming=True
    )
    columns = list(stream.features or ())
    for column in (entry.image_column, entry.label_column, entry.id_column):
        if column not in columns:
            raise DataError(
                f"data.path: the {split} shards in {str(folder)!r} have no column {column!r}, "
                f"which data set {entry.name!r} needs; they have: {', '.join(columns)}"
            )
    return stream.decode(False).reshard()


def _num_rows(shard: str) -> int:
    try:
        return pq.read_metadata(shard).num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"data.path: {shard!r} is not a complete Parquet file; fetch or write it again"
        ) from error


class SampleStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """One pass over a rank's and worker's part of a split, in stored order, each row once.

    Args:
        entry: The data set.
        stream: Encoded rows, from :func:`open_split`.
        transforms: Joint transforms, see :mod:`segformer_pl.data.transforms`.
        rank: This process.
        world_size: Number of processes.

    Yields:
        ``{"image": (3, H, W) float, "label": (H, W) int64 train ids, "id": str}``.

    Raises:
        DataError: a row without image or label, an undecodable one, or a label value outside the
            spec.
    """

    def __init__(
        self,
        entry: DatasetEntry,
        stream: datasets.IterableDataset,
        transforms: Callable[[dict[str, Any]], dict[str, Any]],
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__()
        self.entry = entry
        self.stream = stream
        self.transforms = transforms
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from map(self.load, self.rows(self.stream))

    def rows(self, stream: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
        """The encoded rows that belong to this rank and worker."""
        yield from split_dataset_by_node(stream, rank=self.rank, world_size=self.world_size)

    def load(self, row: dict[str, Any]) -> dict[str, Any]:
        """Decode, map labels to train ids, transform."""
        entry = self.entry
        where = f"data set {entry.name!r}, sample {row[entry.id_column]!r}"
        if row[entry.id_column] is None:
            raise DataError(f"{where}: the row has no {entry.id_column!r}; give every row one")
        image = _decode(row[entry.image_column], f"{where}, column {entry.image_column!r}")
        label = _decode(row[entry.label_column], f"{where}, column {entry.label_column!r}")
        train_ids = entry.labels.to_train_ids(np.asarray(label), where)
        if label.size != image.size:
            raise DataError(
                f"{where}: the label is {label.height}x{label.width} but the image is "
                f"{image.height}x{image.width} (height x width); store them at one size"
            )
        if image.mode.startswith(("I", "F")):  # converting would clip them to white
            raise DataError(
                f"{where}: the image has more than 8 bits per channel (mode {image.mode}); store "
                "it with 8"
            )
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        sample = self.transforms(
            {
                "image": tv_tensors.Image(pixels),
                "label": tv_tensors.Mask(torch.from_numpy(train_ids)),
                "id": row[entry.id_column],
            }
        )
        return sample | {
            "image": sample["image"].as_subclass(torch.Tensor),
            "label": sample["label"].as_subclass(torch.Tensor),
        }


class TrainingStream(SampleStream):
    """Endless shuffled passes, see the module's docstring.

    Args:
        seed: Of the order.
        first_pass: Number of the first pass; a resumed run starts at one not used before.
    """

    def __init__(self, *args: Any, seed: int, first_pass: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed
        self.first_pass = first_pass

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = self.first_pass
        while True:
            # A buffer of one row permutes the shards only: the library loses the content of a
            # real buffer at every stop.
            order = self.stream.shuffle(
                seed=[self.seed, number], buffer_size=1, max_buffer_input_shards=1
            )
            worker = torch.utils.data.get_worker_info()
            rng = np.random.default_rng([self.seed, number, self.rank, worker.id if worker else 0])
            empty = True
            block: list[dict[str, Any]] = []
            for row in self.rows(order):
                empty = False
                block.append(row)
                if len(block) == SHUFFLE_BLOCK:
                    yield from self.load_shuffled(block, rng)
                    block = []
            yield from self.load_shuffled(block, rng)
            if empty:  # more workers than row groups: this one has nothing to do
                return
            number += 1

    def load_shuffled(
        self, block: list[dict[str, Any]], rng: np.random.Generator
    ) -> Iterator[dict[str, Any]]:
        for index in rng.permutation(len(block)):
            yield self.load(block[index])


def _decode(cell: dict[str, Any] | bytes | None, where: str) -> Image.Image:
    encoded = cell.get("bytes") if isinstance(cell, dict) else cell
    if not encoded:
        raise DataError(
            f"{where}: the row holds no picture; remove the row from the shards or fill it in"
        )
    try:
        image = Image.open(BytesIO(encoded))
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # PIL's for a broken PNG
        raise DataError(
            f"{where}: the {len(encoded)} bytes are no picture, or a damaged one; replace them"
        ) from error
    return image
