"""``robustness --ckpt FILE --output FOLDER``: mIoU on corrupted images, the paper's Table 5."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from jsonargparse import Namespace

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
from segformer_pl.commands.options.robustness import FIGURE_FILE, JSON_FILE, SCORES_FILE, TABLE_FILE
from segformer_pl.commands.validation_split import (
    ValidationSplit,
    check_origin,
)
from segformer_pl.data.corruptions import GROUPS, PAPER_SEVERITIES, CorruptedImages
from segformer_pl.data.streaming import Transforms
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


def run(options: Namespace) -> None:
    """Run ``robustness --ckpt FILE --output FOLDER`` and write table, numbers and figure.

    Args:
        options: Options as ``options/robustness.py`` parses them.

    Raises:
        UserError: An argument, the checkpoint or the data cannot be used, or the output folder
            contains results of another checkpoint or other data.
    """
    device, output = resolve_device(options.device), Path(options.output)
    checkpoint = RunCheckpoint.read(options.ckpt)
    predictor = Predictor.from_weights(checkpoint.weights()).to(device)
    data = load_data(checkpoint, path=options.data.path, num_workers=options.data.num_workers)
    if data.num_bands != 3:
        raise UserError(
            f"--ckpt: the run reads images with {data.num_bands} bands, but the corruptions are "
            "defined for RGB; give a checkpoint of a run on RGB images"
        )
    split = ValidationSplit(data, options.num_images)
    result = _evaluate_all(predictor, split, checkpoint.digest, output)
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
    split: ValidationSplit,
    checkpoint: str,
    output: Path,
) -> Robustness:
    """Evaluate the settings that the output folder lacks, and return the results of all.

    The mIoU of a setting is written as soon as its last batch is evaluated.
    """
    origin = split.origin(checkpoint)
    make_writable_folder(output, "--output")
    file = output / SCORES_FILE
    scores = {(s.group, s.corruption, s.severity): s for s in read_scores(file)}
    for score in scores.values():
        check_origin(file, asdict(score), origin)
    named = {
        f"{setting[1]} {setting[2]}" if setting[2] else setting[1]: setting
        for setting in SETTINGS
        if setting not in scores
    }

    def evaluate(name: str, batches: Iterator[Batch]) -> None:
        setting, ignore_index = named[name], split.data.entry.labels.ignore_index
        scores[setting] = Score(*setting, _miou(predictor, ignore_index, batches), **origin)
        write_scores(file, [scores[key] for key in SETTINGS if key in scores])

    transforms = {
        name: corrupting_transforms(setting, split.data.seed) for name, setting in named.items()
    }
    split.evaluate(transforms, evaluate, len(SETTINGS), file)
    return summarize([scores[setting] for setting in SETTINGS])


def corrupting_transforms(setting: Setting, seed: int) -> Transforms:
    """Return the transforms of the images in a setting, with the corruption's random seed."""
    _, name, severity = setting
    return CorruptedImages(name, severity, seed) if severity else to_tensors


def _miou(predictor: Predictor, ignore_index: int, batches: Iterable[Batch]) -> float:
    """Return the mIoU as ``validate`` computes it, of the predictions that ``predict`` makes."""
    num_classes = len(predictor.class_names)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=predictor.device)
    with torch.inference_mode():
        for batch in batches:
            pred = predictor.predict_batch(batch["image"])
            target = batch["label"].to(predictor.device)
            classes = as_classes(pred, target, num_classes, ignore_index)
            confusion += confusion_matrices(*classes, num_classes).sum(0)
    return mean_present(class_iou(class_counts(confusion.double()))).item()
