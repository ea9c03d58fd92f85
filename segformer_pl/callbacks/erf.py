"""Effective receptive fields (ERF) during training."""

import math
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from segformer_pl.analysis.erf import ERF, NoFieldError, effective_receptive_field, merge
from segformer_pl.analysis.erf.plots import plot_erf
from segformer_pl.callbacks.figures import publish
from segformer_pl.errors import counted


class EffectiveReceptiveField(pl.Callback):
    """Measures the ERF of stages 1 to 4 and the head after validations.

    The images are the first ones of each rank in the first validation, and stay the same from then
    on. The maps are averaged over all ranks. Where image sizes differ, each rank keeps the images
    that have the size of its first one, and of the ranks' sizes only the most frequent is used.

    A figure is written to ``erf/`` in the run folder and sent to the loggers that accept images.
    Logged as curves are

    - ``val/erf/<layer>/radius50`` and ``/radius95``: radius in pixels about the unit that holds
      50 % and 95 % of the ERF;
    - ``val/erf/<layer>/area50``: smallest share of the image's area that holds 50 % of the ERF,
      bias-corrected for the number of images (jackknife).

    Args:
        num_images: Number of images to average over, on all ranks together.
        every_n_steps: Minimum number of training steps between two measurements. Default: measure
            after every validation.
        batch_size: Images per forward and backward pass, which bounds the memory. Default: see
            :func:`~segformer_pl.analysis.erf.effective_receptive_field`.
    """

    def __init__(
        self, num_images: int = 16, every_n_steps: int | None = None, batch_size: int | None = None
    ) -> None:
        self.num_images = num_images
        self.every_n_steps = every_n_steps
        self.batch_size = batch_size
        self.batches: list[dict[str, Any]] = []
        self.is_complete = False
        self.last_step: int | None = None

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        num_local = math.ceil(self.num_images / trainer.world_size)  # images of this rank
        missing = num_local - sum(len(kept["id"]) for kept in self.batches)
        if self.is_complete or trainer.sanity_checking or missing <= 0:
            return
        skipped = batch.get("skipped", {})
        valid = [i for i, name in enumerate(batch["id"]) if name not in skipped][:missing]
        image = batch["image"][valid]
        if not valid:
            return
        if self.batches and image.shape[2:] != self.batches[0]["image"].shape[2:]:
            rank_zero_warn(
                f"EffectiveReceptiveField: image {batch['id'][0]!r} has another size than the "
                "first one and is left out; the next image of the first size replaces it"
            )
            return
        self.batches.append({"image": image.cpu(), "id": [batch["id"][i] for i in valid]})

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        self.is_complete = True
        step, last = pl_module.trained_steps, self.last_step
        if None not in (self.every_n_steps, last) and 0 < step - last < self.every_n_steps:
            return
        self.last_step = step
        erf = self._measure(trainer, pl_module)
        if erf is None:
            return
        for name, layer in erf.layers.items():
            values = {
                "radius50": layer.radius(0.5),
                "radius95": layer.radius(0.95),
                "area50": layer.interval(lambda erf: erf.area_ratio(0.5)).value,
            }
            pl_module.log_dict(
                {f"val/erf/{name}/{key}": value for key, value in values.items()},
                rank_zero_only=True,
                sync_dist=True,  # nothing is exchanged, but without it Lightning advises to
            )
        if trainer.is_global_zero:
            height, width = erf.settings["image_size"]
            images = f"{counted(erf.num_images, 'validation image')} of {height}x{width} pixels"
            title = f"mean over {images}, step {step}"
            publish(trainer, lambda: plot_erf(erf, title), "erf", step)

    def _measure(self, trainer: pl.Trainer, pl_module: Any) -> ERF | None:
        """Return the ERF over the images of all ranks; None if no rank measured any."""
        own = None
        if self.batches:
            try:
                own = effective_receptive_field(
                    pl_module.network,
                    self.batches,
                    preprocess=pl_module.normalize,
                    batch_size=self.batch_size,
                )
            except NoFieldError as error:  # as in a diverged run
                rank_zero_warn(f"EffectiveReceptiveField: {error}")
            except (torch.OutOfMemoryError, MemoryError) as error:
                # Do not raise: the other ranks wait for this one in all_gather_object below.
                rank_zero_warn(
                    f"EffectiveReceptiveField: not measured, out of memory ({error}); the run "
                    "continues; lower batch_size or num_images"
                )
        parts: list[ERF | None] = [own]
        if trainer.world_size > 1:
            # Gather objects and not tensors, since a rank without images does not know the shapes.
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, own)
        measured = [part for part in parts if part is not None]
        if not measured:
            return None
        # All ranks have the same parts here, so all of them choose the same size.
        sizes = Counter[tuple[int, int]]()
        for part in measured:
            sizes[tuple(part.settings["image_size"])] += part.num_images
        size, num_images = sizes.most_common(1)[0]
        if len(sizes) > 1:
            rank_zero_warn(
                f"EffectiveReceptiveField: the images of the ranks have {len(sizes)} sizes, which "
                f"cannot be averaged; only the {num_images} of {size[0]}x{size[1]} pixels are used"
            )
        erf = merge([part for part in measured if tuple(part.settings["image_size"]) == size])
        if erf.not_finite:
            rank_zero_warn(
                "EffectiveReceptiveField: images left out because value or gradient was not "
                f"finite: {', '.join(erf.not_finite)}"
            )
        return erf
