"""The result of a measurement: receptive fields of several layers, their numbers, their files."""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import nn

from segformer_pl.analysis.erf.layer import LayerERF
from segformer_pl.atomic import atomic_write, atomic_write_text
from segformer_pl.errors import UserError, counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 3
SHARES = (0.2, 0.3, 0.5, 0.99)  # those of RepLKNet's table


@dataclass(frozen=True)
class ERF:
    """Effective receptive fields of the layers of one network over the same images.

    Attributes:
        layers: Results by layer, in order.
        num_images: Number of images averaged.
        not_finite: Ids of the images left out because a value or a gradient was not finite.
        without_units: Ids of the images left out because they have no unit of the class.
        settings: Units, reduction, gradient and image size. Results compare only if they agree.
        about: Facts about the measurement: model, weights, data.
        image_ids: Ids of the images averaged.
    """

    layers: dict[str, LayerERF]
    num_images: int
    not_finite: list[str] = field(default_factory=list)
    without_units: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    image_ids: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        if not self.layers:
            return "ERF(no layer)"
        height, width = next(iter(self.layers.values())).mean.shape
        images = f"{counted(self.num_images, 'image')} of {height}x{width} pixels"
        return f"ERF({', '.join(self.layers)}; {images})"

    def __getitem__(self, layer: str) -> LayerERF:
        return self.layers[layer]

    def plot(self, title: str = "", image: npt.NDArray[np.floating] | None = None) -> "Figure":
        """Draw the maps of all layers side by side.

        Args:
            title: What was measured: weights, images.
            image: (H, W, 3) in 0 to 1, shown beneath the maps; not for signed gradients.

        Returns:
            The figure of :func:`.plots.plot_erf`, or :func:`.plots.plot_signed` for signed
            gradients.

        Raises:
            UserError: There is no layer, or the image has another size than the maps.
        """
        # It imports this module, and matplotlib, which a measurement does not need.
        from segformer_pl.analysis.erf.plots import plot_erf, plot_signed

        if any(layer.gradient == "signed" for layer in self.layers.values()):
            return plot_signed(self, title)
        return plot_erf(self, title, image=image)

    def numbers(self, level: float = 0.95) -> dict[str, dict[str, Any]]:
        """Return the table of all numbers: layer -> name -> value.

        A value is that of the mean map, or ``[value, low, high]`` from :meth:`LayerERF.interval`,
        with bounds clipped to the range of the number. The names are those of the methods of
        :class:`LayerERF`; ``area_smallest_50`` is ``area_ratio(0.5)``, ``area_square_50`` is
        ``area_ratio(0.5, "square")``, ``radius_50`` is ``radius(0.5)``. ``area_replknet_*`` are
        there if the settings are those of RepLKNet's script.
        """
        with_intervals: dict[str, Callable[[LayerERF], float]] = {
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
                for key, number in with_intervals.items()
                if erf.position is not None or key.startswith("area")
            }
            intervals = erf.intervals(possible, level)
            for key, (value, low, high) in intervals.items():
                # Few images make the bounds wide, but a share cannot leave 0 to 1.
                most = np.inf if "radius" in key else 1.0
                row[key] = [value, float(np.clip(low, 0, most)), float(np.clip(high, 0, most))]
            row["anisotropy"], row["anisotropy_angle"] = erf.anisotropy()
            if erf.position is not None:
                for share in SHARES:
                    row[f"area_square_{round(100 * share)}"] = erf.area_ratio(share, "square")
                settings = (self.settings.get("units"), self.settings.get("reduction"))
                if settings == ("center", "relu") and erf.replknet_mismatch() is None:
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
            path: Path with or without one of the suffixes.
            numbers: What :meth:`numbers` returned; computed by default.

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
                    "position": None if erf.position is None else list(erf.position),
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
            "settings": self.settings,
            "num_images": self.num_images,
            "image_ids": self.image_ids,
            "not_finite": self.not_finite,
            "without_units": self.without_units,
            "layers": layers,
            "numbers": self.numbers() if numbers is None else numbers,
        }
        atomic_write_text(files[1], json.dumps(_json_ready(description), indent=2) + "\n")
        return files


def merge(parts: Sequence[ERF]) -> ERF:
    """Merge results over different images into one, as if measured together.

    Raises:
        UserError: There is no result, or they differ in settings, layers, weights or
            normalisation.
    """
    if not parts or any(part.settings != parts[0].settings for part in parts):
        raise UserError("merge: give results of equal settings (units, reduction, gradient, size)")
    if any(part.layers.keys() != parts[0].layers.keys() for part in parts):
        different = " and ".join(sorted({", ".join(part.layers) for part in parts}))
        raise UserError(f"merge: give results of the same layers, not of {different}")
    for key in ("weights_hash", "mean", "std"):
        values = {str(part.about[key]) for part in parts if key in part.about}
        if len(values) > 1:
            raise UserError(
                f"merge: give results of one network, not of several: their {key} are "
                f"{' and '.join(sorted(values))}"
            )
    layers = {}
    for name, first in parts[0].layers.items():
        moments = first.moments()
        for part in parts[1:]:
            moments.merge(part[name].moments())
        layers[name] = LayerERF.from_moments(
            name, moments, first.position, first.grid, first.gradient
        )
    return ERF(
        layers,
        sum(part.num_images for part in parts),
        [name for part in parts for name in part.not_finite],
        [name for part in parts for name in part.without_units],
        parts[0].settings,
        parts[0].about,
        [name for part in parts for name in part.image_ids],
    )


def load_erf(path: str | Path) -> ERF:
    """Read what :meth:`ERF.save` wrote.

    Args:
        path: Path as given to it, or one of the two files.

    Raises:
        UserError: A file is missing, is not one of an ERF, is damaged, or has an old format.
    """
    files = _files(path)
    for file in files:
        if not file.is_file():
            raise UserError(f"there is no file '{file}', and an ERF is read from .npz and .json")
    try:
        description = json.loads(files[1].read_text(encoding="utf-8"))
        if (version := description["format"]) == 2:
            description = _from_format_2(description)
        if description["format"] == FORMAT:
            layers = {}
            with files[0].open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                for index, layer in enumerate(description["layers"]):
                    position = layer["position"]
                    layers[layer["name"]] = LayerERF(
                        layer["name"],
                        arrays[f"mean_{index}"],
                        arrays[f"variance_{index}"].astype(np.float64),
                        arrays[f"groups_{index}"],
                        arrays[f"group_counts_{index}"],
                        None if position is None else tuple(position),
                        tuple(layer["grid"]),
                        layer["gradient"],
                    )
            keys = ("num_images", "not_finite", "without_units", "settings", "about", "image_ids")
            return ERF(layers, **{key: description[key] for key in keys})
    except PermissionError as error:
        raise UserError(
            f"{error.filename!r} cannot be read ({error.strerror}); check its access rights"
        ) from error
    except _DAMAGE as error:
        raise UserError(
            f"'{files[0]}' and '{files[1].name}' hold no ERF, or are damaged "
            f"({type(error).__name__}); measure it again"
        ) from error
    raise UserError(
        f"'{files[1]}' has format {version}, and formats 2 and {FORMAT} can be read; measure it "
        "again"
    )


def _from_format_2(description: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys that format 3 renamed; the contents are the same."""
    return {
        **description,
        "format": FORMAT,
        "settings": description["recipe"],
        "image_ids": description["pictures"],
        "layers": [{**layer, "position": layer["pixel"]} for layer in description["layers"]],
    }


_DAMAGE = (
    *(KeyError, TypeError, AttributeError, ValueError, OSError, EOFError),
    *(zipfile.BadZipFile, zlib.error),
)


def _files(path: str | Path) -> list[Path]:
    """Return the file of the maps and the file of everything else."""
    path = Path(path)
    base = path.with_suffix("") if path.suffix in (".npz", ".json") else path
    return [base.with_name(base.name + suffix) for suffix in (".npz", ".json")]


def weights_hash(model: nn.Module) -> str:
    """Return the first 16 digits of SHA-256 over names and values of parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def _json_ready(value: Any) -> Any:
    """Convert to JSON types: nan becomes null, numpy numbers become Python numbers."""
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value
