"""What a network costs: parameters, multiply-adds, activation memory, latency.

Counts come from one forward pass on fake tensors (shapes without data), so they need neither time
nor memory at any size of picture. Latency is measured on real ones.

One MAC is one multiplication and one addition. What the paper calls "FLOPs" are MACs as its tools
count them, see :func:`paper_macs`; the MACs that are really executed are fewer, because the decode
head is folded (:mod:`segformer_pl.models.decode_head`).
"""

import math
import platform
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from segformer_pl.models import SegFormer


@dataclass(frozen=True)
class PartCost:
    """One part of a network: a stage of the encoder, or the head.

    Attributes:
        name: ``stage1`` ... ``stage4``, ``head``, or the attribute's name.
        num_parameters: Its parameters.
        output_shape: Of the last tensor it returns, batch included.
        macs: MACs executed in it.
        attention_macs: Of these, in attention: the products of queries with keys and of weights
            with values, without the projections around them.
        query_length: Tokens that ask, the most of any attention inside; None without attention.
        key_length: Keys and values that each of these meets, likewise.
    """

    name: str
    num_parameters: int
    output_shape: tuple[int, ...]
    macs: int
    attention_macs: int
    query_length: int | None
    key_length: int | None


@dataclass(frozen=True)
class Latency:
    """Wall time of one forward pass, batch of one.

    Attributes:
        median_ms, iqr_ms: Over the runs, after the warm-up.
        num_runs, num_warmup: How often it ran.
        device, dtype, num_threads: Where and how; threads of the CPU.
    """

    median_ms: float
    iqr_ms: float
    num_runs: int
    num_warmup: int
    device: str
    dtype: str
    num_threads: int


@dataclass(frozen=True)
class Complexity:
    """What :func:`complexity` counted, for one picture.

    Attributes:
        image_shape: (C, H, W).
        num_classes: Channels of the logits.
        num_parameters: All; ``encoder_parameters`` and ``head_parameters`` (everything outside the
            encoder) make it up.
        macs: MACs executed in a forward pass.
        paper_macs: What the paper's "FLOPs" column counts; None for other networks than SegFormer.
        activation_bytes: Memory of the tensors that a forward pass in training mode keeps for the
            backward pass, in the parameters' dtype, parameters not counted.
        parts: The costs part by part, in order.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    num_parameters: int
    encoder_parameters: int
    head_parameters: int
    macs: int
    paper_macs: int | None
    activation_bytes: int
    parts: tuple[PartCost, ...]


def complexity(network: Any, height: int, width: int, in_channels: int = 3) -> Complexity:
    """Count what one picture costs in a segmenter.

    Args:
        network: A segmenter: ``encoder`` attribute, ``forward(images) -> logits``. Left as it is.
        height, width: Of the picture, in pixels.
        in_channels: Of the picture.

    Raises:
        ValueError: the network refuses pictures of this size.
    """
    parts = dict(_parts(network))
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:
        state: dict[str, Tensor] = {
            name: fake.from_tensor(tensor)
            for name, tensor in (*network.named_parameters(), *network.named_buffers())
        }
        dtype = next(network.parameters()).dtype
        images = torch.zeros(1, in_channels, height, width, dtype=dtype)
        # Matrix-vector products are the one kind that torch's counter leaves out.
        flops = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: _mv_flops})
        lengths = _AttentionLengths()
        shapes: dict[str, tuple[int, ...]] = {}
        measured = _evaluating(network), _observed(parts, lengths, shapes), lengths, flops
        with ExitStack() as stack, torch.no_grad():
            for context in measured:
                stack.enter_context(context)
            logits = functional_call(network, state, (images,))
        kept = _KeptForBackward(state.values())
        with _evaluating(network, False), kept:
            functional_call(network, state, (images,))
    counts = flops.get_flop_counts()
    root = type(network).__name__
    costs = tuple(
        PartCost(
            name,
            num_parameters=_num_parameters(module),
            output_shape=shapes[name],
            macs=_macs(counts, f"{root}.{path}"),
            attention_macs=lengths.macs[name],
            query_length=lengths.longest.get(name, (None, None))[0],
            key_length=lengths.longest.get(name, (None, None))[1],
        )
        for name, (path, module) in parts.items()
    )
    encoder_parameters = _num_parameters(network.encoder)
    return Complexity(
        image_shape=(in_channels, height, width),
        num_classes=logits.shape[1],
        num_parameters=_num_parameters(network),
        encoder_parameters=encoder_parameters,
        head_parameters=_num_parameters(network) - encoder_parameters,
        macs=flops.get_total_flops() // 2,
        paper_macs=paper_macs(network, height, width) if isinstance(network, SegFormer) else None,
        activation_bytes=kept.num_bytes,
        parts=costs,
    )


def paper_macs(network: SegFormer, height: int, width: int) -> int:
    """The paper's "FLOPs" (Tables 1 and 2), which are multiply-adds counted by its own recipe.

    Counted are: convolutions with their bias additions, Linear layers without, the elements that
    go through ReLU, and 2 N (N / R) C in every attention for N tokens, R = sr_ratio squared. Not
    counted: norms, GELU, softmax, interpolation. The head is the one that the paper describes:
    projections at each stage's resolution, a fuse convolution of 4C to C channels at stride 4.

    With 150 classes this gives every FLOPs value of Table 1a: 512x512 for ADE20K (640x640 for B5)
    and COCO-Stuff, 1024x2048 for Cityscapes. The recipe is that of the reference code's
    ``tools/get_flops.py`` with mmcv's counter.
    """
    encoder, head = cast(Any, network.encoder), cast(Any, network.head)
    total = 0.0
    sizes: list[tuple[int, int]] = []
    grid = (height, width)
    for stage in encoder.stages:
        convolution = stage.patch_embed.proj
        grid = _output_size(convolution, grid)
        sizes.append(grid)
        num_tokens = math.prod(grid)
        total += _convolution(convolution, num_tokens)
        for block in stage.blocks:
            attention, mlp = block.attn, block.mlp
            num_keys = num_tokens / attention.sr_ratio**2
            if attention.sr_ratio > 1:
                total += _convolution(attention.sr, math.prod(_output_size(attention.sr, grid)))
            total += attention.q.weight.numel() * num_tokens
            total += attention.kv.weight.numel() * num_keys
            total += 2 * num_tokens * num_keys * attention.proj.out_features
            total += attention.proj.weight.numel() * num_tokens
            total += (mlp.fc1.weight.numel() + mlp.fc2.weight.numel()) * num_tokens
            if isinstance(mlp.dwconv, nn.Conv2d):
                total += _convolution(mlp.dwconv, num_tokens)
    fused = math.prod(sizes[0])
    for index, projection in zip(head.in_indices, head.projections):
        total += projection.weight.numel() * math.prod(sizes[index])
    if head.fuse is not None:
        total += _convolution(head.fuse, fused)
    total += head.bn.num_features * fused  # ReLU
    total += _convolution(head.classifier, fused)
    return round(total)


def measure_latency(
    network: nn.Module,
    height: int,
    width: int,
    in_channels: int = 3,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    min_seconds: float = 3.0,
) -> Latency:
    """Time forward passes of one picture in evaluation mode, without gradients, eagerly.

    Args:
        network: Moved to ``device`` and ``dtype``.
        height, width, in_channels: Of the picture.
        device: ``cpu`` or ``cuda``.
        dtype: Of weights and picture.
        min_seconds: Runs go on for so long, at least one.
    """
    network = network.to(device, dtype).eval()
    images = torch.randn(1, in_channels, height, width, device=device, dtype=dtype)
    num_warmup = 3
    with torch.inference_mode():
        for _ in range(num_warmup):
            network(images)
        timer = Timer(
            "network(images)",
            globals={"network": network, "images": images},
            num_threads=torch.get_num_threads(),
        )
        measured = timer.blocked_autorange(min_run_time=min_seconds)
    return Latency(
        median_ms=1e3 * measured.median,
        iqr_ms=1e3 * measured.iqr,
        num_runs=len(measured.times) * measured.number_per_run,
        num_warmup=num_warmup,
        device=_device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
    )


def as_dict(cost: Complexity, latency: Latency) -> dict[str, Any]:
    """Everything as plain data, with the counts also in the units of the paper's tables."""
    in_units = {
        "parameters_m": round(cost.num_parameters / 1e6, 1),
        "gmacs": round(cost.macs / 1e9, 1),
        "paper_gflops": None if cost.paper_macs is None else round(cost.paper_macs / 1e9, 1),
        "activation_mb": round(cost.activation_bytes / 1e6, 1),
    }
    return asdict(cost) | in_units | {"latency": asdict(latency)}


def table(name: str, cost: Complexity, latency: Latency) -> str:
    """Everything for people, in lines of at most 100 characters."""
    _, height, width = cost.image_shape
    lines = [
        f"{name}, one picture of {height}x{width} pixels, {cost.num_classes} classes",
        "",
        f"parameters    {cost.num_parameters / 1e6:10.2f} M   encoder "
        f"{cost.encoder_parameters / 1e6:.2f} M, head {cost.head_parameters / 1e6:.2f} M",
        f"executed      {cost.macs / 1e9:10.2f} G   multiply-adds",
    ]
    if cost.paper_macs is not None:
        lines.append(
            f"paper's FLOPs {cost.paper_macs / 1e9:10.2f} G   multiply-adds by the paper's recipe, "
            "head not folded"
        )
    lines += [
        f"activations   {cost.activation_bytes / 1e6:10.1f} MB  kept for the backward pass",
        f"latency       {latency.median_ms:10.1f} ms  median of {latency.num_runs} (IQR "
        f"{latency.iqr_ms:.1f}) after {latency.num_warmup} for warm-up,",
        f"{'':28}{latency.device}, {latency.dtype}, {latency.num_threads} threads, eager",
        "",
        f"{'part':<10}{'output':>18}{'parameters':>12}{'GMACs':>9}{'share':>8}"
        f"{'attention':>11}{'queries':>9}{'keys':>7}",
    ]
    for part in cost.parts:
        attention = f"{part.attention_macs / part.macs:.0%}" if part.query_length else "-"
        lines.append(
            f"{part.name:<10}{'x'.join(map(str, part.output_shape[1:])):>18}"
            f"{part.num_parameters:>12,}{part.macs / 1e9:>9.2f}{part.macs / cost.macs:>8.0%}"
            f"{attention:>11}{part.query_length or '-':>9}{part.key_length or '-':>7}"
        )
    lines += [
        "",
        "attention: share of a part's multiply-adds in QK^T and AV; queries and keys: tokens of",
        "its largest attention. Norms, softmax, GELU and interpolation are not multiply-adds.",
    ]
    return "\n".join(lines)


def _parts(network: Any) -> Iterator[tuple[str, tuple[str, nn.Module]]]:
    """Name in the table -> path and module: the encoder's stages, if it has any, and the rest."""
    for path, child in network.named_children():
        stages = getattr(child, "stages", None)
        if child is network.encoder and isinstance(stages, nn.ModuleList):
            for s, stage in enumerate(stages):
                yield f"stage{s + 1}", (f"{path}.stages.{s}", stage)
        else:
            yield path, (path, child)


def _mv_flops(matrix: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


def _macs(counts: dict[str, dict[Any, int]], path: str) -> int:
    return sum(counts.get(path, {}).values()) // 2


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _output_size(convolution: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    kernel, stride, padding = (
        convolution.kernel_size[0],
        convolution.stride[0],
        int(convolution.padding[0]),
    )
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in size)
    return height, width


def _convolution(convolution: nn.Conv2d, num_outputs: int) -> int:
    bias = 0 if convolution.bias is None else convolution.out_channels
    return (convolution.weight.numel() + bias) * num_outputs


class _AttentionLengths(TorchFunctionMode):
    """Notes every scaled dot-product attention, under the part of the network that it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.macs: dict[str, int] = defaultdict(int)
        self.longest: dict[str, tuple[int, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            length = (query.shape[-2], key.shape[-2])
            products = query.shape[:-2].numel() * math.prod(length)
            self.macs[self.part] += products * (query.shape[-1] + value.shape[-1])
            self.longest[self.part] = max(length, self.longest.get(self.part, (0, 0)))
        return func(*args, **(kwargs or {}))


class _KeptForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Adds up the memory of the tensors that autograd keeps, each storage once."""

    def __init__(self, state: Any) -> None:
        self.not_counted = {tensor.untyped_storage()._cdata for tensor in state}
        self.storages: dict[int, Tensor] = {}
        super().__init__(self.note, lambda tensor: tensor)

    def note(self, tensor: Tensor) -> Tensor:
        self.storages[tensor.untyped_storage()._cdata] = tensor  # held, so that no id is reused
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(
            tensor.untyped_storage().nbytes()
            for storage, tensor in self.storages.items()
            if storage not in self.not_counted
        )


@contextmanager
def _observed(
    parts: dict[str, tuple[str, nn.Module]],
    lengths: _AttentionLengths,
    shapes: dict[str, tuple[int, ...]],
) -> Iterator[None]:
    handles = []
    for name, (_, module) in parts.items():

        def enter(module: nn.Module, inputs: Any, name: str = name) -> None:
            lengths.part = name

        def leave(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            last = output if isinstance(output, Tensor) else list(output)[-1]
            shapes[name] = tuple(last.shape)

        handles += [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(network: nn.Module, evaluating: bool = True) -> Iterator[None]:
    """The mode of every module, set and put back."""
    modes = {module: module.training for module in network.modules()}
    network.train(not evaluating)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.processor() or platform.machine()})"
