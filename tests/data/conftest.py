"""Fixtures of the tests of sources: an empty cache, samples, image folders, shards, findings."""

import pytest

from segformer_pl.data import StreamingSegmentationData, sources
from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.order import StoredOrder
from segformer_pl.data.sources import open_split
from segformer_pl.data.streaming import Samples
from segformer_pl.data.transforms import to_tensors
from segformer_pl.doctor.findings import Examination
from segformer_pl.doctor.splits import examine_split
from segformer_pl.models import segformer_b0


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache folder, and no warnings that were given before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sources._warn_once.cache_clear()


@pytest.fixture(scope="session")
def samples_of():
    """Function (path, split) -> the samples of a split in stored order."""

    def load(path, split="train", **arguments):
        entry = find_dataset("shapes")
        source = open_split(entry, path if isinstance(path, dict) else str(path), split)
        return Samples(entry, source, StoredOrder(source.group_rows), to_tensors, **arguments)

    return load


@pytest.fixture(scope="session")
def ids_of(samples_of):
    """Function (path, split) -> the ids of a split in stored order."""

    def load(path, split="train"):
        samples = samples_of(path, split)
        return [samples[position]["id"] for position in range(samples.order.num_rows)]

    return load


@pytest.fixture(scope="session")
def findings_of():
    """Function folder -> findings of ``doctor`` about its files, as (level, message)."""

    def examine(folder):
        examination = Examination()
        data = StreamingSegmentationData(path=str(folder), num_workers=0)
        network = segformer_b0(num_classes=data.entry.labels.num_classes)
        examine_split(examination, network, data, "train")
        return [
            (finding.level, finding.message)
            for finding in examination.findings
            if finding.check in ("files", "open")
        ]

    return examine


@pytest.fixture
def make_image_folder(tmp_path, row):
    """Function ({image file: label value}, [other label files]) -> an image folder with them.

    An image whose label value is None gets no label.
    """

    def make(images, labels=()):
        root = tmp_path / "set"
        for kind in ("images", "labels"):
            (root / kind / "train").mkdir(parents=True, exist_ok=True)
        for name, value in images.items():
            image = root / "images" / "train" / name
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(row("x")["image"]["bytes"])
            if value is not None:
                label = root / "labels" / "train" / f"{name.rpartition('.')[0]}.png"
                label.parent.mkdir(parents=True, exist_ok=True)
                label.write_bytes(row("x", label_value=value)["label"]["bytes"])
        for name in labels:
            (root / "labels" / "train" / name).write_bytes(row("x")["label"]["bytes"])
        return root

    return make


@pytest.fixture(scope="session")
def write_named_shards(row):
    """Function (folder, *names) that writes shards of one row, whose id is the shard's name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(folder, *names):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist([row(name)]), folder / name)
        return folder

    return write


@pytest.fixture(scope="session")
def ids():
    """Function source -> all ids in stored order, row groups read from last to first."""

    def read_backwards(source):
        groups = range(len(source.group_rows))
        read = {group: [row["id"] for row in source.read(group)] for group in reversed(groups)}
        assert [len(read[group]) for group in groups] == source.group_rows
        return [name for group in groups for name in read[group]]

    return read_backwards
