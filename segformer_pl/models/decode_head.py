"""The All-MLP decode head of SegFormer (Xie et al. 2021, Sec. 3.2), computed in folded form."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segformer_pl.errors import UserError
from segformer_pl.models.folding import batch_norm_affine, folded_linear
from segformer_pl.models.paper_macs import convolution_macs
from segformer_pl.models.tokens import to_channels_first, to_tokens


class AllMLPHead(nn.Module):
    """Project every stage to C channels, upsample to stage 1, fuse, classify.

    The reference computes ``relu(bn(fuse(concat(up(W_i x_i + b_i)))))`` with the stages
    concatenated from the coarsest to the finest. The projections W_i, the upsampling and the 1x1
    fuse convolution (blocks F_i) are all linear, and bilinear upsampling commutes with a 1x1
    convolution, so :meth:`fuse_features` computes ``sum_i up(F_i W_i x_i) + F_i b_i`` instead:
    the two small matrices are multiplied first and each stage is projected at its own
    resolution. Parameters and results are those of the reference, both factors receive gradients,
    and the concatenation of 4C channels at stride 4 is never built::

        stage   stride   projection    upsampling
        1        4       F_1 W_1       -      |
        2        8       F_2 W_2       x 2    |  sum + sum_i F_i b_i,
        3       16       F_3 W_3       x 4    |  BatchNorm, ReLU, dropout, classifier
        4       32       F_4 W_4       x 8    |

    Shapes:
        input   list of (B, C_i, H_i, W_i), the encoder's feature pyramid
        output  logits (B, num_classes, H_1, W_1), at the resolution of the encoder's first stage

    Args:
        in_channels: Channels C_i of every feature map of the encoder.
        num_classes: Number of classes.
        decoder_dim: Channels C of the head: 256 for B0 and B1, 768 for B2 to B5.
        in_indices: Stages of the encoder that the head uses, counted from 0. For a single stage the
            fuse convolution is left out, which gives the parameters and FLOPs of the paper's
            "MiT-B2, S4" row (Table 1d).
        dropout: Rate of the channel dropout before the classifier.

    Raises:
        UserError: ``in_indices`` repeats a stage, contains one that the encoder does not have, or
            leaves out the deepest one.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        decoder_dim: int,
        in_indices: Sequence[int] = (0, 1, 2, 3),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        deepest = len(in_channels) - 1
        if sorted(set(in_indices) & set(range(deepest + 1))) != sorted(in_indices):
            raise UserError(
                f"in_indices={tuple(in_indices)}: name each stage at most once, "
                f"out of 0 to {deepest}"
            )
        if deepest not in in_indices:
            raise UserError(
                f"in_indices={tuple(in_indices)} leaves out the deepest stage, {deepest}, whose "
                f"parameters would then never be trained; add {deepest}"
            )
        self.in_indices = tuple(sorted(in_indices))
        self.projections = nn.ModuleList(
            nn.Linear(in_channels[i], decoder_dim) for i in self.in_indices
        )
        num_stages = len(self.in_indices)
        # A 1x1 convolution without bias, as in the reference code (the paper says Linear).
        # Its input blocks are ordered from the coarsest stage to the finest.
        self.fuse = (
            nn.Conv2d(num_stages * decoder_dim, decoder_dim, 1, bias=False)
            if num_stages > 1
            else None
        )
        self.bn = nn.BatchNorm2d(decoder_dim)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(decoder_dim, num_classes, 1)
        if self.fuse is not None:
            nn.init.kaiming_normal_(self.fuse.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return logits (B, num_classes, H_1, W_1) of a feature pyramid of (B, C_i, H_i, W_i)."""
        return self.classify(self.fuse_features(features))

    def classify(self, fused: Tensor) -> Tensor:
        """Return logits (B, num_classes, H_1, W_1) of a fused map (B, C, H_1, W_1)."""
        return self.classifier(self.dropout(fused))

    def fuse_features(self, features: Sequence[Tensor]) -> Tensor:
        """Return the fused map (B, C, H_1, W_1) of a feature pyramid, after BatchNorm and ReLU."""
        weights, bias = self.folded_projections()
        biases = _at_the_coarsest_stage(bias, len(weights))
        projected = {
            index: to_channels_first(F.linear(to_tokens(features[index]), weight, bias))
            for index, weight, bias in zip(self.in_indices, weights, biases)
        }
        return F.relu(self.bn(_sum_upsampled(projected, features[0].shape[2:])))

    def paper_macs(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Return the multiply-adds of the head as the paper describes it, not folded.

        It has a projection at each stage's resolution and a fuse convolution from 4C to C channels
        at stride 4. See :mod:`~segformer_pl.models.paper_macs` for what is counted.

        Args:
            sizes: Height and width (H_i, W_i) of every feature map.
        """
        num_fused = math.prod(sizes[0])
        projections = cast(list[nn.Linear], list(self.projections))
        macs = sum(
            projection.weight.numel() * math.prod(sizes[index])
            for index, projection in zip(self.in_indices, projections)
        )
        if self.fuse is not None:
            macs += convolution_macs(self.fuse, num_fused)
        macs += self.bn.num_features * num_fused  # ReLU
        return macs + convolution_macs(self.classifier, num_fused)

    def folded_projections(self) -> tuple[list[Tensor], Tensor]:
        """Return the products F_i W_i, (C, C_i) for every used stage, and sum_i F_i b_i, (C,).

        For a single stage there is no fuse convolution, and they are W_i and b_i.
        """
        projections = cast(list[nn.Linear], list(self.projections))
        if self.fuse is None:
            return [projections[0].weight], projections[0].bias
        blocks = reversed(self.fuse.weight.flatten(1).chunk(len(projections), dim=1))
        pairs = list(zip(blocks, projections))
        weights = [block @ projection.weight for block, projection in pairs]
        # Columns: fvcore, which counts FLOPs, fails on the product of a matrix and a vector.
        biases = [block @ projection.bias[:, None] for block, projection in pairs]
        return weights, torch.stack(biases).sum(0)[:, 0]

    def folded(self) -> "FoldedAllMLPHead":
        """Return the same head for inference, with its matrices multiplied once."""
        return FoldedAllMLPHead(self)


class FoldedAllMLPHead(nn.Module):
    """An :class:`AllMLPHead` in evaluation mode, whose matrices are multiplied beforehand.

    With the BatchNorm's scale s and shift t, each stage has one matrix, ``diag(s) F_i W_i``. All
    biases, ``diag(s) sum_i F_i b_i + t``, are added to the coarsest stage alone.

    Shapes are those of :class:`AllMLPHead`.

    Args:
        head: The head to fold. It stays as it is, and the classifier is shared.
    """

    def __init__(self, head: AllMLPHead) -> None:
        super().__init__()
        self.in_indices = head.in_indices
        scale, shift = batch_norm_affine(head.bn)
        weights, bias = copy.deepcopy(head).double().folded_projections()
        biases = _at_the_coarsest_stage(scale * bias + shift, len(weights))
        self.projections = nn.ModuleList(
            folded_linear(scale[:, None] * weight, bias, like=head.bn.weight)
            for weight, bias in zip(weights, biases)
        )
        self.classifier = head.classifier

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return logits (B, num_classes, H_1, W_1) of a feature pyramid of (B, C_i, H_i, W_i)."""
        return self.classifier(self.fuse_features(features))

    def fuse_features(self, features: Sequence[Tensor]) -> Tensor:
        """Return the fused map (B, C, H_1, W_1) of a feature pyramid, after BatchNorm and ReLU."""
        projected = {
            index: to_channels_first(projection(to_tokens(features[index])))
            for index, projection in zip(self.in_indices, self.projections)
        }
        return F.relu_(_sum_upsampled(projected, features[0].shape[2:]))

    def folded(self) -> "FoldedAllMLPHead":
        """Return this head, which is folded already."""
        return self


def _at_the_coarsest_stage(bias: Tensor, num_stages: int) -> list[Tensor | None]:
    """Return the biases of the stages for a bias of their sum.

    The bias of one stage is that of the sum, because every row of a bilinear upsampling sums to 1,
    and the coarsest map has 1/64 of the positions of the finest.
    """
    return [*[None] * (num_stages - 1), bias]


def _sum_upsampled(projected: Mapping[int, Tensor], size: Sequence[int]) -> Tensor:
    """Return the sum (B, C, H_1, W_1) of projected maps, upsampled to ``size`` (H_1, W_1).

    It takes the place of the first map. At 1024x2048 pixels a map of B0's head has 134 MB, and
    fresh memory of that size costs more than the sum. With gradients it is the sum of the first two
    maps that is changed: the first map is a view, and for a view that is changed, autograd copies
    the whole gradient each time, in a layout that makes the gradient of the upsampling slow.

    Args:
        projected: Index of the stage -> map (B, C, H_i, W_i). Stage 0 has the size already.
        size: Height and width of the sum.
    """
    total, *rest = (
        F.interpolate(p, size=size, mode="bilinear", align_corners=False) if index else p
        for index, p in projected.items()
    )
    if rest and torch.is_grad_enabled():
        total = total + rest.pop(0)
    for upsampled in rest:
        total.add_(upsampled)
    return total
