"""The transformer block of MiT (Xie et al. 2021, Sec. 3.1): efficient self-attention and Mix-FFN.

Symbols and the layout of tokens, (B, H, W, C), are those of :mod:`~segformer_pl.models.mit`.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segformer_pl.bands import map_bands
from segformer_pl.errors import UserError
from segformer_pl.models.drop_path import DropPath
from segformer_pl.models.folding import fold_layer_norm
from segformer_pl.models.mit_arguments import KvBorder
from segformer_pl.models.query_merging import merge_queries, num_merged_squares, take_rows
from segformer_pl.models.tokens import to_channels_first, to_tokens


class NormEps(NamedTuple):
    """The two LayerNorm epsilons of an encoder.

    The released weights were trained with 1e-6 in block and stage norms but with torch's default
    of 1e-5 in the norms after a convolution (patch embedding, sequence reduction).
    """

    norm: float = 1e-6
    conv_norm: float = 1e-5


class EfficientSelfAttention(nn.Module):
    """Multi-head self-attention whose keys and values come from a reduced grid (Sec. 3.1, eq. 2).

    The paper describes the reduction as reshape and Linear. Its code, followed here, uses a
    convolution with kernel and stride r and no padding. The key/value grid is then floor(H/r) x
    floor(W/r), and if r does not divide the grid, up to r - 1 rows and columns of tokens at the
    border give no keys and values. ``kv_border="keep"`` uses them: an incomplete square of tokens
    is scaled up to a complete one, and the grid is ceil(H/r) x ceil(W/r). Seven tokens, r = 4::

        tokens           0 1 2 3 4 5 6
        "drop"           =======          1 key
        "keep"           ======= =====    2 keys, the second from 3 tokens times 4/3

    Shapes: (B, H, W, C) -> (B, H, W, C).

    Args:
        dim: Channels C.
        num_heads: Number of attention heads.
        sr_ratio: Reduction r, the side of the square of tokens merged into one key and value.
        norm_eps: Epsilon of the LayerNorm after the reduction.
        kv_border: ``"drop"`` or ``"keep"``.
        merged_queries: Share of the 2x2 squares of tokens whose queries are merged, see
            :mod:`~segformer_pl.models.query_merging`. It is rounded to thousandths.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        norm_eps: float,
        kv_border: KvBorder = "drop",
        merged_queries: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.kv_border = kv_border
        self.merged_per_mille = round(1000 * merged_queries)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)  # output rows: keys of all heads, then values
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend from tokens (B, H, W, C) to the reduced grid; the result has the same shape.

        Raises:
            UserError: ``sr_ratio`` is larger than the token grid, and the border is dropped.
        """
        reduced = self.reduce(tokens)
        queries = self.q(tokens)
        if not self.merged_per_mille:
            return self._attend(queries.flatten(1, 2), reduced).view_as(tokens)
        merged, query_of = merge_queries(queries, self.merged_per_mille)
        return take_rows(self._attend(merged, reduced), query_of).view_as(tokens)

    def _attend(self, queries: Tensor, reduced: Tensor) -> Tensor:
        """Attend from queries (B, M, C) to the reduced grid; the result has the same shape."""
        batch, num_queries, dim = queries.shape
        query = queries.view(batch, num_queries, self.num_heads, -1).transpose(1, 2)
        key, value = (
            self.kv(reduced)
            .view(batch, -1, 2, self.num_heads, dim // self.num_heads)
            .permute(2, 0, 3, 1, 4)
        )  # each (B, heads, N / R, C / heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, num_queries, dim))

    def num_queries(self, height: int, width: int) -> int:
        """Return the number of queries for a token grid."""
        return height * width - 3 * num_merged_squares(height, width, self.merged_per_mille)

    def reduce(self, tokens: Tensor) -> Tensor:
        """Reduce tokens (B, H, W, C) to (B, H', W', C), from which keys and values are computed.

        H' is H / r, rounded down, or rounded up if the border is kept.

        Raises:
            UserError: ``sr_ratio`` is larger than the token grid, and the border is dropped.
        """
        if self.sr_ratio == 1:
            return tokens
        height, width = tokens.shape[1:3]
        missing = (-height % self.sr_ratio, -width % self.sr_ratio)
        # An exported graph serves all sizes, so it must not depend on whether tokens are missing.
        # Without missing tokens, both ways have the same result.
        if self.kv_border == "keep" and (torch.compiler.is_exporting() or any(missing)):
            return self.norm(to_tokens(self._reduce_to_the_border(tokens, *missing)))
        if min(height, width) < self.sr_ratio:
            raise UserError(
                f"sr_ratio {self.sr_ratio} is larger than the {height}x{width} token grid that "
                "it reduces; use larger images (or windows, or scales), a smaller sr_ratio in this "
                "stage, or kv_border keep"
            )
        return self.norm(to_tokens(self.sr(to_channels_first(tokens))))

    def _reduce_to_the_border(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Reduce a grid that lacks ``rows`` and ``columns`` of tokens to a multiple of r."""
        padded = F.pad(to_channels_first(tokens), (0, columns, 0, rows))
        # Padded zeros do not change the sums over tokens. Scale those of incomplete squares up, but
        # not the bias, which is not summed over tokens.
        sums = F.conv2d(padded, self.sr.weight, stride=self.sr_ratio)
        scale = sums.new_ones(sums.shape[2:])
        scale[-1] *= self.sr_ratio / (self.sr_ratio - rows)
        scale[:, -1] *= self.sr_ratio / (self.sr_ratio - columns)
        bias = cast(Tensor, self.sr.bias)
        return sums * scale + bias[:, None, None]


class MixFFN(nn.Module):
    """Feed-forward network with a zero-padded 3x3 depthwise convolution (Sec. 3.1, eq. 3).

    The zero padding provides positional information and replaces a positional encoding. Without
    ``depthwise`` this is the plain transformer feed-forward network.

    Shapes: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, hidden_dim: int, depthwise: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = (
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
            if depthwise
            else nn.Identity()
        )
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform tokens (B, H, W, C); the result has the same shape."""
        hidden = to_channels_first(self.fc1(tokens))
        return self.fc2(F.gelu(to_tokens(self.dwconv(hidden))))


class Block(nn.Module):
    """One attention and one Mix-FFN, each pre-normalised, residual and subject to drop path.

    Shapes: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: int,
        sr_ratio: int,
        depthwise: bool,
        drop_path_rate: float,
        eps: NormEps,
        kv_border: KvBorder = "drop",
        merged_queries: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps.norm)
        self.attn = EfficientSelfAttention(
            dim, num_heads, sr_ratio, eps.conv_norm, kv_border, merged_queries
        )
        self.norm2 = nn.LayerNorm(dim, eps=eps.norm)
        self.mlp = MixFFN(dim, mlp_ratio * dim, depthwise)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform tokens (B, H, W, C); the result has the same shape."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        if self.training:
            return self._feed_forward(tokens)
        hidden_dim = self.mlp.fc1.out_features
        return map_bands(self._feed_forward, tokens, widest=hidden_dim, halo=1)

    def _feed_forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))

    def fold(self) -> None:
        """Fold weights and biases of the LayerNorms into the layers that read them, in place."""
        attn = self.attn
        if attn.sr_ratio == 1:
            fold_layer_norm(self.norm1, attn.q, attn.kv)
        else:
            fold_layer_norm(attn.norm, attn.kv)
            # With "keep", sums over incomplete squares are scaled up, which a folded bias is not.
            if attn.kv_border == "drop":
                fold_layer_norm(self.norm1, attn.q, attn.sr)
        fold_layer_norm(self.norm2, self.mlp.fc1)
