"""What the values in a label image mean: raw value -> train id -> name -> colour."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Color: TypeAlias = tuple[int, int, int]
TrainIds: TypeAlias = npt.NDArray[np.integer[Any]]
Coding: TypeAlias = Literal["values", "colors"]

RAW_VALUES = range(-(1 << 16), 1 << 16)  # those that a spec can give a meaning
OKABE_ITO: tuple[Color, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
LISTED_COLORS = 12  # of those a spec knows, in a message


class DataError(Exception):
    """Something is wrong with the data or its description; the message is one clear sentence."""


@dataclass(frozen=True)
class LabelSpec:
    """The classes of a data set and how its label images code them.

    Args:
        names: Class names by train id.
        colors: Palette by train id, RGB 0-255.
        ignored: Raw values that carry no class, such as "unlabelled"; with ``coding="colors"``
            the colours of such pixels.
        raw_to_train: Train id of every raw value; the default is the identity.
        ignore_index: Train id of pixels that neither train nor score.
        coding: Whether a label image holds raw values, (H, W), or the colours of its classes as
            in ``colors``, (H, W, 3).

    Raises:
        ValueError: the arguments contradict each other.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignored: frozenset[int] | frozenset[Color] = frozenset()
    raw_to_train: Mapping[int, int] | None = field(default=None, hash=False)
    ignore_index: int = 255
    coding: Coding = "values"

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colors):
            raise ValueError(
                f"{len(self.names)} class names but {len(self.colors)} colours; give one colour "
                "for each class"
            )
        if self.num_classes < 2:
            raise ValueError(
                f"there is one class, {', '.join(map(repr, self.names))}, and nothing to tell it "
                "from: the loss would be 0 and mIoU 100 % whatever the network answers; name the "
                "other classes too, such as background"
            )
        for name in self.names:
            if not is_line(name):
                raise ValueError(
                    f"class name {name!r} holds a line break or control character; write names as "
                    "one line of text"
                )
        if (twice := _repeated(self.names)) is not None:
            raise ValueError(f"two classes are named {twice!r}; give every class its own name")
        for raw, train_id in (self.raw_to_train or {}).items():
            if not 0 <= train_id < self.num_classes:
                raise ValueError(
                    f"raw value {raw} maps to train id {train_id}, which has no name; train ids "
                    f"are 0 to {self.num_classes - 1}"
                )
        if self.raw_to_train and len(set(self.raw_to_train.values())) == 1:
            only = self.names[next(iter(self.raw_to_train.values()))]
            raise ValueError(
                f"raw_to_train maps every raw value to class {only!r}, so that there is nothing to "
                "tell apart; map the values of the other classes to theirs"
            )
        if self.ignore_index < self.num_classes:
            taken = self.ignore_index >= 0
            why = (
                f"the train id of class {self.names[self.ignore_index]!r}" if taken else "negative"
            )
            raise ValueError(
                f"ignore_index {self.ignore_index} is {why}; choose one of at least "
                f"{self.num_classes}"
            )
        if self.coding == "colors":
            self._check_colors()
        else:
            self._check_values()

    def _check_colors(self) -> None:
        if self.raw_to_train is not None:
            raise ValueError(
                "coding is colors, which `colors` translates; leave raw_to_train and offset out"
            )
        if (shared := _repeated([*self.colors, *self.ignored])) is not None:
            raise ValueError(
                f"colour {shared} has two meanings, and the label images are coded by colour; "
                "give every class its own"
            )

    def _check_values(self) -> None:
        for raw in [*(self.raw_to_train or {}), *self.ignored]:
            if raw not in RAW_VALUES:
                raise ValueError(
                    f"raw value {raw} is not among the values {RAW_VALUES[0]} to {RAW_VALUES[-1]} "
                    "that label images may hold; store them with 16 bits"
                )
        both = self.ignored & (self.raw_to_train or {}).keys()
        if both:
            raise ValueError(
                f"raw value {min(both)} is ignored and has a train id in raw_to_train; keep one"
            )

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @cached_property
    def _train_ids(self) -> dict[int, int]:
        """Train id or ignore_index of every raw value, or of every colour as one number."""
        if self.coding == "colors":
            known = {_number(color): train_id for train_id, color in enumerate(self.colors)}
            ignored = {_number(color) for color in self.ignored}  # type: ignore[arg-type]
        else:
            identity = {train_id: train_id for train_id in range(self.num_classes)}
            known = identity if self.raw_to_train is None else dict(self.raw_to_train)
            ignored = set(self.ignored)  # type: ignore[arg-type]
        return known | dict.fromkeys(ignored, self.ignore_index)

    @cached_property
    def _unknown(self) -> int:
        """What the table holds for values without a meaning."""
        return self.num_classes + (self.ignore_index == self.num_classes)

    @cached_property
    def _table(self) -> TrainIds:
        """Train id of every raw value, the negative ones at the end, where their index points."""
        size = 1 << 24 if self.coding == "colors" else len(RAW_VALUES)
        fits = max(self.ignore_index, self._unknown) < 256
        table: TrainIds = np.full(size, self._unknown, dtype=np.uint8 if fits else np.int32)
        table[list(self._train_ids)] = list(self._train_ids.values())
        return table

    def to_train_ids(self, raw: npt.NDArray[Any], where: str) -> TrainIds:
        """Raw label image -> train ids (H, W), ``ignore_index`` where there is no class.

        Args:
            raw: Label values as stored, (H, W): integers, or booleans for 0 and 1. With
                ``coding="colors"`` RGB, (H, W, 3) uint8.
            where: Which image this is, for the message.

        Returns:
            uint8, or int32 from 255 classes on and where ``ignore_index`` is above 255.

        Raises:
            DataError: the image is not of the kind that the spec describes, or holds a value or
                colour that the spec does not know; the message says which, in how many pixels,
                and what is probably the cause.
        """
        codes = self._codes(raw, where)
        train_ids: TrainIds
        if codes.dtype == np.uint8 and self._table.dtype == np.uint8:
            # In less than half the time of numpy's take.
            mapped = bytearray(codes).translate(self._table[:256].tobytes())
            train_ids = np.frombuffer(mapped, np.uint8).reshape(codes.shape)
        elif codes.dtype.itemsize > 2 and self.coding == "values":  # may be beyond the table
            inside = (codes >= RAW_VALUES[0]) & (codes <= RAW_VALUES[-1])
            train_ids = self._table.take(np.where(inside, codes, 0).astype(np.int64))
            train_ids[~inside] = self._unknown
        else:
            train_ids = self._table.take(codes)
        unknown = train_ids == self._unknown
        if unknown.any():
            raise DataError(f"{where}: {self._complaint(codes, unknown)}")
        return train_ids

    def _codes(self, raw: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
        """Whole numbers (H, W): the raw values, or every colour as one number."""
        colored = raw.ndim == 3 and raw.shape[2] == 3 and raw.dtype == np.uint8
        plain = raw.ndim == 2 and raw.dtype.kind in "biu"
        if colored and self.coding == "colors":
            red, green, blue = (raw[..., channel].astype(np.int32) for channel in range(3))
            return red << 16 | green << 8 | blue
        if plain and self.coding == "values":
            return raw.astype(np.uint8) if raw.dtype == bool else raw
        if plain:
            advice = (
                "the spec reads colours, labels.coding: colors; set labels.coding: values, or "
                "store the colours themselves, not the indices of a palette"
            )
        elif self.coding == "colors":
            advice = "three channels of 8 bits; store RGB without alpha"
        elif colored and (raw != raw[..., :1]).any():
            advice = (
                "one whole number per pixel; its colours seem to stand for classes: set "
                "labels.coding: colors and give labels.colors"
            )
        else:
            advice = "one whole number per pixel; store class numbers in one channel (8 or 16 bits)"
        raise DataError(
            f"{where}: the label image is an array of {raw.dtype} with shape {raw.shape}, "
            f"{'but' if plain else 'not'} {advice}"
        )

    def _complaint(self, codes: npt.NDArray[Any], unknown: npt.NDArray[np.bool_]) -> str:
        """Which value or colour has no meaning, where from, and what to do."""
        values, counts = np.unique(codes[unknown], return_counts=True)
        value, count = values[counts.argmax()].item(), counts.max()
        colored = self.coding == "colors"
        kind, kinds = ("colour", "colours") if colored else ("value", "values")
        others = f" (and {len(values) - 1} other unknown {kinds})" if len(values) > 1 else ""
        known = _listed(self._train_ids) if colored else _ranges(sorted(self._train_ids))
        # A wrong spec leaves areas unknown, a lossy format or a resize single pixels.
        square = unknown[1:, 1:] & (codes[1:, 1:] == codes[:-1, 1:])
        square &= codes[1:, 1:] == codes[1:, :-1]
        scattered = unknown.mean() < 0.5 and square.sum() < 0.1 * unknown.sum()
        if len(values) > 3 and (scattered or (colored and self._is_near(value))):
            cause = (
                f"so many {kinds} look like those of a lossy format (JPEG) or of resizing with "
                "interpolation: store labels losslessly and resize them by nearest neighbour; "
                f"otherwise the spec lacks these {kinds}"
            )
        else:
            cause = self._color_cause(value) if colored else self._value_cause(value, codes)
        return (
            f"label {kind} {_color(value) if colored else value} in {count} pixels{others} is not "
            f"in the label spec, which knows {known}; {cause}"
        )

    def _is_near(self, value: int) -> bool:
        """Whether a colour is a known one but for the rounding of a lossy format."""
        apart = np.subtract(_color(value), [_color(number) for number in self._train_ids])
        return bool((np.abs(apart) <= 8).all(axis=1).any())

    def _color_cause(self, value: int) -> str:
        color = _color(value)
        if _number(color[::-1]) in self._train_ids:
            return (
                f"{color[::-1]} is: if the channels are stored as BGR, store them as RGB; "
                "otherwise add the colour and its class to the data set's spec"
            )
        if color in ((0, 0, 0), (255, 255, 255)):
            return "it usually marks unlabelled pixels: add it to labels.ignored"
        return "correct the label image, or add the colour to the data set's spec"

    def _value_cause(self, value: int, codes: npt.NDArray[Any]) -> str:
        last = self.num_classes - 1
        plain = [self._train_ids.get(train_id) == train_id for train_id in range(last + 1)]
        shifted = [self._train_ids.get(train_id + 1) == train_id for train_id in range(last + 1)]
        if value == last + 1 and all(plain):
            zero = "0 marks unlabelled pixels" if (codes == 0).any() else "there is no 0 here"
            return (
                f"it is one above the last of the {last + 1} classes: if a class is missing, add "
                f"its name to labels.names; if labels count from 1 ({zero}), set labels.offset: 1; "
                "if it marks unlabelled pixels, add it to labels.ignored"
            )
        if value == 255 and last == 1 and np.isin(codes, (0, 255)).all():
            return (
                f"if 255 stands for {self.names[1]!r}, set labels.raw_to_train: {{0: 0, 255: 1}}; "
                "if it marks unlabelled pixels, add it to labels.ignored"
            )
        if value in (-1, 255, 65535) and all(shifted):
            return (
                "it usually marks unlabelled pixels, of labels that count from 0: leave "
                "labels.offset out if these do; otherwise add it to labels.ignored"
            )
        if value in (-1, 0, 255, 65535):
            return "it usually marks unlabelled pixels: add it to labels.ignored"
        return "correct the label image, or add the value to the data set's spec"


def distinct_colors(num_classes: int) -> tuple[Color, ...]:
    """Colours that are far apart, to people with red-green colour blindness too.

    The first seven are those of Okabe and Ito 2008 ("Color Universal Design"). Every further one
    is the colour of a grid that is farthest from those before it in OKLab (Ottosson 2020), where
    red-green differences count a third. More classes leave the colours of the first unchanged.

    Raises:
        ValueError: there are more classes than such colours.
    """
    steps = np.linspace(0, 255, 16, dtype=np.int64)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    grid = np.concatenate([np.array(OKABE_ITO), grid[_oklab(grid)[:, 0] > 0.3]])  # no near-blacks
    if num_classes > len(grid):
        raise ValueError(
            f"there are {len(grid)} distinct colours but {num_classes} classes; give their colors"
        )
    points = _oklab(grid) * (1, 1 / 3, 1)
    chosen: list[int] = []
    distance = np.full(len(grid), np.inf)
    for number in range(num_classes):
        chosen.append(number if number < len(OKABE_ITO) else int(distance.argmax()))
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(-1))
    return tuple((red, green, blue) for red, green, blue in grid[chosen].tolist())


def _oklab(rgb: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """sRGB 0-255 (N, 3) -> lightness, green-red and blue-yellow (N, 3)."""
    srgb = rgb / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def is_line(text: str) -> bool:
    """Whether a text is one line, without control characters and halves of characters."""
    return not any(unicodedata.category(char) in ("Cc", "Zl", "Zp", "Cs") for char in text)


def _number(color: Color) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]


def _color(number: int) -> Color:
    return number >> 16, number >> 8 & 255, number & 255


def _repeated(items: Any) -> Any:
    """The first item that occurs twice, or None."""
    seen = set()
    return next((item for item in items if item in seen or seen.add(item)), None)  # type: ignore


def _listed(numbers: Mapping[int, int]) -> str:
    colors = [str(_color(number)) for number in numbers]
    rest = len(colors) - LISTED_COLORS
    return ", ".join(colors[:LISTED_COLORS]) + (f" and {rest} more" if rest > 0 else "")


def _ranges(values: list[int]) -> str:
    """[0, 1, 2, 255] -> "0-2, 255"."""
    parts: list[list[int]] = []
    for value in values:
        if parts and value == parts[-1][-1] + 1:
            parts[-1][1:] = [value]
        else:
            parts.append([value])
    return ", ".join("-".join(map(str, part)) for part in parts)
