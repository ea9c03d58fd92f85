"""One update of the metrics, beside torchmetrics' MulticlassJaccardIndex.

    python experiments/benchmarks/metric_update.py [--size H W] [--num-classes N] [--batch N]
        [--rounds N]

In turn in one process on the same predictions and labels: the confusion matrix alone, checks
included; `SegmentationMetrics`, which is all that a validation counts; and MulticlassJaccardIndex
as it comes and without its checks. Their mIoU must agree.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torchmetrics.classification import MulticlassJaccardIndex
from tqdm import tqdm

from segformer_pl.metrics import SegmentationMetrics, as_classes, confusion_matrices

IGNORED = 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--num-classes", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    num_classes, size = options.num_classes, options.size

    # Regions of some size, as labels have, and predictions that are right in four of five pixels.
    coarse = torch.randint(num_classes, (options.batch, -(-size[0] // 32), -(-size[1] // 32)))
    labels = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)
    labels = labels[:, : size[0], : size[1]].contiguous()
    noise = torch.randint(num_classes, labels.shape)
    predictions = torch.where(torch.rand(labels.shape) < 0.8, labels, noise)
    labels[:, : size[0] // 10] = IGNORED
    confidence, losses = torch.rand(labels.shape), torch.rand(labels.shape)

    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    metrics = SegmentationMetrics(num_classes, IGNORED)
    checked = MulticlassJaccardIndex(num_classes, ignore_index=IGNORED)
    unchecked = MulticlassJaccardIndex(num_classes, ignore_index=IGNORED, validate_args=False)

    def update_confusion() -> None:
        classes = as_classes(predictions, labels, num_classes, IGNORED)
        confusion.add_(confusion_matrices(*classes, num_classes).sum(0))

    ways: dict[str, Callable[[], object]] = {
        "confusion matrix": update_confusion,
        "all metrics": lambda: metrics.update(predictions, labels, confidence, losses),
        "torchmetrics": lambda: checked.update(predictions, labels),
        "torchmetrics, unchecked": lambda: unchecked.update(predictions, labels),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in tqdm(range(options.rounds + 1), leave=False):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - begin)

    ours, theirs = metrics.compute()["miou"].item(), checked.compute().item()
    sys.stdout.write(
        f"batch {options.batch}, {num_classes} classes, {size[0]}x{size[1]}, {options.threads} "
        f"threads, torch {torch.__version__}; mIoU {ours:.6f} and {theirs:.6f}\n"
    )
    for name, measured in times.items():
        ratios = {
            other: statistics.median(b / a for a, b in zip(measured, times[other]))
            for other in ("torchmetrics", "torchmetrics, unchecked")
        }
        sys.stdout.write(
            f"  {name:30s} {1e3 * statistics.median(measured):8.1f} ms "
            f"({1e3 * min(measured):.1f} to {1e3 * max(measured):.1f})   "
            f"{ratios['torchmetrics']:6.2f} x torchmetrics' speed, "
            f"{ratios['torchmetrics, unchecked']:6.2f} x its speed without checks\n"
        )


if __name__ == "__main__":
    main()
