"""What is wrong with a run, said before its first step: data, labels, throughput, memory, recipe.

:func:`examine` looks at a task, its data and its trainer as the command line builds them, reads a
sample of every split, times a few training steps, and says in plain words what it found and what
to do about it.
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
    """Look for what would go wrong in ``trainer.fit(task, data)``, without training."""
    found = Examination()
    entry = data.entry
    found.facts["data set"] = {
        "name": entry.name,
        "place": data.path or entry.hub or "made on this machine",
        "revision": entry.revision if data.path is None else None,
        "known about it": entry.verified,
    }
    examine_recipe(found, task, data, trainer)
    examine_weights(found, task, data)
    train = examine_split(found, task.network, data, "train")
    validation = examine_split(found, task.network, data, "validation")
    if train and validation:
        compare_splits(found, train, validation)
    if train:
        examine_plan(found, data, trainer, train)
        examine_cost(found, task, data, trainer, train)
    return found


def examine_settings(
    task: SegmentationTask, data: StreamingSegmentationData, trainer: pl.Trainer
) -> Examination:
    """The part of :func:`examine` that reads no data and takes no time: what ``fit`` says first."""
    found = Examination()
    examine_recipe(found, task, data, trainer)
    return found
