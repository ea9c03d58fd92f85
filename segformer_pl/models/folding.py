"""Fold what is constant at inference into the weights of neighbouring layers.

The functions change modules in place and are exact apart from rounding; products are computed in
float64. :meth:`segformer_pl.models.segmenter.Network.for_inference` applies them to a copy.
"""

from itertools import pairwise
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norm_affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return scale and shift, (C,) float64 each, of a BatchNorm in evaluation mode."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = (variance.double() + norm.eps).rsqrt() * norm.weight.detach().double()
    return scale, norm.bias.detach().double() - mean.double() * scale


def fold_batch_norms(module: nn.Module) -> None:
    """Fold every BatchNorm into the convolution before it, where an ``nn.Sequential`` has both.

    Elsewhere something else could read the output of the convolution. The BatchNorm is replaced by
    an identity, so that the other layers keep their positions.
    """
    for sequence in module.modules():
        if type(sequence).forward is not nn.Sequential.forward:
            continue
        for (_, convolution), (name, norm) in pairwise(sequence.named_children()):
            # Some BatchNorms of timm have an activation, and with it a forward of their own.
            is_plain = isinstance(norm, _BatchNorm) and type(norm).forward is _BatchNorm.forward
            if not is_plain or not isinstance(convolution, nn.Conv2d):
                continue
            scale, shift = batch_norm_affine(cast(_BatchNorm, norm))
            weight, bias = convolution.weight, convolution.bias
            if bias is not None:
                shift = shift + bias.detach().double() * scale
            convolution.bias = _constant(shift, weight)
            convolution.weight = _constant(weight.double() * scale[:, None, None, None], weight)
            setattr(sequence, name, nn.Identity())


def fold_layer_norm(norm: nn.LayerNorm, *readers: nn.Linear | nn.Conv2d) -> None:
    """Fold weight and bias of a LayerNorm over channels into all layers that read its output.

    Args:
        norm: The LayerNorm. It still normalises, without weight and bias.
        readers: Linear layers with a bias, or such convolutions without padding: the zeros of a
            padding do not pass the LayerNorm.
    """
    if not norm.elementwise_affine:
        return
    scale, shift = norm.weight.double(), norm.bias.double()
    for reader in readers:
        weight, bias = reader.weight, cast(Tensor, reader.bias)
        kernel = weight.double()
        summed = kernel.sum((2, 3)) if kernel.dim() == 4 else kernel
        reader.bias = _constant(bias.double() + summed @ shift, bias)
        by_channel = scale[:, None, None] if kernel.dim() == 4 else scale
        reader.weight = _constant(kernel * by_channel, weight)
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)
    norm.elementwise_affine = False


def folded_linear(weight: Tensor, bias: Tensor | None, like: Tensor) -> nn.Linear:
    """Return a linear layer with constant weight (C_out, C_in) and bias (C_out,) or None."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = _constant(weight, like)
    if bias is not None:
        layer.bias = _constant(bias, like)
    return layer


def _constant(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().to(like), requires_grad=False)
