"""What the data loaders hand to the training, the evaluation and the callbacks."""

from typing import TypedDict

from torch import Tensor


class Batch(TypedDict):
    """B samples of one size.

    Attributes:
        image: (B, 3, H, W) float32 RGB in 0 to 1, not normalised.
        label: (B, H, W) int64 train ids; ``ignore_index`` where there is no class.
        id: B names of samples, as the data set has them.
        seed: B random numbers, each a function of the data seed and the sample's position alone,
            for whatever else is to be drawn for the sample.
        skipped: Id of each sample that could not be used, and the sentence that says why. They are
            not in the batch, unless nothing else would be: then one blank image without labels.
        notices: Kind of notice (``"orientation"``, ``"frames"``, ``"palette"``), and a sentence
            about a sample of that kind that is used, though it may not mean what it is taken for.
        palettes: Palette index that a label image of the batch was the first of its loader process
            to use: its colour (RGB, 0-255), and which label that was.
    """

    image: Tensor
    label: Tensor
    id: list[str]
    seed: list[int]
    skipped: dict[str, str]
    notices: dict[str, str]
    palettes: dict[int, tuple[tuple[int, ...], str]]
