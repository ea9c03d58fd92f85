"""mIoU, compute and latency of a trained network under settings of test time: table and figure."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from segformer_pl.analysis.comparison import (
    ALPHA,
    Estimate,
    compare_evaluations,
    holm,
    points,
    without_nan,
)
from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.analysis.fonts import fit_text
from segformer_pl.analysis.results_file import markdown_table
from segformer_pl.analysis.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    style_axes,
)

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
COLORS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
HEADER = (
    "setting",
    "mIoU (%)",
    "difference",
    "95 % CI",
    "p",
    "agreement (%)",
    "GMACs",
    "of compute",
    "latency (ms)",
    "of latency",
    "changes",
)
NOTES = (
    "No setting was trained: the weights are those of the checkpoint, and a larger sr_ratio pools "
    "the results of the trained reduction before its LayerNorm.",
    "EDAFormer (arXiv 2407.17261) reports up to 61 % less compute at a small loss from reducing "
    "keys and values further at inference. UNVERIFIED for SegFormer: this table is a measurement "
    "of one network and data set, not a reproduction.",
    "Agreement is the share of the pixels that get the class which the network as it was trained "
    "predicts, be it right or wrong.",
    "SegFormer++ (arXiv 2405.14467) reports for MiT-B5 on Cityscapes, without training, 81.96 % "
    "mIoU at 1.90 times the speed where all 2x2 squares of queries are merged, against 82.39 %. "
    "Here a share of the squares is merged, those whose queries differ least.",
    "GMACs are multiply-adds of the network over all views and windows of an image; latency also "
    "covers resizing, upsampling and the choice of the class.",
)


@dataclass(frozen=True)
class TestTimeRow:
    """One setting: a row of the results file. What is measured last is nan, 0 or empty before.

    Attributes:
        setting: Name of the setting.
        changes: Its changes of network and inference protocol, as JSON.
        num_images: Number of evaluated images.
        dataset: Name of the data set.
        fingerprint: Fingerprint of the shards.
        checkpoint: First 16 digits of the SHA-256 of the checkpoint.
        miou: mIoU, a fraction.
        agreement: Share of the pixels that get the same class as with the first setting.
        difference: mIoU minus that of the first setting, on the same images.
        low: Lower bound of its 95 % interval over images (paired bootstrap).
        high: Upper bound.
        p_value: p-value of the paired permutation test, Holm-corrected for the number of settings.
        macs: Multiply-adds for an image of this size.
        height: Height of that image in pixels.
        width: Width of that image in pixels.
        latency_ms: Median time of its prediction in milliseconds.
        latency_iqr_ms: Interquartile range of the time.
        timed_on: Device and number of threads of the time.
    """

    __test__ = False  # the name begins like that of a test class

    setting: str
    changes: str
    num_images: int
    dataset: str
    fingerprint: str
    checkpoint: str
    miou: float
    agreement: float
    difference: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p_value: float = math.nan
    macs: int = 0
    height: int = 0
    width: int = 0
    latency_ms: float = math.nan
    latency_iqr_ms: float = math.nan
    timed_on: str = ""

    @property
    def is_resolved(self) -> bool:
        """Whether test and interval both say that the setting changes the mIoU."""
        return self.p_value < ALPHA and (self.low > 0 or self.high < 0)

    @property
    def description(self) -> str:
        """The changes as text, such as ``sr_ratios [16, 8, 2, 1]``."""
        content: dict[str, dict[str, Any]] = json.loads(self.changes)
        parts = [f"{k} {_plain(v)}" for changes in content.values() for k, v in changes.items()]
        return ", ".join(parts) or "none"


def with_differences(
    rows: Sequence[TestTimeRow], evaluations: Mapping[str, Evaluation]
) -> list[TestTimeRow]:
    """Compare every setting with the first one, paired by image.

    Args:
        rows: Rows of all settings.
        evaluations: Evaluation of every setting.

    Raises:
        UserError: The evaluations are not of the same images and labels.
    """
    reference, *others = rows
    trained = evaluations[reference.setting]
    differences: list[Estimate] = []
    p_values = []
    for row in others:
        compared = compare_evaluations(trained, evaluations[row.setting])
        differences.append(compared.difference)
        p_values.append(1.0 if compared.is_identical else compared.p_value)
    corrected = holm(np.array(p_values))
    return [
        replace(reference, difference=0.0, low=0.0, high=0.0, p_value=1.0),
        *(
            replace(row, difference=d.value, low=d.low, high=d.high, p_value=float(p))
            for row, d, p in zip(others, differences, corrected)
        ),
    ]


def as_dict(rows: Sequence[TestTimeRow]) -> dict[str, Any]:
    """Return plain data for JSON; mIoU and differences are fractions."""
    first = asdict(rows[0])
    shared = ("dataset", "fingerprint", "num_images", "checkpoint", "height", "width", "timed_on")
    settings = []
    for row in rows:
        values = {key: value for key, value in asdict(row).items() if key not in shared}
        values |= {"changes": json.loads(row.changes), "is_resolved": row.is_resolved}
        settings.append(values)
    result: dict[str, Any] = without_nan(
        {key: first[key] for key in shared} | {"settings": settings, "notes": list(NOTES)}
    )
    return result


def markdown(rows: Sequence[TestTimeRow]) -> str:
    """Return a Markdown page: one row for each setting, and what the numbers mean."""
    first = rows[0]
    lines = [
        "# Test-time settings",
        "",
        f"Checkpoint {first.checkpoint} (SHA-256) on {first.num_images} validation images of "
        f"{first.dataset}. Compute and latency are those of one image of {first.height}x"
        f"{first.width} pixels; latency is the median, measured in turn on {first.timed_on}. "
        f"Differences are to {first.setting}, in points of mIoU with their 95 % CI over images "
        "(paired bootstrap); p is that of the paired permutation test, Holm-corrected for the "
        f"{len(rows) - 1} settings.",
        "",
        *markdown_table(
            list(HEADER),
            [
                [
                    row.setting,
                    f"{100 * row.miou:.2f}",
                    *(
                        ["", "", "", ""]
                        if row is first
                        else [
                            points(row.difference) + (" *" if row.is_resolved else ""),
                            f"{points(row.low)} to {points(row.high)}",
                            f"{row.p_value:.2g}",
                            f"{100 * row.agreement:.2f}",
                        ]
                    ),
                    f"{row.macs / 1e9:.3g}",
                    f"{100 * row.macs / first.macs:.0f} %",
                    f"{row.latency_ms:.1f}",
                    f"{100 * row.latency_ms / first.latency_ms:.0f} %",
                    row.description,
                ]
                for row in rows
            ],
        ),
        "",
        *(f"- {sentence}" for sentence in (*conclusions(rows), *NOTES)),
    ]
    return "\n".join(lines) + "\n"


def conclusions(rows: Sequence[TestTimeRow]) -> list[str]:
    """Say in sentences which settings save time, and whether they change the mIoU."""
    first, *others = rows
    faster = [row for row in others if row.latency_ms < first.latency_ms - first.latency_iqr_ms]
    sentences = ["\\*: the difference is resolved, its interval excludes 0 and p is below 0.05."]
    kept = [row for row in faster if not row.is_resolved or row.difference > 0]
    if kept:
        best = min(kept, key=lambda row: row.latency_ms)
        sentences.append(
            f"The fastest setting without a resolved loss is {best.setting}: "
            f"{_less(best.latency_ms, first.latency_ms)} time and "
            f"{_less(best.macs, first.macs)} compute at {points(best.difference)} points of mIoU "
            f"(95 % CI {points(best.low)} to {points(best.high)})."
        )
    else:
        sentences.append(
            f"No setting is faster than {first.setting} by more than the interquartile range of "
            "its latency without a resolved loss of mIoU."
        )
    better = [row for row in others if row.is_resolved and row.difference > 0]
    if better:
        best = max(better, key=lambda row: row.difference)
        sentences.append(
            f"The largest resolved gain is that of {best.setting}: {points(best.difference)} "
            f"points of mIoU at {100 * best.latency_ms / first.latency_ms:.0f} % of the time."
        )
    return sentences


def plot(rows: Sequence[TestTimeRow]) -> Figure:
    """Plot mIoU against measured latency; bars are the interval of the difference to the first."""
    first = rows[0]
    figure = Figure(figsize=(9.5, max(4.4, 0.27 * len(rows) + 1.6)), layout="constrained")
    axes = figure.subplots()
    style_axes(axes)
    axes.axhline(100 * first.miou, color="#999999", linewidth=0.9, linestyle="--", zorder=1)
    for number, row in enumerate(rows):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        miou = 100 * row.miou
        below, above = (100 * abs(bound - row.difference) for bound in (row.low, row.high))
        axes.errorbar(
            row.latency_ms,
            miou,
            xerr=row.latency_iqr_ms / 2,
            yerr=None if row is first else [[below], [above]],
            color=INK if row is first else color,
            marker=marker,
            markersize=8 if row is first else 6,
            markeredgecolor="white",
            markeredgewidth=0.6,
            linestyle="none",
            elinewidth=1.1,
            label=f"{row.setting}, {row.macs / 1e9:.3g} GMACs",
            zorder=3,
        )
    axes.set_xlabel(f"latency of one image of {first.height}x{first.width} pixels (ms)")
    axes.set_ylabel("mIoU (%)")
    axes.set_xlim(left=0)
    legend = axes.legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        fontsize=9,
        frameon=False,
        labelcolor=INK,
        title=f"{first.num_images} validation images of {first.dataset}; bars: 95 % CI of\n"
        f"the difference to {first.setting}, and IQR of latency",
        title_fontsize=9,
        alignment="left",
    )
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)
    return fit_text(figure)


def _less(value: float, reference: float) -> str:
    share = 100 * (1 - value / reference)
    return f"{share:.0f} % less" if share >= 0 else f"{-share:.0f} % more"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
