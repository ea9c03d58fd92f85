"""Figure of images with targets and predictions during training."""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from segformer_pl.analysis.overlays import plot_predictions
from segformer_pl.callbacks.figures import leaves_files, publish, run_folder
from segformer_pl.callbacks.media import send_masks


class PredictionPanel(pl.Callback):
    """Draws the first images of every validation with their targets and predictions.

    The figure is written to ``predictions/`` in the run folder and sent to the loggers that accept
    images, to Weights & Biases with masks to show and hide.

    Args:
        num_images: Number of images in the figure.
    """

    def __init__(self, num_images: int = 8) -> None:
        self.num_images = num_images
        self.shown: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        missing = self.num_images - len(self.shown)
        if not trainer.is_global_zero or trainer.sanity_checking or missing <= 0:
            return
        for index, name in enumerate(batch["id"]):
            if missing > 0 and name not in batch.get("skipped", {}):  # a blank replaces its image
                maps = (batch["image"], batch["label"], outputs["pred"])
                self.shown.append((name, *(tensor[index].cpu() for tensor in maps)))
                missing -= 1

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        shown, self.shown = self.shown, []
        if shown:
            publish(
                trainer,
                lambda: plot_predictions(shown, pl_module.class_names, pl_module.palette),
                "predictions",
                pl_module.trained_steps,
            )
            if leaves_files(trainer):
                send_masks(
                    trainer,
                    run_folder(trainer),
                    "val/predictions_masks",
                    shown,
                    pl_module.class_names,
                    pl_module.trained_steps,
                )
