"""The data sets by name: where each streams from, its columns and what its labels mean."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from segformer_pl.data import shapes
from segformer_pl.data.labels import DataError, LabelSpec


@dataclass(frozen=True)
class DatasetEntry:
    """One data set.

    Args:
        name: Its key in the catalogue.
        labels: What the label values mean.
        image_column, label_column, id_column: Names of the columns.
        prepare: Makes the data set on this machine if need be and returns its folder, for a data
            set that is not read from a folder of the user's.
        reference_scores: ``(folder, split) -> {name: score}``, known scores to compare with.
    """

    name: str
    labels: LabelSpec
    image_column: str = "image"
    label_column: str = "label"
    id_column: str | None = "id"
    hub: str | None = None
    config: str | None = None
    revision: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict, hash=False)
    prepare: Callable[[], Path] | None = None
    reference_scores: Callable[[Path, str], dict[str, float]] | None = None


SHAPES = DatasetEntry(
    name="shapes",
    labels=LabelSpec(
        names=shapes.CLASS_NAMES, colors=shapes.COLORS, ignored=frozenset({shapes.UNLABELLED})
    ),
    prepare=shapes.prepare,
    reference_scores=shapes.reference_scores,
)

# Brostow et al. 2009 in the 11-class split of the SegNet tutorial; raw value 11 is unlabelled.
# Colours are those of the CamVid label images.
CAMVID = DatasetEntry(
    name="camvid",
    labels=LabelSpec(
        names=(
            "sky",
            "building",
            "pole",
            "road",
            "pavement",
            "tree",
            "sign symbol",
            "fence",
            "car",
            "pedestrian",
            "bicyclist",
        ),
        colors=(
            (128, 128, 128),
            (128, 0, 0),
            (192, 192, 128),
            (128, 64, 128),
            (0, 0, 192),
            (128, 128, 0),
            (192, 128, 128),
            (64, 64, 128),
            (64, 0, 128),
            (64, 64, 0),
            (0, 128, 192),
        ),
        ignored=frozenset({11}),
    ),
)

DATASETS = {entry.name: entry for entry in (SHAPES, CAMVID)}


def find_dataset(name: str) -> DatasetEntry:
    """The catalogue's entry of this name.

    Raises:
        DataError: there is none; the message lists the names.
    """
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(
            f"data.dataset: there is no data set {name!r} in the catalogue; {hint}"
            f"It holds: {', '.join(DATASETS)}"
        )
    return DATASETS[name]
