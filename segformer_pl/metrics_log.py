"""Log the metrics of an evaluated split."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from segformer_pl.errors import UserError
from segformer_pl.metrics import SegmentationMetrics

# How values are logged that all ranks know alike. Without sync_dist, Lightning advises to average
# them, although it exchanges nothing for rank_zero_only.
OF_RANK_ZERO: dict[str, Any] = {"rank_zero_only": True, "sync_dist": True}


def log_metrics(
    task: pl.LightningModule,
    split: str,
    metrics: SegmentationMetrics,
    class_names: Sequence[str],
    trained_steps: int,
) -> None:
    """Compute, log and reset the metrics of a split. Call it on all ranks, at the split's end.

    Args:
        task: The task that evaluates; its trainer logs.
        split: ``val`` or ``test``, the first part of the log keys.
        metrics: Metrics of the split.
        class_names: Class names in the order of the train ids.
        trained_steps: Optimiser steps of the network in all.

    Raises:
        UserError: No pixel is labelled, or the outputs of a network that is not being trained hold
            nan or infinity.
    """
    # Synchronise at the end of the epoch and not in the step: a rank without a single batch
    # runs no step, and the other ranks would wait for it in the all-reduce.
    values = metrics.compute()
    metrics.reset()
    iou, num_labelled = values.pop("iou"), values.pop("num_labelled")
    if not num_labelled and not task.trainer.sanity_checking:
        raise UserError(
            f"no pixel of the {split} images is labelled, so the metrics are undefined; check "
            "labels.ignored of the data set and the label files"
        )
    if not values["loss"].isfinite() and not task.trainer.sanity_checking:
        message = (
            f"the network's outputs for the {split} images hold nan or infinity (mean loss "
            f"{values['loss'].item():g}), so the metrics are meaningless"
        )
        if task.trainer.state.fn != TrainerFn.FITTING:
            raise UserError(
                f"{message}; give other weights, or --trainer.precision 32-true if this run "
                "used 16 bits"
            )
        # A training goes on: DivergenceWatch stops it once its weights are not finite.
        rank_zero_warn(message)
    for key, value in values.items():
        task.log(f"{split}/{key}", value.float(), prog_bar=key == "miou", sync_dist=True)
    task.log_dict(
        {f"{split}/iou/{name}": value.float() for name, value in zip(class_names, iou)},
        sync_dist=True,
    )
    if task.trainer.state.fn != TrainerFn.FITTING and trained_steps:
        # Lightning logs a row under the metric "step" if there is one, and else under the fit
        # loop's step, which is 0 here. The index is 0-based, as in training.
        task.log("step", float(trained_steps - 1), **OF_RANK_ZERO)
    # Reference values of the data set, such as an upper bound, are logged beside the metrics. They
    # are read from a file, so nothing is averaged, and a rank may lack them.
    data: Any = getattr(task.trainer, "datamodule", None)
    if hasattr(data, "reference_scores"):
        references = data.reference_scores(split)
        task.log_dict(
            {f"{split}/{name}": value for name, value in references.items()}, **OF_RANK_ZERO
        )
