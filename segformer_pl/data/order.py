"""The sampling order: which row is read at which position, as a pure function of the seed.

Training consumes an endless sequence of samples. Its positions 0, 1, 2, ... count over all ranks
and workers, and position ``p`` belongs to epoch ``p // num_rows``. Every epoch holds each row once:

1. Permute the row groups (random stream of ``(seed, epoch)``).
2. Permute the rows of each row group (random stream of ``(seed, epoch, row group)``).
3. Concatenate them, and cut the sequence into ``num_lanes`` lanes of equal length (one row more in
   the first lanes). The lanes lie in a random order along the sequence.
4. Take one row from each lane in turn.

Three row groups A (3 rows), B (5 rows) and C (2 rows), four lanes, epoch 0 of seed 5::

    row groups       |------- B -------|-- C --|---- A ----|
    rows              B4 B0 B2 B3 B1     C0 C1   A1 A2 A0
    lanes            |lane 2|- lane 0 -|lane 3 |- lane 1 --|

                      lane 0   lane 1   lane 2   lane 3
    positions 0-3       B2       A1       B4       C0
    positions 4-7       B3       A2       B0       C1
    positions 8-9       B1       A0

A batch mixes as many row groups as there are lanes. A worker that reads few of the lanes reads few
row groups, each from its first row to its last. The order does not depend on the world size, on the
number of workers or on the batch size, so the number of samples consumed is the whole state of the
data.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

MAX_LANES = 64  # a power of two, so that common world sizes and numbers of workers divide it
LANES_BYTES = 1 << 30  # memory for the open row groups, one for each lane


class Location(NamedTuple):
    """Row group and row of the sample at a position, with its epoch and lane."""

    epoch: int
    lane: int
    group: int
    row: int


class StoredOrder:
    """Every row once, in the stored order: position ``p`` is the ``p``-th row.

    Args:
        group_rows: Number of rows of each row group.
    """

    num_lanes = 1
    seed = 0  # unused: nothing is random

    def __init__(self, group_rows: list[int]) -> None:
        self.num_rows = sum(group_rows)
        self._ends = np.cumsum(group_rows)

    def locate(self, position: int) -> Location:
        """Return the location of the row at a position."""
        group = int(np.searchsorted(self._ends, position, side="right"))
        begin = int(self._ends[group - 1]) if group else 0
        return Location(0, 0, group, position - begin)


class EpochShuffle:
    """The endless shuffled sequence that the module's docstring describes.

    Args:
        group_rows: Number of rows of each row group; their sum is the length of an epoch.
        group_bytes: Size of each row group in bytes; large row groups reduce the number of lanes.
        seed: Seed of the sampling order.
    """

    def __init__(self, group_rows: list[int], group_bytes: list[int], seed: int) -> None:
        self.num_rows = sum(group_rows)
        self.seed = seed
        # One row group per lane is in memory at a time. Round down to a power of two.
        lanes = min(MAX_LANES, max(LANES_BYTES // max(*group_bytes, 1), 1))
        self.num_lanes = 1 << (lanes.bit_length() - 1)
        self._group_rows = np.array(group_rows)
        self._epoch: tuple[Any, ...] | None = None  # number and permutations of the latest epoch

    def locate(self, position: int) -> Location:
        """Return the location of the sample at a position (0, 1, 2, ... without end)."""
        epoch, offset = divmod(position, self.num_rows)
        # Offset 6 with four lanes is the second row (turn 1) of lane 2.
        turn, lane = divmod(offset, self.num_lanes)
        groups, ends, begins = self._permute_epoch(epoch)
        index = int(begins[lane]) + turn  # in the concatenated rows of the epoch
        slot = int(np.searchsorted(ends, index, side="right"))  # the permuted group that has it
        group = int(groups[slot])
        begin = int(ends[slot - 1]) if slot else 0
        rows = _permute_rows(self.seed, epoch, group, int(self._group_rows[group]))
        return Location(epoch, lane, group, int(rows[index - begin]))

    def _permute_epoch(self, epoch: int) -> tuple[npt.NDArray[np.int64], ...]:
        """Return the permuted row groups, the index where each ends, and where each lane begins."""
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            groups = rng.permutation(len(self._group_rows))
            # Lanes 0, 1, 2, ... are read in turn. If they also lay side by side, short lanes would
            # cut one row group, and a batch would come from that row group alone.
            lanes = rng.permutation(self.num_lanes)
            # Lane l has the offsets l, l + num_lanes, l + 2 num_lanes, ... below num_rows.
            lengths = (self.num_rows + self.num_lanes - 1 - lanes) // self.num_lanes
            begins = np.empty_like(lanes)
            begins[lanes] = np.cumsum(lengths) - lengths
            self._epoch = (epoch, groups, np.cumsum(self._group_rows[groups]), begins)
        return self._epoch[1:]


@lru_cache(maxsize=4 * MAX_LANES)
def _permute_rows(seed: int, epoch: int, group: int, num_rows: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch, group]).permutation(num_rows)
