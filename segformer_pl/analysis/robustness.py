"""Robustness to image corruptions: results file, table and figure.

Table and figure follow the paper's Table 5 (16 corruptions in four groups) and Fig. 7 (mIoU by
severity).
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from segformer_pl.analysis.fonts import fit_text
from segformer_pl.analysis.results_file import markdown_table, read_rows, write_rows
from segformer_pl.analysis.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    VERMILLION,
    style_axes,
)
from segformer_pl.errors import UserError

CLEAN = "clean"
# Of a smaller clean mIoU, that of a network which has learnt next to nothing, a ratio is noise.
LEAST_CLEAN_MIOU = 0.01
NOTES = (
    "Values are means over severities 1 to 3 for noise and 1 to 5 otherwise, as described in the "
    "paper (Sec. 4.4, App. D). UNVERIFIED: that the cells of its Table 5 are these means, and "
    "which software generated its images, because Cityscapes-C was never released. Other papers "
    "average all five severities of noise.",
    "Frost textures are generated, where the original package pastes photographs: do not compare "
    "this column, and the means that include it, with published values.",
    "Corruption strengths are in pixels: the same severity is milder in larger images. Published "
    "values are for Cityscapes, 2048x1024.",
)
NO_RATIO = (
    "Of clean: not given, because the clean mIoU is below {:g} %, too low for the ratio to mean "
    "anything."
)
GROUP_COLORS = (BLUE, ORANGE, GREEN, PURPLE)
LINES = ((BLUE, "o", "-"), (VERMILLION, "s", "--"), (GREEN, "^", "-."), (INK, "D", ":"))


@dataclass(frozen=True)
class Score:
    """mIoU under one corruption at one severity: a row of the results file.

    Attributes:
        group: ``blur``, ``noise``, ``digital`` or ``weather``; ``clean`` without a corruption.
        corruption: Name of the corruption, or ``clean``.
        severity: 1 to 5; 0 without a corruption.
        miou: mIoU as a fraction; nan without a labelled pixel.
        num_images: Number of images.
        dataset: Name of the data set.
        fingerprint: Fingerprint of the shards.
        checkpoint: First 16 digits of the SHA-256 of the checkpoint.
    """

    group: str
    corruption: str
    severity: int
    miou: float
    num_images: int
    dataset: str
    fingerprint: str
    checkpoint: str


def read_scores(file: Path) -> list[Score]:
    """Read the results file; an empty list if there is none yet.

    Raises:
        UserError: The file was not written by :func:`write_scores`.
    """
    return read_rows(file, Score, "robustness")


def write_scores(file: Path, scores: list[Score]) -> None:
    """Write the results file atomically.

    Raises:
        WriteError: The file cannot be written.
    """
    write_rows(file, scores, Score)


@dataclass(frozen=True)
class Robustness:
    """mIoU of one checkpoint with and without corruptions, as fractions.

    Attributes:
        clean: mIoU on the original images.
        severities: mIoU by group, corruption and severity.
        origin: A row of the results file, for data set, number of images and checkpoint.
    """

    clean: float
    severities: dict[str, dict[str, dict[int, float]]]
    origin: Score

    @property
    def corruptions(self) -> dict[str, dict[str, float]]:
        """mIoU by group and corruption: means over the evaluated severities."""
        return {
            group: {name: float(np.mean([*by.values()])) for name, by in names.items()}
            for group, names in self.severities.items()
        }

    @property
    def groups(self) -> dict[str, float]:
        """mIoU by group: means over its corruptions."""
        return {
            group: float(np.mean([*names.values()])) for group, names in self.corruptions.items()
        }

    @property
    def mean(self) -> float:
        """Mean over all corruptions, each with equal weight."""
        return float(np.mean([value for by in self.corruptions.values() for value in by.values()]))


def relative_miou(corrupted: float, clean: float) -> float:
    """Return corrupted mIoU / clean mIoU; nan if the clean one is below 1 %, or is nan."""
    return corrupted / clean if clean >= LEAST_CLEAN_MIOU else math.nan


def summarize(scores: list[Score]) -> Robustness:
    """Summarise the rows of a results file; groups and corruptions keep their order.

    Raises:
        UserError: The clean result is missing, or there is no other.
    """
    clean = [score for score in scores if score.corruption == CLEAN]
    if not clean or len(clean) == len(scores):
        raise UserError("a robustness table needs the clean mIoU and at least one corruption")
    severities: dict[str, dict[str, dict[int, float]]] = {}
    for score in scores:
        if score.corruption != CLEAN:
            by_name = severities.setdefault(score.group, {})
            by_name.setdefault(score.corruption, {})[score.severity] = score.miou
    return Robustness(clean[0].miou, severities, clean[0])


def as_dict(robustness: Robustness) -> dict[str, Any]:
    """Return plain data for JSON: what was evaluated, and every mIoU and mean as a fraction."""
    origin = asdict(robustness.origin)
    keys = ("dataset", "fingerprint", "num_images", "checkpoint")
    return {key: origin[key] for key in keys} | {
        "clean": robustness.clean,
        "mean": robustness.mean,
        "groups": robustness.groups,
        "corruptions": robustness.corruptions,
        "severities": robustness.severities,
    }


def markdown(robustness: Robustness) -> str:
    """Return a Markdown page: the paper's Table 5, group means, mIoU by severity, and notes."""
    origin, clean = robustness.origin, robustness.clean
    table = robustness.corruptions
    ratio = relative_miou(robustness.mean, clean)
    notes = (NO_RATIO.format(100 * LEAST_CLEAN_MIOU), *NOTES) if math.isnan(ratio) else NOTES
    names = [name for by in table.values() for name in by]
    levels = sorted({level for by in _rows(robustness).values() for level in by})
    lines = [
        "# Robustness",
        "",
        f"mIoU (%) of checkpoint {origin.checkpoint} (SHA-256) on {origin.num_images} validation "
        f"images of {origin.dataset}.",
        "",
        *markdown_table(
            ["clean", *(_title(name) for name in names)],
            [[_percent(clean), *(_percent(v) for by in table.values() for v in by.values())]],
        ),
        "",
        "Groups: "
        + "; ".join(
            f"{group}: {', '.join(_title(name) for name in by)}" for group, by in table.items()
        )
        + ".",
        "",
        *markdown_table(
            ["clean", *robustness.groups, f"all {len(names)}", "of clean"],
            [
                [
                    _percent(clean),
                    *(_percent(value) for value in robustness.groups.values()),
                    _percent(robustness.mean),
                    "\u2013" if math.isnan(ratio) else f"{100 * ratio:.1f} %",
                ]
            ],
        ),
        "",
        "By severity:",
        "",
        *markdown_table(
            ["", *map(str, levels)],
            [
                [_title(name), *(_percent(by[k]) if k in by else "" for k in levels)]
                for name, by in _rows(robustness).items()
            ],
        ),
        "",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines) + "\n"


def plot(robustness: Robustness) -> Figure:
    """Plot mIoU by corruption as bars (top) and mIoU by severity as curves (bottom)."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False).flat
    _draw_bars(above.subplots(), robustness)
    panels = below.subplots(1, len(robustness.severities), sharey=True, squeeze=False).flat
    for axes, (group, names) in zip(panels, robustness.severities.items()):
        style_axes(axes)
        for (name, by_severity), (color, marker, line) in zip(names.items(), LINES):
            points = {0: robustness.clean} | by_severity
            axes.plot(
                list(points),
                [100 * value for value in points.values()],
                color=color,
                marker=marker,
                linestyle=line,
                markersize=4.5,
                linewidth=1.5,
                label=_title(name),
            )
        axes.set_title(group, loc="left", fontsize=10, color=INK, fontweight="bold")
        axes.set_xlabel("severity (0: clean)")
        axes.set_xlim(-0.2, max(5, *points) + 0.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
            ncols=2,
            fontsize=8,
            frameon=False,
            labelcolor=INK,
            columnspacing=1,
        )
    panels[0].set_ylabel("mIoU (%)")
    top = max(robustness.clean, *(v for by in _rows(robustness).values() for v in by.values()))
    if np.isfinite(top):
        panels[0].set_ylim(0, max(105 * top, 1))
    return fit_text(figure)


def _draw_bars(axes: Axes, robustness: Robustness) -> None:
    style_axes(axes)
    position, ticks, labels = 0.0, [], []
    for (group, by_name), color in zip(robustness.corruptions.items(), GROUP_COLORS):
        positions = [position + index for index in range(len(by_name))]
        heights = [100 * value for value in by_name.values()]
        mean = _percent(robustness.groups[group])
        bars = axes.bar(positions, heights, 0.78, color=color, label=f"{group}, mean {mean} %")
        # A white background keeps the clean mIoU's line from crossing out the numbers.
        for label in axes.bar_label(bars, fmt="%.1f", fontsize=8, color=INK, padding=2):
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        ticks += positions
        labels += [_title(name) for name in by_name]
        position = positions[-1] + 1.8
    clean = 100 * robustness.clean
    axes.axhline(clean, color=INK, linestyle="--", linewidth=1.2, label=f"clean {clean:.1f} %")
    axes.grid(False, axis="x")
    axes.set_xlim(-0.7, position - 1.1)
    axes.set_xticks(ticks, labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_ylabel("mIoU, mean over severities (%)")
    drawn = axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(robustness.groups) + 1,
        fontsize=9,
        frameon=False,
        labelcolor=INK,
        title=f"{robustness.origin.num_images} validation images of {robustness.origin.dataset}",
        title_fontsize=9,
        alignment="left",
    )
    drawn.get_title().set_parse_math(False)  # the name of the data set may contain $


def _rows(robustness: Robustness) -> dict[str, dict[int, float]]:
    return {name: by for names in robustness.severities.values() for name, by in names.items()}


def _title(name: str) -> str:
    return name.replace("_", " ")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"
