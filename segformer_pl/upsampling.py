"""Bilinear upsampling in bands of rows, with the classes last: what the loss and inference share.

At 150 classes the logits of one 512x512 picture take 157 MB, and training would hold them three
times over. Bilinear upsampling is a product with one small matrix from each side, ``rows @ map @
columns^T``, so any band of output rows can be had from the few input rows below it, used, and
dropped. The transposed product is the exact gradient. With the classes last, softmax runs along
memory.

Shapes: a map is (B, h, w, C), the output (B, H, W, C).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements of a band: large enough to outweigh the calls, small enough for the cache (CPU).
BAND_ELEMENTS = {"cpu": 1_300_000, "cuda": 1 << 25}
BLOCK = 64  # output columns that are computed together, from the few input columns below them


def bilinear_taps(size_in: int, size_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two input positions that each output position is made of, and the second one's share.

    Of one axis of ``F.interpolate(mode="bilinear", align_corners=False)``; three times (size_out,).
    """
    position = (torch.arange(size_out, dtype=torch.float64) + 0.5) * (size_in / size_out) - 0.5
    position = position.clamp(min=0)
    first = position.floor().long().clamp(max=size_in - 1)
    second = (first + 1).clamp(max=size_in - 1)
    return first, second, position - first


def bilinear_matrix(
    size_in: int, size_out: int, rows: slice = slice(None), columns: slice = slice(None)
) -> Tensor:
    """One axis of ``F.interpolate(mode="bilinear", align_corners=False)``.

    Args:
        size_in, size_out: Lengths of the axis.
        rows, columns: The part of the matrix that is wanted; by default all of it.

    Returns:
        (size_out, size_in) float64, or the part; every whole row sums to 1.
    """
    first, second, share = (taps[rows] for taps in bilinear_taps(size_in, size_out))
    begin, end, _ = columns.indices(size_in)
    matrix = torch.zeros(len(share), end - begin, dtype=torch.float64)
    for column, weight in ((first, 1 - share), (second, share)):
        out = ((column >= begin) & (column < end)).nonzero().ravel()
        matrix[out, column[out] - begin] += weight[out]
    return matrix


def bands(
    batch: int, height: int, width: int, channels: int, device: str
) -> Iterator[tuple[slice, slice]]:
    """Cut (batch, height, width, channels) into bands that fit the cache.

    Yields:
        ``(images, rows)``, two slices; several whole pictures where they are small.
    """
    budget = BAND_ELEMENTS.get(device, BAND_ELEMENTS["cuda"])
    num_rows = min(max(budget // (width * channels), 1), height)
    num_images = max(budget // (height * width * channels), 1)
    for first in range(0, batch, num_images):
        for top in range(0, height, num_rows):
            yield (
                slice(first, min(first + num_images, batch)),
                slice(top, min(top + num_rows, height)),
            )


class SeparableMap:
    """``rows @ map @ columns^T`` of class-last maps, band by band, and its transpose.

    Args:
        rows: (H, h), how output rows follow from input rows; banded, such as
            :func:`bilinear_matrix` or a product of such.
        columns: (W, w), likewise.
        like: Gives dtype and device.
    """

    def __init__(self, rows: Tensor, columns: Tensor, like: Tensor) -> None:
        self.width, self.num_columns = columns.shape
        self.rows = rows.to(like)
        self.first_row, self.past_row = (ends.tolist() for ends in _support(rows))
        first, past = _support(columns)
        starts = torch.stack([block.min() for block in first.split(BLOCK)])
        ends = torch.stack([block.max() for block in past.split(BLOCK)])
        depth = int((ends - starts).max())
        starts = starts.clamp(max=self.num_columns - depth)
        taken = starts[:, None] + torch.arange(depth)  # input columns below each block
        padded = columns.new_zeros(len(starts) * BLOCK, self.num_columns)
        padded[: self.width] = columns
        blocks = padded.view(len(starts), BLOCK, -1)
        self.blocks = blocks.gather(2, taken[:, None].expand(-1, BLOCK, -1)).to(like)
        self.taken = taken.ravel().to(like.device)

    def band(self, maps: Tensor, rows: slice) -> Tensor:
        """(B, h, w, C) -> output rows (B, R, W, C), a new tensor."""
        weights, below = self._rows_below(rows)
        narrow = torch.matmul(weights, maps[:, below].flatten(2))  # (B, R, w * C)
        narrow = narrow.unflatten(2, (self.num_columns, -1)).index_select(2, self.taken)
        wide = torch.matmul(self.blocks, narrow.unflatten(2, (len(self.blocks), -1)))
        return wide.flatten(2, 3)[:, :, : self.width]

    def add_transposed(self, band: Tensor, rows: slice, total: Tensor) -> None:
        """Add the transposed product of output rows (B, R, W, C) to ``total`` (B, h, w, C)."""
        weights, below = self._rows_below(rows)
        missing = len(self.blocks) * BLOCK - self.width
        padded = F.pad(band, (0, 0, 0, missing)) if missing else band
        wide = padded.unflatten(2, (len(self.blocks), BLOCK))
        taken = torch.matmul(self.blocks.transpose(1, 2), wide).flatten(2, 3)
        narrow = band.new_zeros(*band.shape[:2], self.num_columns, band.shape[3])
        narrow.index_add_(2, self.taken, taken)
        added = torch.matmul(weights.T, narrow.flatten(2))
        total[:, below] += added.unflatten(2, (self.num_columns, -1))

    def _rows_below(self, rows: slice) -> tuple[Tensor, slice]:
        below = slice(min(self.first_row[rows]), max(self.past_row[rows]))
        return self.rows[rows, below], below


def _support(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """First column that is not zero and the one past the last, of every row."""
    used = (matrix != 0).int()
    return used.argmax(dim=1), matrix.shape[1] - used.flip(1).argmax(dim=1)
