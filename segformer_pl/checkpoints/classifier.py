"""Adapt the classifiers of a source to the classes of a model.

A segmenter has one classifier, and one in each auxiliary head. Their first ``num_classes`` rows are
the classes; rows after them, such as MaskFormer's no-object class, are no class of the data::

    source: sky, road, car, no object   model: car, tree, sky   row of the model <- of the source
                                                                0  car        <- 2
                                                                1  tree       <- initialised
                                                                2  sky        <- 0
                                                                3  no object  <- 3
"""

import copy
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from segformer_pl.checkpoints.facts import MatchClasses, class_difference, rows_of_classifier
from segformer_pl.checkpoints.report import listed
from segformer_pl.checkpoints.sources import Weights
from segformer_pl.errors import UserError
from segformer_pl.models.segmenter import Segmenter

# For each class of the model: its row in the source's classifier, or None if the source lacks it.
ClassifierRows = list[int | None]


def classifier_keys(model: Any) -> tuple[str, ...]:
    """Return the keys of the parameters whose first dimension is the model's classes.

    Empty if the model has no ``classifier_paths``, as an encoder.
    """
    return tuple(
        f"{path}.{name}"
        for path in getattr(model, "classifier_paths", ())
        for name, _ in model.get_submodule(path).named_parameters()
    )


def match_classifier(
    weights: Weights,
    model: Any,
    source_tensors: dict[str, Tensor],
    model_tensors: dict[str, Tensor],
    class_names: Sequence[str] | None,
    how: MatchClasses,
) -> tuple[dict[str, str], ClassifierRows | None, list[str]]:
    """Reorder the source's classifiers to the model's classes, or drop them from both dicts.

    Args:
        weights: The source.
        model: The model.
        source_tensors: Tensors of the source by key. Changed in place.
        model_tensors: Tensors of the model by key. Changed in place.
        class_names: The model's classes, or None to compare no classes.
        how: Rule by which classes are matched, see
            :func:`~segformer_pl.checkpoints.facts.rows_of_classifier`.

    Returns:
        A triple:

        - keys to re-initialise -> reason;
        - the row of the source for each of the model's classes, or None if outputs and classes were
          not compared;
        - lines for the report.

    Raises:
        UserError: The classes do not match under this rule.
    """
    known = classifier_keys(model)
    if not known:
        return {}, None, _compare_names(weights, class_names, how)
    keys = [key for key in known if key in source_tensors and key in model_tensors]
    if not keys:
        return {}, None, []
    fits = all(source_tensors[key].shape[1:] == model_tensors[key].shape[1:] for key in keys)
    if not fits or not all(source_tensors[key].ndim for key in keys):
        return {}, None, []  # left to the check of shapes
    num_model = model.num_classes
    counts = {len(source_tensors[key]) - len(model_tensors[key]) + num_model for key in keys}
    if len(counts) != 1:
        return {}, None, []  # left to the check of shapes
    num_source = counts.pop()
    if num_source != num_model and (class_names is None or how == "exact"):
        for key in keys:
            del source_tensors[key], model_tensors[key]
        reason = f"{num_source} classes in the source, {num_model} in the model"
        return dict.fromkeys(keys, reason), None, []
    if class_names is None:
        return {}, None, []
    if len(class_names) != num_model:
        raise UserError(
            f"the model has {num_model} classes, but there are {len(class_names)} class names; "
            "give one for each"
        )
    rows, remark = rows_of_classifier(
        weights.name, weights.task.get("class_names"), num_source, class_names, how
    )
    for key in keys:
        further = range(num_source, len(source_tensors[key]))
        # A class that the source lacks copies row 0 here and is re-initialised after loading.
        index = torch.tensor([*(row or 0 for row in rows), *further])
        source_tensors[key] = source_tensors[key][index]
    new = [number for number, row in enumerate(rows) if row is None]
    if not new:
        return {}, rows, [remark]
    missing = listed([class_names[number] for number in new], 12)
    reason = f"the rows of {len(new)} classes that the source does not have: {missing}"
    return dict.fromkeys(keys, reason), rows, [remark]


def _compare_names(
    weights: Weights, class_names: Sequence[str] | None, how: MatchClasses
) -> list[str]:
    """Compare the class names of a network that does not state where its classifiers are."""
    theirs = weights.task.get("class_names")
    if class_names is None or theirs is None or how == "by_index":
        return []
    difference = class_difference(theirs, class_names)
    if difference is not None:
        raise UserError(
            f"{weights.name} was trained on other classes: {difference}; its classifier cannot be "
            "reordered, because the network does not state where it is (its classifier_paths are "
            "empty); give --model.match_classes by_index if only the spelling differs"
        )
    return ["classes: those of the data set, in the same order"]


def reinitialize_classifier(
    model: Segmenter, keys: Container[str], rows: ClassifierRows | None
) -> None:
    """Re-initialise the classifiers, or only the rows of classes that the source lacks.

    Args:
        model: The model, changed in place.
        keys: Keys of the parameters to change, see :func:`classifier_keys`.
        rows: The second value of :func:`match_classifier`.
    """
    new = [number for number, row in enumerate(rows or []) if row is None] or slice(None)
    for path in model.classifier_paths:
        classifier = model.get_submodule(path)
        fresh = copy.deepcopy(classifier)
        for module in fresh.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        with torch.no_grad():
            for name, tensor in classifier.named_parameters():
                if f"{path}.{name}" in keys:
                    tensor[new] = fresh.get_parameter(name)[new]


def data_of_rows(
    weights: Weights, rows: Sequence[int | None], class_names: Sequence[str] | None
) -> dict[str, Any]:
    """Return the source's description of its data, its raw values reordered to the model's classes.

    Raises:
        UserError: The source describes its labels in an unknown form.
    """
    labels = weights.data.get("labels")
    if labels is None:
        return {}
    try:
        raw = [[] if row is None else labels["raw"][row] for row in rows]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{weights.name} does not describe its labels as this version does; give another"
        ) from error
    return dict(weights.data) | {"labels": {**labels, "names": list(class_names or ()), "raw": raw}}
