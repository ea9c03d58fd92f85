"""Mix Transformer (MiT), the hierarchical encoder of SegFormer (Xie et al. 2021, Sec. 3.1).

In reading order: patch embedding, stage, encoder, variants B0 to B5. The block, attention and
Mix-FFN, is in :mod:`~segformer_pl.models.mit_block`.

Symbols: B batch size, H x W token grid, N = H * W tokens, C channels, r = ``sr_ratio`` (the paper's
reduction ratio R is r squared). Tokens have the shape (B, H, W, C), so that the size of the grid
stays known. Their permutation to (B, C, H, W) is a channels-last view, so that neither convolutions
nor LayerNorms copy them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segformer_pl.models.mit_arguments import (
    KvBorder,
    PosEncoding,
    check_drop_path_rate,
    check_kv_border,
    check_merged_queries,
    check_pos_encoding,
    check_stage_arguments,
    default_paddings,
    min_size,
    position_grids,
)
from segformer_pl.models.mit_block import Block, NormEps
from segformer_pl.models.paper_macs import encoder_macs, output_size
from segformer_pl.models.segmenter import Encoder
from segformer_pl.models.tokens import (
    layer_ids_of_stages,
    norms_and,
    to_channels_first,
    to_tokens,
)


class OverlapPatchEmbed(nn.Module):
    """Overlapped patch merging: a strided convolution and a LayerNorm (Sec. 3.1).

    Shapes: (B, C_in, H, W) -> (B, H', W', C_out), H' = floor((H + 2P - K) / S) + 1.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        patch_size: int,
        stride: int,
        padding: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride, padding)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Return the tokens (B, H', W', C_out) of a feature map (B, C_in, H, W)."""
        return self.norm(to_tokens(self.proj(feature_map)))


class Stage(nn.Module):
    """One level of the pyramid: patch embedding, blocks and a final LayerNorm.

    Shapes: (B, C_in, H, W) -> (B, C, H', W'), H' as in :class:`OverlapPatchEmbed`. The normalised
    map is the input of both the decode head and the next stage.

    Args:
        patch_embed: Patch embedding.
        blocks: Transformer blocks.
        norm: Final LayerNorm.
        pos_grid: Side of the learned position table in tokens. 0: no table.
    """

    def __init__(
        self,
        patch_embed: OverlapPatchEmbed,
        blocks: Sequence[Block],
        norm: nn.LayerNorm,
        pos_grid: int,
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm
        shape = (1, norm.normalized_shape[0], pos_grid, pos_grid)
        self.pos_embed = nn.Parameter(torch.zeros(shape)) if pos_grid else None

    def forward(self, feature_map: Tensor) -> Tensor:
        """Return the feature map (B, C, H', W') of an input (B, C_in, H, W)."""
        tokens = self.patch_embed(feature_map)
        if self.pos_embed is not None:
            tokens = tokens + to_tokens(
                F.interpolate(
                    self.pos_embed, size=tokens.shape[1:3], mode="bilinear", align_corners=False
                )
            )
        return to_channels_first(self.norm(self.blocks(tokens)))


class MixTransformer(Encoder):
    """Mix Transformer (MiT): the hierarchical encoder of SegFormer.

    Four stages, each an overlapped patch embedding followed by transformer blocks and a
    LayerNorm, produce a feature pyramid at strides 4, 8, 16 and 32. By default there is no
    positional encoding: the zero-padded depthwise convolution inside Mix-FFN provides positional
    information, so the encoder accepts any resolution (Xie et al. 2021, Sec. 3.1).

    Shapes (C_i channels and s_i cumulative stride of stage i):
        input   (B, in_channels, H, W), any H and W of at least 29 pixels with the defaults (of
                any size with ``kv_border="keep"``)
        output  list of four (B, C_i, ceil(H / s_i), ceil(W / s_i)), channels-last in memory;
                floor instead of ceil where the overlap is removed

    Args:
        embed_dims: Channels C_i of each stage (Table 6).
        depths: Number of blocks L_i of each stage (Table 6, but L_2 as in the released weights).
        num_heads: Attention heads of each stage.
        mlp_ratio: Width of Mix-FFN over C_i. 4 as in the released weights; Table 6 prints 8 for
            the first two stages of B0 to B4.
        sr_ratios: Side of the square of tokens merged into one key/value. The paper's reduction
            ratio R is its square: (8, 4, 2, 1) here is the paper's (64, 16, 4, 1).
        kv_border: Treatment of the last rows and columns of tokens if a stage's grid is no multiple
            of its sr_ratio, which is the case if a side of the image is no multiple of 32. With
            ``"drop"`` they give no keys and values, as in the reference code; with ``"keep"`` they
            do. Both have the same parameters and agree at multiples of 32, so trained weights work
            with either.
        merged_queries: Share of the 2x2 squares of tokens of each stage, from 0 to 1, whose queries
            are merged into one where they differ least (SegFormer++, arXiv 2405.14467; see
            :mod:`~segformer_pl.models.query_merging`). A share s leaves 1 - 0.75 s of the queries.
            The parameters are the same, so trained weights work with any share; their predictions
            change.
        patch_sizes: Kernel K of each patch embedding.
        strides: Stride S of each patch embedding.
        paddings: Padding P of each patch embedding. Default: K // 2 where patches overlap
            (K > S), and 0 where they do not (K = S), so that a 512-pixel side cut in patches of
            4 gives 128 tokens and not 129.
        pos_encoding: ``"mix_ffn"`` (the paper's), ``"learned"`` (no depthwise convolution; one
            table per stage, resized bilinearly to the token grid: the paper's Table 1c
            comparison) or ``"none"`` (neither).
        image_size: Side in pixels of the square images that determines the size of the learned
            tables. Required by ``pos_encoding="learned"``, refused otherwise.
        in_channels: Number of channels of the image.
        drop_path_rate: Stochastic-depth rate of the last block. The rate grows linearly from 0 in
            the first block.
        norm_eps: Epsilon of block and stage norms. The released weights were trained with 1e-6;
            transformers computes with 1e-5.
        conv_norm_eps: Epsilon of the norms after a convolution, in the patch embedding and in the
            sequence reduction. The released weights were trained with 1e-5; mmsegmentation computes
            with 1e-6.

    Raises:
        UserError: An argument, or a combination of arguments, is impossible.

    Example:
        >>> [tuple(f.shape) for f in mit_b0()(torch.zeros(1, 3, 64, 96))]
        [(1, 32, 16, 24), (1, 64, 8, 12), (1, 160, 4, 6), (1, 256, 2, 3)]
    """

    training_arguments = ("drop_path_rate",)

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratio: int = 4,
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        kv_border: KvBorder = "drop",
        merged_queries: Sequence[float] = (0, 0, 0, 0),
        patch_sizes: Sequence[int] = (7, 3, 3, 3),
        strides: Sequence[int] = (4, 2, 2, 2),
        paddings: Sequence[int] | None = None,
        pos_encoding: PosEncoding = "mix_ffn",
        image_size: int | None = None,
        in_channels: int = 3,
        drop_path_rate: float = 0.1,
        norm_eps: float = 1e-6,
        conv_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        eps = NormEps(norm_eps, conv_norm_eps)
        if paddings is None:
            paddings = default_paddings(patch_sizes, strides)
        per_stage = {
            "embed_dims": tuple(embed_dims),
            "depths": tuple(depths),
            "num_heads": tuple(num_heads),
            "sr_ratios": tuple(sr_ratios),
            "patch_sizes": tuple(patch_sizes),
            "strides": tuple(strides),
            "paddings": tuple(paddings),
        }
        check_stage_arguments(**per_stage)
        check_pos_encoding(pos_encoding, image_size)
        check_kv_border(kv_border)
        check_merged_queries(merged_queries)
        check_drop_path_rate(drop_path_rate)

        grids = position_grids(image_size, patch_sizes, strides, paddings)
        if image_size is not None:
            # Several image sizes give the same tables; state the smallest.
            image_size = (grids[0] - 1) * strides[0] + patch_sizes[0] - 2 * paddings[0]
        self._arguments: dict[str, Any] = per_stage | {
            "mlp_ratio": mlp_ratio,
            "kv_border": kv_border,
            "merged_queries": tuple(merged_queries),
            "pos_encoding": pos_encoding,
            "image_size": image_size,
            "in_channels": in_channels,
            "drop_path_rate": drop_path_rate,
        }
        self.in_channels = in_channels
        self.drop_path_rate = drop_path_rate
        self.out_channels = tuple(embed_dims)
        self.out_strides = tuple(math.prod(strides[: s + 1]) for s in range(4))
        self.min_size = min_size(patch_sizes, strides, paddings, sr_ratios, kv_border)
        # torch 2.15 takes for granted that a grid has an odd row, or has none, as in its example.
        self.traces_any_size = not any(merged_queries)

        last_block = max(sum(depths) - 1, 1)
        stages = []
        num_built = 0
        for s in range(4):
            stages.append(
                Stage(
                    OverlapPatchEmbed(
                        embed_dims[s - 1] if s else in_channels,
                        embed_dims[s],
                        patch_sizes[s],
                        strides[s],
                        paddings[s],
                        conv_norm_eps,
                    ),
                    [
                        Block(
                            embed_dims[s],
                            num_heads[s],
                            mlp_ratio,
                            sr_ratios[s],
                            depthwise=pos_encoding == "mix_ffn",
                            drop_path_rate=drop_path_rate * (num_built + b) / last_block,
                            eps=eps,
                            kv_border=kv_border,
                            merged_queries=merged_queries[s],
                        )
                        for b in range(depths[s])
                    ],
                    nn.LayerNorm(embed_dims[s], eps=norm_eps),
                    pos_grid=grids[s],
                )
            )
            num_built += depths[s]
        self.stages = nn.ModuleList(stages)
        self.apply(_init_weights)
        # Convolutions on channels-last maps produce channels-last gradients. If the weights had
        # another memory format, DistributedDataParallel would copy the gradients in every step.
        self.to(memory_format=torch.channels_last)

    @property
    def norm_eps(self) -> NormEps:
        """Epsilons of the LayerNorms. Loading weights sets those that they were trained with."""
        first = cast(Stage, self.stages[0])
        return NormEps(first.norm.eps, first.patch_embed.norm.eps)

    @norm_eps.setter
    def norm_eps(self, eps: NormEps) -> None:
        for module in self.modules():
            if isinstance(module, Stage):
                module.norm.eps = eps.norm
                module.patch_embed.norm.eps = eps.conv_norm
            elif isinstance(module, Block):
                module.norm1.eps = module.norm2.eps = eps.norm
                if module.attn.sr_ratio > 1:
                    module.attn.norm.eps = eps.conv_norm

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature pyramid of images (B, in_channels, H, W).

        Returns:
            Feature maps (B, C_i, H_i, W_i) of the four stages, from the finest to the coarsest.
        """
        features = []
        feature_map = images.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            feature_map = stage(feature_map)
            features.append(feature_map)
        return features

    def fold(self) -> None:
        """Fold the LayerNorms of the blocks into the layers that read them.

        Those of patch embeddings and stages stay: their maps are also added to, or padded.
        """
        super().fold()
        for module in self.modules():
            if isinstance(module, Block):
                module.fold()

    def init_args(self) -> dict[str, Any]:
        return self._arguments | self.weight_constants()

    def parts(self) -> dict[str, str]:
        return {f"stage{s + 1}": f"stages.{s}" for s in range(len(self.stages))}

    def layer_ids(self) -> dict[str, int]:
        """Return the layer of every parameter: one layer for each block, from the image on.

        A stage's patch embedding and position table belong to its first block, its final norm to
        its last.
        """
        return layer_ids_of_stages("stages", self.stages)

    def no_weight_decay(self) -> set[str]:
        """Return the LayerNorms and the position tables, as in the reference's configurations."""
        return norms_and(self, "pos_embed")

    def out_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        sizes = []
        size = (height, width)
        for stage in cast(list[Stage], list(self.stages)):
            size = output_size(stage.patch_embed.proj, size)
            sizes.append(size)
        return sizes

    def paper_macs(self, height: int, width: int) -> int:
        """Return the encoder's share of :meth:`~segformer_pl.models.SegFormer.paper_macs`."""
        stages = cast(list[Stage], list(self.stages))
        return encoder_macs(stages, self.out_sizes(height, width))

    def weight_constants(self) -> dict[str, float]:
        return {"norm_eps": self.norm_eps.norm, "conv_norm_eps": self.norm_eps.conv_norm}

    def set_weight_constants(self, constants: Mapping[str, float]) -> None:
        eps = self.weight_constants()
        super().set_weight_constants({k: v for k, v in constants.items() if k not in eps})
        eps |= constants
        self.norm_eps = NormEps(eps["norm_eps"], eps["conv_norm_eps"])


def _init_weights(module: nn.Module) -> None:
    """Initialise as in the reference code.

    Linear layers and position tables from a truncated normal of standard deviation 0.02;
    convolutions from He's normal over the fan-out (per group); biases 0.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        kernel_height, kernel_width = module.kernel_size
        fan_out = kernel_height * kernel_width * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Stage) and module.pos_embed is not None:
        nn.init.trunc_normal_(module.pos_embed, std=0.02)


# Variants (Table 6; depths of B2 and B3 as in the released weights). Ablations may set every other
# argument of MixTransformer.


def mit_b0(**kwargs: Any) -> MixTransformer:
    """MiT-B0, 3.3 M parameters."""
    return MixTransformer(embed_dims=(32, 64, 160, 256), depths=(2, 2, 2, 2), **kwargs)


def mit_b1(**kwargs: Any) -> MixTransformer:
    """MiT-B1, 13.2 M parameters."""
    return MixTransformer(embed_dims=(64, 128, 320, 512), depths=(2, 2, 2, 2), **kwargs)


def mit_b2(**kwargs: Any) -> MixTransformer:
    """MiT-B2, 24.2 M parameters."""
    return MixTransformer(embed_dims=(64, 128, 320, 512), depths=(3, 4, 6, 3), **kwargs)


def mit_b3(**kwargs: Any) -> MixTransformer:
    """MiT-B3, 44.1 M parameters."""
    return MixTransformer(embed_dims=(64, 128, 320, 512), depths=(3, 4, 18, 3), **kwargs)


def mit_b4(**kwargs: Any) -> MixTransformer:
    """MiT-B4, 60.8 M parameters."""
    return MixTransformer(embed_dims=(64, 128, 320, 512), depths=(3, 8, 27, 3), **kwargs)


def mit_b5(**kwargs: Any) -> MixTransformer:
    """MiT-B5, 81.4 M parameters."""
    return MixTransformer(embed_dims=(64, 128, 320, 512), depths=(3, 6, 40, 3), **kwargs)
