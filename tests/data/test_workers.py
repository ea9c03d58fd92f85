"""Sources in real loader processes, which must deliver what the process that started them would."""

import dataclasses
import io
import tarfile
from itertools import islice

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader

from segformer_pl.data import StreamingSegmentationData
from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.order import StoredOrder
from segformer_pl.data.sources import ParquetSource, StreamedSource, open_split
from segformer_pl.data.streaming import RankSampler, Samples, collate
from segformer_pl.data.transforms import to_tensors
from segformer_pl.errors import UserError

pytestmark = pytest.mark.slow

ENTRY = find_dataset("shapes")
NUM_ROWS = 150


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def rows(row, png):
    """Rows that tell themselves apart by their pixels."""
    images = [np.full((8, 8, 3), number, np.uint8) for number in range(NUM_ROWS)]
    return [
        row(f"r{number:03d}", label_value=number % 3) | {"image": png(image)}
        for number, image in enumerate(images)
    ]


def tars(folder, rows):
    """WebDataset: four tars."""
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
    """Files and a table, whose names are cells without bytes."""
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
    """Arrow files."""
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
    """Ids and what the pixels say, in order."""
    return [
        (name, round(float(image[0, 0, 0] * 255)), int(label[0, 0]))
        for batch in loader
        for name, image, label in zip(batch["id"], batch["image"], batch["label"])
    ]


EXPECTED = [(f"r{number:03d}", number, number % 3) for number in range(NUM_ROWS)]


@pytest.mark.parametrize("write", [tars, imagefolder, saved_to_disk])
def test_streams_have_the_same_rows_in_loader_processes(tmp_path, rows, write):
    changes = write(tmp_path / "set", rows)
    entry = dataclasses.replace(ENTRY, **changes)
    source = open_split(entry, str(tmp_path / "set"), "train")
    assert isinstance(source, StreamedSource)
    samples = Samples(entry, source, StoredOrder(source.group_rows), to_tensors)
    assert sorted(delivered(loader(samples, 0))) == EXPECTED
    for num_workers in (2, 3):
        assert delivered(loader(samples, num_workers)) == delivered(loader(samples, 0))


def test_a_stream_whose_files_were_replaced_is_refused_at_once(tmp_path, rows):
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


def test_a_stream_that_moved_is_the_same_data(tmp_path, rows):
    entry = dataclasses.replace(ENTRY, **tars(tmp_path / "here", rows))
    here = open_split(entry, str(tmp_path / "here"), "train").fingerprint
    tars(tmp_path / "there", rows)
    there = open_split(entry, str(tmp_path / "there"), "train").fingerprint
    tars(tmp_path / "other", [*rows[1:], rows[0]])
    other = open_split(entry, str(tmp_path / "other"), "train").fingerprint
    contents = [fingerprint.partition("-")[2] for fingerprint in (here, there, other)]
    assert contents[0] == contents[1] != contents[2]


@pytest.fixture
def shards(tmp_path, rows, write_shards):
    parts = [rows[first : first + 50] for first in range(0, NUM_ROWS, 50)]
    return write_shards(tmp_path / "shards", "train", parts, row_group_size=5)


def test_a_look_at_the_data_before_the_loader_processes_start(shards):
    # Open files of the process that forks have one position for all: rows came out of other places
    # in half of such runs.
    entry = dataclasses.replace(ENTRY)
    source = ParquetSource(sorted(map(str, shards.iterdir())), entry)
    samples = Samples(entry, source, StoredOrder(source.group_rows), to_tensors)
    for _ in range(8):
        for position in (0, 60, 149):  # all shards are open
            samples[position]
        samples._open.clear()
        assert delivered(loader(samples, 3)) == EXPECTED
        assert samples[70]["id"] == "r070"


def test_a_notebook_looks_at_the_data_and_trains(shards):
    data = StreamingSegmentationData(path=str(shards), batch_size=4, num_workers=3)
    data.train_dataloader().dataset[0]
    batches = [batch["id"] for batch in islice(data.train_dataloader(), 12)]
    data.num_workers = 0
    assert batches == [batch["id"] for batch in islice(data.train_dataloader(), 12)]


def test_a_loader_abandoned_in_the_middle_leaves_nothing_behind(shards):
    data = StreamingSegmentationData(path=str(shards), batch_size=4, num_workers=2)
    whole = [batch["id"] for batch in islice(data.train_dataloader(), 20)]
    batches = iter(data.train_dataloader())
    assert [next(batches)["id"] for _ in range(7)] == whole[:7]
    del batches
    one = data.train_dataloader()
    assert [batch["id"] for batch in islice(one, 3)] == whole[:3]
    # the same loader, whose persistent processes have fetched ahead
    assert [batch["id"] for batch in islice(one, 20)] == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_loaders_that_take_turns(shards, rows, write_shards, num_workers):
    write_shards(shards, "validation", [rows[:30], rows[30:40]], row_group_size=7)
    data = StreamingSegmentationData(path=str(shards), batch_size=4, num_workers=num_workers)
    alone = [batch["id"] for batch in islice(data.train_dataloader(), 12)]
    train, again = iter(data.train_dataloader()), iter(data.train_dataloader())
    validation = iter(data.val_dataloader())
    turns = [(next(train)["id"], next(validation)["id"], next(again)["id"]) for _ in range(12)]
    assert [turn[0] for turn in turns] == [turn[2] for turn in turns] == alone
    assert [turn[1] for turn in turns] == [[f"r{number:03d}"] for number in range(12)]
