"""Batch of samples, as the data loaders return it."""

from typing import TypedDict

from torch import Tensor


class Batch(TypedDict):
    """B samples of one size.

    Attributes:
        image: (B, C, H, W) float32 in 0 to 1, not normalised; C is 3, RGB, or the ``num_bands`` of
            the data.
        label: (B, H, W) int64 train ids; ``ignore_index`` at unlabelled pixels.
        id: Ids of the B samples in the data set.
        seed: B random seeds. Each depends only on the data seed and on the sample's position in the
            order of the data. The task seeds drop path and dropout with the first one.
        skipped: Sample id -> reason, for each sample that could not be used. These samples are not
            in the batch; if no others are left, the batch is one blank, unlabelled image.
        notices: Kind (``"orientation"``, ``"frames"``, ``"bands"`` or ``"palette"``) -> message
            about a sample of the batch that was used but may be misread.
        palettes: Palette index -> colour (RGB, 0 to 255) and label image, for each palette index
            that the loader's worker met for the first time.
    """

    image: Tensor
    label: Tensor
    id: list[str]
    seed: list[int]
    skipped: dict[str, str]
    notices: dict[str, str]
    palettes: dict[int, tuple[tuple[int, ...], str]]
