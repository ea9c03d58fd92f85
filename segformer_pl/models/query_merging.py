"""Merge similar queries of efficient self-attention, at equal weights.

Neighbouring tokens of a smooth area ask for nearly the same. The 2x2 squares of a token grid whose
queries differ least are merged: the mean of the four queries attends in their place, and all four
tokens get its result. A grid of 3 x 4 tokens, one of its two squares merged::

    queries            attend                    results
    a b c d            mean(a, b, e, f)          A A C D
    e f g h            c d g h                   A A G H
    i j k l            i j k l                   I J K L

This is the merging of queries by 2D neighbours of SegFormer++ (Kienzle et al. 2024, arXiv
2405.14467), which merges all squares. Here their share is an argument, and the queries themselves
determine which. Keys and values, the residual stream and Mix-FFN keep all tokens, and the weights
are those of the network that does not merge.
"""

import torch
from torch import Tensor


def num_merged_squares(height: int, width: int, per_mille: int) -> int:
    """Return the number of 2x2 squares that are merged, rounded down."""
    # In floating point, 0.29 of 100 squares are 28.999999999999996.
    return (height // 2) * (width // 2) * per_mille // 1000


def merge_queries(queries: Tensor, per_mille: int) -> tuple[Tensor, Tensor]:
    """Merge the 2x2 squares of queries that differ least, equally many in each image.

    The difference within a square is the sum of squared deviations from the mean, over all heads.
    An odd last row or column of the grid is not merged.

    Args:
        queries: Queries of a token grid, (B, H, W, C).
        per_mille: Share of the squares to merge, in thousandths.

    Returns:
        Queries (B, M, C), M = H W - 3 :func:`num_merged_squares`, those of merged squares first;
        and for each token the index of its query among them, (B, H W) int64.
    """
    batch, height, width, dim = queries.shape
    rows, columns = height // 2, width // 2
    num_merged = num_merged_squares(height, width, per_mille)

    squares = _squares(queries, 1)  # (B, rows, 2, columns, 2, C)
    means = squares.mean((2, 4), keepdim=True)
    deviations = (squares - means).square().sum((2, 4, 5))
    order = deviations.view(batch, rows * columns).argsort(dim=1)

    # All tokens of an image in the order of their squares, those of the border last.
    grid = torch.arange(height * width, device=queries.device).view(height, width)
    of_square = _squares(grid, 0).transpose(1, 2).reshape(rows * columns, 4)
    border = torch.cat([grid[: 2 * rows, 2 * columns :].flatten(), grid[2 * rows :].flatten()])
    tokens = torch.cat([of_square[order].flatten(1), border.expand(batch, -1)], dim=1)

    merged = take_rows(means.view(batch, rows * columns, dim), order[:, :num_merged])
    others = take_rows(queries.flatten(1, 2), tokens[:, 4 * num_merged :])

    position = torch.arange(height * width, device=queries.device)
    query_at = torch.where(position < 4 * num_merged, position // 4, position - 3 * num_merged)
    query_of = torch.empty_like(tokens).scatter_(1, tokens, query_at.expand(batch, -1))
    return torch.cat([merged, others], dim=1), query_of


def take_rows(tables: Tensor, indices: Tensor) -> Tensor:
    """Return the rows (B, M, C) of tables (B, N, C) at indices (B, M)."""
    batch, num_rows, dim = tables.shape
    # index_select copies whole rows, where gather would take an index for each element.
    first = num_rows * torch.arange(batch, device=tables.device)[:, None]
    rows = tables.flatten(0, 1).index_select(0, (first + indices).flatten())
    return rows.view(batch, indices.shape[1], dim)


def _squares(grid: Tensor, dim: int) -> Tensor:
    """View dimensions ``dim`` and ``dim + 1`` of a grid as (rows, 2, columns, 2)."""
    rows, columns = grid.shape[dim] // 2, grid.shape[dim + 1] // 2
    whole = grid.narrow(dim, 0, 2 * rows).narrow(dim + 1, 0, 2 * columns)
    return whole.unflatten(dim + 1, (columns, 2)).unflatten(dim, (rows, 2))
