"""What the raw values of label images meant to a training, kept in its checkpoints.

A data set's description is a file that can be changed between two runs, under the same name. If a
raw value meant another class before, going on with the training teaches the opposite of what it
taught, and scoring compares with the wrong class.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from segformer_pl.data.labels import LabelSpec
from segformer_pl.errors import UserError

SHOWN_VALUES = 8  # of those that differ, in a message


def describe_labels(labels: LabelSpec) -> dict[str, Any]:
    """A label mapping as plain data: ``coding``, and the raw values (for ``coding: colors`` the
    colours) of each class and of the pixels without one."""
    if labels.coding == "colors":
        raw: list[list[Any]] = [[list(color)] for color in labels.colors]
    else:
        raw = [[] for _ in labels.names]
        mapping = labels.raw_to_train or {train_id: train_id for train_id in range(len(raw))}
        for value, train_id in sorted(mapping.items()):
            raw[train_id].append(value)
    ignored: list[Any] = [
        list(value) if isinstance(value, tuple) else value for value in labels.ignored
    ]
    return {
        "coding": labels.coding,
        "names": list(labels.names),
        "raw": raw,
        "ignored": sorted(ignored),
    }


def check_labels(trained: Mapping[str, Any], dataset: str, labels: LabelSpec) -> None:
    """Compare what raw values meant to a training with what they mean in a data set.

    In another data set they may mean anything. Where its classes are nevertheless those of the
    training, a warning names the values that differ: it may be the same data under another name.

    Args:
        trained: ``dataset`` and ``labels`` (:func:`describe_labels`) of the training, as its
            checkpoints state them.
        dataset: Name of the data set.
        labels: Its labels.

    Raises:
        UserError: It has the name of the training's, and a raw value meant another class then.
    """
    before, now = trained.get("labels"), describe_labels(labels)
    if before is None or not (difference := compare_labels(before, now)):
        return
    if trained.get("dataset") == dataset:
        raise UserError(
            f"the checkpoint was trained with another meaning of the labels of data set "
            f"{dataset!r}: {difference}; restore `labels` in its description, or, if these are "
            "other labels to score on, give the description another `name`"
        )
    if before["coding"] == now["coding"] and before["names"] == now["names"]:
        rank_zero_warn(
            f"the checkpoint was trained on data set {trained.get('dataset')!r}, whose classes "
            f"are those of {dataset!r}, but by another meaning of the labels: {difference}; if "
            "the label files are the same, correct `labels` in the description"
        )


def compare_labels(there: Any, here: Mapping[str, Any]) -> str | None:
    """Which raw values have a meaning in both and not the same, as part of a sentence.

    A value that only one of them knows is no difference: where such a value occurs, the other ends
    with an error. ``ignored`` is one meaning, whatever number stands for it.

    Raises:
        UserError: ``there`` is no description of labels.
    """
    try:
        before, now = _meanings(there), _meanings(here)
        codings = there["coding"], here["coding"]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            "the checkpoint does not describe its labels as this version does; give another"
        ) from error
    if codings[0] != codings[1]:
        return f"labels.coding was {codings[0]} and is {codings[1]}"
    changed = [
        f"{'colour' if codings[0] == 'colors' else 'raw value'} {value} was {before[value][1]} "
        f"and is {now[value][1]}"
        for value in before
        if value in now and before[value][0] != now[value][0]
    ]
    if not changed:
        return None
    rest = len(changed) - SHOWN_VALUES
    return ", ".join(changed[:SHOWN_VALUES]) + (f" and {rest} more" if rest > 0 else "")


def _meanings(labels: Mapping[str, Any]) -> dict[Any, tuple[int | None, str]]:
    """Raw value -> train id (None: ignored), and what to call it."""
    meanings: dict[Any, tuple[int | None, str]] = {
        _key(value): (None, "ignored") for value in labels["ignored"]
    }
    for train_id, (name, values) in enumerate(zip(labels["names"], labels["raw"], strict=True)):
        meanings |= {_key(value): (train_id, repr(name)) for value in values}
    return meanings


def _key(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
