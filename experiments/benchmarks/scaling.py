"""Compare the predictions of `scaling` with data-parallel training on the CPU.

    python experiments/benchmarks/scaling.py [--processes 2 4] [--rounds N]

For each number of processes, the following alternate, each process with one thread; medians of the
rounds are reported:

- gloo's all-reduce by size, to which bandwidth and latency of a ring are fitted (gloo's default
  algorithm is a ring);
- the step of one process while the others wait;
- the step of all processes side by side, without communication;
- the step with DistributedDataParallel.

The first two predict the last, as the command `scaling` does. It assumes a device for each process.
Here processes share the cores, so the predictions from one process multiply its computation by
processes / cores, where that is above 1. They cannot know what processes take from each other's
caches and memory bandwidth, which those from steps side by side include. gloo also computes its
sums on the same cores, so nothing is really hidden where every core has a process: predictions
without overlap, which expose all communication, belong to that case.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from segformer_pl.analysis.scaling import Exchange, Node, Training, predict_steps
from segformer_pl.analysis.step_time import StepTimes, time_steps
from segformer_pl.commands.networks import find_segmenter
from segformer_pl.losses import CrossEntropy
from segformer_pl.optim import MOMENTUM, build_optimizer, parameter_groups

SIZES = [1 << power for power in range(10, 25, 2)]  # bytes, 1 KiB to 16 MiB
NUM_CLASSES = 150


class Loss(nn.Module):
    """A network with its training loss, which DDP can wrap."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.network = find_segmenter(model)(num_classes=NUM_CLASSES)
        self.criterion = CrossEntropy()

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        return self.network.training_loss(images, target, self.criterion, 255)

    def optimizer(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.network, 6e-5, 0.01, 10.0)
        return build_optimizer("adamw", groups, MOMENTUM, is_fused=True)


def work(rank: int, world_size: int, options: argparse.Namespace, folder: str) -> None:
    """Measure in one process; rank 0 writes the results."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    images = torch.rand(options.batch, 3, *options.size)
    target = torch.randint(NUM_CLASSES, (options.batch, *options.size))
    alone, wrapped = Loss(options.model), Loss(options.model)
    optimizers = [alone.optimizer(), wrapped.optimizer()]
    parallel = DistributedDataParallel(wrapped)

    def step() -> None:
        parallel(images, target).backward()
        optimizers[1].step()
        optimizers[1].zero_grad(set_to_none=True)

    def times() -> StepTimes:
        parameters = dict(alone.named_parameters())
        return time_steps(
            lambda: alone(images, target),
            parameters,
            optimizers[0],
            options.batch,
            "cpu",
            options.repetitions,
        )

    for _ in range(3):  # DDP assigns its buckets anew after the first step
        step()
    results: dict[str, Any] = {"single": [], "side_by_side": [], "ddp": []}
    reduced: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(options.rounds):
        for size in SIZES:
            tensor = torch.ones(size // 4)
            number = 20 if size < 1 << 20 else 3
            reduced[size].append(timed(partial(dist.all_reduce, tensor), number))
        if rank == 0:
            results["single"].append(asdict(times()))
        dist.barrier()
        every: list[Any] = [None] * world_size
        dist.all_gather_object(every, asdict(times()))
        # A step of DDP ends with that of the slowest process.
        results["side_by_side"].append(max(every, key=total))
        results["ddp"].append(timed(step, options.repetitions))
    if rank == 0:
        order = results["single"][0]["order"]
        results["exchange"] = asdict(Exchange.of(alone, order))
        results["all_reduce"] = {size: statistics.median(reduced[size]) for size in SIZES}
        Path(folder, "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def timed(call: Callable[[], object], number: int) -> float:
    """Return the seconds of one of several calls that all processes make together."""
    call()
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - begin) / number


def total(times: dict[str, Any]) -> float:
    return times["forward"] + times["backward"] + times["optimizer"]


def median_round(rounds: list[dict[str, Any]]) -> StepTimes:
    """Return the measurement whose total is the (lower) median of all rounds."""
    return StepTimes(**sorted(rounds, key=total)[(len(rounds) - 1) // 2])


def fit_ring(seconds: dict[int, float], world_size: int) -> Node:
    """Fit bandwidth and latency of a ring to times by size, by relative least squares."""
    sizes, times = np.array(list(seconds), float), np.array(list(seconds.values()))
    slope, intercept = np.polyfit(sizes, times, 1, w=1 / times)
    share, num_steps = 2 * (world_size - 1) / world_size, 2 * (world_size - 1)
    return Node(
        devices=world_size,
        link_gb_per_s=share / slope / 1e9,
        link_latency_us=max(intercept, 0.0) / num_steps * 1e6,
    )


def report(results: dict[str, Any], world_size: int, options: argparse.Namespace) -> str:
    num_cores = len(os.sched_getaffinity(0))
    all_reduce = {int(size): seconds for size, seconds in results["all_reduce"].items()}
    node = fit_ring(all_reduce, world_size)
    training = Training(options.batch * world_size, all_reduce="ring", sync_batchnorm=False)
    exchange = Exchange(**results["exchange"])
    share = 2 * (world_size - 1) / world_size
    lines = [
        f"{world_size} processes on {num_cores} cores, all-reduce of gloo, fitted ring: "
        f"{node.link_gb_per_s:.2f} GB/s, {node.link_latency_us:.0f} us a step",
        f"{'bytes':>12}{'us':>10}{'bus GB/s':>10}{'ring us':>10}",
    ]
    for size, seconds in all_reduce.items():
        fitted = share * size / node.bandwidth(world_size) + node.ring_latency(world_size, 2)
        lines.append(
            f"{size:>12}{1e6 * seconds:>10.0f}{share * size / seconds / 1e9:>10.2f}"
            f"{1e6 * fitted:>10.0f}"
        )
    measured = statistics.median(results["ddp"])
    spread = f"{1e3 * min(results['ddp']):.0f} to {1e3 * max(results['ddp']):.0f}"
    lines.append(f"step with DDP, measured: {1e3 * measured:.1f} ms ({spread}); predicted from")
    sharing = max(1.0, world_size / num_cores)
    for name, times, factor in (
        (f"one process x {sharing:g}", median_round(results["single"]), sharing),
        ("processes side by side", median_round(results["side_by_side"]), 1.0),
    ):
        times = scaled(times, factor)
        late = replace(times, ready=(times.backward,) * len(times.ready))
        for overlap, used in (("overlap", times), ("no overlap", late)):
            (row,) = predict_steps([used], exchange, training, node, [world_size])
            parts = (row.compute, row.all_reduce, row.exposed)
            compute, all_reduced, exposed = (1e3 * seconds for seconds in parts)
            lines.append(
                f"  {name:<24}{overlap:<12}{1e3 * row.step:8.1f} ms "
                f"({row.step / measured - 1:+.0%}; compute {compute:.1f}, all-reduce "
                f"{all_reduced:.1f}, exposed {exposed:.1f})"
            )
    return "\n".join(lines)


def scaled(times: StepTimes, factor: float) -> StepTimes:
    return replace(
        times,
        forward=factor * times.forward,
        backward=factor * times.backward,
        optimizer=factor * times.optimizer,
        ready=tuple(factor * at for at in times.ready),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="segformer_b0", help="as of `scaling`")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 128], help="crop in pixels")
    parser.add_argument("--batch", type=int, default=2, help="images of one process in a step")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repetitions", type=int, default=3, help="steps of each kind in a round")
    options = parser.parse_args()
    for world_size in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            spawn(work, (world_size, options, folder), nprocs=world_size)
            results = json.loads(Path(folder, "results.json").read_text())
        sys.stdout.write(report(results, world_size, options) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
