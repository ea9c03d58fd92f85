"""Sources in data-loader workers, which must deliver the same samples as the main process."""

import dataclasses
import io
import multiprocessing
import subprocess
import tarfile
import time
from itertools import islice

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader

from segformer_pl.data import StreamingSegmentationData, datamodule
from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.order import StoredOrder
from segformer_pl.data.sources import ParquetSource, StreamedSource, open_split
from segformer_pl.data.streaming import RankSampler, Samples, collate
from segformer_pl.data.transforms import to_tensors
from segformer_pl.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_cache")]

ENTRY = find_dataset("shapes")
NUM_ROWS = 150


@pytest.fixture(scope="module")
def rows(row, png):
    """Rows whose pixel values identify them."""
    images = [np.full((8, 8, 3), number, np.uint8) for number in range(NUM_ROWS)]
    return [
        row(f"r{number:03d}", label_value=number % 3) | {"image": png(image)}
        for number, image in enumerate(images)
    ]


def tars(folder, rows):
    """Write rows as four tars of WebDataset; return changes of the catalogue entry."""
    folder.mkdir()
    for shard in range(4):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            for cells in rows[shard * len(rows) // 4 : (shard + 1) * len(rows) // 4]:
                for kind in ("image", "label"):
                    member = tarfile.TarInfo(f"{cells['id']}.{kind}.png")
                    member.size = len(cells[kind]["bytes"])
                    tar.addfile(member, io.BytesIO(cells[kind]["bytes"]))
    return {"image_column": "image.png", "label_column": "label.png", "id_column": "__key__"}


def imagefolder(folder, rows):
    """Write rows as files and metadata.csv, so that cells hold file names instead of bytes."""
    (folder / "train").mkdir(parents=True)
    lines = ["file_name,label_file_name,id"]
    for cells in rows:
        for kind in ("image", "label"):
            file = folder / "train" / f"{cells['id']}.{kind}.png"
            file.write_bytes(cells[kind]["bytes"])
        lines.append("{0}.image.png,{0}.label.png,{0}".format(cells["id"]))
    (folder / "train" / "metadata.csv").write_text("\n".join(lines))
    return {"label_column": "label"}


def saved_to_disk(folder, rows):
    """Write rows as Arrow files of ``save_to_disk``."""
    features = {
        "image": datasets.Image(),
        "label": datasets.Image(),
        "id": datasets.Value("string"),
    }
    split = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    datasets.DatasetDict({"train": split}).save_to_disk(folder, num_shards={"train": 5})
    return {}


def loader(samples, num_workers, batch_size=4):
    sampler = RankSampler(samples.order, 0, 1, batch_size)
    return DataLoader(
        samples, batch_size, sampler=sampler, num_workers=num_workers, collate_fn=collate
    )


def delivered(loader):
    """Id, image value and label value of every sample, in order."""
    return [
        (name, round(float(image[0, 0, 0] * 255)), int(label[0, 0]))
        for batch in loader
        for name, image, label in zip(batch["id"], batch["image"], batch["label"])
    ]


EXPECTED = [(f"r{number:03d}", number, number % 3) for number in range(NUM_ROWS)]


@pytest.mark.parametrize("write", [tars, imagefolder, saved_to_disk])
def test_streams_deliver_the_same_rows_in_workers(tmp_path, rows, write):
    changes = write(tmp_path / "set", rows)
    entry = dataclasses.replace(ENTRY, **changes)
    source = open_split(entry, str(tmp_path / "set"), "train")
    assert isinstance(source, StreamedSource)
    samples = Samples(entry, source, StoredOrder(source.group_rows), to_tensors)
    assert sorted(delivered(loader(samples, 0))) == EXPECTED
    for num_workers in (2, 3):
        assert delivered(loader(samples, num_workers)) == delivered(loader(samples, 0))


def test_a_stream_with_replaced_files_is_an_error(tmp_path, rows):
    entry = dataclasses.replace(ENTRY, **tars(tmp_path / "set", rows))
    source = open_split(entry, str(tmp_path / "set"), "train")
    (tmp_path / "set" / "train-0.tar").rename(tmp_path / "set" / "train-1.tar")
    with pytest.raises(
        UserError, match=r"row group 1 of the stream of data set 'shapes' holds oth"
    ):
        source.read(1)
    (tmp_path / "set" / "train-1.tar").unlink()
    with pytest.raises(
        UserError, match=r"row group 1 of the .* cannot be read \(FileNotFoundError"
    ):
        source.read(1)


def test_the_fingerprint_of_a_stream_does_not_depend_on_the_location(tmp_path, rows):
    entry = dataclasses.replace(ENTRY, **tars(tmp_path / "original", rows))
    original = open_split(entry, str(tmp_path / "original"), "train").fingerprint
    tars(tmp_path / "copy", rows)
    copy = open_split(entry, str(tmp_path / "copy"), "train").fingerprint
    tars(tmp_path / "other", [*rows[1:], rows[0]])
    other = open_split(entry, str(tmp_path / "other"), "train").fingerprint
    contents = [fingerprint.partition("-")[2] for fingerprint in (original, copy, other)]
    assert contents[0] == contents[1] != contents[2]


@pytest.fixture
def shards(tmp_path, rows, write_shards):
    parts = [rows[first : first + 50] for first in range(0, NUM_ROWS, 50)]
    return write_shards(tmp_path / "shards", "train", parts, row_group_size=5)


def test_samples_read_before_the_workers_start(shards):
    # A file that was opened before the fork has one position for all processes. Half of such runs
    # read wrong rows when workers shared it.
    source = ParquetSource(sorted(map(str, shards.iterdir())), ENTRY)
    samples = Samples(ENTRY, source, StoredOrder(source.group_rows), to_tensors)
    for _ in range(8):
        for position in (0, 60, 149):  # all shards are open
            samples[position]
        samples._open.clear()
        assert delivered(loader(samples, 3)) == EXPECTED
        assert samples[70]["id"] == "r070"


def test_a_sample_read_from_the_loader_before_training(shards):
    data = StreamingSegmentationData(path=str(shards), batch_size=4, num_workers=3)
    data.train_dataloader().dataset[0]
    batches = [batch["id"] for batch in islice(data.train_dataloader(), 12)]
    data.num_workers = 0
    assert batches == [batch["id"] for batch in islice(data.train_dataloader(), 12)]


def test_an_abandoned_iterator_does_not_change_the_next(shards):
    data = StreamingSegmentationData(path=str(shards), batch_size=4, num_workers=2)
    whole = [batch["id"] for batch in islice(data.train_dataloader(), 20)]
    batches = iter(data.train_dataloader())
    assert [next(batches)["id"] for _ in range(7)] == whole[:7]
    del batches
    loader = data.train_dataloader()
    assert [batch["id"] for batch in islice(loader, 3)] == whole[:3]
    # The same loader again, whose persistent workers have prefetched batches.
    assert [batch["id"] for batch in islice(loader, 20)] == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_that_are_read_in_turn(shards, rows, write_shards, num_workers):
    write_shards(shards, "validation", [rows[:30], rows[30:40]], row_group_size=7)
    data = StreamingSegmentationData(path=str(shards), batch_size=4, num_workers=num_workers)
    alone = [batch["id"] for batch in islice(data.train_dataloader(), 12)]
    train, second = iter(data.train_dataloader()), iter(data.train_dataloader())
    validation = iter(data.val_dataloader())
    turns = [(next(train)["id"], next(validation)["id"], next(second)["id"]) for _ in range(12)]
    assert [turn[0] for turn in turns] == [turn[2] for turn in turns] == alone
    assert [turn[1] for turn in turns] == [[f"r{number:03d}"] for number in range(12)]


def test_a_signal_while_a_worker_starts_does_not_end_it(tmp_path, rows, write_shards, monkeypatch):
    ignore = datamodule.ignore_signals
    monkeypatch.setattr(datamodule, "ignore_signals", lambda rank: (time.sleep(1), ignore(rank)))
    write_shards(tmp_path / "data", "train", [rows[:8]])
    data = StreamingSegmentationData(path=tmp_path / "data", batch_size=2, num_workers=2)
    batches = iter(data.train_dataloader())
    workers = [str(process.pid) for process in multiprocessing.active_children()]
    for name in ("TERM", "USR1", "INT"):  # from a scheduler, which is not the parent
        subprocess.run(["kill", f"-{name}", *workers], check=True)
    assert len(next(batches)["id"]) == 2
