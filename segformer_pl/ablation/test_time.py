"""Settings that can be changed at test time, without training: what they do and what they cost.

A file of settings names changes of the network's arguments and of the inference protocol::

    question: How much compute can be saved without training?
    settings:
      sr_ratios-16-8-2-1: {network: {sr_ratios: [16, 8, 2, 1]}}
      scale-0.75: {inference: {scales: [0.75]}}

The network of a setting has the weights of the trained one, transplanted
(:mod:`segformer_pl.checkpoints.transplant`). A setting that would leave any of it untrained is
refused.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from segformer_pl.analysis.complexity import executed_macs
from segformer_pl.checkpoints.changed_network import changed_network
from segformer_pl.checkpoints.sources import Weights
from segformer_pl.errors import UserError
from segformer_pl.inference import Inference, Predictor, predict_classes
from segformer_pl.models.segmenter import Output
from segformer_pl.yaml_file import read_mapping

AS_TRAINED = "as_trained"
NUM_WARMUP = 2
MIN_ROUNDS, MAX_ROUNDS = 10, 200


@dataclass(frozen=True)
class Setting:
    """Changes of a trained network and of its inference protocol.

    Attributes:
        name: Name of the setting.
        network: Arguments of the network, or of its encoder, to change.
        inference: Settings of :class:`~segformer_pl.inference.Inference` to change.
    """

    name: str
    network: Mapping[str, Any] = field(default_factory=dict)
    inference: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> str:
        """The changes as JSON with sorted keys, to compare and to store."""
        return json.dumps({"network": self.network, "inference": self.inference}, sort_keys=True)


def read_settings(file: Path) -> list[Setting]:
    """Read a file of settings. The trained network itself is the first setting.

    Raises:
        UserError: The file cannot be read or has another form.
    """
    content = read_mapping(file, "`settings:` with named entries")
    if not isinstance(content.get("settings"), dict):
        raise UserError(
            f"--settings: '{file}' has no settings; expected `settings:` with named entries such "
            "as `scale-0.75: {inference: {scales: [0.75]}}`"
        )
    if unknown := [key for key in content if key not in ("question", "settings")]:
        raise UserError(
            f"--settings: '{file}' has {unknown[0]!r} beside `question` and `settings`; remove it"
        )
    settings = [Setting(AS_TRAINED)]
    for name, changes in content["settings"].items():
        where = f"'{file}', setting {name!r}"
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name) or name == AS_TRAINED:
            raise UserError(
                f"{where}: the name also names a file; use letters, digits and . + - _ in it, and "
                f"another one than {AS_TRAINED}"
            )
        is_valid = isinstance(changes, dict) and changes
        if not is_valid or any(
            key not in ("network", "inference") or not isinstance(value, dict) or not value
            for key, value in changes.items()
        ):
            raise UserError(
                f"{where}: expected changes of `network` or `inference`, or both, such as "
                f"{{inference: {{scales: [0.75]}}}}; it has {str(changes)[:80]}"
            )
        settings.append(Setting(name, **changes))
    return settings


def predictors(
    settings: Sequence[Setting], trained: Predictor, weights: Weights
) -> dict[str, Predictor]:
    """Return the predictor of every setting. Settings with equal networks share one.

    Args:
        settings: Settings, see :func:`read_settings`.
        trained: Predictor with the trained network.
        weights: The weights that it was built from.

    Raises:
        UserError: A change names no argument, has an impossible value, or leaves a part of the
            network untrained.
    """
    networks: dict[str, Any] = {json.dumps({}): trained.network}
    result = {}
    for setting in settings:
        key = json.dumps(setting.network, sort_keys=True)
        if key not in networks:
            name = f"setting '{setting.name}'"
            network = changed_network(trained.network, weights, setting.network, name)
            networks[key] = network.to(trained.device)
        result[setting.name] = Predictor(
            networks[key],
            trained.class_names,
            trained.palette,
            trained.normalization,
            _changed_protocol(setting, trained.protocol),
        )
    return result


def _changed_protocol(setting: Setting, trained: Inference) -> Inference:
    """Return the protocol with changes, checked like ``model.inference`` on the command line."""
    if not setting.inference:
        return trained
    values = asdict(trained)
    if "window" in setting.inference:  # stride and weights belong to the window
        values |= {"stride": None, "window_weights": "uniform"}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Inference)
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    try:
        parsed = parser.parse_object(lists | dict(setting.inference)).as_dict()
        arguments: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in parsed.items()
        }
        return Inference(**arguments)
    except (ArgumentError, UserError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"setting '{setting.name}', inference: {reason}") from error


class _Sizes:
    """Stand-in for a network that records the size of every image that it is given."""

    num_classes = 1
    output: Output = "logits"

    def __init__(self) -> None:
        self.counts: Counter[tuple[int, int]] = Counter()

    def __call__(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        self.counts[height, width] += len(images)
        return images.new_zeros(len(images), 1, 1, 1)


def count_macs(predictor: Predictor, height: int, width: int) -> int:
    """Return the multiply-adds of the network for one image, over all views and windows.

    Args:
        predictor: Network and inference protocol.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Raises:
        UserError: A view or window is too small for the network.
    """
    sizes = _Sizes()
    with torch.inference_mode():
        image = torch.zeros(1, 1, height, width)
        predict_classes(sizes, image, (height, width), predictor.protocol)
    for size in sizes.counts:
        if min(size) < predictor.network.min_size:
            raise UserError(
                f"its images or windows of {size[0]}x{size[1]} pixels (from {height}x{width}) are "
                f"smaller than the {predictor.network.min_size} pixels that its network needs; "
                "enlarge them, or use smaller sr_ratios or kv_border keep"
            )
    return sum(
        count * executed_macs(predictor.network, *size) for size, count in sizes.counts.items()
    )


@dataclass(frozen=True)
class Timing:
    """Wall time of predicting one image.

    Attributes:
        median_ms: Median in milliseconds.
        iqr_ms: Interquartile range in milliseconds.
        num_runs: Number of timed predictions.
    """

    median_ms: float
    iqr_ms: float
    num_runs: int


def time_interleaved(
    functions: Mapping[str, Callable[[], object]], seconds: float
) -> dict[str, Timing]:
    """Time functions in turn, so that a change of the machine's load meets all of them alike.

    ::

        round      0      1      2
        function   a b c  b c a  c a b  ...

    Args:
        functions: Functions by name. Each has to wait for its device.
        seconds: Duration of the measurement, at least; there are between 10 and 200 rounds.
    """
    names = list(functions)
    for name in names * NUM_WARMUP:
        functions[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for number in range(MAX_ROUNDS):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            functions[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
        if number + 1 >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
    quartiles = {name: np.quantile(values, [0.25, 0.5, 0.75]) for name, values in times.items()}
    return {
        name: Timing(float(median), float(high - low), len(times[name]))
        for name, (low, median, high) in quartiles.items()
    }
