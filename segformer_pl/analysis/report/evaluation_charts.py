"""Confusion matrix and reliability diagram of an evaluation, as inline SVG."""

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.analysis.style import (
    BLUE,
    CELL_DARK,
    CELL_LIGHT,
    CHART_SIZE,
    FAINT,
    INK,
    SKY,
    VERMILLION,
    inline_svg,
    legend_above,
    printable,
    style_axes,
)

MAX_NARROW_CLASSES = 12  # classes of a matrix that fits into half the width of the page
MAX_PRINTED_CLASSES = 20  # classes of a matrix whose cells have room for numbers
MAX_MATRIX_CLASSES = 36  # classes whose names are readable along the axes
MAX_NAME_LENGTH = 20  # characters
NARROW_SIZE, WIDE_SIZE = (5.6, 4.6), (11.0, 8.2)  # inches: half and full width of the page
BRIGHT = 0.55  # relative luminance of a cell above which dark numbers are easier to read

Floats = npt.NDArray[np.float64]


def draw_confusion(evaluation: Evaluation) -> Markup:
    """Draw the confusion matrix in percent of the pixels of each label; rows without any are grey.

    Colours follow the square root of the values, so that rare confusions are visible beside a
    diagonal near 100 %. Up to :data:`MAX_PRINTED_CLASSES` classes, the cells contain their values.
    """
    percent = 100 * confusion_shares(evaluation.confusion)
    names = [printable(name, MAX_NAME_LENGTH) for name in evaluation.class_names]
    size = NARROW_SIZE if len(names) <= MAX_NARROW_CLASSES else WIDE_SIZE
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    colors = colormaps["cividis"].with_extremes(bad=FAINT)
    norm = PowerNorm(0.5, 0, 100)
    image = axes.imshow(percent, colors, norm, interpolation="none", aspect="equal")
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(ticks, names, parse_math=False)
    axes.set_xlabel("prediction", color=INK)
    axes.set_ylabel("label", color=INK)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 1, 5, 20, 50, 100], fraction=0.05, pad=0.03)
    bar.set_label("share of the label's pixels (%)", color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=9, length=3)
    if len(names) <= MAX_PRINTED_CLASSES:
        _print_values(axes, percent, colors(norm(percent)))
    return inline_svg(figure)


def confusion_shares(confusion: npt.NDArray[np.int64]) -> Floats:
    """Pixel counts (C, C) -> fractions (C, C) of the pixels of each label; nan without any."""
    with np.errstate(invalid="ignore"):
        return np.divide(confusion, confusion.sum(axis=1, keepdims=True), dtype=np.float64)


def _print_values(axes: Axes, percent: Floats, colors: Floats) -> None:
    luminance = colors[..., :3] @ [0.2126, 0.7152, 0.0722]
    for (row, column), value in np.ndenumerate(percent):
        if np.isnan(value):
            continue
        text = f"{value:.0f}" if value >= 9.95 or value == 0 else f"{value:.1f}"
        color = CELL_DARK if luminance[row, column] > BRIGHT else CELL_LIGHT
        axes.text(column, row, text, color=color, fontsize=8.5, ha="center", va="center")


def draw_calibration(evaluation: Evaluation) -> Markup:
    """Draw the reliability diagram (Guo et al. 2017), with the share of pixels per bin below."""
    bins = evaluation.calibration
    pixels, confidence, correct = bins[bins[:, 0] > 0].T
    edges = np.linspace(0, 100, len(bins) + 1)
    mean_confidence, accuracy = 100 * confidence / pixels, 100 * correct / pixels

    figure = Figure(figsize=CHART_SIZE, layout="constrained")
    axes, share_axes = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    style_axes(axes)
    axes.plot([0, 100], [0, 100], color=INK, linestyle="--", linewidth=1.2, label="calibrated")
    axes.vlines(
        mean_confidence,
        np.minimum(mean_confidence, accuracy),
        np.maximum(mean_confidence, accuracy),
        color=VERMILLION,
        linewidth=2.2,
        label="gap",
    )
    axes.plot(mean_confidence, accuracy, "o", color=BLUE, markersize=5, label="pixels of one bin")
    corners = {"underconfident": (0.03, 0.9, "left"), "overconfident": (0.97, 0.06, "right")}
    for text, (x, y, side) in corners.items():
        axes.text(x, y, text, transform=axes.transAxes, ha=side, color="#666666", fontsize=9)
    axes.set_ylim(0, 104)
    legend_above(axes)
    axes.set_ylabel("accuracy (%)")

    style_axes(share_axes)
    share_axes.bar(
        edges[:-1],
        100 * bins[:, 0] / max(bins[:, 0].sum(), 1),
        width=np.diff(edges),
        align="edge",
        color=SKY,
        edgecolor="white",
        linewidth=0.6,
    )
    # Log scale, because nearly all pixels are in the last bin.
    share_axes.set_yscale("log")
    share_axes.yaxis.set_major_formatter(FuncFormatter(lambda percent, _: f"{percent:g}"))
    share_axes.yaxis.set_minor_formatter(NullFormatter())
    share_axes.set_xlim(0, 100)
    share_axes.set_ylabel("pixels (%, log)")
    share_axes.set_xlabel("confidence (%)")
    return inline_svg(figure)
