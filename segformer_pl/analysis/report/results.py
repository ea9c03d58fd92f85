"""The metrics at the top of a report: those of the last evaluation of each split."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segformer_pl.analysis.evaluation import ImageCount
from segformer_pl.analysis.run import EvaluationFile, Run
from segformer_pl.analysis.style import css_color


@dataclass(frozen=True)
class ClassIoU:
    """IoU of one class.

    Attributes:
        name: Name of the class.
        iou: IoU as a fraction; nan if the class is absent.
        color: CSS colour of the class, or None.
        mark: ``lowest``, ``highest`` or empty.
    """

    name: str
    iou: float
    color: str | None
    mark: str = ""

    @property
    def is_absent(self) -> bool:
        return math.isnan(self.iou)


@dataclass(frozen=True)
class Ceiling:
    """A reference value stated by the data set, and the last mIoU to compare with it.

    Attributes:
        name: Name of the reference value.
        value: Reference value, a fraction.
        miou: Last mIoU, a fraction.
    """

    name: str
    value: float
    miou: float

    @property
    def is_exceeded(self) -> bool:
        return self.miou > self.value

    @property
    def points(self) -> float:
        """mIoU minus reference value, in percentage points."""
        return 100 * (self.miou - self.value)


@dataclass(frozen=True)
class Results:
    """Metrics of the last evaluation of a split, as fractions; nan where nothing was logged.

    Attributes:
        split: ``val`` or ``test``.
        evaluation: File of the evaluation; None if there is none.
        images: How many images of the split were evaluated; None if the file does not tell.
        step: Number of training steps of the network, from the evaluation or, for a validation
            during training, from the log; None if neither states it.
        loss: Mean cross-entropy over the labelled pixels in nats.
        miou: Mean IoU over the classes present.
        macc: Mean accuracy over the labelled classes.
        aacc: Pixel accuracy.
        fwiou: Frequency-weighted IoU.
        boundary_iou: Mean boundary IoU.
        ece: Expected calibration error.
        best_miou: Highest mIoU of all validations.
        best_step: Step of that validation; None unless validations ran during training.
        ceilings: Reference values of the data set.
        classes: IoU of the classes in the order of their train ids.
    """

    split: str
    evaluation: EvaluationFile | None
    images: ImageCount | None
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
    """Return the results of the last validation and of the last test, if there are any.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no ``metrics.csv``.
        UserError: A cell of ``metrics.csv`` is not a number.
    """
    return [_results(run, split) for split in ("val", "test") if f"{split}/miou" in run.metrics]


def summary(run: Run, step: int | None = None) -> str:
    """Return one line, ``mIoU 83.1 % on 8 of 101 images (locality ceiling 77.8 %)``.

    It is empty without metrics.

    Args:
        run: The run.
        step: Number of training steps so far. Results of other steps name theirs.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no ``metrics.csv``.
        UserError: A cell of ``metrics.csv`` is not a number.
    """
    parts = []
    for results in last_results(run):
        part = f"mIoU {100 * results.miou:.1f} %"
        if results.images is not None:
            part += f" on {results.images}"
        if results.split != "val":
            part = f"{results.split} {part}"
        if step not in (None, results.step):
            part += f" at step {results.step}"
        notes = [f"{c.name} {100 * c.value:.1f} %" for c in results.ceilings]
        if results.best_step not in (None, results.step):
            notes.append(f"best {100 * results.best_miou:.1f} % at step {results.best_step}")
        if notes:
            part += f" ({', '.join(notes)})"
        parts.append(part)
    return ", ".join(parts)


def class_colors(run: Run) -> dict[str, str]:
    """Return CSS colours by class name."""
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
        images=None if evaluation is None else evaluation.images,
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
    """Return the file of the last evaluation of a split.

    Args:
        run: The run.
        split: ``val`` or ``test``.
        logged_step: Step of the last validation during training, which the evaluation must have.
            None for a separate validation or test.
    """
    files = [file for file in run.evaluations if file.split == split]
    if logged_step is not None:
        files = [file for file in files if file.step == logged_step]
    return files[-1] if files else None


def _classes(run: Run, last: dict[str, float]) -> list[ClassIoU]:
    ious = {
        name.removeprefix("iou/"): value for name, value in last.items() if name.startswith("iou/")
    }
    # CSVLogger sorts columns by name, so take the order of the train ids from the hyperparameters.
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
