"""Time the ERFs of stages 1 to 4 and the head against one pass per layer.

    python experiments/benchmarks/erf.py [--model segformer_b0] [--size H W] [--images N]
                                         [--batch_size N] [--rounds N] [--threads N]
                                         [--device cpu|cuda]

Three implementations run on the same images, interleaved in one process: segformer_pl's, and two
plain ones with five separate forward and backward passes, one for each layer, image by image.
`grad` asks autograd for the gradient of the image alone, as RepLKNet's script does; `backward`
calls `backward()`, which also computes the gradients of all parameters. The script checks that all
three give the same maps, and prints medians over the rounds of wall and CPU time, and the peak
memory of the process (on a GPU, that of the CUDA allocator).
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
    """Compute the maps with five forward and five backward passes for each image."""
    maps = {layer: images.new_zeros(images.shape[2:]) for layer in LAYERS}
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
    return {layer: map_.cpu() for layer, map_ in maps.items()}  # waits for a GPU


def time_backward(network: torch.nn.Module, images: Tensor) -> float:
    """Return the CPU seconds of the five backward passes of `grad`, without forward passes."""
    seconds = 0.0
    for image in images:
        inputs = image[None].clone().requires_grad_()
        for feature in network.feature_maps(inputs).values():
            unit = feature[0, :, feature.shape[2] // 2, feature.shape[3] // 2].relu().sum()
            start = time.process_time()
            torch.autograd.grad(unit, inputs, retain_graph=True)
            seconds += time.process_time() - start
    return seconds


def measure(network: torch.nn.Module, images: Tensor, batch_size: int) -> Maps:
    erf = effective_receptive_field(network, images, batch_size=batch_size)
    return {layer: torch.from_numpy(erf[layer].mean).float() for layer in LAYERS}


def peak_memory(device: str) -> float:
    """Return the peak memory of the process so far in GiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="segformer_b0", help="factory in segformer_pl.models")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--images", type=int, default=16, help="number of random images")
    parser.add_argument("--batch_size", type=int, default=1, help="images per pass of segformer_pl")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    network = getattr(models, options.model)(num_classes=19).eval().to(options.device)
    images = torch.randn(options.images, 3, *options.size, device=options.device)
    implementations: dict[str, Callable[[Tensor], Maps]] = {
        "segformer_pl": lambda x: measure(network, x, options.batch_size),
        "grad": lambda x: separate(network, x, fill_parameters=False),
        "backward": lambda x: separate(network, x, fill_parameters=True),
    }
    # Also warms up
    expected = {name: compute(images[:1]) for name, compute in implementations.items()}
    for name, maps in expected.items():
        for layer in LAYERS:
            scale = expected["grad"][layer].max().item()
            torch.testing.assert_close(
                maps[layer], expected["grad"][layer], rtol=1e-3, atol=1e-4 * scale, msg=name
            )
    wall: dict[str, list[float]] = {name: [] for name in implementations}
    cpu: dict[str, list[float]] = {name: [] for name in implementations}
    memory = {}
    for _ in tqdm(range(options.rounds), unit="round"):
        for name, compute in implementations.items():
            start = time.perf_counter(), time.process_time()
            compute(images)
            wall[name].append(time.perf_counter() - start[0])
            cpu[name].append(time.process_time() - start[1])
            memory.setdefault(name, peak_memory(options.device))
    sys.stdout.write(
        f"{options.model}, {options.images} images of {options.size[0]}x{options.size[1]}, "
        f"{torch.cuda.get_device_name() if options.device == 'cuda' else 'CPU'}, "
        f"batches of {options.batch_size}, {options.threads} threads, torch {torch.__version__}; "
        f"medians of {options.rounds} rounds\n"
        f"{'':<14}{'wall, s':>10}{'CPU, s':>10}{'wall ratio':>12}{'CPU ratio':>11}"
        f"{'peak, GB':>10}\n"
    )
    median = {name: statistics.median(values) for name, values in wall.items()}
    median_cpu = {name: statistics.median(values) for name, values in cpu.items()}
    for name in implementations:
        sys.stdout.write(
            f"{name:<14}{median[name]:>10.2f}{median_cpu[name]:>10.2f}"
            f"{median[name] / median['segformer_pl']:>12.2f}"
            f"{median_cpu[name] / median_cpu['segformer_pl']:>11.2f}{memory[name]:>10.2f}\n"
        )
    sys.stdout.write("ratios are to segformer_pl; peak memory is that of the process so far\n")
    if options.device == "cuda":
        return
    backward = [time_backward(network, images) for _ in range(options.rounds)]
    sys.stdout.write(
        f"the five backward passes of `grad` alone take {statistics.median(backward):.2f} CPU s, "
        "so sharing forward passes can speed it up by at most "
        f"{median_cpu['grad'] / statistics.median(backward):.2f}\n"
    )


if __name__ == "__main__":
    main()
