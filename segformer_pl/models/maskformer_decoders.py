"""The two decoders of MaskFormer: a pixel decoder, and a transformer decoder of learned queries.

Symbols: B images, C channels (``dim``), Q queries, L layers, (H_i, W_i) the size of the encoder's
i-th map, N pixels of the coarsest one.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32  # of every GroupNorm


class PixelDecoder(nn.Module):
    """Feature pyramid network, whose output has an embedding for every pixel.

    From the coarsest stage on, each map is upsampled to the next finer one (nearest neighbours),
    added to its projection and convolved. Every convolution but the last is followed by GroupNorm.

    Shapes:
        input   list of (B, C_i, H_i, W_i), the encoder's feature pyramid
        output  (B, dim, H_1, W_1)

    Args:
        in_channels: Channels C_i of every feature map of the encoder.
        dim: Channels of the decoder.
    """

    def __init__(self, in_channels: Sequence[int], dim: int) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.laterals = nn.ModuleList(_conv_norm(channels, dim, 1) for channels in finer)
        self.fusions = nn.ModuleList(
            nn.Sequential(*_conv_norm(channels, dim, 3), nn.ReLU())
            for channels in (*[dim] * len(finer), coarsest)
        )
        self.embedding = nn.Conv2d(dim, dim, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _init_convolution(module)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return embeddings (B, dim, H_1, W_1) of a feature pyramid of (B, C_i, H_i, W_i)."""
        *finer, coarsest = features
        fused = self.fusions[-1](coarsest)
        for index in reversed(range(len(finer))):
            upsampled = F.interpolate(fused, size=finer[index].shape[2:], mode="nearest")
            fused = self.fusions[index](self.laterals[index](finer[index]) + upsampled)
        return self.embedding(fused)


class DecoderLayer(nn.Module):
    """A layer of the transformer decoder: self-attention, cross-attention and MLP, post-norm.

    Position embeddings are added to the queries and keys of the attentions, not to their values.

    Args:
        dim: Channels C.
        num_heads: Number of attention heads.
        mlp_dim: Hidden channels of the MLP.
        dropout: Dropout rate of attention weights, of the MLP's hidden units and of the branches.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, query_pos: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the queries (B, Q, C) after this layer.

        Args:
            x: Queries, (B, Q, C).
            query_pos: Position embedding of the queries, (Q, C).
            keys: Pixels with their position embedding, (B, N, C).
            values: Pixels, (B, N, C).
        """
        positioned = x + query_pos
        attended = self.self_attn(positioned, positioned, x, need_weights=False)[0]
        x = self.norm1(x + self.dropout(attended))
        attended = self.cross_attn(x + query_pos, keys, values, need_weights=False)[0]
        x = self.norm2(x + self.dropout(attended))
        hidden = self.dropout(F.relu(self.fc1(x)))
        return self.norm3(x + self.dropout(self.fc2(hidden)))


class TransformerDecoder(nn.Module):
    """Transformer decoder of DETR (Carion et al. 2020), without an encoder before it.

    The queries start as zeros and differ by their learned position embedding alone.

    Shapes:
        input   (B, C_n, H_n, W_n), the encoder's coarsest map
        output  (L, B, Q, dim), the queries after every layer, normalised

    Args:
        in_channels: Channels C_n of the encoder's coarsest map.
        num_queries: Number of queries Q.
        dim: Channels.
        num_layers: Number of layers L.
        num_heads: Number of attention heads.
        mlp_dim: Hidden channels of the MLPs.
        dropout: Dropout rate.
    """

    def __init__(
        self,
        in_channels: int,
        num_queries: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, dim, 1)
        self.query_pos = nn.Embedding(num_queries, dim)
        self.layers = nn.ModuleList(
            DecoderLayer(dim, num_heads, mlp_dim, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)  # shared by the outputs of all layers
        _init_convolution(self.projection)
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, feature: Tensor) -> Tensor:
        """Return the normalised queries (L, B, Q, dim) after every layer."""
        projected = self.projection(feature)
        values = projected.flatten(2).transpose(1, 2)  # (B, N, C), N = H_n * W_n
        _, dim, height, width = projected.shape
        keys = values + sine_positions(height, width, dim, like=values)
        query_pos = self.query_pos.weight
        x = query_pos.new_zeros(feature.shape[0], *query_pos.shape)
        after_layers = []
        for layer in self.layers:
            x = layer(x, query_pos, keys, values)
            after_layers.append(self.norm(x))
        return torch.stack(after_layers)


def sine_positions(height: int, width: int, dim: int, like: Tensor) -> Tensor:
    """Return the sine position embedding of DETR for a map, (height * width, dim).

    The first half of the channels encodes the row, the second half the column. Positions are
    normalised to 2 pi at the last row or column; sines and cosines alternate.

    Args:
        height: Number of rows.
        width: Number of columns.
        dim: Number of channels, a multiple of 4.
        like: Tensor whose device and dtype the result has. It is computed in at least float32.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    pairs = torch.arange(dim // 4, dtype=dtype, device=like.device)
    frequencies = 10_000 ** (-4 * pairs / dim)
    axes = []
    for length in (height, width):
        positions = torch.arange(1, length + 1, dtype=dtype, device=like.device)
        angles = 2 * math.pi * positions[:, None] / (length + 1e-6) * frequencies
        axes.append(torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1))
    rows = axes[0][:, None].expand(-1, width, -1)
    columns = axes[1][None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).to(like.dtype)


def _conv_norm(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.GroupNorm(GROUPS, out_channels),
    )


def _init_convolution(convolution: nn.Conv2d) -> None:
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
