"""Settings that cannot be meant, and weights that cannot be read."""

import copy

import lightning.pytorch as pl
from torch import nn

from segformer_pl.data import StreamingSegmentationData
from segformer_pl.doctor.findings import Examination
from segformer_pl.errors import UserError
from segformer_pl.lightning_workarounds import synchronizes_batch_norm
from segformer_pl.task import SegmentationTask


def examine_weights(
    found: Examination, task: SegmentationTask, data: StreamingSegmentationData
) -> None:
    if task.weights is None and task.encoder_weights is None:
        return
    try:
        report = task.read_weights(copy.deepcopy(task.network))
        data.check_labels(report.data)
    except UserError as error:
        found.error("weights", str(error))


def examine_recipe(
    found: Examination,
    task: SegmentationTask,
    data: StreamingSegmentationData,
    trainer: pl.Trainer,
) -> None:
    max_steps, check = trainer.max_steps, trainer.val_check_interval
    if max_steps < 1:
        found.error(
            "recipe",
            "trainer.max_steps is not set, and the learning-rate schedule is counted in steps; "
            "give --trainer.max_steps N",
        )
    elif task.warmup_steps >= max_steps:
        found.error(
            "recipe",
            f"the learning rate warms up for {task.warmup_steps} steps, but training ends after "
            f"{max_steps}: it never gets there; lower --model.warmup_steps",
        )
    batches = max_steps * trainer.accumulate_grad_batches
    validates = trainer.limit_val_batches != 0
    if max_steps > 0 and validates and isinstance(check, int) and check > batches:
        found.warning(
            "recipe",
            f"validation comes every {check} batches, but training ends after {batches}; lower "
            "--trainer.val_check_interval",
        )
    # So many batches are called an epoch, after each of which the network is validated.
    epoch = trainer.limit_train_batches
    if validates and isinstance(check, float) and not (isinstance(epoch, int) and epoch <= batches):
        found.warning(
            "recipe",
            "validation never runs while training: trainer.val_check_interval is not set, and a "
            "stream has no epochs; give --trainer.val_check_interval N, in batches, or "
            "--trainer.limit_val_batches 0",
        )
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if 0 < max_steps < every:
        found.warning(
            "recipe",
            f"the training loss is logged every {every} steps, but training "
            f"ends after {max_steps}: it is never logged; lower --trainer.log_every_n_steps",
        )
    head_lr = task.lr * task.head_lr_mult
    if task.lr <= 0 or head_lr > 0.1:
        found.warning(
            "recipe",
            f"learning rates of {task.lr:g} in the encoder and {head_lr:g} outside it are far from "
            "what AdamW trains SegFormer with (6e-5 and 6e-4 from ImageNet weights, up to some "
            "1e-2 from scratch); check --model.lr and --model.head_lr_mult",
        )
    if float(task.image_mean.max()) > 1 or float(task.image_std.max()) > 1:
        found.error(
            "recipe",
            "model.image_mean and model.image_std are for pixels of 0 to 255, but batches hold 0 "
            "to 1; divide them by 255",
        )
    synchronized = synchronizes_batch_norm(trainer)
    if synchronized and trainer.strategy.root_device.type != "cuda":
        found.error(
            "recipe",
            "trainer.sync_batchnorm works on GPUs only; take it away, plain BatchNorm is used then",
        )
    has_batch_norm = any(
        isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) for module in task.network.modules()
    )
    alone = data.batch_size == 1 and not (synchronized and trainer.world_size > 1)
    if has_batch_norm and alone:
        found.warning(
            "recipe",
            "BatchNorm sees one image at a time with --data.batch_size 1; give more, or "
            "--trainer.sync_batchnorm true on several GPUs",
        )
    if trainer.precision == "16-mixed" and trainer.strategy.root_device.type != "cuda":
        found.error("recipe", "trainer.precision 16-mixed needs a GPU; use bf16-mixed or 32-true")
