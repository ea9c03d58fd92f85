"""Details of one evaluation for the report: interval, classes, confusions, calibration."""

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from segformer_pl.analysis.comparison import miou_interval
from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.analysis.report.evaluation_charts import (
    MAX_MATRIX_CLASSES,
    MAX_NARROW_CLASSES,
    confusion_shares,
    draw_calibration,
    draw_confusion,
)
from segformer_pl.metrics import TARGET, class_accuracy, expected_calibration_error

NUM_CONFUSIONS = 12
NUM_WORST = 10


@dataclass(frozen=True)
class ClassShare:
    """Accuracy of one class, nan without labelled pixels, and its share of all labelled pixels."""

    accuracy: float
    share: float


@dataclass(frozen=True)
class Confusion:
    """Pixels of one label predicted as another class; ``share`` is of the pixels of that label."""

    label: str
    prediction: str
    pixels: int
    share: float


@dataclass(frozen=True)
class WorstImage:
    """Loss of one image in nats, and mIoU over the classes labelled or predicted in it."""

    id: str
    loss: float
    miou: float


@dataclass(frozen=True)
class Calibration:
    """Reliability diagram; calibration error, mean confidence and accuracy as fractions."""

    chart: Markup
    ece: float
    confidence: float
    accuracy: float

    @property
    def excess(self) -> float:
        """Confidence minus accuracy in percentage points."""
        return 100 * (self.confidence - self.accuracy)


@dataclass(frozen=True)
class Details:
    """Everything that the report shows of an evaluation, apart from the metrics themselves.

    Attributes:
        interval: 95 % interval of mIoU over images; nan where there is none.
        classes: Accuracy and share of pixels by class name.
        confusion_matrix: Chart; None with too many classes or without labelled pixels.
        is_matrix_wide: Whether the chart needs the full width of the page.
        confusions: Most common confusions.
        calibration: Calibration; None without labelled pixels.
        worst: Images with the highest loss.
    """

    interval: tuple[float, float]
    classes: dict[str, ClassShare]
    confusion_matrix: Markup | None
    is_matrix_wide: bool
    confusions: list[Confusion]
    calibration: Calibration | None
    worst: list[WorstImage]


def describe(evaluation: Evaluation) -> Details:
    """Collect the details of an evaluation."""
    total = evaluation.counts.sum(axis=0)
    accuracy, target = class_accuracy(total), total[:, TARGET]
    share = target / max(target.sum(), 1)
    num_classes = len(evaluation.class_names)
    has_matrix = num_classes <= MAX_MATRIX_CLASSES and evaluation.confusion.any()
    return Details(
        interval=miou_interval(evaluation),
        classes={
            name: ClassShare(float(accuracy[c]), float(share[c]))
            for c, name in enumerate(evaluation.class_names)
        },
        confusion_matrix=draw_confusion(evaluation) if has_matrix else None,
        is_matrix_wide=num_classes > MAX_NARROW_CLASSES,
        confusions=_most_common_confusions(evaluation),
        calibration=_calibration(evaluation),
        worst=_worst_images(evaluation),
    )


def _most_common_confusions(evaluation: Evaluation) -> list[Confusion]:
    """Return the confusions with the most pixels, the largest first."""
    shares = confusion_shares(evaluation.confusion)
    wrong = evaluation.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:NUM_CONFUSIONS]
    names = evaluation.class_names
    return [
        Confusion(names[label], names[pred], int(wrong[label, pred]), shares[label, pred])
        for label, pred in zip(*np.unravel_index(order, wrong.shape))
        if wrong[label, pred]
    ]


def _calibration(evaluation: Evaluation) -> Calibration | None:
    pixels, confidence, correct = evaluation.calibration.T
    total = pixels.sum()
    if not total:
        return None
    return Calibration(
        chart=draw_calibration(evaluation),
        ece=float(expected_calibration_error(evaluation.calibration)),
        confidence=float(confidence.sum() / total),
        accuracy=float(correct.sum() / total),
    )


def _worst_images(evaluation: Evaluation) -> list[WorstImage]:
    """Return the images with the highest loss, without those that have no labelled pixel."""
    loss, miou = evaluation.loss, evaluation.image_miou
    order = np.argsort(-loss, kind="stable")[:NUM_WORST]  # nan last
    return [
        WorstImage(evaluation.ids[index], float(loss[index]), float(miou[index]))
        for index in order
        if not np.isnan(loss[index])
    ]
