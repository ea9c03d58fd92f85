"""Cost of a network: parameters, multiply-adds, activation memory, latency.

Counts come from forward passes on fake tensors (shapes without data), so they take little time and
memory at any image size. Latency is measured on real tensors.

One MAC is one multiplication and one addition. "FLOPs" in papers are MACs as counted by their
tools, see :meth:`segformer_pl.models.SegFormer.paper_macs`. SegFormer executes fewer MACs than
that, because its decode head is folded (:mod:`segformer_pl.models.decode_head`).
"""

import math
import platform
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from segformer_pl.errors import UserError
from segformer_pl.models.forward_check import check_class_maps, class_maps_of
from segformer_pl.models.segmenter import Segmenter

NUM_TRAINED = 2  # images in the batch whose tensors for the backward pass are counted
NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)


@dataclass(frozen=True)
class PartCost:
    """Cost of one part of a network, such as a stage of the encoder or the head.

    Attributes:
        name: Name of the part in the network's ``parts()``.
        num_parameters: Number of parameters.
        output_shape: Shape of the last tensor that the part returns, batch included; None if a
            forward pass in evaluation mode does not use the part.
        macs: MACs executed in the part.
        attention_macs: MACs of the matrix products QK^T and AV among them, without projections.
        query_length: Number of queries of the largest attention inside; None without attention.
        key_length: Number of keys of the largest attention inside; None without attention.
        activation_bytes: Memory of the tensors that the part saves for the backward pass in
            training mode, for each image of a batch of two. A tensor that several parts save, such
            as a feature map that the next stage and the head read, counts in the first of them.
    """

    name: str
    num_parameters: int
    output_shape: tuple[int, ...] | None
    macs: int
    attention_macs: int
    query_length: int | None
    key_length: int | None
    activation_bytes: int


@dataclass(frozen=True)
class Latency:
    """Wall time of one forward pass at batch size 1.

    Attributes:
        median_ms: Median over the forward passes in milliseconds.
        iqr_ms: Interquartile range over the forward passes in milliseconds.
        num_runs: Number of timed forward passes.
        num_warmup: Number of forward passes before them.
        device: Name of the device.
        dtype: Data type of weights and image.
        num_threads: Number of CPU threads.
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
    """Cost of a network for one image, see :func:`complexity`.

    Attributes:
        image_shape: (C, H, W).
        num_classes: Number of channels of the logits.
        num_parameters: Number of all parameters.
        encoder_parameters: Number of the encoder's parameters.
        head_parameters: Number of all other parameters.
        macs: MACs executed in a forward pass.
        paper_macs: "FLOPs" as counted by the network's paper; None if there is no paper.
        activation_bytes: Memory of the tensors that a forward pass in training mode saves for the
            backward pass, in the dtype of the parameters, without the parameters themselves, for
            each image of a batch of two. It is the sum over the parts, and what is saved outside
            of them.
        parts: Costs of the parts, in order.
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


def complexity(network: Segmenter, height: int, width: int) -> Complexity:
    """Count the cost of one image in a segmenter.

    Args:
        network: Segmenter; its state and mode do not change.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Raises:
        UserError: The network refuses images of this size, fails on them, breaks the contract, or
            cannot run on tensors without values.
    """
    parts = {name: (path, network.get_submodule(path)) for name, path in network.parts().items()}
    with _on_fake_tensors(network, height, width) as state:
        images = _one_image(network, height, width)
        # torch's counter leaves out matrix-vector products.
        flops = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: _mv_flops})
        lengths = _AttentionLengths()
        shapes: dict[str, tuple[int, ...]] = {}
        contexts = (
            _evaluating(network),
            _marked(parts, lengths),
            _observed(parts, shapes),
            lengths,
            flops,
        )
        # Without gradients, layers that work in bands compute some rows twice.
        with ExitStack() as stack, torch.enable_grad():
            for context in contexts:
                stack.enter_context(context)
            logits = functional_call(network, state, (images,))
        check_class_maps(network, logits, images)
        saved = _SavedForBackward(state.values())
        # On one image, a BatchNorm after image pooling (DeepLabv3+) could not train: it would have
        # one value for each channel.
        with _evaluating(network, False), _marked(parts, saved), saved:
            functional_call(network, state, (images.repeat(NUM_TRAINED, 1, 1, 1),))
    counts = flops.get_flop_counts()
    root = type(network).__name__
    costs = tuple(
        PartCost(
            name,
            num_parameters=_num_parameters(module),
            output_shape=shapes.get(name),
            macs=_macs(counts, f"{root}.{path}"),
            attention_macs=lengths.macs[name],
            query_length=lengths.longest.get(name, (None, None))[0],
            key_length=lengths.longest.get(name, (None, None))[1],
            activation_bytes=saved.num_bytes_of(name),
        )
        for name, (path, module) in parts.items()
    )
    encoder = network.encoder_parameters()
    encoder_parameters = sum(
        parameter.numel() for name, parameter in network.named_parameters() if name in encoder
    )
    return Complexity(
        image_shape=(network.in_channels, height, width),
        num_classes=logits.shape[1],
        num_parameters=_num_parameters(network),
        encoder_parameters=encoder_parameters,
        head_parameters=_num_parameters(network) - encoder_parameters,
        macs=flops.get_total_flops() // 2,
        paper_macs=network.paper_macs(height, width),
        activation_bytes=saved.num_bytes,
        parts=costs,
    )


def executed_macs(network: Segmenter, height: int, width: int) -> int:
    """Count the MACs alone, in a third of the time that :func:`complexity` takes.

    Args:
        network: Segmenter; its state and mode do not change.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Raises:
        UserError: As for :func:`complexity`.
    """
    with _on_fake_tensors(network, height, width) as state:
        images = _one_image(network, height, width)
        flops = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: _mv_flops})
        with _evaluating(network), flops, torch.enable_grad():  # as in complexity
            check_class_maps(network, functional_call(network, state, (images,)), images)
    return flops.get_total_flops() // 2


@contextmanager
def _on_fake_tensors(network: Segmenter, height: int, width: int) -> Iterator[dict[str, Tensor]]:
    """Yield parameters and buffers of a network as fake tensors, and restore its attributes.

    A network that caches a tensor in its forward pass would keep a fake one otherwise.

    Raises:
        UserError: The network fails on a real image, or needs values.
    """
    attributes = {module: dict(vars(module)) for module in network.modules()}
    tensors = (*network.named_parameters(), *network.named_buffers())
    try:
        with FakeTensorMode(allow_non_fake_inputs=False) as fake:
            yield {name: fake.from_tensor(tensor) for name, tensor in tensors}
    except UserError:
        raise
    except Exception as error:  # any type: the forward pass may be the user's
        _restore(attributes)
        with _evaluating(network), torch.no_grad():
            class_maps_of(network, _one_image(network, height, width))
        if not isinstance(error, NEEDS_VALUES):
            raise
        raise UserError(
            f"the cost of {type(network).__name__} cannot be counted, because it is counted on "
            "tensors without values, and its forward pass depends on values "
            f"({type(error).__name__}); let it depend on shapes alone"
        ) from error
    finally:
        _restore(attributes)


def _restore(attributes: dict[nn.Module, dict[str, Any]]) -> None:
    for module, before in attributes.items():
        vars(module).clear()
        vars(module).update(before)


def _one_image(network: Segmenter, height: int, width: int) -> Tensor:
    like = next(network.parameters())
    shape = (1, network.in_channels, height, width)
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def measure_latency(
    network: Segmenter,
    height: int,
    width: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    min_seconds: float = 3.0,
) -> Latency:
    """Time forward passes of one image in evaluation mode, without gradients, in eager mode.

    Args:
        network: Segmenter; it is moved to ``device`` and ``dtype``.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        device: ``cpu`` or ``cuda``.
        dtype: Data type of weights and image.
        min_seconds: Minimum duration of the measurement in seconds.
    """
    # It loads torch's compiler of extensions, which warns about a CUDA that no device can use.
    from torch.utils.benchmark import Timer

    network = network.to(device, dtype).eval()
    images = torch.randn(1, network.in_channels, height, width, device=device, dtype=dtype)
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
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
    )


def as_dict(cost: Complexity, latency: Latency) -> dict[str, Any]:
    """Return all fields as plain data, with counts also in the units of the paper's tables."""
    in_units = {
        "parameters_m": round(cost.num_parameters / 1e6, 1),
        "gmacs": round(cost.macs / 1e9, 1),
        "paper_gflops": None if cost.paper_macs is None else round(cost.paper_macs / 1e9, 1),
        "activation_mb": round(cost.activation_bytes / 1e6, 1),
    }
    return asdict(cost) | in_units | {"latency": asdict(latency)}


def table(name: str, cost: Complexity, latency: Latency) -> str:
    """Return a table as text, in lines of at most 100 characters."""
    _, height, width = cost.image_shape
    lines = [
        f"{name}, one image of {height}x{width} pixels, {cost.num_classes} classes",
        "",
        f"parameters    {cost.num_parameters / 1e6:10.2f} M   encoder "
        f"{cost.encoder_parameters / 1e6:.2f} M, head {cost.head_parameters / 1e6:.2f} M",
        f"executed      {cost.macs / 1e9:10.2f} G   multiply-adds",
    ]
    if cost.paper_macs is not None:
        lines.append(
            f"paper's FLOPs {cost.paper_macs / 1e9:10.2f} G   multiply-adds by the paper's "
            "counting rules"
        )
    lines += [
        f"activations   {cost.activation_bytes / 1e6:10.1f} MB  kept for the backward pass",
        f"latency       {latency.median_ms:10.1f} ms  median of {latency.num_runs} (IQR "
        f"{latency.iqr_ms:.1f}) after {latency.num_warmup} warm-up passes,",
        f"{'':28}{latency.device}, {latency.dtype}, {latency.num_threads} threads, eager",
        "",
        f"{'part':<10}{'output':>18}{'parameters':>12}{'GMACs':>9}{'share':>8}"
        f"{'saved MB':>10}{'attention':>11}{'queries':>9}{'keys':>7}",
    ]
    for part in cost.parts:
        attention = f"{part.attention_macs / part.macs:.0%}" if part.query_length else "-"
        shape = "x".join(map(str, part.output_shape[1:])) if part.output_shape else "-"
        lines.append(
            f"{part.name:<10}{shape:>18}"
            f"{part.num_parameters:>12,}{part.macs / 1e9:>9.2f}{part.macs / cost.macs:>8.0%}"
            f"{part.activation_bytes / 1e6:>10.1f}"
            f"{attention:>11}{part.query_length or '-':>9}{part.key_length or '-':>7}"
        )
    lines += [
        "",
        "saved: kept for the backward pass; attention: share of QK^T and AV in the part's",
        "multiply-adds; queries, keys: number of tokens in its largest attention. Norms, softmax,",
        "GELU and interpolation are not counted.",
    ]
    return "\n".join(lines)


def _mv_flops(matrix: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


def _macs(counts: dict[str, dict[Any, int]], path: str) -> int:
    return sum(counts.get(path, {}).values()) // 2


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _AttentionLengths(TorchFunctionMode):
    """Record MACs and lengths of every attention, by part of the network.

    Attention is ``scaled_dot_product_attention`` and ``nn.MultiheadAttention``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.macs: dict[str, int] = defaultdict(int)
        self.longest: dict[str, tuple[int, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            batch, length = query.shape[:-2].numel(), (query.shape[-2], key.shape[-2])
            self._record(batch, length, query.shape[-1] + value.shape[-1])
        elif func is F.multi_head_attention_forward:  # inside of it, this mode is not active
            query, key = args[:2]  # (N, B, C)
            self._record(query.shape[1], (len(query), len(key)), 2 * query.shape[2])
        return func(*args, **(kwargs or {}))

    def _record(self, batch: int, length: tuple[int, int], num_channels: int) -> None:
        self.macs[self.part] += batch * math.prod(length) * num_channels
        self.longest[self.part] = max(length, self.longest.get(self.part, (0, 0)))


class _SavedForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Sum the memory of the tensors that autograd saves, counting each storage once.

    A storage belongs to the part of the network that saves it first. The sums are those of one
    image, the batch's divided by its size.
    """

    def __init__(self, state: Any) -> None:
        self.not_counted = {tensor.untyped_storage()._cdata for tensor in state}
        self.part = ""
        self.storages: dict[int, tuple[Tensor, str]] = {}
        super().__init__(self.record, lambda tensor: tensor)

    def record(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in self.not_counted:
            # Keep the tensor, so that no id is reused.
            self.storages.setdefault(storage, (tensor, self.part))
        return tensor

    @property
    def num_bytes(self) -> int:
        sizes = [tensor.untyped_storage().nbytes() for tensor, _ in self.storages.values()]
        return sum(sizes) // NUM_TRAINED

    def num_bytes_of(self, part: str) -> int:
        sizes = [t.untyped_storage().nbytes() for t, p in self.storages.values() if p == part]
        return sum(sizes) // NUM_TRAINED


@contextmanager
def _marked(
    parts: dict[str, tuple[str, nn.Module]], recorder: _AttentionLengths | _SavedForBackward
) -> Iterator[None]:
    """Set ``recorder.part`` to the name of the part that is running, and to "" outside of all."""
    handles = []
    for name, (_, module) in parts.items():

        def enter(module: nn.Module, inputs: Any, name: str = name) -> None:
            recorder.part = name

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            recorder.part = ""

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
def _observed(
    parts: dict[str, tuple[str, nn.Module]], shapes: dict[str, tuple[int, ...]]
) -> Iterator[None]:
    """Record the shape of the last tensor that every part returns."""
    handles = []
    for name, (_, module) in parts.items():

        def leave(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            last = output if isinstance(output, Tensor) else list(output)[-1]
            shapes[name] = tuple(last.shape)

        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(network: nn.Module, evaluating: bool = True) -> Iterator[None]:
    """Set evaluation (or training) mode, and restore the mode of every module afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.train(not evaluating)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def device_name(device: str) -> str:
    """Return the name of a device for a report."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.processor() or platform.machine()})"
