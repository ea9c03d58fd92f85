"""Layout shared by the figures of a study: names of variants, panels, and rows of dots."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from segformer_pl.analysis.ablation import VariantDifference
from segformer_pl.analysis.style import (
    BLUE,
    CHART_SIZE,
    GREEN,
    INK,
    ORANGE,
    VERMILLION,
    printable,
    style_axes,
)

DASH = "\u2013"
PAGE_WIDTH = 11.0  # inches; a figure of the whole width of the page
NAME_LENGTH = 28  # characters of a line of a variant's name
MAX_LINES_IN_ONE_PANEL = 5  # curves that can be told apart in one panel
SEPARATORS = "+,_ -=/.\u2026"  # characters after which a name may be broken
SOFT = "#767676"  # the darkest grey that is still lighter than INK; 4.5:1 on white
# The reference comes first.
LINE_STYLES = ((INK, "o"), (BLUE, "s"), (ORANGE, "^"), (GREEN, "D"), (VERMILLION, "v"))


def wrapped(name: str, length: int = NAME_LENGTH) -> str:
    """Return a variant's name in at most two lines, shortened in the middle if it is longer."""
    text = printable(name, 2 * length - 2)
    if len(text) <= length:
        return text
    breaks = [i + 1 for i, letter in enumerate(text[:length]) if letter in SEPARATORS]
    split = max([i for i in breaks if len(text) - i <= length], default=length)
    return f"{text[:split].rstrip()}\n{text[split:].lstrip()}"


def signed(value: float, digits: int = 2) -> str:
    """Format a number with its sign, a true minus, and zero as +0.00."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "\u2212")


def difference_text(one: VariantDifference | None) -> str:
    """Format a difference and its interval in percentage points."""
    if one is None or math.isnan(one.value):
        return DASH
    value = signed(100 * one.value)
    if math.isnan(one.low):
        return value
    return f"{value} ({signed(100 * one.low)} to {signed(100 * one.high)})"


def p_text(p_value: float) -> str:
    """Format a p-value with three decimals at most."""
    if math.isnan(p_value):
        return DASH
    return "< 0.001" if p_value < 1e-3 else f"{p_value:.3f}" if p_value < 0.1 else f"{p_value:.2f}"


def panels(variants: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Distribute the variants, of which the first is the reference, over panels.

    Returns:
        Title and variants of each panel: one panel without a title if its lines can be told apart,
        otherwise one panel for each variant, which repeats the reference.
    """
    if len(variants) <= MAX_LINES_IN_ONE_PANEL:
        return [("", list(variants))]
    return [(name, [variants[0], name]) for name in variants[1:]]


def draw_panels(variants: Sequence[str]) -> tuple[Figure, list[tuple[Axes, list[str]]]]:
    """Return a figure, and its axes with the variants to draw into each (see :func:`panels`)."""
    parts = panels(variants)
    if len(parts) == 1:
        figure = Figure(figsize=CHART_SIZE, layout="constrained")
        axes = figure.subplots()
        style_axes(axes)
        return figure, [(axes, parts[0][1])]
    num_columns = 3 if len(parts) in (5, 6, 9) else 4  # leaves the fewest gaps
    num_rows = math.ceil(len(parts) / num_columns)
    figure = Figure(figsize=(PAGE_WIDTH, 0.6 + 2.05 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    drawn = []
    for axes, (title, names) in zip(grid.flat, parts):
        style_axes(axes)
        axes.set_title(wrapped(title, 34), fontsize=9, color=INK, loc="left", parse_math=False)
        drawn.append((axes, names))
    for index, axes in enumerate(grid.flat):
        if index >= len(parts):
            axes.set_visible(False)
        elif index + num_columns >= len(parts):  # nothing below it
            axes.tick_params(labelbottom=True)
    return figure, drawn


def line_style(variants: Sequence[str], name: str) -> tuple[str, str]:
    """Return colour and marker of a variant's line in its panel."""
    if len(variants) <= MAX_LINES_IN_ONE_PANEL:
        return LINE_STYLES[list(variants).index(name)]
    return (SOFT, "o") if name == variants[0] else (BLUE, "s")


def label_panels(figure: Figure, x_label: str, y_label: str) -> None:
    """Label the axes of a figure of :func:`draw_panels`, and explain its lines in a legend."""
    first = figure.axes[0]
    handles, labels = first.get_legend_handles_labels()
    if sum(axes.get_visible() for axes in figure.axes) == 1 and not first.get_title(loc="left"):
        first.set_xlabel(x_label)
        first.set_ylabel(y_label)
        labels = [wrapped(label) for label in labels]
        num_columns = 2 if max(map(len, labels), default=0) > 16 else 3
        legend = first.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=num_columns,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            handlelength=1.6,
            columnspacing=1.4,
            borderaxespad=0.2,
        )
    else:
        figure.supxlabel(x_label, fontsize=10, color=INK)
        figure.supylabel(y_label, fontsize=10, color=INK)
        labels = [f"reference: {wrapped(labels[0], 60)}", "variant named above the panel"]
        legend = figure.legend(
            handles[:2],
            labels,
            loc="outside upper left",
            ncols=2,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )
    for text in legend.get_texts():
        text.set_parse_math(False)


def variant_rows(axes: Axes, names: Sequence[str]) -> None:
    """Give axes one row for each variant, the first one on top, with the names on the left."""
    style_axes(axes)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [wrapped(name) for name in names], parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(False, axis="y")
    for row in range(0, len(names), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f4f6f8", linewidth=0, zorder=0)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean, lowest and highest of the values that are finite; nan without any."""
    finite = np.array([value for value in values if np.isfinite(value)])
    if not len(finite):
        return math.nan, math.nan, math.nan
    return float(finite.mean()), float(finite.min()), float(finite.max())
