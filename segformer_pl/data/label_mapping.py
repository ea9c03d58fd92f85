"""What the raw values of label images meant to a training, kept in its checkpoints.

A data set's description is a file that can be changed between two runs, under the same name. If a
raw value meant another class before, going on with the training teaches the opposite of what it
taught, and scoring compares with the wrong class.
"""

from collections.abc import Mapping
from typing import Any

from segformer_pl.data.labels import DataError, LabelSpec

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


def compare_labels(there: Any, here: Mapping[str, Any]) -> str | None:
    """Which raw values have a meaning in both and not the same, as part of a sentence.

    A value that only one of them knows is no difference: where such a value occurs, the other ends
    with an error. ``ignored`` is one meaning, whatever number stands for it.

    Raises:
        DataError: ``there`` is no description of labels.
    """
    try:
        before, now = _meanings(there), _meanings(here)
        codings = there["coding"], here["coding"]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
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
