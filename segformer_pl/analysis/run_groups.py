"""Several runs, grouped by what they were trained with: the spread between seeds as it is.

Nothing is tested here. With a few seeds of each configuration a mean, the runs themselves and
their standard deviation are what can be said; the tests of :mod:`.comparison` take two trained
networks as given and speak of the choice of images.
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
    """An evaluation that is compared with others, and where it comes from.

    Attributes:
        path: Run folder or file, as it was given.
        evaluation: Of the trained network, image by image.
        configuration: What the network was trained with; None if that is not known.
    """

    path: Path
    evaluation: Evaluation
    configuration: Configuration | None


@dataclass(frozen=True)
class ScoredRun:
    """One trained network on the images that all were scored on.

    Attributes:
        path: Run folder or file, as it was given.
        split, step: Of its evaluation.
        seed: Of its training; None if it was not seeded.
        miou: With its 95 % interval over images, of this network alone.
    """

    path: str
    split: str
    step: int
    seed: int | None
    miou: Estimate


@dataclass(frozen=True)
class Group:
    """The runs of one configuration, by seed.

    Attributes:
        name: A letter, in the order in which configurations were given first.
        settings: Those in which the configurations differ, by dotted key.
        runs: By seed.
    """

    name: str
    settings: dict[str, Any]
    runs: tuple[ScoredRun, ...]

    @property
    def mean(self) -> float:
        """Of the runs' mIoU, a fraction."""
        return float(np.mean([run.miou.value for run in self.runs]))

    @property
    def standard_deviation(self) -> float:
        """Of the runs' mIoU, with one less than their number in the denominator; nan of one."""
        values = [run.miou.value for run in self.runs]
        return float(np.std(values, ddof=1)) if len(values) > 1 else np.nan

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, fractions; nan as None."""
        runs = [{**vars(run), "miou": vars(run.miou)} for run in self.runs]
        known = {"name": self.name, "settings": self.settings, "runs": runs, "mean": self.mean}
        return without_nan(known | {"standard_deviation": self.standard_deviation})


def group_runs(runs: Sequence[ComparedRun], block_size: int = 1) -> tuple[Group, ...]:
    """Group runs whose configurations differ in seed and paths alone.

    Args:
        runs: Trained networks, evaluated on the same images.
        block_size: Number of contiguous images in a block of the intervals over images, see
            :func:`~segformer_pl.analysis.comparison.miou_interval`.

    Raises:
        UserError: Classes, images or labels differ; the images make fewer than two blocks; a
            configuration is not known; one seed of a configuration is there twice; or the runs of
            one configuration were scored after different numbers of steps. One sentence says which.
    """
    first = runs[0]
    for run in runs[1:]:
        matched(first.evaluation, run.evaluation, (f"'{first.path}'", f"'{run.path}'"))
    if len(first.evaluation.ids) <= block_size:
        raise UserError(
            f"{len(first.evaluation.ids)} images in blocks of {block_size} make one block, and two "
            "are the least to draw from; give a smaller --block_size or more images"
        )
    known: list[Configuration] = []
    for run in runs:
        if run.configuration is None:
            raise UserError(
                f"what '{run.path}' was trained with is not known, and runs are grouped by that: "
                "there is no config.yaml of a training; give run folders of `fit`, or of a "
                "`validate` whose --ckpt_path is still where it was"
            )
        known.append(run.configuration)
    members: list[list[int]] = []
    for number, configuration in enumerate(known):
        for group in members:
            if configuration.is_that_of(known[group[0]]):
                group.append(number)
                break
        else:
            members.append([number])
    if len(members) > len(string.ascii_uppercase):
        raise UserError(
            f"the runs have {len(members)} configurations; give runs of at most "
            f"{len(string.ascii_uppercase)}"
        )
    differing = differences([known[group[0]] for group in members])
    groups = []
    for index, (name, group) in enumerate(zip(string.ascii_uppercase, members)):
        scored = [_scored(runs[number], known[number].seed, block_size) for number in group]
        _check_spread(scored)
        settings = {key: values[index] for key, values in differing.items()}
        by_seed = sorted(scored, key=lambda run: (run.seed is None, run.seed))
        groups.append(Group(name, settings, tuple(by_seed)))
    return tuple(groups)


def _scored(run: ComparedRun, seed: int | None, block_size: int) -> ScoredRun:
    evaluation = run.evaluation
    miou = Estimate(evaluation.miou, *miou_interval(evaluation, block_size))
    return ScoredRun(str(run.path), evaluation.split, evaluation.step, seed, miou)


def _check_spread(runs: Sequence[ScoredRun]) -> None:
    """Raise unless what the runs of one configuration differ in is their seed."""
    by_seed: dict[int, ScoredRun] = {}
    for run in runs:
        if run.seed is not None and run.seed in by_seed:
            raise UserError(
                f"'{by_seed[run.seed].path}' and '{run.path}' are both seed {run.seed} of one "
                "configuration, which would count twice; give every seed once"
            )
        if run.seed is not None:
            by_seed[run.seed] = run
        if run.step != runs[0].step:
            raise UserError(
                f"'{runs[0].path}' was scored after {runs[0].step:,} steps and '{run.path}' after "
                f"{run.step:,}, but they are runs of one configuration, whose spread would not be "
                "that of their seeds; give the .npz files of one step"
            )
