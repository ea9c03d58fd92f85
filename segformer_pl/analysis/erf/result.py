"""What a measurement of receptive fields gives: maps, their uncertainty, numbers, files."""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import nn

from segformer_pl.analysis.erf import extent
from segformer_pl.analysis.erf.jackknife import Estimate, jackknife
from segformer_pl.analysis.erf.moments import NUM_GROUPS, Moments
from segformer_pl.analysis.erf.units import Place, unit_at
from segformer_pl.atomic import atomic_write, atomic_write_text

FORMAT = 2
SHARES = (0.2, 0.3, 0.5, 0.99)  # those of RepLKNet's table


class Interval(NamedTuple):
    """A value with the bounds of its confidence interval; nan with one picture."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LayerERF:
    """The effective receptive field of one layer.

    Attributes:
        name: Of the layer.
        mean: (H, W), float64, the map averaged over the pictures; not normalised.
        variance: (H, W), of a single picture's map; nan with one picture.
        groups: (G, H, W), the mean over each group of pictures, for intervals.
        group_counts: (G,), pictures in each group.
        pixel: (row, column) of the measured unit's own place, from which distances count: see
            :func:`~segformer_pl.analysis.erf.units.place_of_unit`. None for a class.
        grid: (h, w) units of the layer.
        gradient: ``abs``, ``relu`` or ``signed``.
    """

    name: str
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]
    groups: npt.NDArray[np.float32]
    group_counts: npt.NDArray[np.int64]
    pixel: Place | None
    grid: tuple[int, int]
    gradient: str

    @classmethod
    def from_moments(
        cls,
        name: str,
        moments: Moments,
        pixel: Place | None,
        grid: tuple[int, int],
        gradient: str,
    ) -> "LayerERF":
        used = moments.group_counts > 0
        counts = moments.group_counts[used]
        groups = np.asarray(moments.groups[used] / counts[:, None, None], np.float32)
        return cls(name, moments.mean, moments.variance, groups, counts, pixel, grid, gradient)

    def moments(self) -> Moments:
        """The sums that this is made of."""
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
        """(H, W), of the mean; nan with one picture."""
        return np.sqrt(self.variance / self.num_images)

    # Numbers. Each checks what it needs: a signed map has no extent, a class no centre.

    def area_ratio(self, share: float, definition: extent.AreaDefinition = "smallest") -> float:
        """Share of the picture's area that holds ``share`` of the mean map.

        It depends on how many pictures were averaged; :meth:`interval` takes that off.

        Args:
            share: Such as 0.5.
            definition: ``smallest``, the strongest pixels, free of scale
                (:func:`extent.smallest_area_ratio`); ``square``, RepLKNet's square about the
                unit's own place (:func:`extent.square_area_ratio`); ``replknet``, the number of
                RepLKNet's published script, whose square is about the image's middle pixel and
                whose map is measured with ``gradient="relu"`` (and ``reduction="relu"``, the
                default). The last two agree where the unit lies on that pixel.

        Raises:
            ValueError: the share is not between 0 and 1, the map is signed, ``square`` or
                ``replknet`` is asked of a class, or ``replknet`` of what the script does not
                measure: another gradient, another unit, a map that is not square.
        """
        _check_share("area_ratio", share)
        if definition == "smallest":
            return extent.smallest_area_ratio(self._positive(), share)
        if definition == "square":
            return extent.square_area_ratio(self._positive(), share, self._center())
        if definition == "replknet":
            if (reason := self._not_replknets()) is not None:
                raise ValueError(
                    f"definition='replknet': {reason}; measure it so, or take 'square'"
                )
            return extent.square_area_ratio(self._positive(), share)
        raise ValueError(f"definition={definition!r}: give 'smallest', 'square' or 'replknet'")

    def radial_profile(self) -> extent.RadialProfile:
        """See :func:`extent.radial_profile`."""
        return extent.radial_profile(self._positive(), self._center())

    def radius(self, share: float = 0.5) -> float:
        """Radius in pixels of the disc about the unit that holds this share of the field.

        Raises:
            ValueError: the share is not between 0 and 1.
        """
        _check_share("radius", share)
        return extent.energy_radius(self._positive(), share, self._center())

    def rms_radius(self) -> float:
        """See :func:`extent.rms_radius`."""
        return extent.rms_radius(self._positive(), self._center())

    def gaussian_fit(self) -> extent.GaussianFit:
        """See :func:`extent.gaussian_fit`."""
        return extent.gaussian_fit(self._positive(), self._center())

    def anisotropy(self) -> extent.Anisotropy:
        """See :func:`extent.anisotropy`."""
        return extent.anisotropy(self._positive())

    def centroid_shift(self) -> tuple[float, float]:
        """See :func:`extent.centroid_shift`."""
        return extent.centroid_shift(self._positive(), self._center())

    def lattice_share(self, period: int = 32) -> float:
        """See :func:`extent.lattice_share`."""
        return extent.lattice_share(self._positive(), period, self._center())

    def center_share(self, radius: float = 16.0) -> float:
        """Share of the field within this many pixels of the unit."""
        if not radius >= 0:
            raise ValueError(f"center_share within {radius} pixels: give a radius of at least 0")
        near = extent.distances(self.mean.shape, self._center()) <= radius
        total = self._positive().sum()
        return float(self.mean[near].sum() / total) if total > 0 else float("nan")

    def interval(self, number: Callable[["LayerERF"], float], level: float = 0.95) -> Interval:
        """A number of this field with its confidence interval over pictures.

        Both come from the jackknife: the number is taken again with one group of pictures after
        the other left out. The value is freed of its bias of order 1/N, so it can differ a little
        from the number of the mean map, and stands in the middle of the interval; with fewer than
        about 16 pictures some bias is left in areas. Up to 16 pictures every group is one picture.
        What is not covered: other random weights, other trainings.

        Args:
            number: Such as ``lambda erf: erf.radius(0.5)`` or ``LayerERF.rms_radius``.
            level: Of confidence.

        Raises:
            ValueError: the level is not between 0 and 1.
        """
        return self.intervals({"": number}, level)[""]

    def intervals(
        self, numbers: Mapping[str, Callable[["LayerERF"], float]], level: float = 0.95
    ) -> dict[str, Interval]:
        """Several numbers with their intervals: see :meth:`interval`."""
        found = self.band(lambda erf: [number(erf) for number in numbers.values()], level)
        return {
            name: Interval(*(float(bound[index]) for bound in found))
            for index, name in enumerate(numbers)
        }

    def band(self, curve: Callable[["LayerERF"], Any], level: float = 0.95) -> Estimate:
        """A curve (K,) of this field with its interval at every point: see :meth:`interval`."""
        if not 0 < level < 1:
            raise ValueError(f"level={level}: give a confidence between 0 and 1, such as 0.95")
        groups = np.arange(len(self.groups))
        left_out = groups if len(groups) > 1 else groups[:0]
        without = [curve(self._weighted(groups != group)) for group in left_out]
        return jackknife(curve(self), without, self.group_counts, level)

    def _weighted(self, times: npt.NDArray[Any]) -> "LayerERF":
        """With every group so many times over."""
        weights = times * self.group_counts
        mean = np.tensordot((weights / weights.sum()).astype(np.float32), self.groups, axes=1)
        return LayerERF(
            self.name,
            mean,
            self.variance,
            self.groups,
            self.group_counts,
            self.pixel,
            self.grid,
            self.gradient,
        )

    def _not_replknets(self) -> str | None:
        """Why this field is not one that RepLKNet's script measures, or None if it is."""
        if self.gradient != "relu":
            return f"the published script takes gradient='relu', and this is {self.gradient!r}"
        size = self.mean.shape
        if size[0] != size[1]:
            return f"the published script is for square maps, and this one has {size[0]}x{size[1]}"
        unit = unit_at(self._center(), (size[0], size[1]), self.grid)
        middle = (self.grid[0] // 2, self.grid[1] // 2)
        if unit != middle:
            return f"the published script measures unit {middle}, and this is unit {unit}"
        return None

    def _positive(self) -> npt.NDArray[np.float64]:
        if self.gradient == "signed":
            raise ValueError(
                "a signed map has no extent, for what is negative would count against it; measure "
                "with gradient='abs' or 'relu'"
            )
        return self.mean

    def _center(self) -> Place:
        if self.pixel is None:
            raise ValueError(
                "the field of all units of a class has no centre to measure from; see "
                "radius_map for the radius of every unit"
            )
        return self.pixel


@dataclass(frozen=True)
class ERF:
    """Effective receptive fields of the layers of one network over the same pictures.

    Attributes:
        layers: By name, in order.
        num_images: Pictures averaged.
        not_finite: Names of the pictures that are not in it because a gradient was not finite.
        without_units: Names of those without a unit of the class that was asked for.
        recipe: Units, reduction, gradient, picture size: what must agree for a comparison.
        about: What was measured: model, weights, data.
        pictures: Names of those averaged.
    """

    layers: dict[str, LayerERF]
    num_images: int
    not_finite: list[str] = field(default_factory=list)
    without_units: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)

    def __getitem__(self, layer: str) -> LayerERF:
        return self.layers[layer]

    def numbers(self, level: float = 0.95) -> dict[str, dict[str, Any]]:
        """Layer -> name of the number -> value of the mean map, or ``[value, low, high]`` from
        :meth:`LayerERF.interval`, whose bounds are cut where no such number can be.

        ``area_square`` and ``area_smallest`` by share, ``area_replknet`` by share where the
        measurement is that of RepLKNet's script (see :meth:`LayerERF.area_ratio`), ``radius`` by
        share and its root mean square in pixels, and the rest of :class:`LayerERF`.
        """
        bounded: dict[str, Callable[[LayerERF], float]] = {
            "area_smallest_50": lambda erf: erf.area_ratio(0.5),
            "area_smallest_95": lambda erf: erf.area_ratio(0.95),
            "radius_50": lambda erf: erf.radius(0.5),
            "radius_95": lambda erf: erf.radius(0.95),
            "rms_radius": LayerERF.rms_radius,
            "center_share_16": LayerERF.center_share,
        }
        table: dict[str, dict[str, Any]] = {}
        for name, erf in self.layers.items():
            row: dict[str, Any] = {"units": list(erf.grid)}
            if erf.gradient == "signed":
                table[name] = row
                continue
            possible = {
                key: number
                for key, number in bounded.items()
                if erf.pixel is not None or key.startswith("area")
            }
            intervals = erf.intervals(possible, level)
            for key, (value, low, high) in intervals.items():
                most = np.inf if "radius" in key else 1.0
                # Few pictures make the bounds wide, but no share leaves 0 to 1.
                row[key] = [value, float(np.clip(low, 0, most)), float(np.clip(high, 0, most))]
            row["anisotropy"], row["anisotropy_angle"] = erf.anisotropy()
            if erf.pixel is not None:
                for share in SHARES:
                    row[f"area_square_{round(100 * share)}"] = erf.area_ratio(share, "square")
                settings = (self.recipe.get("units"), self.recipe.get("reduction"))
                if settings == ("center", "relu") and erf._not_replknets() is None:
                    for share in SHARES:
                        ratio = erf.area_ratio(share, "replknet")
                        row[f"area_replknet_{round(100 * share)}"] = ratio
                fit = erf.gaussian_fit()
                row["gaussian_sigma"], row["gaussian_r_squared"] = fit.sigma, fit.r_squared
                row["centroid_shift"] = list(erf.centroid_shift())
                row["lattice_share_32"] = erf.lattice_share()
            table[name] = row
        return table

    def save(self, path: str | Path, numbers: Mapping[str, Any] | None = None) -> list[Path]:
        """Write ``path`` with the suffixes .npz (maps) and .json (everything else).

        Args:
            path: With or without one of them.
            numbers: From :meth:`numbers`, computed if left out.

        Returns:
            The two files.
        """
        files = _files(path)
        arrays: dict[str, npt.NDArray[Any]] = {}
        layers = []
        for index, erf in enumerate(self.layers.values()):
            arrays[f"mean_{index}"] = erf.mean
            arrays[f"variance_{index}"] = erf.variance.astype(np.float32)
            arrays[f"groups_{index}"] = erf.groups
            arrays[f"group_counts_{index}"] = erf.group_counts
            layers.append(
                {
                    "name": erf.name,
                    "pixel": None if erf.pixel is None else list(erf.pixel),
                    "grid": list(erf.grid),
                    "gradient": erf.gradient,
                    "num_images": erf.num_images,
                }
            )
        with atomic_write(files[0]) as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        description = {
            "format": FORMAT,
            "about": self.about,
            "recipe": self.recipe,
            "num_images": self.num_images,
            "pictures": self.pictures,
            "not_finite": self.not_finite,
            "without_units": self.without_units,
            "layers": layers,
            "numbers": self.numbers() if numbers is None else numbers,
        }
        atomic_write_text(files[1], json.dumps(_plain(description), indent=2) + "\n")
        return files


def merge(parts: Sequence[ERF]) -> ERF:
    """One result of several over different pictures, as if measured in one go.

    Raises:
        ValueError: there is none, they were measured differently, of different layers, or of
            networks with other weights or another normalisation.
    """
    if not parts or any(part.recipe != parts[0].recipe for part in parts):
        raise ValueError("merge: give results of one recipe (units, reduction, gradient, size)")
    if any(part.layers.keys() != parts[0].layers.keys() for part in parts):
        found = " and ".join(sorted({", ".join(part.layers) for part in parts}))
        raise ValueError(f"merge: give results of the same layers, not of {found}")
    for key in ("weights_hash", "mean", "std"):
        values = {str(part.about[key]) for part in parts if key in part.about}
        if len(values) > 1:
            raise ValueError(
                f"merge: give results of one network, not of several: their {key} are "
                f"{' and '.join(sorted(values))}"
            )
    layers = {}
    for name, field_ in parts[0].layers.items():
        moments = field_.moments()
        for part in parts[1:]:
            moments.merge(part[name].moments())
        layers[name] = LayerERF.from_moments(
            name, moments, field_.pixel, field_.grid, field_.gradient
        )
    return ERF(
        layers,
        sum(part.num_images for part in parts),
        [name for part in parts for name in part.not_finite],
        [name for part in parts for name in part.without_units],
        parts[0].recipe,
        parts[0].about,
        [name for part in parts for name in part.pictures],
    )


def load_erf(path: str | Path) -> ERF:
    """What :meth:`ERF.save` wrote.

    Args:
        path: As given to it, or one of the two files.

    Raises:
        ValueError: one of the files is not there, no such file, or damaged.
    """
    files = _files(path)
    for file in files:
        if not file.is_file():
            raise ValueError(f"there is no file '{file}', and an ERF is read from .npz and .json")
    try:
        description = json.loads(files[1].read_text(encoding="utf-8"))
        if (found := description["format"]) == FORMAT:
            layers = {}
            with np.load(files[0], allow_pickle=False) as arrays:
                for index, layer in enumerate(description["layers"]):
                    layers[layer["name"]] = LayerERF(
                        layer["name"],
                        arrays[f"mean_{index}"],
                        arrays[f"variance_{index}"].astype(np.float64),
                        arrays[f"groups_{index}"],
                        arrays[f"group_counts_{index}"],
                        None if layer["pixel"] is None else tuple(layer["pixel"]),
                        tuple(layer["grid"]),
                        layer["gradient"],
                    )
            keys = ("num_images", "not_finite", "without_units", "recipe", "about", "pictures")
            return ERF(layers, **{key: description[key] for key in keys})
    except _DAMAGE as error:
        raise ValueError(
            f"'{files[0]}' and '{files[1].name}' hold no ERF, or are damaged "
            f"({type(error).__name__}); measure it again"
        ) from error
    raise ValueError(
        f"'{files[1]}' has format {found}, not {FORMAT}, whose numbers count from other places; "
        "measure it again"
    )


_DAMAGE = (
    *(KeyError, TypeError, AttributeError, ValueError, OSError, EOFError),
    *(zipfile.BadZipFile, zlib.error),
)


def _files(path: str | Path) -> list[Path]:
    """Maps and description."""
    path = Path(path)
    base = path.with_suffix("") if path.suffix in (".npz", ".json") else path
    return [base.with_name(base.name + suffix) for suffix in (".npz", ".json")]


def _check_share(what: str, share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"{what} of {share}: give a share between 0 and 1")


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names and values of all parameters and buffers, first 16 digits."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """JSON has no nan: null in its place."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value
