"""``robustness --ckpt FILE --output FOLDER``: mIoU on corrupted images, the paper's Table 5."""

import json
import operator
import sys
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from segformer_pl.analysis.comparison import without_nan
from segformer_pl.analysis.robustness import (
    CLEAN,
    Robustness,
    Score,
    as_dict,
    markdown,
    plot,
    read_scores,
    summarize,
    write_scores,
)
from segformer_pl.atomic import atomic_write, atomic_write_text, make_writable_folder
from segformer_pl.batch import Batch
from segformer_pl.checkpoints.run_checkpoint import RunCheckpoint
from segformer_pl.checkpoints.run_data import load_data
from segformer_pl.commands.device import resolve_device
from segformer_pl.commands.parser import PROG, SegformerArgumentParser
from segformer_pl.data import StreamingSegmentationData
from segformer_pl.data.corruptions import GROUPS, PAPER_SEVERITIES, CorruptedImages
from segformer_pl.data.index import same_data
from segformer_pl.data.order import StoredOrder
from segformer_pl.data.streaming import Sample, Samples, Transforms, collate
from segformer_pl.data.transforms import to_tensors
from segformer_pl.errors import INTERRUPTED, UserError
from segformer_pl.inference import Predictor
from segformer_pl.metrics import (
    as_classes,
    class_counts,
    class_iou,
    confusion_matrices,
    mean_present,
)

Setting = tuple[str, str, int]  # group, corruption, severity
SETTINGS: list[Setting] = [
    (CLEAN, CLEAN, 0),
    *(
        (group, name, severity)
        for group, functions in GROUPS.items()
        for name in functions
        for severity in PAPER_SEVERITIES[name]
    ),
]
SCORES_FILE, TABLE_FILE, JSON_FILE, FIGURE_FILE = (
    f"robustness.{kind}" for kind in ("csv", "md", "json", "png")
)


def robustness(arguments: list[str]) -> None:
    """Run ``robustness --ckpt FILE --output FOLDER`` and write table, numbers and figure.

    Args:
        arguments: Command-line arguments after ``robustness``.

    Raises:
        UserError: An argument, the checkpoint or the data cannot be used, or the output folder
            contains results of another checkpoint or other data.
    """
    parser = SegformerArgumentParser(
        prog=f"{PROG} robustness",
        description="Measure the mIoU of a network on the validation images, clean and under 16 "
        "corruptions at the severities of the paper (Table 5, after ImageNet-C): "
        f"{len(SETTINGS)} evaluations of the split in all. Writes {SCORES_FILE} (mIoU of each "
        f"evaluation), {TABLE_FILE} (the paper's table), {JSON_FILE} and {FIGURE_FILE}. Every "
        "finished evaluation is stored, so the same command continues after an interruption.",
    )
    parser.add_argument("--ckpt", required=True, help="checkpoint of a run of `fit`")
    parser.add_argument("--output", required=True, help="folder that the files are written to")
    parser.add_argument(
        "--data.path",
        type=str,
        help="folder, hub name or URL pattern of the data set. Default: the path of the run",
    )
    parser.add_argument(
        "--num_images",
        type=PositiveInt,
        help="number of validation images, evenly spaced over the split. Default: all",
    )
    parser.add_argument(
        "--data.num_workers",
        type=NonNegativeInt,
        help="number of data-loader processes. Default: that of the run",
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device of the network",
    )
    options = parser.parse_args(arguments)
    device, output = resolve_device(options.device), Path(options.output)
    checkpoint = RunCheckpoint.read(options.ckpt)
    predictor = Predictor.from_weights(checkpoint.weights()).to(device)
    data = load_data(checkpoint, path=options.data.path, num_workers=options.data.num_workers)
    result = _evaluate_all(predictor, data, checkpoint.digest, options.num_images, output)
    for name, text in {
        TABLE_FILE: markdown(result),
        JSON_FILE: json.dumps(without_nan(as_dict(result)), indent=2) + "\n",
    }.items():
        atomic_write_text(output / name, text)
    with atomic_write(output / FIGURE_FILE) as stream:
        plot(result).savefig(stream, format="png", dpi=130)
    means = ", ".join(f"{group} {100 * mean:.1f}" for group, mean in result.groups.items())
    sys.stdout.write(
        f"mIoU in percent: clean {100 * result.clean:.1f}, corrupted {100 * result.mean:.1f} "
        f"({means})   table: {output / TABLE_FILE}\n"
    )


def _evaluate_all(
    predictor: Predictor,
    data: StreamingSegmentationData,
    checkpoint: str,
    num_images: int | None,
    output: Path,
) -> Robustness:
    """Evaluate the settings that the output folder lacks, and return the results of all.

    One data loader serves all missing settings, so its workers start once::

        missing settings     fog 3                 fog 4
        positions            0  2  4  6  8         0  2  4  6  8       (5 of 10 images)
        batches of 2         [0  2][4  6][8]       [0  2][4  6][8]     none holds two settings

    The scores of a setting are written as soon as its last batch is evaluated.
    """
    source = data.open("validation")
    order = StoredOrder(source.group_rows)
    if num_images is not None and num_images > order.num_rows:
        raise UserError(
            f"--num_images {num_images}: the validation split has {order.num_rows} images; give at "
            f"most {order.num_rows}, or leave the option out"
        )
    num_images = num_images or order.num_rows
    positions = [number * order.num_rows // num_images for number in range(num_images)]
    origin: dict[str, Any] = {
        "num_images": num_images,
        "dataset": data.entry.name,
        "fingerprint": source.fingerprint,
        "checkpoint": checkpoint,
    }
    make_writable_folder(output, "--output")
    file = output / SCORES_FILE
    scores = {(s.group, s.corruption, s.severity): s for s in read_scores(file)}
    for score in scores.values():
        _check_origin(file, asdict(score), origin)
    missing = [setting for setting in SETTINGS if setting not in scores]
    corrupted = CorruptedSamples(
        Samples(data.entry, source, order, to_tensors, data.on_bad_sample), missing, data.seed
    )
    batches = iter(_loader(corrupted, data, positions))
    try:
        with tqdm(total=len(missing) * num_images, unit="image", disable=not missing) as progress:
            for group, name, severity in missing:
                progress.set_description(f"{name} {severity}" if severity else name)
                miou = _miou(
                    predictor,
                    data,
                    islice(batches, -(-num_images // data.eval_batch_size)),
                    progress,
                )
                scores[group, name, severity] = Score(group, name, severity, miou, **origin)
                write_scores(file, [scores[key] for key in SETTINGS if key in scores])
    except KeyboardInterrupt:
        sys.stderr.write(
            f"interrupted: {len(scores)} of {len(SETTINGS)} evaluations are in {file}; the same "
            "command continues with the others\n"
        )
        sys.exit(INTERRUPTED)
    return summarize([scores[setting] for setting in SETTINGS])


def _check_origin(file: Path, stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise UserError if a stored score is of another checkpoint or of other images."""
    for key, description in {
        "checkpoint": "checkpoint (its SHA-256)",
        "num_images": "number of images",
        "dataset": "data set",
        "fingerprint": "fingerprint of the shards",
    }.items():
        same = same_data if key == "fingerprint" else operator.eq
        if not same(stored[key], current[key]):
            raise UserError(
                f"--output: {file} contains other results: its {description} is {stored[key]}, "
                f"here it is {current[key]}; give another folder, or remove that file"
            )


class CorruptedSamples(Dataset[Sample]):
    """Corrupted samples, indexed by (index of the setting, position in the split).

    Args:
        samples: Samples of the split; their transforms are replaced at every access.
        settings: Corruptions to apply.
        seed: Seed of the corruptions.
    """

    def __init__(self, samples: Samples, settings: list[Setting], seed: int) -> None:
        self.samples = samples
        self.transforms: list[Transforms] = [
            CorruptedImages(name, severity, seed) if severity else to_tensors
            for _, name, severity in settings
        ]

    def __len__(self) -> int:
        return len(self.transforms) * self.samples.order.num_rows

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        setting, position = key
        self.samples.transforms = self.transforms[setting]
        return self.samples[position]


def _loader(
    corrupted: CorruptedSamples, data: StreamingSegmentationData, positions: list[int]
) -> DataLoader[Sample]:
    """Return a loader that yields all batches of one setting before those of the next."""
    size = data.eval_batch_size
    return DataLoader(
        corrupted,
        batch_sampler=[
            [(setting, position) for position in positions[first : first + size]]
            for setting in range(len(corrupted.transforms))
            for first in range(0, len(positions), size)
        ],
        num_workers=data.num_workers,
        collate_fn=collate,
    )


def _miou(
    predictor: Predictor,
    data: StreamingSegmentationData,
    batches: Iterable[Batch],
    progress: "tqdm[Any]",
) -> float:
    """Return the mIoU as ``validate`` computes it, of the predictions that ``predict`` makes."""
    num_classes, ignore_index = len(predictor.class_names), data.entry.labels.ignore_index
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=predictor.device)
    with torch.inference_mode():
        for batch in batches:
            batch = data.on_before_batch_transfer(batch, 0)  # warns of skipped samples
            pred = predictor.predict_batch(batch["image"])
            target = batch["label"].to(predictor.device)
            classes = as_classes(pred, target, num_classes, ignore_index)
            confusion += confusion_matrices(*classes, num_classes).sum(0)
            progress.update(len(batch["id"]))
    return mean_present(class_iou(class_counts(confusion.double()))).item()
