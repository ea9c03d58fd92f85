"""``arena STUDY``: train several systems alike, and compare them in every respect."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import Namespace

from segformer_pl import __version__
from segformer_pl.ablation.costs import variant_costs
from segformer_pl.ablation.planning import costs_of_report, has_costs
from segformer_pl.ablation.study import Study, Variant
from segformer_pl.analysis.ablation import read_results
from segformer_pl.analysis.arena import (
    Measurements,
    Robustness,
    RunMeasurements,
    StoredERF,
    compare_systems,
    erf_file,
    read_erf,
    read_measurements,
    read_robustness,
    robustness_folder,
    starting_weights,
)
from segformer_pl.analysis.erf import effective_receptive_field, weights_hash
from segformer_pl.analysis.report.arena_page import write_arena_report
from segformer_pl.analysis.report.study_page import COSTS_FILE, write_study_report
from segformer_pl.analysis.run import Run
from segformer_pl.analysis.study_results import StudyResults
from segformer_pl.atomic import atomic_write_text, make_writable_folder
from segformer_pl.checkpoints.run_checkpoint import RunCheckpoint
from segformer_pl.checkpoints.run_data import load_data
from segformer_pl.cli.study_command import run_study_command
from segformer_pl.commands import robustness
from segformer_pl.commands.options.robustness import parse as parse_robustness
from segformer_pl.commands.validation_split import ValidationSplit
from segformer_pl.errors import UserError
from segformer_pl.inference import Predictor

# Sides of the images that receptive fields are measured on are cropped to multiples of this stride,
# the coarsest of the usual encoders, so that all systems take them as they are.
STRIDE = 32

Result = TypeVar("Result")


def run(options: Namespace) -> None:
    """Run ``arena STUDY``: train all systems with all seeds, evaluate, measure and compare them.

    Args:
        options: Options as ``commands/options/arena.py`` parses them.

    Raises:
        UserError: The study or an option is wrong.
        Interrupted: SIGTERM or Ctrl-C has ended the study.
    """
    run_study_command("arena", _report, options)


def _report(study: Study, options: Namespace) -> bool:
    folder = Path(options.output, study.name)
    digests = {variant.name: variant.digest for variant in study.variants}
    try:
        costs = _costs(study, folder / f"report_{study.budget}" / COSTS_FILE)
        study_page = write_study_report(
            folder, study.budget, digests=digests, block_size=options.block_size
        )
        results = read_results(folder, study.budget, digests)
        measurements = _measure_runs(study, results, options)
        systems = compare_systems(
            results,
            measurements,
            costs,
            {variant.name: starting_weights(variant.config) for variant in study.variants},
            study.notes,
        )
        page = write_arena_report(
            folder / f"arena_{study.budget}",
            results,
            systems,
            options.num_images,
            options.block_size,
            study_page,
        )
    except UserError as error:
        sys.stdout.write(f"no report: {error}\n")
        return False
    for system in systems:
        for sentence in system.missing:
            sys.stdout.write(f"not measured: {sentence}\n")
    sys.stdout.write(f"report: {study_page}\narena: {page}\n")
    return True


def _costs(study: Study, file: Path) -> list[dict[str, Any]]:
    """Return the costs of all variants; measure and store them if the file does not hold them."""
    if not has_costs(file, study):
        text = json.dumps(_measure_costs(study), indent=1)
        atomic_write_text(file, f"{text}\n")
    return json.loads(file.read_text(encoding="utf-8"))


def _measure_costs(study: Study) -> list[dict[str, Any]]:
    """Count and time the variants; one that cannot be has a ``failure`` in place of most."""
    size, device = study.variants[0].image_size, _device(study)
    failures: dict[str, str] = {}
    measurable: list[Variant] = []
    for variant in study.variants:
        if size is None:
            failures[variant.name] = (
                "its costs were not measured, because nothing states the size of the images; give "
                "data.crop_size"
            )
            continue
        try:
            # One pass of each kind. Those that succeed are measured together, below.
            variant_costs([variant], variant.name, *size, device=device, min_seconds=0)
            measurable.append(variant)
        except Exception as error:  # any type: the network may be the user's
            failures[variant.name] = f"its costs were not measured: {_sentence(error)}"
    costs = []
    if measurable and size is not None:
        first = measurable[0].name
        costs = costs_of_report(study, variant_costs(measurable, first, *size, device=device))
    unknown = [
        {
            "variant": variant.name,
            "digest": variant.digest,
            "parameters": _num_parameters(variant),
            "failure": failures[variant.name],
        }
        for variant in study.variants
        if variant.name in failures
    ]
    return [*costs, *unknown]


def _num_parameters(variant: Variant) -> int:
    with torch.device("meta"):
        network = variant.build_network()
    return sum(parameter.numel() for parameter in network.parameters())


def _measure_runs(study: Study, results: StudyResults, options: Namespace) -> Measurements:
    """Measure robustness and receptive fields of every finished run that lacks them."""
    measured: dict[str, dict[int, RunMeasurements]] = {}
    for name, runs in results.runs.items():
        for seed, run in runs.items():
            sys.stdout.write(f"measuring {name}, seed {seed}\n")
            one = _measure_run(run, options, _device(study))
            measured.setdefault(name, {})[seed] = one
    return measured


def _measure_run(run: Run, options: Namespace, device: str) -> RunMeasurements:
    if not run.last_checkpoint.is_file():
        return read_measurements(run, options.num_images)
    try:
        checkpoint = RunCheckpoint.read(run.last_checkpoint, "checkpoint of the run")
        data = load_data(checkpoint, path=options.data.path, num_workers=0)
        num_rows = len(ValidationSplit(data, None).positions)
        split = ValidationSplit(data, min(options.num_images, num_rows))
    except UserError as error:
        return RunMeasurements(problems=(f"nothing was measured on it: {_sentence(error)}",))
    problems: list[str] = []

    def attempt(what: str, measure: Callable[[], Result]) -> Result | None:
        try:
            return measure()
        except Exception as error:  # any type: one system must not end the report of the others
            problems.append(f"{what} not measured: {_sentence(error)}")
            return None

    found = attempt(
        "its robustness was", lambda: _robustness(run, checkpoint, split, options, device)
    )
    erf = attempt("its receptive fields were", lambda: _erf(run, checkpoint, split, device))
    return RunMeasurements(found, erf, tuple(problems))


def _robustness(
    run: Run, checkpoint: RunCheckpoint, split: ValidationSplit, options: Namespace, device: str
) -> Robustness:
    """Return the robustness of a run, from its folder or from the command ``robustness``."""
    num_images = len(split.positions)
    folder = robustness_folder(run, num_images)
    stored = read_robustness(folder)
    if stored is None or stored[1] != split.origin(checkpoint.digest):
        arguments = {"ckpt": run.last_checkpoint, "output": folder, "num_images": num_images}
        arguments["device"] = device
        if options.data.path is not None:
            arguments["data.path"] = options.data.path
        given = [f"--{key}={value}" for key, value in arguments.items()]
        robustness.run(parse_robustness(given))
        stored = read_robustness(folder)
    if stored is None:
        raise UserError(f"'{folder}' holds no results of `robustness`; remove it")
    return stored[0]


def _erf(run: Run, checkpoint: RunCheckpoint, split: ValidationSplit, device: str) -> StoredERF:
    """Return the receptive fields of all feature maps of a run, from its folder or measured."""
    file = erf_file(run, len(split.positions))
    origin = split.origin(checkpoint.digest)
    stored = read_erf(file)
    if stored is None or not stored[0].file.is_file() or stored[1].get("origin") != origin:
        predictor = Predictor.from_weights(checkpoint.weights())
        network = predictor.network.to(device)
        result = effective_receptive_field(
            network,
            _images(split),
            preprocess=predictor.normalization,
            about={
                "model": type(network).__name__,
                "weights": f"trained, step {checkpoint.step}",
                "source": str(run.last_checkpoint),
                "weights_hash": weights_hash(network),
                "mean": predictor.normalization.mean,
                "std": predictor.normalization.std,
                "data": split.data.entry.name,
                "split": "validation",
                "segformer_pl": __version__,
                "torch": torch.__version__,
                "device": device,
                "origin": origin,
            },
        )
        make_writable_folder(file.parent, "output")
        result.save(file)
        stored = read_erf(file)
    if stored is None:
        raise UserError(f"'{file}.json' holds no receptive fields; remove it")
    return stored[0]


def _images(split: ValidationSplit) -> Iterator[dict[str, Any]]:
    """Yield the images that have the size of the first one, cropped about their centres.

    An image of 360x480 pixels becomes one of 352x480, whose sides are multiples of ``STRIDE``. An
    image that is smaller than that keeps its size.
    """
    size: tuple[int, ...] | None = None
    for position in split.positions:
        sample: Any = split.samples[position]
        image = sample["image"]
        if sample["id"] in sample["skipped"]:
            continue
        size = size or tuple(image.shape[1:])
        if tuple(image.shape[1:]) == size:
            height, width = (max(side // STRIDE * STRIDE, min(side, STRIDE)) for side in size)
            top, left = (size[0] - height) // 2, (size[1] - width) // 2
            image = image[None, :, top : top + height, left : left + width]
            yield {"image": image, "id": [sample["id"]]}


def _device(study: Study) -> str:
    uses_gpu = any(v.config["trainer"]["accelerator"] != "cpu" for v in study.variants)
    return "cuda" if uses_gpu and torch.cuda.is_available() else "cpu"


def _sentence(error: Exception) -> str:
    """Return the message of an error in one line, without the full stop at its end."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"[:300]
