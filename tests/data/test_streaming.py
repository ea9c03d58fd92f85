"""Who reads what: ranks and workers together read every row exactly once."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.datamodule import StreamingSegmentationData, collate
from segformer_pl.data.labels import DataError
from segformer_pl.data.streaming import SampleStream, TrainingStream, find_shards, open_split
from segformer_pl.data.transforms import to_float

ENTRY = find_dataset("shapes")


@pytest.fixture
def row(png):
    """Function (id, label value, size) -> a row of shards."""

    def make(name, label_value=1, size=(8, 8)):
        return {
            "image": png(np.zeros((*size, 3), np.uint8)),
            "label": png(np.full(size, label_value, np.uint8)),
            "id": name,
        }

    return make


@pytest.fixture
def uneven(tmp_path, row, write_shards):
    """23 rows in three shards of uneven length and seven row groups."""
    names = iter(f"s{i:02d}" for i in range(23))
    shards = [[row(name) for name in itertools.islice(names, n)] for n in (11, 3, 9)]
    return write_shards(tmp_path, "train", shards)


def ids(stream, num_workers, limit=None):
    loader = DataLoader(stream, batch_size=2, num_workers=num_workers, collate_fn=collate)
    samples = itertools.chain.from_iterable(batch["id"] for batch in loader)
    return list(itertools.islice(samples, limit))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_pass_visits_every_row_once_on_any_number_of_readers(uneven, world_size, num_workers):
    seen = []
    for rank in range(world_size):
        rows = open_split(ENTRY, uneven, "train")
        seen += ids(SampleStream(ENTRY, rows, to_float(), rank, world_size), num_workers)
    assert sorted(seen) == [f"s{i:02d}" for i in range(23)]


def test_more_workers_than_row_groups_lose_and_repeat_nothing(tmp_path, row, write_shards):
    write_shards(tmp_path, "train", [[row("a"), row("b"), row("c")]])
    stream = SampleStream(ENTRY, open_split(ENTRY, tmp_path, "train"), to_float(), 0, 1)
    assert sorted(ids(stream, num_workers=3)) == ["a", "b", "c"]


def training_stream(folder, rank=0, world_size=1, seed=0, first_pass=0):
    return TrainingStream(
        ENTRY,
        open_split(ENTRY, folder, "train"),
        to_float(),
        rank,
        world_size,
        seed=seed,
        first_pass=first_pass,
    )


def test_training_passes_are_complete_shuffled_and_all_different(uneven):
    seen = ids(training_stream(uneven), 0, limit=3 * 23)
    passes = [seen[i : i + 23] for i in (0, 23, 46)]
    assert all(sorted(one) == [f"s{i:02d}" for i in range(23)] for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert all(one != sorted(one) for one in passes)


def test_training_order_depends_on_the_seed_and_the_first_pass_only(uneven):
    def order(**arguments):
        return ids(training_stream(uneven, **arguments), 0, limit=40)

    assert order(seed=1) == order(seed=1)
    assert order(seed=1) != order(seed=2)
    assert order(first_pass=1)[:23] == order()[23:40] + order(first_pass=1)[17:23]


def test_ranks_train_on_disjoint_parts_of_a_pass(uneven):
    parts = [
        set(ids(training_stream(uneven, rank, world_size=2), 0, limit=11)) for rank in range(2)
    ]
    assert len(parts[0]) == len(parts[1]) == 11
    assert not parts[0] & parts[1]


def test_a_training_worker_without_row_groups_stops_not_spins(tmp_path, row, write_shards):
    write_shards(tmp_path, "train", [[row("a"), row("b")]])
    seen = ids(training_stream(tmp_path), num_workers=2, limit=8)
    assert sorted(set(seen)) == ["a", "b"]


def test_samples_are_decoded_and_mapped(uneven):
    sample = next(iter(SampleStream(ENTRY, open_split(ENTRY, uneven, "train"), to_float(), 0, 1)))
    assert type(sample["image"]) is torch.Tensor
    assert sample["image"].shape == (3, 8, 8)
    assert sample["image"].dtype == torch.float32
    assert sample["label"].dtype == torch.int64
    assert (sample["label"] == 1).all()


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ({"label": None}, r"sample 'bad', column 'label': the row holds no picture; remove"),
        ({"image": None}, r"sample 'bad', column 'image': the row holds no picture"),
        (
            {"image": {"bytes": b"not a picture", "path": None}},
            r"sample 'bad', column 'image': the 13 bytes are no picture, or a damaged one",
        ),
        ({"label": np.full((8, 8), 77, np.uint8)}, r"sample 'bad': label value 77 in 64 "),
        ({"label": np.zeros((4, 8), np.uint8)}, r"the label is 4x8 but the image is 8x8"),
        ({"image": np.zeros((8, 8), np.uint16)}, r"more than 8 bits per channel \(mode I;16\)"),
        ({"id": None}, r"sample None: the row has no 'id'; give every row one"),
        ({"label": np.zeros((8, 8, 3), np.uint8)}, r"sample 'bad': .* not one whole number per"),
    ],
)
def test_a_broken_row_is_named(tmp_path, broken, sentence, png, row, write_shards):
    broken = {
        column: png(cell) if isinstance(cell, np.ndarray) else cell
        for column, cell in broken.items()
    }
    write_shards(tmp_path, "train", [[row("good"), row("bad") | broken]])
    stream = SampleStream(ENTRY, open_split(ENTRY, tmp_path, "train"), to_float(), 0, 1)
    with pytest.raises(DataError, match=sentence):
        list(stream)


def test_a_missing_column_is_named_with_those_there(tmp_path):
    table = pa.table({"image": [b""], "mask": [b""]})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"no column 'label'.*they have: image, mask"):
        open_split(ENTRY, tmp_path, "train")


def test_a_shard_cut_short_is_named(tmp_path, row, write_shards):
    write_shards(tmp_path, "train", [[row("a")], [row("b")]])
    shard = tmp_path / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet' is not a complete Parquet"):
        open_split(ENTRY, tmp_path, "train")


def test_shards_without_a_row_are_refused(tmp_path, write_shards):
    write_shards(tmp_path, "train", [[]])
    with pytest.raises(DataError, match=r"the train shards in '.*' hold no row"):
        open_split(ENTRY, tmp_path, "train")


def test_plain_binary_columns_are_read(tmp_path, row):
    cells = row("a") | {"image": row("a")["image"]["bytes"], "label": row("a")["label"]["bytes"]}
    pq.write_table(pa.Table.from_pylist([cells]), tmp_path / "train.parquet")
    (sample,) = SampleStream(ENTRY, open_split(ENTRY, tmp_path, "train"), to_float(), 0, 1)
    assert sample["image"].shape == (3, 8, 8)


def test_missing_folder_and_missing_split_are_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder '.*/nowhere'"):
        find_shards(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"holds no validation\*.parquet"):
        find_shards(tmp_path, "validation")


def test_shards_of_the_hub_layout_are_found(tmp_path, row, write_shards):
    (tmp_path / "data").mkdir()
    write_shards(tmp_path / "data", "test", [[row("a")]])
    assert len(find_shards(tmp_path, "test")) == 1


def test_batches_of_unequal_pictures_are_refused_with_the_remedy(tmp_path, row, write_shards):
    write_shards(tmp_path, "validation", [[row("a"), row("b", size=(8, 12))]])
    data = StreamingSegmentationData("shapes", tmp_path, eval_batch_size=2, num_workers=0)
    with pytest.raises(DataError, match=r"'a' is 8x8 but 'b' is 8x12.*eval_batch_size 1"):
        list(data.val_dataloader())


def test_camvid_without_a_path_says_what_to_give():
    with pytest.raises(DataError, match=r"'camvid' is read from a folder of yours; give"):
        StreamingSegmentationData("camvid").prepare_data()


def test_datamodule_batches_follow_the_contract(tmp_path, row, write_shards):
    write_shards(tmp_path, "train", [[row(f"{i}", size=(20, 30)) for i in range(6)]])
    write_shards(tmp_path, "validation", [[row(f"{i}", size=(20, 30)) for i in range(5)]])
    data = StreamingSegmentationData(
        "shapes", tmp_path, batch_size=4, eval_batch_size=3, num_workers=0, crop_size=(16, 24)
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 24)
    assert batch["label"].shape == (4, 16, 24)
    assert all(isinstance(name, str) for name in batch["id"])
    batches = list(data.val_dataloader())
    assert [len(batch["id"]) for batch in batches] == [3, 2]
    assert batches[0]["image"].shape == (3, 3, 20, 30)
