"""The tables of an arena: its systems, their receptive fields, published results, and CSV files."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

from segformer_pl.analysis.ablation import StudyResults, VariantSummary
from segformer_pl.analysis.arena import System, mean_radius
from segformer_pl.analysis.report.study_style import DASH
from segformer_pl.analysis.report.study_tables import CSV_COSTS, Column, Table, mean_text
from segformer_pl.analysis.robustness import LEAST_CLEAN_MIOU

FRONTIER_FILE = "arena_frontier.yaml"
MEASURE_HEADINGS = {
    "miou": "mIoU (%)",
    "boundary_iou": "boundary IoU (%)",
    "worst_decile": "worst 10 % of images: mIoU^I (%)",
    "robustness": "corrupted mIoU (% of clean)",
}
RESULT_NOTE = (
    "Results: mean over seeds \u00b1 half the width of its 95 % interval over seeds (t "
    "distribution); mIoU^I is the mean over images of the mIoU of each image"
)
COST_NOTE = (
    "Costs of one image of the training size. MACs: multiply-adds that are executed; latency: "
    "median, the systems in turn; activations: memory that a training step keeps for the backward "
    "pass"
)
PAPER_NOTE = (
    f"MACs of the paper: by its own count, which differs from what is executed; {DASH} where no "
    "published figure could be reproduced"
)


@dataclass(frozen=True)
class Published:
    """A published result.

    Attributes:
        system: Name of the system.
        parameters: Parameters in millions; None if not known.
        cost: Compute or latency, as stated.
        miou: mIoU in percent.
        protocol: How it was trained and evaluated.
        source: Where it is published.
    """

    system: str
    parameters: float | None
    cost: str
    miou: float
    protocol: str
    source: str


@dataclass(frozen=True)
class Frontier:
    """Published results on one data set.

    Attributes:
        dataset: The data set and its split.
        remark: What to keep in mind, in whole sentences.
        systems: The results.
    """

    dataset: str
    remark: str
    systems: tuple[Published, ...]


def read_frontier() -> Frontier:
    """Read the published results that come with the package."""
    text = files("segformer_pl.analysis.report").joinpath(FRONTIER_FILE).read_text("utf-8")
    content = yaml.safe_load(text)
    systems = tuple(Published(**entry) for entry in content["systems"])
    return Frontier(content["dataset"], content["remark"], systems)


def systems_table(systems: Sequence[System], robustness_images: str) -> Table:
    """Return the table of all systems: costs, accuracy, robustness.

    Args:
        systems: The systems, the reference first.
        robustness_images: Number of images of the robustness, as text.
    """
    has_paper = any(system.cost.get("paper_macs") is not None for system in systems)
    columns = [Column("#"), Column("system", False), Column("weights at the start", False)]
    columns += [Column("params (M)"), Column("MACs (G)")]
    columns += [Column("MACs of the paper (G)")] if has_paper else []
    columns += [Column("latency (ms)"), Column("activations (MB)"), Column("seeds")]
    columns += [Column(heading) for heading in MEASURE_HEADINGS.values()]
    rows = []
    for number, system in enumerate(systems, start=1):
        cost = system.cost
        cells = [str(number), system.name, system.start]
        cells += [_scaled(cost.get("parameters"), 1e6), _scaled(cost.get("macs"), 1e9)]
        cells += [_scaled(cost.get("paper_macs"), 1e9)] if has_paper else []
        cells += [_scaled(cost.get("latency_median_ms"), 1, 1)]
        cells += [_scaled(cost.get("activation_bytes"), 1e6, 1), str(system.num_seeds)]
        cells += [mean_text(system.measures[key]) for key in MEASURE_HEADINGS]
        rows.append(tuple(cells))
    robustness = (
        f"Corrupted mIoU: mean over 16 corruptions and their severities, relative to the mIoU of "
        f"the same {robustness_images} without corruptions; {DASH} where that is below "
        f"{100 * LEAST_CLEAN_MIOU:g} %"
    )
    notes = [RESULT_NOTE, robustness, COST_NOTE, *([PAPER_NOTE] if has_paper else [])]
    return Table(tuple(columns), tuple(rows), tuple(notes))


def radius_table(systems: Sequence[System], columns: Mapping[str, Mapping[str, str]]) -> Table:
    """Return the radius that holds half of the field of every feature map.

    Args:
        systems: The systems.
        columns: Feature map by column and system, see
            :func:`~segformer_pl.analysis.arena.align_maps`.
    """
    rows = []
    for number, system in enumerate(systems, start=1):
        cells = [str(number), system.name]
        for column, maps in columns.items():
            name = maps.get(system.name)
            cells.append(DASH if name is None else _radius_cell(system, name, column))
        rows.append(tuple(cells))
    headings = (Column("#"), Column("system", False), *(Column(f"{one} (px)") for one in columns))
    note = (
        "Radius about the unit in pixels of the image that holds half of the sum of the gradient: "
        "mean over seeds (lowest to highest seed)"
    )
    return Table(headings, tuple(rows), (note,))


def _radius_cell(system: System, name: str, column: str) -> str:
    text = radius_text(mean_radius(system, name))
    return text if name == column else f"{name}: {text}"


def radius_text(one: VariantSummary | None) -> str:
    """Format the mean radius with its range over seeds."""
    if one is None:
        return DASH
    low, high = min(one.values.values()), max(one.values.values())
    spread = "" if len(one.values) < 2 else f" ({low:.1f}\u2013{high:.1f})"
    return f"{one.mean:.1f}{spread}"


def frontier_table(frontier: Frontier) -> Table:
    """Return the published results."""
    columns = (
        Column("#"),
        Column("system", False),
        Column("mIoU (%)"),
        Column("params (M)"),
        Column("cost", False),
        Column("protocol", False),
        Column("source", False),
    )
    rows = tuple(
        (
            str(number),
            one.system,
            f"{one.miou:g}",
            DASH if one.parameters is None else f"{one.parameters:g}",
            one.cost,
            one.protocol,
            one.source,
        )
        for number, one in enumerate(frontier.systems, start=1)
    )
    return Table(columns, rows)


def systems_csv(results: StudyResults, systems: Sequence[System]) -> str:
    """Return all numbers of the systems as CSV, one row for each.

    Columns, with unknown values as empty cells:

    - ``study``, ``budget``, ``system``, ``is_reference``, ``num_seeds``, ``start`` (weights at the
      start) and ``note``;
    - ``parameters``, ``macs``, ``paper_macs``, ``activation_bytes``, ``latency_median_ms`` and
      ``latency_iqr_ms``;
    - ``<measure>``, ``<measure>_low``, ``<measure>_high`` and ``<measure>_sd`` over seeds, as
      fractions, for ``miou``, ``boundary_iou``, ``worst_decile`` and ``robustness``.
    """
    rows = []
    for system in systems:
        row: dict[str, Any] = {
            "study": results.name,
            "budget": results.budget,
            "system": system.name,
            "is_reference": str(system.name == results.reference).lower(),
            "num_seeds": system.num_seeds,
            "start": system.start,
            "note": system.note,
            **{key: system.cost.get(key) for key in CSV_COSTS},
        }
        for key in MEASURE_HEADINGS:
            one = system.measures[key]
            for name, attribute in (
                ("", "mean"),
                ("_low", "low"),
                ("_high", "high"),
                ("_sd", "sd"),
            ):
                row[f"{key}{name}"] = getattr(one, attribute, None)
        rows.append(row)
    return _csv(rows)


def radius_csv(systems: Sequence[System], columns: Mapping[str, Mapping[str, str]]) -> str:
    """Return the radii of all receptive fields as CSV, one row for each run and feature map.

    Columns: ``system``, ``seed``, ``column`` (of the figure), ``feature_map``, ``num_images``,
    ``radius_50``, ``radius_50_low``, ``radius_50_high``, and the same for ``radius_95``, in pixels,
    with 95 % intervals over images.
    """
    rows = []
    for system in systems:
        for seed, erf in system.erfs.items():
            for column, maps in columns.items():
                name = maps.get(system.name)
                if name not in erf.radius_50:
                    continue
                row: dict[str, Any] = {"system": system.name, "seed": seed, "column": column}
                row |= {"feature_map": name, "num_images": erf.num_images}
                for key, radii in (("radius_50", erf.radius_50), ("radius_95", erf.radius_95)):
                    value, low, high = radii[name]
                    row |= {key: value, f"{key}_low": low, f"{key}_high": high}
                rows.append(row)
    return _csv(rows)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    stream = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _cell(value) for key, value in row.items()})
    return stream.getvalue()


def _cell(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _scaled(value: float | None, unit: float, digits: int = 2) -> str:
    return DASH if value is None else f"{value / unit:,.{digits}f}"
