"""SegFormer = a hierarchical encoder and the All-MLP decode head (Xie et al. 2021, Fig. 2)."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from segformer_pl.models.decode_head import AllMLPHead
from segformer_pl.models.mit import mit_b0, mit_b1, mit_b2, mit_b3, mit_b4, mit_b5
from segformer_pl.models.segmenter import Encoder, Segmenter


class SegFormer(Segmenter):
    """SegFormer: a hierarchical encoder and the All-MLP decode head.

    Shapes: (B, in_channels, H, W) -> logits (B, num_classes, ceil(H/4), ceil(W/4)). Upsampling to
    pixels belongs to the loss and to inference, not to the network.

    Args:
        encoder: Encoder, whose output is a feature pyramid (B, C_i, H_i, W_i), finest map first.
        num_classes: Number of classes.
        decoder_dim: Channels C of the head.
        in_indices: Stages that the head uses, counted from 0 (varied in Table 1d). Default: all.
        dropout: Rate of the channel dropout before the classifier.
    """

    classifier_paths = ("head.classifier",)
    training_arguments = ("dropout",)
    publication = (
        "Xie et al., SegFormer: Simple and Efficient Design for Semantic Segmentation with "
        "Transformers, NeurIPS 2021, https://arxiv.org/abs/2105.15203"
    )

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        decoder_dim: int = 256,
        in_indices: Sequence[int] | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if in_indices is None:
            in_indices = range(len(encoder.out_channels))
        self.in_channels = encoder.in_channels
        self.num_classes = num_classes
        self.min_size = encoder.min_size
        self.encoder = encoder
        self.head = AllMLPHead(encoder.out_channels, num_classes, decoder_dim, in_indices, dropout)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes, H_1, W_1) of images (B, in_channels, H, W)."""
        return self.head(self.encoder(images))

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the intermediate maps for analysis, from the image to the classifier.

        Returns:
            ``stage1`` ... ``stage4``: the normalised map of each stage, (B, C_i, H_i, W_i);
            ``head``: the fused map after BatchNorm and ReLU, (B, decoder_dim, H_1, W_1), which is
            the input of the classifier.
        """
        features = self.encoder(images)
        named = {f"stage{i}": feature for i, feature in enumerate(features, start=1)}
        return named | {"head": self.head.fuse_features(features)}

    def fold(self) -> None:
        """Fold the encoder, and multiply the matrices of the head once and for all."""
        super().fold()
        self.head = cast(AllMLPHead, self.head.folded())  # it has all that inference uses

    def init_args(self) -> dict[str, Any]:
        return {
            "encoder": self.encoder.spec(),
            "num_classes": self.num_classes,
            "decoder_dim": self.head.classifier.in_channels,
            "in_indices": self.head.in_indices,
            "dropout": self.head.dropout.p,
        }

    def no_weight_decay(self) -> set[str]:
        """Return those of the encoder only, as the reference decays the head's BatchNorm."""
        return super().no_weight_decay()

    def paper_macs(self, height: int, width: int) -> int | None:
        """Return the "FLOPs" of the paper's Tables 1 and 2, None if the encoder's are unknown.

        They are multiply-adds; see :mod:`~segformer_pl.models.paper_macs` for what is counted. With
        150 classes they are the values of Table 1a: at 512x512 for ADE20K (640x640 for B5) and
        COCO-Stuff, at 1024x2048 for Cityscapes.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
        """
        of_encoder = self.encoder.paper_macs(height, width)
        if of_encoder is None:
            return None
        return of_encoder + self.head.paper_macs(self.encoder.out_sizes(height, width))


def segformer_b0(
    num_classes: int,
    decoder_dim: int = 256,
    in_indices: Sequence[int] = (0, 1, 2, 3),
    dropout: float = 0.1,
    **kwargs: Any,
) -> SegFormer:
    """SegFormer-B0, 3.8 M parameters at 150 classes. ``kwargs`` are arguments of the encoder."""
    return SegFormer(mit_b0(**kwargs), num_classes, decoder_dim, in_indices, dropout)


def segformer_b1(
    num_classes: int,
    decoder_dim: int = 256,
    in_indices: Sequence[int] = (0, 1, 2, 3),
    dropout: float = 0.1,
    **kwargs: Any,
) -> SegFormer:
    """SegFormer-B1, 13.7 M parameters at 150 classes. ``kwargs`` are arguments of the encoder."""
    return SegFormer(mit_b1(**kwargs), num_classes, decoder_dim, in_indices, dropout)


def segformer_b2(
    num_classes: int,
    decoder_dim: int = 768,
    in_indices: Sequence[int] = (0, 1, 2, 3),
    dropout: float = 0.1,
    **kwargs: Any,
) -> SegFormer:
    """SegFormer-B2, 27.5 M parameters at 150 classes. ``kwargs`` are arguments of the encoder."""
    return SegFormer(mit_b2(**kwargs), num_classes, decoder_dim, in_indices, dropout)


def segformer_b3(
    num_classes: int,
    decoder_dim: int = 768,
    in_indices: Sequence[int] = (0, 1, 2, 3),
    dropout: float = 0.1,
    **kwargs: Any,
) -> SegFormer:
    """SegFormer-B3, 47.3 M parameters at 150 classes. ``kwargs`` are arguments of the encoder."""
    return SegFormer(mit_b3(**kwargs), num_classes, decoder_dim, in_indices, dropout)


def segformer_b4(
    num_classes: int,
    decoder_dim: int = 768,
    in_indices: Sequence[int] = (0, 1, 2, 3),
    dropout: float = 0.1,
    **kwargs: Any,
) -> SegFormer:
    """SegFormer-B4, 64.1 M parameters at 150 classes. ``kwargs`` are arguments of the encoder."""
    return SegFormer(mit_b4(**kwargs), num_classes, decoder_dim, in_indices, dropout)


def segformer_b5(
    num_classes: int,
    decoder_dim: int = 768,
    in_indices: Sequence[int] = (0, 1, 2, 3),
    dropout: float = 0.1,
    **kwargs: Any,
) -> SegFormer:
    """SegFormer-B5, 84.7 M parameters at 150 classes. ``kwargs`` are arguments of the encoder."""
    return SegFormer(mit_b5(**kwargs), num_classes, decoder_dim, in_indices, dropout)
