"""The meaning of the values in a label image: raw value -> train id -> class name and colour."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from segformer_pl.data.class_colors import Color, pack_color, pack_colors
from segformer_pl.data.label_diagnosis import (
    Coding,
    describe_unknown_values,
    describe_wrong_array,
)
from segformer_pl.errors import UserError

TrainIds: TypeAlias = npt.NDArray[np.integer[Any]]

RAW_VALUES = range(-(1 << 16), 1 << 16)  # values that a label spec can map


@dataclass(frozen=True)
class LabelSpec:
    """The classes of a data set and how its label images encode them.

    Args:
        names: Class names, indexed by train id.
        colors: Colours of the classes, RGB in 0 to 255, indexed by train id.
        ignored: Raw values of pixels without a class, such as "unlabelled"; with
            ``coding="colors"``, the colours of such pixels.
        raw_to_train: Train id of every raw value. Default: the identity.
        ignore_index: Train id of pixels that the loss and the metrics ignore.
        coding: ``"values"`` if label images hold raw values, (H, W); ``"colors"`` if they hold the
            colours listed in ``colors``, (H, W, 3).

    Raises:
        UserError: The arguments contradict each other.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignored: frozenset[int] | frozenset[Color] = frozenset()
    raw_to_train: Mapping[int, int] | None = field(default=None, hash=False)
    ignore_index: int = 255
    coding: Coding = "values"

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colors):
            raise UserError(
                f"{len(self.names)} class names but {len(self.colors)} colours; give one colour "
                "for each class"
            )
        if self.num_classes < 2:
            raise UserError(
                f"there is one class, {', '.join(map(repr, self.names))}, but segmentation needs "
                "two: with one, the loss is 0 and mIoU is 100 % for every prediction; name the "
                "other classes too, such as background"
            )
        for name in self.names:
            if not is_line(name):
                raise UserError(
                    f"class name {name!r} holds a line break or control character; write every "
                    "name as one line of text"
                )
        if (name := _first_repeated(self.names)) is not None:
            raise UserError(f"two classes are named {name!r}; give every class its own name")
        for raw, train_id in (self.raw_to_train or {}).items():
            if not 0 <= train_id < self.num_classes:
                raise UserError(
                    f"raw value {raw} maps to train id {train_id}, which has no name; use train "
                    f"ids 0 to {self.num_classes - 1}"
                )
        if self.raw_to_train and len(set(self.raw_to_train.values())) == 1:
            only = self.names[next(iter(self.raw_to_train.values()))]
            raise UserError(
                f"raw_to_train maps every raw value to class {only!r}; map the values of the other "
                "classes to their train ids"
            )
        if self.ignore_index < self.num_classes:
            is_class = self.ignore_index >= 0
            reason = (
                f"the train id of class {self.names[self.ignore_index]!r}"
                if is_class
                else "negative"
            )
            raise UserError(
                f"ignore_index {self.ignore_index} is {reason}; choose a value of at least "
                f"{self.num_classes}"
            )
        if self.coding == "colors":
            self._check_colors()
        else:
            self._check_values()

    def _check_colors(self) -> None:
        if self.raw_to_train is not None:
            raise UserError(
                "with coding: colors, the list `colors` maps label images to classes; leave "
                "raw_to_train and offset out"
            )
        if (color := _first_repeated([*self.colors, *self.ignored])) is not None:
            raise UserError(
                f"colour {color} has two meanings, but label images are coded by colour; give "
                "every class its own colour"
            )

    def _check_values(self) -> None:
        for raw in [*(self.raw_to_train or {}), *self.ignored]:
            if raw not in RAW_VALUES:
                raise UserError(
                    f"raw value {raw} is not among the supported values {RAW_VALUES[0]} to "
                    f"{RAW_VALUES[-1]}; store label images with 16 bits"
                )
        both = self.ignored & (self.raw_to_train or {}).keys()
        if both:
            raise UserError(
                f"raw value {min(both)} is ignored and has a train id in raw_to_train; remove it "
                "from one of the two"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes, without the ignored label."""
        return len(self.names)

    @cached_property
    def _train_ids(self) -> dict[int, int]:
        """Train id or ``ignore_index`` of every raw value, or of every packed colour."""
        if self.coding == "colors":
            known = {pack_color(color): train_id for train_id, color in enumerate(self.colors)}
            ignored = {pack_color(color) for color in self.ignored}  # type: ignore[arg-type]
        else:
            identity = {train_id: train_id for train_id in range(self.num_classes)}
            known = identity if self.raw_to_train is None else dict(self.raw_to_train)
            ignored = set(self.ignored)  # type: ignore[arg-type]
        return known | dict.fromkeys(ignored, self.ignore_index)

    @cached_property
    def _unknown(self) -> int:
        """Entry of the lookup table for values that the spec does not map."""
        return self.num_classes + (self.ignore_index == self.num_classes)

    @cached_property
    def _table(self) -> TrainIds:
        """Lookup table from raw value or packed colour to train id.

        Negative raw values use the end of the table, as NumPy's negative indices do.
        """
        size = 1 << 24 if self.coding == "colors" else len(RAW_VALUES)
        fits = max(self.ignore_index, self._unknown) < 256
        table: TrainIds = np.full(size, self._unknown, dtype=np.uint8 if fits else np.int32)
        table[list(self._train_ids)] = list(self._train_ids.values())
        return table

    def to_train_ids(self, raw: npt.NDArray[Any], where: str) -> TrainIds:
        """Map a raw label image to train ids.

        Args:
            raw: Stored values, (H, W) integers, or booleans for 0 and 1; with
                ``coding="colors"``, (H, W, 3) uint8 RGB.
            where: Name of the label image in error messages.

        Returns:
            (H, W) train ids, ``ignore_index`` for pixels without a class. uint8, or int32 with 255
            classes or more or an ``ignore_index`` above 255.

        Raises:
            UserError: The array does not match ``coding``, or it holds a value or colour that the
                spec does not map. The message gives the value, its number of pixels and the
                probable cause.
        """
        codes = self._codes(raw, where)
        train_ids: TrainIds
        if codes.dtype == np.uint8 and self._table.dtype == np.uint8:
            # bytes.translate needs less than half the time of numpy.take.
            mapped = bytearray(codes).translate(self._table[:256].tobytes())
            train_ids = np.frombuffer(mapped, np.uint8).reshape(codes.shape)
        elif codes.dtype.itemsize > 2 and self.coding == "values":  # values may exceed the table
            inside = (codes >= RAW_VALUES[0]) & (codes <= RAW_VALUES[-1])
            train_ids = self._table.take(np.where(inside, codes, 0).astype(np.int64))
            train_ids[~inside] = self._unknown
        else:
            train_ids = self._table.take(codes)
        unknown = train_ids == self._unknown
        if unknown.any():
            problem = describe_unknown_values(
                codes, unknown, self.coding, self._train_ids, self.names
            )
            raise UserError(f"{where}: {problem}")
        return train_ids

    def _codes(self, raw: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
        """Return (H, W) integers: the raw values, or the packed colours."""
        is_color = raw.ndim == 3 and raw.shape[2] == 3 and raw.dtype == np.uint8
        is_plain = raw.ndim == 2 and raw.dtype.kind in "biu"
        if is_color and self.coding == "colors":
            return pack_colors(raw)
        if is_plain and self.coding == "values":
            return raw.astype(np.uint8) if raw.dtype == bool else raw
        raise UserError(f"{where}: {describe_wrong_array(raw, self.coding)}")


def is_line(text: str) -> bool:
    """Return whether a text is one line without control characters and lone surrogates."""
    return not any(unicodedata.category(char) in ("Cc", "Zl", "Zp", "Cs") for char in text)


def _first_repeated(items: Any) -> Any:
    """Return the first item that occurs twice, or None."""
    seen = set()
    return next((item for item in items if item in seen or seen.add(item)), None)  # type: ignore
