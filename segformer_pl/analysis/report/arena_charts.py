"""Figures of an arena: accuracy against costs, and the receptive fields of all systems.

The receptive fields are SegFormer's Figure 3 with a row for every system::

                 stage1   stage2   stage3   stage4    aspp     head
                 4.1 px   9.0 px   17 px    31 px              12 px
    segformer   [      ] [      ] [      ] [      ]           [      ]
                 3.9 px   8.2 px   15 px    22 px    24 px     11 px
    deeplab     [      ] [      ] [      ] [      ] [      ] [      ]
                 ================ colour bar ================
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke

from segformer_pl.analysis.arena import System
from segformer_pl.analysis.fonts import fit_text
from segformer_pl.analysis.report.study_charts import Point, pareto_figure
from segformer_pl.analysis.report.study_style import PAGE_WIDTH, wrapped
from segformer_pl.analysis.style import INK, SKY, printable

COST_AXES = {
    "MACs of an image (G)": ("macs", 1e9),
    "latency of an image (ms)": ("latency_median_ms", 1.0),
}
DECADES = (3, 5)  # fewest and most decades of the colour scale
# Lengths in inches, sizes of letters in points
NAMES, GAP, MAX_PANEL = 1.6, 0.1, 1.75
LINE = 0.155  # from one line of text to the next
BELOW = 0.14  # from a row of panels to the next row
BAR = 0.1  # height of the colour bar
MIN_WIDTH = 3.0  # of all panels; the label of the colour bar needs it
FONT = 8.5
NAME_LENGTH = 17  # characters of a line of a system's name
MAP_LENGTH = 14  # characters of a feature map's name


class Field(NamedTuple):
    """The receptive field of a feature map, for one panel.

    Attributes:
        title: Name of the map where it differs from that of its column; otherwise empty.
        mean: (H, W), mean over the images.
        position: Row and column of the unit in pixels.
        radius: Radius in pixels that holds half of the field; nan if it is not known.
    """

    title: str
    mean: npt.NDArray[np.float64]
    position: tuple[float, float]
    radius: float


def cost_figure(systems: Sequence[System]) -> Figure | None:
    """Plot mIoU against MACs and latency, with the front of the means.

    Args:
        systems: The systems, the reference first.

    Returns:
        The figure; None if costs and results of the reference and of another system are not known.
    """
    panels = {
        label: points
        for label, (key, unit) in COST_AXES.items()
        # The first point is drawn as the reference.
        if len(points := _points(systems, key, unit)) > 1 and points[0].name == systems[0].name
    }
    return pareto_figure(panels, "mIoU (%)") if panels else None


def _points(systems: Sequence[System], key: str, unit: float) -> list[Point]:
    points = []
    for number, system in enumerate(systems, start=1):
        miou, cost = system.measures["miou"], system.cost.get(key)
        if miou is not None and cost is not None:
            iqr = system.cost.get("latency_iqr_ms") if key == "latency_median_ms" else None
            values = (cost / unit, (iqr or 0.0) / 2, 100 * miou.mean, 100 * miou.sd)
            points.append(Point(number, system.name, *values))
    return points


def field_figure(rows: Mapping[str, Mapping[str, Field]], columns: Sequence[str]) -> Figure:
    """Draw the receptive fields of all systems, one row for each.

    Every panel is the whole image, scaled to its own maximum. All share one logarithmic scale of
    three to five decades. A circle holds half of the field.

    Args:
        rows: Fields by system and column; a system can lack columns.
        columns: Columns from left to right.
    """
    fields = [field for row in rows.values() for field in row.values()]
    floor = _floor(fields)
    panel = min(MAX_PANEL, (PAGE_WIDTH - NAMES) / len(columns) - GAP)
    aspect = max(field.mean.shape[0] / field.mean.shape[1] for field in fields)
    tall = panel * min(aspect, 1.5)
    width = NAMES + max(len(columns) * (panel + GAP), MIN_WIDTH)
    texts = [1 + any(field.title for field in row.values()) for row in rows.values()]
    height = 2 * LINE + sum(LINE * lines + 0.04 + tall + BELOW for lines in texts) + 0.75
    figure = Figure(figsize=(width, height))

    def write(x: float, top: float, text: str, **style: Any) -> None:
        style = {"fontsize": FONT, "color": INK, "ha": "center", "va": "top", **style}
        figure.text(x / width, 1 - top / height, text, parse_math=False, **style)

    lefts = [NAMES + index * (panel + GAP) for index in range(len(columns))]
    for left, column in zip(lefts, columns):
        write(
            left + panel / 2,
            0.04,
            printable(column, MAP_LENGTH),
            fontsize=FONT + 1.5,
            weight="bold",
        )
    top = 2 * LINE
    drawn: Any = None
    for (name, row), lines in zip(rows.items(), texts):
        below = top + LINE * lines + 0.04
        style = {"fontsize": FONT + 0.5, "ha": "left", "va": "center", "weight": "bold"}
        write(0.04, below + tall / 2, wrapped(name, NAME_LENGTH), **style)
        for left, column in zip(lefts, columns):
            field = row.get(column)
            if field is None:
                continue
            x = left + panel / 2
            if field.title:
                write(x, top, printable(field.title, MAP_LENGTH))
            write(x, top + LINE * (lines - 1), pixels_text(field.radius))
            box = (left / width, 1 - (below + tall) / height, panel / width, tall / height)
            drawn = _draw(figure, box, field, floor)
        top = below + tall + BELOW
    bar_width = min(4.0, width - NAMES - GAP)
    box = (NAMES / width, 1 - (top + 0.1 + BAR) / height, bar_width / width, BAR / height)
    bar = figure.colorbar(drawn, cax=figure.add_axes(box), orientation="horizontal", extend="min")
    bar.ax.tick_params(labelsize=FONT, labelcolor=INK)
    bar.set_label("gradient relative to the largest of its panel", fontsize=FONT, color=INK)
    return fit_text(figure)


def pixels_text(radius: float) -> str:
    """Format a radius for a panel."""
    if math.isnan(radius):
        return "no radius"
    return f"{radius:.1f} px" if radius < 99.95 else f"{radius:.0f} px"


def _draw(
    figure: Figure, box: tuple[float, float, float, float], field: Field, floor: float
) -> Any:
    axes = figure.add_axes(box, anchor="N")
    relative = field.mean / max(field.mean.max(), np.finfo(np.float64).tiny)
    norm = LogNorm(floor, 1, clip=True)
    drawn = axes.imshow(relative, norm=norm, cmap="magma", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if math.isfinite(field.radius):
        row, column = field.position
        circle = Circle((column, row), field.radius, fill=False, edgecolor=SKY, linewidth=1.1)
        circle.set_path_effects([withStroke(linewidth=2.4, foreground=INK)])
        circle.set_clip_path(axes.patch)
        axes.add_patch(circle)
    return drawn


def _floor(fields: Sequence[Field]) -> float:
    """Return the lowest value of the colour scale: half of the pixels of every panel are above."""
    medians = [
        float(np.median(positive) / field.mean.max())
        for field in fields
        if len(positive := field.mean[field.mean > 0])
    ]
    least, most = DECADES
    return 10.0 ** -min(max(math.ceil(-math.log10(min(medians, default=1.0))), least), most)
