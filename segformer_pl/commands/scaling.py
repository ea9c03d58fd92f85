"""``scaling MODEL --global_batch N``: expected speed of a training on 1 to 1024 devices."""

import json
import sys
from collections.abc import Callable, Sequence
from textwrap import fill
from typing import Any, Literal, get_args

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor

from segformer_pl.analysis.complexity import device_name
from segformer_pl.analysis.scaling import (
    Algorithm,
    Exchange,
    Node,
    Training,
    local_batch,
    predict_steps,
)
from segformer_pl.analysis.scaling_report import as_dict, assumptions, table
from segformer_pl.analysis.step_time import StepTimes, time_steps
from segformer_pl.commands.device import resolve_device
from segformer_pl.commands.parser import (
    PROG,
    SegformerArgumentParser,
    add_network_options,
    build_network,
    segmenter_names,
)
from segformer_pl.errors import UserError, brief
from segformer_pl.models.segmenter import Segmenter
from segformer_pl.optim import build_optimizer, parameter_groups
from segformer_pl.task import SegmentationTask

# Larger local batches are extrapolated unless --batches asks for them.
MAX_MEASURED_BATCH = {"cpu": 4, "cuda": 16}
NUM_REGIONS = 3  # regions of one label along each side of an image
CPU_WARNING = (
    "The step was measured on this machine's CPU and not on a device of the stated node. Slow "
    "computation hides communication, so these efficiencies are far above those of GPUs; run the "
    "command on one GPU of the cluster. The columns reduce and sync do not depend on it: on any "
    "device, their sum is the most that communication adds to a step."
)


def scaling(arguments: list[str]) -> None:
    """Run ``scaling MODEL --global_batch N`` and print the predicted speeds.

    Args:
        arguments: Command-line arguments after ``scaling``, the model first.

    Raises:
        UserError: There is no such network, an argument does not fit it, or no local batch can be
            measured.
    """
    parser = _parser()
    own_options = {action.dest for action in parser._actions}
    build = add_network_options(parser, arguments)
    settings = parser.instantiate_classes(parser.parse_args(arguments))
    if build is None:
        parser.error("give MODEL first, then its options")
    options, node = settings.as_dict(), settings.node
    own = {key: options.pop(key) for key in own_options & options.keys()}
    device = resolve_device(own["device"])
    task = _task(own["model"], build, options | {"num_classes": own["num_classes"]})
    training = Training(
        global_batch=own["global_batch"],
        gradient_bytes=own["gradient_bytes"],
        all_reduce=own["all_reduce"],
        sync_batchnorm=own["sync_batchnorm"],
    )
    counts = [2**power for power in range(own["max_devices"].bit_length())]
    needed = {local_batch(training.global_batch, number) for number in counts}
    largest = min(MAX_MEASURED_BATCH[device], training.global_batch)
    batches = own["batches"] or {batch for batch in needed if batch <= largest} | {largest}
    measured, notes = _measure(task, own, sorted(batches), device)
    exchange = Exchange.of(task, measured[0].order, own["bucket_cap_mb"])
    rows = predict_steps(measured, exchange, training, node, counts)
    rate, num_workers = own["worker_images_per_s"], own["workers_per_device"]
    loaded = None if rate is None else rate * num_workers
    notes += assumptions(measured, exchange, training, node, counts)
    notes.append(
        "Data loaders are not measured; `doctor` measures the images/s of one worker on your data. "
        "Give them as --worker_images_per_s."
        if rate is None
        else f"Stated, not measured: {num_workers} data-loader workers a device, {rate:g} images/s "
        "each."
    )
    if own["json"]:
        data = {"model": own["model"], "assumptions": notes, "loader_images_per_second": loaded}
        data |= as_dict(rows, measured, exchange, training, node)
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
        return
    height, width = own["size"]
    sys.stdout.write(
        f"{own['model']}, global batch of {training.global_batch}, crops of {height}x{width} "
        f"pixels, {own['num_classes']} classes, {own['precision']}\n\n"
    )
    for note in notes:
        lines = fill(note, 98, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        sys.stdout.write(f"{lines}\n")
    sys.stdout.write(f"\n{table(rows, loaded)}\n")


def _parser() -> SegformerArgumentParser:
    parser = SegformerArgumentParser(
        prog=f"{PROG} scaling",
        description="Predict the training speed on 1, 2, 4, ... devices with "
        "DistributedDataParallel, from a step that is measured on one device and stated speeds of "
        "links. The assumptions are printed above the table. Arguments of the network follow MODEL "
        "as options; scaling MODEL --help lists them.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"network to train: {', '.join(segmenter_names())}, or an import path such as "
        "package.module.Class",
    )
    parser.add_argument(
        "--global_batch",
        type=PositiveInt,
        required=True,
        help="images of a step on all devices together (16 in the paper, on ADE20K)",
    )
    parser.add_argument(
        "--size",
        type=PositiveInt,
        nargs=2,
        default=[512, 512],
        metavar=("H", "W"),
        help="height and width of the training crop in pixels",
    )
    parser.add_argument("--num_classes", type=PositiveInt, default=150, help="number of classes")
    parser.add_argument(
        "--precision",
        choices=["32-true", "bf16-mixed"],
        default="32-true",
        help="precision of the training, as trainer.precision",
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device on which the step is measured",
    )
    parser.add_argument(
        "--batches",
        type=PositiveInt,
        nargs="+",
        help="local batches to measure (default: those of the table, up to "
        f"{MAX_MEASURED_BATCH['cuda']} on a GPU and {MAX_MEASURED_BATCH['cpu']} on the CPU)",
    )
    parser.add_argument(
        "--repetitions",
        type=PositiveInt,
        default=10,
        help="measured steps of each local batch; their median counts",
    )
    parser.add_argument(
        "--max_devices", type=PositiveInt, default=1024, help="largest number of devices"
    )
    parser.add_class_arguments(Node, "node")
    parser.add_argument(
        "--all_reduce",
        choices=list(get_args(Algorithm)),
        default="fastest",
        help="algorithm of the gradients' all-reduces; fastest: the faster one for each bucket, as "
        "NCCL chooses",
    )
    parser.add_argument(
        "--gradient_bytes",
        type=Literal[4, 2],
        default=4,
        help="bytes of a gradient value on the links, 2 with GradientCompression bf16 or fp16",
    )
    parser.add_argument(
        "--bucket_cap_mb",
        type=PositiveFloat,
        help="DDP's bucket_cap_mb in MiB (default: 25, and 1 for the first bucket)",
    )
    parser.add_argument(
        "--sync_batchnorm",
        type=bool,
        default=True,
        help="whether BatchNorms are synchronised, as by trainer.sync_batchnorm true, which the "
        "recipes of experiments/ give and `fit` alone does not",
    )
    parser.add_argument(
        "--worker_images_per_s",
        type=PositiveFloat,
        help="images that one data-loader worker delivers in a second; `doctor` measures it",
    )
    parser.add_argument(
        "--workers_per_device",
        type=PositiveInt,
        default=2,
        help="data-loader workers of each device, as data.num_workers",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _task(
    name: str, build: Callable[..., Segmenter], arguments: dict[str, Any]
) -> SegmentationTask:
    """Return the task of a training with the default recipe; its buffers are broadcast by DDP."""
    network = build_network(name, build, **arguments)
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
    task: SegmentationTask, own: dict[str, Any], batches: Sequence[int], device: str
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
        f"Compute: measured on {device_name(device)}{threads}, {own['precision']}, eager, median "
        f"of {own['repetitions']} steps after 2 of warm-up."
    ]
    notes += [CPU_WARNING] if device == "cpu" else []
    measured: list[StepTimes] = []
    for batch in batches:
        sys.stderr.write(f"measuring a local batch of {batch} ...\n")
        loss = _loss_of(task, own, batch, device)
        try:
            times = time_steps(loss, parameters, optimizer, batch, device, own["repetitions"])
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
                    f"{own['model']} cannot be trained on a batch of {batch}, images of "
                    f"{own['size'][0]}x{own['size'][1]} pixels: {brief(error)}; give other "
                    "--batches or --size"
                ) from error
            # A BatchNorm after image pooling needs several images, unless it is synchronised.
            notes.append(f"A local batch of 1 could not be measured: {brief(error)}.")
            continue
        measured.append(times)
    return measured, notes


def _loss_of(
    task: SegmentationTask, own: dict[str, Any], batch: int, device: str
) -> Callable[[], Tensor]:
    """Return a function that copies a random batch to the device and returns the training loss."""
    height, width = own["size"]
    images = torch.rand(batch, task.network.in_channels, height, width)
    # Regions of one class each: the cost of MaskFormer's loss depends on the classes of an image.
    labels = torch.randint(task.network.num_classes, (batch, NUM_REGIONS, NUM_REGIONS))
    rows, columns = (torch.arange(side) * NUM_REGIONS // side for side in (height, width))
    target = labels[:, rows][:, :, columns]
    if device == "cuda":
        images, target = images.pin_memory(), target.pin_memory()
    is_mixed = own["precision"] == "bf16-mixed"

    def loss() -> Tensor:
        moved = [tensor.to(device, non_blocking=True) for tensor in (images, target)]
        with torch.autocast(device, torch.bfloat16, enabled=is_mixed):
            return task.training_loss(*moved)

    return loss
