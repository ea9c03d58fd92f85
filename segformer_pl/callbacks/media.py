"""What the callbacks send to Weights & Biases beside numbers: images, masks, tables, the report.

The files of the run folder are the record of a run; this is a copy of a part of them. An error here
is a warning and the run continues. All functions are for rank 0.

Everything goes out once for each step. The last step of each kind is in ``wandb_media.json`` in the
run folder, so that a resumed run does not send again what its earlier part has sent::

    first process   200  400  (killed at 450)
    resumed at 300       (400)  600             400 was sent before
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.analysis.run import WANDB_MEDIA_FILE, Run
from segformer_pl.analysis.style import printable
from segformer_pl.atomic import atomic_write_text
from segformer_pl.metrics import TARGET, class_accuracy

MAX_SIDE = 512  # pixels; larger images are shrunk
UNLABELLED = 255  # in the masks, which have 8 bits
MAX_NAME_LENGTH = 60  # characters of a class name or a caption

Sample = tuple[str, Tensor, Tensor, Tensor]  # id, image, target, prediction


def send_figure(trainer: pl.Trainer, folder: Path, key: str, file: Path, step: int) -> None:
    """Send a figure to the loggers that accept images.

    Args:
        trainer: Trainer of the run.
        folder: Run folder.
        key: Key of the figure, such as ``val/erf``.
        file: The figure, a PNG.
        step: Number of training steps.
    """
    loggers = [logger for logger in trainer.loggers if hasattr(logger, "log_image")]
    _send_once(
        folder, key, step, loggers, lambda logger, at: logger.log_image(key, [str(file)], at)
    )


def send_masks(
    trainer: pl.Trainer,
    folder: Path,
    key: str,
    samples: Sequence[Sample],
    class_names: Sequence[str],
    step: int,
) -> None:
    """Send images with their targets and predictions as masks, to W&B alone.

    Its page shows and hides each class. Images are JPEGs with sides of at most :data:`MAX_SIDE`.
    Masks have 8 bits, so there are none of more than 255 classes.

    Args:
        trainer: Trainer of the run.
        folder: Run folder.
        key: Key of the images, such as ``val/worst_masks``.
        samples: Caption, image (3, H, W) in 0 to 1, target (H, W) and prediction (H, W) of each
            image, on the CPU.
        class_names: Class names by train id.
        step: Number of training steps.
    """
    if len(class_names) > UNLABELLED:
        return
    names = {n: printable(name, MAX_NAME_LENGTH) for n, name in enumerate(class_names)}
    names[UNLABELLED] = "unlabelled"

    def mask(train_ids: Tensor) -> dict[str, Any]:
        is_class = (train_ids >= 0) & (train_ids < len(class_names))
        data = train_ids.where(is_class, torch.tensor(UNLABELLED)).byte().numpy()
        return {"mask_data": data, "class_labels": names}

    def send(logger: Any, at: int) -> None:
        small = [
            (name, shrink(image), shrink(target), shrink(pred))
            for name, image, target, pred in samples
        ]
        logger.log_image(
            key,
            [_pixels(image) for _, image, _, _ in small],
            at,
            caption=[printable(name, MAX_NAME_LENGTH) for name, *_ in small],
            masks=[
                {"prediction": mask(pred), "label": mask(target)} for _, _, target, pred in small
            ],
            file_type=["jpg"] * len(small),
        )

    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    _send_once(folder, key, step, loggers, send)


def send_classes(trainer: pl.Trainer, folder: Path, evaluation: Evaluation) -> None:
    """Send IoU, accuracy and share of pixels of every class to the loggers that accept tables.

    Args:
        trainer: Trainer of the run.
        folder: Run folder.
        evaluation: The evaluation, of all ranks.
    """
    total = evaluation.counts.sum(axis=0)
    share = total[:, TARGET] / max(total[:, TARGET].sum(), 1)
    columns = ["class", "IoU", "accuracy", "share of pixels"]
    values = zip(evaluation.iou, class_accuracy(total), share, strict=True)
    rows = [
        [printable(name, MAX_NAME_LENGTH), *(None if np.isnan(v) else float(v) for v in numbers)]
        for name, numbers in zip(evaluation.class_names, values, strict=True)
    ]
    key = f"{evaluation.split}/classes"
    loggers = [logger for logger in trainer.loggers if hasattr(logger, "log_table")]
    _send_once(
        folder,
        key,
        evaluation.step,
        loggers,
        lambda logger, at: logger.log_table(key, columns, rows, step=at),
    )


def send_report(trainer: pl.Trainer, report: Path) -> None:
    """Send the report of a run to W&B as an artifact; that of a resumed run is its next version.

    Args:
        trainer: Trainer of the run.
        report: The report, one HTML file.
    """
    loggers: list[Any] = [one for one in trainer.loggers if isinstance(one, WandbLogger)]
    if not loggers:
        return
    import wandb

    try:
        for logger in loggers:
            artifact = wandb.Artifact(f"report-{logger.experiment.id}", type="report")
            artifact.add_file(str(report), name=report.name)
            logger.experiment.log_artifact(artifact)
    except Exception as error:
        rank_zero_warn(f"{report} was not logged to W&B: {type(error).__name__}: {error}")


def shrink(image: Tensor) -> Tensor:
    """Shrink an image (C, H, W) or a label map (H, W) to sides of at most MAX_SIDE; on the CPU."""
    height, width = image.shape[-2:]
    factor = min(MAX_SIDE / max(height, width), 1.0)
    if factor == 1.0:
        return image.cpu()
    size = [max(round(side * factor), 1) for side in (height, width)]
    if image.is_floating_point():
        return F.interpolate(image[None], size=size, mode="area")[0].cpu()
    rows, columns = (
        torch.arange(new, device=image.device) * old // new
        for new, old in zip(size, (height, width))
    )
    return image[rows][:, columns].cpu()


def _pixels(image: Tensor) -> npt.NDArray[np.uint8]:
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _send_once(
    folder: Path,
    key: str,
    step: int,
    loggers: Sequence[Any],
    send: Callable[[Any, int], None],
) -> None:
    """Send something unless this run has sent it at this step or a later one.

    Args:
        folder: Run folder.
        key: What is sent.
        step: Number of training steps.
        loggers: Loggers to send it to.
        send: Function of a logger and the step to log at: Lightning's loggers count from 0.
    """
    if not loggers:
        return
    run = Run(folder)
    sent: Mapping[str, int] = run.wandb_media
    if step <= sent.get(key, -1):
        return
    try:
        for logger in loggers:
            send(logger, max(step - 1, 0))
        record = {"run": run.wandb_id, "last steps": {**sent, key: step}}
        atomic_write_text(folder / WANDB_MEDIA_FILE, json.dumps(record, indent=1) + "\n")
    except Exception as error:
        rank_zero_warn(
            f"{key} of step {step} was not logged: {type(error).__name__}: {error}; the run "
            "continues"
        )
