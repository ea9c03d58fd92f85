"""Checks of the reading plan, the data throughput and the memory of a training."""

import copy
import os
import time
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from segformer_pl.analysis.complexity import complexity
from segformer_pl.batch import Batch
from segformer_pl.data import StreamingSegmentationData
from segformer_pl.data.order import EpochShuffle, StoredOrder
from segformer_pl.data.streaming import collate
from segformer_pl.doctor.findings import Examination
from segformer_pl.doctor.splits import SplitSummary
from segformer_pl.errors import UserError, counted
from segformer_pl.lightning_workarounds import synchronizes_batch_norm
from segformer_pl.task import SegmentationTask

TIMED_STEPS = 3
FEW_LANES = 16  # below this number of lanes, a batch mixes few row groups
GIB = 1 << 30


def examine_plan(
    examination: Examination,
    data: StreamingSegmentationData,
    trainer: pl.Trainer,
    train: SplitSummary,
) -> None:
    """Check how samples are read: row groups, lanes, workers and global batch.

    Args:
        examination: Receives findings and facts.
        data: The data.
        trainer: The trainer, for the number of devices.
        train: Summary of the training split.
    """
    source = train.source
    order = EpochShuffle(source.group_rows, source.group_bytes, data.seed)
    num_readers = trainer.world_size * max(data.num_workers, 1)
    examination.facts["plan"] = {
        "devices": trainer.world_size,
        "data-loader workers per device": data.num_workers,
        "samples per step": data.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
        "largest row group (MB)": round(max(source.group_bytes) / 1e6, 1),
        "lanes": order.num_lanes,
        "lanes per reader": round(order.num_lanes / num_readers, 2),
    }
    if order.num_lanes < FEW_LANES:
        examination.warning(
            "plan",
            f"row groups of {max(source.group_bytes) / 1e6:.0f} MB leave memory for only "
            f"{order.num_lanes} at a time, so batches mix few of them; write the shards with "
            "smaller row groups (row_group_size in pyarrow.parquet.write_table)",
        )
    global_batch = data.batch_size * trainer.world_size
    if order.num_rows < global_batch:
        examination.warning(
            "plan",
            f"the global batch has {counted(global_batch, 'sample')}, but there are only "
            f"{order.num_rows} "
            "training images; lower --data.batch_size",
        )


def examine_cost(
    examination: Examination,
    task: SegmentationTask,
    data: StreamingSegmentationData,
    trainer: pl.Trainer,
    train: SplitSummary,
) -> None:
    """Estimate memory, and compare the speed of loading with that of training.

    Nothing is measured if the examination has errors already: a batch may be impossible to load.

    Args:
        examination: Receives findings and facts.
        task: The task; a few forward and backward passes of a copy are timed.
        data: The data.
        trainer: The trainer, for the device.
        train: Summary of the training split.
    """
    if examination.has_errors:
        return
    order = StoredOrder(train.source.group_rows)
    samples = data.samples("train", train.source, order, data.train_transforms, "raise")
    begin = time.perf_counter()
    loaded = [samples[position] for position in tqdm(train.usable, "loading", leave=False)]
    rate = len(loaded) / (time.perf_counter() - begin)
    num_timed = min(data.batch_size, 8)
    if synchronizes_batch_norm(trainer) and trainer.world_size > 1:
        num_timed = max(num_timed, 2)  # training has the statistics of all devices, this copy not
    batch = collate([loaded[index % len(loaded)] for index in range(num_timed)])
    height, width = batch["image"].shape[2:]
    device = trainer.strategy.root_device
    try:
        cost = complexity(task.network, height, width)
    except UserError as error:  # a size that the network does not take
        examination.error("network", str(error))
        return
    needed = data.batch_size * cost.activation_bytes + state_bytes(
        task.network, task.optimizer, task.momentum
    )
    available = _memory(device)
    figures: dict[str, Any] = {
        "loading (samples/s and process)": round(rate, 1),
        "training memory at least (GiB)": round(needed / GIB, 2),
        "memory of the device (GiB)": round(available / GIB, 1),
    }
    examination.facts["cost"] = figures
    if needed > available:
        examination.error(
            "memory",
            f"training needs at least {needed / GIB:.1f} GiB for batches of {data.batch_size} at "
            f"{height}x{width}, but the device has {available / GIB:.1f} GiB; lower "
            "--data.batch_size and raise --trainer.accumulate_grad_batches in return",
        )
        return
    try:
        step = _time_step(task, batch, device) * data.batch_size / num_timed
    except UserError as error:
        examination.error("network", str(error))
        return
    wanted = data.batch_size / step
    figures["a step takes (s)"] = round(step, 3)
    figures["it needs (samples/s)"] = round(wanted, 1)
    if data.num_workers == 0 and wanted > 2 * rate:
        examination.warning(
            "throughput",
            f"without data-loader workers, a step of {step:.2f} s waits "
            f"{data.batch_size / rate:.2f} s for its samples; set --data.num_workers 1 or more",
        )
    elif data.num_workers and wanted > rate * data.num_workers:
        examination.warning(
            "throughput",
            f"training consumes {wanted:.0f} samples/s, but {data.num_workers} data-loader workers "
            f"deliver {rate * data.num_workers:.0f}; set --data.num_workers "
            f"{-(-wanted // rate):.0f}",
        )


def state_bytes(network: nn.Module, optimizer: str, momentum: float) -> int:
    """Return the memory of weights, their gradients and the optimiser's state.

    AdamW stores two moments of every trained parameter, SGD one if it has momentum.

    Args:
        network: The network.
        optimizer: ``"adamw"`` or ``"sgd"``.
        momentum: Momentum of SGD.
    """
    num_moments = {"adamw": 2, "sgd": int(momentum > 0)}[optimizer]
    parameters = list(network.parameters())
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    return sum(parameter.nbytes for parameter in parameters) + (1 + num_moments) * trained


def _memory(device: torch.device) -> int:
    """Return the free memory of a GPU, or the main memory, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _time_step(task: SegmentationTask, batch: Batch, device: torch.device) -> float:
    """Return the median seconds of a forward and backward pass on one device.

    They run on a copy, so the task does not change. Synchronised BatchNorm, which has no other
    devices here and needs a GPU, is timed as plain BatchNorm.

    Raises:
        UserError: The network refuses the batch, such as a single image where BatchNorm needs
            several.
    """
    task = copy.deepcopy(task).to(device).train()
    images, target = batch["image"].to(device), batch["label"].to(device)
    times = []
    for _ in tqdm(range(TIMED_STEPS + 1), "timing a step", leave=False):
        begin = time.perf_counter()
        try:
            loss = task.training_loss(images, target)
        except ValueError as error:
            if isinstance(error, UserError) or "more than 1 value" not in str(error):
                raise
            raise UserError(
                "a BatchNorm of the network cannot train on a batch of 1 image, whose map has a "
                "single pixel there; give data.batch_size 2 or more, larger images, or "
                "trainer.sync_batchnorm true on several GPUs"
            ) from error
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))
