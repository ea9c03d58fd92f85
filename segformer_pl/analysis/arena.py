"""An arena: the systems of a study side by side, beyond the differences that `ablate` reports.

``arena`` measures robustness and receptive fields on every finished run and stores them in its run
folder, so that an interrupted command continues::

    NAME.seed0.small.0f3a9c1e/
      arena/robustness_20/              files of `robustness` on 20 images
      arena/erf_20.npz, erf_20.json     receptive fields of all feature maps over 20 images

After the checkpoint of a run was removed, these files are used as they are. Only the figure needs
the maps in the .npz. This module reads them and averages over seeds. What is missing stays None,
with a sentence that says why, so that a system that cannot be measured in one respect is still
compared in the others.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segformer_pl.analysis.ablation import MEASURES, StudyResults, VariantSummary
from segformer_pl.analysis.crossed_effects import interval_over_seeds
from segformer_pl.analysis.robustness import LEAST_CLEAN_MIOU, relative_miou
from segformer_pl.analysis.run import Run
from segformer_pl.errors import UserError

ARENA_FOLDER = "arena"
HEAD = "head"  # the column of the last feature map, the classifier's input
BOUNDARY_IOU = "val/boundary_iou"
COSTS = ("parameters", "macs", "latency_median_ms", "activation_bytes")


def robustness_folder(run: Run, num_images: int) -> Path:
    """Return the folder of the robustness of a run on some images."""
    return run.folder / ARENA_FOLDER / f"robustness_{num_images}"


def erf_file(run: Run, num_images: int) -> Path:
    """Return the path of the receptive fields of a run, without suffix."""
    return run.folder / ARENA_FOLDER / f"erf_{num_images}"


@dataclass(frozen=True)
class Robustness:
    """mIoU of a run with and without corruptions of the images, as fractions.

    Attributes:
        clean: mIoU on the images as they are.
        corrupted: Mean mIoU over all corruptions and their severities.
        num_images: Number of images.
    """

    clean: float
    corrupted: float
    num_images: int

    @property
    def ratio(self) -> float:
        """Corrupted mIoU relative to the clean one; nan if that is below 1 %."""
        return relative_miou(self.corrupted, self.clean)


class Radius(NamedTuple):
    """A radius of a receptive field in pixels, with its 95 % interval over images."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class StoredERF:
    """Receptive fields of a run, apart from their maps.

    Attributes:
        file: Path of the maps, for :func:`~segformer_pl.analysis.erf.load_erf`.
        num_images: Number of images.
        settings: Units, reduction, gradient and image size.
        radius_50: Radius that holds half of the field, by feature map, from the image on.
        radius_95: Radius that holds 95 % of it.
    """

    file: Path
    num_images: int
    settings: dict[str, Any]
    radius_50: dict[str, Radius]
    radius_95: dict[str, Radius]


@dataclass(frozen=True)
class RunMeasurements:
    """What was measured on a finished run.

    Attributes:
        robustness: None if it could not be measured.
        erf: None if it could not be measured.
        problems: One clause for each of them that is missing, such as ``its robustness was not
            measured: ...``.
    """

    robustness: Robustness | None = None
    erf: StoredERF | None = None
    problems: tuple[str, ...] = ()


Measurements = Mapping[str, Mapping[int, RunMeasurements]]  # by variant and seed


@dataclass(frozen=True)
class System:
    """A system of an arena: a variant of the study, over its seeds.

    Attributes:
        name: Name of the variant.
        start: Weights that its training starts from, in a few words.
        note: What the study says about it; empty without.
        num_seeds: Number of finished runs.
        cost: Entry of ``costs.json``; empty if it was not measured.
        measures: Summary over seeds by measure, as fractions: ``miou``, ``boundary_iou``,
            ``worst_decile`` and ``robustness`` (corrupted relative to clean). None where no run has
            it.
        erfs: Receptive fields by seed.
        missing: One sentence for each respect in which the system could not be measured.
    """

    name: str
    start: str
    note: str
    num_seeds: int
    cost: Mapping[str, Any]
    measures: Mapping[str, VariantSummary | None]
    erfs: Mapping[int, StoredERF]
    missing: tuple[str, ...]


def read_robustness(folder: Path) -> tuple[Robustness, dict[str, Any]] | None:
    """Read what the command ``robustness`` wrote.

    Args:
        folder: Its output folder.

    Returns:
        The result, and the facts that identify checkpoint and images; None if the command has not
        finished or its file is damaged.
    """
    content = _read_json(folder / "robustness.json")
    try:
        result = Robustness(
            _number(content.pop("clean")), _number(content.pop("mean")), content["num_images"]
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    keys = ("num_images", "dataset", "fingerprint", "checkpoint")
    return result, {key: content.get(key) for key in keys}


def read_erf(file: Path) -> tuple[StoredERF, dict[str, Any]] | None:
    """Read receptive fields as ``ERF.save`` writes them, without their maps.

    Args:
        file: Path without suffix.

    Returns:
        The result, and the facts about it; None if there is none, or the file is damaged. The file
        of the maps may be missing.
    """
    content = _read_json(file.with_name(f"{file.name}.json"))
    maps = file.with_name(f"{file.name}.npz")
    try:
        radii: list[dict[str, Radius]] = [
            {
                layer: Radius(*(_number(bound) for bound in numbers[key]))
                for layer, numbers in content["numbers"].items()
            }
            for key in ("radius_50", "radius_95")
        ]
        stored = StoredERF(maps, int(content["num_images"]), dict(content["settings"]), *radii)
        about = dict(content["about"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return stored, about


def read_measurements(run: Run, num_images: int) -> RunMeasurements:
    """Read what was measured on a run whose checkpoint no longer exists.

    Args:
        run: The run.
        num_images: Number of images that it was measured on.
    """
    robustness = read_robustness(robustness_folder(run, num_images))
    erf = read_erf(erf_file(run, num_images))
    lacking = [
        what
        for what, found in (("its robustness", robustness), ("its receptive fields", erf))
        if found is None
    ]
    problems = []
    if lacking:
        were = "was" if lacking == ["its robustness"] else "were"
        problems.append(
            f"{' and '.join(lacking)} {were} not measured on {num_images} images, and its "
            f"checkpoint '{run.last_checkpoint.relative_to(run.folder)}' is missing"
        )
    return RunMeasurements(
        None if robustness is None else robustness[0], None if erf is None else erf[0], (*problems,)
    )


def starting_weights(config: Mapping[str, Any]) -> str:
    """Return which weights a training starts from, in a few words.

    Args:
        config: Complete settings of a ``fit``.
    """
    model = config["model"]
    for key, what in (("weights", "all weights"), ("encoder_weights", "encoder")):
        if model.get(key) is not None:
            return f"{what} from {Path(str(model[key])).stem}"
    if any(_is_pretrained(model.get("network"))):
        return "encoder with pretrained weights of timm"
    return "random"


def _is_pretrained(settings: Any) -> Iterator[bool]:
    """Yield the values of all settings that are named ``pretrained``."""
    items = settings.items() if isinstance(settings, Mapping) else ()
    for key, value in items:
        if key == "pretrained":
            yield bool(value)
        yield from _is_pretrained(value)


def compare_systems(
    results: StudyResults,
    measurements: Measurements,
    costs: Sequence[Mapping[str, Any]],
    starts: Mapping[str, str],
    notes: Mapping[str, str],
) -> list[System]:
    """Average over the seeds of every system.

    Args:
        results: Runs of the study.
        measurements: What was measured on its finished runs.
        costs: Entries of ``costs.json``. One that could not be measured has a ``failure``, a
            clause, in place of numbers other than ``parameters``.
        starts: Weights that each variant starts from, see :func:`starting_weights`.
        notes: Notes of the study on its variants.
    """
    by_name = {str(cost.get("variant")): cost for cost in costs}
    return [
        _system(
            name,
            results.runs[name],
            measurements.get(name, {}),
            by_name.get(name, {}),
            starts.get(name, "unknown"),
            notes.get(name, ""),
        )
        for name in results.changes
    ]


def _system(
    name: str,
    runs: Mapping[int, Run],
    measured: Mapping[int, RunMeasurements],
    cost: Mapping[str, Any],
    start: str,
    note: str,
) -> System:
    values: dict[str, dict[int, float]] = {
        key: {} for key in ("miou", "boundary_iou", "worst_decile", "robustness")
    }
    problems: dict[int, list[str]] = {}
    for seed, run in runs.items():
        found, lacking = _accuracy(run)
        one = measured.get(seed, RunMeasurements())
        problems[seed] = [*lacking, *one.problems]
        if one.robustness is not None:
            found["robustness"] = one.robustness.ratio
            if math.isnan(one.robustness.ratio):
                problems[seed].append(
                    "its robustness is left out, because its mIoU on the clean images is "
                    f"{100 * one.robustness.clean:.2f} %, and below {100 * LEAST_CLEAN_MIOU:g} % a "
                    "ratio means nothing"
                )
        for key, value in found.items():
            if math.isfinite(value):
                values[key][seed] = value
    missing = [] if runs else [f"{name} has no finished run"]
    if any(cost.get(key) is None for key in COSTS):
        missing.append(f"{name}: {cost.get('failure') or 'its costs were not measured'}")
    return System(
        name=name,
        start=start,
        note=note,
        num_seeds=len(runs),
        cost=cost,
        measures={key: _over_seeds(name, by_seed) for key, by_seed in values.items()},
        erfs={seed: one.erf for seed, one in sorted(measured.items()) if one.erf is not None},
        missing=(*missing, *_with_seeds(name, problems)),
    )


def _accuracy(run: Run) -> tuple[dict[str, float], list[str]]:
    """Return the accuracies of a run by measure, and a clause for each that is missing."""
    found, lacking = {}, []
    try:
        evaluation = [file for file in run.evaluations if file.split == "val"][-1].load()
        for key in ("miou", "worst_decile"):
            found[key] = float(MEASURES[key].of(evaluation.counts)[0])
    except (IndexError, UserError) as error:
        lacking.append(f"its evaluation cannot be read ({error})")
    try:
        found["boundary_iou"] = run.metrics[BOUNDARY_IOU].last
    except (FileNotFoundError, KeyError, UserError):
        lacking.append(f"its metrics.csv has no {BOUNDARY_IOU}")
    return found, lacking


def _over_seeds(name: str, values: Mapping[int, float]) -> VariantSummary | None:
    if not values:
        return None
    array = np.array([*values.values()])
    low, high = interval_over_seeds(array)
    sd = float(array.std(ddof=1)) if len(array) > 1 else math.nan
    return VariantSummary(name, dict(values), float(array.mean()), low, high, sd)


def _with_seeds(name: str, problems: Mapping[int, Iterable[str]]) -> list[str]:
    """Return the problems of all seeds as sentences; those with the same share one."""
    seeds: dict[str, list[int]] = {}
    for seed, texts in problems.items():
        for text in texts:
            seeds.setdefault(text, []).append(seed)
    return [
        f"{name}, seed{'s' if len(where) > 1 else ''} {', '.join(map(str, where))}: {text}"
        for text, where in seeds.items()
    ]


def align_maps(maps: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    """Align the feature maps of several systems as the columns of a table.

    Maps of one name share a column. The last map, the classifier's input, is in the column ``head``
    whatever its name, and a map that only some systems have stands after the one before it::

        a    stage1 stage2 stage3 stage4 fused          a    stage1 stage2 stage3 stage4  -    fused
        b    stage1 stage2 stage3 stage4 aspp head  ->  b    stage1 stage2 stage3 stage4 aspp  head
        c    blocks1 blocks2 head                       c      ...   further columns     ...   head

    Args:
        maps: Names of the feature maps by system, from the image to the classifier.

    Returns:
        Name of the map by column and system: column -> system -> map. Columns are in order.
    """
    order: list[str] = []
    named: dict[str, dict[str, str]] = {HEAD: {}}
    for system, names in maps.items():
        previous = -1
        for name in names[:-1]:
            column = f"{name} (inner)" if name == HEAD else name
            if column not in order:
                order.insert(previous + 1, column)
            previous = order.index(column)
            named.setdefault(column, {})[system] = name
        if names:
            named[HEAD][system] = names[-1]
    return {column: named[column] for column in (*order, HEAD)}


def mean_radius(system: System, feature_map: str) -> VariantSummary | None:
    """Return the radius that holds half of the field of a map, over the seeds that have it."""
    values = {
        seed: erf.radius_50[feature_map].value
        for seed, erf in system.erfs.items()
        if feature_map in erf.radius_50 and math.isfinite(erf.radius_50[feature_map].value)
    }
    return _over_seeds(system.name, values)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _number(value: Any) -> float:
    """Return a number as stored in JSON, where null stands for nan."""
    return math.nan if value is None else float(value)
