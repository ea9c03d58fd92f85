"""Effective receptive fields while training."""

import math
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from segformer_pl.analysis.erf import ERF, NoFieldError, effective_receptive_field, merge
from segformer_pl.analysis.erf.plots import plot_erf
from segformer_pl.callbacks.figures import publish


class EffectiveReceptiveField(pl.Callback):
    """After a validation, measures the ERF of stage 1 to 4 and the head: does it grow as the
    scores do?

    The pictures are the first of every rank's share of the first validation, the same ones from
    then on, and the maps are averaged over all ranks; where their sizes differ, over the size that
    most have. The figure goes to ``erf/`` in the run folder
    and to the loggers that take images; ``val/erf/<layer>/radius50`` and ``/radius95`` (pixels
    about the unit that hold half and 95 % of the field) and ``/area50`` (smallest share of the
    picture's area that holds half of it, freed of what it owes to the number of pictures) are
    logged as curves.

    Args:
        num_images: How many pictures to average over, on all ranks together.
        every_n_steps: Training steps between two measurements at least; by default every
            validation is followed by one.
        batch_size: Pictures in a pass; bounds the memory. By default as many as the network's
            device does quickly.
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
        wanted = math.ceil(self.num_images / trainer.world_size)
        missing = wanted - sum(len(kept["id"]) for kept in self.batches)
        if self.is_complete or trainer.sanity_checking or missing <= 0:
            return
        skipped = batch.get("skipped", {})
        sound = [i for i, name in enumerate(batch["id"]) if name not in skipped][:missing]
        image = batch["image"][sound]
        if not sound:
            return
        if self.batches and image.shape[2:] != self.batches[0]["image"].shape[2:]:
            rank_zero_warn(
                f"EffectiveReceptiveField: picture {batch['id'][0]!r} is of another size than the "
                "first and is not averaged with it; the next of that size takes its place"
            )
            return
        self.batches.append({"image": image.cpu(), "id": [batch["id"][i] for i in sound]})

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
        for name, field in erf.layers.items():
            values = {
                "radius50": field.radius(0.5),
                "radius95": field.radius(0.95),
                "area50": field.interval(lambda erf: erf.area_ratio(0.5)).value,
            }
            pl_module.log_dict(
                {f"val/erf/{name}/{key}": value for key, value in values.items()},
                rank_zero_only=True,
            )
        if trainer.is_global_zero:
            height, width = erf.settings["image_size"]
            title = f"mean of {erf.num_images} validation pictures of {height}x{width}, step {step}"
            publish(trainer, lambda: plot_erf(erf, title), "erf", step)

    def _measure(self, trainer: pl.Trainer, pl_module: Any) -> ERF | None:
        """Of all ranks together; None if nowhere was a picture."""
        own = None
        if self.batches:
            try:
                own = effective_receptive_field(
                    pl_module.network,
                    self.batches,
                    preprocess=pl_module.normalize,
                    batch_size=self.batch_size,
                )
            except NoFieldError as error:  # a run that diverged has worse to tell
                rank_zero_warn(f"EffectiveReceptiveField: {error}")
            except (torch.OutOfMemoryError, MemoryError) as error:
                # Another rank may have measured, and waits for this one below.
                rank_zero_warn(
                    f"EffectiveReceptiveField: not measured, out of memory ({error}); the run goes "
                    "on; lower batch_size, or num_images"
                )
        parts: list[ERF | None] = [own]
        if trainer.world_size > 1:
            # Whole objects: a rank may have no picture, and then it knows no shapes either.
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, own)
        measured = [part for part in parts if part is not None]
        if not measured:
            return None
        # Every rank counts the same parts and so leaves out the same ones.
        sizes = Counter[tuple[int, int]]()
        for part in measured:
            sizes[tuple(part.settings["image_size"])] += part.num_images
        size, num_images = sizes.most_common(1)[0]
        if len(sizes) > 1:
            rank_zero_warn(
                f"EffectiveReceptiveField: the ranks' first pictures have {len(sizes)} sizes, "
                f"which cannot be averaged; the {num_images} of {size[0]}x{size[1]} pixels are "
                "taken"
            )
        erf = merge([part for part in measured if tuple(part.settings["image_size"]) == size])
        if erf.not_finite:
            rank_zero_warn(
                "EffectiveReceptiveField: value or gradient was not finite, left out: "
                f"{', '.join(erf.not_finite)}"
            )
        return erf
