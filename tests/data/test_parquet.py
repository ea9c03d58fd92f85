"""Parquet shards and archives: columns, files that cells name, damaged shards, fingerprints."""

import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from segformer_pl.data import files
from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.order import EpochShuffle, StoredOrder
from segformer_pl.data.sources import ParquetSource, open_split
from segformer_pl.data.streaming import Samples, collate
from segformer_pl.data.transforms import to_tensors
from segformer_pl.errors import UserError

pytestmark = pytest.mark.usefixtures("empty_cache")

ENTRY = find_dataset("shapes")


def test_shards_of_the_same_name_are_told_apart_by_folder(tmp_path, row, write_shards, ids_of):
    nameless = [row("x") | {"id": None}]
    for folder in ("a", "b"):
        write_shards(tmp_path / folder, "train", [nameless])
    shards = [str(tmp_path / folder / "train-00000-of-00001.parquet") for folder in ("a", "b")]
    assert ids_of({"train": shards}) == ["a/train-00000-of-00001:0", "b/train-00000-of-00001:0"]
    assert ids_of({"train": shards[:1]}) == ["train-00000-of-00001:0"]


def write_columns(file, columns):
    pq.write_table(pa.table(columns), file)


def test_every_shard_must_have_the_columns(tmp_path, row, write_shards, ids_of, findings_of):
    write_shards(tmp_path, "train", [[row("a")], [row("b")]])
    write_columns(tmp_path / "train-00000-of-00002.parquet", {"image": [b"x"], "mask": [b"x"]})
    sentence = r"00000-of-00002.parquet' has no column 'label', which .*; it has: image, mask"
    with pytest.raises(UserError, match=sentence):
        ids_of(tmp_path)
    ((level, message),) = findings_of(tmp_path)
    assert level == "error"
    assert "has no column 'label'" in message


@pytest.mark.parametrize("cells", [[[[1, 2], [3, 4]]], [7], ["file.png"]])
def test_columns_without_encoded_images_are_an_error(tmp_path, cells, ids_of):
    write_columns(tmp_path / "train.parquet", {"image": [b"x"], "label": cells, "id": ["a"]})
    with pytest.raises(UserError, match=r"column 'label' of .* holds .*; .*|needs encoded images"):
        ids_of(tmp_path)


@pytest.mark.parametrize("case", ["absolute", "relative", "outside", "device", "pipe", "missing"])
def test_cells_may_only_name_files_below_the_folder(tmp_path, row, case, monkeypatch, ids_of):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "inside.png").write_bytes(row("a")["image"]["bytes"])
    (tmp_path / "secret.png").write_bytes(row("a")["image"]["bytes"])
    os.mkfifo(folder / "pipe.png")
    path = {
        "absolute": str(folder / "inside.png"),
        "relative": "inside.png",
        "outside": f"{folder}/../secret.png",
        "device": "/dev/zero",
        "pipe": "pipe.png",
        "missing": "missing.png",
    }[case]
    cells = row("a") | {"image": {"bytes": None, "path": path}}
    pq.write_table(pa.Table.from_pylist([cells]), folder / "train.parquet")
    if case in ("absolute", "relative"):
        assert ids_of(folder) == ["a"]
        monkeypatch.setattr(files, "MAX_FILE_BYTES", 10)
        with pytest.raises(UserError, match=r"sample 'a', column 'image': .* bytes, but an image"):
            ids_of(folder)
        return
    message = {
        "outside": r"the row names the file '.*/set/../secret.png', which is not in '.*/set'; sto",
        "device": r"the row names the file '/dev/zero', which is not in",
        "pipe": r"pipe.png' is a folder, a pipe or a device",
        "missing": r"there is no file '.*missing.png'",
    }[case]
    with pytest.raises(UserError, match=f"sample 'a', column 'image': .*{message}"):
        ids_of(folder)


def test_an_archive_of_images_is_read(tmp_path, row):
    # Its cells name members of the archive instead of holding bytes.
    entry = find_dataset("shapes")
    folder = tmp_path / "set"
    members = tmp_path / "members"
    members.mkdir()
    lines = ["file_name,label_file_name,id"]
    for name in ("a", "b"):
        for kind in ("image", "label"):
            (members / f"{kind}-{name}.png").write_bytes(row(name)[kind]["bytes"])
        lines.append(f"image-{name}.png,label-{name}.png,{name}")
    (members / "metadata.csv").write_text("\n".join(lines))
    shutil.make_archive(str(folder / "train"), "zip", members)
    source = open_split(entry, str(folder), "train")
    samples = Samples(entry, source, StoredOrder(source.group_rows), to_tensors)
    assert sorted(samples[position]["id"] for position in range(2)) == ["a", "b"]
    with pytest.raises(UserError, match=r"the file '/etc/hostname', which is not one of the data"):
        source.read_file("/etc/hostname")


def zero_rows(shard):
    """Overwrite the rows of a shard with zeros and keep its footer."""
    content = shard.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    shard.write_bytes(bytes(len(content) - footer) + content[-footer:])


def test_rows_of_a_damaged_shard_are_skipped_and_counted(
    tmp_path, row, write_shards, ids_of, samples_of
):
    write_shards(tmp_path, "train", [[row("a"), row("b")], [row("c"), row("d")]])
    zero_rows(tmp_path / "train-00001-of-00002.parquet")
    with pytest.raises(UserError, match=r"00001-of-00002.parquet' is not a complete Parquet file"):
        ids_of(tmp_path)
    evaluated = samples_of(tmp_path, on_bad_sample="skip")
    batch = collate([evaluated[position] for position in range(4)])
    assert batch["id"] == ["a", "b"]
    assert list(batch["skipped"]) == ["train-00001-of-00002:0", "train-00001-of-00002:1"]
    source = evaluated.source
    order = EpochShuffle(source.group_rows, source.group_bytes, seed=0)
    trained = Samples(ENTRY, source, order, to_tensors, "skip")
    epoch = [trained[position] for position in range(4)]
    assert {sample["id"] for sample in epoch} <= {"a", "b"}
    assert {name for sample in epoch for name in sample["skipped"]} == {
        "train-00001-of-00002:0",
        "train-00001-of-00002:1",
    }


def test_a_missing_file_is_not_skipped(tmp_path, row, write_shards, samples_of):
    # Otherwise a missing disk would skip all rows, one by one.
    write_shards(tmp_path, "train", [[row("a")]])
    samples = samples_of(tmp_path, on_bad_sample="skip")
    (tmp_path / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"data.path: there is no file '.*train-00000-of-00001"):
        samples[0]


def test_shards_that_are_no_regular_files_are_an_error(tmp_path, row, write_shards, ids_of):
    write_shards(tmp_path, "train", [[row("a")]])
    shard = tmp_path / "train-00000-of-00001.parquet"
    shard.unlink()
    shard.symlink_to("gone.parquet")
    with pytest.raises(UserError, match=r"0001.parquet' is a link to 'gone.parquet', which does"):
        ids_of(tmp_path)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(UserError, match=r"00001.parquet' is a folder, a pipe or a device; give"):
        ids_of(tmp_path)


def test_the_fingerprint_depends_on_the_contents(tmp_path, row, write_shards):
    one = write_shards(tmp_path / "one", "train", [[row("a", label_value=1)]])
    other = write_shards(tmp_path / "other", "train", [[row("a", label_value=2)]])
    fingerprints = [open_split(ENTRY, str(folder), "train").fingerprint for folder in (one, other)]
    assert fingerprints[0].partition("-")[0] == fingerprints[1].partition("-")[0]
    assert fingerprints[0] != fingerprints[1]


def test_row_groups_of_all_shards_in_order(tmp_path, row, write_shards, ids):
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


def test_plain_binary_columns_are_read(tmp_path, row):
    cells = row("a") | {"image": row("a")["image"]["bytes"]}
    pq.write_table(pa.Table.from_pylist([cells]), tmp_path / "train.parquet")
    (read,) = open_split(ENTRY, str(tmp_path), "train").read(0)
    assert isinstance(read["image"], bytes)


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
