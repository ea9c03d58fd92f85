"""Cross-entropy and argmax on upsampled logits: in bands, and by interpolate at full size.

    python experiments/benchmarks/upsampled_loss.py [--size H W] [--num-classes N] [--batch N]
        [--rounds N]

Both ways in turn in one process on the same tensors: forward and backward of the training loss,
and the labels of evaluation. The logits come at stride 4, channels-last, as the network gives
them. Peak memory is that of a process of its own for each way: what its resident set grows to at
most, over what it is with the inputs alone (CPU, Linux), or the allocator's peak (CUDA).
"""

import argparse
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from segformer_pl.inference import predict_classes
from segformer_pl.losses import CrossEntropy

IGNORED = 255
Way = Callable[[Tensor, Tensor], object]


def fused_loss(logits: Tensor, labels: Tensor) -> Tensor:
    logits.grad = None
    loss = CrossEntropy("valid")(logits, labels, IGNORED)
    loss.backward()
    return loss


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    logits.grad = None
    full = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(full, labels, ignore_index=IGNORED)
    loss.backward()
    return loss


class ClassMaps:
    """A network whose output is known."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.num_classes, self.output = logits, logits.shape[1], "logits"

    def __call__(self, images: Tensor) -> Tensor:
        return self.logits


def fused_labels(logits: Tensor, labels: Tensor) -> Tensor:
    size = (labels.shape[1], labels.shape[2])
    images = labels.new_empty(len(labels), 3, *size, dtype=torch.float32)
    return predict_classes(ClassMaps(logits), images, size)


@torch.no_grad()
def plain_labels(logits: Tensor, labels: Tensor) -> Tensor:
    full = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return full.argmax(dim=1)


PAIRS: dict[str, tuple[Way, Way]] = {
    "loss and gradient": (fused_loss, plain_loss),
    "labels": (fused_labels, plain_labels),
}


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    height, width = options.size
    shape = options.batch, options.num_classes, -(-height // 4), -(-width // 4)
    logits = torch.randn(shape, device=options.device)
    logits = logits.contiguous(memory_format=torch.channels_last).requires_grad_()
    labels = torch.randint(options.num_classes, (options.batch, height, width))
    labels[:, :, : width // 10] = IGNORED
    return logits, labels.to(options.device)


def peak_memory(way: Way, options: argparse.Namespace) -> float:
    """MB, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory, (way, options))


def _peak_memory(way: Way, options: argparse.Namespace) -> float:
    torch.set_num_threads(options.threads)
    small = argparse.Namespace(**vars(options) | {"size": (32, 32), "batch": 1})
    way(*inputs(small))  # libraries are loaded
    logits, labels = inputs(options)
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way(logits, labels)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins at what is held now
    before = _high_water_mark()
    way(logits, labels)
    return _high_water_mark() - before


def _high_water_mark() -> float:
    """Resident set at its largest, MB, as Linux keeps it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def seconds(way: Way, logits: Tensor, labels: Tensor) -> float:
    begin = time.perf_counter()
    way(logits, labels)
    if logits.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--num-classes", type=int, default=150)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logits, labels = inputs(options)
    sys.stdout.write(
        f"batch {options.batch}, {options.num_classes} classes, {options.size[0]}x"
        f"{options.size[1]}, {options.device}, {options.threads} threads, "
        f"torch {torch.__version__}\n"
    )
    for name, (fused, plain) in PAIRS.items():
        times: dict[Way, list[float]] = {fused: [], plain: []}
        for number in tqdm(range(options.rounds + 1), name, leave=False):
            for way, measured in times.items():
                took = seconds(way, logits, labels)
                if number:  # the first round warms up
                    measured.append(took)
        memory = {way: peak_memory(way, options) for way in times}
        ratio = statistics.median(b / a for a, b in zip(times[fused], times[plain]))
        for what, way in (("in bands", fused), ("full size", plain)):
            sys.stdout.write(
                f"  {name:18s} {what:10s} {1e3 * statistics.median(times[way]):8.1f} ms "
                f"({1e3 * min(times[way]):.1f} to {1e3 * max(times[way]):.1f}), peak "
                f"{memory[way]:7.1f} MB\n"
            )
        sys.stdout.write(
            f"  {name:18s} bands are {ratio:.2f} x as fast and take "
            f"1/{memory[plain] / max(memory[fused], 0.1):.1f} of the memory\n"
        )


if __name__ == "__main__":
    main()
