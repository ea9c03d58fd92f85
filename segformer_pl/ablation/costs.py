"""What the variants of a study cost, before any of them is trained.

Counts come from :func:`~segformer_pl.analysis.complexity.complexity`. Latencies of variants are
compared with each other, so they are measured interleaved: other work on the machine, or a clock
that slows down with heat, then meets all variants alike::

    round 0    A B C        ratio of B to A in this round
    round 1    C B A        the order alternates
    round 2    A B C        ratio of B to A in this round      -> median and quartiles of the ratios
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from segformer_pl.analysis.complexity import Complexity, PartCost, complexity
from segformer_pl.errors import UserError, brief
from segformer_pl.models.segmenter import Segmenter, check_segmenter

MIN_SECONDS = 3.0  # duration of the latency measurement for each variant, at least
MIN_ROUNDS = 3
NUM_WARMUP = 2
# A forward pass of less is repeated, so that the clock's resolution and Python do not matter.
SHORTEST_SECONDS = 0.02
NAME_WIDTH = 20


class Variant(Protocol):
    """The part of a study's variant that this module reads."""

    @property
    def name(self) -> str: ...

    @property
    def changes(self) -> Mapping[str, Any]: ...

    def build_network(self) -> Segmenter: ...


@dataclass(frozen=True)
class VariantLatency:
    """Wall time of one forward pass of one image, measured in turn with the other variants.

    Attributes:
        median_ms: Median over the rounds in milliseconds.
        iqr_ms: Interquartile range over the rounds in milliseconds.
        ratio: Median over the rounds of the time divided by the reference's in the same round.
        ratio_low: Lower quartile of this ratio over the rounds.
        ratio_high: Upper quartile of this ratio over the rounds.
        num_rounds: Number of rounds.
        device: Device of the measurement.
        num_threads: Number of CPU threads.
    """

    median_ms: float
    iqr_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    num_rounds: int
    device: str
    num_threads: int


@dataclass(frozen=True)
class VariantCost:
    """Cost of a variant for one image.

    Attributes:
        name: Name of the variant.
        changes: Its settings that differ from the base.
        is_reference: Whether the other variants are compared with it.
        cost: Counts of the network, in total and by part.
        latency: Wall time of a forward pass.
    """

    name: str
    changes: dict[str, Any]
    is_reference: bool
    cost: Complexity
    latency: VariantLatency

    @property
    def attention_macs(self) -> int:
        """Multiply-adds of QK^T and AV in all parts."""
        return sum(part.attention_macs for part in self.cost.parts)


def variant_costs(
    variants: Sequence[Variant],
    reference: str,
    height: int,
    width: int,
    device: str = "cpu",
    min_seconds: float | None = None,
) -> list[VariantCost]:
    """Count and time all variants of a study for images of one size.

    Args:
        variants: Variants of the study.
        reference: Name of the variant that the latencies are divided by.
        height: Height of the image in pixels: of the training crops, or of the data set's images.
        width: Width of the image in pixels.
        device: Device on which latency is measured, ``cpu`` or ``cuda``.
        min_seconds: Minimum duration of the latency measurement in seconds, for each variant.
            Default: :data:`MIN_SECONDS`.

    Raises:
        UserError: There is no such reference, a variant's network cannot be built, or it refuses
            images of this size.
    """
    names = [variant.name for variant in variants]
    if reference not in names:
        raise UserError(
            f"the reference {reference!r} is none of the variants ({', '.join(names)}); name one "
            "of them"
        )
    networks, counts = [], []
    for variant in variants:
        network = _build(variant, height, width)
        networks.append(network)
        counts.append(_count(variant.name, network, height, width))
    if min_seconds is None:
        min_seconds = MIN_SECONDS
    times = _interleaved_times(networks, height, width, device, min_seconds)
    latencies = _summaries(times, names.index(reference), device)
    return [
        VariantCost(variant.name, dict(variant.changes), variant.name == reference, cost, latency)
        for variant, cost, latency in zip(variants, counts, latencies)
    ]


def _build(variant: Variant, height: int, width: int) -> Segmenter:
    try:
        network = variant.build_network()
        check_segmenter(network)
    except Exception as error:  # any type: the constructor may be the user's
        raise UserError(
            f"variant {variant.name}: its network cannot be built ({brief(error)}); change "
            "its settings in the study"
        ) from error
    if min(height, width) < network.min_size:
        raise UserError(
            f"variant {variant.name}: its network needs images of at least {network.min_size} "
            f"pixels, and these have {height}x{width}; enlarge data.crop_size or leave it out"
        )
    return network


def _count(name: str, network: Segmenter, height: int, width: int) -> Complexity:
    try:
        return complexity(network, height, width)
    except Exception as error:  # any type: the forward pass may be the user's
        is_known = isinstance(error, UserError)
        text = str(error) if is_known else f"its costs cannot be counted ({brief(error)})"
        raise UserError(f"variant {name}: {text}") from error


def _interleaved_times(
    networks: Sequence[Segmenter], height: int, width: int, device: str, min_seconds: float
) -> np.ndarray:
    """Return the seconds of a forward pass, (rounds, variants).

    A network that comes several times, such as variants that differ in training alone, is measured
    several times; its ratios show what the measurement can tell apart.
    """
    passes = [_forward_pass(network, height, width, device) for network in networks]
    repeats = []
    for run in passes:
        for _ in range(NUM_WARMUP):
            seconds = _timed(run, 1, device)
        repeats.append(max(round(SHORTEST_SECONDS / seconds), 1))
    rounds: list[list[float]] = []
    start = time.perf_counter()
    while len(rounds) < MIN_ROUNDS or time.perf_counter() - start < len(networks) * min_seconds:
        order = range(len(passes))
        seconds_of = {
            index: _timed(passes[index], repeats[index], device)
            for index in (reversed(order) if len(rounds) % 2 else order)
        }
        rounds.append([seconds_of[index] for index in order])
    return np.array(rounds)


def _forward_pass(network: Segmenter, height: int, width: int, device: str) -> Callable[[], None]:
    network = network.to(device).eval()
    images = torch.randn(1, network.in_channels, height, width, device=device)

    def run() -> None:
        with torch.inference_mode():
            network(images)

    return run


def _timed(run: Callable[[], None], repeats: int, device: str) -> float:
    """Return the mean seconds of some calls."""
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if is_cuda:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def _summaries(times: np.ndarray, reference: int, device: str) -> list[VariantLatency]:
    ratios = times / times[:, [reference]]
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75), axis=0) * 1e3
    ratio_low, ratio, ratio_high = np.quantile(ratios, (0.25, 0.5, 0.75), axis=0)
    return [
        VariantLatency(
            median_ms=float(median[i]),
            iqr_ms=float(high[i] - low[i]),
            ratio=float(ratio[i]),
            ratio_low=float(ratio_low[i]),
            ratio_high=float(ratio_high[i]),
            num_rounds=len(times),
            device=device,
            num_threads=torch.get_num_threads(),
        )
        for i in range(times.shape[1])
    ]


def as_dict(costs: Sequence[VariantCost]) -> list[dict[str, Any]]:
    """Return all fields of all variants as plain data."""
    return [asdict(cost) | {"attention_macs": cost.attention_macs} for cost in costs]


def costs_table(costs: Sequence[VariantCost]) -> str:
    """Return the costs as text: a row for each variant, then one for each of its parts.

    Lines have at most 100 characters.
    """
    _, height, width = costs[0].cost.image_shape
    latency = costs[0].latency
    unit, letter = _unit([cost.cost.macs for cost in costs])
    part_unit, part_letter = _unit([part.macs for cost in costs for part in cost.cost.parts])
    lines = [
        f"one image of {height}x{width} pixels, {costs[0].cost.num_classes} classes",
        "",
        f"{'variant':<{NAME_WIDTH}}{'params M':>9}{letter + 'MACs':>9}{'paper':>9}{'attn':>8}"
        f"{'saved MB':>9}{'ms (IQR)':>14}{'latency ratio':>21}",
    ]
    for cost in costs:
        name = cost.name + (" *" if cost.is_reference else "")
        if len(name) >= NAME_WIDTH:
            lines.append(name[:100])
            name = ""
        lines.append(f"{name:<{NAME_WIDTH}}{_row(cost, unit)}")
    lines += [
        "",
        f"* the reference. {letter}MACs: executed multiply-adds; paper: as the paper counts them;",
        "attn: QK^T and AV among the executed; saved: kept for the backward pass. Latency: median",
        f"of {latency.num_rounds} interleaved rounds, {latency.device}, {latency.num_threads} "
        "threads; ratio: to the reference in the same round [quartiles].",
        "",
        f"{'part':<{NAME_WIDTH}}{'output':>16}{'parameters':>12}{part_letter + 'MACs':>9}"
        f"{'attn':>9}{'queries':>9}{'keys':>7}{'saved MB':>10}",
    ]
    for cost in costs:
        lines.append(cost.name[:100])
        lines += [_part_row(part, part_unit) for part in cost.cost.parts]
    lines += ["", "keys: tokens that each query of the part's largest attention attends to."]
    return "\n".join(lines)


def _unit(counts: Sequence[int]) -> tuple[float, str]:
    """Return the unit of a column: 1e9 and "G", or 1e6 and "M" if all counts are small."""
    return (1e9, "G") if max(counts) >= 1e9 else (1e6, "M")


def _row(cost: VariantCost, unit: float) -> str:
    counts, latency = cost.cost, cost.latency
    paper = "-" if counts.paper_macs is None else f"{counts.paper_macs / unit:.2f}"
    digits = 1 if latency.median_ms < 1000 else 0
    time_text = f"{latency.median_ms:.{digits}f} ({latency.iqr_ms:.{digits}f})"
    ratio = f"{latency.ratio:.2f} [{latency.ratio_low:.2f}, {latency.ratio_high:.2f}]"
    return (
        f"{counts.num_parameters / 1e6:>9.2f}{counts.macs / unit:>9.2f}{paper:>9}"
        f"{cost.attention_macs / unit:>8.2f}{counts.activation_bytes / 1e6:>9.1f}"
        f"{time_text:>14}{ratio:>21}"
    )


def _part_row(part: PartCost, unit: float) -> str:
    shape = "x".join(map(str, part.output_shape[1:])) if part.output_shape else "-"
    attention = f"{part.attention_macs / unit:.2f}" if part.query_length else "-"
    return (
        f"  {part.name[: NAME_WIDTH - 2]:<{NAME_WIDTH - 2}}{shape:>16}{part.num_parameters:>12,}"
        f"{part.macs / unit:>9.2f}{attention:>9}{part.query_length or '-':>9}"
        f"{part.key_length or '-':>7}{part.activation_bytes / 1e6:>10.2f}"
    )
