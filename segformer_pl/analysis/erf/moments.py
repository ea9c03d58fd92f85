"""Mean and variance of maps that come one after the other, in memory that does not grow.

Beside the mean, the maps are averaged in a fixed number of groups, dealt out like cards: what is
left out, one after the other, for confidence intervals. With no more maps than groups every group
is one map.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Map = npt.NDArray[np.float64]
NUM_GROUPS = 16


@dataclass
class Moments:
    """Running mean and variance over maps (H, W), by Welford's and Chan's update.

    Attributes:
        count: Maps so far.
        mean: (H, W), 0 before the first map.
        squares: (H, W), sum of squared deviations from the mean.
        groups: (G, H, W), sums over the maps of each group.
        group_counts: (G,), maps in each.
    """

    count: int
    mean: Map
    squares: Map
    groups: npt.NDArray[np.float32]
    group_counts: npt.NDArray[np.int64] = field()

    @classmethod
    def zeros(cls, height: int, width: int, num_groups: int = NUM_GROUPS) -> "Moments":
        return cls(
            0,
            np.zeros((height, width)),
            np.zeros((height, width)),
            np.zeros((num_groups, height, width), np.float32),
            np.zeros(num_groups, np.int64),
        )

    def add(self, maps: npt.NDArray[np.floating]) -> None:
        """Maps (N, H, W), in order."""
        for one in maps:
            group = self.count % len(self.groups)
            self.groups[group] += one
            self.group_counts[group] += 1
            self.count += 1
            deviation = np.subtract(one, self.mean, dtype=np.float64)
            self.mean += deviation / self.count
            # (one - old mean) (one - new mean), in place: the maps are large.
            deviation *= deviation
            deviation *= 1 - 1 / self.count
            self.squares += deviation

    def merge(self, other: "Moments") -> None:
        """Take in what another process has seen.

        Raises:
            ValueError: its maps are of another size.
        """
        if other.count == 0:
            return
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"receptive fields of {self.mean.shape} and {other.mean.shape} pixels cannot be "
                "averaged; use pictures of one size"
            )
        count = self.count + other.count
        deviation = other.mean - self.mean
        self.squares += other.squares + deviation**2 * (self.count * other.count / count)
        self.mean += deviation * (other.count / count)
        # Dealt on where this one's cards ended, so that small groups stay even.
        order = (np.arange(len(self.groups)) + self.count) % len(self.groups)
        self.groups[order] += other.groups
        self.group_counts[order] += other.group_counts
        self.count = count

    @property
    def variance(self) -> Map:
        """(H, W), of a single map about the mean; nan with fewer than two."""
        if self.count < 2:
            return np.full_like(self.mean, np.nan)
        return self.squares / (self.count - 1)
