"""Checks of each split: files, labels, classes and image sizes."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from segformer_pl.data import StreamingSegmentationData
from segformer_pl.data.order import StoredOrder
from segformer_pl.data.palette_colors import FirstColors, PaletteColors
from segformer_pl.data.sources import Source, Split
from segformer_pl.data.streaming import Sample
from segformer_pl.data.transforms import to_tensors
from segformer_pl.doctor.findings import Examination
from segformer_pl.errors import UserError, counted
from segformer_pl.models.segmenter import Segmenter

NUM_SAMPLES = 200  # samples examined per split
NUM_GROUPS = 20  # row groups from which the samples are taken
GROUPS_BYTES = 512 << 20  # limit of the row groups that are cached in memory


class _CachedSource:
    """A source that keeps every row group in memory once it has been read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.cache: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, group: int) -> Any:
        """Return the rows of a row group."""
        if group not in self.cache:
            self.cache[group] = self.source.read(group)
        return self.cache[group]


@dataclass
class SplitSummary:
    """Statistics of the examined samples of a split.

    Attributes:
        source: Source of the rows.
        positions: Positions of the examined samples in the stored order.
        usable: Positions of the samples that could be loaded.
        sizes: Number of samples by (height, width) in pixels.
        pixels: Number of pixels by train id.
        bands: Number of values, their sum and that of their squares, of each band, (3, num_bands).
        digests: Sample id by hash of the image, to detect images that occur in two splits.
        palettes: Colours of the palette indices of label images.
    """

    source: Any
    positions: list[int]
    usable: list[int] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: Counter[int] = field(default_factory=Counter)
    bands: npt.NDArray[np.float64] | None = None
    digests: dict[int, str] = field(default_factory=dict)
    palettes: FirstColors = field(default_factory=dict)

    def add_bands(self, image: Tensor) -> None:
        """Add the values of an image (num_bands, H, W)."""
        values = image.flatten(1).double()
        sums = torch.stack([torch.ones_like(values), values, values.square()]).sum(2).numpy()
        self.bands = sums if self.bands is None else self.bands + sums

    def normalization(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of each band, over all images in 0 to 1."""
        assert self.bands is not None
        number, total, squares = self.bands
        mean = total / number
        std = np.sqrt(np.maximum(squares / number - mean**2, 0))
        return mean.round(4).tolist(), std.round(4).tolist()


def _spread(source: Source) -> list[int]:
    """Choose positions that are spread over the split but lie in few row groups.

    With 3 of 9 row groups and 2 samples from each::

        row groups   |....|....|....|....|....|....|....|....|....|
        chosen       |x..x|    |    |    |x..x|    |    |    |x..x|
    """
    rows = np.array(source.group_rows)
    num_groups = min(NUM_GROUPS, max(GROUPS_BYTES // max(*source.group_bytes, 1), 1))
    filled = np.flatnonzero(rows)
    if rows.max() == 1:  # every image is its own group, in an image folder
        num_groups = NUM_SAMPLES
    chosen = filled[np.unique(np.linspace(0, len(filled) - 1, num_groups).round().astype(int))]
    starts = np.cumsum(rows) - rows
    per_group = -(-NUM_SAMPLES // len(chosen))
    return [
        int(starts[group] + row)
        for group in chosen
        for row in np.unique(np.linspace(0, rows[group] - 1, per_group).round().astype(int))
    ]


def examine_split(
    examination: Examination, network: Segmenter, data: StreamingSegmentationData, split: Split
) -> SplitSummary | None:
    """Examine up to :data:`NUM_SAMPLES` samples of a split.

    Args:
        examination: Receives findings and facts.
        network: The network, for the smallest image that it accepts.
        data: The data.
        split: Name of the split.

    Returns:
        Statistics of the samples; None if the split cannot be opened or no sample can be loaded.
    """
    try:
        source = _CachedSource(data.open(split))
    except UserError as error:
        examination.error("open", str(error))
        return None
    for level, remark in source.remarks:
        (examination.error if level == "error" else examination.warning)("files", remark)
    summary = SplitSummary(source, _spread(source))
    failed: list[str] = []
    num_skippable = 0
    notices: dict[str, list[str]] = {}  # by kind
    names: Counter[str] = Counter()
    constant: list[str] = []
    unlabelled: list[str] = []
    for position, sample, reason in _read(data, summary, split):
        if sample is None or sample["skipped"]:
            failed.append(reason)
            num_skippable += sample is not None
            continue
        summary.usable.append(position)
        for kind, notice in sample["notices"].items():
            notices.setdefault(kind, []).append(notice)
        summary.palettes.update(sample["palettes"])
        name, label = sample["id"], sample["label"].numpy()
        names[name] += 1
        summary.sizes[label.shape] += 1
        summary.add_bands(sample["image"])
        values, counts = np.unique(label, return_counts=True)
        summary.pixels.update(dict(zip(values.tolist(), counts.tolist())))
        if values.tolist() == [data.entry.labels.ignore_index]:
            unlabelled.append(name)
        if sample["image"].std() < 1e-3:
            constant.append(name)
        else:
            summary.digests[hash(sample["image"].numpy().tobytes())] = name
    total = len(summary.positions)
    if failed:
        advice = ""
        if num_skippable:
            which = "them" if num_skippable == len(failed) else f"{num_skippable} of them"
            advice = f"; or skip {which} with --data.on_bad_sample skip"
        examination.error(
            "samples",
            f"{len(failed)} of {total} {split} samples cannot be used; the first: {failed[0]}"
            f"{advice}",
        )
    if not summary.usable:
        return None
    _report_split(examination, data, split, summary)
    for kind, texts in notices.items():
        examination.warning(kind, f"{len(texts)} of {total} {split} samples; the first: {texts[0]}")
    if constant:
        level = examination.error if len(constant) == len(summary.usable) else examination.warning
        level(
            "images",
            f"{len(constant)} of {total} {split} images have a single colour; the first is "
            f"{constant[0]!r}; check how they were written",
        )
    if unlabelled:
        level = examination.error if len(unlabelled) == len(summary.usable) else examination.warning
        level(
            "labels",
            f"{len(unlabelled)} of {total} {split} images have no labelled pixel; the first is "
            f"{unlabelled[0]!r}; check labels.ignored, or remove these images",
        )
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        examination.warning(
            "ids",
            f"{counted(len(repeated), 'id')} shared by several {split} samples, such as "
            f"{repeated[0]!r}; "
            "give every row a unique id, or none (id_column: null)",
        )
    _examine_labels(examination, data, split, summary)
    _examine_sizes(examination, network, data, split, summary)
    return summary


def _read(
    data: StreamingSegmentationData, summary: SplitSummary, split: Split
) -> Iterator[tuple[int, Sample | None, str]]:
    """Load the chosen samples; yield position, sample (None on failure) and the error message."""
    # With "skip", errors that a run could skip are recorded in the sample. Others, such as a
    # network failure, are raised.
    order = StoredOrder(summary.source.group_rows)
    samples = data.samples(split, summary.source, order, to_tensors, "skip")
    for position in tqdm(summary.positions, f"examining {split}", leave=False):
        try:
            sample = samples[position]
            yield position, sample, next(iter(sample["skipped"].values()), "")
        except UserError as error:
            yield position, None, str(error)


def _report_split(
    examination: Examination, data: StreamingSegmentationData, split: Split, summary: SplitSummary
) -> None:
    """Report the facts of a split, and warn if its number of samples is not the known one."""
    labels = data.entry.labels
    num_rows, expected = sum(summary.source.group_rows), data.entry.num_samples.get(split)
    if expected is not None and num_rows != expected:
        examination.warning(
            "splits",
            f"{split} has {num_rows} images, but data set {data.entry.name!r} is listed with "
            f"{expected}; check whether shards are missing or of another version",
        )
    total = sum(summary.pixels.values())
    shares = {
        name: round(summary.pixels[index] / total, 4) for index, name in enumerate(labels.names)
    }
    mean, std = summary.normalization()
    examination.facts[split] = {
        "images": num_rows,
        "row groups": len(summary.source.group_rows),
        "samples read": len(summary.positions),
        "sizes (height, width)": [list(size) for size, _ in summary.sizes.most_common(5)],
        "mean of each band": mean,
        "standard deviation of each band": std,
        "share of pixels": shares,
        "share without label": round(summary.pixels[labels.ignore_index] / total, 4),
    }


def _examine_labels(
    examination: Examination, data: StreamingSegmentationData, split: Split, summary: SplitSummary
) -> None:
    """Check the share of unlabelled pixels, missing classes and class imbalance."""
    labels = data.entry.labels
    labelled = sum(summary.pixels.values()) - summary.pixels[labels.ignore_index]
    if not labelled:
        return
    ignored = 1 - labelled / sum(summary.pixels.values())
    if ignored > 0.5:
        examination.warning(
            "labels",
            f"{ignored:.0%} of the {split} pixels have no label; check labels.ignored",
        )
    missing = [name for index, name in enumerate(labels.names) if not summary.pixels[index]]
    num_needed = min(NUM_SAMPLES // 4, sum(summary.source.group_rows))
    if missing and len(summary.usable) >= num_needed:
        level = examination.error if len(missing) == labels.num_classes - 1 else examination.warning
        level(
            "classes",
            f"{len(missing)} of {labels.num_classes} classes occur in none of the "
            f"{len(summary.usable)} examined {split} images: {', '.join(missing[:8])}; their IoU "
            "will be undefined or 0: check the label values, or remove the classes from the spec",
        )
    most_frequent, count = max(
        ((index, summary.pixels[index]) for index in range(labels.num_classes)), key=lambda c: c[1]
    )
    if count > 0.98 * labelled:
        examination.warning(
            "classes",
            f"{count / labelled:.1%} of the labelled {split} pixels are "
            f"{labels.names[most_frequent]!r}, so always predicting this class gives a high aAcc; "
            "compare the IoU of the other classes",
        )


def _examine_sizes(
    examination: Examination,
    network: Segmenter,
    data: StreamingSegmentationData,
    split: Split,
    summary: SplitSummary,
) -> None:
    """Check that image sizes fit the network, the batches and the crop."""
    smallest = min(min(size) for size in summary.sizes)
    if smallest < network.min_size:
        examination.error(
            "sizes",
            f"{split} images have sides of {smallest} pixels, but {type(network).__name__} needs "
            f"{network.min_size}; enlarge the images",
        )
    several = len(summary.sizes) > 1
    if split != "train" and several and data.eval_batch_size > 1:
        examination.error(
            "sizes",
            f"{split} images have {len(summary.sizes)} sizes, which cannot be stacked into batches "
            f"of {data.eval_batch_size}; set --data.eval_batch_size 1",
        )
    transforms = data.train_transforms
    scaled = transforms.scale_range is not None
    if split != "train":
        return
    if transforms.crop_size is None:
        if (several or scaled) and data.batch_size > 1:
            examination.error(
                "sizes",
                f"training images of several {'scales' if scaled else 'sizes'} cannot be stacked "
                f"into batches of {data.batch_size}; set --data.crop_size",
            )
        return
    if min(transforms.crop_size) < network.min_size:
        examination.error(
            "sizes",
            f"crops of {list(transforms.crop_size)} pixels are smaller than the "
            f"{network.min_size} that {type(network).__name__} needs; enlarge --data.crop_size",
        )
    mean_scale = float(np.mean(transforms.scale_range or (1.0, 1.0)))
    covered = []
    for size, count in summary.sizes.items():
        fit = 1.0
        if transforms.base_size is not None:
            long, short = transforms.base_size
            fit = min(long / max(size), short / min(size))
        sides = (
            min(side * fit * mean_scale / crop, 1.0)
            for side, crop in zip(size, transforms.crop_size)
        )
        covered += [float(np.prod(list(sides)))] * count
    if np.mean(covered) < 0.5:
        examination.warning(
            "sizes",
            f"images at scale {mean_scale:g} fill {np.mean(covered):.0%} of crops of "
            f"{list(transforms.crop_size)} pixels, and the rest is padding; lower --data.crop_size "
            "or raise --data.scale_range",
        )


def compare_splits(examination: Examination, train: SplitSummary, validation: SplitSummary) -> None:
    """Check that palettes agree between splits and that no image is in both.

    Args:
        examination: Receives the findings.
        train: Summary of the training split.
        validation: Summary of the validation split.
    """
    palettes = PaletteColors()
    palettes.merge(train.palettes, "train")
    if difference := palettes.merge(validation.palettes, "validation"):
        examination.warning("palette", f"the palettes of the splits differ: {difference}")
    shared = train.digests.keys() & validation.digests.keys()
    if shared:
        digest = next(iter(shared))
        examination.error(
            "splits",
            f"{len(shared)} of the examined images are in both train and validation, such as "
            f"{train.digests[digest]!r} and {validation.digests[digest]!r}; validation metrics "
            "would be biased: remove these images from one of the two",
        )
