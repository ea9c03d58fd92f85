"""What a published training recipe consists of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from segformer_pl.normalization import IMAGENET_MEAN, IMAGENET_STD

NETWORK = "model.network.init_args."
LOSS = "model.loss.init_args."
PROTOCOL = "model.inference.init_args."

# Sources of the order of decay and warm-up
MMCV = "mmcv, lr_updater: the decay runs from step 0, warm-up multiplies it"
DETECTRON2 = "detectron2, WarmupPolyLR: the decay runs from step 0, warm-up multiplies it"

# Multi-scale evaluation, always with horizontal flips; mmsegmentation's default.
SIX_SCALES = (0.5, 0.75, 1, 1.25, 1.5, 1.75)

REMARKS = (
    "The reference trains unseeded; here seed_everything determines every random number.",
    "Random numbers come from another generator and in another order: the distributions are the "
    "same, the samples are not.",
    "The crop window is sampled before the image is scaled. JPEGs scaled to half or less are "
    "decoded at reduced size, with less aliasing.",
)


class _NotStated:
    """Type of the placeholder for values that a configuration lacks."""


NOT_STATED = _NotStated()


class Setting(NamedTuple):
    """The published value of one setting.

    Attributes:
        key: Dotted key in the configuration.
        paper: The published value.
        source: Source of the value.
        same: Other values that mean the same, or that another publication of the system states.
    """

    key: str
    paper: Any
    source: str
    same: tuple[Any, ...] = ()


def settings(values: Mapping[str, Any], source: str, prefix: str = "") -> tuple[Setting, ...]:
    """Return settings that have one source.

    Args:
        values: Published values by key.
        source: Source of all of them.
        prefix: Begin of every key.
    """
    return tuple(Setting(prefix + key, value, source) for key, value in values.items())


# Runs of versions without these settings had AdamW, a decay to 0, unscaled learning rates and
# unmerged queries.
EARLIER = (NOT_STATED,)


def adamw(
    lr: float, head_lr_mult: float, weight_decay: float, warmup_steps: int, power: float, src: str
) -> tuple[Setting, ...]:
    """Return the settings of AdamW with a polynomial decay to 0."""
    values = {
        "lr": lr,
        "head_lr_mult": head_lr_mult,
        "weight_decay": weight_decay,
        "warmup_steps": warmup_steps,
        "poly_power": power,
        "layer_decay": 1,
    }
    return (
        *settings(values, src, "model."),
        Setting("model.optimizer", "adamw", src, EARLIER),
        Setting("model.min_lr", 0, src, EARLIER),
        Setting("model.reference_batch_size", None, src, EARLIER),
    )


def sgd(
    head_lr_mult: float, weight_decay: float, power: float, min_lr: float, src: str
) -> tuple[Setting, ...]:
    """Return the settings of SGD with momentum 0.9, without warm-up and without learning rate."""
    values = {
        "optimizer": "sgd",
        "momentum": 0.9,
        "head_lr_mult": head_lr_mult,
        "weight_decay": weight_decay,
        "warmup_steps": 0,
        "poly_power": power,
        "min_lr": min_lr,
        "layer_decay": 1,
    }
    unscaled = Setting("model.reference_batch_size", None, src, EARLIER)
    return (*settings(values, src, "model."), unscaled)


def cross_entropy(average: str, src: str) -> tuple[Setting, ...]:
    """Return the settings of a plain cross-entropy."""
    values = {"average": average, "class_weights": None, "label_smoothing": 0}
    name = Setting("model.loss.class_path", "segformer_pl.losses.CrossEntropy", src)
    return (name, *settings(values, src, LOSS))


def training(
    trainer_source: str,
    data_source: str,
    schedule_source: str = MMCV,
    *,
    photometric: bool = True,
    scale_range: tuple[float, float] = (0.5, 2),
    gradient_clip: float | None = None,
) -> tuple[Setting, ...]:
    """Return the settings that the recipes have in common, apart from the arguments.

    Args:
        trainer_source: Source of the settings of the trainer.
        data_source: Source of the settings of images and evaluation.
        schedule_source: Source of the order of decay and warm-up.
        photometric: Whether colours are distorted.
        scale_range: Limits of the random scale.
        gradient_clip: Norm that the gradients are clipped to.
    """
    unclipped = (0,) if gradient_clip is None else ()
    return (
        Setting("model.schedule", "paper", schedule_source),
        Setting("model.freeze", None, schedule_source),
        Setting("model.image_mean", list(IMAGENET_MEAN), data_source),
        Setting("model.image_std", list(IMAGENET_STD), data_source),
        Setting("data.scale_range", list(scale_range), data_source),
        Setting("data.photometric", photometric, data_source),
        Setting("trainer.precision", "32-true", trainer_source, same=(None, 32, "32")),
        Setting("trainer.gradient_clip_val", gradient_clip, trainer_source, same=unclipped),
        Setting("trainer.fast_dev_run", False, trainer_source),
        Setting("trainer.overfit_batches", 0, trainer_source),
        Setting("trainer.max_time", None, trainer_source),
        Setting("trainer.limit_val_batches", None, data_source),
        Setting("model.inference.class_path", "segformer_pl.inference.Inference", data_source),
        Setting(PROTOCOL + "window_weights", "uniform", data_source),
    )


@dataclass(frozen=True)
class DatasetRecipe:
    """The settings of a recipe that depend on the data set.

    Attributes:
        names: Names of the data set in the catalogue.
        title: Name of the data set in texts.
        source: Source of the values.
        schedule_source: Source of the number of steps and of samples per step.
        max_steps: Number of training steps.
        samples_per_step: Number of samples per step, over all devices; None if not stated.
        crop: Height and width of the training crop in pixels.
        base: Longer and shorter side in pixels to which images are resized.
        validation_interval: Number of training steps between validations; None if not known.
        resizes_test_images: Whether test images are resized to ``base`` too.
        resize_to: Number whose multiples the sides of test images are stretched to.
        window: Side of the sliding window in pixels.
        stride: Stride of the sliding window in pixels.
        image_size: Longer and shorter side of all images in pixels; None if they differ.
        scales: Scales of a multi-scale evaluation, which has flips too; several if publications of
            the system differ.
        settings: Further settings that depend on the data set.
        remarks: Differences and unknowns of this data set.
        other_schedules: Other published numbers of steps, with their validation intervals.
    """

    names: tuple[str, ...]
    title: str
    source: str
    schedule_source: str
    max_steps: int
    samples_per_step: int | None
    crop: tuple[int, int]
    base: tuple[int, int]
    validation_interval: int | None
    resizes_test_images: bool = True
    resize_to: int | None = None
    window: int | None = None
    stride: int | None = None
    image_size: tuple[int, int] | None = None
    scales: tuple[tuple[float, ...], ...] = (SIX_SCALES,)
    settings: tuple[Setting, ...] = ()
    remarks: tuple[str, ...] = ()
    other_schedules: tuple[tuple[int, int], ...] = ()

    def all_settings(self) -> Iterator[Setting]:
        """Yield the published values of the settings that a configuration states directly."""
        other_steps = tuple(steps for steps, _ in self.other_schedules)
        yield Setting("trainer.max_steps", self.max_steps, self.schedule_source, same=other_steps)
        yield Setting("data.crop_size", [*self.crop], self.source)
        # None leaves images at their own size.
        own = (None,) if self.base == self.image_size else ()
        yield Setting("data.base_size", [*self.base], self.source, same=own)
        test_base = [*self.base] if self.resizes_test_images else None
        yield Setting(PROTOCOL + "base_size", test_base, self.source, same=own)
        yield Setting(PROTOCOL + "image_size", None, self.source)
        yield Setting(PROTOCOL + "resize_to", self.resize_to, self.source)
        for key, side in {"window": self.window, "stride": self.stride}.items():
            yield Setting(PROTOCOL + key, side and [side] * 2, self.source)
        yield from self.settings


@dataclass(frozen=True)
class Recipe:
    """How the authors of a system trained and evaluated it.

    Attributes:
        title: Name of the system in texts.
        reference: Source of the initial weights and of what the recipe leaves out.
        settings: Settings that do not depend on the data set.
        datasets: Settings by data set.
        encoder_weights: The initial weights, as text.
        batch_norm: Source that BatchNorm normalises over all samples of a step; None if the system
            trains no BatchNorm.
        backbones: Names of the published backbones in timm, without the tag of their weights. Empty
            if the network has no such argument.
        remarks: Differences from the reference that are not settings, and unknowns.
    """

    title: str
    reference: str
    settings: tuple[Setting, ...]
    datasets: tuple[DatasetRecipe, ...]
    encoder_weights: str
    batch_norm: str | None
    backbones: tuple[str, ...] = ()
    remarks: tuple[str, ...] = REMARKS
