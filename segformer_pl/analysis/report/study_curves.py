"""Training curves and receptive fields of a study's variants, with the spread over their seeds."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from segformer_pl.analysis.metrics_table import Series
from segformer_pl.analysis.report.curves import ERF_RADIUS, running_median
from segformer_pl.analysis.report.study_style import (
    PAGE_WIDTH,
    draw_panels,
    label_panels,
    line_style,
    spread,
    variant_rows,
)
from segformer_pl.analysis.run import Run
from segformer_pl.analysis.style import BLUE, INK, ORANGE, printable

Runs = Mapping[str, Mapping[int, Run]]  # by variant and seed
Floats = npt.NDArray[np.float64]

LAYERS_IN_A_ROW = 5


def curve_figure(runs: Runs, column: str) -> Figure | None:
    """Plot a column of ``metrics.csv`` over the training: the mean over seeds, and their range.

    Args:
        runs: Runs by variant and seed, the reference first.
        column: ``val/miou`` or ``train/loss``, which is smoothed by a running median.

    Returns:
        The figure; None if no run has the column.
    """
    is_loss = column == "train/loss"
    curves = {}
    for variant, by_seed in runs.items():
        series = [run.metrics[column] for run in by_seed.values() if column in run.metrics]
        if series:
            smooth = [running_median(one) for one in series] if is_loss else series
            curves[variant] = mean_and_range(smooth)
    curves = {variant: band for variant, band in curves.items() if len(band[0])}
    if not curves:
        return None
    names = list(curves)
    scale = 1.0 if is_loss else 100.0
    figure, parts = draw_panels(names)
    for axes, variants in parts:
        for variant in variants:
            color, marker = line_style(names, variant)
            step, mean, low, high = curves[variant]
            axes.plot(
                step,
                scale * mean,
                color=color,
                marker=marker if len(step) < 2 or not is_loss else None,
                markersize=3.5,
                linewidth=1.5,
                label=variant,
            )
            axes.fill_between(
                step, scale * low, scale * high, color=color, alpha=0.18, linewidth=0, zorder=1
            )
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        axes.set_xlim(left=0)
    values = np.concatenate([band[1] for band in curves.values()])
    values = values[np.isfinite(values)]
    y_label = "validation mIoU (%)"
    if is_loss:
        y_label = "training loss"
        if len(values) and 0 < values.min() < 0.1 * values.max():
            y_label += " (log scale)"
            for axes, _ in parts:
                _use_log_scale(axes)
    label_panels(figure, "training step", y_label)
    return figure


def mean_and_range(curves: Sequence[Series]) -> tuple[Floats, Floats, Floats, Floats]:
    """Return the steps that all curves cover, and the curves' mean, minimum and maximum there.

    Curves are interpolated linearly where they have no value of their own, such as after a
    resumption. Values that are not finite are left out.
    """
    finite = [(c.step[np.isfinite(c.value)], c.value[np.isfinite(c.value)]) for c in curves]
    finite = [(step, value) for step, value in finite if len(step)]
    if not finite:
        return (np.empty(0),) * 4
    step = np.unique(np.concatenate([step for step, _ in finite])).astype(np.float64)
    first, last = max(s[0] for s, _ in finite), min(s[-1] for s, _ in finite)
    step = step[(step >= first) & (step <= last)]
    values = np.stack([np.interp(step, *curve) for curve in finite])
    return step, values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def _use_log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def layers(runs: Runs) -> list[str]:
    """Return the layers whose receptive field was measured: the stages in order, then the head."""
    found = {
        match[1]
        for run in _all(runs)
        for name in run.metrics
        if (match := ERF_RADIUS.fullmatch(name))
    }
    return sorted(found, key=lambda layer: (not layer.startswith("stage"), len(layer), layer))


def radii(runs: Runs, layer: str, percent: int) -> dict[str, list[float]]:
    """Return the last radius of a layer's ERF in pixels, by variant, one value for each seed."""
    column = f"val/erf/{layer}/radius{percent}"
    return {
        variant: [run.metrics[column].last for run in by_seed.values() if column in run.metrics]
        for variant, by_seed in runs.items()
    }


def erf_figure(runs: Runs) -> Figure | None:
    """Plot the radii that hold 50 % and 95 % of each layer's ERF at the end of the training.

    Returns:
        The figure with one panel for each layer; None if no receptive field was measured.
    """
    found, names = layers(runs), [name for name, by_seed in runs.items() if by_seed]
    if not found:
        return None
    num_columns = min(len(found), LAYERS_IN_A_ROW)
    num_rows = -(-len(found) // num_columns)
    figure = Figure(
        figsize=(PAGE_WIDTH, num_rows * (0.75 + 0.34 * len(names)) + 0.45), layout="constrained"
    )
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    for axes, layer in zip(grid.flat, found):
        variant_rows(axes, names)
        axes.set_title(printable(layer, 24), fontsize=10, color=INK, parse_math=False)
        highest = 0.0
        for percent, color, offset in ((50, BLUE, -0.14), (95, ORANGE, 0.14)):
            by_variant = radii(runs, layer, percent)
            bands = np.array([spread(by_variant[name]) for name in names])
            row = np.arange(len(names)) + offset
            axes.hlines(row, bands[:, 1], bands[:, 2], color=color, linewidth=1.6)
            axes.plot(
                bands[:, 0],
                row,
                "o" if percent == 50 else "s",
                color=color,
                markersize=4.5,
                label=f"radius holding {percent} % of the ERF",
            )
            if np.isfinite(bands).any():
                highest = max(highest, float(np.nanmax(bands)))
        axes.set_xlim(0, 1.08 * highest if highest else 1)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    for axes in list(grid.flat)[len(found) :]:
        axes.set_visible(False)
    figure.supxlabel("distance from the unit (pixels of the image)", fontsize=10, color=INK)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside upper left",
        ncols=2,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    return figure


def _all(runs: Runs) -> Iterable[Run]:
    return (run for by_seed in runs.values() for run in by_seed.values())
