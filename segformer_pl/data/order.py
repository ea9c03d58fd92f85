"""Which row stands at which position of the training sequence: a pure function.

Training consumes an endless sequence of samples, numbered 0, 1, 2, ... over all ranks and workers.
A position belongs to epoch ``position // num_rows``. An epoch is every row once: the row groups in
an order drawn from ``(seed, epoch)``, the rows of each in an order drawn from ``(seed, epoch, row
group)``, all laid end to end and cut into :attr:`EpochShuffle.num_lanes` lanes of equal length.
Positions take their rows from the lanes in turn. Which lane lies where is drawn as well.

So a batch mixes as many row groups as there are lanes, yet a reader of few lanes reads few row
groups, each from its first row to its last. Nothing here depends on the number of ranks, workers or
on the batch size: whoever reads a position reads the same sample, and the whole state of the data
is the number of samples consumed.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

MAX_LANES = 64  # a power of two, so that the usual numbers of ranks and workers divide it
LANES_BYTES = 1 << 30  # the row groups that are being read, one for each lane, stay in memory


class Location(NamedTuple):
    """Where the sample of a position is stored, and the lane that it comes from."""

    epoch: int
    lane: int
    group: int
    row: int


class StoredOrder:
    """Every row once, as stored: position ``p`` is the ``p``-th row.

    Args:
        group_rows: Number of rows of each row group.
    """

    num_lanes = 1
    seed = 0  # nothing is drawn

    def __init__(self, group_rows: list[int]) -> None:
        self.num_rows = sum(group_rows)
        self._ends = np.cumsum(group_rows)

    def locate(self, position: int) -> Location:
        group = int(np.searchsorted(self._ends, position, side="right"))
        before = int(self._ends[group - 1]) if group else 0
        return Location(0, 0, group, position - before)


class EpochShuffle:
    """The shuffled, endless sequence that the module's docstring describes.

    Args:
        group_rows: Number of rows of each row group; their sum is the length of an epoch.
        group_bytes: Size of each row group in bytes; large ones limit the number of lanes.
        seed: Of the order.
    """

    def __init__(self, group_rows: list[int], group_bytes: list[int], seed: int) -> None:
        self.num_rows = sum(group_rows)
        self.seed = seed
        lanes = min(MAX_LANES, max(LANES_BYTES // max(*group_bytes, 1), 1))
        self.num_lanes = 1 << (lanes.bit_length() - 1)
        self._group_rows = np.array(group_rows)
        self._drawn: tuple[Any, ...] | None = None

    def locate(self, position: int) -> Location:
        """Where the sample of a position (0, 1, 2, ... without end) is stored."""
        epoch, offset = divmod(position, self.num_rows)
        turn, lane = divmod(offset, self.num_lanes)
        groups, ends, lanes = self._draw(epoch)
        index = int(lanes[lane]) + turn
        slot = int(np.searchsorted(ends, index, side="right"))
        group = int(groups[slot])
        before = int(ends[slot - 1]) if slot else 0
        rows = _draw_rows(self.seed, epoch, group, int(self._group_rows[group]))
        return Location(epoch, lane, group, int(rows[index - before]))

    def _draw(self, epoch: int) -> tuple[npt.NDArray[np.int64], ...]:
        """Row groups in the epoch's order, where each of them ends, and where each lane begins."""
        if self._drawn is None or self._drawn[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            groups = rng.permutation(len(self._group_rows))
            # Lanes that follow each other in turn must not lie side by side: where they are short,
            # a batch would come from one row group.
            lanes = rng.permutation(self.num_lanes)
            lengths = (self.num_rows + self.num_lanes - 1 - lanes) // self.num_lanes
            begins = np.empty_like(lanes)
            begins[lanes] = np.cumsum(lengths) - lengths
            self._drawn = (epoch, groups, np.cumsum(self._group_rows[groups]), begins)
        return self._drawn[1:]


@lru_cache(maxsize=4 * MAX_LANES)
def _draw_rows(seed: int, epoch: int, group: int, num_rows: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch, group]).permutation(num_rows)
