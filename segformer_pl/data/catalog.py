"""The catalogue of data sets: where each is stored, its columns and the meaning of its labels.

Each entry is a file ``datasets/<name>.yaml``. A data set of your own is described by another such
file, which needs at least::

    image_column: image
    label_column: label
    labels:
      names: [road, car]

Optional keys:

- ``name``, ``title`` and ``source``: how the data set is called, who made it.
- ``hub`` (``owner/name``), ``config`` and ``revision`` (a commit): its location on the hub.
- ``splits``: stored names of the train, validation and test splits.
- ``id_column``: column with the ids of the samples; without it, a sample is named by shard and row.
- ``size``: usual height and width in pixels.
- ``num_samples``: number of samples of each split.
- ``verified``: which of these facts were checked at the source.

Optional keys of ``labels`` (see :class:`~segformer_pl.data.labels.LabelSpec`):

- ``colors``: one colour ``[r, g, b]`` per class.
- ``ignored``: raw values without a class.
- ``offset``: raw value of the first class; the others follow it, and lower values are ignored.
- ``raw_to_train``: mapping of raw values to train ids, instead of ``offset``.
- ``coding: colors``: label images hold the colours of the classes instead of values.
- ``ignore_index``: train id of pixels without a class.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from segformer_pl.data import shapes
from segformer_pl.data.class_colors import distinct_colors
from segformer_pl.data.labels import LabelSpec, is_line
from segformer_pl.errors import UserError
from segformer_pl.yaml_file import read_mapping

FOLDER = Path(__file__).parent / "datasets"


@dataclass(frozen=True)
class DatasetEntry:
    """Description of a data set.

    Args:
        name: Name in the catalogue, or of the YAML file.
        labels: Classes and the meaning of the label values.
        image_column: Name of the column with the images.
        label_column: Name of the column with the label maps.
        id_column: Name of the column with the ids of the samples, if there is one.
        title: Full name of the data set.
        source: Authors, publication and web site.
        hub: Location on the hub, ``owner/name``.
        config: Configuration of the hub data set, if it has several.
        revision: Commit on the hub.
        splits: Stored names of the splits that are not called train, validation and test.
        size: Usual height and width in pixels.
        num_samples: Number of samples of each split.
        verified: Which facts of the entry were checked at the source and which were not.
        prepare: Function that generates the data set if needed and returns its folder; for data
            sets that are generated instead of read.
        reference_scores: Function ``(folder, split) -> {name: score}`` that returns known scores
            to compare with.
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
    """Return the names in the catalogue, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def find_dataset(dataset: str) -> DatasetEntry:
    """Return the catalogue entry of a name, or the entry that a YAML file describes.

    Args:
        dataset: Name in the catalogue, or path that ends in ``.yaml`` or ``.yml``.

    Raises:
        UserError: The catalogue has no such name, or the file has a mistake. The message lists the
            names, or states the file and the key.
    """
    if dataset.endswith((".yaml", ".yml")):
        return _read(Path(dataset))
    names = dataset_names()
    if dataset not in names:
        close = difflib.get_close_matches(dataset, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"data.dataset: there is no data set {dataset!r} in the catalogue; {hint}"
            f"available: {', '.join(names)}; to use your own data set, give a YAML file"
        )
    return _read_stored(FOLDER / f"{dataset}.yaml")


@cache  # one parsing of the command line asks for the same entry about ten times
def _read_stored(file: Path) -> DatasetEntry:
    return _read(file, **HOOKS.get(file.stem, {}))


def _read(file: Path, **hooks: Any) -> DatasetEntry:
    content = read_mapping(file, "the description of a data set")
    given = _validate(content, "", ENTRY_KEYS, str(file))
    labels = _validate(given.pop("labels"), "labels", LABEL_KEYS, str(file))
    try:
        spec = _label_spec(**labels)
    except UserError as error:
        raise UserError(f"{file}, labels: {error}") from error
    if "size" in given:
        given["size"] = tuple(given["size"])
    return DatasetEntry(**{"name": file.stem} | given, labels=spec, **hooks)


def _label_spec(
    names: list[str],
    colors: list[list[int]] | None = None,
    ignored: list[Any] | None = None,
    offset: int | None = None,
    raw_to_train: dict[int, int] | None = None,
    **others: Any,
) -> LabelSpec:
    """Build the label specification from the keys of ``labels``."""
    by_color = others.get("coding") == "colors"
    kind, wrong = (_is_color, "a colour [r, g, b]") if by_color else (_is_int, "a whole number")
    for value in ignored or []:
        if not kind(value):
            raise UserError(f"ignored holds {value!r}, which is not {wrong}")
    if by_color and colors is None:
        raise UserError("coding is colors, but colors is missing; give one colour for each class")
    ignored_values = {tuple(value) if by_color else value for value in ignored or []}
    if offset is not None:
        if raw_to_train is not None:
            raise UserError("offset and raw_to_train both define the raw values; keep one")
        raw_to_train = {offset + train_id: train_id for train_id in range(len(names))}
        ignored_values |= set(range(offset))
    return LabelSpec(
        names=tuple(names),
        colors=tuple((r, g, b) for r, g, b in colors) if colors else distinct_colors(len(names)),
        ignored=frozenset(ignored_values),
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


Keys = dict[str, tuple[Callable[[Any], bool], str]]  # key -> (validator, expected value)

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
REQUIRED = {"": ("image_column", "label_column", "labels"), "labels": ("names",)}


def _validate(content: dict[Any, Any], section: str, keys: Keys, file: str) -> dict[str, Any]:
    """Return a mapping of the file without its null keys.

    Raises:
        UserError: The mapping has an unknown key, lacks a required one, or has a wrong value.
    """
    prefix = f"{section}." if section else ""
    for key in content:
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(
                f"{file}: unknown key {prefix}{key}; {hint}available: {', '.join(keys)}"
            )
    given = {key: value for key, value in content.items() if value is not None}
    for key in REQUIRED[section]:
        if key not in given:
            raise UserError(f"{file}: {prefix}{key} is missing; give {keys[key][1]}")
    for key, value in given.items():
        is_valid, expected = keys[key]
        if not is_valid(value):
            raise UserError(f"{file}: {prefix}{key} is {_brief(value)}; it has to be {expected}")
    return given


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
