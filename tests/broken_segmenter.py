"""Networks outside of the package that break the contract in one way each, or only seem to."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from toy_segmenter import ToySegmenter


class Raises(ToySegmenter):
    """Its classifier takes another number of channels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.classes = nn.Conv2d(5, num_classes, 1)

    def init_args(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes}


class OtherClasses(Raises):
    """It returns one map too many."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.classes = nn.Conv2d(8, num_classes + 1, 1)


class OtherRank(Raises):
    """It returns the classes of whole images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.classes = nn.Conv2d(8, num_classes, 1)

    def forward(self, images: Tensor) -> Any:
        return super().forward(images).mean((2, 3))


class Pair(OtherRank):
    """It returns its maps in a tuple, and its feature maps in a list."""

    def forward(self, images: Tensor) -> Any:
        return (self.classes(super().feature_maps(images)["coarse"]), images)

    def feature_maps(self, images: Tensor) -> Any:
        return list(super().feature_maps(images).values())


class Caches(ToySegmenter):
    """It keeps the contract, and stores a tensor in its first forward pass."""

    def forward(self, images: Tensor) -> Tensor:
        if not hasattr(self, "offset"):
            self.offset = torch.linspace(0, 1, self.num_classes)[:, None, None]
        return super().forward(images) + self.offset


class NeedsValues(ToySegmenter):
    """It keeps the contract, and its forward pass depends on the values of the images."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * float(np.sign(1 + images.amax().item()))
