"""Training curves as inline SVG: loss and learning rate, mIoU, receptive fields."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from segformer_pl.analysis.metrics_table import Series, num_steps_trained
from segformer_pl.analysis.style import (
    BLUE,
    CHART_SIZE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    inline_svg,
    legend_above,
    printable,
    style_axes,
)

CROSS_ENTROPY = "CrossEntropy"
MAX_SMOOTHED_POINTS = 300
MAX_VECTOR_POINTS = 5000
MAX_NAMED_RESUMPTIONS = 5
ERF_RADIUS = re.compile(r"val/erf/(.+)/radius50")


def draw_charts(
    columns: dict[str, Series], loss_name: str, resumed_at: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Return ``title`` and inline ``svg`` of every chart for which columns were logged.

    Args:
        columns: Columns of ``metrics.csv`` by name.
        loss_name: Class name of the training loss. The validation loss is always cross-entropy.
        resumed_at: Steps at which the run was resumed, marked by dotted lines.
    """
    figures = {}
    if "train/loss" in columns or "val/loss" in columns:
        figures["Loss"] = loss_figure(columns, loss_name)
    if "val/miou" in columns:
        figures["Mean intersection over union"] = _miou_figure(columns)
    if any(ERF_RADIUS.fullmatch(name) for name in columns):
        figures["Effective receptive field"] = _erf_figure(columns)
    for figure in figures.values():
        _mark_resumptions(figure, resumed_at)
    return [{"title": title, "svg": inline_svg(figure)} for title, figure in figures.items()]


def _mark_resumptions(figure: Figure, resumed_at: Sequence[int]) -> None:
    for axes in figure.axes:
        for step in resumed_at:
            axes.axvline(step, color=INK, linestyle=":", linewidth=1, zorder=1)
    if resumed_at:
        steps = ", ".join(f"{step:,}" for step in resumed_at[:MAX_NAMED_RESUMPTIONS])
        more = ", ..." if len(resumed_at) > MAX_NAMED_RESUMPTIONS else ""
        figure.axes[-1].set_xlabel(f"training step; dotted: resumed at {steps}{more}")


def _marker(series: Series) -> dict[str, Any]:
    """Return a marker for a curve of one point, which would be invisible without."""
    return {"marker": "o", "markersize": 5} if np.isfinite(series.value).sum() == 1 else {}


def _style_over_steps(axes: Axes) -> None:
    style_axes(axes)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def loss_figure(columns: dict[str, Series], loss_name: str) -> Figure:
    """Plot training and validation loss, with the learning rate below if it was logged."""
    rates = _learning_rates(columns)
    figure = Figure(figsize=CHART_SIZE, layout="constrained")
    if rates:
        axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
        _draw_learning_rates(rate_axes, rates)
        bottom = rate_axes
    else:
        axes = bottom = figure.subplots()
    _style_over_steps(axes)
    axes.set_xlim(0, 1.04 * num_steps_trained(columns))
    bottom.set_xlabel("training step")

    is_same = loss_name == CROSS_ENTROPY
    drawn = []
    if (train := columns.get("train/loss")) is not None:
        smooth = running_median(train)
        axes.plot(
            train.step,
            train.value,
            color=SKY,
            alpha=0.8,
            linewidth=0.9,
            label="train" if is_same else f"train: {loss_name}",
            rasterized=len(train.step) > MAX_VECTOR_POINTS,
            **_marker(train),
        )
        axes.plot(
            smooth.step,
            smooth.value,
            color=BLUE,
            linewidth=1.8,
            label="train, running median",
            **_marker(smooth),
        )
        drawn += [train.value]
    if (validation := columns.get("val/loss")) is not None:
        axes.plot(
            validation.step,
            validation.value,
            color=VERMILLION,
            marker="o",
            markersize=5,
            linewidth=1.2,
            label="validation" if is_same else "validation: cross-entropy (nats)",
        )
        drawn += [validation.value]
    values = np.concatenate(drawn)
    values = values[np.isfinite(values)]
    # From scratch, cross-entropy falls by orders of magnitude and needs a log scale; in fine-tuning
    # it hardly changes.
    if len(values) and 0 < values.min() < 0.1 * values.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("loss (nats, log scale)" if is_same else "loss (log scale)")
    else:
        axes.set_ylabel("loss (nats)" if is_same else "loss")
    legend_above(axes, num_columns=3 if is_same else 1)
    return figure


def running_median(series: Series) -> Series:
    """Return the median over a window of about 1/30 of the curve, at 300 points at most."""
    num_values = len(series.value)
    half_window = max(2, num_values // 60)
    centers = np.unique(
        np.linspace(0, num_values - 1, min(num_values, MAX_SMOOTHED_POINTS)).astype(int)
    )
    medians = [
        np.median(series.value[max(0, center - half_window) : center + half_window + 1])
        for center in centers
    ]
    return Series(series.step[centers], np.array(medians))


def _learning_rates(columns: dict[str, Series]) -> list[tuple[str, Series]]:
    """Return label and curve of each learning rate; groups with the same curve share a label."""
    shared: dict[bytes, tuple[list[str], Series]] = {}
    for name, series in columns.items():
        if name.startswith("lr-") and not name.endswith(("-momentum", "-weight_decay")):
            group = name.removeprefix("lr-").rpartition("/")[2]
            names, _ = shared.setdefault(series.value.tobytes(), ([], series))
            names.append(printable(group, 40))
    return [(", ".join(names), series) for names, series in shared.values()]


def _draw_learning_rates(axes: Axes, rates: Sequence[tuple[str, Series]]) -> None:
    _style_over_steps(axes)
    styles = [(PURPLE, "-"), (GREEN, "--"), (ORANGE, "-."), (INK, ":")]
    for index, (label, series) in enumerate(rates):
        color, line = styles[index % len(styles)]
        marker = _marker(series)
        axes.plot(series.step, series.value, color=color, linestyle=line, label=label, **marker)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.3g}"))
    axes.set_ylabel("learning rate")
    if len(rates) > 1:
        legend_above(axes)


def _miou_figure(columns: dict[str, Series]) -> Figure:
    """Plot validation mIoU over training, its best value, and the ceilings of the data set."""
    miou = columns["val/miou"]
    percent = 100 * miou.value
    figure = Figure(figsize=CHART_SIZE, layout="constrained")
    axes = figure.subplots()
    _style_over_steps(axes)
    axes.plot(miou.step, percent, color=BLUE, marker="o", markersize=5, linewidth=1.8)
    if np.isfinite(percent).any():
        best = int(np.nanargmax(percent))
        axes.plot(
            miou.step[best],
            percent[best],
            marker="o",
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=VERMILLION,
            markeredgewidth=1.6,
            linestyle="none",
            label=f"best: {percent[best]:.1f} % at step {miou.step[best]:,}",
        )
    axes.set_xlim(0, 1.04 * num_steps_trained(columns))
    for name, series in columns.items():
        if not re.fullmatch(r"val/.+_ceiling", name):
            continue
        ceiling = 100 * series.last
        axes.axhline(ceiling, color=INK, linestyle="--", linewidth=1.2, zorder=1)
        axes.annotate(
            f"{printable(name.removeprefix('val/'), 40).replace('_', ' ')} {ceiling:.1f} %",
            # On the left, where the curve is usually far below.
            xy=(0.015, ceiling),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=9,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            parse_math=False,
        )
    axes.margins(y=0.12)
    axes.set_xlabel("training step")
    axes.set_ylabel("validation mIoU (%)")
    if axes.get_legend_handles_labels()[1]:
        legend_above(axes)
    return figure


def _erf_figure(columns: dict[str, Series]) -> Figure:
    """Plot the radius that holds half of each layer's receptive field, over training."""
    figure = Figure(figsize=CHART_SIZE, layout="constrained")
    axes = figure.subplots()
    _style_over_steps(axes)
    styles = list(zip((BLUE, ORANGE, GREEN, VERMILLION, PURPLE, INK), "os^Dvx"))
    radii = [(match[1], columns[match[0]]) for name in columns if (match := ERF_RADIUS.match(name))]
    # CSVLogger sorts columns by name, which puts the head before the stages.
    radii.sort(key=lambda item: (not item[0].startswith("stage"), item[0]))
    for index, (layer, series) in enumerate(radii):
        color, marker = styles[index % len(styles)]
        axes.plot(
            series.step,
            series.value,
            color=color,
            marker=marker,
            markersize=4.5,
            label=printable(layer, 40),
        )
    axes.set_xlim(0, 1.04 * num_steps_trained(columns))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("radius holding half of the ERF (pixels)")
    legend_above(axes)
    return figure
