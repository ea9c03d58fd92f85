"""The paper's training recipe as data, and the departures of a run from it.

The tables below list how Xie et al. trained and evaluated SegFormer-B0 ... B5. Every value cites
its source: the paper, or where the paper does not state it, the configurations of the reference
(NVlabs/SegFormer at 65fa8cf). ``experiments/recipes`` holds the same recipes as configurations for
the command line; a test checks that the two agree.
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


class Setting(NamedTuple):
    """The paper's value of one setting.

    Attributes:
        key: Dotted key in the configuration.
        paper: The paper's value.
        source: Source of the value.
        same: Other values that mean the same.
    """

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
    # None means K // 2 for overlapping patches; for others, patch_sizes is already a departure.
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
    """The settings of the recipe that depend on the data set.

    Attributes:
        title: Name of the data set in texts.
        source: Source of the values.
        max_steps: Number of training steps.
        samples_per_step: Number of samples per step, over all devices.
        crop: Side of the square training crop in pixels.
        base: Longer and shorter side in pixels to which images are resized.
        validation_interval: Number of training steps between validations; None if not known.
        resize_to: Number whose multiples the sides of test images are stretched to.
        window: Side of the sliding window in pixels.
        stride: Stride of the sliding window in pixels.
        image_size: Longer and shorter side of all images in pixels; None if they differ.
    """

    title: str
    source: str
    max_steps: int
    samples_per_step: int
    crop: int
    base: tuple[int, int]
    validation_interval: int | None
    resize_to: int | None = None
    window: int | None = None
    stride: int | None = None
    image_size: tuple[int, int] | None = None

    def settings(self) -> Iterator[Setting]:
        """Yield the paper's values of the settings that a configuration states directly."""
        steps = PAPER + " (its ablations: 40000)"
        yield Setting("trainer.max_steps", self.max_steps, steps)
        yield Setting("data.crop_size", [self.crop] * 2, self.source)
        yield Setting("data.base_size", [*self.base], self.source)
        # None leaves images at their own size.
        own = (None,) if self.base == self.image_size else ()
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
    image_size=(2048, 1024),
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

# Multi-scale evaluation, always with horizontal flips. OTHER_SCALES is the reference's default.
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

# Defaults of the task where a configuration has null.
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
    "The reference trains unseeded; here seed_everything determines every random number.",
    "Random numbers come from another generator and in another order: the distributions are the "
    "same, the samples are not.",
    "The crop window is sampled before the image is scaled. JPEGs scaled to half or less are "
    "decoded at reduced size, with less aliasing.",
    "The paper does not state whether it reports the last or the best checkpoint.",
)
COCO_REMARK = (
    "The paper counts 172 classes of COCO-Stuff, the reference lists 182 and mmsegmentation 171. "
    "UNVERIFIED: which of these the reported 46.7 % mIoU refers to."
)


def scope(config: Config) -> str:
    """Return one sentence on what :func:`departures` compares this run with."""
    variant, recipe = _variant(config), _dataset(config)
    if variant is None:
        network = _text(_get(config, "model.network.class_path"))
        return f"The network is {network}: the paper has no recipe for it, nothing is compared."
    name = f"SegFormer-{variant.upper()}"
    if recipe is None:
        return (
            f"The paper does not have the data set {_text(_get(config, 'data.dataset'))}: compared "
            f"with its recipe for {name} in the settings that do not depend on the data set (not: "
            "steps, samples per step, crop, base size, validation interval, test size and windows)."
        )
    return f"Compared with the paper's recipe for {name} on {recipe.title}."


def remarks(config: Config) -> list[str]:
    """Return differences from the paper that are not settings, and unknowns of its recipe."""
    if _variant(config) is None:
        return []
    return [*REMARKS, *([COCO_REMARK] if _dataset(config) is COCO_STUFF else [])]


def departures(config: Config) -> list[Departure]:
    """Return every setting that differs from the paper's recipe for this network and data set.

    Settings with unknown values are listed as well: those that the configuration leaves out, and
    the number of devices if it is ``auto``. Of the callbacks, only those of Lightning that change
    training are recognised, not the user's own. See :func:`scope` for what is compared, and
    :func:`remarks` for differences that are not settings.

    Args:
        config: Resolved configuration of a run as plain data, the content of its ``config.yaml``.

    Returns:
        Departures in the order model, data, trainer; empty if the paper has no recipe for the
        network.
    """
    variant, recipe = _variant(config), _dataset(config)
    if variant is None:
        return []
    given = config["model"]
    defaults = {key: value for key, value in DEFAULTS.items() if given.get(key, NOT_STATED) is None}
    config = {**config, "model": {**given, **defaults}}
    result = [*_plain(config, _settings(config, variant, recipe)), *_weights(config)]
    result += [*_callbacks(config), *_batch(config, recipe)]
    sections = ["model", "data", "trainer"]
    return sorted(result, key=lambda departure: sections.index(departure.setting.split(".")[0]))


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
    """Type of the placeholder for values that a configuration lacks."""


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
            # Lightning counts batches, the paper counts steps.
            accumulated = _get(config, "trainer.accumulate_grad_batches")
            batches = recipe.validation_interval * (accumulated if _is_count(accumulated) else 1)
            yield Setting("trainer.val_check_interval", batches, recipe.source)
    scales = SCALES.get(recipe.title, OTHER_SCALES) if recipe else OTHER_SCALES
    here = [_get(config, PROTOCOL + name) for name in ("scales", "flip")]
    if not _equal(here, [scales, True]):
        source = f"{PIPELINE}; for multi-scale evaluation {_text(scales)} with flip"
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


def _weights(config: Config) -> Iterator[Departure]:
    whole, encoder = (_get(config, f"model.{key}") for key in ("weights", "encoder_weights"))
    if isinstance(whole, str):
        yield Departure("model.weights", "none: the head is randomly initialised", whole, CONFIG)
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
    """Compare the samples per step, and whether BatchNorm normalises over all of them."""
    factors = {
        "batch_size": _get(config, "data.batch_size"),
        "devices": _devices(config),
        "num_nodes": _get(config, "trainer.num_nodes"),
        "accumulate_grad_batches": _get(config, "trainer.accumulate_grad_batches"),
    }
    if recipe is not None:
        is_known = all(map(_is_count, factors.values()))
        total = math.prod(factors.values()) if is_known else "not known"
        if total != recipe.samples_per_step:
            product = " x ".join(f"{name} {_text(value)}" for name, value in factors.items())
            paper = f"{recipe.samples_per_step} samples per step"
            yield Departure("data.batch_size", paper, f"{product} = {total}", PAPER)
    accumulated = factors["accumulate_grad_batches"]
    if accumulated != 1:
        paper = "1: BatchNorm statistics over all samples of a step"
        here = f"{_text(accumulated)}: BatchNorm statistics over one batch"
        yield Departure("trainer.accumulate_grad_batches", paper, here, CONFIG)
    synchronized = _get(config, "trainer.sync_batchnorm")
    if synchronized is not True and (factors["devices"], factors["num_nodes"]) != (1, 1):
        devices = _text(factors["devices"])
        here = f"{_text(synchronized)}, devices {devices}: BatchNorm statistics per device"
        yield Departure("trainer.sync_batchnorm", "true", here, HEAD)


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
