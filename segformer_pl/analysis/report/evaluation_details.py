"""What the report shows of one evaluation: interval, classes, mistakes, confidence."""

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
    """Accuracy of one class, nan if nothing is labelled so; its share of all labelled pixels."""

    accuracy: float
    share: float


@dataclass(frozen=True)
class Confusion:
    """Pixels of one label that were taken for another class; ``share`` of that label's pixels."""

    label: str
    prediction: str
    pixels: int
    share: float


@dataclass(frozen=True)
class BadPicture:
    """Loss in nats; mIoU over the classes labelled or predicted in the picture."""

    id: str
    loss: float
    miou: float


@dataclass(frozen=True)
class Calibration:
    """The chart, and over all labelled pixels: expected calibration error, means; fractions."""

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
    """What the evaluation of a pass tells beyond its scores.

    ``interval`` is the 95 % interval of mIoU, nan where there is none. ``confusion_matrix`` is
    None for too many classes, and without labelled pixels, as is ``calibration``.
    """

    interval: tuple[float, float]
    num_pictures: int
    classes: dict[str, ClassShare]
    confusion_matrix: Markup | None
    is_matrix_wide: bool
    confusions: list[Confusion]
    calibration: Calibration | None
    worst: list[BadPicture]


def describe(evaluation: Evaluation) -> Details:
    """Everything that the report shows of one evaluation."""
    total = evaluation.counts.sum(axis=0)
    accuracy, target = class_accuracy(total), total[:, TARGET]
    share = target / max(target.sum(), 1)
    num_classes = len(evaluation.class_names)
    has_matrix = num_classes <= MAX_MATRIX_CLASSES and evaluation.confusion.any()
    return Details(
        interval=miou_interval(evaluation),
        num_pictures=len(evaluation.ids),
        classes={
            name: ClassShare(float(accuracy[c]), float(share[c]))
            for c, name in enumerate(evaluation.class_names)
        },
        confusion_matrix=draw_confusion(evaluation) if has_matrix else None,
        is_matrix_wide=num_classes > MAX_NARROW_CLASSES,
        confusions=_most_common_confusions(evaluation),
        calibration=_calibration(evaluation),
        worst=_worst_pictures(evaluation),
    )


def _most_common_confusions(evaluation: Evaluation) -> list[Confusion]:
    """Those of the most pixels, the largest first."""
    shares = confusion_shares(evaluation.confusion)
    wrong = evaluation.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:NUM_CONFUSIONS]
    names = evaluation.class_names
    return [
        Confusion(names[label], names[found], int(wrong[label, found]), shares[label, found])
        for label, found in zip(*np.unravel_index(order, wrong.shape))
        if wrong[label, found]
    ]


def _calibration(evaluation: Evaluation) -> Calibration | None:
    pixels, confidence, right = evaluation.calibration.T
    total = pixels.sum()
    if not total:
        return None
    return Calibration(
        chart=draw_calibration(evaluation),
        ece=float(expected_calibration_error(evaluation.calibration)),
        confidence=float(confidence.sum() / total),
        accuracy=float(right.sum() / total),
    )


def _worst_pictures(evaluation: Evaluation) -> list[BadPicture]:
    """Those of the highest loss; pictures without a labelled pixel have none."""
    loss, miou = evaluation.loss, evaluation.image_miou
    order = np.argsort(-loss, kind="stable")[:NUM_WORST]  # nan last
    return [
        BadPicture(evaluation.ids[number], float(loss[number]), float(miou[number]))
        for number in order
        if not np.isnan(loss[number])
    ]
