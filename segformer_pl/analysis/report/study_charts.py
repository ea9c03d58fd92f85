"""Figures of a study's results: differences, results against costs, further evaluations."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from segformer_pl.analysis.ablation import MEASURES, StudySummary, VariantDifference
from segformer_pl.analysis.report.study_style import (
    PAGE_WIDTH,
    SOFT,
    difference_text,
    draw_panels,
    label_panels,
    line_style,
    p_text,
    spread,
    variant_rows,
    wrapped,
)
from segformer_pl.analysis.style import (
    BLUE,
    CHART_SIZE,
    INK,
    ORANGE,
    VERMILLION,
    execute_layout,
    printable,
    style_axes,
)

MAX_NAMED_POINTS = 6  # variants whose names, instead of numbers, stand beside their points
MAX_POINT_NAME = 14  # characters of such a name
KEY_LENGTH = 60  # characters of a name in the key of the numbers
LABEL_DISTANCES = (7, 12, 18, 26)  # points between a point and its label, the nearest that is free


def forest_figure(summary: StudySummary) -> Figure:
    """Plot the differences from the reference, in percentage points of the measure.

    Every row has the difference with its 95 % interval, below it the standard errors from the
    choice of seeds and from the choice of images, and the paired difference of each seed.
    """
    differences = summary.differences
    figure = Figure(figsize=(PAGE_WIDTH, 1.15 + 0.62 * len(differences)), layout="constrained")
    axes, numbers = figure.subplots(1, 2, sharey=True, width_ratios=(2.6, 1))
    variant_rows(axes, [difference.variant for difference in differences])
    axes.axvline(0, color=INK, linewidth=1, linestyle="--", zorder=1)
    for row, one in enumerate(differences):
        _draw_difference(axes, row, one)
    _explain_forest(axes)
    axes.set_xlabel(f"difference in {MEASURES[summary.measure].title} from the reference (points)")
    _write_numbers(numbers, differences)
    return figure


def _write_numbers(axes: Axes, differences: Sequence[VariantDifference]) -> None:
    """Write differences and p-values beside their rows."""
    axes.set_axis_off()
    columns = ((0.0, "difference (95 % CI)"), (1.0, "p (Holm)"))
    for (x, heading), side in zip(columns, ("left", "right")):
        axes.text(
            x,
            1.01,
            heading,
            transform=axes.transAxes,
            fontsize=9,
            color=INK,
            weight="bold",
            ha=side,
        )
        for row, one in enumerate(differences):
            text = difference_text(one) if side == "left" else p_text(one.p_holm)
            axes.text(
                x,
                row,
                text,
                transform=axes.get_yaxis_transform(),
                fontsize=9,
                color=INK,
                ha=side,
                va="center",
                weight="bold" if one.is_resolved else "normal",
            )


def _draw_difference(axes: Axes, row: int, one: VariantDifference) -> None:
    value = 100 * one.value
    axes.hlines(row - 0.2, 100 * one.low, 100 * one.high, color=INK, linewidth=2.6)
    axes.plot(
        value,
        row - 0.2,
        "o",
        color=INK,
        markerfacecolor=INK if one.is_resolved else "white",
        markersize=7,
        markeredgewidth=1.5,
    )
    for error, color, offset in ((one.se_seeds, BLUE, 0.1), (one.se_images, ORANGE, 0.32)):
        if math.isfinite(error):
            low, high = value - 100 * error, value + 100 * error
            axes.plot([low, high], [row + offset] * 2, "|-", color=color, linewidth=1.8)
    axes.plot(
        [100 * each for each in one.values.values()],
        [row + 0.1] * len(one.values),
        "o",
        color=BLUE,
        markerfacecolor="white",
        markersize=4,
    )


def _explain_forest(axes: Axes) -> None:
    """Draw the legend from empty lines, because no row need have all parts."""
    parts: list[tuple[str, dict[str, Any]]] = [
        ("difference and 95 % CI, resolved", {"color": INK, "marker": "o", "linewidth": 2.6}),
        (
            "not resolved",
            {"color": INK, "marker": "o", "linewidth": 2.6, "markerfacecolor": "white"},
        ),
        ("± 1 SE from seeds", {"color": BLUE, "marker": "|", "linewidth": 1.8}),
        ("± 1 SE from images", {"color": ORANGE, "marker": "|", "linewidth": 1.8}),
        (
            "one seed",
            {"color": BLUE, "marker": "o", "markerfacecolor": "white", "linestyle": "none"},
        ),
    ]
    for label, style in parts:
        axes.plot([], [], label=label, markersize=5, **style)
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=5,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=2.0,
        columnspacing=1.6,
    )


class Point(NamedTuple):
    """A variant in a plot of the result against a cost.

    Attributes:
        number: Number of the variant in the table, from 1.
        name: Name of the variant.
        cost: Cost in the unit of the axis.
        cost_error: Half of the interquartile range of the cost; 0 for an exact one.
        value: Mean over seeds, a percentage.
        sd: Standard deviation over seeds, in percentage points; nan with one seed.
    """

    number: int
    name: str
    cost: float
    cost_error: float
    value: float
    sd: float


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in cost without being lower in value."""
    best, kept = -math.inf, []
    for point in sorted(points, key=lambda point: (point.cost, -point.value)):
        if point.value > best:
            best = point.value
            kept.append(point)
    return kept


def pareto_figure(panels: Mapping[str, Sequence[Point]], y_label: str) -> Figure:
    """Plot the result against costs, one panel for each, with the front of the means.

    Args:
        panels: Points by label of the cost's axis; the reference is the first point of each.
        y_label: Label of the axis of the result.
    """
    every = [point for points in panels.values() for point in points]
    names = {point.number: point.name for point in every}
    is_named = len(names) <= MAX_NAMED_POINTS and all(
        len(name) <= MAX_POINT_NAME for name in names.values()
    )
    width = PAGE_WIDTH if len(panels) > 1 else CHART_SIZE[0]
    keys = [f"{number}  {printable(name, KEY_LENGTH)}" for number, name in names.items()]
    per_row = max(1, min(4, int(12 * width) // (4 + max(map(len, keys)))))
    num_rows = 0 if is_named else math.ceil(len(names) / per_row)
    figure = Figure(figsize=(width, 3.7 + 0.2 * num_rows), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, points) in zip(grid, panels.items()):
        _draw_front(axes, points)
        axes.set_xlabel(label)
    grid[0].set_ylabel(y_label)
    handles = dict(zip(*grid[0].get_legend_handles_labels()[::-1]))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper left",
        ncols=4,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    if not is_named:
        legend = figure.legend(
            [axes.plot([], [], linestyle="none")[0] for _ in names],
            keys,
            loc="outside lower left",
            ncols=per_row,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            handlelength=0,
            handletextpad=0,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    execute_layout(figure)  # labels are placed in pixels, so the layout must be known
    for axes, points in zip(grid, panels.values()):
        _label_points(axes, points, is_named)
    return figure


def _draw_front(axes: Axes, points: Sequence[Point]) -> None:
    style_axes(axes)
    on_front = front(points)
    axes.step(
        [point.cost for point in on_front],
        [point.value for point in on_front],
        where="post",
        color=SOFT,
        linewidth=1.2,
        linestyle=":",
        label="Pareto front of the means",
    )
    groups = (
        ("reference", VERMILLION, "D", points[:1]),
        ("variant", BLUE, "o", points[1:]),
    )
    for label, color, marker, some in groups:
        if some:
            axes.errorbar(
                [point.cost for point in some],
                [point.value for point in some],
                xerr=[point.cost_error for point in some],
                yerr=[0 if math.isnan(point.sd) else point.sd for point in some],
                fmt=marker,
                color=color,
                ecolor=color,
                elinewidth=1,
                markersize=6,
                label=label,
            )
    axes.margins(x=0.14, y=0.14)
    axes.set_xlim(left=max(0, axes.get_xlim()[0]))
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _label_points(axes: Axes, points: Sequence[Point], is_named: bool) -> None:
    """Write numbers or names beside the points, where they cover neither points nor labels."""
    places = axes.transData.transform([(point.cost, point.value) for point in points])
    scale = axes.figure.dpi / 72
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places]
    for point, (x, y) in zip(points, places):
        text = printable(point.name, MAX_POINT_NAME) if is_named else str(point.number)
        width, height = 6.0 * len(text) * scale, 10.0 * scale
        best, least = (0.0, 0.0), math.inf
        for distance in LABEL_DISTANCES:
            for angle in (45, 0, 315, 135, 180, 225, 90, 270):
                dx = distance * math.cos(math.radians(angle))
                dy = distance * math.sin(math.radians(angle))
                left = x + dx * scale - width * (0 if dx > 1 else 1 if dx < -1 else 0.5)
                box = Bbox.from_bounds(left, y + dy * scale - height / 2, width, height)
                overlap = sum(_shared_area(box, other) for other in taken)
                inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
                overlap += 0 if inside else width * height
                if overlap < least - 1e-6:
                    best, least, chosen = (dx, dy), overlap, box
        taken.append(chosen)
        dx, dy = best
        axes.annotate(
            text,
            (point.cost, point.value),
            (dx, dy),
            textcoords="offset points",
            fontsize=9,
            color=INK,
            ha="left" if dx > 1 else "right" if dx < -1 else "center",
            va="center",
            parse_math=False,
        )


def _shared_area(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0) * max(height, 0)


def evaluations_figure(summaries: Mapping[str, StudySummary], y_label: str) -> Figure:
    """Plot the result of each variant over several evaluations of the same networks.

    Args:
        summaries: Summaries by name of the evaluation.
        y_label: Label of the axis of the result.
    """
    names = [one.variant for one in next(iter(summaries.values())).variants]
    figure, parts = draw_panels(names)
    ticks = range(len(summaries))
    for axes, variants in parts:
        for index, variant in enumerate(variants):
            color, marker = line_style(names, variant)
            bands = np.array(
                [
                    next(
                        (
                            spread(list(v.values.values()))
                            for v in s.variants
                            if v.variant == variant
                        ),
                        (math.nan,) * 3,
                    )
                    for s in summaries.values()
                ]
            )
            # Apart from each other, so that their bars do not cover each other.
            x = np.arange(len(summaries)) + 0.06 * (index - (len(variants) - 1) / 2)
            axes.plot(x, 100 * bands[:, 0], color=color, marker=marker, markersize=5, label=variant)
            axes.vlines(x, 100 * bands[:, 1], 100 * bands[:, 2], color=color, linewidth=1.4)
        axes.set_xlim(-0.3, len(summaries) - 0.7)
        labels = [wrapped(name, 16) for name in summaries]
        axes.set_xticks(ticks, labels, parse_math=False)
        if len(parts) > 1 or sum(len(label) for label in labels) > 48:
            axes.tick_params(axis="x", rotation=30)
            for text in axes.get_xticklabels():
                text.set(ha="right", rotation_mode="anchor")
    label_panels(figure, "evaluation protocol", y_label)
    return figure
