"""Give the classifier of some weights the classes of a model."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segformer_pl.checkpoints.facts import MatchClasses, class_difference, rows_of_classifier
from segformer_pl.checkpoints.report import listed
from segformer_pl.checkpoints.sources import Weights
from segformer_pl.errors import UserError

Rows = list[int | None]


def classifier_names(model: Any) -> tuple[str, ...]:
    """Return the parameters whose first dimension is the model's classes; empty if it states none,
    as an encoder does not."""
    path = getattr(model, "classifier_path", None)
    if path is None:
        return ()
    return tuple(f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters())


def match_classifier(
    weights: Weights,
    names: Sequence[str],
    found: dict[str, Tensor],
    wanted: dict[str, Tensor],
    class_names: Sequence[str] | None,
    how: MatchClasses,
) -> tuple[dict[str, str], Rows | None, list[str]]:
    """Give the source's classifier the model's classes, or leave it out of both.

    Args:
        weights: The source.
        names: The classifier's parameters, see :func:`classifier_names`.
        found: The source's tensors, which are changed.
        wanted: The model's tensors, which are changed.
        class_names: The model's classes. None: not compared.
        how: See :func:`~segformer_pl.checkpoints.facts.rows_of_classifier`.

    Returns:
        Names that are to be initialised again -> why; the source's output for each of the model's
        classes, None for one that is initialised again, or None if outputs and classes were not
        compared; lines for the report.

    Raises:
        UserError: The classes do not match in this way.
    """
    if not names:
        return {}, None, _compare_names(weights, class_names, how)
    if not all(name in found and name in wanted for name in names):
        return {}, None, []
    fits = all(found[name].shape[1:] == wanted[name].shape[1:] for name in names)
    is_per_class = all(found[name].ndim for name in names)
    if not fits or not is_per_class or len({len(found[name]) for name in names}) != 1:
        return {}, None, []  # left to the check of shapes
    theirs, ours = (len(tensors[names[0]]) for tensors in (found, wanted))
    if theirs != ours and (class_names is None or how == "exact"):
        for name in names:
            del found[name], wanted[name]
        reason = f"{theirs} classes in the source, {ours} in the model"
        return dict.fromkeys(names, reason), None, []
    if class_names is None:
        return {}, None, []
    if len(class_names) != ours:
        raise UserError(
            f"the model has {ours} classes, but there are {len(class_names)} class names; give one "
            "for each"
        )
    rows, remark = rows_of_classifier(
        weights.name, weights.task.get("class_names"), theirs, class_names, how
    )
    index = torch.tensor([row or 0 for row in rows])
    for name in names:
        found[name] = found[name][index]
    new = [number for number, row in enumerate(rows) if row is None]
    if not new:
        return {}, rows, [remark]
    missing = [class_names[number] for number in new]
    those = listed(missing, 12)
    reason = f"the rows of {len(new)} classes that the source does not have: {those}"
    return dict.fromkeys(names, reason), rows, [remark]


def _compare_names(
    weights: Weights, class_names: Sequence[str] | None, how: MatchClasses
) -> list[str]:
    """Compare the classes of a network that does not say where its classifier is."""
    theirs = weights.task.get("class_names")
    if class_names is None or theirs is None or how == "by_index":
        return []
    difference = class_difference(theirs, class_names)
    if difference is not None:
        raise UserError(
            f"{weights.name} was trained on other classes: {difference}; its classifier cannot be "
            "reordered, because the network does not say where it is (its classifier_path is "
            "None); give --model.match_classes by_index if only the spelling differs"
        )
    return ["classes: those of the data set, in the same order"]


def reinitialize_classifier(model: Any, rows: Rows | None) -> None:
    """Initialise the classifier again, or the rows of it that no class of the source fills."""
    classifier = model.get_submodule(model.classifier_path)
    fresh = copy.deepcopy(classifier)
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    new = [number for number, row in enumerate(rows or []) if row is None] or slice(None)
    with torch.no_grad():
        for name, tensor in classifier.named_parameters():
            tensor[new] = fresh.get_parameter(name)[new]


def data_of_rows(
    weights: Weights, rows: Sequence[int | None], class_names: Sequence[str] | None
) -> dict[str, Any]:
    """Return what the source states about its data, the raw values of its classes in our order.

    Raises:
        UserError: It describes its labels in another way.
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
