"""The label mapping of a training, stored in its checkpoints and compared when they are loaded.

The description of a data set is a file that may change between two runs under the same name. If a
raw value then stands for another class, resumed training contradicts what the network has learned,
and evaluation compares predictions with the wrong class.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from segformer_pl.data.labels import LabelSpec
from segformer_pl.errors import UserError

SHOWN_VALUES = 8  # maximum number of differing values in a message


def describe_labels(labels: LabelSpec) -> dict[str, Any]:
    """Convert a label mapping to plain data for a checkpoint.

    Args:
        labels: The label specification.

    Returns:
        ``coding``; ``names``, the class names; ``raw``, a list of raw values (with
        ``coding="colors"``, of RGB colours) per class; ``ignored``, the values without a class.
    """
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
    """Compare the label mapping of a checkpoint with that of a data set.

    Under the same data set name, a difference is an error. Under another name it is allowed, but
    if coding and class names agree, a warning lists the values that differ, since it may be the
    same data under another name.

    Args:
        trained: ``dataset`` and ``labels`` (see :func:`describe_labels`) from the checkpoint.
        dataset: Name of the data set.
        labels: Label specification of the data set.

    Raises:
        UserError: The data set has the name of the training's data set, and a raw value stood for
            another class in training.
    """
    before, now = trained.get("labels"), describe_labels(labels)
    if before is None or not (difference := compare_labels(before, now)):
        return
    if trained.get("dataset") == dataset:
        raise UserError(
            f"the checkpoint was trained with another label mapping of data set "
            f"{dataset!r}: {difference}; restore `labels` in its description, or, if these are "
            "other labels for evaluation, give the description another `name`"
        )
    if before["coding"] == now["coding"] and before["names"] == now["names"]:
        rank_zero_warn(
            f"the checkpoint was trained on data set {trained.get('dataset')!r}, which has the "
            f"classes of {dataset!r} but another label mapping: {difference}; if the label files "
            "are the same, correct `labels` in the description"
        )


def compare_labels(trained: Any, current: Mapping[str, Any]) -> str | None:
    """List the raw values that stand for different classes in two label mappings.

    A value that only one mapping has is not a difference: where it occurs, reading the label fails
    anyway. ``ignored`` counts as one class, independent of ``ignore_index``.

    Args:
        trained: Label mapping from a checkpoint, see :func:`describe_labels`.
        current: Label mapping of a data set.

    Returns:
        A phrase such as "raw value 3 was 'car' and is 'tree'", or None if the mappings agree.

    Raises:
        UserError: ``trained`` is not a label mapping.
    """
    try:
        before, now = _meanings(trained), _meanings(current)
        codings = trained["coding"], current["coding"]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            "the checkpoint does not describe its labels in this version's form; give another "
            "checkpoint"
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
    """Map every raw value to its train id (None if ignored) and its name in messages."""
    meanings: dict[Any, tuple[int | None, str]] = {
        _key(value): (None, "ignored") for value in labels["ignored"]
    }
    for train_id, (name, values) in enumerate(zip(labels["names"], labels["raw"], strict=True)):
        meanings |= {_key(value): (train_id, repr(name)) for value in values}
    return meanings


def _key(value: Any) -> Any:
    """Return a hashable form of a raw value or colour."""
    return tuple(value) if isinstance(value, list) else value
