"""Running mean and variance of maps, in memory that does not grow with their number.

Beside the overall mean, the maps are averaged in a fixed number of groups, assigned round-robin.
The jackknife leaves out one group after the other to get confidence intervals
(:mod:`~segformer_pl.analysis.erf.jackknife`). With seven images and three groups::

    image    0  1  2  3  4  5  6
    group    0  1  2  0  1  2  0      sizes 3, 2, 2: they differ by at most one

With no more images than groups, every group is one image.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segformer_pl.errors import UserError

NUM_GROUPS = 16


@dataclass
class Moments:
    """Running mean and variance over maps (H, W), by the updates of Welford and Chan.

    Attributes:
        count: Number of maps so far.
        mean: (H, W), 0 before the first map.
        squares: (H, W), sum of squared deviations from the mean.
        groups: (G, H, W), sum over the maps of each group.
        group_counts: (G,), number of maps in each group.
    """

    count: int
    mean: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]
    groups: npt.NDArray[np.float32]
    group_counts: npt.NDArray[np.int64]

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
        """Add maps (N, H, W), in order."""
        for one in maps:
            group = self.count % len(self.groups)
            self.groups[group] += one
            self.group_counts[group] += 1
            self.count += 1
            deviation = np.subtract(one, self.mean, dtype=np.float64)
            self.mean += deviation / self.count
            # Welford adds (one - old mean) * (one - new mean), which is this multiple of the square
            # of the first factor. Computed in place, because the maps are large.
            deviation *= deviation
            deviation *= 1 - 1 / self.count
            self.squares += deviation

    def merge(self, other: "Moments") -> None:
        """Add the maps of another rank or measurement (Chan's update).

        Raises:
            UserError: Its maps have another size.
        """
        if other.count == 0:
            return
        if other.mean.shape != self.mean.shape:
            raise UserError(
                f"receptive fields of {self.mean.shape} and {other.mean.shape} pixels cannot be "
                "averaged; use images of one size"
            )
        count = self.count + other.count
        deviation = other.mean - self.mean
        self.squares += other.squares + deviation**2 * (self.count * other.count / count)
        self.mean += deviation * (other.count / count)
        # Continue the round-robin assignment where `self` stopped, so that groups stay balanced.
        order = (np.arange(len(self.groups)) + self.count) % len(self.groups)
        self.groups[order] += other.groups
        self.group_counts[order] += other.group_counts
        self.count = count

    @property
    def variance(self) -> npt.NDArray[np.float64]:
        """(H, W), variance of a single map about the mean; nan with fewer than two maps."""
        if self.count < 2:
            return np.full_like(self.mean, np.nan)
        return self.squares / (self.count - 1)
