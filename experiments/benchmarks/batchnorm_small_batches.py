"""Measure what the head's BatchNorm does when ranks normalise few images each.

    python experiments/benchmarks/batchnorm_small_batches.py [--steps N] [--seeds N] [--threads N]
        [--output FILE]

Question: SegFormer-B0 has one BatchNorm, in the head. Without SyncBatchNorm every rank normalises
by its own images. What does that change in the gradients, the running statistics and the mIoU?
Hardware: any; 15 minutes of one CPU core. Expectation: nothing that matters down to 4 images; at 1,
running statistics that are too narrow and cost mIoU.

The runs of a seed see the same global batches of 24 images of `shapes`. A batch is normalised in
groups, as ranks would::

    group of 24   [ 1 2 3 ... 24 ]             one rank, or SyncBatchNorm over all ranks
    group of 8    [ 1 ... 8 ][ ... ][ ... ]    three ranks of 8 images
    group of 1    [ 1 ][ 2 ][ 3 ] ... [ 24 ]   24 ranks of one image

The running statistics are those of the first group, because DDP broadcasts the buffers of rank 0.
Images have 64x64 pixels and the BatchNorm is at stride 4, so a group of one is 256 positions.

The gradients of a batch are compared at random initialisation and after the training in groups of
24, over 20 batches; beside them is the difference between one batch of 24 and the next. After each
training, the mIoU is measured twice: with the running statistics that it left, and with statistics
estimated anew, as the mean over 20 batches of 24. Results are appended to FILE, and a repeated
command continues after the last of them.
"""

import argparse
import copy
import json
import logging
import statistics
import sys
import warnings
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import lightning.pytorch as pl
import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from segformer_pl.atomic import atomic_write_text
from segformer_pl.data import StreamingSegmentationData
from segformer_pl.models import segformer_b0
from segformer_pl.task import SegmentationTask

GLOBAL_BATCH = 24
GROUPS = (24, 8, 4, 2, 1)
NUM_BATCHES = 20  # of each comparison of gradients and each estimate of statistics


class GroupedBatchNorm(nn.BatchNorm2d):
    """BatchNorm that normalises groups of images separately in training, as ranks do.

    Args:
        num_features: Number of channels.
        group: Images per group.
    """

    def __init__(self, num_features: int, group: int) -> None:
        super().__init__(num_features)
        self.group = group

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        first, *others = input.split(self.group)
        normalized = [
            F.batch_norm(other, None, None, self.weight, self.bias, training=True, eps=self.eps)
            for other in others
        ]
        return torch.cat([super().forward(first), *normalized])


def build_task(data: StreamingSegmentationData, group: int) -> SegmentationTask:
    """Build B0 as in experiments/demo.yaml, with a shorter warm-up and a BatchNorm in groups."""
    labels = data.entry.labels
    network = segformer_b0(num_classes=labels.num_classes, drop_path_rate=0.0, dropout=0.0)
    network.head.bn = GroupedBatchNorm(network.head.bn.num_features, group)
    return SegmentationTask(
        network,
        class_names=list(labels.names),
        palette=[list(color) for color in labels.colors],
        ignore_index=labels.ignore_index,
        lr=3e-3,
        head_lr_mult=1.0,
        warmup_steps=50,
    )


def shapes(seed: int) -> StreamingSegmentationData:
    return StreamingSegmentationData(
        batch_size=GLOBAL_BATCH, eval_batch_size=50, num_workers=0, seed=seed
    )


def batches(seed: int) -> Iterator[dict[str, Tensor]]:
    """Return the batches that no training here has seen or will see in this order."""
    data = shapes(1000 + seed)
    data.prepare_data()
    data.setup("fit")
    return islice(data.train_dataloader(), NUM_BATCHES)


def gradient(task: SegmentationTask, batch: dict[str, Tensor], group: int) -> Tensor:
    """Return the gradient of all parameters as one vector; the network stays as it is."""
    network = copy.deepcopy(task)
    network.train().network.head.bn.group = group
    network.training_loss(batch["image"], batch["label"]).backward()
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


def compare_gradients(task: SegmentationTask, seed: int) -> dict[str, float]:
    """Return the mean relative difference to the gradient in one group, by group size."""
    whole: list[Tensor] = []
    differences: dict[str, list[float]] = {str(group): [] for group in GROUPS[1:]}
    for batch in batches(seed):
        whole.append(gradient(task, batch, GLOBAL_BATCH))
        for group in GROUPS[1:]:
            difference = gradient(task, batch, group) - whole[-1]
            differences[str(group)].append((difference.norm() / whole[-1].norm()).item())
    differences["next batch"] = [
        ((after - before).norm() / before.norm()).item() for before, after in pairwise(whole)
    ]
    return {name: statistics.mean(values) for name, values in differences.items()}


@torch.no_grad()
def estimate_statistics(task: SegmentationTask, seed: int) -> None:
    """Replace the running statistics by their means over batches of 24."""
    bn = task.network.head.bn
    bn.group, bn.momentum = GLOBAL_BATCH, None  # None: the mean over all batches
    bn.reset_running_stats()
    task.train()
    for batch in batches(seed):
        task(batch["image"])


def train(seed: int, group: int, steps: int, with_gradients: bool) -> dict[str, object]:
    """Train once; return mIoU in %, differences of statistics and, if asked for, of gradients."""
    pl.seed_everything(seed, verbose=False)
    data = shapes(seed)
    task = build_task(data, group)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    evaluator = pl.Trainer(
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
    )

    def miou() -> float:
        (metrics,) = evaluator.validate(task, shapes(seed), verbose=False)
        return 100 * metrics["val/miou"]

    result: dict[str, object] = {"seed": seed, "group": group, "steps": steps}
    if with_gradients:
        result["gradients at the start"] = compare_gradients(task, seed)
    trainer.fit(task, data)
    if with_gradients:
        result["gradients at the end"] = compare_gradients(task, seed)
    bn = task.network.head.bn
    left_mean, left_variance = bn.running_mean.clone(), bn.running_var.clone()
    result["miou"] = miou()
    estimate_statistics(task, seed)
    shift = (left_mean - bn.running_mean).abs() / bn.running_var.sqrt()
    result |= {
        "miou, new statistics": miou(),
        "mean": shift.mean().item(),
        "variance": (left_variance / bn.running_var).log().mean().exp().item(),
    }
    return result


def with_interval(values: list[float], digits: int) -> str:
    """Return mean and half width of the 95 % interval over seeds, by Student's t."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    standard_error = statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} +- {student.ppf(0.975, len(values) - 1) * standard_error:.{digits}f}"


def table(results: list[dict[str, object]]) -> str:
    """Return all results as a Markdown table, a row for each group size."""
    whole = {result["seed"]: result for result in results if result["group"] == GLOBAL_BATCH}
    lines = [
        "| images per group | gradient, start | gradient, end | running mean | running variance "
        "| mIoU | minus 24 | mIoU, new statistics | minus 24 |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    keys = ("gradients at the start", "gradients at the end")
    for group in GROUPS:
        ours = [result for result in results if result["group"] == group]
        cells = [
            with_interval([result[key][str(group)] for result in whole.values()], 3)
            if group != GLOBAL_BATCH
            else "0"
            for key in keys
        ]
        cells += [
            with_interval([result[key] for result in ours], 3) for key in ("mean", "variance")
        ]
        for key in ("miou", "miou, new statistics"):
            differences = [result[key] - whole[result["seed"]][key] for result in ours]
            cells.append(with_interval([result[key] for result in ours], 1))
            cells.append("0" if group == GLOBAL_BATCH else with_interval(differences, 1))
        lines.append(f"| {group} | {' | '.join(cells)} |")
    cells = [
        with_interval([result[key]["next batch"] for result in whole.values()], 3) for key in keys
    ]
    lines.append(f"| 24, the next batch | {' | '.join(cells)} | | | | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="steps of each training")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/batchnorm_small_batches.json"),
        help="file of the results",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    results = json.loads(options.output.read_text()) if options.output.exists() else []
    if any(result["steps"] != options.steps for result in results):
        sys.exit(f"error: {options.output} has results of other --steps; give another --output")
    done = {(result["seed"], result["group"]) for result in results}
    for seed in tqdm(range(options.seeds), "seeds", leave=False):
        for group in GROUPS:
            if (seed, group) not in done:
                results.append(train(seed, group, options.steps, group == GLOBAL_BATCH))
                atomic_write_text(options.output, json.dumps(results, indent=1) + "\n")
    sys.stdout.write(
        f"{options.steps} steps of {GLOBAL_BATCH} images, {options.seeds} seeds, torch "
        f"{torch.__version__}; mean +- half width of the 95 % interval over seeds\n\n"
        f"{table(results)}\n"
    )


if __name__ == "__main__":
    main()
