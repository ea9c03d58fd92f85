"""Checks of training settings and initial weights."""

import copy
from typing import NamedTuple

import lightning.pytorch as pl
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from segformer_pl.data import StreamingSegmentationData
from segformer_pl.doctor.findings import Examination
from segformer_pl.errors import UserError, counted
from segformer_pl.lightning_workarounds import synchronizes_batch_norm
from segformer_pl.task import SegmentationTask


class UsualRates(NamedTuple):
    """Learning rates that recipes have with an optimiser.

    Attributes:
        largest: Largest learning rate, in any part of the network, without a warning.
        published: Rates of published recipes, for a message.
    """

    largest: float
    published: str


# Published rates are those of the files in experiments/recipes.
USUAL_LR: dict[str, UsualRates] = {
    "adamw": UsualRates(0.1, "1e-5 to 1e-3 in published recipes, up to about 1e-2 from scratch"),
    "sgd": UsualRates(1.0, "1e-3 to 1e-1 in published recipes"),
}


def examine_weights(
    examination: Examination, task: SegmentationTask, data: StreamingSegmentationData
) -> None:
    """Check that the initial weights can be loaded and fit the data.

    Args:
        examination: Receives the findings.
        task: The task; weights are loaded into a copy of its network.
        data: The data, whose label mapping is compared with that of the weights.
    """
    if task.weights is None and task.encoder_weights is None:
        return
    try:
        report = task.read_weights(copy.deepcopy(task.network))
        data.check_labels(report.data)
    except UserError as error:
        examination.error("weights", str(error))


def examine_recipe(
    examination: Examination,
    task: SegmentationTask,
    data: StreamingSegmentationData,
    trainer: pl.Trainer,
) -> None:
    """Check settings that contradict each other or are probably mistaken.

    Args:
        examination: Receives the findings.
        task: The task.
        data: The data.
        trainer: The trainer.
    """
    max_steps, check = trainer.max_steps, trainer.val_check_interval
    if max_steps < 1:
        examination.error(
            "recipe",
            "trainer.max_steps is not set, but the learning-rate schedule needs the number of "
            "steps; give --trainer.max_steps N",
        )
    elif task.warmup_steps >= max_steps:
        examination.error(
            "recipe",
            f"the learning rate warms up for {counted(task.warmup_steps, 'step')}, but training "
            "ends after "
            f"{max_steps}, before the warm-up is over; lower --model.warmup_steps",
        )
    batches = max_steps * trainer.accumulate_grad_batches
    validates = trainer.limit_val_batches != 0
    if max_steps > 0 and validates and isinstance(check, int) and check > batches:
        examination.warning(
            "recipe",
            f"validation runs every {check} batches, but training ends after {batches}; lower "
            "--trainer.val_check_interval",
        )
    # With an integer limit_train_batches, an epoch has that many batches and ends with validation.
    epoch = trainer.limit_train_batches
    if validates and isinstance(check, float) and not (isinstance(epoch, int) and epoch <= batches):
        examination.warning(
            "recipe",
            "validation never runs during training: trainer.val_check_interval is not set, and the "
            "training stream has no epochs; give --trainer.val_check_interval N, in batches, or "
            "--trainer.limit_val_batches 0",
        )
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if 0 < max_steps < every:
        examination.warning(
            "recipe",
            f"the training loss is logged every {every} steps, but training ends after "
            f"{max_steps}, so it is never logged; lower --trainer.log_every_n_steps",
        )
    head_lr, usual = task.lr * task.head_lr_mult, USUAL_LR[task.optimizer]
    if task.lr <= 0 or head_lr > usual.largest:
        examination.warning(
            "recipe",
            f"learning rates of {task.lr:g} in the encoder and {head_lr:g} outside it are unusual "
            f"for {task.optimizer} ({usual.published}); check --model.lr and "
            "--model.head_lr_mult",
        )
    if float(task.image_mean.max()) > 1 or float(task.image_std.max()) > 1:
        examination.error(
            "recipe",
            "model.image_mean and model.image_std are for pixel values of 0 to 255, but images are "
            "scaled to 0 to 1; divide both by 255",
        )
    synchronized = synchronizes_batch_norm(trainer)
    has_batch_norm = _uses_batch_statistics(task.network)
    is_single_image = data.batch_size == 1 and not (synchronized and trainer.world_size > 1)
    if has_batch_norm and is_single_image:
        examination.warning(
            "recipe",
            "with --data.batch_size 1, BatchNorm computes its statistics over one image; raise "
            "--data.batch_size, or set --trainer.sync_batchnorm true on several GPUs",
        )
    if trainer.precision == "16-mixed" and trainer.strategy.root_device.type != "cuda":
        examination.error(
            "recipe", "trainer.precision 16-mixed needs a GPU; use bf16-mixed or 32-true"
        )


def _uses_batch_statistics(network: nn.Module) -> bool:
    """Return whether a BatchNorm of the network normalises by its batch in training.

    One that the network keeps in evaluation mode, frozen, uses its running statistics.
    """
    modes = {module: module.training for module in network.modules()}
    network.train()
    try:
        norms = [module for module in modes if isinstance(module, _BatchNorm)]
        return any(norm.training for norm in norms)
    finally:
        for module, is_training in modes.items():
            module.training = is_training
