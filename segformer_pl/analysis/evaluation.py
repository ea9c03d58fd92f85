"""The evaluation of a validation or test set, with the counts of every image, as one file."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import numpy.typing as npt

from segformer_pl import metrics
from segformer_pl.atomic import atomic_write
from segformer_pl.errors import UserError

EVALUATION_FOLDER = "evaluation"
# What numpy raises for bytes that are cut short or changed, for other formats (a text file is
# taken for a pickle, an .npy file gives an array without names), and for other contents.
DAMAGES = (
    OSError,
    EOFError,
    BadZipFile,
    ZlibError,
    RuntimeError,
    KeyError,
    TypeError,
    ValueError,
    IndexError,
)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Counts of pixels over N images and C classes. Pixels with the ignored label never count.

    :mod:`segformer_pl.metrics` defines the metrics, all fractions: a class that is neither
    labelled nor predicted anywhere has none (nan) and is left out of the means.

    Attributes:
        split: ``val`` or ``test``.
        step: Training steps that the network has had.
        class_names: C names by train id.
        ids: Names of the N images, in stored order.
        counts: (N, C, 3) pixels of each image and class: intersection, target, prediction.
        loss: (N,) mean cross-entropy over an image's labelled pixels, nats; nan without any.
        confusion: (C, C) pixels of the whole set, rows target, columns prediction.
        calibration: (bins, 3) by confidence: pixels, sum of confidence, pixels that are right.

    Raises:
        UserError: The shapes do not fit together.
    """

    split: str
    step: int
    class_names: list[str]
    ids: list[str]
    counts: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float64]
    confusion: npt.NDArray[np.int64]
    calibration: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        num_images, num_classes = len(self.ids), len(self.class_names)
        expected = {
            "counts": (num_images, num_classes, 3),
            "loss": (num_images,),
            "confusion": (num_classes, num_classes),
            "calibration": (len(self.calibration), 3),
        }
        for name, shape in expected.items():
            given = getattr(self, name).shape
            if given != shape:
                raise UserError(
                    f"{name} has shape {given}, but {num_images} ids and {num_classes} class "
                    f"names ask for {shape}; give one row for each"
                )

    @property
    def iou(self) -> npt.NDArray[np.float64]:
        """(C,) intersection over union of the whole set, nan where a class is absent."""
        return metrics.class_iou(self.counts.sum(axis=0))

    @property
    def miou(self) -> float:
        """Mean of :attr:`iou` over the classes present."""
        return float(metrics.mean_present(self.iou))

    @property
    def macc(self) -> float:
        """Mean over the labelled classes of the share of their pixels that is right."""
        return float(metrics.mean_present(metrics.class_accuracy(self.counts.sum(axis=0))))

    @property
    def aacc(self) -> float:
        """Share of all labelled pixels that is right."""
        return float(metrics.pixel_accuracy(self.counts.sum(axis=0)))

    @property
    def fwiou(self) -> float:
        """Mean of :attr:`iou` weighted with the labelled pixels of each class."""
        return float(metrics.frequency_weighted_iou(self.counts.sum(axis=0)))

    @property
    def image_miou(self) -> npt.NDArray[np.float64]:
        """(N,) mIoU of each image by itself, over the classes labelled or predicted in it.

        Ranks the images. Its mean is not :attr:`miou`.
        """
        return metrics.mean_present(metrics.class_iou(self.counts))

    def save(self, file: Path) -> None:
        """Write a compressed npz file; the folder is made, and the file appears whole or not.

        Raises:
            WriteError: The file cannot be written.
        """
        arrays: dict[str, Any] = {
            field.name: np.asarray(getattr(self, field.name)) for field in fields(self)
        }
        for name in ("class_names", "ids"):
            arrays[name] = arrays[name].astype(np.str_)  # an empty list would be of floats
        with atomic_write(file) as stream:
            np.savez_compressed(stream, **arrays)


def load_evaluation(file: Path) -> Evaluation:
    """Read the evaluation in one npz file; :class:`~.run.Run` finds those of a run folder.

    Raises:
        UserError: There is no such file, or it is damaged or something else; one sentence says
            which.
    """
    if not file.is_file():
        raise UserError(
            f"there is no run folder or file '{file}'; give a run folder, such as "
            f"runs/demo/version_0, or an .npz file of its {EVALUATION_FOLDER} folder"
        )
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {field.name: archive[field.name] for field in fields(Evaluation)}
        return Evaluation(
            split=str(arrays["split"]),
            step=int(arrays["step"]),
            class_names=arrays["class_names"].tolist(),
            ids=arrays["ids"].tolist(),
            counts=arrays["counts"].astype(np.int64, casting="safe"),
            loss=arrays["loss"].astype(np.float64, casting="safe"),
            confusion=arrays["confusion"].astype(np.int64, casting="safe"),
            calibration=arrays["calibration"].astype(np.float64, casting="safe"),
        )
    except DAMAGES as error:
        raise UserError(
            f"'{file}' is no evaluation of a run, or is damaged; validate again, or give another"
        ) from error
