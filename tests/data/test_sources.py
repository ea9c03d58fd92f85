"""Opening the source of a split: Parquet, image folders, streams; and its errors."""

import dataclasses
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.sources import ImageFolder, ParquetSource, StreamedSource, open_split
from segformer_pl.errors import UserError

pytestmark = pytest.mark.usefixtures("empty_cache")

ENTRY = find_dataset("shapes")


def ids(source):
    """All ids in stored order, with the row groups read from last to first."""
    groups = range(len(source.group_rows))
    read = {group: [row["id"] for row in source.read(group)] for group in reversed(groups)}
    assert [len(read[group]) for group in groups] == source.group_rows
    return [name for group in groups for name in read[group]]


def test_row_groups_of_all_shards_in_order(tmp_path, row, write_shards):
    rows = [row(f"s{i}") for i in range(9)]
    folder = str(write_shards(tmp_path / "data", "train", [rows[:5], rows[5:]], row_group_size=2))
    source = open_split(ENTRY, folder, "train")
    assert source.group_rows == [2, 2, 1, 2, 2]
    assert all(source.group_bytes)
    assert ids(source) == [f"s{i}" for i in range(9)]
    assert [source.name(group, 0) for group in (0, 2, 3)] == [
        "train-00000-of-00002:0",
        "train-00000-of-00002:4",
        "train-00001-of-00002:0",
    ]


def test_only_the_columns_of_the_entry_are_read(tmp_path, row):
    pq.write_table(pa.Table.from_pylist([row("a") | {"depth": b"x" * 99}]), tmp_path / "t.parquet")
    (read,) = ParquetSource([str(tmp_path / "t.parquet")], ENTRY).read(0)
    assert set(read) == {"image", "label", "id"}


def test_a_folder_a_pattern_and_a_list_open_the_same_shards(tmp_path, row, write_shards):
    (tmp_path / "data").mkdir()
    write_shards(tmp_path / "data", "test", [[row("a")], [row("b")]])
    files = sorted(str(file) for file in (tmp_path / "data").iterdir())
    for path in (str(tmp_path), f"{tmp_path}/data/{{split}}-*.parquet", {"test": files}):
        assert ids(open_split(ENTRY, path, "test")) == ["a", "b"]


def test_the_fingerprint_depends_on_the_data_and_not_on_the_location(tmp_path, row, write_shards):
    folder = write_shards(tmp_path / "set", "train", [[row("a"), row("b")]])
    copy = shutil.copytree(folder, tmp_path / "copy")
    other = write_shards(tmp_path / "other", "train", [[row("a"), row("b"), row("c")]])
    fingerprints = [
        open_split(ENTRY, str(path), "train").fingerprint for path in (folder, copy, other)
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_the_entry_names_the_stored_split(tmp_path, row, write_shards):
    write_shards(tmp_path, "val", [[row("a")]])
    entry = dataclasses.replace(ENTRY, splits={"validation": "val"})
    assert ids(open_split(entry, str(tmp_path), "validation")) == ["a"]


def test_plain_binary_columns_are_read(tmp_path, row):
    cells = row("a") | {"image": row("a")["image"]["bytes"]}
    pq.write_table(pa.Table.from_pylist([cells]), tmp_path / "train.parquet")
    (read,) = open_split(ENTRY, str(tmp_path), "train").read(0)
    assert isinstance(read["image"], bytes)


@pytest.fixture
def image_folder(tmp_path, row):
    """A folder of image and label files, one pair of them in a sub-folder."""
    for name in ("b", "a", "town/c"):
        for kind, suffix in (("image", ".jpg"), ("label", ".png")):
            file = tmp_path / "set" / f"{kind}s" / "train" / f"{name}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(row(name)[kind]["bytes"])
    return tmp_path / "set"


def test_an_image_folder(image_folder):
    source = open_split(ENTRY, str(image_folder), "train")
    assert isinstance(source, ImageFolder)
    assert source.group_rows == [1, 1, 1]
    assert ids(source) == ["a", "b", "town/c"]
    assert source.name(2, 0) == "town/c"


def test_images_without_labels_are_counted_and_named(image_folder):
    (image_folder / "labels" / "train" / "a.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images in .* have no label .* is 'a.jpg'; add"):
        open_split(ENTRY, str(image_folder), "train")
    with pytest.raises(UserError, match=r"no images in '.*/images/validation'; give a folder"):
        open_split(ENTRY, str(image_folder), "validation")


def test_a_format_without_row_counts_is_read_through_once_with_a_message(
    tmp_path, row, caplog, monkeypatch
):
    # The image folder format of datasets, whose rows are known from the stream alone.
    folder = tmp_path / "library"
    (folder / "train").mkdir(parents=True)
    lines = ["file_name,label_file_name,id"]
    for i in range(150):
        for kind in ("image", "label"):
            cell = row(f"r{i}", label_value=i % 3)[kind]
            (folder / "train" / f"{kind}{i}.png").write_bytes(cell["bytes"])
        lines.append(f"image{i}.png,label{i}.png,r{i}")
    (folder / "train" / "metadata.csv").write_text("\n".join(lines))
    with caplog.at_level("INFO"):
        source = open_split(ENTRY, str(folder), "train")
    assert isinstance(source, StreamedSource)
    assert "it is read through once to count them; convert it to Parquet" in caplog.text
    assert source.group_rows == [64, 64, 22]
    assert sorted(ids(source)) == sorted(f"r{i}" for i in range(150))
    # Reopened, as another process would: the index comes from the cache.
    monkeypatch.setattr(StreamedSource, "_read_through", None)
    reopened = open_split(ENTRY, str(folder), "train")
    assert reopened.fingerprint == source.fingerprint
    assert [row["id"] for row in reopened.read(1)] == [row["id"] for row in source.read(1)]


def test_a_missing_column_is_an_error(tmp_path):
    table = pa.table({"image": [b""], "mask": [b""]})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"no column 'label'.*it has: image, mask"):
        open_split(ENTRY, str(tmp_path), "train")


def test_a_truncated_shard_is_named(tmp_path, row, write_shards):
    write_shards(tmp_path, "train", [[row("a")], [row("b")]])
    shard = tmp_path / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=r"train-00001-of-00002.parquet' is not a complete Parquet"):
        open_split(ENTRY, str(tmp_path), "train")


def test_a_damaged_row_group_is_named_when_it_is_read(tmp_path, row, write_shards):
    write_shards(tmp_path, "train", [[row("a")]])
    source = open_split(ENTRY, str(tmp_path), "train")
    (shard,) = tmp_path.glob("*.parquet")
    content = shard.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    shard.write_bytes(bytes(len(content) - footer) + content[-footer:])
    with pytest.raises(UserError, match=r"train-00000-of-00001.parquet' is not a complete Parquet"):
        source.read(0)


def test_shards_without_rows_are_an_error(tmp_path, write_shards):
    write_shards(tmp_path, "train", [[]])
    with pytest.raises(UserError, match=r"the train shards of '.*' have no rows"):
        open_split(ENTRY, str(tmp_path), "train")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", r"there is no folder 'nowhere'; give the folder"),
        ("/no/where/at/all", r"there is no folder '/no/where/at/all'"),
        ("nobody/nothing", r"'nobody/nothing' cannot be opened as a data set \(.*\); check the"),
        ({"validation": []}, r"no files for split 'train', only for validation; add them"),
        ({"train": ["missing.parquet"]}, r"there is no file 'missing.parquet'; correct the path"),
        ("missing/{split}-*.parquet", r"no file matches 'missing/train-\*.parquet'"),
        (None, r"not given, and data set 'shapes' has no hub location; give --data.path"),
    ],
)
def test_missing_locations(path, message, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        open_split(ENTRY, path, "train")


def test_a_folder_with_other_splits_only(tmp_path, row, write_shards):
    write_shards(tmp_path, "train", [[row("a")]])
    with pytest.raises(
        UserError,
        match=r"no validation\*.parquet or images/validation/ in .* \(there is 'train-.*'\); give",
    ):
        open_split(ENTRY, str(tmp_path), "validation")
