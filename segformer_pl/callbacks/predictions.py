"""A panel of pictures and what the network says of them, while training."""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from segformer_pl.analysis.overlays import plot_predictions
from segformer_pl.callbacks.figures import publish


class PredictionPanel(pl.Callback):
    """After every validation, draws image, label and prediction of the first few pictures.

    The figure goes to ``predictions/`` in the run folder and to the loggers that take images.

    Args:
        num_images: How many pictures.
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
        images, labels, predictions = (
            pictures[:missing].cpu()
            for pictures in (batch["image"], batch["label"], outputs["pred"])
        )
        self.shown.extend(zip(batch["id"], images, labels, predictions))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        shown, self.shown = self.shown, []
        if shown:
            publish(
                trainer,
                lambda: plot_predictions(shown, pl_module.class_names, pl_module.palette),
                "predictions",
                pl_module.trained_steps,
            )
