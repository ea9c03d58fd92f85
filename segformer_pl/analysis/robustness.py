"""Scores on corrupted pictures: the file they are kept in, the table and the figure made from it.

The layout is that of the paper's Table 5 (16 corruptions in four groups) and Fig. 7 (mIoU by
severity).
"""

import csv
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from segformer_pl.analysis.style import BLUE, GREEN, INK, ORANGE, PURPLE, VERMILLION
from segformer_pl.atomic import atomic_write_text
from segformer_pl.errors import UserError

CLEAN = "clean"
NOTES = (
    "Mean over severities 1 to 3 for noise and 1 to 5 otherwise, as in the paper (Sec. 4.4, App. "
    "D). That each cell of its Table 5 is this mean is UNVERIFIED, and so is which software made "
    "its pictures: Cityscapes-C was never released. Others average all five severities of noise.",
    "Frost is drawn by a generator, in place of the photographs of the original package: do not "
    "compare this column, and the means that it is part of, with published figures.",
    "Strengths are in pixels: the same severity is milder on larger pictures. Published figures "
    "are for Cityscapes, 2048x1024.",
)
GROUP_COLORS = (BLUE, ORANGE, GREEN, PURPLE)
LINES = ((BLUE, "o", "-"), (VERMILLION, "s", "--"), (GREEN, "^", "-."), (INK, "D", ":"))


@dataclass(frozen=True)
class Score:
    """One row of the file: what a network reached in one setting, and what was scored.

    Attributes:
        group: ``blur``, ``noise``, ``digital`` or ``weather``; ``clean`` without a corruption.
        corruption: Its name, or ``clean``.
        severity: 1 to 5; 0 without a corruption.
        miou: A fraction; nan where no pixel is labelled.
        num_images: Number of pictures.
        dataset: Name of the data set.
        fingerprint: Of its shards.
        checkpoint: SHA-256 of the checkpoint, its first 16 digits.
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
    """The finished settings; none if there is no file yet.

    Raises:
        UserError: The file is not one that :func:`write_scores` wrote.
    """
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        try:
            return [
                Score(**{field.name: field.type(row[field.name]) for field in fields(Score)})  # type: ignore[operator]
                for row in reader
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file}, line {reader.line_num}: this is no row of scores ({error}); remove the "
                "file, or give another folder"
            ) from None


def write_scores(file: Path, scores: list[Score]) -> None:
    """Write them all; an interruption leaves either the old file or the new one.

    Raises:
        WriteError: The file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(Score)])
    writer.writeheader()
    writer.writerows(asdict(score) for score in scores)
    atomic_write_text(file, text.getvalue())


@dataclass(frozen=True)
class Robustness:
    """mIoU of one checkpoint, fractions.

    Attributes:
        clean: On the pictures as they are.
        severities: By group, corruption and severity.
        origin: Any score of them, for what was scored.
    """

    clean: float
    severities: dict[str, dict[str, dict[int, float]]]
    origin: Score

    @property
    def corruptions(self) -> dict[str, dict[str, float]]:
        """By group and corruption: mean over the severities that were scored."""
        return {
            group: {name: float(np.mean([*by.values()])) for name, by in names.items()}
            for group, names in self.severities.items()
        }

    @property
    def groups(self) -> dict[str, float]:
        """By group: mean over its corruptions."""
        return {
            group: float(np.mean([*names.values()])) for group, names in self.corruptions.items()
        }

    @property
    def mean(self) -> float:
        """Over all corruptions, each of which counts once."""
        return float(np.mean([value for by in self.corruptions.values() for value in by.values()]))


def summarize(scores: list[Score]) -> Robustness:
    """Groups and corruptions in the order of the scores.

    Raises:
        UserError: The clean score is missing, or every other one.
    """
    clean = [score for score in scores if score.corruption == CLEAN]
    if not clean or len(clean) == len(scores):
        raise UserError("a table of robustness needs a clean score and others to compare it with")
    severities: dict[str, dict[str, dict[int, float]]] = {}
    for score in scores:
        if score.corruption != CLEAN:
            by_name = severities.setdefault(score.group, {})
            by_name.setdefault(score.corruption, {})[score.severity] = score.miou
    return Robustness(clean[0].miou, severities, clean[0])


def as_dict(robustness: Robustness) -> dict[str, Any]:
    """For JSON: what was scored, and every mIoU and mean as a fraction."""
    origin = asdict(robustness.origin)
    kept = ("dataset", "fingerprint", "num_images", "checkpoint")
    return {key: origin[key] for key in kept} | {
        "clean": robustness.clean,
        "mean": robustness.mean,
        "groups": robustness.groups,
        "corruptions": robustness.corruptions,
        "severities": robustness.severities,
    }


def markdown(robustness: Robustness) -> str:
    """The page: Table 5, means of groups, mIoU by severity, and what to know about them."""
    origin, clean = robustness.origin, robustness.clean
    table = robustness.corruptions
    names = [name for by in table.values() for name in by]
    levels = sorted({level for by in _rows(robustness).values() for level in by})
    lines = [
        "# Robustness",
        "",
        f"mIoU in percent of checkpoint {origin.checkpoint} (SHA-256) on {origin.num_images} "
        f"validation pictures of {origin.dataset}.",
        "",
        *_table(
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
        *_table(
            ["clean", *robustness.groups, f"all {len(names)}", "of clean"],
            [
                [
                    _percent(clean),
                    *(_percent(value) for value in robustness.groups.values()),
                    _percent(robustness.mean),
                    f"{100 * _ratio(robustness.mean, clean):.1f} %",
                ]
            ],
        ),
        "",
        "By severity:",
        "",
        *_table(
            ["", *map(str, levels)],
            [
                [_title(name), *(_percent(by[k]) if k in by else "" for k in levels)]
                for name, by in _rows(robustness).items()
            ],
        ),
        "",
        *(f"- {note}" for note in NOTES),
    ]
    return "\n".join(lines) + "\n"


def plot(robustness: Robustness) -> Figure:
    """Above a bar for each corruption against the clean score, below mIoU by severity."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False).flat
    _draw_bars(above.subplots(), robustness)
    panels = below.subplots(1, len(robustness.severities), sharey=True, squeeze=False).flat
    for axes, (group, names) in zip(panels, robustness.severities.items()):
        _style(axes)
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
    return figure


def _draw_bars(axes: Axes, robustness: Robustness) -> None:
    _style(axes)
    position, ticks, labels = 0.0, [], []
    for (group, by_name), color in zip(robustness.corruptions.items(), GROUP_COLORS):
        places = [position + number for number in range(len(by_name))]
        heights = [100 * value for value in by_name.values()]
        mean = _percent(robustness.groups[group])
        bars = axes.bar(places, heights, 0.78, color=color, label=f"{group}, mean {mean} %")
        # On white, so that the line of the clean score does not strike a number out.
        for label in axes.bar_label(bars, fmt="%.1f", fontsize=8, color=INK, padding=2):
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        ticks += places
        labels += [_title(name) for name in by_name]
        position = places[-1] + 1.8
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
        title=f"{robustness.origin.num_images} validation pictures of {robustness.origin.dataset}",
        title_fontsize=9,
        alignment="left",
    )
    drawn.get_title().set_parse_math(False)  # the name of the data set is no mathematics


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def _rows(robustness: Robustness) -> dict[str, dict[int, float]]:
    return {name: by for names in robustness.severities.values() for name, by in names.items()}


def _title(name: str) -> str:
    return name.replace("_", " ")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _ratio(value: float, clean: float) -> float:
    return value / clean if clean else float("nan")


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
