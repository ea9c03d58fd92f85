"""What the values in a label image mean: raw value -> train id -> name -> colour."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt


class DataError(Exception):
    """Something is wrong with the data or its description; the message is one clear sentence."""


@dataclass(frozen=True)
class LabelSpec:
    """The classes of a data set and how its label images code them.

    Args:
        names: Class names by train id.
        colors: Palette by train id, RGB 0-255.
        ignored: Raw values that carry no class, such as "unlabelled".
        raw_to_train: Train id of every raw value; the default is the identity.
        ignore_index: Train id of pixels that neither train nor score.
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    ignored: frozenset[int] = frozenset()
    raw_to_train: Mapping[int, int] | None = field(default=None, hash=False)
    ignore_index: int = 255

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colors):
            raise ValueError(
                f"{len(self.names)} class names but {len(self.colors)} colours; give one colour "
                "for each class"
            )
        for raw, train_id in (self.raw_to_train or {}).items():
            if not 0 <= train_id < self.num_classes:
                raise ValueError(
                    f"raw value {raw} maps to train id {train_id}, which has no name; train ids "
                    f"are 0 to {self.num_classes - 1}"
                )
        if self.ignore_index < self.num_classes:
            raise ValueError(
                f"ignore_index {self.ignore_index} is the train id of class "
                f"{self.names[self.ignore_index]!r}; choose one of at least {self.num_classes}"
            )

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @cached_property
    def _table(self) -> npt.NDArray[np.int64]:
        """Train id of every 16-bit raw value, -1 where the spec knows none."""
        table = np.full(1 << 16, -1, dtype=np.int64)
        if self.raw_to_train is None:
            table[: self.num_classes] = np.arange(self.num_classes)
        else:
            for raw, train_id in self.raw_to_train.items():
                table[raw] = train_id
        table[list(self.ignored)] = self.ignore_index
        return table

    def to_train_ids(self, raw: npt.NDArray[Any], where: str) -> npt.NDArray[np.int64]:
        """Raw label image (H, W) -> train ids (H, W), ``ignore_index`` where there is no class.

        Args:
            raw: Label values as stored: integers, or booleans for 0 and 1.
            where: Which image this is, for the message.

        Raises:
            DataError: the image does not hold one whole number per pixel, or one that the spec
                does not know.
        """
        if raw.ndim != 2 or raw.dtype.kind not in "biu":
            raise DataError(
                f"{where}: the label image is an array of {raw.dtype} with shape {raw.shape}, not "
                "one whole number per pixel; store class numbers in one channel (8 or 16 bits)"
            )
        raw = raw.astype(np.int64)
        train_ids = np.where(raw >> 16, -1, self._table[raw & 0xFFFF])
        if (train_ids < 0).any():
            values, counts = np.unique(raw[train_ids < 0], return_counts=True)
            most = int(counts.argmax())
            others = f" (and {len(values) - 1} other unknown values)" if len(values) > 1 else ""
            known = sorted(np.flatnonzero(self._table >= 0).tolist())
            raise DataError(
                f"{where}: label value {values[most]} in {counts[most]} pixels{others} is not in "
                f"the label spec, which knows {_ranges(known)}; correct the label image, or add "
                "the value to the data set's spec"
            )
        return train_ids


def _ranges(values: list[int]) -> str:
    """[0, 1, 2, 255] -> "0-2, 255"."""
    parts: list[list[int]] = []
    for value in values:
        if parts and value == parts[-1][-1] + 1:
            parts[-1][1:] = [value]
        else:
            parts.append([value])
    return ", ".join("-".join(map(str, part)) for part in parts)
