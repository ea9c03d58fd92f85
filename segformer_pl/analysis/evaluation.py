"""The evaluation of a validation or test split: pixel counts of every image, in one file."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import numpy.typing as npt

from segformer_pl import metrics
from segformer_pl.atomic import atomic_write
from segformer_pl.errors import UserError

EVALUATION_FOLDER = "evaluation"
# What numpy raises for truncated or changed bytes, for files of another format (it takes a text
# file for a pickle, and reads an .npy file as an array without keys) and for other contents.
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


class ImageCount(NamedTuple):
    """How many images of a split were evaluated; prints as ``8 of 101 images``.

    Attributes:
        evaluated: Number of evaluated images.
        total: Number of images of the split; None if it is not known.
    """

    evaluated: int
    total: int | None

    @property
    def is_complete(self) -> bool:
        """Whether no image is known to be missing."""
        return self.total is None or self.evaluated >= self.total

    def __str__(self) -> str:
        if self.is_complete:
            everything = "" if self.total is None or self.total == 1 else "all "
            return f"{everything}{self.evaluated:,} image{'s' * (self.evaluated != 1)}"
        return f"{self.evaluated:,} of {self.total:,} images"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Pixel counts over N images and C classes, without the pixels of the ignored label.

    The metrics are those of :mod:`segformer_pl.metrics`, all fractions. A class that is neither
    labelled nor predicted anywhere is nan and left out of the means.

    Attributes:
        split: ``val`` or ``test``.
        step: Number of training steps of the evaluated network.
        class_names: C names by train id.
        ids: Ids of the N images, in stored order.
        counts: (N, C, 3), pixels of each image and class: intersection, target, prediction.
        loss: (N,), mean cross-entropy over the labelled pixels of each image in nats; nan without
            any.
        confusion: (C, C), pixels of the whole set; rows are targets, columns predictions.
        calibration: (bins, 3), by confidence: pixels, sum of confidences, correct pixels.
        split_size: Number of images of the whole split, of which a limit or bad samples can have
            left out some; None if it is not known.

    Raises:
        UserError: The shapes do not match.
    """

    split: str
    step: int
    class_names: list[str]
    ids: list[str]
    counts: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float64]
    confusion: npt.NDArray[np.int64]
    calibration: npt.NDArray[np.float64]
    split_size: int | None = None

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
    def images(self) -> ImageCount:
        """How many images of the split were evaluated."""
        return ImageCount(len(self.ids), self.split_size)

    @property
    def iou(self) -> npt.NDArray[np.float64]:
        """(C,), intersection over union of the whole set; nan where a class is absent."""
        return metrics.class_iou(self.counts.sum(axis=0))

    @property
    def miou(self) -> float:
        """Mean of :attr:`iou` over the classes present."""
        return float(metrics.mean_present(self.iou))

    @property
    def macc(self) -> float:
        """Mean over the labelled classes of the share of their pixels that is correct."""
        return float(metrics.mean_present(metrics.class_accuracy(self.counts.sum(axis=0))))

    @property
    def aacc(self) -> float:
        """Share of all labelled pixels that is correct."""
        return float(metrics.pixel_accuracy(self.counts.sum(axis=0)))

    @property
    def fwiou(self) -> float:
        """Mean of :attr:`iou`, weighted with the labelled pixels of each class."""
        return float(metrics.frequency_weighted_iou(self.counts.sum(axis=0)))

    @property
    def image_miou(self) -> npt.NDArray[np.float64]:
        """(N,), mIoU of each image by itself, over the classes labelled in it.

        It serves to rank the images. Its mean is :attr:`miou_i`, and not :attr:`miou`.
        """
        return metrics.image_miou(self.counts)

    @property
    def miou_i(self) -> float:
        """Mean of :attr:`image_miou` over the images (mIoU^I of Wang et al. 2023)."""
        return float(metrics.miou_i(self.counts)[0])

    @property
    def miou_c(self) -> float:
        """Mean over classes of the mean IoU over images (mIoU^C of Wang et al. 2023)."""
        return float(metrics.miou_c(self.counts)[0])

    @property
    def worst_miou_i(self) -> float:
        """:attr:`miou_i` of the tenth of the images in which it is lowest."""
        return float(metrics.miou_i(self.counts, worst=metrics.WORST)[0])

    @property
    def worst_miou_c(self) -> float:
        """:attr:`miou_c`, for each class of the tenth of its images with the lowest IoU."""
        return float(metrics.miou_c(self.counts, worst=metrics.WORST)[0])

    def save(self, file: Path) -> None:
        """Write a compressed npz file atomically, and create its folder.

        Raises:
            WriteError: The file cannot be written.
        """
        arrays: dict[str, Any] = {
            field.name: np.asarray(value)
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        for name in ("class_names", "ids"):
            arrays[name] = arrays[name].astype(np.str_)  # numpy gives an empty list the type float
        with atomic_write(file) as stream:
            np.savez_compressed(stream, **arrays)


def load_evaluation(file: Path) -> Evaluation:
    """Read an evaluation from its npz file; :class:`~.run.Run` lists those of a run folder.

    Raises:
        UserError: There is no such file, or it may not be read, is damaged or not an evaluation.
    """
    if not file.is_file():
        raise UserError(
            f"there is no run folder or file '{file}'; give a run folder, such as "
            f"runs/demo/version_0, or an .npz file of its {EVALUATION_FOLDER} folder"
        )
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            names = [field.name for field in fields(Evaluation)]
            if "split_size" not in archive:  # unknown, or stored by an earlier version
                names.remove("split_size")
            arrays = {name: archive[name] for name in names}
        return Evaluation(
            split=str(arrays["split"]),
            step=int(arrays["step"]),
            class_names=arrays["class_names"].tolist(),
            ids=arrays["ids"].tolist(),
            counts=arrays["counts"].astype(np.int64, casting="safe"),
            loss=arrays["loss"].astype(np.float64, casting="safe"),
            confusion=arrays["confusion"].astype(np.int64, casting="safe"),
            calibration=arrays["calibration"].astype(np.float64, casting="safe"),
            split_size=int(arrays["split_size"]) if "split_size" in arrays else None,
        )
    except PermissionError as error:
        raise UserError(
            f"'{file}' cannot be read ({error.strerror}); check its access rights"
        ) from error
    except DAMAGES as error:
        raise UserError(
            f"'{file}' is no evaluation of a run, or is damaged; give another, or validate again"
        ) from error
