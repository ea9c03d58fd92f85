import pytest
import torch
from torch.nn import functional as F

from segformer_pl.upsampling import SeparableMap, bilinear_matrix


@pytest.mark.parametrize("size", [(76, 108), (65, 97), (19, 27), (10, 13), (33, 200), (1, 1)])
def test_bands_and_their_transpose_equal_interpolate_and_its_gradient(size):
    maps = torch.randn(2, 19, 27, 5, dtype=torch.float64, requires_grad=True)
    first = maps.permute(0, 3, 1, 2)
    expected = F.interpolate(first, size=size, mode="bilinear", align_corners=False)
    expected = expected.permute(0, 2, 3, 1)
    grad_output = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, maps, grad_output)

    matrices = (bilinear_matrix(small, large) for small, large in zip((19, 27), size))
    upsampling = SeparableMap(*matrices, like=maps)
    total = torch.zeros_like(maps)
    parts = []
    for top in range(0, size[0], 7):
        rows = slice(top, min(top + 7, size[0]))
        parts.append(upsampling.band(maps.detach(), rows))
        upsampling.add_transposed(grad_output[:, rows], rows, total)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(total, gradient, rtol=0, atol=1e-13)
