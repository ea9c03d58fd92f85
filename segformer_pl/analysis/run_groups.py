"""Runs grouped by configuration, with the spread of mIoU between seeds.

There is no significance test here. A few seeds per configuration allow a mean, a standard
deviation and the list of the runs, and no more. The tests of :mod:`.comparison` are about two
trained networks and the choice of images, not about training.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segformer_pl.analysis.comparison import Estimate, matched, miou_interval, without_nan
from segformer_pl.analysis.configuration import Configuration, differences
from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.errors import UserError


@dataclass(frozen=True)
class ComparedRun:
    """An evaluation to compare with others, and the run that it comes from.

    Attributes:
        path: Run folder or file, as given by the user.
        evaluation: Evaluation of the trained network, image by image.
        configuration: Settings of its training; None if they are not known.
    """

    path: Path
    evaluation: Evaluation
    configuration: Configuration | None


@dataclass(frozen=True)
class EvaluatedRun:
    """mIoU of one trained network on the images that all runs were evaluated on.

    Attributes:
        path: Run folder or file, as given by the user.
        split: ``val`` or ``test``.
        step: Number of training steps of the evaluated network.
        seed: Seed of the training; None if it was not seeded.
        miou: mIoU with its 95 % interval over images, for this network alone.
    """

    path: str
    split: str
    step: int
    seed: int | None
    miou: Estimate


@dataclass(frozen=True)
class Group:
    """The runs of one configuration.

    Attributes:
        name: Letter of the group, in the order in which the configurations first appear.
        settings: Settings in which the configurations differ, by dotted key.
        runs: Runs in the order of their seeds.
    """

    name: str
    settings: dict[str, Any]
    runs: tuple[EvaluatedRun, ...]

    @property
    def mean(self) -> float:
        """Mean mIoU of the runs, a fraction."""
        return float(np.mean([run.miou.value for run in self.runs]))

    @property
    def standard_deviation(self) -> float:
        """Sample standard deviation of the mIoU of the runs (n - 1); nan for a single run."""
        values = [run.miou.value for run in self.runs]
        return float(np.std(values, ddof=1)) if len(values) > 1 else np.nan

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as plain data for JSON, mIoU as fractions; nan becomes None."""
        runs = [{**vars(run), "miou": vars(run.miou)} for run in self.runs]
        data = {"name": self.name, "settings": self.settings, "runs": runs, "mean": self.mean}
        return without_nan(data | {"standard_deviation": self.standard_deviation})


def group_runs(runs: Sequence[ComparedRun], block_size: int = 1) -> tuple[Group, ...]:
    """Group runs whose configurations are the same apart from the seed.

    Args:
        runs: Trained networks, evaluated on the same images.
        block_size: Number of contiguous images that are resampled together, see
            :func:`~segformer_pl.analysis.comparison.miou_interval`.

    Raises:
        UserError: Classes, images or labels differ; the images make fewer than two blocks; a
            configuration is not known; a configuration has the same seed twice; or the runs of one
            configuration were evaluated after different numbers of steps.
    """
    first = runs[0]
    for run in runs[1:]:
        matched(first.evaluation, run.evaluation, (f"'{first.path}'", f"'{run.path}'"))
    if len(first.evaluation.ids) <= block_size:
        raise UserError(
            f"{len(first.evaluation.ids)} images in blocks of {block_size} make one block, and "
            "resampling needs at least two; give a smaller --block_size or more images"
        )
    known: list[Configuration] = []
    for run in runs:
        if run.configuration is None:
            raise UserError(
                f"what '{run.path}' was trained with is not known, and runs are grouped by it: "
                "there is no config.yaml of a training; give run folders of `fit`, or of a "
                "`validate` whose --ckpt_path still exists"
            )
        known.append(run.configuration)
    members: list[list[int]] = []  # indices of the runs, by group
    for index, configuration in enumerate(known):
        for group in members:
            if configuration.is_that_of(known[group[0]]):
                group.append(index)
                break
        else:
            members.append([index])
    if len(members) > len(string.ascii_uppercase):
        raise UserError(
            f"the runs have {len(members)} configurations; give runs of at most "
            f"{len(string.ascii_uppercase)}"
        )
    differing = differences([known[group[0]] for group in members])
    groups = []
    for index, (name, group) in enumerate(zip(string.ascii_uppercase, members)):
        evaluated = [_evaluated(runs[i], known[i].seed, block_size) for i in group]
        _check_spread(evaluated)
        settings = {key: values[index] for key, values in differing.items()}
        by_seed = sorted(evaluated, key=lambda run: (run.seed is None, run.seed))
        groups.append(Group(name, settings, tuple(by_seed)))
    return tuple(groups)


def _evaluated(run: ComparedRun, seed: int | None, block_size: int) -> EvaluatedRun:
    evaluation = run.evaluation
    miou = Estimate(evaluation.miou, *miou_interval(evaluation, block_size))
    return EvaluatedRun(str(run.path), evaluation.split, evaluation.step, seed, miou)


def _check_spread(runs: Sequence[EvaluatedRun]) -> None:
    """Check that the runs of one configuration differ in their seeds alone."""
    by_seed: dict[int, EvaluatedRun] = {}
    for run in runs:
        if run.seed is not None and run.seed in by_seed:
            raise UserError(
                f"'{by_seed[run.seed].path}' and '{run.path}' are both seed {run.seed} of one "
                "configuration, and would count twice; give every seed once"
            )
        if run.seed is not None:
            by_seed[run.seed] = run
        if run.step != runs[0].step:
            raise UserError(
                f"'{runs[0].path}' was evaluated after {runs[0].step:,} steps and '{run.path}' "
                f"after {run.step:,}, but they are runs of one configuration, whose spread would "
                "not come from the seeds alone; give .npz files of the same step"
            )
