"""Pages for maps and for curves: sizes in inches, text that fits, colour bars and legends below.

Figures are as wide as the text of a two-column page (7 inches), or half as wide with one panel, and
no letter is smaller than 7 points. Everything is placed in inches and not by a layout engine, which
lets text of many small panels run into each other.
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
from matplotlib.figure import Figure
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

WIDTH, NARROW = 7.0, 3.4  # of a two-column page's text and of one column, in inches
FONT = 7.0  # points
LINE = 0.12  # inches from one line of text to the next
MAX_COLUMNS = 5
MAX_PANEL = 2.3
LEFT, RIGHT, GAP = 0.66, 0.16, 0.14
TICKS = 0.19  # below a panel
BAR = 0.09
COLORS = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, INK)
LINES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")


class Block(NamedTuple):
    """The panels of one network.

    Attributes:
        heading: Over them, or empty.
        titles: Of each panel; lines that are too long are wrapped.
        labels: Of the horizontal and of the vertical axis.
        has_zoom: Whether every panel has an enlarged one below.
    """

    heading: str
    titles: list[str]
    labels: tuple[str, str]
    has_zoom: bool = False


@dataclass
class Sheet:
    """A figure with empty axes: ``panels`` and ``zooms`` by block, and the colour bar's."""

    figure: Figure
    panels: list[list[Axes]]
    zooms: list[list[Axes]]
    bar: Axes
    note: str

    def add_bar(self, picture: Any, **style: Any) -> Colorbar:
        """The colour bar of this picture, with its note."""
        bar = self.figure.colorbar(picture, cax=self.bar, orientation="horizontal", **style)
        bar.ax.set_xlabel(self.note, fontsize=FONT, labelpad=3)
        return bar


class _Box(NamedTuple):
    """Of axes, in inches; ``top`` counts from the top of the figure."""

    left: float
    top: float
    width: float
    height: float


class _Layout(NamedTuple):
    """Where everything stands, before the height of the page is known to matplotlib."""

    size: tuple[float, float]
    columns: int
    title: str
    note: str
    texts: list[tuple[float, float, str, dict[str, Any]]]
    panels: list[list[_Box]]
    zooms: list[list[_Box]]
    bar: _Box


def wrap(text: str, inches: float, size: float = FONT) -> str:
    """The text in lines that fit into this width."""
    num_letters = max(int(inches * 72 / (0.53 * size)), 4)
    lines = [textwrap.wrap(printable(line, 400), num_letters) for line in text.split("\n")]
    return "\n".join(part for parts in lines for part in parts)


def _lay_out(title: str, blocks: Sequence[Block], shape: tuple[int, ...], note: str) -> _Layout:
    """Stacks all that is on the page from the top down."""
    num_panels = max(len(block.titles) for block in blocks)
    columns = math.ceil(num_panels / math.ceil(num_panels / MAX_COLUMNS))
    panel = min(MAX_PANEL, (WIDTH - LEFT - RIGHT + GAP) / columns - GAP)
    used = LEFT + columns * (panel + GAP) - GAP + RIGHT
    width = max(NARROW, used)
    left = LEFT + (width - used) / 2
    height = panel * min(max(shape[0] / shape[1], 0.35), 1.5)
    zoom = min(panel, max(height, 0.9))

    texts: list[tuple[float, float, str, dict[str, Any]]] = []
    boxes: list[list[_Box]] = []
    zoom_boxes: list[list[_Box]] = []
    title = wrap(title, width - 0.2, FONT + 1.5)
    top = 0.08 + LINE * 1.3 * (title.count("\n") + 1)
    middle = left + (columns * (panel + GAP) - GAP) / 2
    centered: dict[str, Any] = {"ha": "center", "va": "top"}
    above: dict[str, Any] = {"ha": "center", "va": "baseline"}  # names stand on one line
    for block in blocks:
        boxes.append([])
        zoom_boxes.append([])
        if block.heading:
            heading = wrap(block.heading, width - left - RIGHT, FONT + 1)
            texts.append((left, top + 0.06, heading, {"fontsize": FONT + 1, "va": "top"}))
            top += 0.06 + 1.2 * LINE * (heading.count("\n") + 1)
        for start in range(0, len(block.titles), columns):
            heads = [wrap(text, panel + GAP / 2) for text in block.titles[start : start + columns]]
            num_lines = max(head.count("\n") for head in heads) + 1
            top += 0.06 + LINE * num_lines
            for column, head in enumerate(heads):
                place = left + column * (panel + GAP)
                boxes[-1].append(_Box(place, top, panel, height))
                head += "\n" * (num_lines - 1 - head.count("\n"))
                texts.append((place + panel / 2, top - 0.06, head, above))
            top += height + TICKS
            texts.append((middle, top, block.labels[0], centered))
            top += LINE + 0.06
            if block.has_zoom:
                for column in range(len(heads)):
                    place = left + column * (panel + GAP) + (panel - zoom) / 2
                    zoom_boxes[-1].append(_Box(place, top, zoom, zoom))
                top += zoom + TICKS
                texts.append(
                    (middle, top, "the boxes above, enlarged (pixels from the unit)", centered)
                )
                top += LINE + 0.06
    bar = min(5.0, 2 * (middle - left))
    bar_box = _Box(middle - bar / 2, top + 0.1, bar, BAR)
    note = wrap(note, 2 * min(middle, width - middle) - 0.2)
    top = bar_box.top + BAR + 0.2 + LINE * (note.count("\n") + 1) + 0.12
    return _Layout((width, top), columns, title, note, texts, boxes, zoom_boxes, bar_box)


def make_sheet(title: str, blocks: Sequence[Block], shape: tuple[int, ...], note: str) -> Sheet:
    """Axes for the panels of every block, at most five in a line.

    Args:
        title: Over all.
        blocks: From top to bottom.
        shape: (H, W) of the maps.
        note: Of the colour bar.
    """
    page = _lay_out(title, blocks, shape, note)
    width, height = page.size
    figure = Figure(figsize=page.size)

    def axes_of(box: _Box) -> Axes:
        bottom = (height - box.top - box.height) / height
        axes = figure.add_axes(
            (box.left / width, bottom, box.width / width, box.height / height), anchor="N"
        )
        axes.tick_params(labelsize=FONT, length=2, pad=2)
        return axes

    # Names of networks, files and layers are no mathematics, whatever they hold.
    plain: dict[str, Any] = {"parse_math": False}
    style = {"fontsize": FONT + 1.5, "va": "top", **plain}
    figure.suptitle(page.title, y=1 - 0.08 / height, **style)
    for x, y, text, own in page.texts:
        style = {"fontsize": FONT, "linespacing": 1.15, **plain, **own}
        figure.text(x / width, 1 - y / height, text, **style)
    sheet = Sheet(
        figure,
        [[axes_of(box) for box in row] for row in page.panels],
        [[axes_of(box) for box in row] for row in page.zooms],
        axes_of(page.bar),
        page.note,
    )
    for block, panels, zooms in zip(blocks, sheet.panels, sheet.zooms):
        for row in (panels, zooms):
            for number, axes in enumerate(row):
                axes.set_label(block.titles[number])
                axes.tick_params(labelleft=number % page.columns == 0)
        for axes in panels[:: page.columns]:
            axes.set_ylabel(
                wrap(block.labels[1], page.panels[0][0].height + 0.2), fontsize=FONT, labelpad=2
            )
    return sheet


def set_ticks(axes: Axes) -> None:
    """The same ones along both axes, at powers of two as strides and pictures have them; none near
    the left and the right edge, where they would touch the neighbour's."""
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
class Curves:
    """A figure of two panels for curves: colours by layer, line styles by network."""

    figure: Figure
    left: Axes
    right: Axes
    colors: dict[str, str]
    lines: dict[str, Literal["-", "--", ":", "-."]]


def make_curves(
    title: str,
    layers: Mapping[str, str],
    networks: Sequence[str],
    heads: tuple[str, str] = ("", ""),
) -> Curves:
    """Two empty panels with two legends below, one of colours and one of line styles.

    Args:
        title: Over both.
        layers: Text of the legend by name.
        networks: Their names; an empty one stands in no legend.
        heads: Of the left and of the right panel.
    """
    if len(layers) <= len(COLORS):
        colors = dict(zip(layers, COLORS))
    else:  # in order of depth
        shades = colormaps["viridis"](np.linspace(0, 0.92, len(layers)))
        colors = {name: to_hex(shade) for name, shade in zip(layers, shades)}
    lines = {name: LINES[number % len(LINES)] for number, name in enumerate(networks)}
    longest = max(len(text) for text in layers.values())
    columns = min(len(layers), max(int(6.6 / (0.5 + 0.055 * longest)), 1))
    legends = [
        (
            [
                Line2D([], [], color=colors[name], label=printable(text))
                for name, text in layers.items()
            ],
            columns,
        )
    ]
    named = [(wrap(name, 6.0), line) for name, line in lines.items() if name]
    if named:
        styles = [Line2D([], [], color=INK, linestyle=line, label=name) for name, line in named]
        legends.append((styles, 1))
    heights = [
        1.3 * LINE * sum(str(line.get_label()).count("\n") + 1 for line in handles[::count]) + 0.06
        for handles, count in legends
    ]
    title = wrap(title, WIDTH - 0.2, FONT + 1.5)
    below = 0.5 + sum(heights)
    num_lines = max(head.count("\n") + 1 if head else 0 for head in heads)
    above = 0.2 + 1.3 * LINE * (title.count("\n") + 1) + LINE * num_lines
    height = above + 2.5 + below
    figure = Figure(figsize=(WIDTH, height))
    style: dict[str, Any] = {"fontsize": FONT + 1.5, "va": "top", "parse_math": False}
    figure.suptitle(title, y=1 - 0.08 / height, **style)
    left, right = (
        figure.add_axes((start / WIDTH, below / height, 2.8 / WIDTH, 2.5 / height))
        for start in (0.55, 4.05)
    )
    for axes, head in zip((left, right), heads):
        axes.set_title(head, fontsize=FONT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=FONT)
    top = 0.06 + sum(heights)
    for (handles, count), tall in zip(legends, heights):
        drawn = figure.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, top / height),
            ncols=count,
            frameon=False,
            fontsize=FONT,
            borderpad=0,
            borderaxespad=0,
            handlelength=2.4,
        )
        for text in drawn.get_texts():
            text.set_parse_math(False)
        top -= tall
    return Curves(figure, left, right, colors, lines)
