"""The settings that a run was trained with, and in which of them runs differ: plain data."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SEED = "seed_everything"
DATA = "training data"
DATA_PATH = "data.path"
CALLBACKS = "trainer.callbacks."
# Of where a part of a run is stored and what it starts from, not of how it trains.
NOT_OF_A_PART = ("ckpt_path", "trainer.logger.", "trainer.default_root_dir")
# Where a run is kept and how it is executed, which does not change what is trained: the order of
# the samples does not depend on the number of loader processes.
NOT_COMPARED = (
    f"{SEED}.",
    "weights_only.",
    "last_checkpoint.",
    "trainer.default_root_dir.",
    "trainer.enable_model_summary.",
    "trainer.enable_progress_bar.",
    "trainer.logger.",
    "data.num_workers.",
    "data.path.",  # data may be moved: what they are tells
)
FOLDER = "dirpath"
# Others of Lightning's record, show or end a training, and change no step of it.
LIGHTNING = ("lightning.pytorch.callbacks.", "pytorch_lightning.callbacks.")
TRAINING_CALLBACKS = {
    "BackboneFinetuning",
    "BatchSizeFinder",
    "EMAWeightAveraging",
    "GradientAccumulationScheduler",
    "LearningRateFinder",
    "ModelPruning",
    "StochasticWeightAveraging",
    "WeightAveraging",
}
OWN = "segformer_pl.callbacks."  # which train nothing
EVALUATES = "verbose"  # an argument of Lightning's validate and test that fit does not have


@dataclass(frozen=True)
class TrainingData:
    """What a run was trained on, wherever it was stored.

    Attributes:
        dataset: Name of the data set.
        num_rows: Number of training images.
        fingerprint: Of their contents.
    """

    dataset: str
    num_rows: int
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.num_rows:,} images of {self.dataset}, fingerprint {self.fingerprint}"


@dataclass(frozen=True)
class Configuration:
    """The settings that decide what a run trains.

    Attributes:
        settings: Value by dotted key, without the seed and the paths. One that a resumption
            changed says so: ``"0.003, 0.006 from step 400 on"``.
        seed: Of the run; None if it was not seeded.
        data: The images that it was trained on; None if that is not known.
        data_path: Where they were stored.
    """

    settings: dict[str, Any]
    seed: int | None
    data: TrainingData | None = None
    data_path: Any = None

    def has_data_of(self, other: "Configuration") -> bool:
        """Whether both were trained on the same data, as far as that is known."""
        if self.data is None or other.data is None:
            return self.data_path == other.data_path
        return self.data == other.data

    def is_that_of(self, other: "Configuration") -> bool:
        """Whether both train the same, save for the seed."""
        return self.settings == other.settings and self.has_data_of(other)


def is_evaluation(config: Mapping[str, Any]) -> bool:
    """Whether this is the configuration of a ``validate`` or ``test``."""
    return EVALUATES in config


def training_configuration(
    parts: Mapping[int, Mapping[str, Any]],
    data: TrainingData | None,
    evaluated_with: Mapping[str, Any] | None = None,
) -> Configuration | None:
    """One configuration of all parts of a training.

    Args:
        parts: Configuration of the start, and of each resumption, by the step that it holds from.
        data: The images that the run was trained on, if they are known.
        evaluated_with: Settings of the model with which another run evaluated the network.

    Returns:
        None if this is no training.
    """
    if any(is_evaluation(part) for part in parts.values()):
        return None
    first = parts[0]
    merged = {}
    for start, part in parts.items():
        merged[start] = dict(part)
        if start:
            merged[start]["ckpt_path"] = first.get("ckpt_path")  # the run's own
        if evaluated_with is not None:
            merged[start]["model"] = {**(part.get("model") or {}), **evaluated_with}
    seed = first.get(SEED)
    return Configuration(
        _merged(merged),
        None if isinstance(seed, bool) else seed,
        data,
        (first.get("data") or {}).get("path"),
    )


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ between two configurations, each with both values."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return without_parts(
        {
            key: (before.get(key), after.get(key))
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key) and not f"{key}.".startswith(NOT_OF_A_PART)
        }
    )


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a configuration by dotted key.

    Callbacks go by the names of their classes rather than by their places in the list, which
    another callback changes: ``trainer.callbacks.ModelCheckpoint`` is the path of the class, and
    its arguments follow below that key. A second one of a class is ``ModelCheckpoint.2``.
    """
    if prefix == CALLBACKS:
        yield from _callbacks(tree)
    elif isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}{key}.")
    elif isinstance(tree, list) and any(isinstance(value, dict) for value in tree):
        for number, value in enumerate(tree):
            yield from leaves(value, f"{prefix}{number}.")
    else:
        yield prefix.rstrip("."), tree


def _callbacks(tree: Any) -> Iterator[tuple[str, Any]]:
    count: Counter[str] = Counter()
    for callback in tree if isinstance(tree, list) else [tree]:
        if not isinstance(callback, dict) or "class_path" not in callback:
            continue
        path = str(callback["class_path"])
        name = path.rpartition(".")[2]
        count[name] += 1
        key = f"{CALLBACKS}{name}" + (f".{count[name]}" if count[name] > 1 else "")
        yield key, path
        if arguments := callback.get("init_args"):
            yield from leaves(arguments, f"{key}.")


def without_parts(settings: dict[str, Any]) -> dict[str, Any]:
    """Without the arguments of a callback that is listed itself."""
    listed = tuple(f"{key}." for key in settings if key.startswith(CALLBACKS))
    return {key: value for key, value in settings.items() if not key.startswith(listed)}


def differences(configurations: Sequence[Configuration]) -> dict[str, list[Any]]:
    """The settings in which not all agree: key -> value of each, ``"not stated"`` for none.

    ``data.path`` is among them only where it is not known whether the training data are the same.
    """
    keys = dict.fromkeys(key for one in configurations for key in one.settings)
    values = {key: [one.settings.get(key, "not stated") for one in configurations] for key in keys}
    different = {key: v for key, v in values.items() if any(value != v[0] for value in v)}
    if not is_data_known(configurations):
        different[DATA_PATH] = [one.data_path for one in configurations]
    elif any(not one.has_data_of(configurations[0]) for one in configurations):
        different[DATA] = [str(one.data or "not stated") for one in configurations]
    return without_parts(different)


def is_data_known(configurations: Sequence[Configuration]) -> bool:
    """Whether it can be told which of them were trained on the same data."""
    paths = [one.data_path for one in configurations]
    return all(one.data for one in configurations) or all(path == paths[0] for path in paths)


def _merged(parts: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One value of each setting: that of the start, and what resumptions made of it."""
    settings = {step: dict(_settings(config)) for step, config in parts.items()}
    first = settings[0]
    merged = {}
    for key in dict.fromkeys(key for part in settings.values() for key in part):
        value, told = first.get(key, "not stated"), []
        for step, part in settings.items():
            now = part.get(key, "not stated")
            if now != value:
                told.append(f"{plain(now)} from step {step:,} on")
                value = now
        merged[key] = ", ".join([plain(first.get(key, "not stated")), *told]) if told else value
    return merged


def plain(value: Any) -> str:
    """A setting as YAML has it."""
    is_json = value is None or isinstance(value, bool | list | dict)
    return json.dumps(value, default=str) if is_json else str(value)


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in leaves(config):
        if key.startswith(CALLBACKS):
            if _counts(config, key):
                yield key, value
        elif not f"{key}.".startswith(NOT_COMPARED) and FOLDER not in key.split("."):
            yield key, value


def _counts(config: dict[str, Any], key: str) -> bool:
    """Whether a setting of callbacks tells how the run trains."""
    _, _, name, *argument = key.split(".")
    given = (config.get("trainer") or {}).get("callbacks")
    paths = [
        str(callback.get("class_path"))
        for callback in (given if isinstance(given, list) else [given])
        if isinstance(callback, dict)
    ]
    path = next(path for path in paths if path.rpartition(".")[2] == name)
    if path.startswith(LIGHTNING):
        return name in TRAINING_CALLBACKS
    # Of a class that is not known here, that it is there.
    return not path.startswith(OWN) and all(part.isdecimal() for part in argument)
