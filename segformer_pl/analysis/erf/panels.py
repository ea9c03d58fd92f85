"""Figures with empty panels, for maps and for curves: sizes, axes, colour bars and legends.

Figures are as wide as the text of a two-column page (7 inches), or half as wide with one panel, and
no letter is smaller than 7 points.

Curves use matplotlib's constrained layout. Maps do not: their panels keep the aspect of the image,
so that the height of the figure follows from its content, which a layout engine takes as given.
Finding that height with constrained layout takes two passes over all panels, ten times as long as
drawing them. Instead everything is stacked from the top down, in inches::

    title
    heading of the group
     title      title      title            lines of text, wrapped to the width of a panel
    [panel ]   [panel ]   [panel ]          as high as the image is, relative to its width
    label of the horizontal axis
     [zoom]     [zoom]     [zoom]           where the group has them
    label of the enlarged panels
    =========================              colour bar
    note of the colour bar
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from segformer_pl.analysis.style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    printable,
)

WIDTH, NARROW = 7.0, 3.4  # inches: the text of a two-column page, and one of its columns
FONT = 7.0  # points
MAX_COLUMNS = 5
MAX_PANEL = 2.3  # inches, like the lengths below
LINE = 0.12  # from one line of text to the next
LEFT, RIGHT, GAP = 0.66, 0.16, 0.14  # margins, and the space between panels
TICKS = 0.19  # tick labels below a panel
BAR = 0.09  # height of the colour bar
COLORS = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, INK)
LineStyle = Literal["-", "--", ":", "-."]
LINES: tuple[LineStyle, ...] = ("-", "--", ":", "-.")
# Names of networks, files and layers are not mathematics, even with a $ in them.
PLAIN: dict[str, Any] = {"parse_math": False}


class PanelGroup(NamedTuple):
    """The panels of one network.

    Attributes:
        heading: Text above them, or empty.
        titles: Title of each panel; long lines are wrapped.
        labels: Labels of the horizontal and of the vertical axis.
        has_zoom: Whether an enlarged panel stands below each panel.
    """

    heading: str
    titles: list[str]
    labels: tuple[str, str]
    has_zoom: bool = False


@dataclass
class MapFigure:
    """A figure with empty axes.

    Attributes:
        figure: The figure.
        panels: Axes of the panels, by group.
        zooms: Axes of the enlarged panels, by group.
        bar: Axes of the colour bar.
        note: Label of the colour bar.
    """

    figure: Figure
    panels: list[list[Axes]]
    zooms: list[list[Axes]]
    bar: Axes
    note: str

    def add_colorbar(self, drawn: Any, **style: Any) -> Colorbar:
        """Draw the colour bar of what imshow returned, with its note."""
        bar = self.figure.colorbar(drawn, cax=self.bar, orientation="horizontal", **style)
        bar.ax.set_xlabel(self.note, fontsize=FONT, labelpad=3)
        return bar


class _Box(NamedTuple):
    """Position of axes in inches; ``top`` counts from the top of the figure."""

    left: float
    top: float
    width: float
    height: float


class _Text(NamedTuple):
    """Text with its position in inches, from the left and from the top of the figure."""

    x: float
    y: float
    text: str
    style: dict[str, Any]


class _MapLayout(NamedTuple):
    """Position of everything in a figure of maps, and the size that follows from it."""

    size: tuple[float, float]
    columns: int
    title: str
    note: str
    texts: list[_Text]
    panels: list[list[_Box]]
    zooms: list[list[_Box]]
    bar: _Box


def wrap(text: str, inches: float, size: float = FONT) -> str:
    """Break text into lines that fit into this width."""
    num_letters = max(int(inches * 72 / (0.53 * size)), 4)
    lines = [textwrap.wrap(printable(line, 400), num_letters) for line in text.split("\n")]
    return "\n".join(part for parts in lines for part in parts)


def _stack(
    title: str, groups: Sequence[PanelGroup], shape: tuple[int, ...], note: str
) -> _MapLayout:
    """Stack the content of a figure from the top down, as drawn above."""
    num_panels = max(len(group.titles) for group in groups)
    columns = math.ceil(num_panels / math.ceil(num_panels / MAX_COLUMNS))
    panel = min(MAX_PANEL, (WIDTH - LEFT - RIGHT + GAP) / columns - GAP)
    used = LEFT + columns * (panel + GAP) - GAP + RIGHT
    width = max(NARROW, used)
    left = LEFT + (width - used) / 2
    height = panel * min(max(shape[0] / shape[1], 0.35), 1.5)
    zoom = min(panel, max(height, 0.9))

    texts: list[_Text] = []
    boxes: list[list[_Box]] = []
    zoom_boxes: list[list[_Box]] = []
    title = wrap(title, width - 0.2, FONT + 1.5)
    top = 0.08 + LINE * 1.3 * (title.count("\n") + 1)
    middle = left + (columns * (panel + GAP) - GAP) / 2
    centered: dict[str, Any] = {"ha": "center", "va": "top"}
    above: dict[str, Any] = {"ha": "center", "va": "baseline"}  # last lines are aligned
    for group in groups:
        boxes.append([])
        zoom_boxes.append([])
        if group.heading:
            heading = wrap(group.heading, width - left - RIGHT, FONT + 1)
            texts.append(_Text(left, top + 0.06, heading, {"fontsize": FONT + 1, "va": "top"}))
            top += 0.06 + 1.2 * LINE * (heading.count("\n") + 1)
        for start in range(0, len(group.titles), columns):
            heads = [wrap(text, panel + GAP / 2) for text in group.titles[start : start + columns]]
            num_lines = max(head.count("\n") for head in heads) + 1
            top += 0.06 + LINE * num_lines
            for column, head in enumerate(heads):
                x = left + column * (panel + GAP)
                boxes[-1].append(_Box(x, top, panel, height))
                head += "\n" * (num_lines - 1 - head.count("\n"))
                texts.append(_Text(x + panel / 2, top - 0.06, head, above))
            top += height + TICKS
            texts.append(_Text(middle, top, group.labels[0], centered))
            top += LINE + 0.06
            if group.has_zoom:
                for column in range(len(heads)):
                    x = left + column * (panel + GAP) + (panel - zoom) / 2
                    zoom_boxes[-1].append(_Box(x, top, zoom, zoom))
                top += zoom + TICKS
                label = "the boxes above, enlarged (pixels from the unit)"
                texts.append(_Text(middle, top, label, centered))
                top += LINE + 0.06
    bar = min(5.0, 2 * (middle - left))
    bar_box = _Box(middle - bar / 2, top + 0.1, bar, BAR)
    note = wrap(note, 2 * min(middle, width - middle) - 0.2)
    top = bar_box.top + BAR + 0.2 + LINE * (note.count("\n") + 1) + 0.12
    return _MapLayout((width, top), columns, title, note, texts, boxes, zoom_boxes, bar_box)


def make_map_figure(
    title: str, groups: Sequence[PanelGroup], shape: tuple[int, ...], note: str
) -> MapFigure:
    """Make axes for the panels of every group, at most five side by side.

    Args:
        title: Text above everything.
        groups: Groups of panels, from top to bottom.
        shape: Height and width of the maps.
        note: Label of the colour bar.
    """
    layout = _stack(title, groups, shape, note)
    width, height = layout.size
    figure = Figure(figsize=layout.size)

    def axes_of(box: _Box) -> Axes:
        bottom = (height - box.top - box.height) / height
        axes = figure.add_axes(
            (box.left / width, bottom, box.width / width, box.height / height), anchor="N"
        )
        axes.tick_params(labelsize=FONT, length=2, pad=2)
        return axes

    style = {"fontsize": FONT + 1.5, "va": "top", **PLAIN}
    figure.suptitle(layout.title, y=1 - 0.08 / height, **style)
    for x, y, text, own in layout.texts:
        style = {"fontsize": FONT, "linespacing": 1.15, **PLAIN, **own}
        figure.text(x / width, 1 - y / height, text, **style)
    made = MapFigure(
        figure,
        [[axes_of(box) for box in row] for row in layout.panels],
        [[axes_of(box) for box in row] for row in layout.zooms],
        axes_of(layout.bar),
        layout.note,
    )
    for group, panels, zooms in zip(groups, made.panels, made.zooms):
        for row in (panels, zooms):
            for index, axes in enumerate(row):
                axes.set_label(group.titles[index])
                axes.tick_params(labelleft=index % layout.columns == 0)
        for axes in panels[:: layout.columns]:
            axes.set_ylabel(
                wrap(group.labels[1], layout.panels[0][0].height + 0.2), fontsize=FONT, labelpad=2
            )
    return made


def set_ticks(axes: Axes) -> None:
    """Set ticks at multiples of a power of two, like strides and image sizes.

    Both axes have the same step. No tick is near the left and the right edge, where its label would
    touch that of the neighbouring panel.
    """
    (left, right), vertical = axes.get_xlim(), sorted(axes.get_ylim())
    width = right - left
    step = 2.0 ** max(math.ceil(math.log2(max(width, vertical[1] - vertical[0]) / 4.2)), 0)
    for axis, low, high in (
        (axes.xaxis, left + 0.08 * width, right - 0.04 * width),
        (axes.yaxis, vertical[0], vertical[1]),
    ):
        ticks = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
        axis.set_major_locator(FixedLocator(ticks.tolist()))


@dataclass
class CurveFigure:
    """A figure of two panels for curves.

    Attributes:
        figure: The figure.
        left: Axes on the left.
        right: Axes on the right.
        colors: Colour by layer.
        lines: Line style by network.
    """

    figure: Figure
    left: Axes
    right: Axes
    colors: dict[str, str]
    lines: dict[str, LineStyle]


def make_curve_figure(
    title: str,
    layers: Mapping[str, str],
    networks: Sequence[str],
    heads: tuple[str, str] = ("", ""),
) -> CurveFigure:
    """Make two empty panels with a legend of colours and one of line styles below.

    Args:
        title: Text above both.
        layers: Text of the legend by layer.
        networks: Names of the networks; an empty one has no entry in a legend.
        heads: Titles of the left and of the right panel.
    """
    if len(layers) <= len(COLORS):
        colors = dict(zip(layers, COLORS))
    else:  # a scale, in order of depth
        shades = colormaps["viridis"](np.linspace(0, 0.92, len(layers)))
        colors = {name: to_hex(shade) for name, shade in zip(layers, shades)}
    lines = {name: LINES[index % len(LINES)] for index, name in enumerate(networks)}
    longest = max(len(text) for text in layers.values())
    columns = min(len(layers), max(int(6.6 / (0.5 + 0.055 * longest)), 1))
    by_layer = [
        Line2D([], [], color=colors[name], label=printable(text)) for name, text in layers.items()
    ]
    by_network = [
        Line2D([], [], color=INK, linestyle=line, label=wrap(name, 6.0))
        for name, line in lines.items()
        if name
    ]
    title = wrap(title, WIDTH - 0.2, FONT + 1.5)
    num_lines = math.ceil(len(by_layer) / columns) + sum(
        str(line.get_label()).count("\n") + 1 for line in by_network
    )
    height = 3.3 + 0.17 * num_lines + 0.15 * (title.count("\n") + max(map(len, heads)) // 40)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, fontsize=FONT + 1.5, **PLAIN)
    # A subfigure of its own for the first legend: two outside legends of one figure would overlap.
    inner: Any = figure.subfigures()
    _add_legend(inner, by_layer, columns)
    if by_network:
        _add_legend(figure, by_network, 1)
    left, right = inner.subplots(1, 2)
    for axes, head in zip((left, right), heads):
        axes.set_title(head, fontsize=FONT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=FONT)
    return CurveFigure(figure, left, right, colors, lines)


def _add_legend(figure: Figure | SubFigure, handles: Sequence[Line2D], columns: int) -> None:
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=FONT,
        borderpad=0,
        handlelength=2.4,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
