"""The order is a pure function, complete in every epoch, and cheap to read in."""

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
    places = [stored.locate(i)[2:] for i in range(stored.num_rows)]
    assert places == sorted(every_row(group_rows))


@given(layouts, st.integers(0, 2**32), st.lists(st.integers(0, 500), min_size=1, max_size=30))
@settings(deadline=None)
def test_a_position_does_not_depend_on_what_was_asked_before(group_rows, seed, positions):
    one = shuffle(group_rows, seed)
    travelled = pickle.loads(pickle.dumps(shuffle(group_rows, seed)))
    for position in positions:
        assert one.locate(position) == shuffle(group_rows, seed).locate(position)
        assert one.locate(position) == travelled.locate(position)


def test_orders_differ_between_epochs_and_seeds():
    rows = [8] * 8

    def epoch(seed, number):
        one = shuffle(rows, seed)
        return [one.locate(number * 64 + i)[2:] for i in range(64)]

    orders = {tuple(epoch(seed, number)) for seed in range(5) for number in range(5)}
    assert len(orders) == 25
    assert tuple(sorted(every_row(rows))) not in orders


def test_order_of_this_version():
    # Checkpoints hold a position in this order: a change of it makes resumed runs repeat samples.
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


def test_every_row_is_as_likely_everywhere():
    rows = [1, 5, 10]
    counts = Counter()
    one = shuffle(rows, 3)
    for epoch in range(2000):
        counts[one.locate(epoch * 16)[2:]] += 1
    # 2000 draws of 16 rows: 125 of each, with a standard deviation of 11
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


def test_a_row_group_larger_than_memory_allows_leaves_one_lane():
    assert shuffle([1], 0, [8 * order.LANES_BYTES]).num_lanes == 1


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (1, 4), (4, 1), (4, 4), (8, 2)])
def test_readers_share_the_row_groups_without_reading_them_all(world_size, num_workers):
    # 16 samples a step, dealt out as RankSampler and the loader do.
    one, batch = shuffle([100] * 200), 16 // world_size
    reads = 0
    for rank in range(world_size):
        for worker in range(num_workers):
            seen = set()
            for step in range(worker, one.num_rows // 16, num_workers):
                first = step * 16 + rank * batch
                seen |= {one.locate(position).group for position in range(first, first + batch)}
            reads += len(seen)
    # 200 groups in 64 lanes: a border inside a group is read from both sides
    assert reads <= 200 + 63
