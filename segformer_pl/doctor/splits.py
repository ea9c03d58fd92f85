"""A look at each split: does it open, do labels and spec fit, which classes and sizes are there."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from segformer_pl.data import StreamingSegmentationData
from segformer_pl.data.decoding import FirstColors, PaletteColors
from segformer_pl.data.order import StoredOrder
from segformer_pl.data.sources import Source, Split
from segformer_pl.data.streaming import Sample, Samples, Transforms
from segformer_pl.data.transforms import to_tensors
from segformer_pl.doctor.findings import Examination
from segformer_pl.errors import UserError
from segformer_pl.models.segmenter import Segmenter

NUM_SAMPLES = 200  # looked at in each split
NUM_GROUPS = 20  # row groups that they are taken from
GROUPS_BYTES = 512 << 20  # kept in memory meanwhile


class _Kept:
    """A source whose row groups stay in memory once they are read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.kept: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, group: int) -> Any:
        if group not in self.kept:
            self.kept[group] = self.source.read(group)
        return self.kept[group]


@dataclass
class Look:
    """What a look at a split brought."""

    source: Any
    positions: list[int]
    sound: list[int] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: Counter[int] = field(default_factory=Counter)  # by train id
    in_pictures: Counter[int] = field(default_factory=Counter)
    digests: dict[int, str] = field(default_factory=dict)  # of the pictures: id
    palettes: FirstColors = field(default_factory=dict)


def _spread(source: Source) -> list[int]:
    """Positions all over the split, out of a few row groups."""
    rows = np.array(source.group_rows)
    num_groups = min(NUM_GROUPS, max(GROUPS_BYTES // max(*source.group_bytes, 1), 1))
    filled = np.flatnonzero(rows)
    if rows.max() == 1:  # pictures in files
        num_groups = NUM_SAMPLES
    chosen = filled[np.unique(np.linspace(0, len(filled) - 1, num_groups).round().astype(int))]
    begins = np.cumsum(rows) - rows
    share = -(-NUM_SAMPLES // len(chosen))
    return [
        int(begins[group] + row)
        for group in chosen
        for row in np.unique(np.linspace(0, rows[group] - 1, share).round().astype(int))
    ]


def samples_of(data: StreamingSegmentationData, source: Any, transforms: Transforms) -> Samples:
    return Samples(data.entry, source, StoredOrder(source.group_rows), transforms)


def examine_split(
    found: Examination, network: Segmenter, data: StreamingSegmentationData, split: Split
) -> Look | None:
    try:
        source = _Kept(data.open(split))
    except UserError as error:
        found.error("open", str(error))
        return None
    for level, remark in source.remarks:
        (found.error if level == "error" else found.warning)("files", remark)
    look = Look(source, _spread(source))
    failed: list[str] = []
    num_skippable = 0
    noticed: dict[str, list[str]] = {}  # by kind
    names: Counter[str] = Counter()
    flat: list[str] = []
    unlabelled: list[str] = []
    for position, sample, why in _read(data, look, split):
        if sample is None or sample["skipped"]:
            failed.append(why)
            num_skippable += sample is not None
            continue
        look.sound.append(position)
        for kind, sentence in sample["notices"].items():
            noticed.setdefault(kind, []).append(sentence)
        look.palettes.update(sample["palettes"])
        name, label = sample["id"], sample["label"].numpy()
        names[name] += 1
        look.sizes[label.shape] += 1
        values, counts = np.unique(label, return_counts=True)
        look.pixels.update(dict(zip(values.tolist(), counts.tolist())))
        look.in_pictures.update(values.tolist())
        if values.tolist() == [data.entry.labels.ignore_index]:
            unlabelled.append(name)
        if sample["image"].std() < 1e-3:
            flat.append(name)
        else:
            look.digests[hash(sample["image"].numpy().tobytes())] = name
    total = len(look.positions)
    if failed:
        skip = ""
        if num_skippable:
            which = "them" if num_skippable == len(failed) else f"{num_skippable} of them"
            skip = f"; or pass over {which} with --data.on_bad_sample skip"
        found.error(
            "samples",
            f"{len(failed)} of {total} {split} samples cannot be used, the first: {failed[0]}"
            f"{skip}",
        )
    if not look.sound:
        return None
    _report_split(found, data, split, look)
    for kind, sentences in noticed.items():
        found.warning(
            kind, f"{len(sentences)} of {total} {split} samples, the first of them: {sentences[0]}"
        )
    if flat:
        level = found.error if len(flat) == len(look.sound) else found.warning
        level(
            "pictures",
            f"{len(flat)} of {total} {split} pictures are of one single colour, the first is "
            f"{flat[0]!r}; check how they were written",
        )
    if unlabelled:
        level = found.error if len(unlabelled) == len(look.sound) else found.warning
        level(
            "labels",
            f"{len(unlabelled)} of {total} {split} pictures have no labelled pixel, the first is "
            f"{unlabelled[0]!r}; check the label spec's ignored values, or take them out",
        )
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        found.warning(
            "ids",
            f"{len(repeated)} ids stand for several {split} samples, such as {repeated[0]!r}; give "
            "every row an id of its own, or none (id_column: null)",
        )
    _examine_labels(found, data, split, look)
    _examine_sizes(found, network, data, split, look)
    return look


def _read(
    data: StreamingSegmentationData, look: Look, split: Split
) -> Iterator[tuple[int, Sample | None, str]]:
    # Skipping says which errors a run could pass over; others, as of a network, are raised.
    order = StoredOrder(look.source.group_rows)
    samples = Samples(data.entry, look.source, order, to_tensors, on_bad_sample="skip")
    for position in tqdm(look.positions, f"looking at {split}", leave=False):
        try:
            sample = samples[position]
            yield position, sample, next(iter(sample["skipped"].values()), "")
        except UserError as error:
            yield position, None, str(error)


def _report_split(
    found: Examination, data: StreamingSegmentationData, split: Split, look: Look
) -> None:
    labels = data.entry.labels
    num_rows, expected = sum(look.source.group_rows), data.entry.num_samples.get(split)
    if expected is not None and num_rows != expected:
        found.warning(
            "splits",
            f"{split} has {num_rows} pictures, but data set {data.entry.name!r} is known with "
            f"{expected}; check whether shards are missing, or are of another version",
        )
    total = sum(look.pixels.values())
    shares = {name: round(look.pixels[index] / total, 4) for index, name in enumerate(labels.names)}
    found.facts[split] = {
        "pictures": num_rows,
        "row groups": len(look.source.group_rows),
        "looked at": len(look.positions),
        "sizes (height, width)": [list(size) for size, _ in look.sizes.most_common(5)],
        "share of pixels": shares,
        "share without label": round(look.pixels[labels.ignore_index] / total, 4),
    }


def _examine_labels(
    found: Examination, data: StreamingSegmentationData, split: Split, look: Look
) -> None:
    labels = data.entry.labels
    labelled = sum(look.pixels.values()) - look.pixels[labels.ignore_index]
    if not labelled:
        return
    ignored = 1 - labelled / sum(look.pixels.values())
    if ignored > 0.5:
        found.warning(
            "labels",
            f"{ignored:.0%} of the {split} pixels carry no label; check the label spec's ignored "
            "values",
        )
    missing = [name for index, name in enumerate(labels.names) if not look.pixels[index]]
    num_needed = min(NUM_SAMPLES // 4, sum(look.source.group_rows))
    if missing and len(look.sound) >= num_needed:
        level = found.error if len(missing) == labels.num_classes - 1 else found.warning
        level(
            "classes",
            f"{len(missing)} of {labels.num_classes} classes are in none of the {len(look.sound)} "
            f"{split} pictures looked at: {', '.join(missing[:8])}; their IoU will be missing or "
            "0: check the label values, or take the classes out of the spec",
        )
    commonest, count = max(
        ((index, look.pixels[index]) for index in range(labels.num_classes)), key=lambda c: c[1]
    )
    if count > 0.98 * labelled:
        found.warning(
            "classes",
            f"{count / labelled:.1%} of the labelled {split} pixels are {labels.names[commonest]!r}"
            "; a network that answers nothing else looks right: watch the IoU of the others",
        )


def _examine_sizes(
    found: Examination,
    network: Segmenter,
    data: StreamingSegmentationData,
    split: Split,
    look: Look,
) -> None:
    smallest = min(min(size) for size in look.sizes)
    if smallest < network.min_size:
        found.error(
            "sizes",
            f"{split} images are down to {smallest} pixels on a side, but "
            f"{type(network).__name__} needs {network.min_size}; enlarge them",
        )
    several = len(look.sizes) > 1
    if split != "train" and several and data.eval_batch_size > 1:
        found.error(
            "sizes",
            f"{split} pictures have {len(look.sizes)} sizes, which do not fit into batches of "
            f"{data.eval_batch_size}; set --data.eval_batch_size 1",
        )
    transforms = data.train_transforms
    scaled = transforms.scale_range is not None
    if split != "train":
        return
    if transforms.crop_size is None:
        if (several or scaled) and data.batch_size > 1:
            found.error(
                "sizes",
                f"training pictures of several {'scales' if scaled else 'sizes'} do not fit into "
                f"batches of {data.batch_size}; set --data.crop_size",
            )
        return
    if min(transforms.crop_size) < network.min_size:
        found.error(
            "sizes",
            f"crops of {list(transforms.crop_size)} pixels are smaller than the "
            f"{network.min_size} that {type(network).__name__} needs; enlarge --data.crop_size",
        )
    mean_scale = float(np.mean(transforms.scale_range or (1.0, 1.0)))
    covered = []
    for size, count in look.sizes.items():
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
        found.warning(
            "sizes",
            f"pictures at scale {mean_scale:g} fill {np.mean(covered):.0%} of the crops of "
            f"{list(transforms.crop_size)} pixels, the rest is padding; lower --data.crop_size or "
            "raise --data.scale_range",
        )


def compare_splits(found: Examination, train: Look, validation: Look) -> None:
    palettes = PaletteColors()
    palettes.merge(train.palettes, "train")
    if sentence := palettes.merge(validation.palettes, "validation"):
        found.warning("palette", f"the palettes of the splits differ: {sentence}")
    shared = train.digests.keys() & validation.digests.keys()
    if shared:
        digest = next(iter(shared))
        found.error(
            "splits",
            f"{len(shared)} of the pictures looked at are in train and in validation, such as "
            f"{train.digests[digest]!r} and {validation.digests[digest]!r}; scores would say "
            "nothing: take them out of one of the two",
        )
