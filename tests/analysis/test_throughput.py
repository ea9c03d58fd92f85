"""Stragglers and the limits of throughput."""

import json
import re

import pytest

from segformer_pl.analysis.throughput import RankThroughput, Throughput, is_shown


def throughput(*ranks, accumulate=1):
    """Of ranks with (seconds waiting for data, seconds in forward passes), 100 s and batches."""
    totals = [RankThroughput(i, 800, 100, 100.0, *rank) for i, rank in enumerate(ranks)]
    return Throughput(0, 100 // accumulate, accumulate, tuple(totals))


@pytest.mark.parametrize(
    ("ranks", "remarks"),
    [
        ([(2, 20), (2, 21), (3, 20)], []),
        ([(2, 20), (2, 24), (2, 20)], ["Rank 1 computes longer than the median of .* 12 % of"]),
        ([(2, 20), (30, 20)], ["Rank 1 waits for data longer than the median of .* 28 % of"]),
        ([(40, 5), (41, 5), (42, 5)], ["Training waits for data 41 % of the time"]),
        ([(40, 5), (41, 5), (60, 9)], ["Rank 2 waits", "Rank 2 computes", "Training waits"]),
        ([(50, 5)], ["Training waits for data 50 % of the time"]),
        ([(5, 30)], []),
    ],
)
def test_remarks(ranks, remarks):
    found = throughput(*ranks).remarks()
    assert len(found) == len(remarks)
    for sentence, start in zip(found, remarks):
        assert re.match(start, sentence)


def test_values_of_all_ranks():
    two = throughput((10, 20), (30, 20), accumulate=4)
    assert two.images_per_second == 16
    assert two.step_time == 4
    assert two.data_wait == 0.3
    assert two.ranks[1].forward_time == 0.2
    assert Throughput.of(json.loads(json.dumps(two.as_dict()))) == two


def test_the_table_of_many_ranks_shows_the_slowest():
    many = throughput(*((1, 20 + 5 * (i == 70)) for i in range(100)))
    assert len(many.slowest()) == 16
    assert many.slowest()[0].rank == 70
    assert throughput((1, 2), (9, 2)).slowest()[0].rank == 0


@pytest.mark.parametrize("content", [None, [], {}, {"ranks": []}, {"ranks": [{"rank": 0}]}, "x"])
def test_damaged_content_is_no_throughput(content):
    assert Throughput.of(content) is None


def test_shown_for_several_ranks_or_if_data_limit_it():
    assert not is_shown(None)
    assert not is_shown(throughput((5, 30)))
    assert is_shown(throughput((50, 5)))
    assert is_shown(throughput((1, 30), (1, 30)))
