"""Swin Transformer (Liu et al. 2021) as an encoder for images of any size.

The layers, their initialisation and their weights are timm's, whose Swin classifies images of one
size. This encoder computes what the segmentation networks with Swin compute (Swin's own, MaskFormer
and SeMask, and ``SwinBackbone`` in transformers). It differs from timm in four points:

- A map that the window does not divide is padded *before* the cyclic shift, not after it. With a
  window of 4 and a shift of 2, a row of five tokens gives::

      tokens                  a b c d e
      pad, then shift         c d e 0 | 0 0 a b     here: neighbours share a window
      shift, then pad         c d e a | b 0 0 0     timm

- The windows of every second block are shifted in every stage. timm builds those stages without a
  shift that the window covers at the size in the model's name (stage 4 at 224 pixels), and keeps
  this for larger images.
- Images are padded to whole patches.
- The map of every stage has a LayerNorm of its own. The next stage takes the map before it. There
  is no norm and no classifier after the last stage.

Symbols: B batch size, H_i x W_i token grid and C_i channels of stage i, M side of a window in
tokens. Tokens have the shape (B, H_i, W_i, C_i).
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segformer_pl.errors import UserError
from segformer_pl.models.mit_arguments import check_drop_path_rate
from segformer_pl.models.segmenter import AdaptedWeights, Encoder
from segformer_pl.models.timm_models import create_timm_model, load_timm
from segformer_pl.models.tokens import layer_ids_of_stages, norms_and, to_channels_first
from segformer_pl.models.windows import Window, window_partition, window_reverse


def pad_to_windows(tokens: Tensor, window: Window) -> Tensor:
    """Return tokens (B, H, W, C) with zeros below and on the right, up to whole windows."""
    height, width = tokens.shape[1:3]
    return F.pad(tokens, (0, 0, 0, -width % window[1], 0, -height % window[0]))


def shift_mask(padded: Tensor, window: Window, shift: Window) -> Tensor:
    """Return what is added to the attention logits of shifted windows.

    After the cyclic shift, the last windows of each axis hold tokens from both ends of the map.
    Tokens attend only to those of their own region. A row of eight tokens, M = 4, shift 2::

        tokens      2 3 4 5 | 6 7 0 1
        region      0 0 0 0 | 1 1 2 2

    Args:
        padded: Tokens (B, H, W, C) in whole windows.
        window: Height and width of a window.
        shift: Number of tokens that rows and columns are shifted by.

    Returns:
        (number of windows, M * M, M * M): 0 within a region and -100 between two.
    """
    rows, columns = (
        _regions(torch.arange(size, device=padded.device), side, moved)
        for size, side, moved in zip(padded.shape[1:3], window, shift)
    )
    regions = 3 * rows[:, None] + columns
    by_window = window_partition(regions[None, :, :, None], window).flatten(1)
    is_other = by_window[:, None, :] != by_window[:, :, None]
    # A finite number, as in the original, so that trained weights keep their results.
    return is_other.to(padded.dtype) * -100.0


def _regions(index: Tensor, side: int, moved: int) -> Tensor:
    """Return the region of every row or column, 0 to 2."""
    return (index >= len(index) - side).long() + (index >= len(index) - moved).long()


class SwinBlock(nn.Module):
    """Attention within windows and an MLP, both pre-normalised, residual, subject to drop path.

    Shapes: (B, H, W, C) -> (B, H, W, C).

    Args:
        block: Block of timm, built with ``always_partition``, which gives its layers.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.window: Window = block.window_size
        self.shift: Window = block.shift_size
        self.norm1 = block.norm1
        self.attn = block.attn
        self.attn.fused_attn = True  # scaled_dot_product_attention, which timm leaves off
        self.drop_path1 = block.drop_path1
        self.norm2 = block.norm2
        self.mlp = block.mlp
        self.drop_path2 = block.drop_path2

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Transform tokens (B, H, W, C); the result has the same shape.

        Args:
            tokens: Tokens of the map.
            mask: :func:`shift_mask` of the padded map. Used if the windows are shifted.
        """
        tokens = tokens + self.drop_path1(self._attend(self.norm1(tokens), mask))
        return tokens + self.drop_path2(self.mlp(self.norm2(tokens)))

    def _attend(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        height, width = tokens.shape[1:3]
        (rows, columns), is_shifted = self.shift, any(self.shift)
        padded = pad_to_windows(tokens, self.window)
        padded_height, padded_width = padded.shape[1:3]
        if is_shifted:
            padded = padded.roll((-rows, -columns), (1, 2))
        windows = window_partition(padded, self.window)
        attended = self.attn(windows.flatten(1, 2), mask=mask if is_shifted else None)
        attended = attended.unflatten(1, self.window)
        merged = window_reverse(attended, self.window, padded_height, padded_width)
        if is_shifted:
            merged = merged.roll((rows, columns), (1, 2))
        return merged[:, :height, :width]


class SwinStage(nn.Module):
    """One level of the pyramid: patch merging (not in stage 1), blocks, and the map's LayerNorm.

    Shapes: (B, H_i-1, W_i-1, C_i-1) -> (B, H_i, W_i, C_i), without the norm. The encoder, or what
    changes tokens between stages, applies ``norm`` to the output.

    Args:
        stage: Stage of timm, which gives its layers.
    """

    def __init__(self, stage: Any) -> None:
        super().__init__()
        self.downsample = stage.downsample
        self.blocks = nn.ModuleList(SwinBlock(block) for block in stage.blocks)
        first, *others = cast(list[SwinBlock], list(self.blocks))
        self.dim: int = first.norm1.normalized_shape[0]
        self.window = first.window
        self.shift = others[0].shift if others else first.shift
        self.norm = nn.LayerNorm(self.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens (B, H_i, W_i, C_i) of those of the stage before, without ``norm``."""
        tokens = self.downsample(tokens)
        mask = None
        if any(self.shift):
            padded = pad_to_windows(tokens[:1, :, :, :1], self.window)
            mask = shift_mask(padded, self.window, self.shift)
        for block in self.blocks:
            tokens = block(tokens, mask)
        return tokens


class SwinEncoder(Encoder):
    """Swin Transformer of timm, with the maps of the segmentation networks that use Swin.

    Shapes: (B, in_channels, H, W) -> list of four (B, C_i, ceil(H / s_i), ceil(W / s_i)) with
    strides s_i of 4, 8, 16 and 32, channels-last in memory. Any H and W.

    Parameters have timm's names, apart from the norms of the maps, ``layers.0.norm`` to
    ``layers.3.norm``, which timm does not have.

    Args:
        name: Name of the model in timm, with or without the tag of its weights
            (``swin_tiny_patch4_window7_224``, ``swin_base_patch4_window12_384.ms_in22k``). Its
            number of pixels is that of the pre-training; images of any size are taken.
        pretrained: Whether the weights are downloaded from the Hugging Face hub. The norms of the
            maps remain newly initialised. Without network, set them from a file:
            ``model.encoder_weights`` on the command line.
        drop_path_rate: Stochastic-depth rate of the last block. The rate grows linearly from 0 in
            the first block. MaskFormer and SeMask train with 0.3.
        in_channels: Number of channels of the images. Pretrained filters are adapted by timm.
        embed_dim: Channels C_1, which double from stage to stage. Default: as in the name.
        depths: Number of blocks of each stage. Default: as in the name.
        num_heads: Attention heads of each stage. Default: as in the name.
        window_size: Side M of a window in tokens. Default: as in the name.

    Raises:
        UserError: timm has no such model, it is no Swin Transformer, its weights cannot be
            downloaded or do not fit the other arguments, or an argument is impossible.

    Example:
        >>> small = SwinEncoder(
        ...     "swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1, 2, 1),
        ...     num_heads=(1, 2, 4, 8), window_size=4
        ... )
        >>> [tuple(f.shape) for f in small(torch.zeros(1, 3, 63, 97))]
        [(1, 8, 16, 25), (1, 16, 8, 13), (1, 32, 4, 7), (1, 64, 2, 4)]
    """

    training_arguments = ("pretrained", "drop_path_rate")
    # The shapes of padded and shifted windows are too much for the symbolic sizes of torch 2.15.
    traces_any_size = False

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        drop_path_rate: float = 0.3,
        in_channels: int = 3,
        embed_dim: int | None = None,
        depths: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        window_size: int | None = None,
    ) -> None:
        super().__init__()
        check_drop_path_rate(drop_path_rate)
        _check_arguments(embed_dim, depths, num_heads, window_size)
        changes: dict[str, Any] = {
            "embed_dim": embed_dim,
            "depths": None if depths is None else tuple(depths),
            "num_heads": None if num_heads is None else tuple(num_heads),
            "window_size": window_size,
        }
        self._init_args = {
            "name": name,
            "pretrained": False,
            "drop_path_rate": drop_path_rate,
            "in_channels": in_channels,
            **changes,
        }
        given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
        timm = load_timm()
        if timm.is_model(name) and not timm.models.is_model_in_modules(name, ["swin_transformer"]):
            raise UserError(
                f"{name} is no Swin Transformer, whose stages this network needs; choose one of "
                "timm's swin_* models, such as swin_tiny_patch4_window7_224"
            )
        given |= {"in_chans": in_channels, "drop_path_rate": drop_path_rate}
        model = create_timm_model(
            name, pretrained, given, "swin_*", num_classes=0, always_partition=True
        )
        model.patch_embed.strict_img_size = False
        self.in_channels = in_channels
        self.patch_embed = model.patch_embed
        self.layers = nn.ModuleList(SwinStage(stage) for stage in model.layers)
        for number, stage in enumerate(self.stages, start=1):
            heads = cast(SwinBlock, stage.blocks[0]).attn.num_heads
            if stage.dim % heads:
                raise UserError(
                    f"stage {number}: {stage.dim} channels are not a multiple of its {heads} "
                    "heads; change embed_dim or num_heads"
                )
        self.out_channels = tuple(info["num_chs"] for info in model.feature_info)
        self.out_strides = tuple(info["reduction"] for info in model.feature_info)
        # As in MixTransformer: channels-last maps give channels-last gradients.
        self.to(memory_format=torch.channels_last)

    @property
    def stages(self) -> list[SwinStage]:
        """The stages, for networks that change the tokens between them."""
        return cast(list[SwinStage], list(self.layers))

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens (B, H_1, W_1, C_1) of images (B, in_channels, H, W)."""
        rows, columns = self.patch_embed.patch_size
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % columns, 0, -height % rows))
        return self.patch_embed(padded.contiguous(memory_format=torch.channels_last))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature pyramid of images (B, in_channels, H, W).

        Returns:
            Normalised maps (B, C_i, H_i, W_i) of the four stages, from the finest to the coarsest.
        """
        features = []
        tokens = self.embed(images)
        for stage in self.stages:
            tokens = stage(tokens)
            features.append(to_channels_first(stage.norm(tokens)))
        return features

    def init_args(self) -> dict[str, Any]:
        """Return the arguments; ``pretrained`` is False, as the weights are stored themselves."""
        return dict(self._init_args)

    def parts(self) -> dict[str, str]:
        stages = {f"stage{s + 1}": f"layers.{s}" for s in range(len(self.layers))}
        return {"stem": "patch_embed"} | stages

    def adapt_weights(
        self, tensors: Mapping[str, Tensor], stated: Mapping[str, Any]
    ) -> AdaptedWeights:
        """Adapt a file of timm's or Microsoft's classification network.

        Neither has the norms of the maps. Older files hold tables that are computed here, and
        count patch merging to the stage before it.
        """
        left_out = {
            key: "it is computed from the size of the window"
            for key in tensors
            if key.endswith((".relative_position_index", ".attn_mask"))
        }
        # Here and in timm, stage 1 has no patch merging.
        is_older = any(key.startswith("layers.0.downsample.") for key in tensors)
        adapted = {
            _with_merging_after(key) if is_older else key: tensor
            for key, tensor in tensors.items()
            if key not in left_out
        }
        norms = [
            f"layers.{s}.norm.{name}"
            for s, stage in enumerate(self.stages)
            for name, _ in stage.norm.named_parameters()
        ]
        if any(key in adapted for key in norms):  # trained in a segmentation network
            return AdaptedWeights(adapted, left_out)
        reason = "the source has no norms of the maps"
        return AdaptedWeights(adapted, left_out, initialized=dict.fromkeys(norms, reason))

    def layer_ids(self) -> dict[str, int]:
        """Return the layer of every parameter: one layer for each block, from the image on.

        Patch embedding and patch merging belong to the block that follows, the norm of a stage's
        map to the stage's last block.
        """
        ids = {f"patch_embed.{name}": 0 for name, _ in self.patch_embed.named_parameters()}
        return ids | layer_ids_of_stages("layers", self.stages)

    def no_weight_decay(self) -> set[str]:
        """Return the LayerNorms and the tables of relative positions, as the originals do."""
        return norms_and(self, "relative_position_bias_table")


def _with_merging_after(key: str) -> str:
    """Move patch merging from the end of a stage to the begin of the next one."""
    stage, separator, rest = key.partition(".downsample.")
    if not separator:
        return key
    path, _, number = stage.rpartition(".")
    return f"{path}.{int(number) + 1}{separator}{rest}"


def _check_arguments(
    embed_dim: int | None,
    depths: Sequence[int] | None,
    num_heads: Sequence[int] | None,
    window_size: int | None,
) -> None:
    """Check the arguments that change timm's model.

    Raises:
        UserError: A number is below 1, or a sequence does not have four.
    """
    for name, value in {"embed_dim": embed_dim, "window_size": window_size}.items():
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: give an integer of at least 1")
    for name, values in {"depths": depths, "num_heads": num_heads}.items():
        if values is not None and (len(values) != 4 or min(values) < 1):
            raise UserError(
                f"{name}={tuple(values)}: give one integer of at least 1 for each of the four "
                "stages"
            )
