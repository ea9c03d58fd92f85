"""What is wrong with a run, said before its first step: data, labels, throughput, memory, recipe.

:func:`examine` looks at a task, its data and its trainer as the command line builds them, reads a
sample of every split, takes a few training steps' worth of time, and says in plain words what it
found and what to do about it.
"""

import copy
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from tqdm import tqdm

from segformer_pl.analysis.complexity import complexity
from segformer_pl.data import DataError, StreamingSegmentationData
from segformer_pl.data.order import EpochShuffle, StoredOrder
from segformer_pl.data.sources import Source, Split
from segformer_pl.data.streaming import Samples, Transforms, collate
from segformer_pl.data.transforms import to_tensors
from segformer_pl.losses import cross_entropy
from segformer_pl.models.checkpoints import load_weights
from segformer_pl.task import SegmentationTask

NUM_SAMPLES = 200  # looked at in each split
NUM_GROUPS = 20  # row groups that they are taken from
GROUPS_BYTES = 512 << 20  # kept in memory meanwhile
TIMED_STEPS = 3
MIN_SIDE = 29  # pixels: the first stage must hold one window of its reduced keys and values
FEW_LANES = 16
GIB = 1 << 30

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong (``error``) or most likely is (``warning``).

    Attributes:
        level: An error ends the run or spoils its result.
        check: Short name of what was looked at.
        message: What, where, and what to do.
    """

    level: Level
    check: str
    message: str


@dataclass
class Examination:
    """What :func:`examine` found, and the figures it found on the way."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def error(self, check: str, message: str) -> None:
        self.findings.append(Finding("error", check, message))

    def warning(self, check: str, message: str) -> None:
        self.findings.append(Finding("warning", check, message))

    @property
    def has_errors(self) -> bool:
        return any(finding.level == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {"findings": [asdict(finding) for finding in self.findings], "facts": self.facts}

    def __str__(self) -> str:
        lines = []
        for section, figures in self.facts.items():
            lines.append(section)
            lines += [f"  {name}: {value}" for name, value in figures.items()]
        lines += [f"{f.level}: [{f.check}] {f.message}" for f in self.findings]
        lines.append(
            f"{sum(f.level == 'error' for f in self.findings)} errors, "
            f"{sum(f.level == 'warning' for f in self.findings)} warnings"
        )
        return "\n".join(lines)


def examine(
    task: SegmentationTask, data: StreamingSegmentationData, trainer: pl.Trainer
) -> Examination:
    """Look for what would go wrong in ``trainer.fit(task, data)``, without training."""
    found = Examination()
    _examine_recipe(found, task, data, trainer)
    _examine_weights(found, task)
    splits = {split: _examine_split(found, data, split) for split in ("train", "validation")}
    train, validation = splits["train"], splits["validation"]
    if train and validation:
        _compare_splits(found, train, validation)
    if train:
        _examine_plan(found, data, trainer, train)
        _examine_cost(found, task, data, trainer, train)
    return found


# ---- the splits ----


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
class _Look:
    """What a look at a split brought."""

    source: Any
    positions: list[int]
    sound: list[int] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: Counter[int] = field(default_factory=Counter)  # by train id
    in_pictures: Counter[int] = field(default_factory=Counter)
    digests: dict[int, str] = field(default_factory=dict)  # of the pictures: id


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


def _samples(data: StreamingSegmentationData, source: Any, transforms: Transforms) -> Samples:
    return Samples(data.entry, source, StoredOrder(source.group_rows), transforms)


def _examine_split(
    found: Examination, data: StreamingSegmentationData, split: Split
) -> _Look | None:
    try:
        source = _Kept(data.open(split))
    except DataError as error:
        found.error("open", str(error))
        return None
    look = _Look(source, _spread(source))
    failed: list[str] = []
    names: Counter[str] = Counter()
    flat: list[str] = []
    unlabelled: list[str] = []
    for position, sample, why in _read(data, look, split):
        if sample is None:
            failed.append(why)
            continue
        look.sound.append(position)
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
        found.error(
            "samples",
            f"{len(failed)} of {total} {split} samples cannot be used, the first: {failed[0]}; or "
            "pass over them with --data.on_bad_sample skip",
        )
    if not look.sound:
        return None
    _report_split(found, data, split, look)
    if flat:
        found.error(
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
    _examine_sizes(found, data, split, look)
    return look


def _read(
    data: StreamingSegmentationData, look: _Look, split: Split
) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    samples = _samples(data, look.source, to_tensors)
    for position in tqdm(look.positions, f"looking at {split}", leave=False):
        try:
            yield position, samples[position], ""
        except DataError as error:
            yield position, None, str(error)


def _report_split(
    found: Examination, data: StreamingSegmentationData, split: Split, look: _Look
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
    found: Examination, data: StreamingSegmentationData, split: Split, look: _Look
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
    if missing and len(look.sound) >= NUM_SAMPLES / 4 and len(missing) < labels.num_classes:
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
    found: Examination, data: StreamingSegmentationData, split: Split, look: _Look
) -> None:
    smallest = min(min(size) for size in look.sizes)
    if smallest < MIN_SIDE:
        found.error(
            "sizes",
            f"{split} pictures are down to {smallest} pixels on a side, but MiT needs "
            f"{MIN_SIDE}; enlarge them",
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
    if min(transforms.crop_size) < MIN_SIDE:
        found.error(
            "sizes",
            f"crops of {list(transforms.crop_size)} pixels are smaller than the {MIN_SIDE} that "
            "MiT needs; enlarge --data.crop_size",
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


def _compare_splits(found: Examination, train: _Look, validation: _Look) -> None:
    shared = train.digests.keys() & validation.digests.keys()
    if shared:
        digest = next(iter(shared))
        found.error(
            "splits",
            f"{len(shared)} of the pictures looked at are in train and in validation, such as "
            f"{train.digests[digest]!r} and {validation.digests[digest]!r}; scores would say "
            "nothing: take them out of one of the two",
        )


# ---- who reads what, how fast, how large ----


def _examine_plan(
    found: Examination, data: StreamingSegmentationData, trainer: pl.Trainer, train: _Look
) -> None:
    source = train.source
    order = EpochShuffle(source.group_rows, source.group_bytes, data.seed)
    num_readers = trainer.world_size * max(data.num_workers, 1)
    found.facts["plan"] = {
        "devices": trainer.world_size,
        "loader processes per device": data.num_workers,
        "samples per step": data.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
        "largest row group (MB)": round(max(source.group_bytes) / 1e6, 1),
        "lanes": order.num_lanes,
        "lanes per reader": round(order.num_lanes / num_readers, 2),
    }
    if order.num_lanes < FEW_LANES:
        found.warning(
            "plan",
            f"row groups of {max(source.group_bytes) / 1e6:.0f} MB leave memory for "
            f"{order.num_lanes} at a time, so batches mix few of them; write the shards with "
            "smaller row groups (row_group_size in pyarrow.parquet.write_table)",
        )
    global_batch = data.batch_size * trainer.world_size
    if order.num_rows < global_batch:
        found.warning(
            "plan",
            f"one batch over all devices takes {global_batch} samples, but there are "
            f"{order.num_rows} training pictures; lower --data.batch_size",
        )


def _examine_cost(
    found: Examination,
    task: SegmentationTask,
    data: StreamingSegmentationData,
    trainer: pl.Trainer,
    train: _Look,
) -> None:
    if found.has_errors:  # a batch of this data cannot be made, or would mean nothing
        return
    samples = _samples(data, train.source, data.train_transforms)
    begin = time.perf_counter()
    loaded = [samples[position] for position in tqdm(train.sound, "loading", leave=False)]
    rate = len(loaded) / (time.perf_counter() - begin)
    batch = collate([loaded[index % len(loaded)] for index in range(min(data.batch_size, 8))])
    height, width = batch["image"].shape[2:]
    device = trainer.strategy.root_device
    cost = complexity(task.network, height, width, batch["image"].shape[1])
    # Parameters, their gradients and AdamW's two moments, four bytes each.
    needed = data.batch_size * cost.activation_bytes + 16 * cost.num_parameters
    available = _memory(device)
    figures: dict[str, Any] = {
        "loading (samples/s and process)": round(rate, 1),
        "training memory at least (GiB)": round(needed / GIB, 2),
        "memory of the device (GiB)": round(available / GIB, 1),
    }
    found.facts["cost"] = figures
    if needed > available:
        found.error(
            "memory",
            f"training needs at least {needed / GIB:.1f} GiB for batches of {data.batch_size} at "
            f"{height}x{width}, the device has {available / GIB:.1f}; lower --data.batch_size and "
            "raise --trainer.accumulate_grad_batches in turn",
        )
        return
    step = _time_step(task, batch, device) * data.batch_size / len(batch["id"])
    wanted = data.batch_size / step
    figures["a step takes (s)"] = round(step, 3)
    figures["it needs (samples/s)"] = round(wanted, 1)
    if data.num_workers == 0 and wanted > 2 * rate:
        found.warning(
            "throughput",
            f"without loader processes a step of {step:.2f} s waits {data.batch_size / rate:.2f} s "
            "for its samples; set --data.num_workers 1 or more",
        )
    elif data.num_workers and wanted > rate * data.num_workers:
        found.warning(
            "throughput",
            f"a step takes {wanted:.0f} samples/s and {data.num_workers} loader processes bring "
            f"{rate * data.num_workers:.0f}; set --data.num_workers {-(-wanted // rate):.0f}",
        )


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _time_step(task: SegmentationTask, batch: dict[str, Any], device: torch.device) -> float:
    """Median seconds of forward and backward on one device; the task is left as it was."""
    task = copy.deepcopy(task).to(device).train()
    images, labels = batch["image"].to(device), batch["label"].to(device)
    times = []
    for _ in tqdm(range(TIMED_STEPS + 1), "timing a step", leave=False):
        begin = time.perf_counter()
        cross_entropy(task(images), labels, task.ignore_index).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))


# ---- the recipe ----


def _examine_weights(found: Examination, task: SegmentationTask) -> None:
    parts: Sequence[tuple[str | None, Literal["all", "encoder"]]] = (
        (task.weights, "all"),
        (task.encoder_weights, "encoder"),
    )
    for source, part in parts:
        if source is not None:
            try:
                load_weights(copy.deepcopy(task.network), source, parts=part)
            except ValueError as error:
                found.error("weights", str(error))


def _examine_recipe(
    found: Examination,
    task: SegmentationTask,
    data: StreamingSegmentationData,
    trainer: pl.Trainer,
) -> None:
    max_steps, check = trainer.max_steps, trainer.val_check_interval
    if max_steps < 1:
        found.error(
            "recipe",
            "trainer.max_steps is not set, and the learning-rate schedule is counted in steps; "
            "give --trainer.max_steps N",
        )
    elif task.warmup_steps >= max_steps:
        found.error(
            "recipe",
            f"the learning rate warms up for {task.warmup_steps} steps, but training ends after "
            f"{max_steps}: it never gets there; lower --model.warmup_steps",
        )
    batches = max_steps * trainer.accumulate_grad_batches
    validates = trainer.limit_val_batches != 0
    if max_steps > 0 and validates and isinstance(check, int) and check > batches:
        found.warning(
            "recipe",
            f"validation comes every {check} batches, but training ends after {batches}; lower "
            "--trainer.val_check_interval",
        )
    head_lr = task.lr * task.head_lr_mult
    if task.lr <= 0 or head_lr > 0.1:
        found.warning(
            "recipe",
            f"learning rates of {task.lr:g} in the encoder and {head_lr:g} outside it are far from "
            "what AdamW trains SegFormer with (6e-5 and 6e-4 from ImageNet weights, up to some "
            "1e-2 from scratch); check --model.lr and --model.head_lr_mult",
        )
    if float(task.image_mean.max()) > 1 or float(task.image_std.max()) > 1:
        found.error(
            "recipe",
            "model.image_mean and model.image_std are for pixels of 0 to 255, but batches hold 0 "
            "to 1; divide them by 255",
        )
    # Lightning keeps what --trainer.sync_batchnorm asked for nowhere else.
    synchronized = getattr(trainer.strategy, "_layer_sync", None) is not None
    if synchronized and trainer.strategy.root_device.type != "cuda":
        found.error(
            "recipe",
            "trainer.sync_batchnorm works on GPUs only; take it away, plain BatchNorm is used then",
        )
    if data.batch_size == 1 and not (synchronized and trainer.world_size > 1):
        found.warning(
            "recipe",
            "the head's BatchNorm sees one picture at a time with --data.batch_size 1; give more, "
            "or --trainer.sync_batchnorm true on several GPUs",
        )
    if trainer.precision == "16-mixed" and trainer.strategy.root_device.type != "cuda":
        found.error("recipe", "trainer.precision 16-mixed needs a GPU; use bf16-mixed or 32-true")
