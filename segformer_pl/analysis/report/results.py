"""The metrics that a report is headed by: those of the last pass over each split."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segformer_pl.analysis.run import EvaluationFile, Run
from segformer_pl.analysis.style import css_color


@dataclass(frozen=True)
class ClassIoU:
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
class Results:
    """Metrics of the last pass over a split; fractions, nan where nothing was logged.

    Attributes:
        split: ``val`` or ``test``.
        evaluation: What the pass left image by image; None if nothing.
        step: Training steps of the network, as the evaluation says, or else as a validation in
            training was logged; None if neither tells.
        best_miou, best_step: Of all validations in training; the step is None without one.
        ceilings: Reference values of the data set.
        classes: By train id.
    """

    split: str
    evaluation: EvaluationFile | None
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
    classes: list[ClassIoU]


def last_results(run: Run) -> list[Results]:
    """Return the results of the last validation and of the last test, of those that there are.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no ``metrics.csv``.
        UserError: A cell of ``metrics.csv`` is not a number.
    """
    return [_results(run, split) for split in ("val", "test") if f"{split}/miou" in run.metrics]


def summary(run: Run) -> str:
    """The run in one line, ``mIoU 83.1 % (locality ceiling 77.8 %)``; empty without metrics.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no ``metrics.csv``.
        UserError: A cell of ``metrics.csv`` is not a number.
    """
    parts = []
    for results in last_results(run):
        part = f"mIoU {100 * results.miou:.1f} %"
        if results.split != "val":
            part = f"{results.split} {part}"
        notes = [f"{c.name} {100 * c.value:.1f} %" for c in results.ceilings]
        if results.best_step not in (None, results.step):
            notes.append(f"best {100 * results.best_miou:.1f} % at step {results.best_step}")
        if notes:
            part += f" ({', '.join(notes)})"
        parts.append(part)
    return ", ".join(parts)


def class_colors(run: Run) -> dict[str, str]:
    """CSS colours by class name."""
    names = run.hyperparameters.get("class_names") or []
    palette = run.hyperparameters.get("palette") or []
    return {name: css_color(color) for name, color in zip(names, palette, strict=False)}


def _results(run: Run, split: str) -> Results:
    miou = run.metrics[f"{split}/miou"]
    is_in_training = split == "val" and run.num_steps > 0
    logged_step = int(miou.step[-1]) if is_in_training else None
    evaluation = _last_evaluation(run, split, logged_step)
    best = int(np.nanargmax(miou.value)) if np.isfinite(miou.value).any() else -1
    last = {
        name.removeprefix(f"{split}/"): series.last
        for name, series in run.metrics.items()
        if name.startswith(f"{split}/")
    }
    return Results(
        split=split,
        evaluation=evaluation,
        step=evaluation.step if evaluation else logged_step,
        loss=last.get("loss", math.nan),
        miou=miou.last,
        macc=last.get("macc", math.nan),
        aacc=last.get("aacc", math.nan),
        fwiou=last.get("fwiou", math.nan),
        boundary_iou=last.get("boundary_iou", math.nan),
        ece=last.get("ece", math.nan),
        best_miou=float(miou.value[best]),
        best_step=int(miou.step[best]) if is_in_training else None,
        ceilings=[
            Ceiling(name.replace("_", " "), value, miou.last)
            for name, value in last.items()
            if name.endswith("_ceiling")
        ],
        classes=_classes(run, last),
    )


def _last_evaluation(run: Run, split: str, logged_step: int | None) -> EvaluationFile | None:
    """The last evaluation of a split.

    Args:
        logged_step: Of a validation in training, whose evaluation is one of the same step. None for
            a validation or test of its own, which leaves one evaluation.
    """
    stored = [one for one in run.evaluations if one.split == split]
    if logged_step is not None:
        stored = [one for one in stored if one.step == logged_step]
    return stored[-1] if stored else None


def _classes(run: Run, last: dict[str, float]) -> list[ClassIoU]:
    ious = {
        name.removeprefix("iou/"): value for name, value in last.items() if name.startswith("iou/")
    }
    # CSVLogger sorts its columns by name; the order of the train ids is in the hyperparameters.
    names: Sequence[str] = run.hyperparameters.get("class_names") or []
    order = {name: index for index, name in enumerate(names)}
    present = [value for value in ious.values() if not math.isnan(value)]
    marks = {}
    if len(present) > 2 and min(present) < max(present):
        marks = {min(present): "lowest", max(present): "highest"}
    colors = class_colors(run)
    return [
        ClassIoU(name, ious[name], colors.get(name), marks.get(ious[name], ""))
        for name in sorted(ious, key=lambda name: order.get(name, len(order)))
    ]
