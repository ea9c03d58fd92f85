"""Count multiply-adds as the paper does for the "FLOPs" of its Tables 1 and 2.

The numbers follow the reference code's ``tools/get_flops.py`` with mmcv's counter:

- a convolution: its multiply-adds and bias additions at every output position;
- a Linear layer: its multiply-adds, without the bias;
- attention of N tokens and C channels: 2 N (N / R) C, R = sr_ratio squared;
- ReLU: one for each element.

Norms, GELU, softmax and interpolation are not counted.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from torch import nn

if TYPE_CHECKING:
    from segformer_pl.models.mit import Block, EfficientSelfAttention, MixFFN, Stage

Size = tuple[int, int]


def convolution_macs(convolution: nn.Conv2d, num_outputs: int) -> int:
    """Return the multiply-adds of a convolution at ``num_outputs`` positions, with its bias."""
    bias = 0 if convolution.bias is None else convolution.out_channels
    return (convolution.weight.numel() + bias) * num_outputs


def output_size(convolution: nn.Conv2d, size: Size) -> Size:
    """Return the height and width of a convolution's output for a square kernel."""
    kernel, stride = convolution.kernel_size[0], convolution.stride[0]
    padding = int(convolution.padding[0])
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in size)
    return height, width


def encoder_macs(stages: Sequence["Stage"], sizes: Sequence[Size]) -> int:
    """Return the multiply-adds of an encoder.

    Args:
        stages: Stages of the encoder.
        sizes: Height and width of the token grid of every stage.
    """
    macs = 0.0
    for stage, size in zip(stages, sizes):
        num_tokens = math.prod(size)
        macs += convolution_macs(stage.patch_embed.proj, num_tokens)
        for block in cast(list["Block"], list(stage.blocks)):
            macs += _attention_macs(block.attn, size) + _ffn_macs(block.mlp, num_tokens)
    return round(macs)


def _attention_macs(attn: "EfficientSelfAttention", size: Size) -> float:
    num_tokens = math.prod(size)
    num_keys = num_tokens / attn.sr_ratio**2  # may be a fraction: the paper does not round
    macs = 0.0
    if attn.sr_ratio > 1:
        macs += convolution_macs(attn.sr, math.prod(output_size(attn.sr, size)))
    macs += attn.q.weight.numel() * num_tokens
    macs += attn.kv.weight.numel() * num_keys
    macs += 2 * num_tokens * num_keys * attn.proj.out_features
    return macs + attn.proj.weight.numel() * num_tokens


def _ffn_macs(mlp: "MixFFN", num_tokens: int) -> int:
    macs = (mlp.fc1.weight.numel() + mlp.fc2.weight.numel()) * num_tokens
    if isinstance(mlp.dwconv, nn.Conv2d):
        macs += convolution_macs(mlp.dwconv, num_tokens)
    return macs
