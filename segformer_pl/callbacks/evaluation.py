"""Record of an evaluation in the run folder: counts per image, and the worst images."""

import heapq
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from segformer_pl.analysis.evaluation import EVALUATION_FOLDER, Evaluation, ImageCount
from segformer_pl.analysis.overlays import plot_predictions
from segformer_pl.analysis.style import printable
from segformer_pl.atomic import WriteError
from segformer_pl.callbacks.figures import leaves_files, publish, run_folder
from segformer_pl.callbacks.media import send_classes, send_masks, shrink
from segformer_pl.metrics import StepOutput


class EvaluationRecord(pl.Callback):
    """Writes ``evaluation/<split>_step_<n>.npz`` after every validation and test.

    The report reads this file (:class:`~segformer_pl.analysis.evaluation.Evaluation`) for the
    confusion matrix and calibration, and ``compare`` for its tests. After a validation, the images
    with the highest loss are drawn as a figure in ``worst/``, which is also sent to the loggers
    that accept images, to Weights & Biases with masks to show and hide. Loggers that accept tables
    get one of the classes. Skipped images are left out. Rank 0 writes for all ranks.

    The step n is the number of training steps of the network, both in a training and for a loaded
    checkpoint. A second evaluation at the same step replaces the first: it is of the same weights,
    or of steps that were trained again after a resumption.

    Args:
        num_worst: Number of images in the figure of the worst images; 0 for no figure.

    Attributes:
        images: How many images of the split the last evaluation covered; on rank 0 only.
    """

    def __init__(self, num_worst: int = 6) -> None:
        self.num_worst = num_worst
        self.images: ImageCount | None = None
        self._reset()

    def _reset(self) -> None:
        self.ids: list[str] = []
        self.counts: list[Tensor] = []
        self.losses: list[float] = []
        # Sums over the batches of this rank; None before the first batch.
        self.confusion: Tensor | None = None
        self.calibration: Tensor | None = None
        # A heap of (loss, -index of the image, (id, image, target, pred)); lowest loss first.
        self.worst: list[tuple[float, int, tuple[str, Tensor, Tensor, Tensor]]] = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking:
            return
        step: StepOutput = outputs
        self.confusion = _add(self.confusion, step["confusion"])
        self.calibration = _add(self.calibration, step["calibration"])
        counts, losses = step["counts"].cpu(), step["loss"].tolist()
        for index, name in enumerate(batch["id"]):
            if name in batch.get("skipped", {}):  # replaced by a blank image
                continue
            self.ids.append(name)
            self.counts.append(counts[index])
            self.losses.append(losses[index])
            self._keep_if_worst(losses[index], batch, step["pred"], index)

    on_test_batch_end = on_validation_batch_end

    def _keep_if_worst(self, loss: float, batch: dict[str, Any], pred: Tensor, index: int) -> None:
        full = len(self.worst) >= self.num_worst
        if not np.isfinite(loss) or not self.num_worst or (full and loss <= self.worst[0][0]):
            return
        image, target = batch["image"][index], batch["label"][index]
        shown = (batch["id"][index], *(shrink(x) for x in (image, target, pred[index])))
        entry = (loss, -len(self.ids), shown)  # of equal losses, keep the earlier image
        (heapq.heappushpop if full else heapq.heappush)(self.worst, entry)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._finish(trainer, pl_module, "test")

    def _finish(self, trainer: pl.Trainer, pl_module: Any, split: str) -> None:
        if trainer.sanity_checking:
            return
        own = {
            "ids": self.ids,
            "counts": [counts.numpy() for counts in self.counts],
            "losses": self.losses,
            "worst": self.worst,
            "confusion": None if self.confusion is None else self.confusion.cpu().numpy(),
            "calibration": None if self.calibration is None else self.calibration.cpu().numpy(),
        }
        self._reset()
        parts = [part for part in _gather(own) if part["ids"]]
        if not trainer.is_global_zero or not parts:
            return
        evaluation = Evaluation(
            split=split,
            step=pl_module.trained_steps,
            class_names=list(pl_module.class_names),
            ids=[name for part in parts for name in part["ids"]],
            counts=np.stack([counts for part in parts for counts in part["counts"]]),
            loss=np.array([loss for part in parts for loss in part["losses"]], np.float64),
            confusion=np.sum([part["confusion"] for part in parts], axis=0),
            calibration=np.sum([part["calibration"] for part in parts], axis=0),
            split_size=_split_size(trainer, split),
        )
        self.images = evaluation.images
        if not leaves_files(trainer):
            return
        folder = run_folder(trainer) / EVALUATION_FOLDER
        try:
            evaluation.save(folder / f"{split}_step_{evaluation.step:07d}.npz")
        except WriteError as error:
            if trainer.state.fn != "fit":  # the record is the purpose of validate and test
                raise
            rank_zero_warn(f"{error}. This evaluation is lost; the run continues.")
        send_classes(trainer, run_folder(trainer), evaluation)
        worst = sorted((entry for part in parts for entry in part["worst"]), reverse=True)
        if worst and split == "val":
            worst = worst[: self.num_worst]
            samples: list[Any] = [sample for _, _, sample in worst]
            losses = [loss for loss, _, _ in worst]
            names, folder = pl_module.class_names, run_folder(trainer)
            publish(
                trainer,
                lambda: plot_predictions(samples, names, pl_module.palette, losses),
                "worst",
                evaluation.step,
            )
            captioned: list[Any] = [
                (f"{printable(name, 26)}: {loss:.2f} nats", *maps)
                for loss, (name, *maps) in zip(losses, samples, strict=True)
            ]
            send_masks(trainer, folder, "val/worst_masks", captioned, names, evaluation.step)


def _split_size(trainer: pl.Trainer, split: str) -> int | None:
    """Return the number of images of a split; None if its data set does not tell."""
    loader: Any = trainer.val_dataloaders if split == "val" else trainer.test_dataloaders
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):  # several loaders, or a stream
        return None


def _add(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total + value


def _gather(own: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects of all ranks, in the order of ranks. Call it on all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return parts
