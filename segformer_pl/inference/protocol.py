"""Settings of the test-time protocol. ``engine.py`` computes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jsonargparse import set_parsing_settings
from jsonargparse.typing import PositiveFloat, PositiveInt

from segformer_pl.errors import UserError

Size = tuple[int, int]


@dataclass(frozen=True)
class Inference:
    """Test-time protocol: resizing, sliding windows, scales and flips.

    The default is the whole image, in one pass, at its original size. Protocols of the paper
    (Sec. 4.1):

    - ADE20K: ``base_size=(2048, 512), resize_to=32``;
    - Cityscapes: ``window=(1024, 1024), stride=(768, 768)``;
    - multi-scale on ADE20K: ``scales=(0.75, 0.875, 1, 1.125, 1.25), flip=True``;
    - multi-scale on Cityscapes: ``scales=(0.5, 0.75, 1, 1.25, 1.5, 1.75, 2), flip=True``.

    Args:
        base_size: Long and short side in pixels of the box that an image is fitted into at scale
            1, keeping its aspect ratio. Default: the image's own size.
        image_size: Height and width in pixels that an image is resized to at scale 1, whatever its
            aspect ratio, with antialiasing, as transformers' image processors do. Excludes
            ``base_size``. Default: the image's own size.
        resize_to: Divisor of both sides. A second bilinear resize enlarges each side to the next
            multiple (AlignedResize of the reference, with 32), so that the sequence reduction of
            attention drops no tokens at the border.
        pad_to: Divisor of both sides, for the same purpose. Every view or window is padded to the
            next multiple with the mean colour, at the bottom and on the right. The padding is cut
            off the prediction.
        window: Height and width of the sliding windows in pixels. A smaller image is one window.
        stride: Step of the windows, down and to the right, in pixels. The last window is moved
            back into the image. Default: two thirds of the window.
        window_weights: Weights of overlapping windows: equal (``"uniform"``, as in the paper), or
            falling towards the window's border like a raised cosine (``"hann"``).
        scales: Scale factors of the views. Probabilities are averaged over the views.
        flip: Whether to add a mirrored view at every scale.

    Raises:
        UserError: Two settings contradict each other.
    """

    base_size: tuple[PositiveInt, PositiveInt] | None = None
    image_size: tuple[PositiveInt, PositiveInt] | None = None
    resize_to: PositiveInt | None = None
    pad_to: PositiveInt | None = None
    window: tuple[PositiveInt, PositiveInt] | None = None
    stride: tuple[PositiveInt, PositiveInt] | None = None
    window_weights: Literal["uniform", "hann"] = "uniform"
    scales: Sequence[PositiveFloat] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.base_size is not None and self.image_size is not None:
            raise UserError(
                f"inference: base_size {list(self.base_size)} and image_size "
                f"{list(self.image_size)} are both set, and they exclude each other; give one of "
                "them"
            )
        if self.resize_to is not None and self.pad_to is not None:
            raise UserError(
                f"inference: resize_to {self.resize_to} and pad_to {self.pad_to} are both set, and "
                "they exclude each other; give one of them"
            )
        if self.window is None and (self.stride is not None or self.window_weights != "uniform"):
            raise UserError(
                "inference: stride or window_weights is set, but window is not; give the window's "
                "height and width too"
            )
        if not self.scales:
            raise UserError("inference: scales is empty; give at least one, such as [1.0]")
        if self.window is None:
            return
        if self.stride is None:
            height, width = (max(side * 2 // 3, 1) for side in self.window)
            object.__setattr__(self, "stride", (height, width))  # the dataclass is frozen
        elif any(step > side for step, side in zip(self.stride, self.window)):
            raise UserError(
                f"inference: a stride of {list(self.stride)} leaves gaps between windows of "
                f"{list(self.window)}; give at most the window's size"
            )

    def view_size(self, size: Size, scale: float) -> Size:
        """Return the size of an image's view: scaled, fitted into the base size, or resized.

        Sides are rounded as in mmcv. ``resize_to`` and ``pad_to`` come afterwards.

        Args:
            size: Height and width of the image in pixels.
            scale: Scale factor of the view.
        """
        if self.base_size is not None:
            long, short = (int(side * scale) for side in self.base_size)
            scale = min(long / max(size), short / min(size))
        height, width = (max(int(side * scale + 0.5), 1) for side in self.image_size or size)
        return height, width

    def is_one_window(self, size: Size) -> bool:
        """Return whether an image of this size is one view, one window, and not resized."""
        if len(self.scales) > 1 or self.flip or self.view_size(size, self.scales[0]) != size:
            return False
        is_within = all(side <= limit for side, limit in zip(size, self.window or size))
        return is_within and all(side % (self.resize_to or 1) == 0 for side in size)


# By default jsonargparse accepts the fields of a dataclass, but no `class_path`. Experiment files
# and checkpoints state one for `model.inference`.
set_parsing_settings(subclasses_enabled=[Inference])
