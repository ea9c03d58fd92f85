"""The settings of a training as plain data, and the settings in which runs differ."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SEED = "seed_everything"
DATA = "training data"
DATA_PATH = "data.path"
CALLBACKS = "trainer.callbacks."
# Settings in which a resumption may differ without training differently: where files are stored,
# and the checkpoint that it starts from.
NOT_OF_A_PART = ("ckpt_path", "run_name.", "trainer.logger.", "trainer.default_root_dir")
# Where a run is stored and how it is executed. Neither changes what is trained; in particular, the
# order of the samples does not depend on the number of data-loader workers.
NOT_COMPARED = (
    f"{SEED}.",
    "run_name.",
    "weights_only.",
    "last_checkpoint.",
    "trainer.default_root_dir.",
    "trainer.enable_model_summary.",
    "trainer.enable_progress_bar.",
    "trainer.logger.",
    "data.num_workers.",
    "data.path.",  # data can be moved; their fingerprint identifies them
)
# Settings that later versions added -> value of runs that were trained before. It is left out, so
# that such runs still equal later ones.
ADDED = {
    "model.optimizer": "adamw",
    "model.momentum": 0.9,
    "model.min_lr": 0.0,
    "model.reference_batch_size": None,
    "model.freeze": None,
    "model.weights_state": None,
    "data.num_bands": 3,
    "model.inference.image_size": None,
    "model.network.init_args.merged_queries": [0, 0, 0, 0],
    "model.network.init_args.encoder.init_args.merged_queries": [0, 0, 0, 0],
}
FOLDER = "dirpath"
# All other callbacks of Lightning log, display or end a training, and change none of its steps.
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
OWN = "segformer_pl.callbacks."  # none of these changes training, except these:
OWN_TRAINING_CALLBACKS = {"GradientCompression"}
EVALUATES = "verbose"  # argument of Lightning's validate and test, which fit does not have
MISSING = "not stated"


@dataclass(frozen=True)
class TrainingData:
    """The training images of a run, independent of where they are stored.

    Attributes:
        dataset: Name of the data set.
        num_rows: Number of training images.
        fingerprint: Hash of their contents.
    """

    dataset: str
    num_rows: int
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.num_rows:,} images of {self.dataset}, fingerprint {self.fingerprint}"


@dataclass(frozen=True)
class Configuration:
    """The settings that determine what a run trains.

    Attributes:
        settings: Value by dotted key, without the seed and :data:`NOT_COMPARED`. If a resumption
            changed a setting, its value states both: ``"0.003, 0.006 from step 400 on"``.
        seed: Seed of the run; None if it was not seeded.
        data: Training images; None if they are not known.
        data_path: Where the training images were stored.
    """

    settings: dict[str, Any]
    seed: int | None
    data: TrainingData | None = None
    data_path: Any = None

    def has_data_of(self, other: "Configuration") -> bool:
        """Whether both were trained on the same data, judged by their paths if data are unknown."""
        if self.data is None or other.data is None:
            return self.data_path == other.data_path
        return self.data == other.data

    def is_that_of(self, other: "Configuration") -> bool:
        """Whether both are the same configuration, apart from the seed."""
        return self.settings == other.settings and self.has_data_of(other)


def settings_digest(configuration: Configuration) -> str:
    """Return 8 hexadecimal digits that identify the settings of a configuration.

    They do not depend on the seed, on :data:`NOT_COMPARED` or on the order of the keys.
    """
    text = json.dumps(configuration.settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def is_evaluation(config: Mapping[str, Any]) -> bool:
    """Return whether this is the configuration of a ``validate`` or ``test``."""
    return EVALUATES in config


def training_configuration(
    parts: Mapping[int, Mapping[str, Any]],
    data: TrainingData | None,
    evaluated_with: Mapping[str, Any] | None = None,
) -> Configuration | None:
    """Merge the configurations of all parts of a training into one.

    Args:
        parts: Configurations of the start and of each resumption, by the step from which each
            applies.
        data: Training images, if they are known.
        evaluated_with: Settings of the model that another run used to evaluate the network.

    Returns:
        The configuration, or None if this is not a training.
    """
    if any(is_evaluation(part) for part in parts.values()):
        return None
    first = parts[0]
    merged = {}
    for start, part in parts.items():
        merged[start] = dict(part)
        if start:
            # A resumption starts from the run's own checkpoint, which is no change of settings.
            merged[start]["ckpt_path"] = first.get("ckpt_path")
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
    """Return the settings that differ between two configurations, each with both values."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return without_parts(
        {
            key: (before.get(key), after.get(key))
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key) and not f"{key}.".startswith(NOT_OF_A_PART)
        }
    )


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a configuration with their dotted keys.

    Callbacks are keyed by class name instead of by list index, because an additional callback
    shifts the indices. A second callback of a class gets the suffix ``.2``::

        trainer:                               trainer.callbacks.ModelCheckpoint = a.ModelCheckpoint
          callbacks:                           trainer.callbacks.ModelCheckpoint.save_top_k = 1
          - class_path: a.ModelCheckpoint
            init_args: {save_top_k: 1}
    """
    if prefix == CALLBACKS:
        yield from _callbacks(tree)
    elif isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}{key}.")
    elif isinstance(tree, list) and any(isinstance(value, dict) for value in tree):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{prefix}{index}.")
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
    """Remove the arguments of callbacks that are in the list themselves (added or removed)."""
    listed = tuple(f"{key}." for key in settings if key.startswith(CALLBACKS))
    return {key: value for key, value in settings.items() if not key.startswith(listed)}


def differences(configurations: Sequence[Configuration]) -> dict[str, list[Any]]:
    """Return the settings in which configurations differ: key -> value in each of them.

    A value is ``"not stated"`` where a configuration lacks the key. ``data.path`` is listed only if
    it is not known whether the training data are the same.
    """
    keys = dict.fromkeys(key for one in configurations for key in one.settings)
    values = {key: [one.settings.get(key, MISSING) for one in configurations] for key in keys}
    different = {key: v for key, v in values.items() if any(value != v[0] for value in v)}
    if not is_data_known(configurations):
        different[DATA_PATH] = [one.data_path for one in configurations]
    elif any(not one.has_data_of(configurations[0]) for one in configurations):
        different[DATA] = [str(one.data or MISSING) for one in configurations]
    return without_parts(different)


def is_data_known(configurations: Sequence[Configuration]) -> bool:
    """Return whether it is known which of them were trained on the same data."""
    paths = [one.data_path for one in configurations]
    return all(one.data for one in configurations) or all(path == paths[0] for path in paths)


def _merged(parts: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return one value per setting: that of the start, followed by the changes of resumptions."""
    settings = {step: dict(_settings(config)) for step, config in parts.items()}
    first = settings[0]
    merged = {}
    for key in dict.fromkeys(key for part in settings.values() for key in part):
        value, texts = first.get(key, MISSING), []
        for step, part in settings.items():
            new = part.get(key, MISSING)
            if new != value:
                texts.append(f"{plain(new)} from step {step:,} on")
                value = new
        merged[key] = ", ".join([plain(first.get(key, MISSING)), *texts]) if texts else value
    return merged


def plain(value: Any) -> str:
    """Format the value of a setting as YAML does."""
    is_json = value is None or isinstance(value, bool | list | dict)
    return json.dumps(value, default=str) if is_json else str(value)


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in leaves(config):
        if key.startswith(CALLBACKS):
            if _changes_training(config, key):
                yield key, value
        elif f"{key}.".startswith(NOT_COMPARED) or FOLDER in key.split("."):
            continue
        elif key not in ADDED or value != ADDED[key]:
            yield key, value


def _changes_training(config: dict[str, Any], key: str) -> bool:
    """Return whether a setting of a callback can change what the run trains."""
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
    if path.startswith(OWN):
        return name in OWN_TRAINING_CALLBACKS
    # Which arguments of an unknown class matter is not known, so compare only its presence.
    return all(part.isdecimal() for part in argument)
