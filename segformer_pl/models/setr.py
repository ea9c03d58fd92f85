"""SETR: a plain vision transformer and one of three decoders (Zheng et al., CVPR 2021).

In reading order: the heads of Naive and PUP, neck and heads of MLA, the segmenter, variants.

Symbols: B batch size, C channels of the encoder, D = ``decoder_dim``, K classes, h x w the grid of
patches (stride P, 16 in the paper). The widths, biases and upsampling steps are those of the
authors' code, where the paper leaves them open::

    Naive   Z_24                   LN, 1x1 conv to D            classifier     logits at stride P
    PUP     Z_24                   LN, 3x3 conv, x2, three      classifier     logits at stride P/8
                                   times; 3x3 conv
    MLA     Z_6, Z_12, Z_18, Z_24  neck: LN, 1x1 conv to D,     3x3            logits at stride P/4
                                   sums from deep to shallow,   classifier of
                                   3x3 conv; head: two 3x3      4 x D/2
                                   convs to D/2, x4

The authors upsample their logits further, bilinearly, to the size of the image. Here the loss and
inference do that. Their heads also hold a dropout and a classifier that they never use; these are
left out, which is why the paper's parameter counts are slightly larger.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segformer_pl.errors import UserError
from segformer_pl.models.segmenter import Criterion, Encoder, Segmenter
from segformer_pl.models.tokens import to_channels_first, to_tokens
from segformer_pl.models.vit_encoder import ViTEncoder, evenly_spaced, vit_shape

Decoder = Literal["naive", "pup", "mla"]

# Blocks whose outputs the decoder and the auxiliary heads use, counted from 0, by decoder and depth
# of the encoder: the paper's (Sec. 3.3) and the authors' configurations for 12 blocks. All others
# are evenly spaced, as MLA's are in the paper.
PAPER_BLOCKS: dict[tuple[Decoder, int], tuple[int, ...]] = {
    ("naive", 24): (9, 14, 19, 23),
    ("pup", 24): (9, 14, 19, 23),
    ("pup", 12): (4, 7, 9, 11),
}

NORM_EPS = 1e-6


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map. Shapes: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=NORM_EPS)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Normalise a map (B, C, h, w); the result has the same shape."""
        return to_channels_first(super().forward(to_tokens(feature_map)))


class ConvNormReLU(nn.Sequential):
    """A convolution that keeps the size, BatchNorm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class ConvHead(nn.Module):
    """Head of SETR-Naive and SETR-PUP, main or auxiliary, on a single map.

    LayerNorm, then convolutions with bilinear upsampling by 2 between them, then the classifier.

    Shapes: list of maps, of which the last (B, C, h, w) is used -> logits (B, K, s * h, s * w),
    s = ``2 ** (num_convs - 1) * logits_scale``.

    Args:
        in_channels: Channels C of the map.
        num_classes: Number of classes K.
        decoder_dim: Channels D of the convolutions.
        kernel_size: Kernel of the convolutions: 1 in Naive, 3 in PUP.
        num_convs: Number of convolutions: 4 in the head of PUP, otherwise 1.
        logits_scale: Factor by which the logits are upsampled: 4 in auxiliary heads of PUP.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        decoder_dim: int,
        kernel_size: int,
        num_convs: int = 1,
        logits_scale: int = 1,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[decoder_dim] * (num_convs - 1)]
        self.norm = MapNorm(in_channels)
        self.convs = nn.ModuleList(
            ConvNormReLU(width, decoder_dim, kernel_size, bias=True) for width in widths
        )
        self.classifier = nn.Conv2d(decoder_dim, num_classes, 1)
        self.logits_scale = logits_scale

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits of a list of maps, whose last is (B, C, h, w)."""
        # In PUP's auxiliary heads the upsampling comes before the classifier. A 1x1 convolution
        # commutes with it, and this way it is applied to 1/16 of the pixels.
        return _upsample(self.classifier(self.features(maps)), self.logits_scale)

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the input of the classifier, (B, D, 2^n h, 2^n w) after n upsamplings."""
        first, *others = self.convs
        features = first(self.norm(maps[-1]))
        for conv in others:
            features = conv(_upsample(features, 2))
        return features


class MLANeck(nn.Module):
    """Multi-level aggregation of SETR-MLA: maps of D channels from maps of several blocks.

    Running sums from the deepest map to the shallowest::

        z_6     z_12    z_18    z_24        z_i = ReLU(BN(1x1 conv(LN(map of block i))))
         + <----- + <----- + <----- |       t_24 = z_24, t_18 = z_18 + t_24, ...
        t_6     t_12    t_18    t_24        then a 3x3 convolution, BN and ReLU each

    Shapes: list of (B, C, h, w) -> list of (B, D, h, w), in the same order.
    """

    def __init__(self, in_channels: Sequence[int], decoder_dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(MapNorm(channels) for channels in in_channels)
        self.projections = nn.ModuleList(
            ConvNormReLU(channels, decoder_dim, 1, bias=False) for channels in in_channels
        )
        self.convs = nn.ModuleList(
            ConvNormReLU(decoder_dim, decoder_dim, 3, bias=False) for _ in in_channels
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the aggregated maps (B, D, h, w) of maps (B, C, h, w)."""
        sums: list[Tensor] = []
        levels = zip(self.norms, self.projections, maps)
        for norm, project, feature_map in reversed(list(levels)):
            projected = project(norm(feature_map))
            sums.insert(0, projected + sums[0] if sums else projected)
        return [conv(total) for conv, total in zip(self.convs, sums)]


class MLAHead(nn.Module):
    """Head of SETR-MLA. Shapes: list of n maps (B, D, h, w) -> logits (B, K, 4 h, 4 w).

    Every map has its own two 3x3 convolutions to D / 2 channels and is upsampled by 4. The
    classifier, another 3x3 convolution, reads all of them.
    """

    def __init__(self, num_maps: int, num_classes: int, decoder_dim: int) -> None:
        super().__init__()
        width = decoder_dim // 2
        self.branches = nn.ModuleList(
            nn.Sequential(
                ConvNormReLU(decoder_dim, width, 3, bias=False),
                ConvNormReLU(width, width, 3, bias=False),
            )
            for _ in range(num_maps)
        )
        self.classifier = nn.Conv2d(num_maps * width, num_classes, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits (B, K, 4 h, 4 w) of maps (B, D, h, w)."""
        return self.classifier(self.features(maps))

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the input of the classifier, (B, n * D / 2, 4 h, 4 w)."""
        # Aligned corners as in the authors' code, which uses them nowhere else.
        upsampled = [
            _upsample(branch(feature_map), 4, align_corners=True)
            for branch, feature_map in zip(self.branches, maps)
        ]
        return torch.cat(upsampled, dim=1)


class MLAAuxHead(nn.Module):
    """Auxiliary head of SETR-MLA: a 1x1 convolution without bias on one map of the neck.

    Shapes: list of maps, of which the last (B, D, h, w) is used -> logits (B, K, h, w).
    """

    def __init__(self, num_classes: int, decoder_dim: int) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(decoder_dim, num_classes, 1, bias=False)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits of a list of maps, whose last is (B, D, h, w)."""
        return self.classifier(maps[-1])


class SETR(Segmenter):
    """SETR: an encoder whose maps have one stride P, and a decoder.

    Shapes: (B, in_channels, H, W) -> logits (B, num_classes, s H / P, s W / P), s = 1 in Naive, 8
    in PUP and 4 in MLA.

    The variants below build it with the encoder and the blocks of the paper. Auxiliary heads are
    used by :meth:`training_loss` alone: in Naive on every map but the last, in PUP on every map, in
    MLA on every map of the neck.

    Args:
        encoder: Encoder, in the paper a :class:`~segformer_pl.models.vit_encoder.ViTEncoder`; for
            MLA one with ``class_token=False``.
        num_classes: Number of classes.
        decoder: ``"naive"``, ``"pup"`` (progressive upsampling) or ``"mla"`` (multi-level feature
            aggregation); Sec. 3.3.
        decoder_dim: Channels D of the decoder.
        aux_weight: Weight of the loss of each auxiliary head. With 0 there are no such heads.

    Raises:
        UserError: The decoder does not exist, ``aux_weight`` is negative, or the encoder's maps
            have several strides or are too few.
    """

    auxiliary_paths = ("aux_heads",)
    training_arguments = ("aux_weight",)
    publication = (
        "Zheng et al., Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective "
        "with Transformers, CVPR 2021, https://arxiv.org/abs/2012.15840"
    )

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        decoder: Decoder = "pup",
        decoder_dim: int = 256,
        aux_weight: float = 0.4,
    ) -> None:
        super().__init__()
        _check_arguments(encoder, decoder, decoder_dim, aux_weight)
        channels, strides = encoder.out_channels, encoder.out_strides
        self.in_channels = encoder.in_channels
        self.num_classes = num_classes
        self.min_size = encoder.min_size
        self.decoder = decoder
        self.decoder_dim = decoder_dim
        self.aux_weight = aux_weight
        self.encoder = encoder
        self.neck = MLANeck(channels, decoder_dim) if decoder == "mla" else None
        self.head: ConvHead | MLAHead
        aux_heads: list[nn.Module]
        if decoder == "naive":
            self.head = ConvHead(channels[-1], num_classes, decoder_dim, 1)
            aux_heads = [ConvHead(c, num_classes, decoder_dim, 1) for c in channels[:-1]]
        elif decoder == "pup":
            self.head = ConvHead(channels[-1], num_classes, decoder_dim, 3, num_convs=4)
            aux_heads = [ConvHead(c, num_classes, decoder_dim, 3, logits_scale=4) for c in channels]
        else:
            self.head = MLAHead(len(strides), num_classes, decoder_dim)
            aux_heads = [MLAAuxHead(num_classes, decoder_dim) for _ in strides]
        self.aux_heads = nn.ModuleList(aux_heads) if aux_weight else None
        num_aux_heads = len(aux_heads) if aux_weight else 0
        self.classifier_paths = (
            "head.classifier",
            *(f"aux_heads.{i}.classifier" for i in range(num_aux_heads)),
        )
        # As in MixTransformer: channels-last maps give channels-last gradients.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of images (B, in_channels, H, W), at the stride of the decoder."""
        return self.head(self._decoder_maps(self.encoder(images)))

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the intermediate maps for analysis, from the image to the classifier.

        Returns:
            ``stage1``, ``stage2``, ...: the encoder's maps, (B, C, h, w) each; ``head``: the
            input of the classifier, (B, D, h, w) in Naive, (B, D, 8 h, 8 w) in PUP and
            (B, 2 D, 4 h, 4 w) in MLA with four maps.
        """
        features = self.encoder(images)
        named = {f"stage{i}": feature for i, feature in enumerate(features, start=1)}
        return named | {"head": self.head.features(self._decoder_maps(features))}

    def training_loss(
        self, images: Tensor, target: Tensor, criterion: Criterion, ignore_index: int
    ) -> Tensor:
        """Return the loss of the head plus ``aux_weight`` times that of every auxiliary head."""
        maps = self._decoder_maps(self.encoder(images))
        loss = criterion(self.head(maps), target, ignore_index)
        # Naive has no auxiliary head on the last map, and zip stops before it.
        for feature_map, head in zip(maps, self.aux_heads or []):
            loss = loss + self.aux_weight * criterion(head([feature_map]), target, ignore_index)
        return loss

    def _decoder_maps(self, features: list[Tensor]) -> list[Tensor]:
        return features if self.neck is None else self.neck(features)

    def init_args(self) -> dict[str, Any]:
        return {
            "encoder": self.encoder.spec(),
            "num_classes": self.num_classes,
            "decoder": self.decoder,
            "decoder_dim": self.decoder_dim,
            "aux_weight": self.aux_weight,
        }

    def layer_ids(self) -> dict[str, int]:
        """Return the layers of the encoder's parameters; the neck of MLA has the last one's.

        In the authors' configurations, parameters train at ten times the learning rate if their
        name contains "head". Those of the neck do not.
        """
        layers = super().layer_ids()
        if self.neck is not None:
            last = max(layers.values())
            layers |= {f"neck.{name}": last for name, _ in self.neck.named_parameters()}
        return layers


def _upsample(feature_map: Tensor, factor: int, align_corners: bool = False) -> Tensor:
    if factor == 1:
        return feature_map
    size = (feature_map.shape[2] * factor, feature_map.shape[3] * factor)
    return F.interpolate(feature_map, size=size, mode="bilinear", align_corners=align_corners)


def _check_arguments(
    encoder: Encoder, decoder: Decoder, decoder_dim: int, aux_weight: float
) -> None:
    """Raise a UserError if the arguments of :class:`SETR` are out of range or do not fit."""
    if decoder not in get_args(Decoder):
        raise UserError(f"decoder={decoder!r}: choose one of {', '.join(get_args(Decoder))}")
    if decoder_dim < 2 or decoder_dim % 2:
        raise UserError(f"decoder_dim={decoder_dim}: give an even number of channels")
    if not aux_weight >= 0:
        raise UserError(f"aux_weight={aux_weight}: give 0 (no auxiliary heads) or more")
    strides = encoder.out_strides
    if len(set(strides)) > 1:
        raise UserError(
            f"SETR's decoders take maps of one stride, and {type(encoder).__name__} has strides "
            f"{', '.join(map(str, strides))}; give a ViTEncoder, or use SegFormer's head"
        )
    if decoder == "naive" and aux_weight and len(strides) < 2:
        raise UserError(
            f"aux_weight={aux_weight}: the auxiliary heads of SETR-Naive belong to the maps before "
            "the last, and the encoder has a single map; name more out_indices or give aux_weight 0"
        )


def _setr(
    decoder: Decoder,
    num_classes: int,
    backbone: str,
    image_size: int | tuple[int, int],
    out_indices: Sequence[int] | None = None,
    decoder_dim: int = 256,
    aux_weight: float = 0.4,
    pretrained: bool = False,
    in_channels: int = 3,
) -> SETR:
    """Build SETR on a :class:`ViTEncoder`, with the blocks of the paper by default."""
    if out_indices is None:
        depth = vit_shape(backbone).depth
        out_indices = PAPER_BLOCKS.get((decoder, depth), evenly_spaced(depth))
    encoder = ViTEncoder(
        backbone,
        image_size,
        out_indices,
        class_token=decoder != "mla",
        pretrained=pretrained,
        in_channels=in_channels,
    )
    return SETR(encoder, num_classes, decoder, decoder_dim, aux_weight)


# Variants. The paper's T-Large is vit_large_patch16_384, its T-Base vit_base_patch16_384, and its
# DeiT deit_base_distilled_patch16_384. Arguments are those of ViTEncoder and SETR; ``kwargs`` are
# the further ones of _setr, which the command line finds too.


def setr_naive(
    num_classes: int,
    backbone: str = "vit_large_patch16_384",
    image_size: int | tuple[int, int] = 512,
    **kwargs: Any,
) -> SETR:
    """SETR-Naive, 304.5 M parameters at 150 classes without auxiliary heads."""
    return _setr("naive", num_classes, backbone, image_size, **kwargs)


def setr_pup(
    num_classes: int,
    backbone: str = "vit_large_patch16_384",
    image_size: int | tuple[int, int] = 512,
    **kwargs: Any,
) -> SETR:
    """SETR-PUP, 308.3 M parameters at 150 classes without auxiliary heads."""
    return _setr("pup", num_classes, backbone, image_size, **kwargs)


def setr_mla(
    num_classes: int,
    backbone: str = "vit_large_patch16_384",
    image_size: int | tuple[int, int] = 512,
    **kwargs: Any,
) -> SETR:
    """SETR-MLA, 310.0 M parameters at 150 classes without auxiliary heads."""
    return _setr("mla", num_classes, backbone, image_size, **kwargs)
