"""Time the receptive fields of stage 1 to 4 and the head against separate passes.

    python experiments/benchmarks/erf.py [--model segformer_b0] [--size H W] [--images N]
                                         [--batch-size N] [--rounds N] [--threads N]

Compares three routes in turn, in one process, on the same images: the project's measurement, and
two plain ones that make five separate forward and backward passes, one for each layer, one image at
a time. `grad` asks autograd for the gradient of the image alone, as RepLKNet's script does;
`backward` calls `backward()`, which also fills the gradients of all parameters. The script checks
that all three give the same maps. It prints medians over the rounds of wall and CPU time, and the
peak memory of the process.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from segformer_pl import models
from segformer_pl.analysis.erf import effective_receptive_field

LAYERS = ("stage1", "stage2", "stage3", "stage4", "head")
Maps = dict[str, Tensor]


def separate(network: torch.nn.Module, images: Tensor, fill_parameters: bool) -> Maps:
    """Run five forward and five backward passes for each image."""
    maps = {layer: torch.zeros(images.shape[2:]) for layer in LAYERS}
    for image in images:
        for layer in LAYERS:
            inputs = image[None].clone().requires_grad_()
            feature = network.feature_maps(inputs)[layer]
            unit = feature[0, :, feature.shape[2] // 2, feature.shape[3] // 2].relu().sum()
            if fill_parameters:
                unit.backward()
                gradient = inputs.grad
                network.zero_grad()
            else:
                (gradient,) = torch.autograd.grad(unit, inputs)
            maps[layer] += gradient[0].abs().sum(0) / len(images)
    return maps


def backward_alone(network: torch.nn.Module, images: Tensor) -> float:
    """Return the CPU seconds of the five backward passes of `grad`, without the forward passes."""
    seconds = 0.0
    for image in images:
        inputs = image[None].clone().requires_grad_()
        for feature in network.feature_maps(inputs).values():
            unit = feature[0, :, feature.shape[2] // 2, feature.shape[3] // 2].relu().sum()
            start = time.process_time()
            torch.autograd.grad(unit, inputs, retain_graph=True)
            seconds += time.process_time() - start
    return seconds


def project(network: torch.nn.Module, images: Tensor, batch_size: int) -> Maps:
    erf = effective_receptive_field(network, images, batch_size=batch_size)
    return {layer: torch.from_numpy(erf[layer].mean).float() for layer in LAYERS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="segformer_b0")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    network = getattr(models, options.model)(num_classes=19).eval()
    images = torch.randn(options.images, 3, *options.size)
    ways: dict[str, Callable[[Tensor], Maps]] = {
        "project": lambda x: project(network, x, options.batch_size),
        "grad": lambda x: separate(network, x, fill_parameters=False),
        "backward": lambda x: separate(network, x, fill_parameters=True),
    }
    expected = {name: way(images[:1]) for name, way in ways.items()}  # warms up, too
    for name, maps in expected.items():
        for layer in LAYERS:
            scale = expected["grad"][layer].max().item()
            torch.testing.assert_close(
                maps[layer], expected["grad"][layer], rtol=1e-3, atol=1e-4 * scale, msg=name
            )
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    memory = {}
    for _ in tqdm(range(options.rounds), unit="round"):
        for name, way in ways.items():
            start = time.perf_counter(), time.process_time()
            way(images)
            wall[name].append(time.perf_counter() - start[0])
            cpu[name].append(time.process_time() - start[1])
            memory.setdefault(name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    alone = [backward_alone(network, images) for _ in range(options.rounds)]
    sys.stdout.write(
        f"{options.model}, {options.images} images of {options.size[0]}x{options.size[1]}, "
        f"batches of {options.batch_size}, {options.threads} threads, torch {torch.__version__}; "
        f"medians of {options.rounds} rounds\n"
        f"{'':<10}{'wall, s':>10}{'CPU, s':>10}{'x project':>11}{'x, CPU':>9}{'so far, GB':>12}\n"
    )
    median = {name: statistics.median(values) for name, values in wall.items()}
    median_cpu = {name: statistics.median(values) for name, values in cpu.items()}
    for name in ways:
        sys.stdout.write(
            f"{name:<10}{median[name]:>10.2f}{median_cpu[name]:>10.2f}"
            f"{median[name] / median['project']:>11.2f}"
            f"{median_cpu[name] / median_cpu['project']:>9.2f}{memory[name]:>12.2f}\n"
        )
    sys.stdout.write(
        "of the CPU seconds of `grad`, the five backward passes alone take "
        f"{statistics.median(alone):.2f}: sharing the forward passes can at best make it "
        f"{median_cpu['grad'] / statistics.median(alone):.2f} times as fast\n"
    )


if __name__ == "__main__":
    main()
