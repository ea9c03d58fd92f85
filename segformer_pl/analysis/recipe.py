"""The paper's recipe as data, and how far a run departs from it.

The tables below say how Xie et al. trained and scored SegFormer-B0 ... B5, each value with the
place that states it: the paper, or where it is silent the configurations of the reference
(NVlabs/SegFormer at 65fa8cf). ``experiments/recipes`` says the same to the command line; a test
holds the two together.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from segformer_pl.normalization import IMAGENET_MEAN, IMAGENET_STD

Config = Mapping[str, Any]

PAPER = "paper Sec. 4.1"
CONFIG = "reference, local_configs/segformer"
PIPELINE = "reference, local_configs/_base_/datasets"
ENCODER = "reference, mix_transformer.py"
HEAD = "reference, segformer_head.py"
LOSS = "reference, mmseg/models/losses: one cross-entropy, averaged over all pixels"
WARM_UP = "reference, mmcv lr_updater: the decay runs from step 0, warm-up multiplies it"
CLOSEST = "UNVERIFIED, no configuration was released; closest: NVlabs/FAN cocostuff_repeat.py"

PROTOCOL = "model.inference.init_args."


@dataclass(frozen=True)
class Departure:
    """One setting of a run that is not the paper's, or that its configuration does not tell.

    Attributes:
        setting: Where the configuration has it, such as ``model.lr``.
        paper: The paper's value in words.
        here: The run's.
        source: What states the paper's value.
    """

    setting: str
    paper: str
    here: str
    source: str


class Setting(NamedTuple):
    """The paper's value of one setting; ``same`` are other ways to write it."""

    key: str
    paper: Any
    source: str
    same: tuple[Any, ...] = ()


ANY_DATASET = (
    Setting("model.lr", 6e-5, CONFIG),
    Setting("model.head_lr_mult", 10, CONFIG),
    Setting("model.weight_decay", 0.01, CONFIG),
    Setting("model.warmup_steps", 1500, CONFIG),
    Setting("model.schedule", "paper", WARM_UP),
    Setting("model.poly_power", 1, CONFIG),
    Setting("model.layer_decay", 1, CONFIG),
    Setting("model.loss.class_path", "segformer_pl.losses.CrossEntropy", LOSS),
    Setting("model.loss.init_args.average", "all", LOSS),
    Setting("model.loss.init_args.class_weights", None, PAPER),
    Setting("model.loss.init_args.label_smoothing", 0, LOSS),
    Setting("model.image_mean", list(IMAGENET_MEAN), PIPELINE),
    Setting("model.image_std", list(IMAGENET_STD), PIPELINE),
    Setting("data.scale_range", [0.5, 2], PIPELINE),
    Setting("data.photometric", True, PIPELINE),
    Setting("trainer.precision", "32-true", CONFIG, same=(None, 32, "32")),
    Setting("trainer.gradient_clip_val", None, CONFIG, same=(0,)),
    Setting("trainer.fast_dev_run", False, CONFIG),
    Setting("trainer.overfit_batches", 0, CONFIG),
    Setting("trainer.max_time", None, CONFIG),
    Setting("trainer.limit_val_batches", None, PIPELINE),
    Setting("model.inference.class_path", "segformer_pl.inference.Inference", PIPELINE),
    Setting(PROTOCOL + "pad_to", None, PIPELINE),
    Setting(PROTOCOL + "window_weights", "uniform", PIPELINE),
)

NETWORK = (
    Setting("num_heads", [1, 2, 5, 8], ENCODER),
    Setting("mlp_ratio", 4, ENCODER + "; Table 6 prints 8 for stages 1 and 2 of B0 to B4"),
    Setting("sr_ratios", [8, 4, 2, 1], ENCODER),
    Setting("kv_border", "drop", ENCODER),
    Setting("patch_sizes", [7, 3, 3, 3], ENCODER),
    Setting("strides", [4, 2, 2, 2], ENCODER),
    # None is K // 2 wherever patches overlap; where they do not, patch_sizes departs.
    Setting("paddings", [3, 1, 1, 1], ENCODER, same=(None,)),
    Setting("pos_encoding", "mix_ffn", "paper Sec. 3.1"),
    Setting("image_size", None, ENCODER),
    Setting("in_channels", 3, ENCODER),
    Setting("drop_path_rate", 0.1, ENCODER),
    Setting("norm_eps", 1e-6, ENCODER),
    Setting("conv_norm_eps", 1e-5, ENCODER),
    Setting("in_indices", [0, 1, 2, 3], HEAD),
    Setting("dropout", 0.1, HEAD),
)
DECODER_DIM = {"b0": 256, "b1": 256, "b2": 768, "b3": 768, "b4": 768, "b5": 768}


@dataclass(frozen=True)
class DatasetRecipe:
    """What depends on the data set; sizes in pixels, of ``base`` and ``pictures`` long and short.

    ``pictures`` is the size that all of them have, None where they differ.
    """

    title: str
    source: str
    max_steps: int
    samples_per_step: int
    crop: int
    base: tuple[int, int]
    validation_interval: int | None  # None: not known
    resize_to: int | None = None
    window: int | None = None
    stride: int | None = None
    pictures: tuple[int, int] | None = None

    def settings(self) -> Iterator[Setting]:
        steps = PAPER + " (its ablations: 40000)"
        yield Setting("trainer.max_steps", self.max_steps, steps)
        yield Setting("data.crop_size", [self.crop] * 2, self.source)
        yield Setting("data.base_size", [*self.base], self.source)
        own = (None,) if self.base == self.pictures else ()
        yield Setting(PROTOCOL + "base_size", [*self.base], self.source, same=own)
        yield Setting(PROTOCOL + "resize_to", self.resize_to, self.source)
        for key, side in {"window": self.window, "stride": self.stride}.items():
            yield Setting(PROTOCOL + key, side and [side] * 2, self.source)


def _ade20k(short: int) -> DatasetRecipe:
    return DatasetRecipe(
        title="ADE20K",
        max_steps=160_000,
        samples_per_step=16,
        crop=short,
        base=(2048, short),
        resize_to=32,
        validation_interval=16_000,
        source=PIPELINE,
    )


ADE20K = _ade20k(512)
ADE20K_B5 = _ade20k(640)
CITYSCAPES = DatasetRecipe(
    title="Cityscapes",
    max_steps=160_000,
    samples_per_step=8,
    crop=1024,
    base=(2048, 1024),
    pictures=(2048, 1024),
    window=1024,
    stride=768,
    validation_interval=4_000,
    source=PIPELINE,
)
COCO_STUFF = DatasetRecipe(
    title="COCO-Stuff",
    max_steps=80_000,
    samples_per_step=16,
    crop=512,
    base=(2048, 512),
    resize_to=32,
    validation_interval=None,
    source=CLOSEST,
)

# Of the multi-scale scores, with every picture mirrored too; others as the reference's default.
SCALES = {
    "ADE20K": [0.75, 0.875, 1, 1.125, 1.25],
    "Cityscapes": [0.5, 0.75, 1, 1.25, 1.5, 1.75, 2],
}
OTHER_SCALES = [0.5, 0.75, 1, 1.25, 1.5, 1.75]

CHANGE_TRAINING = (
    "BackboneFinetuning",
    "BatchSizeFinder",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LearningRateFinder",
    "ModelPruning",
    "StochasticWeightAveraging",
    "WeightAveraging",
)

# What the task takes where a configuration says null.
DEFAULTS = {
    "loss": {
        "class_path": "segformer_pl.losses.CrossEntropy",
        "init_args": {"average": "all", "class_weights": None, "label_smoothing": 0.0},
    },
    "inference": {
        "class_path": "segformer_pl.inference.Inference",
        "init_args": {
            **dict.fromkeys(("base_size", "resize_to", "pad_to", "window", "stride")),
            "window_weights": "uniform",
            "scales": [1.0],
            "flip": False,
        },
    },
}

REMARKS = (
    "The reference trains unseeded; here seed_everything decides every random number.",
    "The random numbers are drawn in another order, by another generator: the same distributions, "
    "not the same samples.",
    "The crop is drawn before the picture is scaled, and only the crop is resampled; a JPEG that "
    "is scaled to half or less is decoded small, with less aliasing.",
    "Which checkpoint the paper reports, the last or the best, is not stated.",
)
COCO_REMARK = (
    "The paper counts 172 classes of COCO-Stuff, the reference lists 182 and mmsegmentation 171: "
    "which of them 46.7 % belongs to is UNVERIFIED."
)


def scope(config: Config) -> str:
    """What :func:`departures` compares this run with, in one sentence."""
    variant, recipe = _variant(config), _dataset(config)
    if variant is None:
        network = _text(_get(config, "model.network.class_path"))
        return f"The network is {network}: the paper has no recipe for it, nothing is compared."
    name = f"SegFormer-{variant.upper()}"
    if recipe is None:
        return (
            f"The paper does not have the data set {_text(_get(config, 'data.dataset'))}: compared "
            f"with its recipe for {name} is what does not depend on the data set (not: steps, "
            "samples per step, crop, base size, validation interval, test size and windows)."
        )
    return f"Compared with the paper's recipe for {name} on {recipe.title}."


def remarks(config: Config) -> list[str]:
    """Differences from the paper that no setting changes, and what is not known of its recipe."""
    if _variant(config) is None:
        return []
    return [*REMARKS, *([COCO_REMARK] if _dataset(config) is COCO_STUFF else [])]


def departures(config: Config) -> list[Departure]:
    """Every setting in which a run is not the paper's recipe for its network and data set.

    Settings that the configuration does not tell are listed too, in words: those that it leaves
    out, and ``trainer.devices`` where the machine decides. Of the callbacks, those of Lightning
    that change training are known, not the user's own. See :func:`scope` for what is compared, and
    :func:`remarks` for what no setting changes.

    Args:
        config: The resolved configuration of a run as plain data: what ``config.yaml`` of its
            folder holds.

    Returns:
        In the order of the configuration; none if the paper has no recipe for the network.
    """
    variant, recipe = _variant(config), _dataset(config)
    if variant is None:
        return []
    given = config["model"]
    taken = {key: value for key, value in DEFAULTS.items() if given.get(key, NOT_STATED) is None}
    config = {**config, "model": {**given, **taken}}
    found = [*_plain(config, _settings(config, variant, recipe)), *_weights(config)]
    found += [*_callbacks(config), *_batch(config, recipe)]
    sections = ["model", "data", "trainer"]
    return sorted(found, key=lambda departure: sections.index(departure.setting.split(".")[0]))


def _variant(config: Config) -> str | None:
    path = _get(config, "model.network.class_path")
    match = re.fullmatch(r"segformer_pl\.models\.(?:\w+\.)*segformer_(b[0-5])", str(path))
    return match[1] if match else None


def _dataset(config: Config) -> DatasetRecipe | None:
    return {
        "ade20k": ADE20K_B5 if _variant(config) == "b5" else ADE20K,
        "cityscapes": CITYSCAPES,
        "coco_stuff171": COCO_STUFF,
        "coco_stuff182": COCO_STUFF,
    }.get(_get(config, "data.dataset"))


class _NotStated:
    """Instead of a value, where the configuration has none."""


NOT_STATED = _NotStated()


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return NOT_STATED
        value = value[name]
    return value


def _settings(config: Config, variant: str, recipe: DatasetRecipe | None) -> Iterator[Setting]:
    width = Setting("decoder_dim", DECODER_DIM[variant], f"{CONFIG}/{variant.upper()}")
    for setting in (*NETWORK, width):
        yield setting._replace(key="model.network.init_args." + setting.key)
    yield from ANY_DATASET
    if recipe is not None:
        yield from recipe.settings()
        if recipe.validation_interval is not None:
            # Lightning counts batches, the paper steps.
            accumulated = _get(config, "trainer.accumulate_grad_batches")
            batches = recipe.validation_interval * (accumulated if _is_count(accumulated) else 1)
            yield Setting("trainer.val_check_interval", batches, recipe.source)
    scales = SCALES.get(recipe.title, OTHER_SCALES) if recipe else OTHER_SCALES
    here = [_get(config, PROTOCOL + name) for name in ("scales", "flip")]
    if not _equal(here, [scales, True]):
        source = f"{PIPELINE}; for multi-scale scores {_text(scales)} with flip"
        yield Setting(PROTOCOL + "scales", [1], source)
        yield Setting(PROTOCOL + "flip", False, source)


def _plain(config: Config, settings: Iterable[Setting]) -> Iterator[Departure]:
    foreign: list[str] = []
    for key, paper, source, same in settings:
        if key.startswith(tuple(foreign)):
            continue
        here = _get(config, key)
        if not any(_equal(here, value) for value in (paper, *same)):
            yield Departure(key, _text(paper), _text(here), source)
            if key.endswith("class_path"):  # its arguments mean other things
                foreign.append(key.replace("class_path", "init_args"))


def _weights(config: Config) -> Iterator[Departure]:
    whole, encoder = (_get(config, f"model.{key}") for key in ("weights", "encoder_weights"))
    if isinstance(whole, str):
        yield Departure("model.weights", "none: the head starts at random", whole, CONFIG)
    elif not isinstance(encoder, str):
        paper = "pretrained on ImageNet-1K, mit_b*.pth"
        yield Departure("model.encoder_weights", paper, _text(encoder), CONFIG)


def _callbacks(config: Config) -> Iterator[Departure]:
    callbacks = _get(config, "trainer.callbacks")
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        name = str(_get(callback, "class_path")).rpartition(".")[2]
        if name in CHANGE_TRAINING:
            yield Departure("trainer.callbacks", "none that changes training", name, CONFIG)


def _batch(config: Config, recipe: DatasetRecipe | None) -> Iterator[Departure]:
    """Samples per step, and whether BatchNorm sees all of them."""
    factors = {
        "batch_size": _get(config, "data.batch_size"),
        "devices": _devices(config),
        "num_nodes": _get(config, "trainer.num_nodes"),
        "accumulate_grad_batches": _get(config, "trainer.accumulate_grad_batches"),
    }
    if recipe is not None:
        known = all(map(_is_count, factors.values()))
        total = math.prod(factors.values()) if known else "not known"
        if total != recipe.samples_per_step:
            product = " x ".join(f"{name} {_text(value)}" for name, value in factors.items())
            paper = f"{recipe.samples_per_step} samples per step"
            yield Departure("data.batch_size", paper, f"{product} = {total}", PAPER)
    accumulated = factors["accumulate_grad_batches"]
    if accumulated != 1:
        paper = "1: BatchNorm sees all samples of a step"
        here = f"{_text(accumulated)}: it sees those of one batch"
        yield Departure("trainer.accumulate_grad_batches", paper, here, CONFIG)
    synchronized = _get(config, "trainer.sync_batchnorm")
    if synchronized is not True and (factors["devices"], factors["num_nodes"]) != (1, 1):
        devices = _text(factors["devices"])
        here = f"{_text(synchronized)}, devices {devices}: BatchNorm sees the samples of one"
        yield Departure("trainer.sync_batchnorm", "true", here, HEAD)


def _devices(config: Config) -> Any:
    """Their number on one node, or the words that leave it to the machine."""
    given = _get(config, "trainer.devices")
    if isinstance(given, list):
        return len(given)
    if isinstance(given, str):
        if re.fullmatch(r"\d+", given):
            return int(given)
        if re.fullmatch(r"\d+(,\d+)*,?", given):  # their indices
            return len(re.findall(r"\d+", given))
        if given == "auto" and _get(config, "trainer.accelerator") == "cpu":
            return 1
    return given


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _equal(here: Any, paper: Any) -> bool:
    if isinstance(here, list | tuple) and isinstance(paper, list):
        return len(here) == len(paper) and all(map(_equal, here, paper))
    # In Python true is 1, but not in a configuration.
    return isinstance(here, bool) == isinstance(paper, bool) and bool(here == paper)


def _text(value: Any) -> str:
    """As the configuration has it."""
    if value is NOT_STATED:
        return "not stated"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)
