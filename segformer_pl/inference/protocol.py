"""The test-time protocol: what is asked for, not how it is computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jsonargparse import set_parsing_settings
from jsonargparse.typing import PositiveFloat, PositiveInt

from segformer_pl.errors import UserError


@dataclass(frozen=True)
class Inference:
    """Test-time protocol: resizing, sliding windows, scales and flips.

    The default is the whole image, in one pass, at its original size. The paper's protocols
    (Sec. 4.1): for ADE20K ``base_size=(2048, 512), resize_to=32``; for Cityscapes
    ``window=(1024, 1024), stride=(768, 768)``; "multi-scale" is ``scales=(0.75, 0.875, 1, 1.125,
    1.25), flip=True`` for ADE20K and ``(0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)`` for Cityscapes.

    Args:
        base_size: Long and short side in pixels that an image is fitted into at scale 1, keeping
            its aspect ratio. Default: its own size.
        resize_to: Divisor that both sides are stretched up to a multiple of, by a second bilinear
            resize (the reference's AlignedResize, with 32), so that no key or value is lost at the
            border.
        pad_to: Divisor that every view or window is padded up to a multiple of, at the bottom and
            on the right, with the mean colour, for the same purpose. The padding is cut off again.
        window: Height and width of sliding windows in pixels. A smaller image is one window.
        stride: Step of the windows, down and to the right, in pixels. The last window is moved
            back into the image. Default: two thirds of the window.
        window_weights: Weights of overlapping windows: equal (``"uniform"``, the paper's), or
            falling to the window's borders like a raised cosine (``"hann"``).
        scales: Factors of the views' sizes. Probabilities are averaged over the views.
        flip: Whether to add the mirrored image to every scale.

    Raises:
        UserError: The settings contradict each other. The message says which.
    """

    base_size: tuple[PositiveInt, PositiveInt] | None = None
    resize_to: PositiveInt | None = None
    pad_to: PositiveInt | None = None
    window: tuple[PositiveInt, PositiveInt] | None = None
    stride: tuple[PositiveInt, PositiveInt] | None = None
    window_weights: Literal["uniform", "hann"] = "uniform"
    scales: Sequence[PositiveFloat] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.resize_to is not None and self.pad_to is not None:
            raise UserError(
                f"inference: resize_to {self.resize_to} and pad_to {self.pad_to} are two ways to "
                "the same end; give one of them"
            )
        if self.window is None and (self.stride is not None or self.window_weights != "uniform"):
            raise UserError(
                "inference: stride and window_weights are about sliding windows, but there is no "
                "window; give its height and width too"
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


# By default jsonargparse takes the fields of a dataclass and no `class_path`, which experiment
# files and checkpoints state for `model.inference`.
set_parsing_settings(subclasses_enabled=[Inference])
