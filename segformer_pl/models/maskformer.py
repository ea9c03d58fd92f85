"""MaskFormer: a set of masks, each with one class (Cheng et al. 2021, "Per-Pixel Classification is
Not All You Need for Semantic Segmentation", arXiv 2107.06278).

::

    images --encoder--> maps of stride 4, 8, 16, 32
                          |            |
                    pixel decoder   transformer decoder (stride 32 only, Q learned queries)
                          |            |
      pixel embeddings (C, h, w)    query embeddings (Q, C) --class head--> p (Q, K+1)
                          |            |
                          |        mask head
                          +-- dot product --> mask logits m (Q, h, w)

    score of class k in a pixel = sum over queries q of p[q, k] * sigmoid(m[q])

Symbols: B images, C channels (``decoder_dim``), Q queries, K classes, L layers of the transformer
decoder, (h, w) the size of the encoder's finest map. Details that the paper leaves open are those
of its code and of transformers, such as a 3x3 convolution for the pixel embeddings.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segformer_pl.errors import UserError
from segformer_pl.models.maskformer_decoders import (
    GROUPS,
    DecoderLayer,
    PixelDecoder,
    TransformerDecoder,
)
from segformer_pl.models.maskformer_loss import IgnoredPixels, MaskClassificationLoss
from segformer_pl.models.segmenter import Criterion, Encoder, Segmenter
from segformer_pl.models.swin import SwinEncoder
from segformer_pl.models.timm_encoder import TimmEncoder


class Predictions(NamedTuple):
    """What the queries predict after every decoder layer.

    Attributes:
        class_logits: Logits of the classes and, last, of "no object", (L, B, Q, K+1).
        mask_embeddings: (L, B, Q, C).
        pixel_embeddings: (B, C, h, w).
    """

    class_logits: Tensor
    mask_embeddings: Tensor
    pixel_embeddings: Tensor

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return class logits (B, Q, K+1) and mask logits (B, Q, h, w) of one layer."""
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embeddings[index], self.pixel_embeddings)
        return self.class_logits[index], masks

    def layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield class logits and mask logits of the layers, from the first to the last."""
        yield from (self.layer(index) for index in range(len(self.class_logits)))


class MaskFormer(Segmenter):
    """MaskFormer for semantic segmentation.

    Shapes: (B, in_channels, H, W) -> scores (B, num_classes, H_1, W_1) at the stride of the
    encoder's finest map, 4 in the paper.

    The scores are non-negative and need no softmax: argmax gives the prediction. Inference
    upsamples the scores, as transformers does. The original upsamples the mask logits instead,
    before the sigmoid, which needs Q maps of the image's size; predictions can differ near the
    borders of masks.

    The loss is that of the paper, on the predictions of every decoder layer, see
    :class:`~segformer_pl.models.maskformer_loss.MaskClassificationLoss`. The number of classes of
    the data set may exceed the number of queries, that of a single image should not.

    Args:
        encoder: Encoder, whose output is a feature pyramid (B, C_i, H_i, W_i), finest map first.
        num_classes: Number of classes K.
        num_queries: Number of queries Q (varied in Table 4 of the paper).
        decoder_dim: Channels C of both decoders and of the embeddings, a multiple of 32 for
            GroupNorm, and at least 64.
        decoder_layers: Number of layers L of the transformer decoder.
        decoder_heads: Number of its attention heads.
        decoder_mlp_dim: Hidden channels of its MLPs.
        dropout: Dropout rate of the transformer decoder.
        freeze_batch_norm: Whether the encoder's BatchNorm layers are constants: they use their
            running statistics in training too, and their weights are not trained. The paper's
            ResNets have it. Only for pretrained weights: without them the encoder has no norm.
            Lightning warns of these modules in evaluation mode.
        mask_weight: Weight of the focal loss of masks.
        dice_weight: Weight of the dice loss of masks.
        no_object_weight: Weight of the queries without a class in the cross-entropy.
        ignored_pixels: ``"background"``: the loss takes ignored pixels as background of every mask,
            as the original does. ``"left_out"``: it does not count them.

    Raises:
        UserError: The encoder has a single map, or no BatchNorm to freeze; a number is below 1;
            ``decoder_dim`` is 32, or no multiple of 32 or of ``decoder_heads``; a weight of the
            loss is negative.
    """

    output = "scores"
    classifier_paths = ("class_head",)
    takes_criterion = False
    training_arguments = (
        "dropout",
        "freeze_batch_norm",
        "mask_weight",
        "dice_weight",
        "no_object_weight",
        "ignored_pixels",
    )
    publication = (
        "Cheng et al., Per-Pixel Classification is Not All You Need for Semantic Segmentation, "
        "NeurIPS 2021, https://arxiv.org/abs/2107.06278"
    )

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        num_queries: int = 100,
        decoder_dim: int = 256,
        decoder_layers: int = 6,
        decoder_heads: int = 8,
        decoder_mlp_dim: int = 2048,
        dropout: float = 0.1,
        freeze_batch_norm: bool = False,
        mask_weight: float = 20.0,
        dice_weight: float = 1.0,
        no_object_weight: float = 0.1,
        ignored_pixels: IgnoredPixels = "background",
    ) -> None:
        super().__init__()
        if len(encoder.out_channels) < 2:
            raise UserError(
                f"the encoder has a single feature map, of stride {encoder.out_strides[0]}, and "
                "MaskFormer's pixel decoder needs at least two, in the paper those of strides 4, "
                "8, 16 and 32; choose a hierarchical encoder"
            )
        strides = encoder.out_strides
        if len(set(strides)) < len(strides):
            raise UserError(
                f"the encoder has feature maps of strides {', '.join(map(str, strides))}, and "
                "MaskFormer's pixel decoder needs one of each stride; choose a hierarchical encoder"
            )
        numbers = {
            "num_queries": num_queries,
            "decoder_layers": decoder_layers,
            "decoder_heads": decoder_heads,
            "decoder_mlp_dim": decoder_mlp_dim,
        }
        for name, number in numbers.items():
            if number < 1:
                raise UserError(f"{name}={number}: give at least 1")
        # With one channel in a group, GroupNorm would make a map of a single pixel 0.
        if decoder_dim < 2 * GROUPS or decoder_dim % math.lcm(GROUPS, decoder_heads):
            raise UserError(
                f"decoder_dim={decoder_dim}: give at least {2 * GROUPS}, and a multiple of "
                f"{GROUPS}, the groups of GroupNorm, and of decoder_heads={decoder_heads}"
            )
        dim = decoder_dim
        self.in_channels = encoder.in_channels
        self.num_classes = num_classes
        self.min_size = encoder.min_size
        self.freeze_batch_norm = freeze_batch_norm
        self.encoder = encoder
        if freeze_batch_norm:
            self._freeze_batch_norm()
        self.pixel_decoder = PixelDecoder(encoder.out_channels, dim)
        self.transformer_decoder = TransformerDecoder(
            encoder.out_channels[-1],
            num_queries,
            dim,
            decoder_layers,
            decoder_heads,
            decoder_mlp_dim,
            dropout,
        )
        self.class_head = nn.Linear(dim, num_classes + 1)  # the last one is "no object"
        self.mask_head = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        )
        self.loss = MaskClassificationLoss(
            num_classes, mask_weight, dice_weight, no_object_weight, ignored_pixels
        )
        # Gradients get the strides of the encoder's channels-last maps.
        self.pixel_decoder.to(memory_format=torch.channels_last)
        self.transformer_decoder.projection.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (B, num_classes, H_1, W_1) of images (B, in_channels, H, W).

        They are non-negative; those of a pixel sum to at most Q.
        """
        class_logits, mask_logits = self.predict(images).layer(-1)
        probabilities = class_logits.softmax(2)[..., : self.num_classes]
        return torch.einsum("bqk,bqhw->bkhw", probabilities, mask_logits.sigmoid())

    def predict(self, images: Tensor) -> Predictions:
        """Return the predictions of the queries for images (B, in_channels, H, W)."""
        features = self.encoder(images)
        queries = self.transformer_decoder(features[-1])
        return Predictions(
            self.class_head(queries), self.mask_head(queries), self.pixel_decoder(features)
        )

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the intermediate maps for analysis, from the image to the classifier.

        Returns:
            ``stage1`` ... ``stage4``: the map of each stage, (B, C_i, H_i, W_i); ``head``: the
            pixel embeddings, (B, decoder_dim, H_1, W_1), which the masks are dot products with. The
            queries, which depend on the whole image, are not part of it.
        """
        features = self.encoder(images)
        named = {f"stage{i}": feature for i, feature in enumerate(features, start=1)}
        return named | {"head": self.pixel_decoder(features)}

    def training_loss(
        self, images: Tensor, target: Tensor, criterion: Criterion, ignore_index: int
    ) -> Tensor:
        """Return the loss of the paper, a scalar. It does not use ``criterion``.

        Raises:
            UserError: A label is neither a class nor ``ignore_index``.
        """
        return self.loss(self.predict(images).layers(), target, ignore_index)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; frozen BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        if self.freeze_batch_norm:
            for norm in self._batch_norms():
                norm.eval()
        return self

    def init_args(self) -> dict[str, Any]:
        layers = self.transformer_decoder.layers
        layer = cast(DecoderLayer, layers[0])
        num_queries, dim = self.transformer_decoder.query_pos.weight.shape
        return {
            "encoder": self.encoder.spec(),
            "num_classes": self.num_classes,
            "num_queries": num_queries,
            "decoder_dim": dim,
            "decoder_layers": len(layers),
            "decoder_heads": layer.self_attn.num_heads,
            "decoder_mlp_dim": layer.fc1.out_features,
            "dropout": layer.dropout.p,
            "freeze_batch_norm": self.freeze_batch_norm,
            "mask_weight": self.loss.mask_weight,
            "dice_weight": self.loss.dice_weight,
            "no_object_weight": self.loss.no_object_weight,
            "ignored_pixels": self.loss.ignored_pixels,
        }

    def no_weight_decay(self) -> set[str]:
        """Return those of the encoder, and the norms and position embeddings of both decoders."""
        own = {
            f"{path}.{name}"
            for path, module in self.named_modules()
            if isinstance(module, nn.GroupNorm | nn.LayerNorm) and not path.startswith("encoder.")
            for name, _ in module.named_parameters()
        }
        return super().no_weight_decay() | own | {"transformer_decoder.query_pos.weight"}

    def _batch_norms(self) -> list[nn.Module]:
        # The base class, because Lightning's sync_batchnorm replaces BatchNorm2d.
        return [module for module in self.encoder.modules() if isinstance(module, _BatchNorm)]

    def _freeze_batch_norm(self) -> None:
        norms = self._batch_norms()
        if not norms:
            raise UserError(
                f"freeze_batch_norm is true, but {type(self.encoder).__name__} has no BatchNorm; "
                "leave it false"
            )
        for norm in norms:
            norm.eval().requires_grad_(False)


def maskformer(
    num_classes: int,
    backbone: str = "resnet50",
    pretrained: bool = False,
    freeze_batch_norm: bool = False,
    num_queries: int = 100,
    decoder_dim: int = 256,
    decoder_layers: int = 6,
    decoder_heads: int = 8,
    decoder_mlp_dim: int = 2048,
    dropout: float = 0.1,
    ignored_pixels: IgnoredPixels = "background",
    **kwargs: Any,
) -> MaskFormer:
    """MaskFormer on a convolutional network of timm, 41.3 M parameters at 150 classes by default.

    Args:
        num_classes: Number of classes.
        backbone: Name of the network in timm. The paper's are ``resnet50`` and ``resnet101``.
        pretrained: Whether the backbone's weights are downloaded.
        freeze_batch_norm: See :class:`MaskFormer`. The paper's results have it.
        num_queries: See :class:`MaskFormer`, as the arguments that follow.
        kwargs: Arguments of the encoder, :class:`~segformer_pl.models.timm_encoder.TimmEncoder`.
    """
    encoder = TimmEncoder(backbone, pretrained, **kwargs)
    return MaskFormer(
        encoder,
        num_classes,
        num_queries,
        decoder_dim,
        decoder_layers,
        decoder_heads,
        decoder_mlp_dim,
        dropout,
        freeze_batch_norm,
        ignored_pixels=ignored_pixels,
    )


def maskformer_swin(
    num_classes: int,
    backbone: str = "swin_tiny_patch4_window7_224",
    num_queries: int = 100,
    decoder_dim: int = 256,
    decoder_layers: int = 6,
    decoder_heads: int = 8,
    decoder_mlp_dim: int = 2048,
    dropout: float = 0.1,
    ignored_pixels: IgnoredPixels = "background",
    **kwargs: Any,
) -> MaskFormer:
    """MaskFormer on Swin, 41.8 M parameters at 150 classes by default.

    Args:
        num_classes: Number of classes.
        backbone: Name of the Swin in timm.
        num_queries: See :class:`MaskFormer`, as the arguments that follow.
        kwargs: Arguments of the encoder, :class:`~segformer_pl.models.swin.SwinEncoder`.
    """
    encoder = SwinEncoder(backbone, **kwargs)
    return MaskFormer(
        encoder,
        num_classes,
        num_queries,
        decoder_dim,
        decoder_layers,
        decoder_heads,
        decoder_mlp_dim,
        dropout,
        ignored_pixels=ignored_pixels,
    )
