"""The sampling order: a pure function, complete in every epoch, few row groups per reader."""

import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segformer_pl.data import order
from segformer_pl.data.order import EpochShuffle, StoredOrder

layouts = st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any)


def shuffle(group_rows, seed=0, group_bytes=None):
    return EpochShuffle(group_rows, group_bytes or [0] * len(group_rows), seed)


def every_row(group_rows):
    return {(group, row) for group, rows in enumerate(group_rows) for row in range(rows)}


@given(layouts, st.integers(0, 2**32), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_every_epoch_holds_every_row_once(group_rows, seed, epoch):
    positions = shuffle(group_rows, seed)
    first = epoch * positions.num_rows
    locations = [positions.locate(first + i) for i in range(positions.num_rows)]
    assert {location.epoch for location in locations} == {epoch}
    assert Counter((at.group, at.row) for at in locations) == Counter(every_row(group_rows))


@given(layouts)
def test_stored_order_is_every_row_as_stored(group_rows):
    stored = StoredOrder(group_rows)
    rows = [stored.locate(i)[2:] for i in range(stored.num_rows)]
    assert rows == sorted(every_row(group_rows))


@pytest.mark.slow
@given(layouts, st.integers(0, 2**32), st.lists(st.integers(0, 500), min_size=1, max_size=30))
@settings(deadline=None)
def test_locate_does_not_depend_on_earlier_calls(group_rows, seed, positions):
    one = shuffle(group_rows, seed)
    unpickled = pickle.loads(pickle.dumps(shuffle(group_rows, seed)))
    for position in positions:
        assert one.locate(position) == shuffle(group_rows, seed).locate(position)
        assert one.locate(position) == unpickled.locate(position)


def test_orders_differ_between_epochs_and_seeds():
    rows = [8] * 8

    def epoch(seed, number):
        one = shuffle(rows, seed)
        return [one.locate(number * 64 + i)[2:] for i in range(64)]

    orders = {tuple(epoch(seed, number)) for seed in range(5) for number in range(5)}
    assert len(orders) == 25
    assert tuple(sorted(every_row(rows))) not in orders


def test_order_is_the_one_of_earlier_checkpoints():
    # Checkpoints hold a position in this order. If it changed, resumed runs would repeat samples.
    assert [shuffle([3, 5, 2], seed=7).locate(i)[2:] for i in range(11)] == [
        (0, 2),
        (0, 0),
        (1, 0),
        (1, 2),
        (2, 0),
        (1, 1),
        (0, 1),
        (1, 4),
        (1, 3),
        (2, 1),
        (0, 2),
    ]


def test_the_example_of_the_docstring():
    one = shuffle([3, 5, 2], 5, [order.LANES_BYTES // 4] * 3)
    rows = [f"{'ABC'[at.group]}{at.row}" for at in map(one.locate, range(10))]
    assert one.num_lanes == 4
    assert rows == ["B2", "A1", "B4", "C0", "B3", "A2", "B0", "C1", "B1", "A0"]


def test_every_row_is_equally_likely_at_a_position():
    rows = [1, 5, 10]
    counts = Counter()
    one = shuffle(rows, 3)
    for epoch in range(2000):
        counts[one.locate(epoch * 16)[2:]] += 1
    # 2000 draws from 16 rows: 125 of each expected, with a standard deviation of 11.
    assert set(counts) == every_row(rows)
    assert min(counts.values()) > 80
    assert max(counts.values()) < 170


def test_a_batch_mixes_row_groups():
    one = shuffle([100] * 200)
    groups = [{one.locate(start + i).group for i in range(16)} for start in range(0, 1600, 16)]
    assert min(map(len, groups)) == 16


@pytest.mark.parametrize(("group_bytes", "num_lanes"), [(0, 64), (2**24, 64), (2**25, 32)])
def test_large_row_groups_are_read_in_fewer_lanes(group_bytes, num_lanes):
    assert shuffle([1] * 9, 0, [group_bytes] * 9).num_lanes == num_lanes


def test_a_row_group_above_the_memory_limit_leaves_one_lane():
    assert shuffle([1], 0, [8 * order.LANES_BYTES]).num_lanes == 1


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (1, 4), (4, 1), (4, 4), (8, 2)])
def test_each_worker_reads_a_part_of_the_row_groups(world_size, num_workers):
    # 16 samples per step, split as RankSampler and torch's DataLoader split them.
    one, batch = shuffle([100] * 200), 16 // world_size
    reads = 0
    for rank in range(world_size):
        for worker in range(num_workers):
            seen = set()
            for step in range(worker, one.num_rows // 16, num_workers):
                first = step * 16 + rank * batch
                seen |= {one.locate(position).group for position in range(first, first + batch)}
            reads += len(seen)
    # 200 groups in 64 lanes: a row group that a border between lanes cuts is read twice.
    assert reads <= 200 + 63
