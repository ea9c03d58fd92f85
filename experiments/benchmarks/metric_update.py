"""Time one update of the metrics against torchmetrics' MulticlassJaccardIndex.

    python experiments/benchmarks/metric_update.py [--size H W] [--num_classes N] [--batch_size N]
        [--rounds N] [--threads N]

Four updates run on the same predictions and targets, interleaved in one process: the confusion
matrix alone, with its checks; `SegmentationMetrics`, everything that a validation counts; and
MulticlassJaccardIndex with and without its checks. Both values of mIoU are printed and must agree.
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
    parser.add_argument("--num_classes", type=int, default=150, help="number of classes")
    parser.add_argument("--batch_size", type=int, default=8, help="images per update")
    parser.add_argument("--rounds", type=int, default=11, help="measured rounds")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    num_classes, size = options.num_classes, options.size

    # Label maps of 32x32 regions, and predictions that are correct at four of five pixels.
    coarse = torch.randint(num_classes, (options.batch_size, -(-size[0] // 32), -(-size[1] // 32)))
    target = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)
    target = target[:, : size[0], : size[1]].contiguous()
    noise = torch.randint(num_classes, target.shape)
    pred = torch.where(torch.rand(target.shape) < 0.8, target, noise)
    target[:, : size[0] // 10] = IGNORED
    confidence, losses = torch.rand(target.shape), torch.rand(target.shape)

    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    metrics = SegmentationMetrics(num_classes, IGNORED)
    checked = MulticlassJaccardIndex(num_classes, ignore_index=IGNORED)
    unchecked = MulticlassJaccardIndex(num_classes, ignore_index=IGNORED, validate_args=False)

    def update_confusion() -> None:
        classes = as_classes(pred, target, num_classes, IGNORED)
        confusion.add_(confusion_matrices(*classes, num_classes).sum(0))

    updates: dict[str, Callable[[], object]] = {
        "confusion matrix": update_confusion,
        "all metrics": lambda: metrics.update(pred, target, confidence, losses),
        "torchmetrics": lambda: checked.update(pred, target),
        "torchmetrics, unchecked": lambda: unchecked.update(pred, target),
    }
    times: dict[str, list[float]] = {name: [] for name in updates}
    for round_ in tqdm(range(options.rounds + 1), leave=False):
        for name, update in updates.items():
            begin = time.perf_counter()
            update()
            if round_:  # the first round warms up
                times[name].append(time.perf_counter() - begin)

    ours, theirs = metrics.compute()["miou"].item(), checked.compute().item()
    sys.stdout.write(
        f"batch {options.batch_size}, {num_classes} classes, {size[0]}x{size[1]}, "
        f"{options.threads} threads, torch {torch.__version__}; "
        f"mIoU {ours:.6f} and {theirs:.6f}\n"
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
