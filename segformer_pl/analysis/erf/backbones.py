"""Networks of timm whose stages have the names of SegFormer's, as rows of a figure."""

from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from segformer_pl.analysis.erf.feature_extractor import channels_first
from segformer_pl.errors import UserError
from segformer_pl.normalization import IMAGENET_MEAN, IMAGENET_STD

STAGES = {4: "stage1", 8: "stage2", 16: "stage3", 32: "stage4"}  # by stride
ANY_SIZE = {"dynamic_img_size": True}
FULL_BRANCHES = {"zero_init_last": False, "ls_init_value": 1.0}  # ResNet, ConvNeXt


def _create(name: str, given: dict[str, Any]) -> Any:
    """Create the network, for images of any size where it supports that."""
    optional: dict[str, Any] = ANY_SIZE | ({} if given["pretrained"] else FULL_BRANCHES)
    while True:
        try:
            return timm.create_model(name, features_only=True, **given, **optional)
        except TypeError as error:
            refused = [key for key in optional if f"'{key}'" in str(error)]
            if not refused:
                raise
            del optional[refused[0]]


class TimmStages(nn.Module):
    """The feature maps of a timm network at strides 4, 8, 16 and 32, as ``stage1`` ... ``stage4``.

    timm starts the residual branches of ResNets at zero and those of ConvNeXts at a millionth, so
    that the receptive field of random weights would be that of the shortcuts alone. Here random
    branches start at full strength.

    Args:
        name: Name of the network in timm, such as ``resnet50``.
        weights: None for random weights, ``pretrained`` for timm's own, which are downloaded, or
            the path of a file.

    Attributes:
        in_channels: Number of channels of its images, 3.
        mean: Mean that normalises images in 0 to 1.
        std: Standard deviation that normalises images in 0 to 1.

    Raises:
        UserError: timm has no such network, or it has no feature maps of these strides.
    """

    in_channels = 3

    def __init__(self, name: str, weights: str | None = None) -> None:
        super().__init__()
        if not timm.is_model(name):
            close = ", ".join(timm.list_models(f"*{name}*")[:5])
            raise UserError(
                f"timm has no network {name!r}" + (f"; close are {close}" if close else "")
            )
        if weights not in (None, "pretrained") and not Path(str(weights)).is_file():
            raise UserError(f"timm:{name}: there is no file {weights!r} of weights")
        given: dict[str, Any] = {"pretrained": weights == "pretrained"}
        if weights not in (None, "pretrained"):
            given["pretrained_cfg_overlay"] = {"file": weights}
            given["pretrained"] = True
        try:
            network = _create(name, given)
        except (RuntimeError, AttributeError) as error:
            raise UserError(f"timm:{name} gives no feature maps: {error}") from error
        self.name, self.network = name, network
        strides = network.feature_info.reduction()
        # Several maps can have one stride; the last and deepest wins.
        self.indices = {STAGES[stride]: i for i, stride in enumerate(strides) if stride in STAGES}
        if not self.indices:
            raise UserError(f"timm:{name} has no feature map of stride 4, 8, 16 or 32")
        self.channels: list[int] = network.feature_info.channels()
        config: dict[str, Any] = getattr(network, "pretrained_cfg", {})
        self.mean = tuple(config.get("mean", IMAGENET_MEAN))
        self.std = tuple(config.get("std", IMAGENET_STD))

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> ``stage1`` ... ``stage4``, (B, C_i, H_i, W_i).

        Raises:
            UserError: The network accepts no images of this size.
        """
        size = (images.shape[2], images.shape[3])
        try:
            maps = self.network(images)
        except AssertionError as error:
            raise UserError(
                f"timm:{self.name} accepts no images of {size[0]}x{size[1]} pixels ({error}); "
                "resize them, on the command line with --size"
            ) from error
        named = {}
        for name, index in self.indices.items():
            is_first = maps[index].shape[1] == self.channels[index]
            layout = "channels_first" if is_first else "channels_last"
            named[name] = channels_first(maps[index], size, layout, name)  # type: ignore[arg-type]
        return named

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> the deepest of the feature maps."""
        return list(self.feature_maps(images).values())[-1]
