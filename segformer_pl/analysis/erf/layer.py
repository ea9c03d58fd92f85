"""The effective receptive field of one layer: a mean map, its uncertainty, and numbers from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from segformer_pl.analysis.erf import extent
from segformer_pl.analysis.erf.jackknife import Interval, jackknife
from segformer_pl.analysis.erf.moments import NUM_GROUPS, Moments
from segformer_pl.analysis.erf.units import Position, unit_at_position
from segformer_pl.errors import UserError, counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerERF:
    """The effective receptive field of one layer.

    Attributes:
        name: Name of the layer.
        mean: (H, W) float64, map averaged over the images, not normalised.
        variance: (H, W), variance of the map of a single image; nan with one image.
        groups: (G, H, W), mean over each group of images, for intervals.
        group_counts: (G,), number of images in each group.
        position: (row, column) of the measured unit in pixels, from which distances count, see
            :func:`~segformer_pl.analysis.erf.units.unit_position`. None for a class.
        grid: Height and width of the feature map in units.
        gradient: ``abs``, ``relu`` or ``signed``.
    """

    name: str
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]
    groups: npt.NDArray[np.float32]
    group_counts: npt.NDArray[np.int64]
    position: Position | None
    grid: tuple[int, int]
    gradient: str

    def __repr__(self) -> str:
        height, width = self.mean.shape
        unit = "units of a class" if self.position is None else "unit at ({:g}, {:g})"
        unit = unit.format(*self.position or ())
        images = f"{counted(self.num_images, 'image')} of {height}x{width} pixels"
        return f"LayerERF({self.name!r}, {unit}, {self.gradient} gradient, {images})"

    def plot(self, title: str = "", image: npt.NDArray[np.floating] | None = None) -> "Figure":
        """Draw the map, as :meth:`~segformer_pl.analysis.erf.ERF.plot` draws those of all layers.

        Args:
            title: What was measured: weights, images.
            image: (H, W, 3) in 0 to 1, shown beneath the map; not for signed gradients.

        Raises:
            UserError: The image has another size than the map.
        """
        from segformer_pl.analysis.erf.result import ERF  # which imports this module

        return ERF({self.name: self}, self.num_images).plot(title, image)

    @classmethod
    def from_moments(
        cls,
        name: str,
        moments: Moments,
        position: Position | None,
        grid: tuple[int, int],
        gradient: str,
    ) -> "LayerERF":
        used = moments.group_counts > 0
        counts = moments.group_counts[used]
        groups = np.asarray(moments.groups[used] / counts[:, None, None], np.float32)
        return cls(name, moments.mean, moments.variance, groups, counts, position, grid, gradient)

    def moments(self) -> Moments:
        """Return the sums that :meth:`from_moments` was given."""
        height, width = self.mean.shape
        moments = Moments.zeros(height, width, max(NUM_GROUPS, len(self.groups)))
        moments.count = self.num_images
        moments.mean += self.mean
        moments.squares += np.nan_to_num(self.variance) * (self.num_images - 1)
        moments.groups[: len(self.groups)] = self.groups * self.group_counts[:, None, None]
        moments.group_counts[: len(self.groups)] = self.group_counts
        return moments

    @property
    def num_images(self) -> int:
        return int(self.group_counts.sum())

    @property
    def standard_error(self) -> npt.NDArray[np.float64]:
        """(H, W), standard error of the mean; nan with one image."""
        return np.sqrt(self.variance / self.num_images)

    @property
    def unsigned_map(self) -> npt.NDArray[np.float64]:
        """(H, W), the mean map, if it can have an extent.

        Raises:
            UserError: The map is one of signed gradients.
        """
        if self.gradient == "signed":
            raise UserError(
                "a signed map has no extent, because negative gradients would cancel positive "
                "ones; measure with gradient='abs' or 'relu'"
            )
        return self.mean

    def area_ratio(self, share: float, definition: extent.AreaDefinition = "smallest") -> float:
        """Return the area that holds ``share`` of the mean map, as a share of the image.

        The area depends on how many images were averaged; :meth:`interval` corrects for that.

        Args:
            share: Share of the map, such as 0.5.
            definition: ``smallest``, the strongest pixels, independent of scale
                (:func:`.extent.smallest_area_ratio`); ``square``, RepLKNet's square about the
                position of the unit (:func:`.extent.square_area_ratio`); ``replknet``, the number
                of RepLKNet's published script, whose square is about the middle pixel of the image
                and whose map is measured with ``gradient="relu"`` (and ``reduction="relu"``, the
                default). The last two agree where the unit is at that pixel.

        Raises:
            UserError: The share is not between 0 and 1, the map is signed, ``square`` or
                ``replknet`` is asked of a class, or ``replknet`` of a map that the script does not
                measure: another gradient, another unit, a map that is not square.
        """
        _check_share("area_ratio", share)
        if definition == "smallest":
            return extent.smallest_area_ratio(self.unsigned_map, share)
        if definition == "square":
            return extent.square_area_ratio(self.unsigned_map, share, self._center())
        if definition == "replknet":
            if (reason := self.replknet_mismatch()) is not None:
                raise UserError(
                    f"definition='replknet': {reason}; measure with these settings, or take "
                    "'square'"
                )
            return extent.square_area_ratio(self.unsigned_map, share)
        raise UserError(f"definition={definition!r}: give 'smallest', 'square' or 'replknet'")

    def replknet_mismatch(self) -> str | None:
        """Return why RepLKNet's script does not measure this map, or None if it does."""
        if self.gradient != "relu":
            return f"the published script takes gradient='relu', and this is {self.gradient!r}"
        height, width = self.mean.shape
        if height != width:
            return f"the published script is for square maps, and this one has {height}x{width}"
        unit = unit_at_position(self._center(), (height, width), self.grid)
        middle = (self.grid[0] // 2, self.grid[1] // 2)
        if unit != middle:
            return f"the published script measures unit {middle}, and this is unit {unit}"
        return None

    def radial_profile(self) -> extent.RadialProfile:
        """See :func:`.extent.radial_profile`."""
        return extent.radial_profile(self.unsigned_map, self._center())

    def radius(self, share: float = 0.5) -> float:
        """Return the radius in pixels of the disc about the unit that holds ``share`` of the map.

        Raises:
            UserError: The share is not between 0 and 1.
        """
        _check_share("radius", share)
        return extent.energy_radius(self.unsigned_map, share, self._center())

    def rms_radius(self) -> float:
        """See :func:`.extent.rms_radius`."""
        return extent.rms_radius(self.unsigned_map, self._center())

    def gaussian_fit(self) -> extent.GaussianFit:
        """See :func:`.extent.gaussian_fit`."""
        return extent.gaussian_fit(self.unsigned_map, self._center())

    def anisotropy(self) -> extent.Anisotropy:
        """See :func:`.extent.anisotropy`."""
        return extent.anisotropy(self.unsigned_map)

    def centroid_shift(self) -> tuple[float, float]:
        """See :func:`.extent.centroid_shift`."""
        return extent.centroid_shift(self.unsigned_map, self._center())

    def lattice_share(self, period: int = 32) -> float:
        """See :func:`.extent.lattice_share`."""
        return extent.lattice_share(self.unsigned_map, period, self._center())

    def center_share(self, radius: float = 16.0) -> float:
        """Return the share of the map within ``radius`` pixels of the unit.

        Raises:
            UserError: The radius is negative.
        """
        if not radius >= 0:
            raise UserError(f"center_share within {radius} pixels: give a radius of at least 0")
        near = extent.distances(self.mean.shape, self._center()) <= radius
        total = self.unsigned_map.sum()
        return float(self.mean[near].sum() / total) if total > 0 else float("nan")

    def interval(self, number: Callable[["LayerERF"], float], level: float = 0.95) -> Interval:
        """Return a number of this receptive field with its confidence interval over images.

        Both come from the jackknife (:mod:`~segformer_pl.analysis.erf.jackknife`). The value is
        bias-corrected for the number of images, so it can differ a little from the number of the
        mean map, and it is the middle of the interval. With fewer than about 16 images some bias is
        left in areas. Other random weights and other trainings are not covered.

        Args:
            number: Function of a result, such as ``lambda erf: erf.radius(0.5)`` or
                ``LayerERF.rms_radius``.
            level: Confidence level.

        Raises:
            UserError: The level is not between 0 and 1.
        """
        return self.intervals({"": number}, level)[""]

    def intervals(
        self, numbers: Mapping[str, Callable[["LayerERF"], float]], level: float = 0.95
    ) -> dict[str, Interval]:
        """Return several numbers with their intervals, see :meth:`interval`."""
        band = self.band(lambda erf: [number(erf) for number in numbers.values()], level)
        return {
            name: Interval(*(float(bound[index]) for bound in band))
            for index, name in enumerate(numbers)
        }

    def band(self, curve: Callable[["LayerERF"], Any], level: float = 0.95) -> Interval:
        """Return a curve (K,) with its interval at every point, see :meth:`interval`."""
        if not 0 < level < 1:
            raise UserError(f"level={level}: give a confidence between 0 and 1, such as 0.95")
        groups = np.arange(len(self.groups))
        left_out = groups if len(groups) > 1 else groups[:0]
        leave_one_out = [curve(self._average_of(groups != group)) for group in left_out]
        return jackknife(curve(self), leave_one_out, self.group_counts, level)

    def _average_of(self, used: npt.NDArray[np.bool_]) -> "LayerERF":
        """Return the receptive field averaged over some of the groups (G,)."""
        weights = used * self.group_counts
        mean = np.tensordot((weights / weights.sum()).astype(np.float32), self.groups, axes=1)
        return replace(self, mean=mean)

    def _center(self) -> Position:
        if self.position is None:
            raise UserError(
                "the receptive field of all units of a class has no centre to measure from; see "
                "radius_map for the radius of every unit"
            )
        return self.position


def _check_share(what: str, share: float) -> None:
    if not 0 < share < 1:
        raise UserError(f"{what} of {share}: give a share between 0 and 1")
