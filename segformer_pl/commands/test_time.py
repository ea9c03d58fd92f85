"""``test_time --ckpt FILE --settings FILE --output FOLDER``: changes that need no training."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from math import isnan
from pathlib import Path

import numpy as np
import torch
from jsonargparse import Namespace

from segformer_pl.ablation.test_time import (
    AS_TRAINED,
    Setting,
    count_macs,
    predictors,
    read_settings,
    time_interleaved,
)
from segformer_pl.analysis.complexity import device_name
from segformer_pl.analysis.evaluation import Evaluation, load_evaluation
from segformer_pl.analysis.results_file import read_rows, write_rows
from segformer_pl.analysis.test_time import (
    TestTimeRow,
    as_dict,
    conclusions,
    markdown,
    plot,
    with_differences,
)
from segformer_pl.atomic import atomic_write, atomic_write_text, make_writable_folder
from segformer_pl.batch import Batch
from segformer_pl.checkpoints.run_checkpoint import RunCheckpoint
from segformer_pl.checkpoints.run_data import load_data
from segformer_pl.commands.device import resolve_device
from segformer_pl.commands.options.test_time import (
    COUNTS_FOLDER,
    FIGURE_FILE,
    JSON_FILE,
    RESULTS_FILE,
    TABLE_FILE,
)
from segformer_pl.commands.validation_split import (
    ValidationSplit,
    check_origin,
)
from segformer_pl.data.transforms import to_tensors
from segformer_pl.errors import UserError
from segformer_pl.inference import Predictor
from segformer_pl.metrics import SegmentationMetrics

SECONDS = 20.0  # of timing


def run(options: Namespace) -> None:
    """Run ``test_time`` and write evaluations, table, numbers and figure.

    Args:
        options: Options as ``options/test_time.py`` parses them.

    Raises:
        UserError: An argument, a setting, the checkpoint or the data cannot be used, or the output
            folder contains results of another checkpoint or other data.
    """
    device, output = resolve_device(options.device), Path(options.output)
    settings = read_settings(Path(options.settings))
    checkpoint = RunCheckpoint.read(options.ckpt)
    weights = checkpoint.weights()
    of_setting = predictors(settings, Predictor.from_weights(weights), weights)
    data = load_data(checkpoint, path=options.data.path, num_workers=options.data.num_workers)
    split = ValidationSplit(data, options.num_images)
    image = split.samples[split.positions[0]]["image"][None].to(device)
    height, width = image.shape[2:]
    macs = {}
    for name, predictor in of_setting.items():
        with _naming(name):
            macs[name] = count_macs(predictor, height, width)
    for predictor in of_setting.values():
        predictor.to(device)

    rows = _evaluate_all(settings, of_setting, split, checkpoint, output)
    evaluations = {name: load_evaluation(_evaluation_file(output, name)) for name in rows}
    num_threads = torch.get_num_threads()
    timed_on = f"{device_name(device)} with {num_threads} thread{'s' * (num_threads > 1)}, float32"
    is_timed = all(row.timed_on == timed_on and not isnan(row.latency_ms) for row in rows.values())
    if not is_timed:
        sys.stderr.write("measuring latency ...\n")
        timings = time_interleaved(
            {name: partial(one.predict_batch, image) for name, one in of_setting.items()}, SECONDS
        )
        rows = {
            name: replace(
                row,
                latency_ms=timings[name].median_ms,
                latency_iqr_ms=timings[name].iqr_ms,
                timed_on=timed_on,
            )
            for name, row in rows.items()
        }
    measured = [
        replace(row, macs=macs[name], height=height, width=width) for name, row in rows.items()
    ]
    _write(with_differences(measured, evaluations), output)


def _evaluate_all(
    settings: list[Setting],
    of_setting: dict[str, Predictor],
    split: ValidationSplit,
    checkpoint: RunCheckpoint,
    output: Path,
) -> dict[str, TestTimeRow]:
    """Evaluate the settings that the output folder lacks, and return the rows of all.

    A stored setting counts if its changes are still the same.
    """
    origin = split.origin(checkpoint.digest)
    make_writable_folder(output, "--output")
    file = output / RESULTS_FILE
    changes = {setting.name: setting.changes for setting in settings}
    rows = {row.setting: row for row in read_rows(file, TestTimeRow, "test_time")}
    for row in rows.values():
        check_origin(file, asdict(row), origin)
    rows = {
        name: row
        for name, row in rows.items()
        if changes.get(name) == row.changes and _evaluation_file(output, name).is_file()
    }

    def evaluate(name: str, batches: Iterator[Batch]) -> None:
        ignore_index = split.data.entry.labels.ignore_index
        with _naming(name):
            evaluation, agreement = _evaluate(
                of_setting[name], of_setting[AS_TRAINED], batches, ignore_index, checkpoint.step
            )
            evaluation = replace(evaluation, split_size=len(split.samples))
        evaluation.save(_evaluation_file(output, name))
        rows[name] = TestTimeRow(
            setting=name,
            changes=changes[name],
            miou=evaluation.miou,
            agreement=agreement,
            **origin,
        )
        write_rows(file, [rows[key] for key in changes if key in rows], TestTimeRow)

    missing = {name: to_tensors for name in changes if name not in rows}
    split.evaluate(missing, evaluate, len(settings), file)
    return {name: rows[name] for name in changes}


@contextmanager
def _naming(setting: str) -> Iterator[None]:
    """Name the setting in errors of the user."""
    try:
        yield
    except UserError as error:
        raise UserError(f"setting '{setting}': {error}") from error


def _evaluation_file(output: Path, name: str) -> Path:
    return output / COUNTS_FOLDER / f"{name}.npz"


def _evaluate(
    predictor: Predictor,
    trained: Predictor,
    batches: Iterable[Batch],
    ignore_index: int,
    step: int,
) -> tuple[Evaluation, float]:
    """Evaluate a setting on the images that were not skipped.

    The trained network predicts them again, because the labels of a whole split would take
    gigabytes.

    Returns:
        The evaluation that ``validate`` would write, and the share of the pixels that get the class
        which the trained network predicts.
    """
    metrics = SegmentationMetrics(len(predictor.class_names), ignore_index).to(predictor.device)
    ids: list[str] = []
    counts, losses = [], []
    num_equal = num_pixels = 0
    with torch.inference_mode():
        for batch in batches:
            target = batch["label"].to(predictor.device)
            pixels = predictor.predict_pixels(batch["image"], target, ignore_index)
            result = metrics.update(pixels.labels, target, pixels.confidence, pixels.losses)
            used = [name not in batch.get("skipped", {}) for name in batch["id"]]
            ids += [name for name, is_used in zip(batch["id"], used) if is_used]
            counts.append(result["counts"].cpu().numpy()[used])
            losses.append(result["loss"].cpu().numpy()[used])
            labels = expected = pixels.labels
            if predictor is not trained:
                expected = trained.predict_pixels(batch["image"], target, ignore_index).labels
            equal = (labels == expected)[torch.tensor(used)]
            num_equal, num_pixels = num_equal + int(equal.sum()), num_pixels + equal.numel()
    evaluation = Evaluation(
        split="val",
        step=step,
        class_names=predictor.class_names,
        ids=ids,
        counts=np.concatenate(counts),
        loss=np.concatenate(losses),
        confusion=metrics.confusion.compute().cpu().numpy(),
        calibration=metrics.calibration.compute().cpu().numpy(),
    )
    return evaluation, num_equal / num_pixels


def _write(rows: list[TestTimeRow], output: Path) -> None:
    write_rows(output / RESULTS_FILE, rows, TestTimeRow)
    for name, text in {
        TABLE_FILE: markdown(rows),
        JSON_FILE: json.dumps(as_dict(rows), indent=2) + "\n",
    }.items():
        atomic_write_text(output / name, text)
    with atomic_write(output / FIGURE_FILE) as stream:
        plot(rows).savefig(stream, format="png", dpi=130)
    for row in rows:
        sys.stdout.write(
            f"{row.setting:<24} mIoU {100 * row.miou:6.2f} %   agreement "
            f"{100 * row.agreement:6.2f} %   {row.macs / 1e9:8.3g} GMACs   "
            f"{row.latency_ms:8.1f} ms\n"
        )
    sys.stdout.write("\n".join([*conclusions(rows)[1:], f"table: {output / TABLE_FILE}"]) + "\n")
