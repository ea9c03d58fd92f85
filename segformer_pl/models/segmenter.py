"""The contract between a network and everything that trains, measures and stores it.

A network of this package is an :class:`Encoder` or a :class:`Segmenter`::

    images (B, C, H, W) --Encoder----> [(B, C_1, H_1, W_1), ..., (B, C_n, H_n, W_n)]
    images (B, C, H, W) --Segmenter--> (B, num_classes, h, w)

The rest of the package reads the attributes and methods below and nothing else: it does not ask
which architecture it has, and does not guess from parameter names. A new network inherits from
one of the two, sets the attributes and writes the methods without a default::

    class Tiny(Segmenter):
        def __init__(self, num_classes: int, width: int = 8) -> None:
            super().__init__()
            self.in_channels, self.num_classes = 3, num_classes
            self.features = nn.Conv2d(3, width, 3, stride=4, padding=1)
            self.classifier = nn.Conv2d(width, num_classes, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.classifier(self.feature_maps(images)["features"])

        def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
            return {"features": self.features(images).relu()}

        def init_args(self) -> dict[str, Any]:
            return {
                "num_classes": self.num_classes,
                "width": self.classifier.in_channels,
            }

These are base classes and not protocols because jsonargparse compares the methods of a protocol
annotation by annotation, and ``nn.Module.__call__`` has none: no network could be named on the
command line.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from segformer_pl.errors import UserError

Output = Literal["logits", "scores"]

# (class maps (B, num_classes, h, w), target (B, H, W) int64, ignore_index) -> scalar
Criterion = Callable[[Tensor, Tensor, int], Tensor]


class Network(nn.Module, ABC):
    """What an encoder and a segmenter have in common.

    Attributes:
        in_channels: Channels of the images.
        min_size: Smallest height and width of an image in pixels.
    """

    in_channels: int
    min_size: int = 1

    @abstractmethod
    def init_args(self) -> dict[str, Any]:
        """Return the constructor arguments that build a network like this one, as plain data.

        An argument that is itself a network is given as its ``spec()``. A checkpoint stores them,
        so that it can be opened without the script that trained it.
        """

    def spec(self) -> dict[str, Any]:
        """Return ``{"class_path": ..., "init_args": ...}``, the form of an experiment file."""
        cls = type(self)
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": self.init_args()}

    def parts(self) -> dict[str, str]:
        """Return the parts that a cost table lists: name -> path of the submodule, in order.

        No path lies inside another, and together they hold every parameter.
        """
        return {name: name for name, _ in self.named_children()}

    def layer_ids(self) -> dict[str, int]:
        """Return the depth of parameters for layer-wise learning rates: name -> 0, 1, 2, ...

        Depth 0 is next to the image. In a segmenter the parameters that are missing here are "the
        head", which trains at a multiple of the encoder's learning rate; by default all of them.
        """
        return {}

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that AdamW must not decay."""
        return set()

    def weight_constants(self) -> dict[str, float]:
        """Return constants that trained weights depend on and that no tensor holds.

        The epsilons of LayerNorms are such constants. They travel with the weights.
        """
        return {}

    def set_weight_constants(self, constants: Mapping[str, float]) -> None:
        """Set what :meth:`weight_constants` returned.

        Raises:
            UserError: The network has no constant of that name.
        """
        if constants:
            raise UserError(
                f"the weights state {', '.join(constants)}, which {type(self).__name__} does not "
                "have; give them to the network that they were trained in"
            )

    def paper_macs(self, height: int, width: int) -> int | None:
        """Return the multiply-adds that the network's paper counts for one image, if it has any.

        Papers and their tools differ in what they count.
        """
        return None


class Encoder(Network):
    """A backbone that gives a feature pyramid, the finest map first.

    It has no head: :meth:`layer_ids` has an entry for every parameter.

    Attributes:
        out_channels: Channels C_i of every map.
        out_strides: Side, in pixels of the image, of one unit of every map.
    """

    out_channels: tuple[int, ...]
    out_strides: tuple[int, ...]

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W) -> one (B, C_i, H_i, W_i) for each stage."""

    def layer_ids(self) -> dict[str, int]:
        """Return the depth of every parameter, by default 0: a single layer."""
        return {name: 0 for name, _ in self.named_parameters()}

    def out_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the sizes (H_i, W_i) of the maps of one image."""
        return [(math.ceil(height / s), math.ceil(width / s)) for s in self.out_strides]


class Segmenter(Network):
    """A semantic segmentation network.

    Attributes:
        num_classes: Number of classes.
        output: ``"logits"``, of which a softmax over the classes makes probabilities, or
            ``"scores"``, non-negative values that are compared as they are (MaskFormer's sum over
            queries).
        classifier_path: Path of the submodule whose parameters have the classes as their first
            dimension. Weights of other classes are reordered there, or initialised again. None:
            there is no such module.
        takes_criterion: Whether :meth:`training_loss` uses its ``criterion``. The task refuses a
            configured loss where it does not.
    """

    num_classes: int
    output: Output = "logits"
    classifier_path: str | None = None
    takes_criterion: bool = True

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> class maps (B, num_classes, h, w) at the network's own stride.

        Upsampling to pixels belongs to the loss and to inference, not to the network.
        """

    @abstractmethod
    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """(B, in_channels, H, W) -> named intermediate maps (B, C_i, H_i, W_i), in order.

        Receptive fields are measured on them. The last one is the input of the classifier.
        """

    def training_loss(
        self, images: Tensor, target: Tensor, criterion: Criterion, ignore_index: int
    ) -> Tensor:
        """Return the scalar that training minimises.

        Args:
            images: (B, in_channels, H, W), normalised.
            target: (B, H, W) int64 class indices.
            criterion: The configured loss per pixel. A network with auxiliary heads applies it to
                each of them.
            ignore_index: Class index of pixels that do not train.
        """
        return criterion(self(images), target, ignore_index)
