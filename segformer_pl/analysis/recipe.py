"""The departures of a run from the published training recipe of its system.

:mod:`segformer_pl.analysis.recipes` holds the recipes. The recipe of a run is found by the function
that builds its network, such as ``segformer_pl.models.setr_pup``, its backbone and its data set.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from segformer_pl.analysis.recipes import RECIPES
from segformer_pl.analysis.recipes.settings import (
    NETWORK,
    NOT_STATED,
    PROTOCOL,
    SIX_SCALES,
    DatasetRecipe,
    Recipe,
    Setting,
)

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Departure:
    """One setting of a run that differs from the paper's, or that is not stated.

    Attributes:
        setting: Dotted key in the configuration, such as ``model.lr``.
        paper: The paper's value, as text.
        here: The value in the run, as text.
        source: Source of the paper's value.
    """

    setting: str
    paper: str
    here: str
    source: str


CHANGE_TRAINING = (
    "BackboneFinetuning",
    "BatchSizeFinder",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "GradientCompression",
    "LearningRateFinder",
    "ModelPruning",
    "StochasticWeightAveraging",
    "WeightAveraging",
)

# Defaults of the task where a configuration has null.
DEFAULTS = {
    "loss": {
        "class_path": "segformer_pl.losses.CrossEntropy",
        "init_args": {"average": "all", "class_weights": None, "label_smoothing": 0.0},
    },
    "inference": {
        "class_path": "segformer_pl.inference.Inference",
        "init_args": {
            **dict.fromkeys(("base_size", "image_size", "resize_to", "pad_to", "window", "stride")),
            "window_weights": "uniform",
            "scales": [1.0],
            "flip": False,
        },
    },
}


def scope(config: Config) -> str:
    """Return one sentence on what :func:`departures` compares this run with."""
    recipe = _recipe(config)
    if recipe is None:
        network = _text(_get(config, "model.network.class_path"))
        return (
            f"The network is {network}: there is no published recipe for it, nothing is compared."
        )
    dataset = _dataset(config, recipe)
    if dataset is None:
        further = sorted({one.key for dataset in recipe.datasets for one in dataset.settings})
        left_out = ", ".join(["test size and windows", *further])
        return (
            f"The paper does not have the data set {_text(_get(config, 'data.dataset'))}: compared "
            f"with its recipe for {recipe.title} in the settings that do not depend on the data "
            "set (not: steps, samples per step, crop, base size, validation interval, "
            f"{left_out})."
        )
    return f"Compared with the paper's recipe for {recipe.title} on {dataset.title}."


def remarks(config: Config) -> list[str]:
    """Return differences from the paper that are not settings, and unknowns of its recipe."""
    recipe = _recipe(config)
    if recipe is None:
        return []
    dataset = _dataset(config, recipe)
    return [*recipe.remarks, *(dataset.remarks if dataset else ())]


def departures(config: Config) -> list[Departure]:
    """Return every setting that differs from the paper's recipe for this network and data set.

    Settings with unknown values are listed as well: those that the configuration leaves out, and
    the number of devices if it is ``auto``. Of the callbacks, those of Lightning and of this
    package that change training are recognised, not the user's own. See :func:`scope` for what is
    compared, and :func:`remarks` for differences that are not settings.

    Args:
        config: Resolved configuration of a run as plain data, the content of its ``config.yaml``.

    Returns:
        Departures in the order model, data, trainer; empty if there is no published recipe for the
        network.
    """
    recipe = _recipe(config)
    if recipe is None:
        return []
    dataset = _dataset(config, recipe)
    given = config["model"]
    defaults = {key: value for key, value in DEFAULTS.items() if given.get(key, NOT_STATED) is None}
    config = {**config, "model": {**given, **defaults}}
    result = [*_plain(config, _settings(config, recipe, dataset)), *_backbone(config, recipe)]
    result += [*_weights(config, recipe), *_callbacks(config, recipe)]
    result += _batch(config, recipe, dataset)
    sections = ["model", "data", "trainer"]
    return sorted(result, key=lambda departure: sections.index(departure.setting.split(".")[0]))


def _recipe(config: Config) -> Recipe | None:
    """Return the recipe of the run's network; of several, the one for its backbone."""
    path = str(_get(config, "model.network.class_path"))
    match = re.fullmatch(r"segformer_pl\.models\.(?:\w+\.)*(\w+)", path)
    recipes = RECIPES.get(match[1], ()) if match else ()
    fitting = [one for one in recipes if _backbone_name(config) in one.backbones]
    return next(iter([*fitting, *recipes]), None)


def _backbone_name(config: Config) -> str:
    """Return the backbone's name in timm, without the tag of its weights."""
    return str(_get(config, NETWORK + "backbone")).partition(".")[0]


def _dataset(config: Config, recipe: Recipe) -> DatasetRecipe | None:
    name = _get(config, "data.dataset")
    return next((one for one in recipe.datasets if name in one.names), None)


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return NOT_STATED
        value = value[name]
    return value


def _settings(config: Config, recipe: Recipe, dataset: DatasetRecipe | None) -> Iterator[Setting]:
    yield from recipe.settings
    if dataset is not None:
        yield from dataset.all_settings()
        if dataset.validation_interval is not None:
            # Lightning counts batches, the paper counts steps.
            accumulated = _get(config, "trainer.accumulate_grad_batches")
            factor = accumulated if _is_count(accumulated) else 1
            interval, *others = (
                factor * steps
                for steps in (
                    dataset.validation_interval,
                    *(interval for _, interval in dataset.other_schedules),
                )
            )
            key = "trainer.val_check_interval"
            yield Setting(key, interval, dataset.source, same=tuple(others))
    several = dataset.scales if dataset else (SIX_SCALES,)
    here = [_get(config, PROTOCOL + name) for name in ("scales", "flip")]
    if not any(_equal(here, [[*scales], True]) for scales in several):
        texts = " or ".join(_text(scales) for scales in several)
        source = f"{recipe.reference}; for multi-scale evaluation {texts} with flip"
        yield Setting(PROTOCOL + "scales", [1], source)
        yield Setting(PROTOCOL + "flip", False, source)


def _plain(config: Config, settings: Iterable[Setting]) -> Iterator[Departure]:
    skipped: list[str] = []
    for key, paper, source, same in settings:
        if key.startswith(tuple(skipped)):
            continue
        here = _get(config, key)
        if not any(_equal(here, value) for value in (paper, *same)):
            yield Departure(key, _text(paper), _text(here), source)
            if key.endswith("class_path"):  # arguments of another class do not compare
                skipped.append(key.replace("class_path", "init_args"))


def _backbone(config: Config, recipe: Recipe) -> Iterator[Departure]:
    if recipe.backbones and _backbone_name(config) not in recipe.backbones:
        here = _text(_get(config, NETWORK + "backbone"))
        yield Departure(NETWORK + "backbone", " or ".join(recipe.backbones), here, recipe.reference)


def _weights(config: Config, recipe: Recipe) -> Iterator[Departure]:
    whole, encoder = (_get(config, f"model.{key}") for key in ("weights", "encoder_weights"))
    is_pretrained = isinstance(encoder, str) or _get(config, NETWORK + "pretrained") is True
    if isinstance(whole, str):
        paper = "none: the head is randomly initialised"
        yield Departure("model.weights", paper, whole, recipe.reference)
    elif not is_pretrained:
        here = _text(encoder)
        yield Departure("model.encoder_weights", recipe.encoder_weights, here, recipe.reference)


def _callbacks(config: Config, recipe: Recipe) -> Iterator[Departure]:
    callbacks = _get(config, "trainer.callbacks")
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        name = str(_get(callback, "class_path")).rpartition(".")[2]
        if name in CHANGE_TRAINING and _get(callback, "init_args.compression") != "none":
            paper = "none that changes training"
            yield Departure("trainer.callbacks", paper, name, recipe.reference)


def _batch(config: Config, recipe: Recipe, dataset: DatasetRecipe | None) -> Iterator[Departure]:
    """Compare the samples per step, and whether BatchNorm normalises over all of them."""
    factors = {
        "batch_size": _get(config, "data.batch_size"),
        "devices": _devices(config),
        "num_nodes": _get(config, "trainer.num_nodes"),
        "accumulate_grad_batches": _get(config, "trainer.accumulate_grad_batches"),
    }
    if dataset is not None and dataset.samples_per_step is not None:
        is_known = all(map(_is_count, factors.values()))
        total = math.prod(factors.values()) if is_known else "not known"
        if total != dataset.samples_per_step:
            product = " x ".join(f"{name} {_text(value)}" for name, value in factors.items())
            paper = f"{dataset.samples_per_step} samples per step"
            here = f"{product} = {total}"
            yield Departure("data.batch_size", paper, here, dataset.schedule_source)
    if recipe.batch_norm is None:
        return
    accumulated = factors["accumulate_grad_batches"]
    if accumulated != 1:
        paper = "1: BatchNorm statistics over all samples of a step"
        here = f"{_text(accumulated)}: BatchNorm statistics over one batch"
        yield Departure("trainer.accumulate_grad_batches", paper, here, recipe.reference)
    synchronized = _get(config, "trainer.sync_batchnorm")
    if synchronized is not True and (factors["devices"], factors["num_nodes"]) != (1, 1):
        devices = _text(factors["devices"])
        here = f"{_text(synchronized)}, devices {devices}: BatchNorm statistics per device"
        yield Departure("trainer.sync_batchnorm", "true", here, recipe.batch_norm)


def _devices(config: Config) -> Any:
    """Return the number of devices per node, or the value as stated, such as ``auto``."""
    given = _get(config, "trainer.devices")
    if isinstance(given, list):
        return len(given)
    if isinstance(given, str):
        if re.fullmatch(r"\d+", given):
            return int(given)
        if re.fullmatch(r"\d+(,\d+)*,?", given):  # device indices
            return len(re.findall(r"\d+", given))
        if given == "auto" and _get(config, "trainer.accelerator") == "cpu":
            return 1
    return given


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _equal(here: Any, paper: Any) -> bool:
    if isinstance(here, list | tuple) and isinstance(paper, list):
        return len(here) == len(paper) and all(map(_equal, here, paper))
    # True == 1 in Python, but they are different values in a configuration.
    return isinstance(here, bool) == isinstance(paper, bool) and bool(here == paper)


def _text(value: Any) -> str:
    """Format a value as in a configuration."""
    if value is NOT_STATED:
        return "not stated"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)
