"""The report of a study from its run folders: ``report.html``, and tables for other programs."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from matplotlib.figure import Figure

from segformer_pl.analysis import style
from segformer_pl.analysis.ablation import (
    MEASURES,
    StudyResults,
    StudySummary,
    read_results,
    summarize_measures,
)
from segformer_pl.analysis.report.page import REPORT_FILE
from segformer_pl.analysis.report.study_charts import (
    Point,
    evaluations_figure,
    forest_figure,
    pareto_figure,
)
from segformer_pl.analysis.report.study_classes import MAX_SHOWN_CLASSES, class_figure, class_rows
from segformer_pl.analysis.report.study_curves import curve_figure, erf_figure
from segformer_pl.analysis.report.study_style import PAGE_WIDTH, signed
from segformer_pl.analysis.report.study_tables import (
    Costs,
    Table,
    cost_table,
    costs_by_variant,
    csv_text,
    evaluation_table,
    main_table,
    markdown_table,
    markdown_text,
    resolved_variants,
    seeds_csv_text,
    summary_of,
)
from segformer_pl.analysis.report.study_text import outcome
from segformer_pl.analysis.report.templates import render
from segformer_pl.analysis.run import Run
from segformer_pl.atomic import atomic_write_text
from segformer_pl.errors import UserError

BREAKS = "+,_=/"  # characters of a name after which a line may break
PAGE_PIXELS = 1088  # width of a figure of the whole page
TABLE_FILE, CSV_FILE, SEEDS_FILE, COSTS_FILE = "table.md", "table.csv", "seeds.csv", "costs.json"
MAIN = "val"  # the evaluation at the end of the training, in tables
TABLE_MEASURES = ("miou", "image_miou", "worst_decile")
COST_AXES = {
    "MACs of an image (G)": ("macs", 1e9),
    "latency of an image (ms)": ("latency_median_ms", 1.0),
    "activation memory (MB)": ("activation_bytes", 1e6),
}


@dataclass(frozen=True)
class Chart:
    """A figure of the page.

    Attributes:
        title: Caption.
        svg: The figure.
        alt: What it shows, for readers who cannot see it.
        note: How to read it.
        is_wide: Whether it takes the whole width of the page.
        width: Width on the page in pixels, at most, so that all figures have one text size.
    """

    title: str
    svg: Markup
    alt: str
    note: str
    is_wide: bool
    width: int


def write_study_report(
    folder: Path,
    budget: str,
    costs: Sequence[Mapping[str, Any]] | None = None,
    digests: Mapping[str, str] | None = None,
    block_size: int = 1,
) -> Path:
    """Write ``report_<budget>/`` into the folder of a study, from its run folders alone.

    It holds ``table.md`` for GitHub, ``table.csv`` with all statistics (columns: see
    :func:`~.study_tables.csv_text`), ``seeds.csv`` with the value of each seed (columns: see
    :func:`~.study_tables.seeds_csv_text`) and ``report.html``.

    Args:
        folder: Folder of the study, such as ``runs/ablations/reduction_ratio``.
        budget: Name of the budget.
        costs: Costs of each variant: ``variant``, ``parameters``, ``macs``, ``paper_macs``,
            ``activation_bytes``, ``latency_median_ms``, ``latency_iqr_ms``, and ``stages``, a list
            with ``keys`` and ``attention_macs`` of each stage. Default: those in ``costs.json`` of
            the report's folder. Unknown ones may be missing or None.
        digests: Digest of the settings of each variant, see
            :func:`~segformer_pl.analysis.ablation.read_results`.
        block_size: Number of contiguous images that are left out together, see
            :func:`~segformer_pl.analysis.ablation.summarize_study`.

    Returns:
        Path of ``report.html``.

    Raises:
        UserError: There are no such runs, they do not belong together, or ``costs.json`` is
            damaged.
        WriteError: A file cannot be written.
    """
    results = read_results(folder, budget, digests)
    target = folder / f"report_{budget}"
    costs = _read_costs(target / COSTS_FILE) if costs is None else costs
    by_variant = costs_by_variant(costs, list(results.changes)) or None
    summaries, left_out = _summaries(results, block_size)
    shown = {measure: summaries[MAIN, measure] for measure in TABLE_MEASURES}
    table = main_table(results, shown, by_variant)
    if shown["miou"].variants:
        sentences = outcome(shown, results.reference)
    else:
        sentences = ["Nothing can be compared yet."]
    html = render(
        "study.html.j2",
        results=results,
        num_runs=sum(len(by_seed) for by_seed in results.runs.values()),
        outcome=sentences,
        results_table=table,
        resolved=resolved_variants(shown["miou"]),
        summary=shown["miou"],
        images=shown["miou"].images,
        left_out=left_out,
        **_figures(results, summaries, by_variant),
        evaluations=_evaluation_tables(results, summaries),
        classes=class_rows(shown["miou"]),
        class_variants=[one.variant for one in shown["miou"].differences],
        signed=signed,
        breakable=breakable,
        costs=cost_table(by_variant) if by_variant else None,
        runs=_run_links(results, shown["miou"], target),
        transplanted=_transplanted(results),
        environments=_environments(results),
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
    )
    texts = {
        TABLE_FILE: _markdown(results, sentences, table, shown["miou"]),
        CSV_FILE: csv_text(results, summaries, by_variant),
        SEEDS_FILE: seeds_csv_text(results, summaries),
        REPORT_FILE: html,
    }
    for name, text in texts.items():
        # Class names may contain unpaired surrogates, which UTF-8 cannot encode.
        atomic_write_text(target / name, text.encode(errors="replace").decode())
    return target / REPORT_FILE


def breakable(name: str) -> Markup:
    """Escape a name for HTML, and allow line breaks after its separators."""
    return Markup("").join(
        Markup("{}<wbr>").format(letter) if letter in BREAKS else letter for letter in name
    )


def _read_costs(file: Path) -> list[dict[str, Any]] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise UserError(
            f"'{file}' does not hold the costs of a study's variants; delete it, or run `ablate` "
            "again"
        )
    return content


def _summaries(
    results: StudyResults, block_size: int
) -> tuple[dict[tuple[str, str], StudySummary], list[str]]:
    """Return summaries by evaluation and measure, and a sentence for each evaluation without."""
    summaries, left_out = {}, []
    for evaluation in (None, *_named_evaluations(results)):
        measures = tuple(MEASURES) if evaluation is None else TABLE_MEASURES
        try:
            found = summarize_measures(results, measures, evaluation, block_size)
        except UserError as error:
            found = {measure: StudySummary(measure, (), (), 0, "", ()) for measure in measures}
            left_out.append(str(error))
        for measure, summary in found.items():
            if summary.variants or evaluation is None:
                summaries[evaluation or MAIN, measure] = summary
    return summaries, left_out


def _named_evaluations(results: StudyResults) -> list[str]:
    names = [name for run in _runs(results) for name in (run.ablation or {}).get("evaluations", [])]
    return list(dict.fromkeys(str(name) for name in names))


def _runs(results: StudyResults) -> Iterator[Run]:
    return (run for by_seed in results.runs.values() for run in by_seed.values())


def _figures(
    results: StudyResults,
    summaries: Mapping[tuple[str, str], StudySummary],
    costs: Costs | None,
) -> dict[str, Any]:
    """Return the charts of each section, and a sentence about those that are missing."""
    main = summaries[MAIN, "miou"]
    readable = {
        variant: {seed: run for seed, run in by_seed.items() if _has_metrics(run)}
        for variant, by_seed in results.runs.items()
        if by_seed
    }
    pareto, no_pareto = _pareto(results, main, costs)
    curves = [
        make_chart(
            curve_figure(readable, column),
            title,
            f"{title} of every variant over the training steps, with a band over its seeds",
            "Line: mean over seeds; band: from the lowest to the highest seed.",
        )
        for column, title in (("val/miou", "Validation mIoU"), ("train/loss", "Training loss"))
    ]
    named = {name: summaries[name, "miou"] for name, measure in summaries if measure == "miou"}
    return {
        "forest": make_chart(
            forest_figure(main) if main.differences else None,
            f"Differences from {results.reference}",
            "Differences of all variants from the reference; the numbers are in the table above",
            "The interval covers other seeds and other images, with one seed images alone; the "
            "bars below it show what each of the two contributes. All are paired by seed and "
            "image.",
        ),
        "pareto": pareto,
        "no_pareto": no_pareto,
        "heat_map": make_chart(
            class_figure(class_rows(main), [one.variant for one in main.differences]),
            "Differences of the IoU of each class",
            "Differences of the IoU of each class from the reference; the table below has all "
            "numbers",
            f"At most {MAX_SHOWN_CLASSES} classes, those with the largest differences first. Bold: "
            "p < 0.05 after Holm's correction for the number of classes, for each variant by "
            "itself.",
        ),
        "curves": [chart for chart in curves if chart],
        "erf": make_chart(
            erf_figure(readable),
            "Radius of the effective receptive field",
            "Radii that hold half and 95 % of the effective receptive field of each layer, for "
            "every variant",
            "Point: mean over seeds; line: from the lowest to the highest seed. Measured after "
            "the last validation.",
        ),
        "lines": make_chart(
            evaluations_figure(named, "mIoU (%)") if len(named) > 1 and main.variants else None,
            "mIoU over the evaluations",
            "mIoU of every variant in every evaluation; the numbers are in the tables below",
            f"Point: mean over seeds; bar: from the lowest to the highest seed. \u201c{MAIN}\u201d "
            "is the validation at the end of the training.",
        ),
    }


def make_chart(figure: Figure | None, title: str, alt: str, note: str) -> Chart | None:
    """Return a figure as a chart of the page; None without a figure."""
    if figure is None:
        return None
    width = figure.get_size_inches()[0] / PAGE_WIDTH
    # Otherwise matplotlib draws the whole figure once more, only to make the layout.
    style.execute_layout(figure)
    figure.set_layout_engine(None)
    svg = style.inline_svg(figure)
    return Chart(title, svg, alt, note, bool(width > 0.6), round(width * PAGE_PIXELS))


def _has_metrics(run: Run) -> bool:
    try:
        return bool(run.metrics)
    except (FileNotFoundError, UserError):
        return False


def _pareto(
    results: StudyResults, main: StudySummary, costs: Costs | None
) -> tuple[Chart | None, str]:
    """Return the plot of mIoU against the costs, and a sentence about costs that are left out."""
    if costs is None:
        return None, f"There is no {COSTS_FILE} beside this report, so costs are left out."
    panels, same = {}, []
    for label, (key, unit) in COST_AXES.items():
        points = []
        for number, variant in enumerate(results.changes, start=1):
            one, cost = summary_of(main, variant), costs.get(variant, {})
            if one is None or cost.get(key) is None or math.isnan(one.mean):
                continue
            spread = cost.get("latency_iqr_ms") if key == "latency_median_ms" else None
            points.append(
                Point(
                    number,
                    variant,
                    cost[key] / unit,
                    (spread or 0.0) / 2,
                    100 * one.mean,
                    100 * one.sd,
                )
            )
        if len(points) < 2 or points[0].name != results.reference:
            continue
        if len({point.cost for point in points}) == 1:
            same.append(label.partition(" (")[0])
        else:
            panels[label] = points
    sentence = f"All variants have the same {' and '.join(same)}." if same else ""
    if not panels:
        return None, sentence or "There are too few variants with known costs to plot them."
    chart = make_chart(
        pareto_figure(panels, "mIoU (%)"),
        "mIoU against costs",
        f"mIoU of every variant against {', '.join(panels)}; the numbers are in the table above",
        "Vertical bars: ± 1 standard deviation over seeds; horizontal bars of the latency: "
        "interquartile range over passes. No other variant costs less and has a higher mean than "
        "one on the Pareto front; differences that are not resolved can change the front.",
    )
    return chart, sentence


def _evaluation_tables(
    results: StudyResults, summaries: Mapping[tuple[str, str], StudySummary]
) -> dict[str, tuple[Table, frozenset[str]]]:
    """Return table and resolved variants of each named evaluation."""
    return {
        name: (evaluation_table(results, summary), resolved_variants(summary))
        for (name, measure), summary in summaries.items()
        if measure == "miou" and name != MAIN
    }


def _run_links(
    results: StudyResults, summary: StudySummary, target: Path
) -> dict[str, list[tuple[int, float, str | None]]]:
    """Return seed, mIoU, and relative address of the report of every run, by variant."""
    links: dict[str, list[tuple[int, float, str | None]]] = {}
    for variant, by_seed in results.runs.items():
        one = summary_of(summary, variant)
        for seed, run in by_seed.items():
            address = None
            if (run.folder / REPORT_FILE).is_file():
                relative = os.path.relpath(run.folder / REPORT_FILE, target)
                address = quote(Path(relative).as_posix())
            value = one.values.get(seed, math.nan) if one else math.nan
            links.setdefault(variant, []).append((seed, value, address))
    return links


def _transplanted(results: StudyResults) -> dict[str, list[str]]:
    """Return what was transplanted into each variant, one sentence each."""
    sentences = {}
    for variant, by_seed in results.runs.items():
        found = [
            str(sentence)
            for run in by_seed.values()
            for sentence in (run.ablation or {}).get("transplanted") or []
        ]
        if found:
            sentences[variant] = list(dict.fromkeys(found))
    return sentences


def _environments(results: StudyResults) -> list[tuple[dict[str, Any], list[str]]]:
    """Return the different environments, and the names of the runs in each."""
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for variant, by_seed in results.runs.items():
        for seed, run in by_seed.items():
            environment = dict((run.ablation or {}).get("environment") or {})
            key = json.dumps(environment, sort_keys=True, default=str)
            found.setdefault(key, (environment, []))[1].append(f"{variant}, seed {seed}")
    return list(found.values())


def _markdown(
    results: StudyResults, sentences: Sequence[str], table: Table, summary: StudySummary
) -> str:
    """Return the table with question, outcome and method, to be pasted into an issue."""
    parts = [
        f"### {markdown_text(results.name)} ({markdown_text(results.budget)})",
        markdown_text(results.question),
        markdown_text(" ".join(sentences)),
        markdown_table(table, resolved_variants(summary)),
        "\n".join(f"- {markdown_text(note)}." for note in table.notes),
        markdown_text(summary.method),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
