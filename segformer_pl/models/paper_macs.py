"""Count multiply-adds as the paper does for the "FLOPs" of its Tables 1 and 2.

The numbers follow the reference code's ``tools/get_flops.py`` with mmcv's counter:

- a convolution: its multiply-adds and bias additions at every output position;
- a Linear layer: its multiply-adds, without the bias;
- attention of N tokens and C channels: 2 N (N / R) C, R = sr_ratio squared. Where queries are
  merged, which the paper does not do, they are M instead of the first N;
- ReLU: one for each element of its output;
- pooling: one for each element of its input.

Norms (synchronised BatchNorm), GELU, softmax and interpolation are not counted. In the tables of
the paper these rules agree with every printed digit, apart from single cells that are rounded down
or contradict other tables; tests/models/test_paper_macs.py lists them.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from segformer_pl.models.mit import Stage
    from segformer_pl.models.mit_block import Block, EfficientSelfAttention, MixFFN

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


_RELUS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)


def counted_macs(network: nn.Module, run: Callable[[], Any]) -> int | None:
    """Count the multiply-adds of a forward pass of one image from the layers that it calls.

    Args:
        network: A network of convolutions and linear layers.
        run: Function that runs its forward pass, for example on the meta device.

    Returns:
        Multiply-adds; None if some are executed outside of convolutions and linear layers, such as
        the matrix products of attention, for which the rules differ from paper to paper.
    """
    macs = products = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal macs, products
        if isinstance(module, nn.Conv2d):
            num_outputs = math.prod(output.shape[2:])
            macs += convolution_macs(module, num_outputs)
            products += module.weight.numel() * num_outputs
        elif isinstance(module, nn.Linear):
            macs += inputs[0].numel() * module.out_features
            products += inputs[0].numel() * module.out_features
        elif isinstance(module, _RELUS):
            macs += output.numel()
        elif isinstance(module, _POOLS):
            macs += inputs[0].numel()

    handles = [module.register_forward_hook(count) for module in network.modules()]
    try:
        with FlopCounterMode(display=False) as executed:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return macs if 2 * products == executed.get_total_flops() else None


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
    num_queries = attn.num_queries(*size)
    num_keys = num_tokens / attn.sr_ratio**2  # may be a fraction: the paper does not round
    macs = 0.0
    if attn.sr_ratio > 1:
        macs += convolution_macs(attn.sr, math.prod(output_size(attn.sr, size)))
    macs += attn.q.weight.numel() * num_tokens
    macs += attn.kv.weight.numel() * num_keys
    macs += 2 * num_queries * num_keys * attn.proj.out_features
    return macs + attn.proj.weight.numel() * num_queries


def _ffn_macs(mlp: "MixFFN", num_tokens: int) -> int:
    macs = (mlp.fc1.weight.numel() + mlp.fc2.weight.numel()) * num_tokens
    if isinstance(mlp.dwconv, nn.Conv2d):
        macs += convolution_macs(mlp.dwconv, num_tokens)
    return macs
