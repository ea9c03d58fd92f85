"""Differences of a study's variants from the reference, class by class."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from segformer_pl.analysis.ablation import StudySummary
from segformer_pl.analysis.comparison import ClassDifference
from segformer_pl.analysis.report.study_style import PAGE_WIDTH, signed, wrapped
from segformer_pl.analysis.style import CELL_DARK, CELL_LIGHT, FAINT, INK, printable

MAX_SHOWN_CLASSES = 16  # classes of the heat map, those with the largest differences
CLASS_NAME_LENGTH = 22  # characters
# Moreland's map: lightness falls evenly to both sides, and blue against red is distinguishable with
# every kind of colour vision. Reversed: gains are blue.
COLORS = "coolwarm_r"
# Relative luminance of a cell (WCAG) above which dark numbers have more contrast than white ones.
BRIGHT = 0.245
MIN_LIMIT = 1.0  # points at the ends of the colour map, at least; noise should not look strong


@dataclass(frozen=True)
class ClassRow:
    """One class in all variants.

    Attributes:
        name: Name of the class.
        reference: IoU of the reference, mean over seeds; nan where the class is absent.
        num_images: Number of images with labelled pixels of the class.
        differences: Difference of each variant, in the order of the summary; None where a variant
            has no value.
    """

    name: str
    reference: float
    num_images: int
    differences: tuple[ClassDifference | None, ...]

    @property
    def largest(self) -> float:
        """Largest absolute difference; -1 if there is none."""
        values = [
            abs(one.difference.value)
            for one in self.differences
            if one is not None and math.isfinite(one.difference.value)
        ]
        return max(values, default=-1.0)


def class_rows(summary: StudySummary) -> list[ClassRow]:
    """Return the classes, those with the largest differences first and absent ones last."""
    by_variant = [{one.name: one for one in d.classes} for d in summary.differences]
    names = list(dict.fromkeys(name for classes in by_variant for name in classes))
    rows = []
    for name in names:
        differences = tuple(classes.get(name) for classes in by_variant)
        present = next(one for one in differences if one is not None)
        rows.append(ClassRow(name, present.iou_a, present.num_images, differences))
    return sorted(rows, key=lambda row: -row.largest)


def class_figure(rows: Sequence[ClassRow], variants: Sequence[str]) -> Figure | None:
    """Draw the largest differences as a heat map, one row for each variant.

    The number in a cell is the difference in percentage points. It is bold where the difference
    is significant after Holm's correction for the number of classes.

    Returns:
        The figure; None if there is no difference to show.
    """
    shown = [row for row in rows if row.largest >= 0][:MAX_SHOWN_CLASSES]
    if not shown or not variants:
        return None
    values = np.array(
        [
            [math.nan if one is None else 100 * one.difference.value for one in row.differences]
            for row in shown
        ]
    ).T
    limit = max(MIN_LIMIT, float(np.nanmax(np.abs(values))))
    colors, norm = colormaps[COLORS].with_extremes(bad=FAINT), Normalize(-limit, limit)
    # Cells keep a readable size: few classes do not fill the width of the page.
    width = min(PAGE_WIDTH, 3.3 + 0.62 * len(shown))
    names = [printable(row.name, CLASS_NAME_LENGTH) for row in shown]
    above = 0.2 + 0.055 * max(map(len, names))  # inches; the names stand at 45 degrees
    height = above + 0.36 * len(variants) + 0.75
    figure = Figure(figsize=(width, height), layout="constrained")
    # Inches, so that cells and colour bar keep their sizes.
    axes, bar_axes = figure.subplots(2, 1, height_ratios=(0.36 * len(variants), 0.12))
    image = axes.imshow(values, colors, norm, interpolation="none", aspect="auto")
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.set_yticks(range(len(variants)), [wrapped(name) for name in variants], parse_math=False)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(shown)), names, parse_math=False)
    for text in axes.get_xticklabels():
        text.set(rotation=45, ha="left", rotation_mode="anchor")
    # White lines between the cells.
    axes.set_xticks(np.arange(len(shown) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(variants) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    luminance = _linear(colors(norm(values))[..., :3]) @ [0.2126, 0.7152, 0.0722]
    for (variant, column), value in np.ndenumerate(values):
        one = shown[column].differences[variant]
        if one is None or math.isnan(value):
            continue
        axes.text(
            column,
            variant,
            signed(value, 1),
            color=CELL_DARK if luminance[variant, column] > BRIGHT else CELL_LIGHT,
            fontsize=8.5 if len(shown) < 13 else 8,
            weight="bold" if one.is_significant else "normal",
            ha="center",
            va="center",
        )
    bar = figure.colorbar(image, cax=bar_axes, orientation="horizontal")
    bar.set_label("difference in IoU from the reference (points)", color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=9, length=3)
    return figure


def _linear(colors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """sRGB values in 0 to 1 -> linear light, for relative luminance."""
    return np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
