"""The predictions of :mod:`segformer_pl.analysis.scaling` as text and as plain data."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from segformer_pl.analysis.scaling import Exchange, Node, Prediction, Training, local_batch
from segformer_pl.analysis.step_time import StepTimes

MAX_SHOWN_BUCKETS = 6
NOT_MODELLED = (
    "Not modelled: copies of gradients to and from buckets, computation that is slowed down by "
    "communication, in-network reduction, other traffic, devices that wait for the slowest, and "
    "data loading."
)


def assumptions(
    measured: Sequence[StepTimes],
    exchange: Exchange,
    training: Training,
    node: Node,
    device_counts: Sequence[int],
) -> list[str]:
    """Return what the predictions assume, one or two sentences each.

    Arguments as for :func:`segformer_pl.analysis.scaling.predict_steps`.
    """
    return [
        _batches(measured, training, device_counts),
        *_divisions(training, device_counts),
        _gradients(exchange, training),
        _links(node, training),
        _synchronous(exchange, training),
        NOT_MODELLED,
    ]


def _batches(
    measured: Sequence[StepTimes], training: Training, device_counts: Sequence[int]
) -> str:
    sizes = sorted(times.batch for times in measured)
    # One device with the whole global batch is what efficiencies refer to.
    needed = {local_batch(training.global_batch, number) for number in (1, *device_counts)}
    text = f"Measured local batches: {', '.join(map(str, sizes))}"
    if between := sorted(n for n in needed - set(sizes) if sizes[0] < n < sizes[-1]):
        text += f"; interpolated: {', '.join(map(str, between))}"
    if beyond := sorted(n for n in needed if not sizes[0] <= n <= sizes[-1]):
        text += f"; extrapolated: {', '.join(map(str, beyond))}"
    return f"{text}. Efficiency is relative to one device with a batch of {training.global_batch}."


def _divisions(training: Training, device_counts: Sequence[int]) -> list[str]:
    total, texts = training.global_batch, []
    strong = [number for number in device_counts if number <= total]
    if uneven := [number for number in strong if total % number]:
        texts.append(
            f"A global batch of {total} cannot be divided among {', '.join(map(str, uneven))} "
            "devices; there, the local batch is rounded down and the global batch is smaller."
        )
    if weak := [number for number in device_counts if number > total]:
        texts.append(
            f"From {weak[0]} devices on, a global batch of {total} is less than 1 image for each "
            "device. These rows have 1 image each, so the global batch grows with the devices "
            "(weak scaling), which is another training and not a faster one."
        )
    return texts


def _gradients(exchange: Exchange, training: Training) -> str:
    sizes = [sum(exchange.num_values[i] for i in bucket) for bucket in exchange.buckets]
    megabytes = [f"{training.gradient_bytes * size / 1e6:.3g}" for size in sizes]
    if len(megabytes) > MAX_SHOWN_BUCKETS:
        megabytes = [*megabytes[: MAX_SHOWN_BUCKETS - 1], "...", megabytes[-1]]
    return (
        f"Gradients: {sum(sizes) / 1e6:.3g} M values of {training.gradient_bytes} bytes. Buckets "
        f"of DDP: {', '.join(megabytes)} MB. Each is reduced once its last gradient is ready, at "
        "the time measured in the backward pass, and after the bucket before."
    )


def _links(node: Node, training: Training) -> str:
    algorithm = {
        "ring": "rings",
        "tree": "double binary trees",
        "fastest": "rings or double binary trees, whichever is faster",
    }[training.all_reduce]
    return (
        f"Stated, not measured: {node.devices} devices in a node, {node.link_gb_per_s:g} GB/s and "
        f"{node.link_latency_us:g} us a step between them; {node.network_gb_per_s:g} GB/s for the "
        f"network of a node and {node.network_latency_us:g} us a step between nodes. All-reduces "
        f"are {algorithm}."
    )


def _synchronous(exchange: Exchange, training: Training) -> str:
    number = len(exchange.batch_norm_channels)
    text = (
        f"DDP broadcasts {len(exchange.broadcast_bytes)} tensors of buffers "
        f"({sum(exchange.broadcast_bytes)} bytes) before each forward pass"
    )
    if not number:
        return f"{text}. The network has no BatchNorm."
    if training.sync_batchnorm:
        return (
            f"{text}. Synchronised BatchNorms ({number}) exchange statistics in the forward and "
            "the backward pass. Both hide behind nothing."
        )
    return f"{text}, which hides behind nothing. The BatchNorms ({number}) are not synchronised."


def table(predictions: Sequence[Prediction], loader_images_per_second: float | None = None) -> str:
    """Return the predictions as text, in lines of at most 100 characters.

    Args:
        predictions: One for each row.
        loader_images_per_second: Images that the data loaders of one device deliver in a second;
            None if unknown.
    """
    is_known = loader_images_per_second is not None
    lines = [
        f"{'':20}{'milliseconds':^46}".rstrip(),
        f"{'devices':>7}{'nodes':>6}{'batch':>7}{'step':>10}{'compute':>10}{'reduce':>9}"
        f"{'exposed':>9}{'sync':>8}{'images/s':>11}{'effic.':>7}{'needed':>8}"
        + (f"{'loaded':>8}" if is_known else ""),
    ]
    for row in predictions:
        times = (row.step, row.compute, row.all_reduce, row.exposed, row.synchronous)
        step, compute, reduce, exposed, synchronous = (1e3 * seconds for seconds in times)
        line = (
            f"{row.num_devices:>7}{row.num_nodes:>6}{row.local_batch:>7}{step:>10.2f}"
            f"{compute:>10.2f}{reduce:>9.3f}{exposed:>9.3f}{synchronous:>8.3f}"
            f"{_rate(row.images_per_second):>11}{row.efficiency:>7.0%}"
            f"{_rate(row.node_images_per_second):>8}"
        )
        if loader_images_per_second is not None:
            line += f"{_rate(loader_images_per_second * row.devices_in_node):>8}"
        lines.append(line)
    lines += [
        "",
        "batch: images of a device; reduce: all-reduces of gradients, of which exposed come after",
        "the backward pass; sync: BatchNorm and buffers; effic.: images/s of a device, relative to",
        "one device alone; needed: images/s that the data loaders of a node have to deliver"
        + ("; loaded: what" if is_known else ""),
        *(["they can deliver"] if is_known else []),
    ]
    return "\n".join(lines)


def _rate(images_per_second: float) -> str:
    """Return a rate with two decimals below 10, one below 100 and none above."""
    decimals = 2 if images_per_second < 10 else 1 if images_per_second < 100 else 0
    return f"{images_per_second:.{decimals}f}"


def as_dict(
    predictions: Sequence[Prediction],
    measured: Sequence[StepTimes],
    exchange: Exchange,
    training: Training,
    node: Node,
) -> dict[str, Any]:
    """Return the predictions, and all that they depend on, as plain data."""
    buckets = [sum(exchange.num_values[i] for i in bucket) for bucket in exchange.buckets]
    times = ("batch", "forward", "backward", "optimizer")
    return {
        "training": asdict(training),
        "node": asdict(node),
        "measured_seconds": [{key: getattr(m, key) for key in times} for m in measured],
        "bucket_bytes": [training.gradient_bytes * number for number in buckets],
        "broadcast_bytes": list(exchange.broadcast_bytes),
        "batch_norm_channels": list(exchange.batch_norm_channels),
        "predictions": [asdict(prediction) for prediction in predictions],
    }
