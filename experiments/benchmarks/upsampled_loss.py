"""Time cross-entropy and argmax on upsampled logits: in bands of rows, and on whole images.

    python experiments/benchmarks/upsampled_loss.py [--size H W] [--num_classes N] [--batch_size N]
        [--rounds N] [--threads N] [--device cpu|cuda]

Both implementations run on the same tensors, interleaved in one process: forward and backward pass
of the training loss, and the label maps of evaluation. The logits have stride 4 and channels-last
memory format, as those of the network. Peak memory is measured in a process of its own for each
implementation: the maximum of the resident set size minus that with the inputs alone (CPU, Linux),
or the peak of the allocator (CUDA).
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
Function = Callable[[Tensor, Tensor], object]


def banded_loss(logits: Tensor, target: Tensor) -> Tensor:
    logits.grad = None
    loss = CrossEntropy("valid")(logits, target, IGNORED)
    loss.backward()
    return loss


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    logits.grad = None
    full = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(full, target, ignore_index=IGNORED)
    loss.backward()
    return loss


class ClassMaps:
    """A network that returns given logits."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.num_classes, self.output = logits, logits.shape[1], "logits"

    def __call__(self, images: Tensor) -> Tensor:
        return self.logits


def banded_labels(logits: Tensor, target: Tensor) -> Tensor:
    size = (target.shape[1], target.shape[2])
    images = target.new_empty(len(target), 3, *size, dtype=torch.float32)
    return predict_classes(ClassMaps(logits), images, size)


@torch.no_grad()
def plain_labels(logits: Tensor, target: Tensor) -> Tensor:
    full = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    return full.argmax(dim=1)


PAIRS: dict[str, tuple[Function, Function]] = {
    "loss and gradient": (banded_loss, plain_loss),
    "labels": (banded_labels, plain_labels),
}


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    height, width = options.size
    shape = options.batch_size, options.num_classes, -(-height // 4), -(-width // 4)
    logits = torch.randn(shape, device=options.device)
    logits = logits.contiguous(memory_format=torch.channels_last).requires_grad_()
    target = torch.randint(options.num_classes, (options.batch_size, height, width))
    target[:, :, : width // 10] = IGNORED
    return logits, target.to(options.device)


def peak_memory(function: Function, options: argparse.Namespace) -> float:
    """Return the peak memory in MB, measured in a new process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory, (function, options))


def _peak_memory(function: Function, options: argparse.Namespace) -> float:
    torch.set_num_threads(options.threads)
    small = argparse.Namespace(**vars(options) | {"size": (32, 32), "batch_size": 1})
    function(*inputs(small))  # loads the libraries
    logits, target = inputs(options)
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function(logits, target)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    before = _peak_resident()
    function(logits, target)
    return _peak_resident() - before


def _peak_resident() -> float:
    """Return the peak of the resident set size in MB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def seconds(function: Function, logits: Tensor, target: Tensor) -> float:
    begin = time.perf_counter()
    function(logits, target)
    if logits.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--num_classes", type=int, default=150, help="number of classes")
    parser.add_argument("--batch_size", type=int, default=4, help="images per batch")
    parser.add_argument("--rounds", type=int, default=11, help="measured rounds")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logits, target = inputs(options)
    sys.stdout.write(
        f"batch {options.batch_size}, {options.num_classes} classes, {options.size[0]}x"
        f"{options.size[1]}, {options.device}, {options.threads} threads, "
        f"torch {torch.__version__}\n"
    )
    for name, (banded, plain) in PAIRS.items():
        times: dict[Function, list[float]] = {banded: [], plain: []}
        for round_ in tqdm(range(options.rounds + 1), name, leave=False):
            for function, measured in times.items():
                duration = seconds(function, logits, target)
                if round_:  # the first round warms up
                    measured.append(duration)
        memory = {function: peak_memory(function, options) for function in times}
        ratio = statistics.median(b / a for a, b in zip(times[banded], times[plain]))
        for what, function in (("in bands", banded), ("whole", plain)):
            sys.stdout.write(
                f"  {name:18s} {what:10s} {1e3 * statistics.median(times[function]):8.1f} ms "
                f"({1e3 * min(times[function]):.1f} to {1e3 * max(times[function]):.1f}), peak "
                f"{memory[function]:7.1f} MB\n"
            )
        sys.stdout.write(
            f"  {name:18s} bands are {ratio:.2f} x as fast and take "
            f"1/{memory[plain] / max(memory[banded], 0.1):.1f} of the memory\n"
        )


if __name__ == "__main__":
    main()
