"""The data sets by name: where each streams from, its columns and what its labels mean.

An entry of the catalogue is a file ``datasets/<name>.yaml``; your own data set is one more such
file. Its least is::

    image_column: image
    label_column: label
    labels:
      names: [road, car]

What else it may say: ``title`` and ``source``; ``hub`` (owner/name), ``config`` and ``revision``
(a commit); ``splits``, the names of train, validation and test as stored; ``id_column``, without
which samples are called by their place; ``size``, the usual height and width in pixels;
``num_samples`` of each split; ``verified``, what of all this has been seen and what has not. In
``labels``: ``colors``, one [r, g, b] a class; ``ignored``, the raw values without a class;
``offset``, the raw value of the first class where the others follow it and all below are ignored,
or ``raw_to_train``, {raw value: train id}; ``coding: colors`` where label images hold the colours
themselves; ``ignore_index``. See :class:`~segformer_pl.data.labels.LabelSpec`.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from segformer_pl.data import shapes
from segformer_pl.data.class_colors import distinct_colors
from segformer_pl.data.labels import LabelSpec, is_line
from segformer_pl.errors import UserError

FOLDER = Path(__file__).parent / "datasets"


@dataclass(frozen=True)
class DatasetEntry:
    """One data set.

    Args:
        name: Its key in the catalogue, or the name of its file.
        labels: What the label values mean.
        image_column, label_column: Names of the columns.
        id_column: The column with the names of the samples, if there is one.
        title: What it is called.
        source: Who made it and where it is described.
        hub: Where it streams from, ``owner/name``.
        config: The hub data set's configuration, where it has several.
        revision: Commit on the hub.
        splits: Names as stored, where they are not train, validation and test.
        size: Usual height and width in pixels.
        num_samples: Of each split.
        verified: What of the entry has been seen at its source and what has not.
        prepare: Makes the data set on this machine if need be and returns its folder, for a data
            set that is not read from a folder of the user's.
        reference_scores: ``(folder, split) -> {name: score}``, known scores to compare with.
    """

    name: str
    labels: LabelSpec
    image_column: str = "image"
    label_column: str = "label"
    id_column: str | None = None
    title: str | None = None
    source: str | None = None
    hub: str | None = None
    config: str | None = None
    revision: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict, hash=False)
    size: tuple[int, int] | None = None
    num_samples: Mapping[str, int] = field(default_factory=dict, hash=False)
    verified: str | None = None
    prepare: Callable[[], Path] | None = None
    reference_scores: Callable[[Path, str], dict[str, float]] | None = None


HOOKS: dict[str, dict[str, Any]] = {
    "shapes": {"prepare": shapes.prepare, "reference_scores": shapes.reference_scores}
}


def dataset_names() -> list[str]:
    """The names in the catalogue."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def find_dataset(dataset: str) -> DatasetEntry:
    """The catalogue's entry of this name, or the one that a YAML file describes.

    Args:
        dataset: A name, or a path that ends in ``.yaml`` or ``.yml``.

    Raises:
        UserError: There is none, and the message lists the names; or the file has a mistake, and
            the message says where.
    """
    if dataset.endswith((".yaml", ".yml")):
        return _read(Path(dataset))
    names = dataset_names()
    if dataset not in names:
        close = difflib.get_close_matches(dataset, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"data.dataset: there is no data set {dataset!r} in the catalogue; {hint}"
            f"It holds: {', '.join(names)}; a YAML file describes one of yours"
        )
    return _read(FOLDER / f"{dataset}.yaml", **HOOKS.get(dataset, {}))


def _read(file: Path, **hooks: Any) -> DatasetEntry:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"data.dataset: {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: it is not UTF-8 text; save it as such") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UserError(f"{file}{line}: this is not YAML: {problem}") from error
    given = _checked(content, "", ENTRY_KEYS, str(file))
    labels = _checked(given.pop("labels"), "labels", LABEL_KEYS, str(file))
    try:
        spec = _spec(**labels)
    except UserError as error:
        raise UserError(f"{file}, labels: {error}") from error
    if "size" in given:
        given["size"] = tuple(given["size"])
    return DatasetEntry(**{"name": file.stem} | given, labels=spec, **hooks)


def _spec(
    names: list[str],
    colors: list[list[int]] | None = None,
    ignored: list[Any] | None = None,
    offset: int | None = None,
    raw_to_train: dict[int, int] | None = None,
    **others: Any,
) -> LabelSpec:
    """The YAML form of a spec -> the spec."""
    by_color = others.get("coding") == "colors"
    kind, wrong = (_is_color, "a colour [r, g, b]") if by_color else (_is_int, "a whole number")
    for value in ignored or []:
        if not kind(value):
            raise UserError(f"ignored holds {value!r}, which is not {wrong}")
    if by_color and colors is None:
        raise UserError("coding is colors, but there are none; give one colour for each class")
    without = {tuple(value) if by_color else value for value in ignored or []}
    if offset is not None:
        if raw_to_train is not None:
            raise UserError("offset and raw_to_train both say what raw values mean; keep one")
        raw_to_train = {offset + train_id: train_id for train_id in range(len(names))}
        without |= set(range(offset))
    return LabelSpec(
        names=tuple(names),
        colors=tuple((r, g, b) for r, g, b in colors) if colors else distinct_colors(len(names)),
        ignored=frozenset(without),
        raw_to_train=raw_to_train,
        **others,
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_line(value: Any) -> bool:
    return _is_text(value) and is_line(value)


def _is_color(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(_is_int(channel) and 0 <= channel <= 255 for channel in value)
    )


def _list_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(kind, value))


def _by_split(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict)
        and value.keys() <= {"train", "validation", "test"}
        and all(map(kind, value.values()))
    )


Keys = dict[str, tuple[Callable[[Any], bool], str]]  # key -> (is it right?, what it has to be)

TEXT = (_is_text, "a text")
LINE = (_is_line, "a text of one line")
ENTRY_KEYS: Keys = {
    "image_column": LINE,
    "label_column": LINE,
    "labels": (lambda value: isinstance(value, dict), "a mapping with the names of the classes"),
    "id_column": LINE,
    "name": LINE,
    "title": LINE,
    "source": TEXT,
    "hub": (lambda value: _is_text(value) and value.count("/") == 1, "owner/name"),
    "config": LINE,
    "revision": (
        lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{40}", value) is not None,
        "a commit of 40 hexadecimal digits",
    ),
    "splits": (_by_split(_is_line), "a mapping of train, validation and test to texts"),
    "size": (
        lambda value: _list_of(_is_int)(value) and len(value) == 2 and min(value) > 0,
        "[height, width] in pixels",
    ),
    "num_samples": (_by_split(_is_int), "a mapping of train, validation and test to numbers"),
    "verified": TEXT,
}
LABEL_KEYS: Keys = {
    "names": (_list_of(_is_text), "a list of texts; quote numbers, on, off, yes and no"),
    "colors": (_list_of(_is_color), "a list of [r, g, b], each 0 to 255"),
    "ignored": (lambda value: isinstance(value, list), "a list"),
    "offset": (lambda value: _is_int(value) and value >= 0, "a whole number of at least 0"),
    "raw_to_train": (
        lambda value: (
            isinstance(value, dict) and all(map(_is_int, [*value.keys(), *value.values()]))
        ),
        "a mapping of raw values to train ids",
    ),
    "coding": (lambda value: value in ("values", "colors"), "values or colors"),
    "ignore_index": (_is_int, "a whole number"),
}
NEEDED = {"": ("image_column", "label_column", "labels"), "labels": ("names",)}


def _checked(content: Any, place: str, keys: Keys, file: str) -> dict[str, Any]:
    """What a mapping of the file says, without the keys that are null."""
    prefix = f"{place}." if place else ""
    if not isinstance(content, dict):
        raise UserError(f"{file}: it holds no mapping; describe the data set by keys and values")
    for key in content:
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(
                f"{file}: there is no key {prefix}{key}; {hint}There are: {', '.join(keys)}"
            )
    given = {key: value for key, value in content.items() if value is not None}
    for key in NEEDED[place]:
        if key not in given:
            raise UserError(f"{file}: {prefix}{key} is missing; it is {keys[key][1]}")
    for key, value in given.items():
        right, what = keys[key]
        if not right(value):
            raise UserError(f"{file}: {prefix}{key} is {_brief(value)}; it has to be {what}")
    return given


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
