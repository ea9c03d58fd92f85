"""The tables of a study: the main one, those of further evaluations, and all numbers as CSV."""

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segformer_pl.analysis.ablation import (
    StudyResults,
    StudySummary,
    VariantDifference,
    VariantSummary,
)
from segformer_pl.analysis.report.study_style import DASH, difference_text, p_text
from segformer_pl.analysis.style import printable

HEADINGS = {
    "miou": "mIoU (%)",
    "image_miou": "mIoU^I (%)",
    "class_miou": "mIoU^C (%)",
    "worst_decile": "worst 10 % of images: mIoU^I (%)",
    "worst_decile_by_class": "worst 10 % of images: mIoU^C (%)",
}
NETWORK = "model.network.init_args."  # left out of the names of changed settings
RESULT_NOTE = (
    "Results: mean over seeds \u00b1 half the width of its 95 % interval over seeds (t "
    "distribution); mIoU^I is the mean over images of the mIoU of each image"
)
DIFFERENCE_NOTE = (
    "Difference: from the reference, paired by seed and image, with its 95 % interval over seeds "
    "and images (with one seed, over images alone); bold where it is resolved (p < 0.05)"
)
MAX_SETTING_LENGTH = 60  # characters of a value
# Characters that Markdown or HTML give a meaning within a line.
MARKUP = re.compile(r"([\\`*_\[\]<>|~&#!@$])")
KEYS = ("study", "budget", "variant", "protocol", "measure", "is_reference")
CSV_COSTS = (
    "parameters",
    "macs",
    "paper_macs",
    "activation_bytes",
    "latency_median_ms",
    "latency_iqr_ms",
)

Costs = Mapping[str, Mapping[str, Any]]  # by variant


@dataclass(frozen=True)
class Column:
    """Heading of a table's column, and whether its cells are numbers, aligned to the right."""

    heading: str
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        columns: Headings.
        rows: Cells of each row; the second one is the name of the variant.
        notes: Explanations of the columns, one sentence each.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def main_table(
    results: StudyResults, summaries: Mapping[str, StudySummary], costs: Costs | None
) -> Table:
    """Return the table of all variants: changes, costs, results and differences.

    Args:
        results: Runs of the study.
        summaries: Summaries by measure, the main one first.
        costs: Costs by variant; None leaves their columns out.
    """
    main, *others = summaries.values()
    columns = [Column("#"), Column("variant", False), Column("changes", False)]
    if costs is not None:
        columns += [Column("params (M)"), Column("MACs (G)"), Column("latency (ms)")]
    columns += [Column("seeds"), Column(HEADINGS[main.measure])]
    columns += [Column("difference (points)"), Column("p (Holm)")]
    columns += [Column(HEADINGS[other.measure]) for other in others]
    rows = []
    for number, (variant, changes) in enumerate(results.changes.items(), start=1):
        cells = [str(number), variant, changes_text(changes)]
        if costs is not None:
            cost = costs.get(variant, {})
            cells += [_scaled(cost.get("parameters"), 1e6), _scaled(cost.get("macs"), 1e9)]
            cells += [_scaled(cost.get("latency_median_ms"), 1, 1)]
        cells += _result_cells(main, variant, results.reference)
        cells += [mean_text(summary_of(other, variant)) for other in others]
        rows.append(tuple(cells))
    return Table(tuple(columns), tuple(rows), (RESULT_NOTE, DIFFERENCE_NOTE))


def evaluation_table(results: StudyResults, summary: StudySummary) -> Table:
    """Return means and differences of all variants in one further evaluation."""
    columns = (
        Column("#"),
        Column("variant", False),
        Column("seeds"),
        Column(HEADINGS[summary.measure]),
        Column("difference (points)"),
        Column("p (Holm)"),
    )
    rows = tuple(
        (str(number), variant, *_result_cells(summary, variant, results.reference))
        for number, variant in enumerate(results.changes, start=1)
    )
    return Table(columns, rows, (f"Evaluated on {summary.images}",))


def cost_table(costs: Costs) -> Table:
    """Return all costs of the variants, with those of the attention in every stage if known."""
    number = max((len(cost.get("stages") or ()) for cost in costs.values()), default=0)
    has_paper = any(cost.get("paper_macs") is not None for cost in costs.values())
    columns = [Column("#"), Column("variant", False), Column("params (M)"), Column("MACs (G)")]
    notes = []
    if has_paper:
        columns.append(Column("MACs of the paper (G)"))
        notes.append(
            "MACs: multiply-adds that are executed; MACs of the paper: by its own count, which "
            "leaves operations out"
        )
    columns += [Column("latency (ms)"), Column("activations (MB)")]
    notes.append(
        "Latency: median of single images, with the interquartile range; activations: memory that "
        "a training step keeps for the backward pass, for one image"
    )
    if number:
        columns += [Column(f"stage {i + 1}: keys / MACs (M)") for i in range(number)]
        notes.append("Stages: number of keys that each query attends to / MACs of the attention")
    rows = []
    for place, (variant, cost) in enumerate(costs.items(), start=1):
        cells = [str(place), variant]
        cells += [_scaled(cost.get("parameters"), 1e6), _scaled(cost.get("macs"), 1e9)]
        cells += [_scaled(cost.get("paper_macs"), 1e9)] if has_paper else []
        cells += [_latency(cost), _scaled(cost.get("activation_bytes"), 1e6, 1)]
        stages = [*(cost.get("stages") or ()), *({} for _ in range(number))]
        cells += [
            f"{_scaled(stage.get('keys'), 1, 0)} / {_scaled(stage.get('attention_macs'), 1e6)}"
            for stage in stages[:number]
        ]
        rows.append(tuple(cells))
    return Table(tuple(columns), tuple(rows), tuple(notes))


def summary_of(summary: StudySummary, variant: str) -> VariantSummary | None:
    """Return the summary of a variant; None if it has no finished run."""
    return next((one for one in summary.variants if one.variant == variant), None)


def difference_of(summary: StudySummary, variant: str) -> VariantDifference | None:
    """Return the difference of a variant from the reference; None if there is none."""
    return next((one for one in summary.differences if one.variant == variant), None)


def changes_text(changes: Mapping[str, Any]) -> str:
    """Return changed settings in one line, without the path of the network's arguments."""
    parts = []
    for key, value in changes.items():
        text = json.dumps(value, default=str, ensure_ascii=False)
        if len(text) > MAX_SETTING_LENGTH:
            text = f"{text[: MAX_SETTING_LENGTH // 2]}\u2026{text[-MAX_SETTING_LENGTH // 2 :]}"
        parts.append(f"{key.removeprefix(NETWORK)} = {text}")
    return "; ".join(parts) or DASH


def mean_text(one: VariantSummary | None) -> str:
    """Format mean ± half of the interval in percent; the mean alone with one seed."""
    if one is None or math.isnan(one.mean):
        return DASH
    mean = f"{100 * one.mean:.2f}"
    half = (one.high - one.low) / 2
    return mean if math.isnan(half) else f"{mean} ± {100 * half:.2f}"


def _result_cells(summary: StudySummary, variant: str, reference: str) -> tuple[str, ...]:
    one, difference = summary_of(summary, variant), difference_of(summary, variant)
    seeds = str(len(one.values)) if one else "0"
    if variant == reference:
        return seeds, mean_text(one), "reference", DASH
    p_value = math.nan if difference is None else difference.p_holm
    return seeds, mean_text(one), difference_text(difference), p_text(p_value)


def _latency(cost: Mapping[str, Any]) -> str:
    median, iqr = cost.get("latency_median_ms"), cost.get("latency_iqr_ms")
    text = _scaled(median, 1, 1)
    return text if median is None or iqr is None else f"{text} (IQR {iqr:.1f})"


def _scaled(value: float | None, unit: float, digits: int = 2) -> str:
    return DASH if value is None else f"{value / unit:,.{digits}f}"


def markdown_table(table: Table, bold: frozenset[str] = frozenset()) -> str:
    """Return a table in GitHub's Markdown, with the differences of ``bold`` variants in bold."""
    lines = [
        _markdown_row(markdown_text(column.heading) for column in table.columns),
        _markdown_row("---:" if column.is_number else "---" for column in table.columns),
    ]
    for row in table.rows:
        cells = [markdown_text(cell) for cell in row]
        if row[1] in bold:
            (index,) = (i for i, c in enumerate(table.columns) if c.heading.startswith("diff"))
            cells[index] = f"**{cells[index]}**"
        lines.append(_markdown_row(cells))
    return "\n".join(lines)


def markdown_text(text: str, max_length: int = 5000) -> str:
    """Escape text for one line of Markdown."""
    return MARKUP.sub(r"\\\1", printable(text, max_length))


def _markdown_row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def csv_text(
    results: StudyResults,
    summaries: Mapping[tuple[str, str], StudySummary],
    costs: Costs | None,
) -> str:
    """Return all statistics as CSV, one row for each variant, evaluation and measure.

    Columns, with nan and unknown values as empty cells, and all results as fractions:

    - ``study``, ``budget``, ``variant``, ``protocol`` (``val`` is that at the end of the
      training), ``measure`` (keys of :data:`~segformer_pl.analysis.ablation.MEASURES`);
    - ``is_reference``; ``num_images``; ``num_seeds``; ``mean``, ``low``, ``high``, ``sd`` over
      seeds;
    - ``difference``, ``difference_low``, ``difference_high`` from the reference; ``se_seeds``,
      ``se_images``, ``df``, ``p_value``, ``p_holm``, ``effect_size``, ``is_resolved``; empty for
      the reference;
    - with costs: ``parameters``, ``macs``, ``paper_macs``, ``activation_bytes``,
      ``latency_median_ms`` and ``latency_iqr_ms`` of the variant.

    Args:
        results: Runs of the study.
        summaries: Summaries by evaluation and measure.
        costs: Costs by variant; None leaves their columns out.
    """
    stream = io.StringIO(newline="")
    writer: csv.DictWriter[str] | None = None
    for (evaluation, measure), summary in summaries.items():
        for one in summary.variants:
            difference = difference_of(summary, one.variant)
            row: dict[str, Any] = {
                **_keys(results, one.variant, evaluation, measure),
                "num_images": summary.num_images,
                "num_seeds": len(one.values),
                **{name: getattr(one, name) for name in ("mean", "low", "high", "sd")},
            }
            names = {"value": "difference", "low": "difference_low", "high": "difference_high"}
            for name in (
                *names,
                "se_seeds",
                "se_images",
                "df",
                "p_value",
                "p_holm",
                "effect_size",
                "is_resolved",
            ):
                row[names.get(name, name)] = getattr(difference, name, None)
            if costs is not None:
                cost = costs.get(one.variant, {})
                row |= {name: cost.get(name) for name in CSV_COSTS}
            row = {name: _csv_cell(value) for name, value in row.items()}
            if writer is None:
                writer = csv.DictWriter(stream, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
    return stream.getvalue()


def seeds_csv_text(results: StudyResults, summaries: Mapping[tuple[str, str], StudySummary]) -> str:
    """Return the value of every seed as tidy CSV, one row for each value.

    Columns: ``study``, ``budget``, ``variant``, ``protocol``, ``measure`` and ``is_reference`` as
    in :func:`csv_text`, by which the two can be merged; ``seed``; ``value``, a fraction; and
    ``difference`` from the reference with the same seed, empty for the reference and without one.
    A table of the mIoU with a row for each variant and a column for each seed is::

        seeds = pandas.read_csv("seeds.csv").query("protocol == 'val' and measure == 'miou'")
        seeds.pivot(index="variant", columns="seed", values="value")

    Args:
        results: Runs of the study.
        summaries: Summaries by evaluation and measure.
    """
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow((*KEYS, "seed", "value", "difference"))
    for (evaluation, measure), summary in summaries.items():
        for one in summary.variants:
            difference = difference_of(summary, one.variant)
            differences = {} if difference is None else difference.values
            keys = _keys(results, one.variant, evaluation, measure)
            for seed, value in one.values.items():
                row = (*keys.values(), seed, value, differences.get(seed))
                writer.writerow([_csv_cell(cell) for cell in row])
    return stream.getvalue()


def _keys(results: StudyResults, variant: str, evaluation: str, measure: str) -> dict[str, Any]:
    is_reference = variant == results.reference
    values = (results.name, results.budget, variant, evaluation, measure, is_reference)
    return dict(zip(KEYS, values, strict=True))


def _csv_cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).lower() if isinstance(value, bool) else value


def resolved_variants(summary: StudySummary) -> frozenset[str]:
    """Return the variants whose difference is resolved."""
    return frozenset(one.variant for one in summary.differences if one.is_resolved)


def costs_by_variant(costs: Sequence[Mapping[str, Any]] | None, names: Sequence[str]) -> Costs:
    """Return the costs of the variants of a study, in its order."""
    by_name = {str(cost.get("variant")): cost for cost in costs or ()}
    return {name: by_name[name] for name in names if name in by_name}
