"""The report of one run: a single HTML file, made from nothing but the files of the run folder."""

import base64
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from segformer_pl.analysis.charts import CROSS_ENTROPY, draw_charts
from segformer_pl.analysis.evaluation import EVALUATION_FOLDER, load_evaluation
from segformer_pl.analysis.evaluation_details import Details, describe
from segformer_pl.analysis.recipe import departures, remarks, scope
from segformer_pl.analysis.run_history import (
    CONFIG_FILE,
    read_config,
    read_configs,
    read_findings,
    read_resumptions,
)
from segformer_pl.analysis.run_metrics import Series, num_steps_trained, read_metrics
from segformer_pl.atomic import atomic_write_text

REPORT_FILE = "report.html"
DASH = "\u2013"


@dataclass(frozen=True)
class ClassScore:
    """IoU of one class, a fraction, nan if the class is absent; ``color`` is CSS or None."""

    name: str
    iou: float
    color: str | None
    mark: str = ""

    @property
    def is_absent(self) -> bool:
        return math.isnan(self.iou)


@dataclass(frozen=True)
class Ceiling:
    """A reference value that the data set publishes, and how the last mIoU compares with it."""

    name: str
    value: float
    miou: float

    @property
    def is_exceeded(self) -> bool:
        return self.miou > self.value

    @property
    def points(self) -> float:
        """mIoU minus ceiling in percentage points."""
        return 100 * (self.miou - self.value)


@dataclass(frozen=True)
class Scores:
    """What the last pass over a split gave; fractions, nan where nothing was logged.

    ``step`` and ``best_step`` are training steps, None if the folder holds no training. The pass
    was logged in step ``logged_step``.
    """

    split: str
    logged_step: int
    step: int | None
    loss: float
    miou: float
    macc: float
    aacc: float
    fwiou: float
    boundary_iou: float
    ece: float
    best_miou: float
    best_step: int | None
    ceilings: list[Ceiling]
    classes: list[ClassScore]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder; works for finished, running and broken-off runs.

    Reads ``metrics.csv`` (from Lightning's CSVLogger) and, where they exist, ``config.yaml`` and
    those of resumptions, ``findings.json``, ``hparams.yaml``, the ``evaluation/*.npz`` of the last
    pass over each split, and the last and first of ``predictions/step_*.png``,
    ``worst/step_*.png`` and ``erf/step_*.png``.
    An evaluation that is damaged is left out, and the report says so.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no ``metrics.csv``.
        ValueError: a cell of ``metrics.csv`` is not a number.
        WriteError: The report cannot be written.
    """
    columns = read_metrics(run_dir)
    resumptions = read_resumptions(run_dir)
    # Of the last part: what the network that is there was trained with in the end.
    config = list(read_configs(run_dir).values())[-1]
    scores = _all_scores(columns, run_dir)
    details, unreadable = _all_details(run_dir, scores)
    path = run_dir.resolve()
    steps_trained = num_steps_trained(columns)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("segformer_pl", "analysis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["share"] = _share
    environment.filters["setting"] = _setting
    environment.filters["decimal"] = lambda value: DASH if math.isnan(value) else f"{value:.3f}"
    config_file = run_dir / CONFIG_FILE
    html = environment.get_template("report.html.j2").render(
        run_name=f"{path.parent.name}/{path.name}",
        facts=_facts(config),
        scores=scores,
        details=details,
        unreadable=unreadable,
        colors=_class_colors(run_dir)[1],
        steps_trained=steps_trained,
        max_steps=_max_steps(config),
        first_bad_step=_first_bad_step(columns.get("train/loss")),
        train_loss=_recent_train_loss(columns.get("train/loss")),
        loss_name=_loss_name(config),
        findings=read_findings(run_dir),
        resumptions=resumptions,
        charts=(
            draw_charts(columns, _loss_name(config), [part.step for part in resumptions])
            if steps_trained
            else []
        ),
        figures=[
            figure
            for figure in (
                _read_figures(run_dir, "predictions", "Predictions"),
                _read_figures(run_dir, "erf", "Effective receptive field"),
            )
            if figure
        ],
        worst=_read_figures(run_dir, "worst", "Pictures with the highest loss"),
        scope=scope(config) if config else "",
        departures=departures(config) if config else [],
        remarks=remarks(config) if config else [],
        config=config_file.read_text(encoding="utf-8") if config_file.is_file() else "",
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
    )
    report = run_dir / REPORT_FILE
    # Text of others can hold what UTF-8 cannot: half of a surrogate pair.
    atomic_write_text(report, html.encode(errors="replace").decode())
    return report


def summary(run_dir: Path) -> str:
    """The run in one line, ``mIoU 83.1 % (locality ceiling 77.8 %)``; empty without scores.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no ``metrics.csv``.
        ValueError: a cell of ``metrics.csv`` is not a number.
    """
    parts = []
    for scores in _all_scores(read_metrics(run_dir), run_dir):
        part = f"mIoU {100 * scores.miou:.1f} %"
        if scores.split != "val":
            part = f"{scores.split} {part}"
        notes = [f"{c.name} {100 * c.value:.1f} %" for c in scores.ceilings]
        if scores.best_step != scores.step:
            notes.append(f"best {100 * scores.best_miou:.1f} % at step {scores.best_step}")
        if notes:
            part += f" ({', '.join(notes)})"
        parts.append(part)
    return ", ".join(parts)


def _all_scores(columns: dict[str, Series], run_dir: Path) -> list[Scores]:
    names, colors = _class_colors(run_dir)
    is_trained = num_steps_trained(columns) > 0
    return [
        _scores(columns, split, names, colors, is_trained)
        for split in ("val", "test")
        if f"{split}/miou" in columns
    ]


def _class_colors(run_dir: Path) -> tuple[list[str], dict[str, str]]:
    """Names by train id, and CSS colours by name."""
    hparams = read_config(run_dir / "hparams.yaml")
    names, palette = hparams.get("class_names") or [], hparams.get("palette") or []
    colors = {
        name: "#{:02x}{:02x}{:02x}".format(*rgb) for name, rgb in zip(names, palette, strict=False)
    }
    return names, colors


def _scores(
    columns: dict[str, Series],
    split: str,
    class_names: Sequence[str],
    colors: dict[str, str],
    is_trained: bool,
) -> Scores:
    miou = columns[f"{split}/miou"]
    best = int(np.nanargmax(miou.value)) if np.isfinite(miou.value).any() else -1
    last = {
        name.removeprefix(f"{split}/"): series.last
        for name, series in columns.items()
        if name.startswith(f"{split}/")
    }
    ious = {
        name.removeprefix("iou/"): value for name, value in last.items() if name.startswith("iou/")
    }
    # CSVLogger sorts its columns by name; the order of the train ids is in the hyperparameters.
    order = {name: index for index, name in enumerate(class_names)}
    present = [value for value in ious.values() if not math.isnan(value)]
    marks = {}
    if len(present) > 2 and min(present) < max(present):
        marks = {min(present): "lowest", max(present): "highest"}
    return Scores(
        split=split,
        logged_step=int(miou.step[-1]),
        # A test pass after training is counted as one step more.
        step=int(miou.step[-1]) if is_trained and split == "val" else None,
        loss=last.get("loss", math.nan),
        miou=miou.last,
        macc=last.get("macc", math.nan),
        aacc=last.get("aacc", math.nan),
        fwiou=last.get("fwiou", math.nan),
        boundary_iou=last.get("boundary_iou", math.nan),
        ece=last.get("ece", math.nan),
        best_miou=float(miou.value[best]),
        best_step=int(miou.step[best]) if is_trained and split == "val" else None,
        ceilings=[
            Ceiling(name.replace("_", " "), value, miou.last)
            for name, value in last.items()
            if name.endswith("_ceiling")
        ],
        classes=[
            ClassScore(name, ious[name], colors.get(name), marks.get(ious[name], ""))
            for name in sorted(ious, key=lambda name: order.get(name, len(order)))
        ],
    )


def _all_details(run_dir: Path, scores: Sequence[Scores]) -> tuple[dict[str, Details], list[str]]:
    """By split; and why the rest cannot be read, in one sentence each."""
    details, unreadable = {}, []
    for score in scores:
        # A pass that is not part of training is logged one step after the last.
        for step in (score.logged_step, score.logged_step - 1):
            file = run_dir / EVALUATION_FOLDER / f"{score.split}_step_{step:07d}.npz"
            if file.is_file():
                try:
                    details[score.split] = describe(load_evaluation(file))
                except ValueError as error:  # the rest of the report is worth having
                    unreadable.append(str(error))
                break
    return details, unreadable


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


def _read_figures(run_dir: Path, folder: str, title: str) -> dict[str, Any] | None:
    """The last figure of a folder and, if it is another one, the first."""
    numbered = sorted(
        (int(match[1]), file)
        for file in (run_dir / folder).glob("step_*.png")
        if (match := re.fullmatch(r"step_(\d+)\.png", file.name))
    )
    if not numbered:
        return None

    def embed(step: int, file: Path) -> dict[str, Any]:
        encoded = base64.b64encode(file.read_bytes()).decode("ascii")
        return {"step": step, "uri": f"data:image/png;base64,{encoded}"}

    return {
        "title": title,
        "last": embed(*numbered[-1]),
        "first": embed(*numbered[0]) if len(numbered) > 1 else None,
    }
