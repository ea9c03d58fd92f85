"""``scaling MODEL --global_batch N``: expected speed of a training on 1 to 1024 devices."""

import json
import sys
from collections.abc import Callable, Sequence
from textwrap import fill

import torch
from jsonargparse import Namespace
from torch import Tensor

from segformer_pl.analysis.complexity import device_name
from segformer_pl.analysis.scaling import (
    Exchange,
    Training,
    local_batch,
    predict_steps,
)
from segformer_pl.analysis.scaling_report import as_dict, assumptions, table
from segformer_pl.analysis.step_time import StepTimes, time_steps
from segformer_pl.commands.device import resolve_device
from segformer_pl.commands.networks import build_network
from segformer_pl.commands.options.scaling import MAX_MEASURED_BATCH
from segformer_pl.errors import UserError, brief
from segformer_pl.optim import build_optimizer, parameter_groups
from segformer_pl.task import SegmentationTask

NUM_REGIONS = 3  # regions of one label along each side of an image
CPU_WARNING = (
    "The step was measured on this machine's CPU and not on a device of the stated node. Slow "
    "computation hides communication, so these efficiencies are far above those of GPUs; run the "
    "command on one GPU of the cluster. The columns reduce and sync do not depend on it: on any "
    "device, their sum is the most that communication adds to a step."
)


def run(options: Namespace) -> None:
    """Run ``scaling MODEL --global_batch N`` and print the predicted speeds.

    Args:
        options: Options as ``options/scaling.py`` parses them.

    Raises:
        UserError: There is no such network, an argument does not fit it, or no local batch can be
            measured.
    """
    device, node = resolve_device(options.device), options.node
    task = _task(options)
    training = Training(
        global_batch=options.global_batch,
        gradient_bytes=options.gradient_bytes,
        all_reduce=options.all_reduce,
        sync_batchnorm=options.sync_batchnorm,
    )
    counts = [2**power for power in range(options.max_devices.bit_length())]
    needed = {local_batch(training.global_batch, number) for number in counts}
    largest = min(MAX_MEASURED_BATCH[device], training.global_batch)
    batches = options.batches or {batch for batch in needed if batch <= largest} | {largest}
    measured, notes = _measure(task, options, sorted(batches), device)
    exchange = Exchange.of(task, measured[0].order, options.bucket_cap_mb)
    rows = predict_steps(measured, exchange, training, node, counts)
    rate, num_workers = options.worker_images_per_s, options.workers_per_device
    loaded = None if rate is None else rate * num_workers
    notes += assumptions(measured, exchange, training, node, counts)
    notes.append(
        "Data loaders are not measured; `doctor` measures the images/s of one worker on your data. "
        "Give them as --worker_images_per_s."
        if rate is None
        else f"Stated, not measured: {num_workers} data-loader workers a device, {rate:g} images/s "
        "each."
    )
    if options.json:
        data = {"model": options.model, "assumptions": notes, "loader_images_per_second": loaded}
        data |= as_dict(rows, measured, exchange, training, node)
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
        return
    height, width = options.size
    sys.stdout.write(
        f"{options.model}, global batch of {training.global_batch}, crops of {height}x{width} "
        f"pixels, {options.num_classes} classes, {options.precision}\n\n"
    )
    for note in notes:
        lines = fill(note, 98, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        sys.stdout.write(f"{lines}\n")
    sys.stdout.write(f"\n{table(rows, loaded)}\n")


def _task(options: Namespace) -> SegmentationTask:
    """Return the task of a training with the default recipe; its buffers are broadcast by DDP."""
    arguments = options.network | {"num_classes": options.num_classes}
    network = build_network(options.model, options.build, **arguments)
    classes = range(network.num_classes)
    mean = (0.5,) * network.in_channels
    return SegmentationTask(
        network,
        class_names=[f"class {index}" for index in classes],
        palette=[[index % 256] * 3 for index in classes],
        image_mean=mean,
        image_std=mean,
    )


def _measure(
    task: SegmentationTask, options: Namespace, batches: Sequence[int], device: str
) -> tuple[list[StepTimes], list[str]]:
    """Measure a training step at local batches, smallest first; return times and remarks.

    A single image that a BatchNorm refuses, and batches that do not fit into the memory of the GPU,
    are left out with a remark, if another one can be measured.

    Raises:
        UserError: The network refuses the images, or not even the smallest batch fits.
    """
    task = task.to(device).train()
    parameters = {name: p for name, p in task.named_parameters() if p.requires_grad}
    groups = parameter_groups(task.network, task.lr, task.weight_decay, task.head_lr_mult)
    optimizer = build_optimizer(task.optimizer, groups, task.momentum, is_fused=True)
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    notes = [
        f"Compute: measured on {device_name(device)}{threads}, {options.precision}, eager, median "
        f"of {options.repetitions} steps after 2 of warm-up."
    ]
    notes += [CPU_WARNING] if device == "cpu" else []
    measured: list[StepTimes] = []
    for batch in batches:
        sys.stderr.write(f"measuring a local batch of {batch} ...\n")
        loss = _loss_of(task, options, batch, device)
        try:
            times = time_steps(loss, parameters, optimizer, batch, device, options.repetitions)
        except torch.OutOfMemoryError as error:
            if not measured:
                raise UserError(
                    f"a local batch of {batch} does not fit into the memory of the GPU; give "
                    "smaller --batches or a smaller --size"
                ) from error
            notes.append(
                f"A local batch of {batch} does not fit into the memory of this device; rows with "
                "it or a larger one are extrapolated and could not be trained there."
            )
            break
        except ValueError as error:
            if batch > 1 or len(batches) == 1:
                raise UserError(
                    f"{options.model} cannot be trained on a batch of {batch}, images of "
                    f"{options.size[0]}x{options.size[1]} pixels: {brief(error)}; give other "
                    "--batches or --size"
                ) from error
            # A BatchNorm after image pooling needs several images, unless it is synchronised.
            notes.append(f"A local batch of 1 could not be measured: {brief(error)}.")
            continue
        measured.append(times)
    return measured, notes


def _loss_of(
    task: SegmentationTask, options: Namespace, batch: int, device: str
) -> Callable[[], Tensor]:
    """Return a function that copies a random batch to the device and returns the training loss."""
    height, width = options.size
    images = torch.rand(batch, task.network.in_channels, height, width)
    # Regions of one class each: the cost of MaskFormer's loss depends on the classes of an image.
    labels = torch.randint(task.network.num_classes, (batch, NUM_REGIONS, NUM_REGIONS))
    rows, columns = (torch.arange(side) * NUM_REGIONS // side for side in (height, width))
    target = labels[:, rows][:, :, columns]
    if device == "cuda":
        images, target = images.pin_memory(), target.pin_memory()
    is_mixed = options.precision == "bf16-mixed"

    def loss() -> Tensor:
        moved = [tensor.to(device, non_blocking=True) for tensor in (images, target)]
        with torch.autocast(device, torch.bfloat16, enabled=is_mixed):
            return task.training_loss(*moved)

    return loss
