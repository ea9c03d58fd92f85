"""Compare the time of every part of SegFormer with what the machine could do.

    python experiments/benchmarks/roofline.py [--model segformer_b0] [--size 512 512]
        [--num_classes 150] [--dtype float32|bfloat16] [--threads N] [--rounds N]

Question: where does a forward pass lose time? A part cannot be faster than its operations at the
speed of a large matrix product, nor than reading its input and parameters and writing its output
once at the speed of a large copy; both speeds are measured first. The larger of the two is its
floor. A part far above its floor either moves data that it could keep in the cache, or computes
with small or slow operations. Hardware: CPU, otherwise idle; half a minute.

Parts are the kinds of module in each stage, summed over its blocks, and the decode head. Residual
connections belong to no part: "other" has them. A number is the median over the rounds.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from segformer_pl.commands.networks import find_segmenter
from segformer_pl.models import SegFormer

KINDS = ("norm1", "attn", "norm2", "mlp")  # of a block
COPY_ELEMENTS = 1 << 26
MATRIX_SIDE = 2048


def parts(network: SegFormer) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name of a part and one of its modules."""
    for number, stage in enumerate(network.encoder.stages, start=1):
        yield f"stage{number} patch_embed", stage.patch_embed
        for block in stage.blocks:
            for kind in KINDS:
                yield f"stage{number} {kind}", block.get_submodule(kind)
        yield f"stage{number} norm", stage.norm
    yield "head", network.head


def fastest(call: Callable[[], object], repeats: int = 7) -> float:
    """Return the shortest time of a call in seconds: the machine's speed without other work."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def machine_speed(dtype: torch.dtype) -> tuple[float, float]:
    """Return the floating-point operations and the bytes that the machine manages in a second."""
    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE).to(dtype)
    source = torch.zeros(COPY_ELEMENTS)
    target = torch.empty_like(source)
    operations = 2 * MATRIX_SIDE**3 / fastest(lambda: matrix @ matrix)
    num_bytes = 2 * source.nbytes / fastest(lambda: target.copy_(source))
    return operations, num_bytes


class PartMeter:
    """Time, operations and compulsory bytes of the parts of a network.

    Attributes:
        seconds: Seconds of each part, one number for each forward pass.
        operations: Floating-point operations of each part.
        num_bytes: Bytes of the inputs, parameters and outputs of each part.
    """

    def __init__(self, network: SegFormer) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.operations: dict[str, int] = defaultdict(int)
        self.num_bytes: dict[str, int] = defaultdict(int)
        self.is_counting = True
        self._start = 0.0
        for name, module in parts(network):
            module.register_forward_pre_hook(self._before)
            module.register_forward_hook(self._after(name))

    def begin_pass(self) -> None:
        for times in self.seconds.values():
            times.append(0.0)

    def _before(self, module: nn.Module, inputs: object) -> None:
        self._start = time.perf_counter()

    def _after(self, name: str) -> Callable[[nn.Module, tuple[object, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
            seconds = time.perf_counter() - self._start
            if not self.is_counting:
                self.seconds[name][-1] += seconds
                return
            self.seconds[name] = []
            given = inputs[0] if isinstance(inputs[0], Sequence) else [inputs[0]]
            tensors = [*given, *module.parameters(), output]
            self.num_bytes[name] += sum(tensor.nbytes for tensor in tensors)

        return hook


def count(network: SegFormer, images: Tensor, meter: PartMeter) -> None:
    """Count the operations and the bytes of every part."""
    names = {id(module): name for name, module in parts(network)}
    paths = {path: names[id(m)] for path, m in network.named_modules() if id(m) in names}
    with FlopCounterMode(display=False, depth=None) as counter:
        network(images)
    for path, kinds in counter.get_flop_counts().items():
        name = paths.get(path.removeprefix(f"{type(network).__name__}."))
        if name is not None:
            meter.operations[name] += sum(kinds.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="segformer_b0", help="name of a SegFormer")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--num_classes", type=int, default=150)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    network = find_segmenter(options.model)(num_classes=options.num_classes).to(dtype).eval()
    images = torch.randn(1, 3, *options.size).to(dtype)
    operations, num_bytes = machine_speed(dtype)
    sys.stdout.write(
        f"{options.model}, {options.dtype}, {options.size[0]}x{options.size[1]}, "
        f"{options.threads} threads, torch {torch.__version__}: matrix product "
        f"{operations / 1e9:.0f} GFLOP/s, copy {num_bytes / 1e9:.1f} GB/s\n\n"
        f"{'part':20s} {'ms':>8} {'share':>6} {'MFLOP':>8} {'MB':>7} {'floor ms':>9} "
        f"{'bound by':>10} {'ms/floor':>9}\n"
    )
    meter = PartMeter(network)
    passes = []
    with torch.inference_mode():
        count(network, images, meter)
        meter.is_counting = False
        for number in range(options.rounds + 2):
            meter.begin_pass()
            start = time.perf_counter()
            network(images)
            if number < 2:  # warm-up
                meter.seconds = defaultdict(list, {name: [] for name in meter.seconds})
            else:
                passes.append(time.perf_counter() - start)
    total = statistics.median(passes)
    rows = {name: statistics.median(times) for name, times in meter.seconds.items()}
    sum_of_floors = 0.0
    for name, seconds in rows.items():
        compute = meter.operations[name] / operations
        memory = meter.num_bytes[name] / num_bytes
        floor = max(compute, memory)
        sum_of_floors += floor
        sys.stdout.write(
            f"{name:20s} {1e3 * seconds:8.2f} {seconds / total:6.1%} "
            f"{meter.operations[name] / 1e6:8.0f} {meter.num_bytes[name] / 1e6:7.1f} "
            f"{1e3 * floor:9.2f} {'compute' if compute >= memory else 'memory':>10} "
            f"{seconds / floor:9.1f}\n"
        )
    other = total - sum(rows.values())
    sys.stdout.write(f"{'other':20s} {1e3 * other:8.2f} {other / total:6.1%}\n")
    sys.stdout.write(
        f"{'all':20s} {1e3 * total:8.2f} {1:6.0%} {sum(meter.operations.values()) / 1e6:8.0f} "
        f"{'':7} {1e3 * sum_of_floors:9.2f} {'':>10} {total / sum_of_floors:9.1f}\n"
    )


if __name__ == "__main__":
    main()
