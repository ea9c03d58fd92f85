"""Figures of receptive fields, in the layout of SegFormer's Figure 3 and beside it."""

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

from segformer_pl.analysis.erf.extent import smallest_area_ratio
from segformer_pl.analysis.erf.full_image import RadiusMap
from segformer_pl.analysis.erf.result import ERF, LayerERF
from segformer_pl.analysis.erf.sheet import (
    FONT,
    WIDTH,
    Block,
    Curves,
    Sheet,
    make_curves,
    make_sheet,
    set_ticks,
    wrap,
)
from segformer_pl.analysis.erf.words import rows_of
from segformer_pl.analysis.style import INK, SKY

DECADES = (3, 5)  # of the colour scale: least and most
ZOOM = 8  # a zoom box shows one eighth of the picture's longer side
LEAST_REACH = 8.5  # but not less than this many pixels to either side
SHARES = np.concatenate([np.linspace(0.02, 0.98, 49), [0.99]])
SQUARES = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
NOTHING = "zero everywhere"


def plot_erf(
    fields: ERF | Mapping[str, ERF], title: str = "", zoom: Sequence[str] | None = None
) -> Figure:
    """Rows of networks, columns of layers: the paper's Figure 3.

    Every panel is scaled to its own maximum, which stands above it, on one logarithmic scale over
    three to five decades: as many as show half of the pixels of every panel. A second row enlarges
    the unit's own surroundings, an eighth of the picture's longer side but at least 17 pixels;
    pictures of less than four times that need no such row.

    Args:
        fields: One result, or several by the name of the row. What was measured differently, or
            over another number of pictures, is said in the row's heading.
        title: What was measured: weights, pictures.
        zoom: Layers to enlarge; all by default, none if it is empty.

    Raises:
        ValueError: there is nothing to draw, or a map is signed (see :func:`plot_signed`).
    """
    rows = rows_of(fields, "plot_erf")
    shape = _first(rows).mean.shape
    floor = _floor([field for erf in rows.values() for field in erf.layers.values()])
    blocks = []
    for label, erf in rows.items():
        names = erf.layers if zoom is None else [name for name in erf.layers if name in zoom]
        has_zoom = any(_can_zoom(erf[name]) for name in names)
        titles = [_title(field) for field in erf.layers.values()]
        blocks.append(Block(label, titles, _labels(erf.layers.values()), has_zoom))
    note = (
        "gradient, relative to the largest of its panel (log scale)\n"
        "largest: largest gradient per unit of the normalised picture; half: of the field's sum"
    )
    sheet = make_sheet(_headed("Effective receptive field", title), blocks, shape, note)
    picture: Any = None
    for erf, panels, zooms in zip(rows.values(), sheet.panels, sheet.zooms):
        origin = _origin(erf.layers.values())
        for number, (axes, field) in enumerate(zip(panels, erf.layers.values())):
            picture = _draw(axes, field, floor, origin)
            _mark_unit(axes, field, origin)
            if zooms and (zoom is None or field.name in zoom):
                _draw_zoom(axes, zooms[number], field, floor, origin)
                if zooms[number].get_ylim() != zooms[0].get_ylim():
                    zooms[number].set_yticks([])  # labels stand at the first one alone
            elif zooms:
                zooms[number].set_axis_off()
    sheet.add_bar(picture, extend="min")
    return sheet.figure


def _headed(what: str, title: str) -> str:
    return f"{what}: {title}" if title else what


def _first(rows: Mapping[str, ERF]) -> LayerERF:
    return next(field for erf in rows.values() for field in erf.layers.values())


Origin = tuple[float, float] | None


def _origin(fields: Iterable[LayerERF]) -> Origin:
    """The pixel that the axes of panels count from: that of the unit, where they have one in
    common; otherwise None, for the picture's corner."""
    pixels = {field.pixel for field in fields}
    return pixels.pop() if len(pixels) == 1 else None


def _labels(fields: Iterable[LayerERF]) -> tuple[str, str]:
    """Of the horizontal and the vertical axis."""
    if _origin(fields) is not None:
        return "pixels to the right of the unit", "pixels below the unit"
    mark = "; +: the unit" if any(field.pixel is not None for field in fields) else ""
    return f"column (pixels{mark})", "row (pixels)"


def _extent(field: LayerERF, origin: Origin) -> tuple[float, float, float, float]:
    """Of imshow: pixel centres at their offsets from the origin."""
    height, width = field.mean.shape
    row, column = origin or (0, 0)
    return -column - 0.5, width - column - 0.5, height - row - 0.5, -row - 0.5


def _mark_unit(axes: Axes, field: LayerERF, origin: Origin) -> None:
    if origin is None and field.pixel is not None:
        row, column = field.pixel
        style: dict[str, Any] = {"color": SKY, "markersize": 6, "markeredgewidth": 1}
        (mark,) = axes.plot(column, row, marker="+", clip_on=False, **style)
        mark.set_path_effects([withStroke(linewidth=2.4, foreground=INK)])


def _relative(field: LayerERF) -> npt.NDArray[np.float64]:
    values = field._positive()
    return values / max(values.max(), np.finfo(np.float64).tiny)


def _floor(fields: Sequence[LayerERF]) -> float:
    """Lowest value of the colour scale."""
    medians = [np.median(values[values > 0]) for values in map(_relative, fields) if values.any()]
    least, most = DECADES
    return 10.0 ** -min(max(math.ceil(-math.log10(min(medians, default=1.0))), least), most)


def _title(field: LayerERF) -> str:
    if not field._positive().any():
        return f"{field.name}\n{NOTHING}"
    # The estimates of the table, which hardly depend on the number of pictures.
    half = f"half in {100 * field.interval(lambda erf: erf.area_ratio(0.5)).value:.2g} % of area"
    if field.pixel is not None:
        half += f"\nand within {_pixels(field.interval(lambda erf: erf.radius(0.5)).value)}"
    return f"{field.name}\n{half}\nlargest {field.mean.max():.2g}"


def _pixels(value: float) -> str:
    return f"{value:.1f} px" if value < 9.95 else f"{value:.0f} px"


def _draw(axes: Axes, field: LayerERF, floor: float, origin: Origin) -> Any:
    picture = axes.imshow(
        _relative(field),
        norm=LogNorm(floor, 1, clip=True),
        cmap="magma",
        extent=_extent(field, origin),
        interpolation="nearest",
    )
    set_ticks(axes)
    return picture


def _reach(shape: tuple[int, ...]) -> float:
    return max(max(shape) / ZOOM / 2, LEAST_REACH)


def _can_zoom(field: LayerERF) -> bool:
    shape = field.mean.shape
    is_seen = field.pixel is not None and bool(field._positive().any())
    return is_seen and max(shape) >= 8 * _reach(shape) and min(shape) >= 2 * _reach(shape)


def _draw_zoom(whole: Axes, axes: Axes, field: LayerERF, floor: float, origin: Origin) -> None:
    """The unit's surroundings, framed like the box that they come from, which is moved into the
    picture where the unit is near its border."""
    reach = _reach(field.mean.shape)
    left, right, bottom, top = _extent(field, field.pixel)
    x = min(max(-reach, left), right - 2 * reach)
    y = min(max(-reach, top), bottom - 2 * reach)
    corner = (x + _extent(field, origin)[0] - left, y + _extent(field, origin)[3] - top)
    whole.add_patch(
        Rectangle(corner, 2 * reach, 2 * reach, fill=False, edgecolor=SKY, linewidth=0.9)
    )
    _draw(axes, field, floor, field.pixel)
    axes.set_xlim(x, x + 2 * reach)
    axes.set_ylim(y + 2 * reach, y)
    set_ticks(axes)
    for spine in axes.spines.values():
        spine.set_edgecolor(SKY)
        spine.set_linewidth(1.2)


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
    differences, titles = [], []
    for name in common:
        maps = [erf[name]._positive() for erf in (first, second)]
        empty = [label for label, values in zip(names, maps) if not values.any()]
        if empty:
            differences.append(np.zeros(maps[0].shape))
            titles.append(f"{name}\n{NOTHING} in {' and '.join(empty)}")
            continue
        a, b = (values / values.sum() for values in maps)
        differences.append((a - b) * a.size)
        titles.append(f"{name}\n{50 * np.abs(a - b).sum():.2g} % would move")
    note = (
        "difference of densities; 1 is the density of an even field (log scale either side of 0)\n"
        "per cent: share of one field that would have to move to make it the other"
    )
    legend = f"orange: more in {names[0]}; purple: more in {names[1]}"
    head = _headed("Difference of receptive fields", title)
    fields = [first[name] for name in common]
    block = Block("", titles, _labels(fields))
    sheet = make_sheet(f"{head}\n{legend}", [block], fields[0].mean.shape, note)
    _draw_signed(sheet, differences, fields)
    return sheet.figure


def plot_signed(erf: ERF, title: str = "") -> Figure:
    """Maps of signed gradients, one panel a layer: what raises the unit and what lowers it."""
    fields = list(erf.layers.values())
    limits = [float(np.abs(field.mean).max()) for field in fields]
    titles = [
        f"{field.name}\n" + (f"largest {limit:.2g}" if limit else NOTHING)
        for field, limit in zip(fields, limits)
    ]
    note = (
        "gradient, relative to the largest of its panel (log scale either side of 0)\n"
        "orange raises the unit, purple lowers it; "
        "largest: gradient per unit of the normalised picture"
    )
    block = Block("", titles, _labels(fields))
    head = _headed("Signed gradient of the unit", title)
    sheet = make_sheet(head, [block], fields[0].mean.shape, note)
    relative = [field.mean / (limit or 1.0) for field, limit in zip(fields, limits)]
    _draw_signed(sheet, relative, fields)
    return sheet.figure


def _draw_signed(
    sheet: Sheet, maps: Sequence[npt.NDArray[np.float64]], fields: Sequence[LayerERF]
) -> None:
    """One symmetric scale for all panels: linear about 0, then two decades or more to either side,
    with ticks that do not touch."""
    limit = max(float(np.abs(values).max()) for values in maps) or 1.0
    highest = math.floor(math.log10(limit))
    powers = [10.0**power for power in range(highest - 2, highest + 1)]
    norm = SymLogNorm(linthresh=powers[0], vmin=-limit, vmax=limit)
    picture: Any = None
    origin = _origin(fields)
    for axes, values, field in zip(sheet.panels[0], maps, fields):
        picture = axes.imshow(
            values, norm=norm, cmap="PuOr_r", extent=_extent(field, origin), interpolation="nearest"
        )
        _mark_unit(axes, field, origin)
        set_ticks(axes)
    bar = sheet.add_bar(picture)
    shown = powers if sheet.figure.get_figwidth() > WIDTH / 2 else powers[::2]
    ticks = [*(-power for power in reversed(shown)), 0.0, *shown]
    bar.set_ticks(ticks, labels=[f"{tick:g}".replace("-", "\N{MINUS SIGN}") for tick in ticks])
    bar.ax.xaxis.set_minor_locator(NullLocator())


def plot_radial_profiles(fields: ERF | Mapping[str, ERF], title: str = "") -> Figure:
    """Mean of the map over rings about the unit, relative to the largest of these means, and the
    share of the field within a radius. Bands: 95 % intervals over pictures."""
    rows = rows_of(fields, "plot_radial_profiles")

    def draw(left: Axes, right: Axes, field: LayerERF, style: dict[str, Any]) -> None:
        profile = field.radial_profile()
        left.plot(profile.radius, profile.mean / profile.mean.max(), **style)
        value, low, high = field.band(lambda erf: 100 * erf.radial_profile().energy)
        right.plot(profile.radius, value, **style)
        right.fill_between(profile.radius, low, high, color=style["color"], alpha=0.15, lw=0)

    page = _curves(rows, _headed("Radial profile of the receptive field", title), draw)
    left, right = page.left, page.right
    left.set_yscale("log")
    left.set_ylim(min(max(0.5 * _smallest(left), 10.0 ** -DECADES[1]), 0.09), 1.3)
    left.set_ylabel("mean over a ring / largest (log scale)", fontsize=FONT)
    right.set_ylabel("share of the field within the radius (%)", fontsize=FONT)
    right.set_ylim(0, 101)
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.set_xlabel("distance from the unit (pixels)", fontsize=FONT)
    return page.figure


def plot_area_ratios(fields: ERF | Mapping[str, ERF], title: str = "") -> Figure:
    """Area against the share of the field that it holds: the smallest area, and the smallest
    square about the unit, which is RepLKNet's but for its centre (:meth:`LayerERF.area_ratio`).

    Averaging over more pictures fills areas in: compare at equal numbers of pictures.
    """
    rows = rows_of(fields, "plot_area_ratios")

    def draw(left: Axes, right: Axes, field: LayerERF, style: dict[str, Any]) -> None:
        areas = [100 * smallest_area_ratio(field._positive(), share) for share in SHARES]
        left.plot(100 * SHARES, areas, **style)
        if field.pixel is not None:
            areas = [100 * field.area_ratio(share, "square") for share in SQUARES]
            right.plot(100 * SQUARES, areas, marker="o", markersize=2.5, **style)

    heads = (
        "smallest area: the strongest pixels, wherever; grows with\n"
        "the number of pictures: compare at equal numbers",
        "smallest square about the unit, on log10(1 + gradient)\n"
        "(after RepLKNet); depends on the gradient's scale",
    )
    page = _curves(rows, _headed("Area of the receptive field", title), draw, heads)
    left, right = page.left, page.right
    left.set_ylabel("share of the picture's area (%, log scale)", fontsize=FONT)
    for axes, shares in ((left, "field"), (right, "sum of logarithms")):
        axes.set_yscale("log")
        axes.set_ylim(min(0.5 * _smallest(left, right), 9), 130)
        axes.set_xlabel(f"share of the {shares} (%)", fontsize=FONT)
        axes.set_xlim(0, 101)
    return page.figure


def _smallest(*panels: Axes) -> float:
    values = [float(np.min(line.get_ydata())) for axes in panels for line in axes.lines]
    return min((value for value in values if value > 0), default=1.0)


def _curves(
    rows: Mapping[str, ERF],
    title: str,
    draw: Callable[[Axes, Axes, LayerERF, dict[str, Any]], None],
    heads: tuple[str, str] = ("", ""),
) -> Curves:
    """A page with the curves of every layer of every network drawn into both panels."""
    layers: dict[str, list[str]] = {}  # with the networks where there is nothing to draw
    for label, erf in rows.items():
        for name, field in erf.layers.items():
            layers.setdefault(name, []).extend([] if field._positive().any() else [label])
    texts = {}
    for name, empty in layers.items():
        where = f" in {' and '.join(empty)}" if any(empty) else ""
        texts[name] = f"{name}: {NOTHING}{where}" if empty else name
    page = make_curves(title, texts, list(rows), heads)
    for label, erf in rows.items():
        for name, field in erf.layers.items():
            if label not in layers[name]:
                style = {"color": page.colors[name], "linestyle": page.lines[label], "lw": 1.2}
                draw(page.left, page.right, field, style)
    return page


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
    page = WIDTH / 2 * num_columns
    head = _headed("Root mean square radius of every unit, by the squared gradient", title)
    head = wrap(head, page - 0.2, FONT + 1.5)
    height, width = found.size
    tall = min(max(height / width, 0.35), 1.5) * 2.5 + 0.8 + 0.17 * (head.count("\n") + 1)
    figure = Figure(figsize=(page, tall), layout="compressed")
    grid = figure.subplots(1, num_columns, squeeze=False)[0]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    if image is not None:
        grid[0].imshow(np.clip(image, 0, 1), extent=extent)
        grid[0].set_title("picture", fontsize=FONT + 1)
    drawn = grid[-1].imshow(found.radius, cmap="viridis", extent=extent, interpolation="nearest")
    grid[-1].set_title(f"units of {found.layer}", fontsize=FONT + 1, parse_math=False)
    for axes in grid:
        axes.set_xlabel("column (pixels)", fontsize=FONT)
        axes.tick_params(labelsize=FONT)
        set_ticks(axes)
    grid[0].set_ylabel("row (pixels)", fontsize=FONT)
    bar = figure.colorbar(drawn, ax=grid[-1])
    bar.set_label("radius of the field (pixels)", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    plain: dict[str, Any] = {"parse_math": False}
    figure.suptitle(head, fontsize=FONT + 1.5, **plain)
    return figure
