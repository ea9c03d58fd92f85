"""SeMask-FPN: Swin with semantic layers between its stages, and the decoder of Semantic FPN.

Jain et al. 2021, "SeMask: Semantically Masked Transformers for Semantic Segmentation". Details that
the paper leaves open follow its released code.

In reading order: semantic layer, decode head, network, variant. Symbols as in
:mod:`segformer_pl.models.swin`, and K = ``num_classes``. In every stage i::

    tokens -> Swin blocks -> semantic layer -> tokens of the next stage
                                 |        |
                                 |        +-> LayerNorm -> map i (C_i channels) -> head -> logits
                                 +-> semantic map i (K channels); their sum has the auxiliary loss
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segformer_pl.errors import UserError
from segformer_pl.models.segmenter import Criterion, Segmenter
from segformer_pl.models.swin import SwinEncoder, pad_to_windows
from segformer_pl.models.tokens import to_channels_first
from segformer_pl.models.windows import Window, window_partition, window_reverse

NUM_STAGES = 4


class SwinLinear(nn.Linear):
    """Linear layer with the initialisation of Swin: truncated normal of deviation 0.02, bias 0."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class SemanticLayer(nn.Module):
    """Attention between tokens by their class logits, after the blocks of a stage.

    Queries and keys have one channel for each class, and the queries are at the same time a
    semantic map, which the auxiliary loss trains. There is one head, no scale of the products and
    no position bias::

        y = LayerNorm(x)     Q, K, V = query(y), key(y), value(y)
        output = y + gamma * dropout(proj(softmax(Q K^T) V))

    The input x itself is dropped: also with ``gamma = 0``, its initial value, the next stage gets
    normalised tokens. ``proj`` starts from small random weights. Were it 0 like gamma, the gradient
    of both would be 0 for ever.

    Shapes: (B, H, W, C) -> (B, H, W, C) and the semantic map (B, H, W, K).

    Args:
        dim: Channels C.
        num_classes: Number of classes K.
        window: Height and width of the windows that tokens attend within. They are not shifted,
            and tokens of the padding take part. None: attention over the whole map.
        dropout: Dropout rate of the attended values.
    """

    def __init__(self, dim: int, num_classes: int, window: Window | None, dropout: float) -> None:
        super().__init__()
        self.window = window
        self.norm = nn.LayerNorm(dim)
        self.query = SwinLinear(dim, num_classes)
        self.key = SwinLinear(dim, num_classes)
        self.value = SwinLinear(dim, dim)
        self.proj = SwinLinear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new tokens (B, H, W, C) and the semantic map (B, H, W, K) of tokens."""
        normalized = self.norm(tokens)
        window = self.window or cast(Window, tokens.shape[1:3])
        padded = pad_to_windows(normalized, window)
        windows = window_partition(padded, window).flatten(1, 2)
        query, value = self.query(windows), self.value(windows)
        # Unsqueezed: one head.
        attended = F.scaled_dot_product_attention(
            query[:, None], self.key(windows)[:, None], value[:, None], scale=1.0
        )
        changes = self.dropout(self.proj(attended.squeeze(1)))
        height, width = tokens.shape[1:3]
        changes, semantic_map = (
            window_reverse(x.unflatten(1, window), window, *padded.shape[1:3])[:, :height, :width]
            for x in (changes, query)
        )
        return normalized + self.gamma * changes, semantic_map


class SemanticFPNHead(nn.Module):
    """Decoder of Semantic FPN (Kirillov et al. 2019) directly on the encoder's maps.

    Every map passes 3x3 convolutions with BatchNorm and ReLU, each followed by an upsampling by 2,
    until it has stride 4. Then the maps are summed::

        stage    stride   convolutions   upsamplings
        1         4       1              0
        2         8       1              1
        3        16       2              2
        4        32       3              3

    Shapes:
        input   list of (B, C_i, H_i, W_i), the encoder's feature pyramid
        output  logits (B, num_classes, H_1, W_1)

    Args:
        in_channels: Channels C_i of every feature map of the encoder.
        num_classes: Number of classes.
        decoder_dim: Channels of the head.
        dropout: Rate of the channel dropout before the classifier.
    """

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, decoder_dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.ModuleList(
                _conv_norm_relu(decoder_dim if number else channels, decoder_dim)
                for number in range(max(level, 1))
            )
            for level, channels in enumerate(in_channels)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(decoder_dim, num_classes, 1)
        # The encoder's maps are channels-last, and so are the gradients.
        self.to(memory_format=torch.channels_last)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return logits (B, num_classes, H_1, W_1) of a feature pyramid of (B, C_i, H_i, W_i)."""
        return self.classifier(self.dropout(self.fuse_features(features)))

    def fuse_features(self, features: Sequence[Tensor]) -> Tensor:
        """Return the sum (B, decoder_dim, H_1, W_1) of the feature pyramid's upsampled maps."""
        size = features[0].shape[2:]
        branches = cast(list[nn.ModuleList], list(self.branches))
        total: Tensor | None = None
        for level, (branch, feature) in enumerate(zip(branches, features)):
            for layer in branch:
                feature = layer(feature)
                if level:
                    feature = _upsample_by_2(feature)
            feature = _resize(feature, size)
            total = feature if total is None else total + feature
        return cast(Tensor, total)


class SeMaskFPN(Segmenter):
    """SeMask-FPN: Swin with a semantic layer after every stage, and the decoder of Semantic FPN.

    Shapes: (B, in_channels, H, W) -> logits (B, num_classes, ceil(H/4), ceil(W/4)), any H and W.

    The number of classes also is a width of the semantic layers, so that weights for other classes
    start with new queries and keys.

    Args:
        encoder: Swin Transformer.
        num_classes: Number of classes K.
        decoder_dim: Channels of the head.
        dropout: Rate of the channel dropout before the classifier.
        semantic_dropout: Dropout rate in the semantic layers.
        global_stages: Stages, counted from 0, whose semantic layer attends over the whole map. The
            others attend within the windows of their stage. Default: as in the released models,
            none with at most 19 classes or a first stage of 128 channels (Swin-B), else the last
            two.
        aux_weight: Weight of the auxiliary loss, that of the sum of the four semantic maps. 0: no
            auxiliary loss.

    Raises:
        UserError: The encoder is no Swin Transformer, or an argument is impossible.
    """

    classifier_paths = (
        "head.classifier",
        *(f"semantic_layers.{s}.{name}" for s in range(NUM_STAGES) for name in ("query", "key")),
    )

    training_arguments = ("dropout", "semantic_dropout", "aux_weight")
    publication = (
        "Jain et al., SeMask: Semantically Masked Transformers for Semantic Segmentation, "
        "https://arxiv.org/abs/2112.12782"
    )

    def __init__(
        self,
        encoder: SwinEncoder,
        num_classes: int,
        decoder_dim: int = 256,
        dropout: float = 0.1,
        semantic_dropout: float = 0.1,
        global_stages: Sequence[int] | None = None,
        aux_weight: float = 0.4,
    ) -> None:
        super().__init__()
        if not hasattr(encoder, "embed"):
            raise UserError(
                f"a {type(encoder).__name__} does not give the tokens between its stages, which "
                "SeMask changes; take a SwinEncoder as the encoder"
            )
        if global_stages is None:
            is_windowed = num_classes <= 19 or encoder.out_channels[0] == 128
            global_stages = () if is_windowed else (2, 3)
        if sorted(set(global_stages) & set(range(NUM_STAGES))) != sorted(global_stages):
            raise UserError(
                f"global_stages={tuple(global_stages)}: name each stage at most once, "
                f"out of 0 to {NUM_STAGES - 1}"
            )
        if not aux_weight >= 0:
            raise UserError(f"aux_weight={aux_weight}: give a number of at least 0")
        self.in_channels = encoder.in_channels
        self.num_classes = num_classes
        self.min_size = encoder.min_size
        self.global_stages = tuple(sorted(global_stages))
        self.aux_weight = aux_weight
        self.encoder = encoder
        self.semantic_layers = nn.ModuleList(
            SemanticLayer(
                stage.dim,
                num_classes,
                None if s in self.global_stages else stage.window,
                semantic_dropout,
            )
            for s, stage in enumerate(encoder.stages)
        )
        self.head = SemanticFPNHead(encoder.out_channels, num_classes, decoder_dim, dropout)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes, H_1, W_1) of images (B, in_channels, H, W)."""
        features, _ = self._encode(images)
        return self.head(features)

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the intermediate maps for analysis, from the image to the classifier.

        Returns:
            ``stage1`` ... ``stage4``: the normalised map of each stage after its semantic layer,
            (B, C_i, H_i, W_i); ``semantic``: the sum of the semantic maps, on which the auxiliary
            loss acts, (B, num_classes, H_1, W_1); ``head``: the sum of the head's branches,
            (B, decoder_dim, H_1, W_1), which is the input of the classifier.
        """
        features, semantic_maps = self._encode(images)
        named = {f"stage{i}": feature for i, feature in enumerate(features, start=1)}
        named["semantic"] = _sum_of_maps(semantic_maps)
        return named | {"head": self.head.fuse_features(features)}

    def training_loss(
        self, images: Tensor, target: Tensor, criterion: Criterion, ignore_index: int
    ) -> Tensor:
        """Return ``criterion(logits) + aux_weight * criterion(sum of the semantic maps)``.

        Args:
            images: Normalised images, (B, in_channels, H, W).
            target: Class indices, (B, H, W) int64.
            criterion: The configured loss.
            ignore_index: Class index of the pixels that do not contribute to the loss.
        """
        features, semantic_maps = self._encode(images)
        loss = criterion(self.head(features), target, ignore_index)
        if self.aux_weight:
            auxiliary = criterion(_sum_of_maps(semantic_maps), target, ignore_index)
            loss = loss + self.aux_weight * auxiliary
        return loss

    def _encode(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the feature pyramid, and the semantic maps (B, num_classes, H_i, W_i)."""
        features, semantic_maps = [], []
        tokens = self.encoder.embed(images)
        for stage, layer in zip(self.encoder.stages, self.semantic_layers):
            tokens, semantic_map = layer(stage(tokens))
            features.append(to_channels_first(stage.norm(tokens)))
            semantic_maps.append(to_channels_first(semantic_map))
        return features, semantic_maps

    def init_args(self) -> dict[str, Any]:
        first = cast(SemanticLayer, self.semantic_layers[0])
        return {
            "encoder": self.encoder.spec(),
            "num_classes": self.num_classes,
            "decoder_dim": self.head.classifier.in_channels,
            "dropout": self.head.dropout.p,
            "semantic_dropout": first.dropout.p,
            "global_stages": self.global_stages,
            "aux_weight": self.aux_weight,
        }

    def parts(self) -> dict[str, str]:
        """Return the stem, every stage followed by its semantic layer, and the head."""
        parts = {}
        for name, path in self.encoder.parts().items():
            parts[name] = f"encoder.{path}"
            if name.startswith("stage"):
                number = int(name.removeprefix("stage"))
                parts[f"semantic{number}"] = f"semantic_layers.{number - 1}"
        return parts | {"head": "head"}

    def no_weight_decay(self) -> set[str]:
        """Return LayerNorms and position tables, as the reference decays the head's BatchNorm."""
        norms = {
            f"semantic_layers.{s}.norm.{name}"
            for s in range(NUM_STAGES)
            for name in ("weight", "bias")
        }
        return norms | super().no_weight_decay()


def _conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def _sum_of_maps(maps: Sequence[Tensor]) -> Tensor:
    """Return the sum of maps at the size of the first, each upsampled by 2 as often as needed."""
    total = maps[0]
    for level, feature_map in enumerate(maps[1:], start=1):
        for _ in range(level):
            feature_map = _upsample_by_2(feature_map)
        total = total + _resize(feature_map, total.shape[2:])
    return total


def _upsample_by_2(feature_map: Tensor) -> Tensor:
    height, width = feature_map.shape[2:]
    return _resize(feature_map, torch.Size((2 * height, 2 * width)))


def _resize(feature_map: Tensor, size: torch.Size) -> Tensor:
    # Twice the size of a stage is up to one row or column more than that of the stage before.
    if feature_map.shape[2:] == size:
        return feature_map
    return F.interpolate(feature_map, size=size, mode="bilinear", align_corners=False)


def semask_fpn(
    num_classes: int,
    backbone: str = "swin_tiny_patch4_window7_224",
    pretrained: bool = False,
    decoder_dim: int = 256,
    dropout: float = 0.1,
    semantic_dropout: float = 0.1,
    global_stages: Sequence[int] | None = None,
    aux_weight: float = 0.4,
    **kwargs: Any,
) -> SeMaskFPN:
    """SeMask-FPN, 34.7 M parameters with Swin-T at 150 classes.

    The released models have ``swin_tiny_patch4_window7_224``, ``swin_small_patch4_window7_224``,
    ``swin_base_patch4_window12_384`` and ``swin_large_patch4_window12_384``.

    Args:
        num_classes: Number of classes.
        backbone: Name of a Swin Transformer in timm.
        pretrained: Whether the backbone's weights are downloaded from the Hugging Face hub.
        decoder_dim: Channels of the head.
        dropout: Rate of the channel dropout before the classifier.
        semantic_dropout: Dropout rate in the semantic layers.
        global_stages: See :class:`SeMaskFPN`.
        aux_weight: Weight of the auxiliary loss.
        kwargs: Other arguments of :class:`~segformer_pl.models.swin.SwinEncoder`.
    """
    return SeMaskFPN(
        SwinEncoder(name=backbone, pretrained=pretrained, **kwargs),
        num_classes,
        decoder_dim,
        dropout,
        semantic_dropout,
        global_stages,
        aux_weight,
    )
