"""The HTML page of a report: results, curves, figures and settings of a run."""

import base64
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from segformer_pl.analysis.metrics_table import Series
from segformer_pl.analysis.recipe import departures, remarks, scope
from segformer_pl.analysis.report.curves import CROSS_ENTROPY, draw_charts
from segformer_pl.analysis.report.evaluation_details import Details, describe
from segformer_pl.analysis.report.provenance_facts import describe_parts, unfinished
from segformer_pl.analysis.report.results import Results, class_colors, last_results
from segformer_pl.analysis.report.templates import render
from segformer_pl.analysis.run import Resumption, Run
from segformer_pl.analysis.throughput import is_shown
from segformer_pl.atomic import atomic_write_text
from segformer_pl.errors import UserError

REPORT_FILE = "report.html"


def write_report(run: Run) -> Path:
    """Write ``report.html`` into the folder of a finished, running or interrupted run.

    Requires ``metrics.csv`` (Lightning's CSVLogger). Configurations, the last evaluation of each
    split, figures and all other files are optional. Damaged ones are left out, and the report lists
    them.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no ``metrics.csv``.
        UserError: A cell of ``metrics.csv`` is not a number.
        WriteError: The report cannot be written.
    """
    results = last_results(run)
    details, unreadable = _details(results)
    config, resumptions, unread = _settings(run)
    figures = [
        _figures(run, "predictions", "Predictions"),
        _figures(run, "erf", "Effective receptive field"),
    ]
    html = render(
        "report.html.j2",
        run_name=run.name,
        facts=_facts(config),
        results=results,
        details=details,
        unreadable=[*unreadable, *unread],
        colors=class_colors(run),
        steps_trained=run.num_steps,
        max_steps=_max_steps(config),
        first_bad_step=_first_bad_step(run.metrics.get("train/loss")),
        train_loss=_recent_train_loss(run.metrics.get("train/loss")),
        loss_name=_loss_name(config),
        unfinished=unfinished(run, _max_steps(config)),
        findings=run.findings,
        resumptions=resumptions,
        charts=(
            draw_charts(run.metrics, _loss_name(config), [part.step for part in resumptions])
            if run.num_steps
            else []
        ),
        figures=[figure for figure in figures if figure],
        throughput=run.throughput if is_shown(run.throughput) else None,
        worst=_figures(run, "worst", "Images with the highest loss"),
        scope=scope(config) if config else "",
        departures=departures(config) if config else [],
        remarks=remarks(config) if config else [],
        parts=describe_parts(run),
        config=run.config_text,
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
    )
    report = run.folder / REPORT_FILE
    atomic_write_text(report, html)
    return report


def _details(results: Sequence[Results]) -> tuple[dict[str, Details], list[str]]:
    """Return details by split, and one sentence for each evaluation that cannot be read."""
    details, unreadable = {}, []
    for result in results:
        if result.evaluation is not None:
            try:
                details[result.split] = describe(result.evaluation.load())
            except ValueError as error:  # leave it out and write the rest of the report
                unreadable.append(str(error))
    return details, unreadable


def _settings(run: Run) -> tuple[dict[str, Any], list[Resumption], list[str]]:
    """Return configuration and resumptions, and one sentence if they cannot be read."""
    try:
        return run.config, run.resumptions, []
    except UserError as error:
        return {}, [], [str(error)]


def _recent_train_loss(loss: Series | None) -> float:
    """Return the median of the last ten logged values."""
    return math.nan if loss is None else float(np.median(loss.value[-10:]))


def _first_bad_step(loss: Series | None) -> int | None:
    if loss is None or np.isfinite(loss.value).all():
        return None
    return int(loss.step[np.argmin(np.isfinite(loss.value))])


def _max_steps(config: dict[str, Any]) -> int | None:
    max_steps = (config.get("trainer") or {}).get("max_steps")
    return max_steps if isinstance(max_steps, int) and max_steps > 0 else None


def _loss_name(config: dict[str, Any]) -> str:
    """Return the class name of the training loss, cross-entropy by default."""

    def name(loss: Any) -> str:
        path = loss.get("class_path") if isinstance(loss, dict) else None
        return str(path).rpartition(".")[2] if path else CROSS_ENTROPY

    loss = (config.get("model") or {}).get("loss")
    arguments = (loss.get("init_args") or {}) if isinstance(loss, dict) else {}
    if name(loss) == "WeightedSum":
        parts = zip(arguments.get("weights") or [], arguments.get("losses") or [], strict=False)
        return " + ".join(f"{weight:g} {name(part)}" for weight, part in parts) or name(loss)
    return name(loss)


def _facts(config: dict[str, Any]) -> dict[str, str]:
    """Return data set, network, seed and checkpoint, as far as the configuration states them."""
    network = ((config.get("model") or {}).get("network") or {}).get("class_path")
    facts = {
        "data set": (config.get("data") or {}).get("dataset"),
        "network": network and network.rpartition(".")[2],
        "seed": config.get("seed_everything"),
        "checkpoint": config.get("ckpt_path"),
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def _figures(run: Run, kind: str, title: str) -> dict[str, Any] | None:
    """Return the last figure of a kind and, if there are several, the first one."""
    files = run.figures(kind)
    if not files:
        return None

    def embed(step: int) -> dict[str, Any]:
        encoded = base64.b64encode(files[step].read_bytes()).decode("ascii")
        return {"step": step, "uri": f"data:image/png;base64,{encoded}"}

    return {
        "id": kind,
        "title": title,
        "last": embed(max(files)),
        "first": embed(min(files)) if len(files) > 1 else None,
    }
