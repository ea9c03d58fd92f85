"""Why a label image does not fit a label specification, in words that help to mend it.

An unknown label value has a few usual causes: a lossy format, an interpolating resize, a mask that
counts from 1, masks of 0 and 255, unlabelled pixels that the specification does not list, channels
in the order BGR. The functions look at the image and the specification and name the likely one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from segformer_pl.data.class_colors import pack_color, unpack_color

Coding: TypeAlias = Literal["values", "colors"]

LISTED_COLORS = 12  # of the known ones, in a message


def describe_wrong_array(raw: npt.NDArray[Any], coding: Coding) -> str:
    """Say why an array cannot be a label image of this coding.

    Args:
        raw: The array, neither (H, W) integers nor, for ``coding="colors"``, (H, W, 3) uint8.
        coding: What the specification expects.
    """
    is_plain = raw.ndim == 2 and raw.dtype.kind in "biu"
    is_color = raw.ndim == 3 and raw.shape[2] == 3 and raw.dtype == np.uint8
    if is_plain:
        advice = (
            "the spec reads colours, labels.coding: colors; set labels.coding: values, or "
            "store the colours themselves, not the indices of a palette"
        )
    elif coding == "colors":
        advice = "three channels of 8 bits; store RGB without alpha"
    elif is_color and (raw != raw[..., :1]).any():
        advice = (
            "one whole number per pixel; its colours seem to stand for classes: set "
            "labels.coding: colors and give labels.colors"
        )
    else:
        advice = "one whole number per pixel; store class numbers in one channel (8 or 16 bits)"
    return (
        f"the label image is an array of {raw.dtype} with shape {raw.shape}, "
        f"{'but' if is_plain else 'not'} {advice}"
    )


def describe_unknown_values(
    codes: npt.NDArray[Any],
    unknown: npt.NDArray[np.bool_],
    coding: Coding,
    train_ids: Mapping[int, int],
    names: Sequence[str],
) -> str:
    """Say which value or colour has no meaning, where it occurs, and what to do.

    Args:
        codes: (H, W) raw values, or packed colours.
        unknown: (H, W) where these are not in ``train_ids``; somewhere at least.
        coding: Whether ``codes`` are values or colours.
        train_ids: Train id of every known code.
        names: Class names by train id.
    """
    values, counts = np.unique(codes[unknown], return_counts=True)
    value, count = values[counts.argmax()].item(), counts.max()
    is_color = coding == "colors"
    kind, kinds = ("colour", "colours") if is_color else ("value", "values")
    others = f" (and {len(values) - 1} other unknown {kinds})" if len(values) > 1 else ""
    known = _list_colors(train_ids) if is_color else _list_ranges(sorted(train_ids))
    # A wrong specification leaves areas unknown, a lossy format or a resize single pixels.
    square = unknown[1:, 1:] & (codes[1:, 1:] == codes[:-1, 1:])
    square &= codes[1:, 1:] == codes[1:, :-1]
    is_scattered = unknown.mean() < 0.5 and square.sum() < 0.1 * unknown.sum()
    if len(values) > 3 and (is_scattered or (is_color and _is_near(value, train_ids))):
        cause = (
            f"so many {kinds} look like those of a lossy format (JPEG) or of resizing with "
            "interpolation: store labels losslessly and resize them by nearest neighbour; "
            f"otherwise the spec lacks these {kinds}"
        )
    elif is_color:
        cause = _cause_of_color(value, train_ids)
    else:
        cause = _cause_of_value(value, codes, train_ids, names)
    return (
        f"label {kind} {unpack_color(value) if is_color else value} in {count} pixels{others} is "
        f"not in the label spec, which knows {known}; {cause}"
    )


def _is_near(value: int, train_ids: Mapping[int, int]) -> bool:
    """Whether a colour is a known one but for the rounding of a lossy format."""
    apart = np.subtract(unpack_color(value), [unpack_color(number) for number in train_ids])
    return bool((np.abs(apart) <= 8).all(axis=1).any())


def _cause_of_color(value: int, train_ids: Mapping[int, int]) -> str:
    red, green, blue = color = unpack_color(value)
    if pack_color((blue, green, red)) in train_ids:
        return (
            f"{(blue, green, red)} is: if the channels are stored as BGR, store them as RGB; "
            "otherwise add the colour and its class to the data set's spec"
        )
    if color in ((0, 0, 0), (255, 255, 255)):
        return "it usually marks unlabelled pixels: add it to labels.ignored"
    return "correct the label image, or add the colour to the data set's spec"


def _cause_of_value(
    value: int, codes: npt.NDArray[Any], train_ids: Mapping[int, int], names: Sequence[str]
) -> str:
    last = len(names) - 1
    counts_from_0 = all(train_ids.get(train_id) == train_id for train_id in range(last + 1))
    counts_from_1 = all(train_ids.get(train_id + 1) == train_id for train_id in range(last + 1))
    if value == last + 1 and counts_from_0:
        zero = "0 marks unlabelled pixels" if (codes == 0).any() else "there is no 0 here"
        return (
            f"it is one above the last of the {last + 1} classes: if a class is missing, add "
            f"its name to labels.names; if labels count from 1 ({zero}), set labels.offset: 1; "
            "if it marks unlabelled pixels, add it to labels.ignored"
        )
    if value == 255 and last == 1 and np.isin(codes, (0, 255)).all():
        return (
            f"if 255 stands for {names[1]!r}, set labels.raw_to_train: {{0: 0, 255: 1}}; "
            "if it marks unlabelled pixels, add it to labels.ignored"
        )
    if value in (-1, 255, 65535) and counts_from_1:
        return (
            "it usually marks unlabelled pixels, of labels that count from 0: leave "
            "labels.offset out if these do; otherwise add it to labels.ignored"
        )
    if value in (-1, 0, 255, 65535):
        return "it usually marks unlabelled pixels: add it to labels.ignored"
    return "correct the label image, or add the value to the data set's spec"


def _list_colors(numbers: Mapping[int, int]) -> str:
    colors = [str(unpack_color(number)) for number in numbers]
    rest = len(colors) - LISTED_COLORS
    return ", ".join(colors[:LISTED_COLORS]) + (f" and {rest} more" if rest > 0 else "")


def _list_ranges(values: list[int]) -> str:
    """[0, 1, 2, 255] -> "0-2, 255"."""
    parts: list[list[int]] = []
    for value in values:
        if parts and value == parts[-1][-1] + 1:
            parts[-1][1:] = [value]
        else:
            parts.append([value])
    return ", ".join("-".join(map(str, part)) for part in parts)
