"""The report of an arena: tables, figures and the page, from its run folders."""

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

import numpy as np
from markupsafe import Markup

from segformer_pl.analysis.ablation import StudyResults, summarize_measures
from segformer_pl.analysis.arena import System, align_maps, mean_radius
from segformer_pl.analysis.erf import load_erf
from segformer_pl.analysis.erf.captions import describe_settings
from segformer_pl.analysis.erf.extent import energy_radius
from segformer_pl.analysis.report.arena_charts import Field, cost_figure, field_figure
from segformer_pl.analysis.report.arena_tables import (
    Frontier,
    frontier_table,
    radius_csv,
    radius_table,
    read_frontier,
    systems_csv,
    systems_table,
)
from segformer_pl.analysis.report.page import REPORT_FILE
from segformer_pl.analysis.report.study_page import (
    CSV_FILE,
    TABLE_FILE,
    breakable,
    make_chart,
)
from segformer_pl.analysis.report.study_tables import Table, markdown_table, markdown_text
from segformer_pl.analysis.report.study_text import outcome
from segformer_pl.analysis.report.templates import render
from segformer_pl.atomic import atomic_write, atomic_write_text
from segformer_pl.errors import UserError

ERF_FIGURE, ERF_CSV = "erf", "erf.csv"
DPI = {"png": 200, "pdf": 300}
MEASURES = ("miou", "worst_decile")  # those of the outcome in words


@dataclass(frozen=True)
class FieldFigure:
    """The figure of all receptive fields.

    Attributes:
        files: Content of the figure's file by format, ``png`` and ``pdf``.
        caption: What it shows, in whole sentences.
    """

    files: dict[str, bytes]
    caption: str

    @property
    def url(self) -> Markup:
        """The PNG file as a data URL."""
        return Markup(f"data:image/png;base64,{base64.b64encode(self.files['png']).decode()}")


def write_arena_report(
    folder: Path,
    results: StudyResults,
    systems: Sequence[System],
    robustness_images: int,
    block_size: int = 1,
    study_report: Path | None = None,
) -> Path:
    """Write the report of an arena.

    It holds ``table.md`` for GitHub, ``table.csv`` (columns: see
    :func:`~.arena_tables.systems_csv`), ``report.html``, and, if receptive fields were measured,
    ``erf.png``, ``erf.pdf`` and ``erf.csv`` (columns: see :func:`~.arena_tables.radius_csv`).

    Args:
        folder: Folder of the report.
        results: Runs of the study.
        systems: Its systems, the reference first.
        robustness_images: Number of images that robustness was asked to be measured on.
        block_size: Number of consecutive images that are left out together, see
            :func:`~segformer_pl.analysis.ablation.summarize_study`.
        study_report: Report of the study, which the page links to.

    Returns:
        Path of ``report.html``.

    Raises:
        WriteError: A file cannot be written.
    """
    frontier = read_frontier()
    first = {s.name: next(iter(s.erfs.values())) for s in systems if s.erfs}
    columns = align_maps({name: list(erf.radius_50) for name, erf in first.items()})
    table = systems_table(systems, _images(robustness_images))
    fields, unread = _fields(systems, columns)
    missing = [*(text for system in systems for text in system.missing), *unread]
    sentences = _outcome(results, block_size)
    starts = _starts(systems)
    published = frontier_table(frontier)
    html = render(
        "arena.html.j2",
        results=results,
        num_runs=sum(system.num_seeds for system in systems),
        outcome=sentences,
        starts=starts,
        systems=systems,
        systems_table=table,
        missing=missing,
        pareto=make_chart(
            cost_figure(systems),
            "mIoU against costs",
            "mIoU of every system against MACs and latency; the numbers are in the table above",
            "Vertical bars: ± 1 standard deviation over seeds; horizontal bars of the latency: "
            "interquartile range over passes. No other system costs less and has a higher mean "
            "than one on the Pareto front; differences that are not resolved can change it.",
        ),
        fields=fields,
        radii=radius_table(systems, columns) if first else None,
        frontier=frontier,
        published=published,
        breakable=breakable,
        study_report=None if study_report is None else _address(study_report, folder),
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
    )
    texts = {
        TABLE_FILE: _markdown(results, sentences, starts, systems, table, missing, frontier),
        CSV_FILE: systems_csv(results, systems),
        REPORT_FILE: html,
    }
    if first:
        texts[ERF_CSV] = radius_csv(systems, columns)
    if fields is not None:
        for kind, content in fields.files.items():
            with atomic_write(folder / f"{ERF_FIGURE}.{kind}") as stream:
                stream.write(content)
    for name, text in texts.items():
        # Class names and ids may contain unpaired surrogates, which UTF-8 cannot encode.
        atomic_write_text(folder / name, text.encode(errors="replace").decode())
    return folder / REPORT_FILE


def _outcome(results: StudyResults, block_size: int) -> list[str]:
    """Return what the study resolves in words; a sentence if nothing can be compared."""
    try:
        summaries = summarize_measures(results, MEASURES, block_size=block_size)
    except UserError as error:
        return [f"Differences between the systems cannot be tested: {error}."]
    return outcome(summaries, results.reference)


def _starts(systems: Sequence[System]) -> str:
    """Return how many of the trained systems start from random weights, as a sentence."""
    systems = [system for system in systems if system.num_seeds]
    num = sum(system.start == "random" for system in systems)
    if num == len(systems):
        return "All systems were trained from random weights."
    if num == 0:
        return "No system was trained from random weights."
    verb = "was" if num == 1 else "were"
    return f"{num} of {len(systems)} systems {verb} trained from random weights, see the table."


def _fields(
    systems: Sequence[System], columns: Mapping[str, Mapping[str, str]]
) -> tuple[FieldFigure | None, list[str]]:
    """Return the figure of receptive fields, and a sentence for each system it lacks."""
    rows: dict[str, dict[str, Field]] = {}
    unread, without_maps, facts = [], [], []
    for system in systems:
        if not system.erfs:
            continue
        seeds = [seed for seed, erf in system.erfs.items() if erf.file.is_file()]
        if not seeds:
            without_maps.append(system.name)
            continue
        seed = min(seeds)
        stored = system.erfs[seed]
        try:
            layers = load_erf(stored.file).layers
        except UserError as error:
            unread.append(f"{system.name}: {error}")
            continue
        rows[system.name] = row = {}
        for column, maps in columns.items():
            layer = layers.get(maps.get(system.name, ""))
            if layer is None or layer.position is None:
                continue
            radius = mean_radius(system, layer.name)
            title = "" if layer.name == column else layer.name
            value = math.nan if radius is None else radius.mean
            row[column] = Field(title, layer.mean, layer.position, value)
        facts.append((system.name, seed, stored))
    if without_maps:
        unread.append(
            f"{', '.join(without_maps)}: the figure has no row, because the maps of receptive "
            "fields (.npz) are missing; the radii are in their table all the same"
        )
    if not facts:
        return None, unread
    shown = [column for column in columns if any(column in row for row in rows.values())]
    _, seed, stored = facts[0]
    height, width = stored.settings["image_size"]
    uniform = energy_radius(np.ones((height, width)), 0.5, (height // 2, width // 2))
    numbers = sorted({erf.num_images for *_, erf in facts})
    counts = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    caption = (
        f"Rows are systems and columns feature maps; {shown[-1]} is the last map, which the "
        f"classifier reads. Maps: mean over {counts} validation images of {height}x{width} pixels, "
        f"seed {seed}; {describe_settings(stored.settings)}. The circle and the number above a "
        "panel are the radius that holds half of the field, mean over seeds; a field that is equal "
        f"everywhere has {uniform:.1f} px."
    )
    figure, files = field_figure(rows, shown), {}
    for kind, dpi in DPI.items():
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, dpi=dpi)
        files[kind] = stream.getvalue()
    return FieldFigure(files, caption), unread


def _images(number: int) -> str:
    return "image" if number == 1 else f"{number} images"


def _address(file: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(file, folder)).as_posix())


def _markdown(
    results: StudyResults,
    sentences: Sequence[str],
    starts: str,
    systems: Sequence[System],
    table: Table,
    missing: Sequence[str],
    frontier: Frontier,
) -> str:
    """Return all tables with their notes, to be pasted into an issue."""
    published = frontier_table(frontier)
    notes = [f"{system.name}: {system.note}" for system in systems if system.note]
    parts = [
        f"### {markdown_text(results.name)} ({markdown_text(results.budget)})",
        markdown_text(results.question),
        markdown_text(" ".join([*sentences, starts])),
        markdown_table(table),
        _bullets([*(f"{note}." for note in table.notes), *notes]),
        _bullets([f"Not measured: {text}." for text in missing]),
        f"#### Published results of 2026, for orientation ({markdown_text(frontier.dataset)})",
        markdown_text(frontier.remark),
        markdown_table(published),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {markdown_text(sentence)}" for sentence in sentences)
