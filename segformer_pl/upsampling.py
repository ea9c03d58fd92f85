"""Bilinear upsampling in bands of rows, shared by the training loss and inference.

At 150 classes the upsampled logits of one 512x512 image take 157 MB, and training would hold three
tensors of that size. But bilinear upsampling is a product with a small banded matrix on each side,
``rows @ map @ columns^T``, so a band of output rows depends on a few input rows only. It is
computed, used and dropped::

    input rows (h)            output rows (H = 4 h)
    +-----------+             +-------------------+
    | . . . . . |             |                   |
    | # # # # # |  --band-->  | ################# |   one band in memory at a time
    | # # # # # |             |                   |
    | . . . . . |             |                   |
    +-----------+             +-------------------+

The transposed product of a band is its exact contribution to the gradient. Maps have the classes in
the last dimension, so that softmax runs along contiguous memory.

Shapes: a map is (B, h, w, C), the output (B, H, W, C).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

COLUMN_BLOCK = 64  # output columns that are computed in one matrix product


def bilinear_taps(size_in: int, size_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two input positions that each output position interpolates between.

    They are those of one axis of ``F.interpolate(mode="bilinear", align_corners=False)``.

    Args:
        size_in: Input length of the axis.
        size_out: Output length of the axis.

    Returns:
        ``(first, second, weight)``, (size_out,) each: two int64 positions, and the float64 weight
        of the second; the first has the rest.
    """
    position = (torch.arange(size_out, dtype=torch.float64) + 0.5) * (size_in / size_out) - 0.5
    position = position.clamp(min=0)
    first = position.floor().long().clamp(max=size_in - 1)
    second = (first + 1).clamp(max=size_in - 1)
    return first, second, position - first


def bilinear_matrix(
    size_in: int, size_out: int, rows: slice = slice(None), columns: slice = slice(None)
) -> Tensor:
    """Return the matrix of ``F.interpolate(mode="bilinear", align_corners=False)`` for one axis.

    Args:
        size_in: Input length of the axis.
        size_out: Output length of the axis.
        rows: Output positions to build the matrix for. Default: all.
        columns: Input positions to build the matrix for. Default: all.

    Returns:
        (size_out, size_in) float64, or the selected part of it. Every row of the whole matrix sums
        to 1.
    """
    first, second, second_weight = (taps[rows] for taps in bilinear_taps(size_in, size_out))
    begin, end, _ = columns.indices(size_in)
    matrix = torch.zeros(len(second_weight), end - begin, dtype=torch.float64)
    for column, weight in ((first, 1 - second_weight), (second, second_weight)):
        out = ((column >= begin) & (column < end)).nonzero().ravel()
        matrix[out, column[out] - begin] += weight[out]
    return matrix


class SeparableMap:
    """Linear map ``rows @ map @ columns^T`` of class-last maps, in bands, and its transpose.

    Both matrices must be banded, such as :func:`bilinear_matrix` or products of such matrices.
    ``rows`` is applied to the input rows that a band depends on. ``columns`` is stored as dense
    blocks of ``COLUMN_BLOCK`` output columns by the input columns that they depend on.

    Args:
        rows: (H, h) matrix from input rows to output rows.
        columns: (W, w) matrix from input columns to output columns.
        like: Tensor whose dtype and device are used.
    """

    def __init__(self, rows: Tensor, columns: Tensor, like: Tensor) -> None:
        self.width, self.num_columns = columns.shape
        self.rows = rows.to(like)
        self.first_row, self.past_row = (ends.tolist() for ends in _support(rows))
        first, past = _support(columns)
        starts = torch.stack([block.min() for block in first.split(COLUMN_BLOCK)])
        ends = torch.stack([block.max() for block in past.split(COLUMN_BLOCK)])
        depth = int((ends - starts).max())
        starts = starts.clamp(max=self.num_columns - depth)
        inputs = starts[:, None] + torch.arange(depth)  # input columns of each block
        padded = columns.new_zeros(len(starts) * COLUMN_BLOCK, self.num_columns)
        padded[: self.width] = columns
        blocks = padded.view(len(starts), COLUMN_BLOCK, -1)
        self.blocks = blocks.gather(2, inputs[:, None].expand(-1, COLUMN_BLOCK, -1)).to(like)
        self.input_columns = inputs.ravel().to(like.device)

    def band(self, maps: Tensor, rows: slice) -> Tensor:
        """Compute a band of output rows.

        Args:
            maps: (B, h, w, C) input maps.
            rows: R output rows to compute.

        Returns:
            (B, R, W, C), a new tensor.
        """
        weights, input_rows = self._input_rows(rows)
        narrow = torch.matmul(weights, maps[:, input_rows].flatten(2))  # (B, R, w * C)
        narrow = narrow.unflatten(2, (self.num_columns, -1)).index_select(2, self.input_columns)
        wide = torch.matmul(self.blocks, narrow.unflatten(2, (len(self.blocks), -1)))
        return wide.flatten(2, 3)[:, :, : self.width]

    def add_transposed(self, band: Tensor, rows: slice, total: Tensor) -> None:
        """Add the transposed product of a band, in place.

        Args:
            band: (B, R, W, C) band of output rows.
            rows: The R output rows of the band.
            total: (B, h, w, C) sum to add to.
        """
        weights, input_rows = self._input_rows(rows)
        padding = len(self.blocks) * COLUMN_BLOCK - self.width
        padded = F.pad(band, (0, 0, 0, padding)) if padding else band
        wide = padded.unflatten(2, (len(self.blocks), COLUMN_BLOCK))
        columns = torch.matmul(self.blocks.transpose(1, 2), wide).flatten(2, 3)
        narrow = band.new_zeros(*band.shape[:2], self.num_columns, band.shape[3])
        narrow.index_add_(2, self.input_columns, columns)
        product = torch.matmul(weights.T, narrow.flatten(2))
        total[:, input_rows] += product.unflatten(2, (self.num_columns, -1))

    def _input_rows(self, rows: slice) -> tuple[Tensor, slice]:
        """Return the part of the row matrix for some output rows, and the input rows it needs."""
        input_rows = slice(min(self.first_row[rows]), max(self.past_row[rows]))
        return self.rows[rows, input_rows], input_rows


def _support(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first non-zero column of every row, and the column after its last.

    A row of zeros has the whole width.
    """
    nonzero = (matrix != 0).int()
    return nonzero.argmax(dim=1), matrix.shape[1] - nonzero.flip(1).argmax(dim=1)
