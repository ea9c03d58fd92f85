"""The pipelines that ``litdata_resume.py`` compares, and how their ranks read.

A module of its own, because litdata's workers import it.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader

from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.decoding import EncodedImage, decode_label
from segformer_pl.data.transforms import TrainTransforms

OURS, LITDATA = "segformer_pl", "litdata"
WHOLE, PARALLEL, CHUNKS = "litdata, drop_last=False", "litdata, parallel", "litdata, chunks"
ROW_GROUP, SHARDS = 16, 4
SCALES = (0.5, 2.0)
SEED = 0


class Split(NamedTuple):
    """How an attempt splits the samples."""

    ranks: int
    workers: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.ranks} x {self.workers} (batch {self.batch_size})"


class Data(NamedTuple):
    """Parquet shards in a folder, and how they are augmented."""

    name: str
    dataset: str
    folder: Path
    num_rows: int
    crop_size: tuple[int, int]


def write_parquet(folder: Path, table: pa.Table) -> None:
    folder.mkdir()
    bounds = [len(table) * shard // SHARDS for shard in range(SHARDS + 1)]
    for shard, (begin, end) in enumerate(pairwise(bounds)):
        file = folder / f"train-{shard:05d}-of-{SHARDS:05d}.parquet"
        pq.write_table(table.slice(begin, end - begin), file, row_group_size=ROW_GROUP)


def rows_of(file: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard for ``optimize``, one at a time, with plain bytes."""
    for batch in pq.ParquetFile(file).iter_batches(ROW_GROUP):
        for row in batch.to_pylist():
            yield {
                "image": row["image"]["bytes"],
                "label": row["label"]["bytes"],
                "id": row["id"],
            }


def chunks_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}_chunks")


def index_for_litdata(folder: Path) -> None:
    from litdata import index_parquet_dataset

    index_parquet_dataset(str(folder))


def optimize_for_litdata(folder: Path) -> None:
    from litdata import optimize

    files = [str(file) for file in sorted(folder.glob("*.parquet"))]
    optimize(rows_of, files, str(chunks_of(folder)), chunk_bytes="64MB", num_workers=1)


class Augment:
    """Transform of a row for litdata: the functions that segformer_pl itself uses."""

    def __init__(self, data: Data) -> None:
        self.labels = find_dataset(data.dataset).labels
        self.transforms = TrainTransforms(
            data.crop_size, SCALES, None, photometric=False, ignore_index=self.labels.ignore_index
        )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self.augment(row, np.random.default_rng(int(torch.randint(2**62, ()))))

    def with_generators(
        self, rows: tuple[dict[str, Any]], generators: dict[str, Any]
    ) -> dict[str, Any]:
        return self.augment(rows[0], generators["numpy"])

    def augment(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image, label = (
            row[column] if isinstance(row[column], bytes) else row[column]["bytes"]
            for column in ("image", "label")
        )
        values = decode_label(label, "", self.labels.coding).values
        train_ids = self.labels.to_train_ids(values, "")
        pixels, label = self.transforms(EncodedImage(image, ""), train_ids, rng)
        return {"image": pixels, "label": label, "id": row["id"]}


def litdata_loader(system: str, data: Data, split: Split) -> DataLoader[Any]:
    from litdata import ParallelStreamingDataset, StreamingDataLoader, StreamingDataset
    from litdata.streaming.item_loader import ParquetLoader

    augment = Augment(data)
    folder = chunks_of(data.folder) if system == CHUNKS else data.folder
    dataset: Any = StreamingDataset(
        str(folder),
        item_loader=None if system == CHUNKS else ParquetLoader(),
        shuffle=True,
        drop_last=system != WHOLE,
        seed=SEED,
        transform=None if system == PARALLEL else augment,
    )
    if system == PARALLEL:
        dataset = ParallelStreamingDataset([dataset], transform=augment.with_generators, seed=SEED)
    return StreamingDataLoader(
        dataset,
        batch_size=split.batch_size,
        num_workers=split.workers,
        multiprocessing_context=None if system == CHUNKS else "forkserver",
    )


def our_data(data: Data, split: Split) -> Any:
    from segformer_pl.data import StreamingSegmentationData

    return StreamingSegmentationData(
        data.dataset,
        data.folder,
        batch_size=split.batch_size,
        num_workers=split.workers,
        crop_size=data.crop_size,
        scale_range=SCALES,
        seed=SEED,
    )


class Log:
    """File to which a rank appends the samples of each of its batches."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.steps = 0

    def write(self, batch: dict[str, Any]) -> None:
        samples = []
        for name, image, label in zip(batch["id"], batch["image"], batch["label"]):
            digest = hashlib.blake2b(image.numpy().tobytes() + label.numpy().tobytes())
            samples.append((name, digest.hexdigest()[:16]))
        self.steps += 1
        with self.file.open("a") as file:
            file.write(json.dumps(samples) + "\n")


class Rank(NamedTuple):
    """What a rank's process needs to know."""

    rank: int
    split: Split
    steps: int | None  # when to save the state; None: read to the end
    data: Data
    epochs: int
    resume_from: Path | None
    save_to: Path
    max_steps: int  # for segformer_pl, whose data has no end
    log: Path


def read_with_litdata(system: str, rank: Rank) -> None:
    torch.manual_seed(SEED + rank.rank)
    log = Log(rank.log)
    loader: Any = litdata_loader(system, rank.data, rank.split)
    if rank.resume_from:
        loader.load_state_dict(torch.load(rank.resume_from))
    while True:
        for batch in loader:
            log.write(batch)
            if log.steps == rank.steps and rank.rank == 0:
                draft = rank.save_to.with_suffix(".draft")
                torch.save(loader.state_dict(), draft)
                draft.rename(rank.save_to)
        if loader.current_epoch >= rank.epochs:
            return


def read_with_segformer_pl(rank: Rank) -> None:
    import lightning.pytorch as pl

    class Reader(pl.LightningModule):
        """Network of one parameter, so that there are optimiser steps."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.weight * batch["image"].mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    log = Log(rank.log)

    class Record(pl.Callback):
        """Callback that logs the samples of each step and saves one checkpoint."""

        def on_train_batch_end(self, trainer: Any, module: Any, *step: Any) -> None:
            log.write(step[1])
            if log.steps == rank.steps:
                trainer.save_checkpoint(rank.save_to)

    ranks = rank.split.ranks
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_steps=rank.max_steps,
        callbacks=[Record()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    trainer.fit(Reader(), datamodule=our_data(rank.data, rank.split), ckpt_path=rank.resume_from)
