"""Figures of receptive fields, in the layout of SegFormer's Figure 3 and beside it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from segformer_pl.analysis.charts import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, VERMILLION
from segformer_pl.analysis.erf.extent import smallest_area_ratio
from segformer_pl.analysis.erf.full_image import RadiusMap
from segformer_pl.analysis.erf.result import ERF, LayerERF

COLORS = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, INK)
LINES = ("-", "--", ":", "-.")
DECADES = (3, 5)  # of the colour scale: least and most
ZOOM = 8  # a zoom box shows one eighth of the picture's sides
SHARES = np.concatenate([np.linspace(0.02, 0.98, 49), [0.99]])


def plot_erf(
    fields: ERF | Mapping[str, ERF], title: str = "", zoom: Sequence[str] = ("stage4", "head")
) -> Figure:
    """Rows of networks, columns of layers: the paper's Figure 3.

    Every panel is scaled to its own maximum, which stands below it, on one logarithmic scale over
    three to five decades: as many as show half of the pixels of every panel. Layers in ``zoom`` get
    a second panel with the middle eighth, where the unit's own surroundings show.

    Args:
        fields: One result, or several by the name of the row.
        title: What was measured: weights, pictures.
        zoom: Layers to enlarge, where they are there.

    Raises:
        ValueError: there is nothing to draw, or a map is signed (see :func:`plot_signed`).
    """
    rows = {"": fields} if isinstance(fields, ERF) else dict(fields)
    if not rows:
        raise ValueError("plot_erf: there is no field to draw")
    num_columns = max(len(erf.layers) for erf in rows.values())
    zoomed = any(name in erf.layers for erf in rows.values() for name in zoom)
    shape = next(iter(next(iter(rows.values())).layers.values())).mean.shape
    aspect = min(max(shape[0] / shape[1], 0.5), 1.5)
    panel = 2.35
    heights = [1.0, 0.8] * len(rows) if zoomed else [1.0] * len(rows)
    figure = Figure(
        figsize=(panel * num_columns + 1.1, panel * aspect * sum(heights) + 1.0 * len(rows) + 0.5),
        layout="constrained",
    )
    grid = figure.subplots(len(heights), num_columns, squeeze=False, height_ratios=heights)
    picture: Any = None
    floor = _floor([field for erf in rows.values() for field in erf.layers.values()])
    for number, (label, erf) in enumerate(rows.items()):
        lines = grid[2 * number : 2 * number + 2] if zoomed else grid[number : number + 1]
        for axes in np.asarray(lines).ravel():
            axes.set_axis_off()
        for column, (name, field) in enumerate(erf.layers.items()):
            axes = lines[0][column]
            picture = _draw(axes, field, floor)
            axes.set_title(_title(field), fontsize=8)
            if column == 0:
                axes.set_ylabel(f"{label}\n{_offset('below', field)}".strip(), fontsize=8)
            if zoomed and name in zoom and field.pixel is not None:
                color = VERMILLION if name == "stage4" else "#56B4E9"
                _draw_zoom(axes, lines[1][column], field, floor, color)
    figure.colorbar(
        picture,
        ax=grid.ravel().tolist(),
        label="gradient / its maximum in the panel (log scale)",
        shrink=min(1.0, 0.9 / len(rows) + 0.2),
        extend="min",
        aspect=30,
    )
    head = "Effective receptive field"
    figure.suptitle(f"{head}\n{title}" if title else head, fontsize=10)
    return figure


def _offset(direction: str, field: LayerERF) -> str:
    if field.pixel is None:
        return "row (pixels)" if direction == "below" else "column (pixels)"
    return f"pixels {direction} the unit"


def _extent(field: LayerERF) -> tuple[float, float, float, float]:
    """Of imshow: pixel centres at whole offsets from the unit's pixel."""
    height, width = field.mean.shape
    row, column = field.pixel or (0, 0)
    return -column - 0.5, width - column - 0.5, height - row - 0.5, -row - 0.5


def _relative(field: LayerERF) -> npt.NDArray[np.float64]:
    values = field._positive()
    return values / max(values.max(), np.finfo(np.float64).tiny)


def _floor(fields: Sequence[LayerERF]) -> float:
    """Lowest value of the colour scale."""
    medians = [np.median(values[values > 0]) for values in map(_relative, fields) if values.any()]
    least, most = DECADES
    return 10.0 ** -min(max(math.ceil(-math.log10(min(medians, default=1.0))), least), most)


def _title(field: LayerERF) -> str:
    half = f"{field.name}\nhalf of it in {100 * field.area_ratio(0.5):.2g} % of the area"
    return (
        half if field.pixel is None else f"{half},\nwithin {field.radius(0.5):.0f} px of the unit"
    )


def _draw(axes: Axes, field: LayerERF, floor: float) -> Any:
    axes.set_axis_on()
    picture = axes.imshow(
        _relative(field),
        norm=LogNorm(floor, 1, clip=True),
        cmap="magma",
        extent=_extent(field),
        interpolation="nearest",
    )
    axes.set_xlabel(
        f"{_offset('right of', field)}\nmaximum {field.mean.max():.2g}", fontsize=7, color=INK
    )
    axes.tick_params(labelsize=7, length=2)
    return picture


def _draw_zoom(whole: Axes, axes: Axes, field: LayerERF, floor: float, color: str) -> None:
    """The middle of a panel, in its colours, framed in the colour of the box it comes from."""
    reach = max(max(field.mean.shape) / ZOOM / 2, 8)
    whole.add_patch(
        Rectangle(
            (-reach, -reach), 2 * reach, 2 * reach, fill=False, edgecolor=color, linewidth=1.2
        )
    )
    _draw(axes, field, floor)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(reach, -reach)
    for spine in axes.spines.values():
        spine.set_edgecolor(color)
        spine.set_linewidth(1.8)
    axes.tick_params(labelsize=7, length=2)
    axes.set_xlabel("the same, enlarged (pixels)", fontsize=7)


def plot_radial_profiles(fields: ERF | Mapping[str, ERF], title: str = "") -> Figure:
    """Mean of the map over rings about the unit, relative to the ring of the unit, and the share
    of the field within a radius. Bands: 95 % bootstrap intervals over pictures."""
    rows = {"": fields} if isinstance(fields, ERF) else dict(fields)
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (label, erf) in enumerate(rows.items()):
        for index, (name, field) in enumerate(erf.layers.items()):
            profile = field.radial_profile()
            style: dict[str, Any] = {
                "color": COLORS[index % len(COLORS)],
                "linestyle": LINES[number % len(LINES)],
                "linewidth": 1.5,
            }
            text = f"{label} {name}".strip()
            left.plot(profile.radius, profile.mean / profile.mean.max(), label=text, **style)
            right.plot(profile.radius, 100 * profile.energy, label=text, **style)
            low, high = _band(field, lambda erf: 100 * erf.radial_profile().energy)
            right.fill_between(profile.radius, low, high, color=style["color"], alpha=0.15, lw=0)
    left.set_yscale("log")
    left.set_ylim(10.0 ** -DECADES[1], 1.3)
    left.set_ylabel("mean over a ring / its maximum (log scale)")
    right.set_ylabel("share of the field within the radius (%)")
    right.set_ylim(0, 101)
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.set_xlabel("distance from the unit (pixels)")
        _grid(axes)
    right.legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(title or "Radial profile of the effective receptive field", fontsize=10)
    return figure


def plot_area_ratios(fields: ERF | Mapping[str, ERF], title: str = "") -> Figure:
    """Area against the share of the field that it holds, by both published definitions."""
    rows = {"": fields} if isinstance(fields, ERF) else dict(fields)
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    squares = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    for number, (label, erf) in enumerate(rows.items()):
        for index, (name, field) in enumerate(erf.layers.items()):
            style: dict[str, Any] = {
                "color": COLORS[index % len(COLORS)],
                "linestyle": LINES[number % len(LINES)],
                "linewidth": 1.5,
                "label": f"{label} {name}".strip(),
            }
            areas = [100 * smallest_area_ratio(field._positive(), share) for share in SHARES]
            left.plot(100 * SHARES, areas, **style)
            if field.pixel is not None:
                areas = [100 * field.area_ratio(share, "square") for share in squares]
                right.plot(100 * np.array(squares), areas, marker="o", markersize=3, **style)
    left.set_title("smallest area, free of scale", fontsize=9)
    right.set_title("centred square, log-transformed (RepLKNet)", fontsize=9)
    left.set_ylabel("share of the picture's area (%, log scale)")
    left.set_yscale("log")
    left.set_ylim(top=130)
    for axes in (left, right):
        axes.set_xlabel("share of the field (%)")
        axes.set_xlim(0, 101)
        _grid(axes)
    right.legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(title or "Area of the effective receptive field", fontsize=10)
    return figure


def plot_difference(first: ERF, second: ERF, names: tuple[str, str], title: str = "") -> Figure:
    """Where the field of one network is stronger than that of another, each with sum 1.

    Raises:
        ValueError: they have no layer in common, were measured with different recipes, or on
            pictures of different sizes.
    """
    if first.recipe != second.recipe:
        raise ValueError(
            f"these fields were measured differently ({first.recipe} and {second.recipe}) and have "
            "no difference; measure both alike"
        )
    common = [name for name in first.layers if name in second.layers]
    if not common:
        raise ValueError(
            f"these fields have no layer in common: {', '.join(first.layers)} and "
            f"{', '.join(second.layers)}"
        )
    figure = Figure(figsize=(2.4 * len(common) + 1.3, 3.2), layout="constrained")
    grid = figure.subplots(1, len(common), squeeze=False)[0]
    differences = []
    for name in common:
        a, b = first[name]._positive(), second[name]._positive()
        differences.append((a / a.sum() - b / b.sum()) * a.size)
    limit = max(float(np.abs(difference).max()) for difference in differences) or 1.0
    picture: Any = None
    for axes, name, difference in zip(grid, common, differences):
        picture = axes.imshow(
            difference,
            norm=SymLogNorm(linthresh=limit * 10.0 ** -DECADES[0], vmin=-limit, vmax=limit),
            cmap="PuOr_r",
            extent=_extent(first[name]),
            interpolation="nearest",
        )
        moved = np.abs(difference).sum() / difference.size / 2
        axes.set_title(f"{name}\n{100 * moved:.2g} % of the field lies elsewhere", fontsize=8)
        axes.set_xlabel(_offset("right of", first[name]), fontsize=7)
        axes.tick_params(labelsize=7, length=2)
    grid[0].set_ylabel(_offset("below", first[common[0]]), fontsize=7)
    bar = figure.colorbar(
        picture,
        ax=list(grid),
        shrink=0.9,
        label="difference of densities\n(1: density of an even field)",
    )
    powers = [10.0**p for p in (-1, 0, 1, 2) if 10.0**p <= limit]
    bar.set_ticks([*(-p for p in reversed(powers)), 0.0, *powers])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    legend = f"orange: more in {names[0]}; purple: more in {names[1]}"
    figure.suptitle(f"{title}\n{legend}" if title else legend, fontsize=10)
    return figure


def plot_radius_map(
    found: RadiusMap, image: npt.NDArray[np.floating] | None = None, title: str = ""
) -> Figure:
    """The radius of every unit, beside the picture.

    Args:
        found: From ``radius_map``.
        image: (H, W, 3) in 0 to 1.
        title: What was measured.
    """
    num_columns = 1 if image is None else 2
    figure = Figure(figsize=(4.2 * num_columns, 3.6), layout="constrained")
    grid = figure.subplots(1, num_columns, squeeze=False)[0]
    height, width = found.size
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    if image is not None:
        grid[0].imshow(np.clip(image, 0, 1), extent=extent)
        grid[0].set_title("picture", fontsize=9)
    drawn = grid[-1].imshow(found.radius, cmap="viridis", extent=extent, interpolation="nearest")
    grid[-1].set_title(f"units of {found.layer}", fontsize=9)
    for axes in grid:
        axes.set_xlabel("column (pixels)", fontsize=8)
        axes.tick_params(labelsize=7)
    grid[0].set_ylabel("row (pixels)", fontsize=8)
    figure.colorbar(drawn, ax=grid[-1], label="radius of the receptive field (pixels)")
    figure.suptitle(title or "Root mean square radius, squared gradient", fontsize=10)
    return figure


def plot_signed(erf: ERF, title: str = "") -> Figure:
    """Maps of signed gradients, one panel a layer: what raises the unit and what lowers it."""
    figure = Figure(figsize=(2.6 * len(erf.layers) + 1.1, 3.4), layout="constrained")
    grid = figure.subplots(1, len(erf.layers), squeeze=False)[0]
    picture: Any = None
    for axes, (name, field) in zip(grid, erf.layers.items()):
        limit = float(np.abs(field.mean).max()) or 1.0
        picture = axes.imshow(
            field.mean / limit,
            norm=SymLogNorm(linthresh=10.0 ** -DECADES[0], vmin=-1, vmax=1),
            cmap="PuOr_r",
            extent=_extent(field),
            interpolation="nearest",
        )
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(f"{_offset('right of', field)}\nmaximum {limit:.2g}", fontsize=7)
        axes.tick_params(labelsize=7, length=2)
    grid[0].set_ylabel(_offset("below", next(iter(erf.layers.values()))), fontsize=7)
    figure.colorbar(
        picture, ax=list(grid), shrink=0.8, label="gradient / largest (symmetric log scale)"
    )
    figure.suptitle(title or "Signed gradient of the unit", fontsize=10)
    return figure


def _band(field: LayerERF, curve: Any) -> tuple[Any, Any]:
    """Bootstrap interval of a curve over pictures, at every point."""
    if len(field.groups) < 2:
        return curve(field), curve(field)
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(field.groups), size=len(field.groups)) for _ in range(50))
    curves = [curve(field._resampled(drawn)) for drawn in draws]
    low, high = np.nanquantile(curves, [0.025, 0.975], axis=0)
    return low, high


def _grid(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
