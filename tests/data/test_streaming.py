"""Samples by position, rank and worker; bad samples; collation."""

import pickle
import re
from io import BytesIO
from itertools import chain, islice, takewhile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.order import EpochShuffle, StoredOrder
from segformer_pl.data.sources import open_split
from segformer_pl.data.streaming import RankSampler, Samples, collate
from segformer_pl.data.transforms import TrainTransforms, to_tensors
from segformer_pl.errors import UserError

ENTRY = find_dataset("shapes")


class Rows:
    """A source in memory that records which row groups are read."""

    def __init__(self, group_rows, row):
        self.group_rows = group_rows
        names = iter(range(sum(group_rows)))
        self.groups = [[row(f"s{next(names):03d}") for _ in range(n)] for n in group_rows]
        self.reads = []

    def read(self, group):
        self.reads.append(group)
        return self.groups[group]

    def name(self, group, row):
        return f"{group}:{row}"


def training(source, seed=0, **arguments):
    order = EpochShuffle(source.group_rows, [0] * len(source.group_rows), seed)
    transforms = TrainTransforms(
        crop_size=(6, 6),
        scale_range=(0.5, 2.0),
        base_size=None,
        photometric=True,
        ignore_index=255,
    )
    return Samples(ENTRY, source, order, transforms, **arguments)


def batches_of_worker(samples, rank, world_size, worker, num_workers, batch_size, start=0):
    """Every ``num_workers``-th batch of a rank's sampler, as a worker receives them."""
    positions = iter(RankSampler(samples.order, rank, world_size, batch_size, lambda: start))
    for step in range(10**9):
        batch = list(islice(positions, batch_size))
        if step % num_workers == worker:
            yield step, batch


layouts = st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any)


@given(
    group_rows=layouts,
    seed=st.integers(0, 2**31),
    world_size=st.integers(1, 8),
    num_workers=st.integers(1, 4),
    batch_size=st.integers(1, 3),
    start=st.integers(0, 60),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_global_batches_do_not_depend_on_world_size_and_workers(
    group_rows, seed, world_size, num_workers, batch_size, start, data
):
    order = EpochShuffle(group_rows, [0] * len(group_rows), seed)
    samples = Samples(ENTRY, None, order, None)
    global_batch = world_size * batch_size
    num_steps = 2 * order.num_rows // global_batch + 2  # beyond the end of an epoch
    steps = {}
    for rank in range(world_size):
        for worker in range(num_workers):
            batches = batches_of_worker(
                samples, rank, world_size, worker, num_workers, batch_size, start
            )
            for step, batch in batches:
                if step >= num_steps:
                    break
                steps.setdefault(step, {})[rank] = batch
    positions = [
        list(chain.from_iterable(steps[step][rank] for rank in range(world_size)))
        for step in range(num_steps)
    ]
    flat = list(chain.from_iterable(positions))
    assert flat == list(range(start, start + num_steps * global_batch))
    # The positions are consecutive, so each whole epoch holds every row once (test_order.py). A run
    # killed after any step resumes at the next position, for any world size that keeps the global
    # batch.
    killed = data.draw(st.integers(0, num_steps - 1))
    divisors = [n for n in range(1, 9) if global_batch % n == 0]
    ranks = data.draw(st.sampled_from(divisors))
    begin = start + killed * global_batch
    resumed = [
        RankSampler(order, rank, ranks, global_batch // ranks, lambda: begin)
        for rank in range(ranks)
    ]
    following = chain.from_iterable(islice(iter(one), global_batch // ranks) for one in resumed)
    assert list(following) == positions[killed]


# The same cases as mosaicml/streaming's test of its "relaxed" partition: one global batch, nodes of
# 8 devices with 8 workers each. That test compares global batches as sets; here the order is equal.
GLOBAL_BATCH = 960
NODES = [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 24, 30, 40, 60, 120]
DEVICES, WORKERS = 8, 8


@pytest.mark.parametrize("num_nodes", NODES)
def test_global_batches_are_equal_for_any_number_of_nodes(num_nodes):
    order = EpochShuffle([100] * 100, [0] * 100, seed=5)
    samples = Samples(ENTRY, None, order, None)
    world_size = num_nodes * DEVICES
    num_steps, begin = 11, 3 * GLOBAL_BATCH  # past the end of the epoch of 10 000 rows
    steps = [[] for _ in range(num_steps)]
    for rank in range(world_size):
        for worker in range(WORKERS):
            batches = batches_of_worker(
                samples, rank, world_size, worker, WORKERS, GLOBAL_BATCH // world_size, begin
            )
            for step, batch in takewhile(lambda pair: pair[0] < num_steps, batches):
                steps[step].append((rank, batch))
    flat = [position for step in steps for _, batch in sorted(step) for position in batch]
    assert flat == list(range(begin, begin + num_steps * GLOBAL_BATCH))


@given(layouts, st.integers(1, 8))
def test_evaluation_reads_every_row_once_without_padding(group_rows, world_size):
    order = StoredOrder(group_rows)
    blocks = [list(RankSampler(order, rank, world_size, 2)) for rank in range(world_size)]
    assert list(chain.from_iterable(blocks)) == list(range(sum(group_rows)))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    lengths = {len(RankSampler(order, rank, world_size, 2)) for rank in range(world_size)}
    assert lengths == {max(map(len, blocks))}


def test_the_training_sampler_has_no_length(row):
    sampler = RankSampler(training(Rows([4], row)).order, 0, 1, 2)
    with pytest.raises(TypeError, match="has no end"):
        len(sampler)


def take(samples, num_batches, num_workers=0, start=0, **arguments):
    sampler = RankSampler(samples.order, 0, 1, 4, lambda: start)
    loader = DataLoader(
        samples,
        batch_size=4,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        **arguments,
    )
    return list(islice(loader, num_batches))


def equal(one, other):
    return (
        one["id"] == other["id"]
        and one["seed"] == other["seed"]
        and all(torch.equal(one[key], other[key]) for key in ("image", "label"))
    )


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_workers_deliver_the_same_augmented_batches(row, num_workers):
    expected = take(training(Rows([5, 3, 9, 2], row)), 12)
    torch.manual_seed(1)  # the global generators have no influence
    np.random.seed(1)  # noqa: NPY002
    batches = take(training(Rows([5, 3, 9, 2], row)), 12, num_workers)
    assert all(map(equal, batches, expected))
    assert len({tuple(batch["seed"]) for batch in expected}) == 12


@pytest.mark.slow
def test_spawned_workers_deliver_the_same_batches(tmp_path, row, write_shards):
    write_shards(tmp_path, "train", [[row(f"{i}") for i in range(9)]])
    samples = training(open_split(ENTRY, str(tmp_path), "train"))
    batches = take(samples, 3, 1, multiprocessing_context="spawn")
    assert all(map(equal, batches, take(samples, 3)))


def test_resume_twice_within_an_epoch(row):
    whole = take(training(Rows([5, 3, 9, 2], row), seed=4), 12)
    parts = take(training(Rows([5, 3, 9, 2], row), seed=4), 3)
    parts += take(training(Rows([5, 3, 9, 2], row), seed=4), 1, start=12)
    parts += take(training(Rows([5, 3, 9, 2], row), seed=4), 8, 2, start=16)
    assert all(map(equal, parts, whole))


def test_samples_leave_the_global_generators_unchanged(row):
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    samples = training(Rows([5, 3], row))
    for position in range(8):
        samples[position]
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_the_next_epoch_augments_the_same_image_differently(row):
    samples = training(Rows([1], row))
    assert samples[0]["id"] == samples[1]["id"]
    assert samples[0]["seed"] != samples[1]["seed"]


@pytest.mark.slow
def test_a_lane_reads_each_of_its_row_groups_once(row):
    source = Rows([16] * 80, row)
    samples = training(source)
    for first in range(0, 1280, 16):  # a worker that has every 16th position
        samples[first]
    # 4 of 64 lanes with 20 rows each: two row groups per lane, or three if both ends are cut.
    assert len(source.reads) <= 4 * 3
    source.reads.clear()
    samples = training(source)
    for position in range(1280):
        samples[position]
    assert len(source.reads) <= 80 + 63
    assert len(samples._open) == 64


def test_samples_are_decoded_and_mapped(row):
    order = StoredOrder([1])
    sample = Samples(ENTRY, Rows([1], row), order, to_tensors)[0]
    assert type(sample["image"]) is torch.Tensor
    assert sample["image"].shape == (3, 8, 8)
    assert sample["image"].dtype == torch.float32
    assert sample["label"].dtype == torch.int64
    assert (sample["label"] == 1).all()
    assert (sample["id"], sample["skipped"]) == ("s000", {})


def test_a_row_without_an_id_is_named_by_shard_and_index(tmp_path, row):
    cells = [row("x") | {"id": None}, row("y")]
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "train.parquet")
    source = open_split(ENTRY, str(tmp_path), "train")
    samples = Samples(ENTRY, source, StoredOrder(source.group_rows), to_tensors)
    assert [samples[i]["id"] for i in range(2)] == ["train:0", "y"]


def test_samples_can_be_pickled(tmp_path, row, write_shards):
    write_shards(tmp_path, "train", [[row("a"), row("b")]])
    samples = training(open_split(ENTRY, str(tmp_path), "train"))
    samples[0]
    unpickled = pickle.loads(pickle.dumps(samples))
    assert equal(collate([unpickled[1]]), collate([samples[1]]))


def _tiff(array):
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, format="TIFF")
    return {"bytes": buffer.getvalue(), "path": None}


FLOATS = _tiff(np.zeros((8, 8), np.float32))
BAD = [
    ({"label": None}, r"sample 's001', column 'label': the row holds no image; remove"),
    ({"image": None}, r"sample 's001', column 'image': the row holds no image"),
    (
        {"image": {"bytes": b"not a picture", "path": None}},
        r"sample 's001', column 'image': the 13 bytes are not an image, or a damaged one",
    ),
    ({"label": np.full((8, 8), 77, np.uint8)}, r"sample 's001': label value 77 in 64 "),
    ({"label": np.zeros((4, 8), np.uint8)}, r"the label is 4x8 but the image is 8x8"),
    ({"image": FLOATS}, r"the image holds numbers without a known range \(.*mode F\)"),
    ({"label": np.zeros((8, 8, 3), np.uint8)}, r"sample 's001': "),
]


@pytest.fixture(params=BAD, ids=lambda param: next(iter(param[0])))
def bad_row(request, row, png):
    cells, message = request.param
    source = Rows([2, 2], row)
    source.groups[0][1] |= {
        column: png(cell) if isinstance(cell, np.ndarray) else cell
        for column, cell in cells.items()
    }
    return source, message


def test_a_bad_row_is_named(bad_row):
    source, message = bad_row
    samples = Samples(ENTRY, source, StoredOrder(source.group_rows), to_tensors)
    assert samples[0]["id"] == "s000"
    with pytest.raises(UserError, match=message):
        samples[1]


def test_in_training_another_sample_replaces_a_bad_one(bad_row):
    source, message = bad_row
    samples = training(source, on_bad_sample="skip")
    loaded = [samples[position] for position in range(8)]
    reported = [sample for sample in loaded if sample["skipped"]]
    assert len(reported) == 2  # once in each epoch
    for sample in reported:
        assert sample["id"] != "s001"
        (why,) = set(sample["skipped"].values())
        assert list(sample["skipped"]) == ["s001"]
        assert re.search(message, why)
    repeated = training(source, on_bad_sample="skip")
    assert [repeated[position]["id"] for position in range(8)] == [
        sample["id"] for sample in loaded
    ]


def test_in_evaluation_a_bad_sample_is_ignored(bad_row):
    source, _ = bad_row
    order = StoredOrder(source.group_rows)
    samples = Samples(ENTRY, source, order, to_tensors, on_bad_sample="skip")
    blank = collate([samples[1]])
    assert list(blank["skipped"]) == blank["id"] == ["s001"]
    assert (blank["label"] == 255).all()
    mixed = collate([samples[0], samples[1], samples[2]])
    assert mixed["id"] == ["s000", "s002"]
    assert list(mixed["skipped"]) == ["s001"]
    assert mixed["image"].shape == (2, 3, 8, 8)


def test_skipping_stops_after_ten_bad_samples(row):
    source = Rows([3], row)
    for cells in source.groups[0]:
        cells["label"] = None
    with pytest.raises(UserError, match=r"10 samples in a row cannot be used, the last because"):
        training(source, on_bad_sample="skip")[0]


def test_images_of_unequal_size_raise_an_error(row):
    source = Rows([2], row)
    source.groups[0][1] = row("wide", size=(8, 12))
    samples = Samples(ENTRY, source, StoredOrder([2]), to_tensors)
    with pytest.raises(UserError, match=r"'s000' is 8x8 but 'wide' is 8x12.*eval_batch_size 1"):
        collate([samples[0], samples[1]])
