"""The colour of each palette index over many label images, to detect palettes that differ."""

import cv2
import numpy as np

from segformer_pl.data.decoding import RawLabel

# Palette index -> its colour and the label image that was the first to use the index.
FirstColors = dict[int, tuple[tuple[int, ...], str]]


class PaletteColors:
    """The colour of each palette index over many label images, to detect palettes that differ.

    With ``coding="values"``, the index alone stands for the class. If a program wrote each file
    with its own palette, one index may mean different classes in two files, and only the palettes
    show it::

        label a: palette 0 black, 1 red     index 1 = car
        label b: palette 0 black, 1 blue    index 1 = tree: compare() returns a warning
    """

    def __init__(self) -> None:
        self._first: FirstColors = {}

    def compare(self, label: RawLabel, where: str) -> tuple[str | None, FirstColors]:
        """Compare the palette of a label image with the palettes of earlier label images.

        Args:
            label: A label image. Without a palette it is ignored; with one, only the indices that
                occur in the image are compared.
            where: Name of the sample in the warning.

        Returns:
            A warning if an index has another colour than in an earlier label image, else None; and
            the indices that occur for the first time, as input of :meth:`merge`.
        """
        if label.palette is None:
            return None, {}
        pixels = cv2.calcHist([label.values], [0], None, [256], [0, 256]).ravel()
        indices = np.flatnonzero(pixels[: len(label.palette)]).tolist()
        colors = {index: (tuple(label.palette[index].tolist()), where) for index in indices}
        new = {index: color for index, color in colors.items() if index not in self._first}
        return self._merge(colors), new

    def merge(self, colors: FirstColors, split: str) -> str | None:
        """Add colours that another object collected, such as that of a data-loader worker.

        Args:
            colors: Indices and colours that :meth:`compare` returned there.
            split: Name of the split in the warning.

        Returns:
            A warning if an index has another colour than in an earlier label image, else None.
        """
        return self._merge(
            {
                index: (tuple(color), f"{where} of the {split} split")
                for index, (color, where) in colors.items()
            }
        )

    def _merge(self, colors: FirstColors) -> str | None:
        for index, (color, where) in colors.items():
            first_color, first = self._first.setdefault(index, (color, where))
            if color != first_color:
                return (
                    f"{where}: index {index} of the label's palette is the colour {color}, but "
                    f"{first_color} in {first}; classes are read from the indices: if the colours "
                    "stand for the classes, set labels.coding: colors"
                )
        return None
