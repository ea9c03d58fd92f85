"""Effective receptive fields while training."""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from segformer_pl.analysis.erf import effective_receptive_field, plot_erf
from segformer_pl.callbacks.figures import publish


class EffectiveReceptiveField(pl.Callback):
    """After every validation, draws the ERF of stage 1 to 4 and the head.

    Averages over the first validation images that rank 0 sees. The figure goes to ``erf/`` in the
    run folder and to the loggers that take images.

    Args:
        num_images: How many images to average over.
    """

    def __init__(self, num_images: int = 16) -> None:
        self.num_images = num_images
        self.images: list[Tensor] = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        missing = self.num_images - len(self.images)
        if trainer.is_global_zero and missing > 0:
            self.images.extend(batch["image"][:missing].cpu())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        images, self.images = self.images, []
        if trainer.sanity_checking or not images:
            return
        total: dict[str, Tensor] = {}
        for image in images:  # one at a time: sizes may differ, and memory stays flat
            normalized = pl_module.normalize(image.to(pl_module.device)[None])
            maps = effective_receptive_field(pl_module.network, normalized)
            total = {name: total.get(name, 0) + erf for name, erf in maps.items()}
        subtitle = f"mean of {len(images)} validation images, step {trainer.global_step}"
        publish(trainer, plot_erf(total, subtitle), "erf")
