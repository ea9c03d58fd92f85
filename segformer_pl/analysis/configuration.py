"""What a run was trained with, and in which settings runs differ."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segformer_pl.analysis.evaluation import EVALUATION_FOLDER

CONFIG_FILE = "config.yaml"
SEED = "seed_everything"
# Where a run is kept and how it is executed, which does not change what is trained: the order of
# the samples does not depend on the number of loader processes.
NOT_COMPARED = {
    SEED,
    "ckpt_path",
    "weights_only",
    "last_checkpoint",
    "trainer.default_root_dir",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.logger",
    "data.num_workers",
    "data.path",
}
FOLDER = "dirpath"  # of callbacks
EVALUATES = "verbose"  # an argument of Lightning's validate and test that fit does not have


@dataclass(frozen=True)
class Configuration:
    """The settings that decide what a run trains.

    Attributes:
        settings: Value by dotted key, without the seed and the paths.
        seed: Of the run; None if it was not seeded.
    """

    settings: dict[str, Any]
    seed: int | None


def training_configuration(source: Path) -> Configuration | None:
    """What the network was trained with that a run folder, or a file of its evaluations, scored.

    The folder of a ``fit`` tells it. That of a ``validate`` or ``test`` tells how the network was
    scored, and by ``--ckpt_path`` in which run it was trained.

    Args:
        source: Run folder, or an .npz file of its evaluation folder.

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
    config = read_config(file)
    if EVALUATES in config:
        checkpoint = config.get("ckpt_path")
        trained = Path(str(checkpoint)).parent.parent / CONFIG_FILE  # RUN/checkpoints/FILE
        if checkpoint is None or not trained.is_file():
            return None
        protocol = (config.get("model") or {}).get("inference")
        config = read_config(trained)
        if EVALUATES in config:
            return None
        config["model"] = {**(config.get("model") or {}), "inference": protocol}
    seed = config.get(SEED)
    return Configuration(dict(_leaves(config)), None if isinstance(seed, bool) else seed)


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
    """The settings in which not all agree: key -> value of each, ``"not stated"`` for none."""
    keys = dict.fromkeys(key for one in configurations for key in one.settings)
    values = {key: [one.settings.get(key, "not stated") for one in configurations] for key in keys}
    return {key: given for key, given in values.items() if any(v != given[0] for v in given)}


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        items = [(str(name), value) for name, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(value, dict) for value in tree):  # callbacks
        items = [(str(number), value) for number, value in enumerate(tree)]
    else:
        yield prefix, tree
        return
    for name, value in items:
        key = f"{prefix}.{name}" if prefix else name
        if key not in NOT_COMPARED and name != FOLDER:
            yield from _leaves(value, key)
