"""Figures of receptive fields: SegFormer's Figure 3, radial profiles, areas, differences."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullLocator

from segformer_pl.analysis.erf.captions import label_rows
from segformer_pl.analysis.erf.extent import smallest_area_ratio
from segformer_pl.analysis.erf.full_image import RadiusMap
from segformer_pl.analysis.erf.layer import LayerERF
from segformer_pl.analysis.erf.panels import (
    FONT,
    WIDTH,
    CurveFigure,
    MapFigure,
    PanelGroup,
    make_curve_figure,
    make_map_figure,
    set_ticks,
    wrap,
)
from segformer_pl.analysis.erf.result import ERF
from segformer_pl.analysis.erf.units import Position
from segformer_pl.analysis.fonts import fit_text
from segformer_pl.analysis.style import INK, SKY
from segformer_pl.errors import UserError

DECADES = (3, 5)  # fewest and most decades of the colour scale
ZOOM = 8  # an enlarged panel shows one eighth of the longer side of the image
LEAST_REACH = 8.5  # but at least this many pixels on either side of the unit
SHARES = np.concatenate([np.linspace(0.02, 0.98, 49), [0.99]])
SQUARE_SHARES = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
ZERO = "zero everywhere"
OPACITY = 0.75  # at most, of a map over an image
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # of R, G and B (ITU-R BT.709)


def plot_erf(
    results: ERF | Mapping[str, ERF],
    title: str = "",
    zoom: Sequence[str] | None = None,
    image: npt.NDArray[np.floating] | None = None,
) -> Figure:
    """Draw networks as rows and layers as columns, like SegFormer's Figure 3.

    Every panel is scaled to its own maximum, which its title gives. All panels share one
    logarithmic scale over three to five decades: as many as show half of the pixels of every panel.
    A second row enlarges the surroundings of the unit, an eighth of the longer side of the image
    but at least 17 pixels. Images of less than four times that size need no such row.

    Args:
        results: One result, or several by the name of the row. The heading of a row says where the
            results differ in their settings or in the number of images.
        title: What was measured: weights, images.
        zoom: Layers to enlarge; all by default, none if it is empty.
        image: (H, W, 3) in 0 to 1, shown in grey beneath the maps, which are the more transparent
            the smaller they are. A cross marks the unit of every layer.

    Raises:
        UserError: There is nothing to draw, a map is signed (see :func:`plot_signed`), or the image
            has another size than the maps.
    """
    rows = label_rows(results, "plot_erf")
    shape = _first(rows).mean.shape
    beneath = None if image is None else _grey(image, shape)
    floor = _floor([layer for erf in rows.values() for layer in erf.layers.values()])
    groups = []
    for label, erf in rows.items():
        names = erf.layers if zoom is None else [name for name in erf.layers if name in zoom]
        has_zoom = any(_can_zoom(erf[name]) for name in names)
        titles = [_title(layer) for layer in erf.layers.values()]
        groups.append(PanelGroup(label, titles, _axis_labels(erf.layers.values()), has_zoom))
    note = (
        "gradient relative to the largest of its panel (log scale)\n"
        "half: of the sum of the gradient; largest: per unit of the normalised image"
    )
    figure = make_map_figure(_with_title("Effective receptive field", title), groups, shape, note)
    drawn: Any = None
    for erf, panels, zooms in zip(rows.values(), figure.panels, figure.zooms):
        origin = _origin(erf.layers.values())
        for index, (axes, layer) in enumerate(zip(panels, erf.layers.values())):
            drawn = _draw(axes, layer, floor, origin, beneath)
            if origin is None or beneath is not None:
                _mark_unit(axes, layer, origin)
            if zooms and (zoom is None or layer.name in zoom):
                _draw_zoom(axes, zooms[index], layer, floor, origin, beneath)
                if zooms[index].get_ylim() != zooms[0].get_ylim():
                    zooms[index].set_yticks([])  # only the first one has tick labels
            elif zooms:
                zooms[index].set_axis_off()
    figure.add_colorbar(drawn, extend="min")
    return fit_text(figure.figure)


def _with_title(what: str, title: str) -> str:
    return f"{what}: {title}" if title else what


def _first(rows: Mapping[str, ERF]) -> LayerERF:
    return next(layer for erf in rows.values() for layer in erf.layers.values())


def _origin(layers: Iterable[LayerERF]) -> Position | None:
    """Return the pixel from which the axes of panels count.

    It is the position of the unit where the layers have one in common, and otherwise None, which
    stands for the corner of the image.
    """
    positions = {layer.position for layer in layers}
    return positions.pop() if len(positions) == 1 else None


def _axis_labels(layers: Iterable[LayerERF]) -> tuple[str, str]:
    """Return the labels of the horizontal and the vertical axis."""
    layers = list(layers)
    if _origin(layers) is not None:
        return "pixels to the right of the unit", "pixels below the unit"
    mark = "; +: the unit" if any(layer.position is not None for layer in layers) else ""
    return f"column (pixels{mark})", "row (pixels)"


def _extent(layer: LayerERF, origin: Position | None) -> tuple[float, float, float, float]:
    """Return the extent of imshow that puts pixel centres at their offsets from the origin."""
    height, width = layer.mean.shape
    row, column = origin or (0, 0)
    return -column - 0.5, width - column - 0.5, height - row - 0.5, -row - 0.5


def _mark_unit(axes: Axes, layer: LayerERF, origin: Position | None) -> None:
    if layer.position is not None:
        row, column = (at - zero for at, zero in zip(layer.position, origin or (0, 0)))
        style: dict[str, Any] = {"color": SKY, "markersize": 6, "markeredgewidth": 1}
        (mark,) = axes.plot(column, row, marker="+", clip_on=False, **style)
        mark.set_path_effects([withStroke(linewidth=2.4, foreground=INK)])


def _relative(layer: LayerERF) -> npt.NDArray[np.float64]:
    values = layer.unsigned_map
    return values / max(values.max(), np.finfo(np.float64).tiny)


def _floor(layers: Sequence[LayerERF]) -> float:
    """Return the lowest value of the colour scale."""
    medians = [np.median(values[values > 0]) for values in map(_relative, layers) if values.any()]
    least, most = DECADES
    return 10.0 ** -min(max(math.ceil(-math.log10(min(medians, default=1.0))), least), most)


def _title(layer: LayerERF) -> str:
    if not layer.unsigned_map.any():
        return f"{layer.name}\n{ZERO}"
    # The bias-corrected estimates of the table, which hardly depend on the number of images.
    area = layer.interval(lambda erf: erf.area_ratio(0.5)).value
    half = f"half in {100 * area:.2g} % of area"
    if layer.position is not None:
        half += f"\nand within {_pixels(layer.interval(lambda erf: erf.radius(0.5)).value)}"
    return f"{layer.name}\n{half}\nlargest {layer.mean.max():.2g}"


def _pixels(value: float) -> str:
    return f"{value:.1f} px" if value < 9.95 else f"{value:.0f} px"


def _grey(image: npt.NDArray[np.floating], shape: tuple[int, ...]) -> npt.NDArray[np.floating]:
    """Return the lightness (H, W) of an image, brightened, so that dark maps show on it."""
    if image.shape != (*shape, 3):
        raise UserError(
            f"image: give one of the maps' size, ({shape[0]}, {shape[1]}, 3), not "
            f"{tuple(image.shape)}"
        )
    return 0.3 + 0.7 * np.clip(image @ LUMINANCE, 0, 1)


def _draw(
    axes: Axes,
    layer: LayerERF,
    floor: float,
    origin: Position | None,
    beneath: npt.NDArray[np.floating] | None = None,
) -> Any:
    values, opacity = _relative(layer), None
    style: dict[str, Any] = {"extent": _extent(layer, origin), "interpolation": "nearest"}
    if beneath is not None:
        axes.imshow(beneath, cmap="gray", vmin=0, vmax=1, **style)
        # Transparent at the floor of the logarithmic scale, steady from its middle up
        depth = np.log(np.maximum(values, floor)) / np.log(floor)
        opacity = OPACITY * np.clip(2 - 2 * depth, 0, 1)
    norm = LogNorm(floor, 1, clip=True)
    drawn = axes.imshow(values, norm=norm, cmap="magma", alpha=opacity, **style)
    set_ticks(axes)
    return drawn


def _reach(shape: tuple[int, ...]) -> float:
    """Return how many pixels an enlarged panel shows on either side of the unit."""
    return max(max(shape) / ZOOM / 2, LEAST_REACH)


def _can_zoom(layer: LayerERF) -> bool:
    shape = layer.mean.shape
    is_visible = layer.position is not None and bool(layer.unsigned_map.any())
    return is_visible and max(shape) >= 8 * _reach(shape) and min(shape) >= 2 * _reach(shape)


def _draw_zoom(
    whole: Axes,
    axes: Axes,
    layer: LayerERF,
    floor: float,
    origin: Position | None,
    beneath: npt.NDArray[np.floating] | None,
) -> None:
    """Draw the surroundings of the unit in ``axes`` and frame them in ``whole``.

    Near the border of the image, the box is moved into the image.
    """
    reach = _reach(layer.mean.shape)
    left, right, bottom, top = _extent(layer, layer.position)
    x = min(max(-reach, left), right - 2 * reach)
    y = min(max(-reach, top), bottom - 2 * reach)
    corner = (x + _extent(layer, origin)[0] - left, y + _extent(layer, origin)[3] - top)
    whole.add_patch(
        Rectangle(corner, 2 * reach, 2 * reach, fill=False, edgecolor=SKY, linewidth=0.9)
    )
    _draw(axes, layer, floor, layer.position, beneath)
    axes.set_xlim(x, x + 2 * reach)
    axes.set_ylim(y + 2 * reach, y)
    set_ticks(axes)
    for spine in axes.spines.values():
        spine.set_edgecolor(SKY)
        spine.set_linewidth(1.2)


def plot_difference(first: ERF, second: ERF, names: tuple[str, str], title: str = "") -> Figure:
    """Draw where the receptive field of one network is stronger, each scaled to sum 1.

    Args:
        first: Result of the first network.
        second: Result of the second network.
        names: Names of the two networks.
        title: What was measured: weights, images.

    Raises:
        UserError: They have no layer in common, or differ in their settings.
    """
    if first.settings != second.settings:
        raise UserError(
            f"these results were measured with different settings ({first.settings} and "
            f"{second.settings}) and have no difference; measure both with the same"
        )
    common = [name for name in first.layers if name in second.layers]
    if not common:
        raise UserError(
            f"these results have no layer in common: {', '.join(first.layers)} and "
            f"{', '.join(second.layers)}"
        )
    differences, titles = [], []
    for name in common:
        maps = [erf[name].unsigned_map for erf in (first, second)]
        empty = [label for label, values in zip(names, maps) if not values.any()]
        if empty:
            differences.append(np.zeros(maps[0].shape))
            titles.append(f"{name}\n{ZERO} in {' and '.join(empty)}")
            continue
        a, b = (values / values.sum() for values in maps)
        differences.append((a - b) * a.size)
        titles.append(f"{name}\n{50 * np.abs(a - b).sum():.2g} % would move")
    note = (
        "difference of densities; 1: density of a uniform map (log scale on either side of 0)\n"
        "per cent: share of one receptive field that would have to move to make it the other"
    )
    legend = f"orange: more in {names[0]}; purple: more in {names[1]}"
    head = _with_title("Difference of receptive fields", title)
    layers = [first[name] for name in common]
    group = PanelGroup("", titles, _axis_labels(layers))
    figure = make_map_figure(f"{head}\n{legend}", [group], layers[0].mean.shape, note)
    _draw_signed(figure, differences, layers)
    return fit_text(figure.figure)


def plot_signed(erf: ERF, title: str = "") -> Figure:
    """Draw maps of signed gradients, one panel per layer: what raises the unit, what lowers it."""
    layers = list(erf.layers.values())
    limits = [float(np.abs(layer.mean).max()) for layer in layers]
    titles = [
        f"{layer.name}\n" + (f"largest {limit:.2g}" if limit else ZERO)
        for layer, limit in zip(layers, limits)
    ]
    note = (
        "gradient relative to the largest of its panel (log scale on either side of 0)\n"
        "orange raises the unit, purple lowers it; largest: per unit of the normalised image"
    )
    group = PanelGroup("", titles, _axis_labels(layers))
    head = _with_title("Signed gradient of the unit", title)
    figure = make_map_figure(head, [group], layers[0].mean.shape, note)
    relative = [layer.mean / (limit or 1.0) for layer, limit in zip(layers, limits)]
    _draw_signed(figure, relative, layers)
    return fit_text(figure.figure)


def _draw_signed(
    figure: MapFigure, maps: Sequence[npt.NDArray[np.float64]], layers: Sequence[LayerERF]
) -> None:
    """Draw maps on one symmetric scale: linear about 0, then at least two decades on either side.

    A narrow colour bar has every other tick, so that labels do not touch.
    """
    limit = max(float(np.abs(values).max()) for values in maps) or 1.0
    highest = math.floor(math.log10(limit))
    powers = [10.0**power for power in range(highest - 2, highest + 1)]
    norm = SymLogNorm(linthresh=powers[0], vmin=-limit, vmax=limit)
    drawn: Any = None
    origin = _origin(layers)
    for axes, values, layer in zip(figure.panels[0], maps, layers):
        drawn = axes.imshow(
            values, norm=norm, cmap="PuOr_r", extent=_extent(layer, origin), interpolation="nearest"
        )
        if origin is None:
            _mark_unit(axes, layer, origin)
        set_ticks(axes)
    shown = powers if figure.figure.get_figwidth() > WIDTH / 2 else powers[::2]
    ticks = [*(-power for power in reversed(shown)), 0.0, *shown]
    bar = figure.add_colorbar(drawn)
    bar.set_ticks(ticks, labels=[f"{tick:g}".replace("-", "\N{MINUS SIGN}") for tick in ticks])
    bar.ax.xaxis.set_minor_locator(NullLocator())


def plot_radial_profiles(results: ERF | Mapping[str, ERF], title: str = "") -> Figure:
    """Draw profiles about the unit, with 95 % intervals over images as bands.

    On the left is the mean over rings, relative to the largest of these means, on the right the
    share of the map within a radius.

    Args:
        results: One result, or several by name.
        title: What was measured: weights, images.

    Raises:
        UserError: There is nothing to draw, a map is signed, or a result is one of a class.
    """
    rows = label_rows(results, "plot_radial_profiles")

    def draw(left: Axes, right: Axes, layer: LayerERF, style: dict[str, Any]) -> None:
        profile = layer.radial_profile()
        left.plot(profile.radius, profile.mean / profile.mean.max(), **style)
        value, low, high = layer.band(lambda erf: 100 * erf.radial_profile().energy)
        right.plot(profile.radius, value, **style)
        right.fill_between(profile.radius, low, high, color=style["color"], alpha=0.15, lw=0)

    figure = _curves(rows, _with_title("Radial profile of the receptive field", title), draw)
    left, right = figure.left, figure.right
    left.set_yscale("log")
    left.set_ylim(min(max(0.5 * _smallest(left), 10.0 ** -DECADES[1]), 0.09), 1.3)
    left.set_ylabel("mean over a ring / largest (log scale)", fontsize=FONT)
    right.set_ylabel("share of the gradient within the radius (%)", fontsize=FONT)
    right.set_ylim(0, 101)
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.set_xlabel("distance from the unit (pixels)", fontsize=FONT)
    return fit_text(figure.figure)


def plot_area_ratios(results: ERF | Mapping[str, ERF], title: str = "") -> Figure:
    """Draw areas against the share of the gradient that they hold.

    On the left is the smallest area, on the right the smallest square about the unit, which is
    RepLKNet's except for its centre (:meth:`LayerERF.area_ratio`). Areas grow with the number of
    images: compare them at equal numbers.

    Args:
        results: One result, or several by name.
        title: What was measured: weights, images.

    Raises:
        UserError: There is nothing to draw, or a map is signed.
    """
    rows = label_rows(results, "plot_area_ratios")

    def draw(left: Axes, right: Axes, layer: LayerERF, style: dict[str, Any]) -> None:
        areas = [100 * smallest_area_ratio(layer.unsigned_map, share) for share in SHARES]
        left.plot(100 * SHARES, areas, **style)
        if layer.position is not None:
            areas = [100 * layer.area_ratio(share, "square") for share in SQUARE_SHARES]
            right.plot(100 * SQUARE_SHARES, areas, marker="o", markersize=2.5, **style)

    heads = (
        "smallest area: the strongest pixels, wherever they lie; grows\n"
        "with the number of images: compare at equal numbers",
        "smallest square about the unit, on log10(1 + gradient)\n"
        "(after RepLKNet); depends on the scale of the gradient",
    )
    figure = _curves(rows, _with_title("Area of the receptive field", title), draw, heads)
    left, right = figure.left, figure.right
    left.set_ylabel("share of the area of the image (%, log scale)", fontsize=FONT)
    for axes, shares in ((left, "gradient"), (right, "sum of logarithms")):
        axes.set_yscale("log")
        axes.set_ylim(min(0.5 * _smallest(left, right), 9), 130)
        axes.set_xlabel(f"share of the {shares} (%)", fontsize=FONT)
        axes.set_xlim(0, 101)
    return fit_text(figure.figure)


def _smallest(*panels: Axes) -> float:
    values = [float(np.min(line.get_ydata())) for axes in panels for line in axes.lines]
    return min((value for value in values if value > 0), default=1.0)


def _curves(
    rows: Mapping[str, ERF],
    title: str,
    draw: Callable[[Axes, Axes, LayerERF, dict[str, Any]], None],
    heads: tuple[str, str] = ("", ""),
) -> CurveFigure:
    """Return a figure with the curves of every layer of every network in both panels."""
    zero_in: dict[str, list[str]] = {}  # layer -> networks in which it is zero everywhere
    for label, erf in rows.items():
        for name, layer in erf.layers.items():
            zero_in.setdefault(name, []).extend([] if layer.unsigned_map.any() else [label])
    texts = {}
    for name, networks in zero_in.items():
        where = f" in {' and '.join(networks)}" if any(networks) else ""
        texts[name] = f"{name}: {ZERO}{where}" if networks else name
    figure = make_curve_figure(title, texts, list(rows), heads)
    for label, erf in rows.items():
        for name, layer in erf.layers.items():
            if label not in zero_in[name]:
                style = {"color": figure.colors[name], "linestyle": figure.lines[label], "lw": 1.2}
                draw(figure.left, figure.right, layer, style)
    return figure


def plot_radius_map(
    radii: RadiusMap, image: npt.NDArray[np.floating] | None = None, title: str = ""
) -> Figure:
    """Draw the radius of every unit, beside the image.

    Args:
        radii: Result of ``radius_map``.
        image: (H, W, 3) in 0 to 1.
        title: What was measured: weights, image.
    """
    num_columns = 1 if image is None else 2
    page = WIDTH / 2 * num_columns
    head = _with_title("Root mean square radius of every unit, by the squared gradient", title)
    head = wrap(head, page - 0.2, FONT + 1.5)
    height, width = radii.size
    tall = min(max(height / width, 0.35), 1.5) * 2.5 + 0.8 + 0.17 * (head.count("\n") + 1)
    figure = Figure(figsize=(page, tall), layout="compressed")
    grid = figure.subplots(1, num_columns, squeeze=False)[0]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    if image is not None:
        grid[0].imshow(np.clip(image, 0, 1), extent=extent)
        grid[0].set_title("image", fontsize=FONT + 1)
    drawn = grid[-1].imshow(radii.radius, cmap="viridis", extent=extent, interpolation="nearest")
    grid[-1].set_title(f"units of {radii.layer}", fontsize=FONT + 1, parse_math=False)
    for axes in grid:
        axes.set_xlabel("column (pixels)", fontsize=FONT)
        axes.tick_params(labelsize=FONT)
        set_ticks(axes)
    grid[0].set_ylabel("row (pixels)", fontsize=FONT)
    bar = figure.colorbar(drawn, ax=grid[-1])
    bar.set_label("radius of the receptive field (pixels)", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    plain: dict[str, Any] = {"parse_math": False}
    figure.suptitle(head, fontsize=FONT + 1.5, **plain)
    return fit_text(figure)
