"""Time of a training step on one device, and when each gradient of it is ready."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from segformer_pl.errors import UserError

NUM_WARMUP = 2


@dataclass(frozen=True)
class StepTimes:
    """Times of a training step in seconds.

    Attributes:
        batch: Number of images.
        forward: Copy of the batch to the device, forward pass and loss.
        backward: Backward pass.
        optimizer: Step of the optimiser.
        ready: When the gradient of each parameter is ready, after the start of the backward pass.
        order: Indices of the parameters in the order in which their gradients are ready.
    """

    batch: int
    forward: float
    backward: float
    optimizer: float
    ready: tuple[float, ...]
    order: tuple[int, ...]

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.forward + self.backward + self.optimizer


def time_steps(
    loss: Callable[[], Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    batch: int,
    device: str,
    repetitions: int,
) -> StepTimes:
    """Time training steps: medians over repetitions, after two steps of warm-up.

    Steps with and without hooks on the gradients alternate. Hooks take time themselves, so they
    give only the relative times of the gradients; all durations come from the other steps. On a GPU
    all times are those of CUDA events, and no step waits for the one before, as in training.

    Args:
        loss: Function that copies a batch to the device and returns its loss.
        parameters: Trained parameters by their names.
        optimizer: Their optimiser.
        batch: Number of images of the batch.
        device: ``cpu`` or ``cuda``.
        repetitions: Number of timed steps of each kind.

    Raises:
        UserError: A parameter gets no gradient, which DDP does not accept either.
    """
    names, tensors = list(parameters), list(parameters.values())
    steps: list[list[Any]] = []
    hooked: list[tuple[list[Any], dict[int, Any]]] = []
    for _ in range(NUM_WARMUP + repetitions):
        steps.append(_step(loss, optimizer, device))
        ready: dict[int, Any] = {}
        handles = [
            tensor.register_post_accumulate_grad_hook(_recorder(ready, index, device))
            for index, tensor in enumerate(tensors)
        ]
        hooked.append((_step(loss, optimizer, device), ready))
        for handle in handles:
            handle.remove()
    order = tuple(hooked[-1][1])
    if missing := sorted(set(range(len(names))) - set(order)):
        raise UserError(
            f"{len(missing)} parameters get no gradient from the training loss, such as "
            f"{names[missing[0]]}; freeze them with requires_grad, because DDP would wait for them"
        )
    if device == "cuda":
        torch.cuda.synchronize()
    phases = [[_seconds(*pair) for pair in pairwise(marks)] for marks in steps[NUM_WARMUP:]]
    forward, backward, optimizer_step = np.median(phases, axis=0).tolist()
    shares = [
        [
            _seconds(marks[1], ready[index]) / _seconds(marks[1], marks[2])
            for index in range(len(names))
        ]
        for marks, ready in hooked[NUM_WARMUP:]
    ]
    at = (backward * np.median(shares, axis=0)).tolist()
    return StepTimes(batch, forward, backward, optimizer_step, tuple(at), order)


def at_batch(measured: Sequence[StepTimes], batch: int) -> StepTimes:
    """Return the times of another batch size.

    Between measured sizes they are interpolated linearly. Beyond them the line through the nearest
    two continues, but not outside of what a fixed time plus a time for each image can give: a batch
    of twice the size takes between once and twice as long. From one size alone, all times but the
    optimiser's are proportional to the batch. The optimiser's are equal for all sizes.

    Args:
        measured: Times of one device at one or more batch sizes.
        batch: Number of images.
    """
    ordered = sorted(measured, key=lambda times: times.batch)
    sizes = np.array([times.batch for times in ordered], float)
    values = np.array([[m.forward, m.backward, m.optimizer, *m.ready] for m in ordered])
    if len(ordered) == 1:
        scaled = values[0] * batch / sizes[0]
    else:
        left = int(np.clip(np.searchsorted(sizes, batch) - 1, 0, len(sizes) - 2))
        weight = (batch - sizes[left]) / (sizes[left + 1] - sizes[left])
        scaled = (1 - weight) * values[left] + weight * values[left + 1]
        if not 0 <= weight <= 1:
            nearest = 0 if weight < 0 else -1
            bounds = np.stack([values[nearest], values[nearest] * batch / sizes[nearest]])
            scaled = np.clip(scaled, bounds.min(axis=0), bounds.max(axis=0))
    forward, backward, _, *ready = scaled.tolist()
    optimizer = float(np.median(values[:, 2]))
    at = tuple(min(seconds, backward) for seconds in ready)
    return StepTimes(batch, forward, backward, optimizer, at, ordered[0].order)


def _step(loss: Callable[[], Tensor], optimizer: Optimizer, device: str) -> list[Any]:
    """Run a step and return the marks at its start and after each of its three phases."""
    marks = [_mark(device)]
    value = loss()
    marks.append(_mark(device))
    value.backward()
    marks.append(_mark(device))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    marks.append(_mark(device))
    return marks


def _recorder(ready: dict[int, Any], index: int, device: str) -> Callable[[Tensor], None]:
    def record(_: Tensor) -> None:
        ready[index] = _mark(device)

    return record


def _mark(device: str) -> Any:
    """Return the present moment: an event of the GPU's stream, or the time of the CPU."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
