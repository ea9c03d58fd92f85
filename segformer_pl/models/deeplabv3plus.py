"""DeepLabv3+: atrous spatial pyramid pooling, and a decoder with low-level features.

The paper is "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation"
(Chen et al. 2018). mmsegmentation has a wider variant, which SegFormer's Table 2 compares with.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segformer_pl.errors import UserError
from segformer_pl.models.paper_macs import convolution_macs
from segformer_pl.models.segmenter import Criterion, Encoder, Segmenter
from segformer_pl.models.timm_encoder import TimmEncoder

LOW_STRIDE = 4
# Rates of the atrous convolutions by output stride (Chen et al. 2017, Sec. 3.3).
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}


class DeepLabV3Plus(Segmenter):
    """DeepLabv3+: a convolutional encoder with dilation, ASPP, and a decoder at stride 4.

    At output stride 16, with the channels of a ResNet-50::

        stage1  stride  4,  256 ch   1x1, 48 ch ----------------- concat, [3x3, 256 ch] x 2, 1x1
        stage2  stride  8,  512 ch                                  |
        stage3  stride 16, 1024 ch   (auxiliary head)               |
        stage4  stride 16, 2048 ch   ASPP, 256 ch --- upsample x 4 -+

    Every convolution but the classifier is followed by BatchNorm and ReLU. Upsampling is bilinear
    with ``align_corners=False``, as in mmsegmentation and torchvision; the authors' code has True.

    Shapes: (B, in_channels, H, W) -> logits (B, num_classes, ceil(H/4), ceil(W/4)). Upsampling to
    pixels belongs to the loss and to inference, not to the network.

    Args:
        encoder: Encoder, whose output is a feature pyramid (B, C_i, H_i, W_i), finest map first.
            ASPP reads the last map, the decoder also the one of stride 4, and the auxiliary head
            the last but one.
        num_classes: Number of classes.
        decoder_dim: Channels of ASPP and of the decoder. Paper: 256; mmsegmentation: 512.
        atrous_rates: Rates of ASPP's 3x3 convolutions, in cells of the encoder's last map. Default:
            6, 12, 18 at output stride 16, and twice that at 8. On maps that are not larger than a
            rate, only the middle of the kernel meets the map: give small images small rates.
        separable: Whether ASPP's atrous convolutions and the decoder's 3x3 convolutions are split
            into a depthwise and a pointwise one, each followed by BatchNorm and ReLU. In the paper
            they are with Xception, but not with ResNet (Tables 3 and 5).
        projection_kernel: Kernel size of the convolution after ASPP's concatenation. Paper: 1;
            mmsegmentation: 3.
        low_channels: Channels to which the map of stride 4 is reduced (varied in Table 1).
        num_convs: Number of the decoder's 3x3 convolutions (varied in Table 2).
        aspp_dropout: Rate of the dropout after ASPP, as in the authors' code.
        dropout: Rate of the channel dropout before each classifier, as in mmsegmentation.
        aux_weight: Weight of the auxiliary head's loss. With 0 there is no auxiliary head.

    Raises:
        UserError: The encoder lacks a map that the decoder needs, its last map has another stride
            than 8 and 16 and no rates are given, or an argument is out of range.
    """

    auxiliary_paths = ("aux_head",)
    training_arguments = ("aspp_dropout", "dropout", "aux_weight")
    publication = (
        "Chen et al., Encoder-Decoder with Atrous Separable Convolution for Semantic Image "
        "Segmentation, ECCV 2018, https://arxiv.org/abs/1802.02611"
    )

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        decoder_dim: int = 256,
        atrous_rates: Sequence[int] | None = None,
        separable: bool = False,
        projection_kernel: Literal[1, 3] = 1,
        low_channels: int = 48,
        num_convs: int = 2,
        aspp_dropout: float = 0.1,
        dropout: float = 0.0,
        aux_weight: float = 0.0,
    ) -> None:
        super().__init__()
        _check_pyramid(encoder, aux_weight > 0)
        rates = _checked_rates(encoder, atrous_rates)
        if num_convs < 1:
            raise UserError(f"num_convs={num_convs}: give the decoder at least 1 convolution")
        if aux_weight < 0:
            raise UserError(f"aux_weight={aux_weight}: give 0 or more; 0 means no auxiliary head")
        self.in_channels = encoder.in_channels
        self.num_classes = num_classes
        self.min_size = encoder.min_size
        self.separable, self.num_convs, self.aux_weight = separable, num_convs, aux_weight
        self.low_index = encoder.out_strides.index(LOW_STRIDE)
        self.encoder = encoder
        self.aspp = ASPP(
            encoder.out_channels[-1],
            decoder_dim,
            rates,
            separable,
            projection_kernel,
            aspp_dropout,
        )
        self.low_level = conv_bn_relu(encoder.out_channels[self.low_index], low_channels, 1)
        widths = [decoder_dim + low_channels] + [decoder_dim] * num_convs
        conv3x3 = separable_conv if separable else conv_bn_relu
        self.decoder = nn.Sequential(*(conv3x3(a, b, 3) for a, b in pairwise(widths)))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(decoder_dim, num_classes, 1)
        self.aux_head = (
            FCNHead(encoder.out_channels[-2], num_classes, dropout) if aux_weight > 0 else None
        )
        auxiliary = () if self.aux_head is None else ("aux_head.classifier",)
        self.classifier_paths: tuple[str, ...] = ("classifier", *auxiliary)
        # As in TimmEncoder: channels-last maps give channels-last gradients.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes, H_1, W_1) of images (B, in_channels, H, W)."""
        return self.classify(self.encoder(images))

    def training_loss(
        self, images: Tensor, target: Tensor, criterion: Criterion, ignore_index: int
    ) -> Tensor:
        """Return the loss of the logits, plus ``aux_weight`` times that of the auxiliary head."""
        features = self.encoder(images)
        loss = criterion(self.classify(features), target, ignore_index)
        if self.aux_head is None:
            return loss
        auxiliary = criterion(self.aux_head(features[-2]), target, ignore_index)
        return loss + self.aux_weight * auxiliary

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the intermediate maps for analysis, from the image to the classifier.

        Returns:
            ``stage1`` ... ``stage4``: the encoder's maps, (B, C_i, H_i, W_i);
            ``aspp``: the output of ASPP, (B, decoder_dim, H_4, W_4);
            ``head``: the output of the decoder, (B, decoder_dim, H_1, W_1), which is the input of
            the classifier.
        """
        features = self.encoder(images)
        aspp = self.aspp(features[-1])
        named = {f"stage{i}": feature for i, feature in enumerate(features, start=1)}
        return named | {"aspp": aspp, "head": self.decode(features, aspp)}

    def classify(self, features: Sequence[Tensor]) -> Tensor:
        """Return logits (B, num_classes, H_1, W_1) of a feature pyramid of (B, C_i, H_i, W_i)."""
        fused = self.decode(features, self.aspp(features[-1]))
        return self.classifier(self.dropout(fused))

    def decode(self, features: Sequence[Tensor], aspp: Tensor) -> Tensor:
        """Return the decoder's map (B, decoder_dim, H_1, W_1).

        Args:
            features: The feature pyramid, maps (B, C_i, H_i, W_i).
            aspp: Output of ASPP, (B, decoder_dim, H_4, W_4).
        """
        low = self.low_level(features[self.low_index])
        # A factor would not do: 513 pixels have maps of 129 and 33.
        aspp = F.interpolate(aspp, size=low.shape[2:], mode="bilinear", align_corners=False)
        return self.decoder(torch.cat([aspp, low], dim=1))

    def init_args(self) -> dict[str, Any]:
        return {
            "encoder": self.encoder.spec(),
            "num_classes": self.num_classes,
            "decoder_dim": self.classifier.in_channels,
            "atrous_rates": self.aspp.rates,
            "separable": self.separable,
            "projection_kernel": self.aspp.projection_kernel,
            "low_channels": self.low_level[0].out_channels,
            "num_convs": self.num_convs,
            "aspp_dropout": self.aspp.dropout.p,
            "dropout": self.dropout.p,
            "aux_weight": self.aux_weight,
        }

    def no_weight_decay(self) -> set[str]:
        """Return those of the encoder only; the head's BatchNorms decay, as in mmsegmentation."""
        return super().no_weight_decay()

    def paper_macs(self, height: int, width: int) -> int | None:
        """Return the "FLOPs" of SegFormer's Table 2, None if the encoder's are unknown.

        For mmsegmentation's variant on ResNet-101 they are the table's 255.1 G (ADE20K, 512x512)
        and 2032.3 G (Cityscapes, 1024x2048). The auxiliary head is not counted. See
        :mod:`~segformer_pl.models.paper_macs` for the rules. The paper of DeepLabv3+ counts
        otherwise: 101.28 G with ResNet-101 at output stride 16, 513x513 pixels and 21 classes,
        and here 92.9 G.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
        """
        of_encoder = self.encoder.paper_macs(height, width)
        if of_encoder is None:
            return None
        sizes = self.encoder.out_sizes(height, width)
        num_low, num_last = (math.prod(sizes[index]) for index in (self.low_index, -1))
        of_aspp = self.encoder.out_channels[-1] * num_last  # the image pooling
        of_aspp += _macs(self.aspp.pool, 1)
        of_aspp += _macs(self.aspp.branches, num_last) + _macs(self.aspp.project, num_last)
        decoder = (self.low_level, self.decoder, self.classifier)
        return of_encoder + of_aspp + sum(_macs(module, num_low) for module in decoder)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al. 2017, Sec. 3.3).

    An image pooling, a 1x1 convolution and 3x3 convolutions of several rates read the same map.
    Their outputs are concatenated in this order and projected.

    Shapes: (B, in_channels, h, w) -> (B, out_channels, h, w).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of every branch and of the output.
        rates: Rates (dilations) of the 3x3 convolutions.
        separable: Whether the 3x3 convolutions are split into a depthwise and a pointwise one.
        projection_kernel: Kernel size of the convolution after the concatenation.
        dropout: Rate of the dropout after it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rates: Sequence[int],
        separable: bool = False,
        projection_kernel: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.rates = tuple(rates)
        self.projection_kernel = projection_kernel
        conv3x3 = separable_conv if separable else conv_bn_relu
        self.pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), *conv_bn_relu(in_channels, out_channels, 1)
        )
        self.branches = nn.ModuleList(
            [
                conv_bn_relu(in_channels, out_channels, 1),
                *(conv3x3(in_channels, out_channels, 3, rate) for rate in self.rates),
            ]
        )
        num_maps = 1 + len(self.branches)
        self.project = conv_bn_relu(num_maps * out_channels, out_channels, projection_kernel)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Return the map (B, out_channels, h, w) of a map (B, in_channels, h, w).

        Raises:
            UserError: In training, the BatchNorm of the image pooling gets a single value for each
                channel, as the batch holds a single image.
        """
        pooled = self._pool(features).expand(-1, -1, *features.shape[2:])
        # Otherwise the concatenation of channels-last branches would not be channels-last.
        pooled = pooled.contiguous(memory_format=torch.channels_last)
        branches = [branch(features) for branch in self.branches]
        return self.dropout(self.project(torch.cat([pooled, *branches], dim=1)))

    def _pool(self, features: Tensor) -> Tensor:
        try:
            return self.pool(features)
        except ValueError as error:
            # torch decides: with synchronised BatchNorm one image on each rank is enough.
            if "more than 1 value" not in str(error):
                raise
            raise UserError(
                "the image pooling of ASPP cannot train on a batch of 1 image, because its "
                "BatchNorm needs several values for each channel; give data.batch_size 2 or more, "
                "or trainer.sync_batchnorm true on several devices"
            ) from error


class FCNHead(nn.Module):
    """Auxiliary head of mmsegmentation: a 3x3 convolution and the classifier.

    Shapes: (B, in_channels, h, w) -> logits (B, num_classes, h, w).

    Args:
        in_channels: Channels of the input. The hidden map has a quarter of them.
        num_classes: Number of classes.
        dropout: Rate of the channel dropout before the classifier.
    """

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = conv_bn_relu(in_channels, in_channels // 4, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(in_channels // 4, num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, num_classes, h, w) of a map (B, in_channels, h, w)."""
        return self.classifier(self.dropout(self.conv(features)))


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int, rate: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return a convolution without bias that keeps the size, BatchNorm and ReLU."""
    padding = rate * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, 1, padding, rate, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def separable_conv(
    in_channels: int, out_channels: int, kernel: int, rate: int = 1
) -> nn.Sequential:
    """Return a depthwise and a pointwise convolution, each with BatchNorm and ReLU."""
    return nn.Sequential(
        conv_bn_relu(in_channels, in_channels, kernel, rate, groups=in_channels),
        conv_bn_relu(in_channels, out_channels, 1),
    )


def _macs(module: nn.Module, num_outputs: int) -> int:
    """Return the multiply-adds of convolutions that keep the size, and of the ReLUs after them."""
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    macs = sum(convolution_macs(convolution, num_outputs) for convolution in convolutions)
    # All but the classifier, which alone has a bias, are followed by BatchNorm and ReLU.
    return macs + sum(c.out_channels * num_outputs for c in convolutions if c.bias is None)


def _check_pyramid(encoder: Encoder, has_aux_head: bool) -> None:
    """Check that an encoder has the maps that the decoder and the auxiliary head read.

    Raises:
        UserError: It has not.
    """
    strides = ", ".join(map(str, encoder.out_strides))
    needed = 3 if has_aux_head else 2
    if LOW_STRIDE not in encoder.out_strides[:-1]:
        raise UserError(
            f"the decoder of DeepLabv3+ reads a map of stride {LOW_STRIDE} before the last one, "
            f"and the encoder's maps have strides {strides}; choose another encoder or other "
            "out_indices"
        )
    if len(encoder.out_strides) < needed:
        raise UserError(
            f"the auxiliary head reads the map before the last one, which the decoder reads too if "
            f"the encoder has only strides {strides}; choose other out_indices or aux_weight 0"
        )


def _checked_rates(encoder: Encoder, rates: Sequence[int] | None) -> tuple[int, ...]:
    """Return the rates of ASPP; by default those of the encoder's output stride.

    Raises:
        UserError: There are no default rates for it, or one of the rates is below 1.
    """
    stride = encoder.out_strides[-1]
    if rates is None:
        if stride not in ATROUS_RATES:
            raise UserError(
                f"the encoder's last map has stride {stride}, and ASPP has default rates for 16 "
                "and 8; give the encoder an output_stride of 16 or 8, or give atrous_rates"
            )
        return ATROUS_RATES[stride]
    if not rates or min(rates) < 1:
        raise UserError(f"atrous_rates={tuple(rates)}: give one or more rates of at least 1")
    return tuple(rates)


def deeplabv3plus(
    num_classes: int,
    backbone: str = "resnet101",
    output_stride: int = 16,
    decoder_dim: int = 256,
    atrous_rates: Sequence[int] | None = None,
    separable: bool = False,
    aux_weight: float = 0.0,
    **kwargs: Any,
) -> DeepLabV3Plus:
    """DeepLabv3+ as in the paper: 59.4 M parameters with ResNet-101 at 150 classes.

    Args:
        num_classes: Number of classes.
        backbone: Name of a convolutional network in timm.
        output_stride: Stride of the encoder's last map, 16 or 8.
        decoder_dim: Channels of ASPP and of the decoder.
        atrous_rates: Rates of ASPP. Default: 6, 12, 18 at output stride 16, and twice that at 8.
        separable: Whether the 3x3 convolutions are depthwise separable, as with Xception.
        aux_weight: Weight of the auxiliary head's loss; the paper has none.
        kwargs: Arguments of :class:`~segformer_pl.models.TimmEncoder`.
    """
    encoder = TimmEncoder(backbone, output_stride=output_stride, **kwargs)
    return DeepLabV3Plus(
        encoder, num_classes, decoder_dim, atrous_rates, separable, aux_weight=aux_weight
    )


def deeplabv3plus_mmseg(
    num_classes: int,
    backbone: str = "resnet101c",
    output_stride: int = 8,
    decoder_dim: int = 512,
    atrous_rates: Sequence[int] | None = None,
    separable: bool = True,
    aux_weight: float = 0.4,
    **kwargs: Any,
) -> DeepLabV3Plus:
    """DeepLabv3+ as in mmsegmentation (``r101-d8``): 62.7 M parameters at 150 classes.

    It is the "DeepLabV3+ ResNet-101" of SegFormer's Table 2.

    Args:
        num_classes: Number of classes.
        backbone: Name of a convolutional network in timm.
        output_stride: Stride of the encoder's last map, 8 or 16.
        decoder_dim: Channels of ASPP and of the decoder.
        atrous_rates: Rates of ASPP. Default: 12, 24, 36 at output stride 8, and half of that at 16.
        separable: Whether the 3x3 convolutions are depthwise separable.
        aux_weight: Weight of the auxiliary head's loss. With 0 there is no auxiliary head.
        kwargs: Arguments of :class:`~segformer_pl.models.TimmEncoder`.
    """
    encoder = TimmEncoder(backbone, output_stride=output_stride, **kwargs)
    return DeepLabV3Plus(
        encoder,
        num_classes,
        decoder_dim,
        atrous_rates,
        separable,
        projection_kernel=3,
        aspp_dropout=0.0,
        dropout=0.1,
        aux_weight=aux_weight,
    )
