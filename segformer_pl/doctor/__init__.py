"""Checks of a run before its first step: data, labels, throughput, memory and settings.

:func:`examine` takes a task, its data and its trainer as the command line builds them. It reads a
subset of every split, times a few forward and backward passes, and returns findings with remedies.
"""

import lightning.pytorch as pl

from segformer_pl.data import StreamingSegmentationData
from segformer_pl.doctor.cost import examine_cost, examine_plan
from segformer_pl.doctor.findings import Examination, Finding
from segformer_pl.doctor.recipe import examine_recipe, examine_weights
from segformer_pl.doctor.splits import compare_splits, examine_split
from segformer_pl.task import SegmentationTask

__all__ = ["Examination", "Finding", "examine", "examine_settings"]


def examine(
    task: SegmentationTask, data: StreamingSegmentationData, trainer: pl.Trainer
) -> Examination:
    """Check ``trainer.fit(task, data)`` for errors and likely mistakes, without training.

    Args:
        task: The task that would be trained. It is not changed.
        data: The data that it would be trained on.
        trainer: The trainer.

    Returns:
        The findings, and facts about data, plan and cost.
    """
    examination = Examination()
    entry = data.entry
    examination.facts["data set"] = {
        "name": entry.name,
        "location": data.path or entry.hub or "generated locally",
        "revision": entry.revision if data.path is None else None,
        "verified": entry.verified,
    }
    examine_recipe(examination, task, data, trainer)
    examine_weights(examination, task, data)
    train = examine_split(examination, task.network, data, "train")
    validation = examine_split(examination, task.network, data, "validation")
    if train and validation:
        compare_splits(examination, train, validation)
    if train:
        examine_plan(examination, data, trainer, train)
        examine_cost(examination, task, data, trainer, train)
    return examination


def examine_settings(
    task: SegmentationTask, data: StreamingSegmentationData, trainer: pl.Trainer
) -> Examination:
    """Check the settings alone, without reading data; ``fit`` prints these findings first.

    Args:
        task: The task.
        data: Its data.
        trainer: The trainer.

    Returns:
        The findings about the settings.
    """
    examination = Examination()
    examine_recipe(examination, task, data, trainer)
    return examination
