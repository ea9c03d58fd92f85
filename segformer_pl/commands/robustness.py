"""``robustness --ckpt FILE --output DIR``: mIoU on corrupted pictures, the paper's Table 5."""

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
from segformer_pl.commands.predict import INTERRUPTED
from segformer_pl.data import StreamingSegmentationData
from segformer_pl.data.corruptions import GROUPS, PAPER_SEVERITIES, CorruptedImages
from segformer_pl.data.index import same_data
from segformer_pl.data.order import StoredOrder
from segformer_pl.data.streaming import Sample, Samples, Transforms, collate
from segformer_pl.data.transforms import to_tensors
from segformer_pl.errors import UserError
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
SCORES, PAGE, NUMBERS, FIGURE = (f"robustness.{kind}" for kind in ("csv", "md", "json", "png"))


def robustness(arguments: list[str]) -> None:
    """``robustness --ckpt FILE --output DIR``: mIoU on corrupted pictures."""
    parser = SegformerArgumentParser(
        prog=f"{PROG} robustness",
        description="Score a checkpoint on the validation pictures as they are and under 16 "
        f"corruptions at the paper's severities, {len(SETTINGS)} passes in all. Writes {SCORES}, "
        f"{PAGE} (Table 5), {NUMBERS} and {FIGURE}. Every finished pass is kept: the same command "
        "goes on where it was interrupted.",
    )
    parser.add_argument("--ckpt", required=True, help="checkpoint of a run of `fit`")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--data.path", type=str, help="where the data is, if not as trained")
    parser.add_argument(
        "--num_images",
        type=PositiveInt,
        help="pictures to score, evenly spaced over the split; all of them by default",
    )
    parser.add_argument(
        "--data.num_workers", type=NonNegativeInt, help="loader processes, if not as trained"
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the network runs",
    )
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    checkpoint = RunCheckpoint.read(options.ckpt)
    predictor = Predictor.from_weights(checkpoint.weights()).to(device)
    data = load_data(checkpoint, path=options.data.path, num_workers=options.data.num_workers)
    result = _score_all(predictor, data, checkpoint.digest, options.num_images, options.output)
    for name, text in {
        PAGE: markdown(result),
        NUMBERS: json.dumps(without_nan(as_dict(result)), indent=2) + "\n",
    }.items():
        atomic_write_text(options.output / name, text)
    with atomic_write(options.output / FIGURE) as stream:
        plot(result).savefig(stream, format="png", dpi=130)
    means = ", ".join(f"{group} {100 * mean:.1f}" for group, mean in result.groups.items())
    sys.stdout.write(
        f"mIoU in percent: clean {100 * result.clean:.1f}, corrupted {100 * result.mean:.1f} "
        f"({means})   table: {options.output / PAGE}\n"
    )


def _score_all(
    predictor: Predictor,
    data: StreamingSegmentationData,
    checkpoint: str,
    num_images: int | None,
    output: Path,
) -> Robustness:
    """Every setting that is not in the folder yet, and then all of them."""
    source = data.open("validation")
    order = StoredOrder(source.group_rows)
    if num_images is not None and num_images > order.num_rows:
        raise UserError(
            f"--num_images {num_images}: the validation split has {order.num_rows} pictures; give "
            "at most so many, or leave it out"
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
    file = output / SCORES
    scores = {(s.group, s.corruption, s.severity): s for s in read_scores(file)}
    for score in scores.values():
        _check_origin(file, asdict(score), origin)
    missing = [setting for setting in SETTINGS if setting not in scores]
    corrupted = CorruptedSamples(
        Samples(data.entry, source, order, to_tensors, data.on_bad_sample), missing, data.seed
    )
    batches = iter(_loader(corrupted, data, positions))
    try:
        with tqdm(total=len(missing) * num_images, unit="picture", disable=not missing) as progress:
            for group, name, severity in missing:
                progress.set_description(f"{name} {severity}" if severity else name)
                miou = _score(
                    predictor,
                    data,
                    islice(batches, -(-num_images // data.eval_batch_size)),
                    progress,
                )
                scores[group, name, severity] = Score(group, name, severity, miou, **origin)
                write_scores(file, [scores[key] for key in SETTINGS if key in scores])
    except KeyboardInterrupt:
        sys.stderr.write(
            f"interrupted: {len(scores)} of {len(SETTINGS)} passes are in {file}; the same command "
            "goes on with the others\n"
        )
        sys.exit(INTERRUPTED)
    return summarize([scores[setting] for setting in SETTINGS])


def _check_origin(file: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    for key, what in {
        "checkpoint": "checkpoint (its SHA-256)",
        "num_images": "number of pictures",
        "dataset": "data set",
        "fingerprint": "fingerprint of the shards",
    }.items():
        same = same_data if key == "fingerprint" else operator.eq
        if not same(there[key], here[key]):
            raise UserError(
                f"--output: {file} holds scores of something else: its {what} is {there[key]}, "
                f"here it is {here[key]}; give another folder, or remove that file"
            )


class CorruptedSamples(Dataset[Sample]):
    """Samples by (number of the setting, position): one loader reads for all settings."""

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
    """Batches setting by setting; none of them holds pictures of two."""
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


def _score(
    predictor: Predictor,
    data: StreamingSegmentationData,
    batches: Iterable[Batch],
    progress: "tqdm[Any]",
) -> float:
    """mIoU as ``validate`` computes it, of the predictions that ``predict`` makes."""
    num_classes, ignore_index = len(predictor.class_names), data.entry.labels.ignore_index
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=predictor.device)
    with torch.inference_mode():
        for batch in batches:
            batch = data.on_before_batch_transfer(batch, 0)  # says what was skipped
            pred = predictor.predict_batch(batch["image"])
            target = batch["label"].to(predictor.device)
            classes = as_classes(pred, target, num_classes, ignore_index)
            confusion += confusion_matrices(*classes, num_classes).sum(0)
            progress.update(len(batch["id"]))
    return mean_present(class_iou(class_counts(confusion.double()))).item()
