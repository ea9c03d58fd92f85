"""Single units of a network's feature maps, for networks whose head need not run as a whole.

An ERF reads one unit of the head, or a few. The fused map of SegFormer's head at stride 4 has
H/4 x W/4 of them, each of ``decoder_dim`` channels, and autograd would keep them all for the
backward pass. An adapter computes the wanted units alone, from the feature pyramid::

    feature_maps    pyramid -> project all -> upsample all -> fuse (B, C, H/4, W/4) -> pick n units
    adapter         pyramid -> pick the neighbours of n units -> project -> fuse (B, C, n)

:data:`ADAPTERS` lists the networks that have one by their exact class, because an adapter repeats
the computation of ``feature_maps`` of that class. For all others, subclasses too, the units are
taken from ``feature_maps``. Both ways give the same numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from segformer_pl.models.decode_head import AllMLPHead
from segformer_pl.models.segformer import SegFormer
from segformer_pl.models.tokens import to_tokens

# Grid (h, w) of a map -> rows and columns of the n units wanted of it.
ChooseUnits = Callable[[tuple[int, int]], tuple[Sequence[int], Sequence[int]]]

# (network in evaluation mode, images (B, C, H, W), choice) -> names of feature_maps -> (B, C_i, n).
# The network is typed as Any; its class is the key in ADAPTERS.
UnitAdapter = Callable[[Any, Tensor, ChooseUnits], dict[str, Tensor]]


def segformer_units(network: SegFormer, images: Tensor, choose: ChooseUnits) -> dict[str, Tensor]:
    """Return single units of :meth:`SegFormer.feature_maps`."""
    features = network.encoder(images)
    units = {}
    for i, feature in enumerate(features, start=1):
        rows, columns = choose((feature.shape[2], feature.shape[3]))
        units[f"stage{i}"] = to_tokens(feature)[:, rows, columns].transpose(1, 2)
    rows, columns = choose((features[0].shape[2], features[0].shape[3]))
    return units | {"head": fused_units(network.head, features, rows, columns)}


def fused_units(
    head: AllMLPHead, features: Sequence[Tensor], rows: Sequence[int], columns: Sequence[int]
) -> Tensor:
    """Return ``head.fuse_features(features)[:, :, rows, columns]`` without computing the map.

    A unit of the fused map at stride 4 depends on four units of every coarser stage, the ones that
    bilinear upsampling interpolates::

        left    right
          +-------+   top        `u` lies `down` of the way from top to bottom
          |   u   |              and `along` of the way from left to right
          +-------+   bottom

    Args:
        head: The head, in evaluation mode, in which its BatchNorm treats every unit by itself.
        features: Feature pyramid, (B, C_i, H_i, W_i) each, the finest first.
        rows: Rows of the n units.
        columns: Columns of the n units.

    Returns:
        (B, C, n).
    """
    height, width = features[0].shape[2:]
    weights, bias = head.folded_projections()
    total = bias
    for index, weight in zip(head.in_indices, weights):
        tokens = to_tokens(features[index])
        top, bottom, down = bilinear_neighbours(rows, height, tokens.shape[1], tokens)
        left, right, along = bilinear_neighbours(columns, width, tokens.shape[2], tokens)
        above = tokens[:, top, left] * (1 - along) + tokens[:, top, right] * along
        below = tokens[:, bottom, left] * (1 - along) + tokens[:, bottom, right] * along
        units = above * (1 - down) + below * down  # (B, n, C_i)
        total = total + F.linear(units, weight)
    return F.relu(head.bn(total.transpose(1, 2)[..., None]))[..., 0]


def bilinear_neighbours(
    positions: Sequence[int], fine: int, coarse: int, like: Tensor
) -> tuple[list[int], list[int], Tensor]:
    """Return what bilinear upsampling along one axis interpolates, corners not aligned.

    Upsampling 2 values to 8 gives position 3 of the fine axis the source coordinate
    (3 + 0.5) * 2 / 8 - 0.5 = 0.375: 0.625 of value 0 and 0.375 of value 1.

    Args:
        positions: The n positions on the fine axis.
        fine: Length of the fine axis.
        coarse: Length of the coarse axis.
        like: Tensor whose device and precision the weights have.

    Returns:
        The first and the second neighbour of each position, and the weight (n, 1) of the second.
    """
    source = [max((position + 0.5) * coarse / fine - 0.5, 0.0) for position in positions]
    first = [min(int(coordinate), coarse - 1) for coordinate in source]
    second = [min(index + 1, coarse - 1) for index in first]
    return first, second, like.new_tensor([s - f for s, f in zip(source, first)])[:, None]


ADAPTERS: Mapping[type[nn.Module], UnitAdapter] = {SegFormer: segformer_units}


def adapter_for(model: nn.Module) -> UnitAdapter | None:
    """Return the adapter of a network, or None if it has none."""
    return ADAPTERS.get(type(model))
