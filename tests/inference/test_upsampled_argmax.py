"""Classes of upsampled maps equal those of ``F.interpolate`` and ``argmax``."""

import pytest
import torch
from torch.nn import functional as F

from segformer_pl import bands
from segformer_pl.inference import upsampled_argmax as module
from segformer_pl.inference.upsampled_argmax import upsampled_argmax

# Cells, size that they are upsampled to, size of the result
SIZES = {
    "integer factor": ((7, 5), (28, 20), (28, 20)),
    "odd integer factor": ((4, 6), (12, 18), (12, 18)),
    "one factor in each direction": ((6, 5), (12, 40), (12, 40)),
    "cut off": ((7, 5), (28, 20), (25, 18)),
    "no integer": ((7, 5), (26, 21), (26, 21)),
    "one integer": ((7, 5), (28, 21), (28, 21)),
    "smaller": ((9, 8), (5, 3), (5, 3)),
    "the same": ((6, 4), (6, 4), (6, 4)),
    "one cell": ((1, 1), (4, 6), (4, 6)),
    "one row": ((1, 5), (4, 20), (4, 20)),
}


def expected(maps, full_size, size):
    full = F.interpolate(maps.permute(0, 3, 1, 2), full_size, mode="bilinear")
    return full.argmax(1)[:, : size[0], : size[1]]


def smooth_maps(height, width, num_classes, batch=2):
    """Class maps with regions of several cells, as from a trained network."""
    noise = torch.randn(batch, num_classes, height + 2, width + 2, dtype=torch.float64)
    return F.avg_pool2d(noise, 3, stride=1).permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("elements", [1, 200, 1_300_000])
@pytest.mark.parametrize("case", SIZES)
def test_classes_equal_those_of_upsampled_maps(case, elements, monkeypatch):
    monkeypatch.setitem(bands.BAND_ELEMENTS, "cpu", elements)
    cells, full_size, size = SIZES[case]
    for maps in (smooth_maps(*cells, 5), torch.randn(2, *cells, 5, dtype=torch.float64)):
        result = upsampled_argmax(maps, full_size, size, torch.uint8)
        assert result.dtype == torch.uint8
        assert torch.equal(result.long(), expected(maps, full_size, size))


def test_a_class_between_cells_of_others_is_found():
    """It is the most likely in no cell, but in the middle of a square."""
    maps = torch.tensor([[5.0, 0, 4], [0, 5, 4]], dtype=torch.float64).view(1, 1, 2, 3)
    result = upsampled_argmax(maps, (4, 8), (4, 8), torch.int64)
    assert result[0, 0].tolist() == [0, 0, 0, 2, 2, 1, 1, 1]


def test_squares_between_cells_of_one_class_are_not_upsampled(monkeypatch):
    maps = torch.zeros(1, 8, 8, 3, dtype=torch.float64)
    maps[:, :, :4, 0] = maps[:, :, 4:, 1] = 1
    squares = []
    upsample = module._upsample

    def count(values, *arguments):
        squares.append(values.shape[1])
        return upsample(values, *arguments)

    monkeypatch.setattr(module, "_upsample", count)
    result = upsampled_argmax(maps, (32, 32), (32, 32), torch.uint8)
    assert sum(squares) == 9  # one column between cells 3 and 4, with the outer squares
    assert torch.equal(result.long(), expected(maps, (32, 32), (32, 32)))


def test_equal_values_give_the_first_class():
    maps = torch.zeros(1, 3, 3, 4)
    assert not upsampled_argmax(maps, (12, 12), (12, 12), torch.int64).any()
