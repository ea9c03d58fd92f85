"""The page of a run: the results, curves, figures and settings of a run in its HTML template."""

import base64
import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from segformer_pl.analysis import style
from segformer_pl.analysis.recipe import departures, remarks, scope
from segformer_pl.analysis.report.curves import CROSS_ENTROPY, draw_charts
from segformer_pl.analysis.report.evaluation_details import Details, describe
from segformer_pl.analysis.report.results import Results, class_colors, last_results
from segformer_pl.analysis.run import Resumption, Run, Series
from segformer_pl.atomic import atomic_write_text
from segformer_pl.errors import UserError

REPORT_FILE = "report.html"
DASH = "\u2013"


def write_report(run: Run) -> Path:
    """Write ``report.html`` into a run folder; works for finished, running and broken-off runs.

    Needs ``metrics.csv`` (from Lightning's CSVLogger). The configurations, the evaluation of the
    last pass over each split, the figures and the other files of a run are shown where they exist;
    one that is damaged is left out, and the report says so.

    Returns:
        The path of the report.

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
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            style=style,
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
            findings=run.findings,
            resumptions=resumptions,
            charts=(
                draw_charts(run.metrics, _loss_name(config), [part.step for part in resumptions])
                if run.num_steps
                else []
            ),
            figures=[figure for figure in figures if figure],
            worst=_figures(run, "worst", "Pictures with the highest loss"),
            scope=scope(config) if config else "",
            departures=departures(config) if config else [],
            remarks=remarks(config) if config else [],
            config=run.config_text,
            written=f"{datetime.now():%Y-%m-%d %H:%M}",
        )
    )
    report = run.folder / REPORT_FILE
    # Text of others can hold what UTF-8 cannot: half of a surrogate pair.
    atomic_write_text(report, html.encode(errors="replace").decode())
    return report


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("segformer_pl.analysis", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["share"] = _share
    environment.filters["setting"] = _setting
    environment.filters["decimal"] = lambda value: DASH if math.isnan(value) else f"{value:.3f}"
    return environment


def _details(results: Sequence[Results]) -> tuple[dict[str, Details], list[str]]:
    """By split; and why the rest cannot be read, in one sentence each."""
    details, unreadable = {}, []
    for one in results:
        if one.evaluation is not None:
            try:
                details[one.split] = describe(one.evaluation.load())
            except ValueError as error:  # the rest of the report is worth having
                unreadable.append(str(error))
    return details, unreadable


def _settings(run: Run) -> tuple[dict[str, Any], list[Resumption], list[str]]:
    """Configuration and resumptions; and why they cannot be read, in one sentence."""
    try:
        return run.config, run.resumptions, []
    except UserError as error:
        return {}, [], [str(error)]


def _recent_train_loss(loss: Series | None) -> float:
    """Median of the last ten logged values."""
    return math.nan if loss is None else float(np.median(loss.value[-10:]))


def _first_bad_step(loss: Series | None) -> int | None:
    if loss is None or np.isfinite(loss.value).all():
        return None
    return int(loss.step[np.argmin(np.isfinite(loss.value))])


def _percent(value: float) -> str:
    return DASH if math.isnan(value) else f"{100 * value:.1f}\u00a0%"


def _share(value: float) -> str:
    """With two digits after the point, for what is often small."""
    if math.isnan(value):
        return DASH
    return "<\u00a00.01\u00a0%" if 0 < value < 5e-5 else f"{100 * value:.2f}\u00a0%"


def _setting(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:40]}...{text[-40:]}"


def _max_steps(config: dict[str, Any]) -> int | None:
    max_steps = (config.get("trainer") or {}).get("max_steps")
    return max_steps if isinstance(max_steps, int) and max_steps > 0 else None


def _loss_name(config: dict[str, Any]) -> str:
    """Of the training loss; the paper's where the configuration names none."""

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
    """What was run on what, as far as the configuration says it."""
    network = ((config.get("model") or {}).get("network") or {}).get("class_path")
    facts = {
        "data set": (config.get("data") or {}).get("dataset"),
        "network": network and network.rpartition(".")[2],
        "seed": config.get("seed_everything"),
        "checkpoint": config.get("ckpt_path"),
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def _figures(run: Run, kind: str, title: str) -> dict[str, Any] | None:
    """The last figure of a kind and, if it is another one, the first."""
    files = run.figures(kind)
    if not files:
        return None

    def embed(step: int) -> dict[str, Any]:
        encoded = base64.b64encode(files[step].read_bytes()).decode("ascii")
        return {"step": step, "uri": f"data:image/png;base64,{encoded}"}

    return {
        "title": title,
        "last": embed(max(files)),
        "first": embed(min(files)) if len(files) > 1 else None,
    }
