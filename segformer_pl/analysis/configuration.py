"""What a run was trained with, and in which settings runs differ."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segformer_pl.analysis.evaluation import EVALUATION_FOLDER
from segformer_pl.analysis.run_history import (
    CALLBACKS,
    CONFIG_FILE,
    config_files,
    leaves,
    read_training_data,
    without_parts,
)

SEED = "seed_everything"
DATA = "training data"
DATA_PATH = "data.path"
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


def training_configuration(source: Path, step: int) -> Configuration | None:
    """What the network was trained with that a run folder, or a file of its evaluations, scored.

    The folder of a ``fit`` tells it. That of a ``validate`` or ``test`` tells how the network was
    scored, and by ``--ckpt_path`` in which run it was trained.

    Args:
        source: Run folder, or an .npz file of its evaluation folder.
        step: Training steps before the evaluation; what was changed after them does not count.

    Returns:
        None where that is not known: there is no ``config.yaml``, or the run that was trained is
        not where the checkpoint was.

    Raises:
        ValueError: a ``config.yaml`` cannot be read.
    """
    folder = source
    if not source.is_dir():
        if source.parent.name != EVALUATION_FOLDER:
            return None
        folder = source.parent.parent
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    config, protocol = read_config(file), None
    is_evaluation = EVALUATES in config
    if is_evaluation:
        checkpoint = config.get("ckpt_path")
        folder = Path(str(checkpoint)).parent.parent  # RUN/checkpoints/FILE
        if checkpoint is None or not (folder / CONFIG_FILE).is_file():
            return None
        protocol = (config.get("model") or {}).get("inference")
    parts = {
        start: read_config(part)
        for start, part in config_files(folder).items()
        if start == 0 or start < step
    }
    if any(EVALUATES in part for part in parts.values()):
        return None
    for start, part in parts.items():
        if start:
            part["ckpt_path"] = parts[0].get("ckpt_path")  # the run's own
        if is_evaluation:
            part["model"] = {**(part.get("model") or {}), "inference": protocol}
    seed, data = parts[0].get(SEED), read_training_data(folder)
    if data is not None:
        # The layout before the dash holds names of files; contents are hashed after it, if at all.
        data["fingerprint"] = str(data["fingerprint"]).rpartition("-")[2]
    return Configuration(
        _merged(parts),
        None if isinstance(seed, bool) else seed,
        TrainingData(**data) if data else None,
        (parts[0].get("data") or {}).get("path"),
    )


def read_config(file: Path) -> dict[str, Any]:
    """The settings in a ``config.yaml``, as plain data.

    Raises:
        ValueError: it is no YAML file, or holds something else.
    """
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"'{file}' cannot be read as YAML ({reason}); give another run") from error
    if not isinstance(config, dict):
        raise ValueError(f"'{file}' does not hold the settings of a run; give another run")
    return config


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
