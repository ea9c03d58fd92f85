"""Step time of data-parallel training on 1 to 1024 devices, predicted from one device.

One device is measured (:mod:`segformer_pl.analysis.step_time`), the links between devices are
stated (:class:`~segformer_pl.analysis.cluster_node.Node`), and what ``DistributedDataParallel``
(DDP) does between them is computed::

    compute stream   forward |------------ backward ------------|         optimiser
    gradients of               bucket 0 ^      bucket 1 ^  bucket 2 ^
    links                               |= 0 =|         |== 1 ==|== 2 ==|
                                                                 exposed

DDP collects gradients in buckets, in the order in which the backward pass computes them, and starts
the all-reduce of a bucket as soon as its last gradient is ready and the bucket before has started
(Li et al., PyTorch Distributed: Experiences on Accelerating Data Parallel Training, VLDB 2020,
Sec. 3.2). Buckets share the links, so they follow each other. What has not ended with the backward
pass is *exposed*: the optimiser waits for it.

A ring all-reduce of S bytes between N devices takes 2 (N - 1) steps, and every device sends
2 (N - 1) / N * S bytes, which is the minimum (Patarasuk and Yuan, Bandwidth optimal all-reduce
algorithms for clusters of workstations, J. Parallel Distrib. Comput. 69, 2009)::

    time = 2 (N - 1) / N * S / bandwidth of the slowest link + latencies of 2 (N - 1) steps

This bandwidth is the *bus bandwidth* of NVIDIA's nccl-tests (doc/PERFORMANCE.md). Within a node the
slowest link is a device's; between nodes it may be the network of a whole node, because NCCL lays
one ring through each network adapter. With many nodes the latencies of a ring add up, and NCCL
changes to double binary trees (Sanders et al., Two-tree algorithms for full bandwidth broadcast,
reduction and scan, Parallel Computing 35, 2009). ``"fastest"`` takes the faster of both for every
bucket, as NCCL does by the same formulas (src/graph/tuning.cc of NCCL 2.26).

Not modelled: copies of gradients into and out of buckets, the slow-down of computation by
communication on the same device, in-network reduction (SHARP, which is faster than a ring), other
traffic in the network, and devices that wait for the slowest of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segformer_pl.analysis.cluster_node import Algorithm, Node
from segformer_pl.analysis.step_time import StepTimes, at_batch

MIB = 1 << 20
BUCKET_CAP_MB = 25  # DDP's default, in MiB
TREE_EFFICIENCY = 0.92  # of the bandwidth, in NCCL's tuning.cc


def ring_seconds(num_bytes: float, num_devices: int, node: Node) -> float:
    """Return the seconds of a ring all-reduce.

    Args:
        num_bytes: Size of the reduced tensor.
        num_devices: Number of devices that take part.
        node: Links of the devices.
    """
    share = 2 * (num_devices - 1) / num_devices
    return share * num_bytes / node.bandwidth(num_devices) + node.ring_latency(num_devices, 2)


def tree_seconds(num_bytes: float, num_devices: int, node: Node) -> float:
    """Return the seconds of an all-reduce along double binary trees over the nodes.

    Within a node the tree is a chain, as in NCCL. Arguments as for :func:`ring_seconds`.
    """
    if num_devices == 1:
        return 0.0
    num_nodes = node.num_nodes(num_devices)
    in_chain = math.ceil(num_devices / num_nodes) - 1
    depth = math.ceil(math.log2(num_nodes))
    latency = 2e-6 * (in_chain * node.link_latency_us + depth * node.network_latency_us)
    return 2 * num_bytes / (TREE_EFFICIENCY * node.bandwidth(num_devices)) + latency


def all_reduce_seconds(
    num_bytes: float, num_devices: int, node: Node, algorithm: Algorithm
) -> float:
    """Return the seconds of an all-reduce; arguments as for :func:`ring_seconds`."""
    seconds = {
        "ring": ring_seconds(num_bytes, num_devices, node),
        "tree": tree_seconds(num_bytes, num_devices, node),
    }
    return min(seconds.values()) if algorithm == "fastest" else seconds[algorithm]


def ddp_buckets(
    parameters: Sequence[Tensor], order: Sequence[int], bucket_cap_mb: float | None = None
) -> tuple[tuple[int, ...], ...]:
    """Return the buckets of DDP from its second step on, by torch's own rule.

    In the first step, all gradients are one bucket; then DDP knows their order and assigns anew.

    Args:
        parameters: Trained parameters.
        order: Indices of the parameters in the order in which their gradients are ready.
        bucket_cap_mb: DDP's argument, in MiB. Default: 25, and 1 for the first bucket.

    Returns:
        Indices of the parameters in each bucket, in the order of their all-reduces.
    """
    if bucket_cap_mb is None:
        limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, BUCKET_CAP_MB * MIB]
    else:
        limits = 2 * [int(bucket_cap_mb * MIB)]
    indices, _ = dist._compute_bucket_assignment_by_size(
        [parameters[index] for index in order], limits, [False] * len(order), list(order)
    )
    return tuple(map(tuple, indices))


def exposed_seconds(
    ready: Sequence[float], durations: Sequence[float], backward_seconds: float
) -> float:
    """Return how long the last all-reduce ends after the backward pass.

    Args:
        ready: When the last gradient of each bucket is ready, in seconds after the start of the
            backward pass.
        durations: Seconds of the all-reduce of each bucket, in the same order.
        backward_seconds: Duration of the backward pass.
    """
    end = 0.0
    for start, duration in zip(ready, durations, strict=True):
        end = max(end, start) + duration
    return max(end - backward_seconds, 0.0)


@dataclass(frozen=True)
class Exchange:
    """What the devices send each other in every step.

    Attributes:
        buckets: Indices of the parameters in each bucket, in the order of their all-reduces.
        num_values: Number of values of every parameter.
        broadcast_bytes: Bytes of the buffers of each data type. DDP broadcasts them before the
            forward pass, one data type after the other.
        batch_norm_channels: Number of channels of every BatchNorm. If synchronised, each gathers
            the 2 C + 1 statistics of all devices in the forward pass, and all-reduces 2 C sums in
            the backward pass (torch/nn/modules/_functions.py).
    """

    buckets: tuple[tuple[int, ...], ...]
    num_values: tuple[int, ...]
    broadcast_bytes: tuple[int, ...]
    batch_norm_channels: tuple[int, ...]

    @classmethod
    def of(
        cls, module: nn.Module, order: Sequence[int], bucket_cap_mb: float | None = None
    ) -> "Exchange":
        """Describe a module that DDP trains; ``order`` as for :func:`ddp_buckets`."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        by_dtype: dict[Any, int] = {}
        for buffer in module.buffers():
            by_dtype[buffer.dtype] = by_dtype.get(buffer.dtype, 0) + buffer.nbytes
        return cls(
            buckets=ddp_buckets(parameters, order, bucket_cap_mb),
            num_values=tuple(parameter.numel() for parameter in parameters),
            broadcast_bytes=tuple(by_dtype.values()),
            batch_norm_channels=tuple(
                layer.num_features for layer in module.modules() if isinstance(layer, _BatchNorm)
            ),
        )


@dataclass(frozen=True)
class Training:
    """Settings of the data-parallel training.

    Attributes:
        global_batch: Number of images of one optimiser step on all devices together.
        gradient_bytes: Bytes of a gradient value on the links: 4, or 2 with one of DDP's hooks that
            compress gradients to bf16 or fp16.
        all_reduce: Algorithm of the all-reduces of gradients.
        sync_batchnorm: Whether the statistics of BatchNorms are synchronised.
    """

    global_batch: int
    gradient_bytes: int = 4
    all_reduce: Algorithm = "fastest"
    sync_batchnorm: bool = True


@dataclass(frozen=True)
class Prediction:
    """A training step on a number of devices. Times are in seconds.

    Attributes:
        num_devices: Number of devices, N.
        num_nodes: Number of nodes.
        devices_in_node: Number of devices of a full node.
        local_batch: Images of one device in a step.
        images: Images of all devices in a step. It is the global batch where that can be divided.
        compute: Forward pass, loss, backward pass and optimiser on one device.
        all_reduce: All-reduces of the gradients, hidden or not.
        exposed: Part of ``all_reduce`` after the backward pass.
        synchronous: BatchNorm's statistics and DDP's broadcasts, which hide behind nothing.
        step: The whole step.
        images_per_second: Images that all devices train on in a second.
        efficiency: ``images_per_second`` over N times that of one device with the global batch.
        sent_bytes: Bytes that one device sends for the gradients of a step, in a ring.
        node_images_per_second: Images that the data loaders of one node have to deliver in a
            second.
    """

    num_devices: int
    num_nodes: int
    devices_in_node: int
    local_batch: int
    images: int
    compute: float
    all_reduce: float
    exposed: float
    synchronous: float
    step: float
    images_per_second: float
    efficiency: float
    sent_bytes: float
    node_images_per_second: float


def local_batch(global_batch: int, num_devices: int) -> int:
    """Return the images of one device, at least 1: strong scaling first, then weak scaling."""
    return max(global_batch // num_devices, 1)


def predict_steps(
    measured: Sequence[StepTimes],
    exchange: Exchange,
    training: Training,
    node: Node,
    device_counts: Sequence[int],
) -> list[Prediction]:
    """Predict the training step for several numbers of devices.

    Args:
        measured: Times of one device at one or more local batches.
        exchange: What the devices send each other.
        training: Settings of the training.
        node: Links of the devices.
        device_counts: Numbers of devices.
    """
    (single,) = _predict(measured, exchange, training, node, [1], math.nan)
    return list(
        _predict(measured, exchange, training, node, device_counts, single.images_per_second)
    )


def _predict(
    measured: Sequence[StepTimes],
    exchange: Exchange,
    training: Training,
    node: Node,
    device_counts: Sequence[int],
    single_images_per_second: float,
) -> Iterator[Prediction]:
    num_values = [sum(exchange.num_values[i] for i in bucket) for bucket in exchange.buckets]
    sizes = [training.gradient_bytes * number for number in num_values]
    for num_devices in device_counts:
        batch = local_batch(training.global_batch, num_devices)
        times = at_batch(measured, batch)
        ready = [max(times.ready[i] for i in bucket) for bucket in exchange.buckets]
        durations = [
            all_reduce_seconds(size, num_devices, node, training.all_reduce) for size in sizes
        ]
        exposed = exposed_seconds(ready, durations, times.backward)
        synchronous = synchronous_seconds(exchange, training, node, num_devices)
        step = times.total + exposed + synchronous
        rate = batch * num_devices / step
        in_node = min(num_devices, node.devices)
        yield Prediction(
            num_devices=num_devices,
            num_nodes=node.num_nodes(num_devices),
            devices_in_node=in_node,
            local_batch=batch,
            images=batch * num_devices,
            compute=times.total,
            all_reduce=sum(durations),
            exposed=exposed,
            synchronous=synchronous,
            step=step,
            images_per_second=rate,
            efficiency=rate / (num_devices * single_images_per_second),
            sent_bytes=2 * (num_devices - 1) / num_devices * sum(sizes),
            node_images_per_second=rate * in_node / num_devices,
        )


def synchronous_seconds(
    exchange: Exchange, training: Training, node: Node, num_devices: int
) -> float:
    """Return the seconds of a step that all devices wait for statistics and buffers.

    All-gathers and broadcasts are rings of one lap.
    """
    if num_devices == 1:
        return 0.0
    bandwidth, lap = node.bandwidth(num_devices), node.ring_latency(num_devices, 1)
    seconds = sum(size / bandwidth + lap for size in exchange.broadcast_bytes)
    if training.sync_batchnorm:
        for channels in exchange.batch_norm_channels:
            gathered = 4 * (2 * channels + 1) * (num_devices - 1)  # statistics are float32
            seconds += gathered / bandwidth + lap
            seconds += all_reduce_seconds(4 * 2 * channels, num_devices, node, training.all_reduce)
    return seconds
