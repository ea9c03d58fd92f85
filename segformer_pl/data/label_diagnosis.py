"""Error messages for label images that do not match their label specification.

An unknown label value has a few usual causes: a lossy format, a resize with interpolation, class
numbers that start at 1, a binary mask of 0 and 255, unlabelled pixels that the specification does
not list, or channels in BGR order. The functions infer the likely cause from the label image and
the specification.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from segformer_pl.data.class_colors import pack_color, unpack_color
from segformer_pl.errors import counted

Coding: TypeAlias = Literal["values", "colors"]

LISTED_COLORS = 12  # maximum number of known colours in a message


def describe_wrong_array(raw: npt.NDArray[Any], coding: Coding) -> str:
    """Describe why an array cannot be a label image of this coding.

    Args:
        raw: Array whose shape or type does not match ``coding``.
        coding: Coding that the specification expects: ``"values"`` for (H, W) integers,
            ``"colors"`` for (H, W, 3) uint8.

    Returns:
        An error message without a prefix.
    """
    is_plain = raw.ndim == 2 and raw.dtype.kind in "biu"
    is_color = raw.ndim == 3 and raw.shape[2] == 3 and raw.dtype == np.uint8
    if is_plain:
        advice = (
            "labels.coding: colors expects colours; set labels.coding: values, or store the "
            "colours themselves instead of palette indices"
        )
    elif coding == "colors":
        advice = "three channels of 8 bits; store RGB without alpha"
    elif is_color and (raw != raw[..., :1]).any():
        advice = (
            "one integer per pixel; its colours seem to stand for classes: set "
            "labels.coding: colors and give labels.colors"
        )
    elif is_color:
        advice = (
            "one integer per pixel; its channels are equal: store one of them if it holds class "
            "numbers, or, where colours stand for classes, set labels.coding: colors and give "
            "labels.colors"
        )
    else:
        advice = "one integer per pixel; store class numbers in one channel (8 or 16 bits)"
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
    """Describe the values or colours that a label spec does not map, and their probable cause.

    Args:
        codes: (H, W) raw values, or packed colours.
        unknown: (H, W) mask of the codes that are not in ``train_ids``, at least one.
        coding: Whether ``codes`` are values or colours.
        train_ids: Train id of every known code.
        names: Class names, indexed by train id.

    Returns:
        An error message without a prefix.
    """
    values, counts = np.unique(codes[unknown], return_counts=True)
    value, count = values[counts.argmax()].item(), counts.max()
    is_color = coding == "colors"
    kind, kinds = ("colour", "colours") if is_color else ("value", "values")
    others = f" (and {len(values) - 1} other unknown {kinds})" if len(values) > 1 else ""
    known = _list_colors(train_ids) if is_color else _list_ranges(sorted(train_ids))
    # A wrong specification leaves whole areas unknown; a lossy format or a resize leaves single
    # pixels. A pixel is inside an area if the pixels above and to the left have its value:
    #     . v
    #     v v  <- this one
    in_area = unknown[1:, 1:] & (codes[1:, 1:] == codes[:-1, 1:])
    in_area &= codes[1:, 1:] == codes[1:, :-1]
    is_scattered = unknown.mean() < 0.5 and in_area.sum() < 0.1 * unknown.sum()
    if len(values) > 3 and (is_scattered or (is_color and _is_near(value, train_ids))):
        cause = (
            f"the number of unknown {kinds} suggests a lossy format (JPEG) or resizing with "
            "interpolation: store labels losslessly and resize them by nearest neighbour; "
            f"otherwise add these {kinds} to the data set's labels"
        )
    elif is_color:
        cause = _cause_of_color(value, train_ids)
    else:
        cause = _cause_of_value(value, codes, train_ids, names)
    return (
        f"label {kind} {unpack_color(value) if is_color else value} in "
        f"{counted(count, 'pixel')}{others} is "
        f"not among the data set's labels ({known}); {cause}"
    )


def _is_near(value: int, train_ids: Mapping[int, int]) -> bool:
    """Return whether a colour is a known one up to the error of a lossy format."""
    difference = np.subtract(unpack_color(value), [unpack_color(number) for number in train_ids])
    return bool((np.abs(difference) <= 8).all(axis=1).any())


def _cause_of_color(value: int, train_ids: Mapping[int, int]) -> str:
    """Return the probable cause of an unknown colour, and the remedy."""
    red, green, blue = color = unpack_color(value)
    if pack_color((blue, green, red)) in train_ids:
        return (
            f"{(blue, green, red)} is among them: if the channels are stored as BGR, store them "
            "as RGB; otherwise add the colour and its class to labels"
        )
    if color in ((0, 0, 0), (255, 255, 255)):
        return "it usually marks unlabelled pixels: add it to labels.ignored"
    return "correct the label image, or add the colour to labels in the data set's description"


def _cause_of_value(
    value: int, codes: npt.NDArray[Any], train_ids: Mapping[int, int], names: Sequence[str]
) -> str:
    """Return the probable cause of an unknown value, and the remedy."""
    last = len(names) - 1
    starts_at_0 = all(train_ids.get(train_id) == train_id for train_id in range(last + 1))
    starts_at_1 = all(train_ids.get(train_id + 1) == train_id for train_id in range(last + 1))
    if value == last + 1 and starts_at_0:
        zero = "0 marks unlabelled pixels" if (codes == 0).any() else "this image has no 0"
        return (
            f"it is one above the last of the {last + 1} classes: if a class is missing, add "
            f"its name to labels.names; if labels start at 1 ({zero}), set labels.offset: 1; "
            "if it marks unlabelled pixels, add it to labels.ignored"
        )
    if value == 255 and last == 1 and np.isin(codes, (0, 255)).all():
        return (
            f"if 255 stands for {names[1]!r}, set labels.raw_to_train: {{0: 0, 255: 1}}; "
            "if it marks unlabelled pixels, add it to labels.ignored"
        )
    if value in (-1, 255, 65535) and starts_at_1:
        return (
            "it usually marks unlabelled pixels of labels that start at 0: if these do, leave "
            "labels.offset out; otherwise add it to labels.ignored"
        )
    if value in (-1, 0, 255, 65535):
        return "it usually marks unlabelled pixels: add it to labels.ignored"
    return "correct the label image, or add the value to labels in the data set's description"


def _list_colors(numbers: Mapping[int, int]) -> str:
    """List the first known colours, and the number of the others."""
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
