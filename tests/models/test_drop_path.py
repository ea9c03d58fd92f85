"""Stochastic depth, compared with timm's."""

import pytest
import timm.layers
import torch

from segformer_pl.models.drop_path import DropPath


@pytest.mark.parametrize("shape", [(64, 3, 2), (64, 2, 2, 3)])
def test_the_random_numbers_are_those_of_timm(shape):
    branch = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    results = []
    for layer in (DropPath(0.3), timm.layers.DropPath(0.3)):
        torch.manual_seed(5)
        result = layer(branch)
        (gradient,) = torch.autograd.grad(result.square().sum(), branch)
        results.append((result, gradient))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    dropped = results[0][0].flatten(1).eq(0).all(1)
    assert 0 < dropped.sum() < 64


def test_nothing_is_dropped_in_evaluation_or_at_rate_zero():
    branch = torch.randn(8, 2)
    assert DropPath(0.5).eval()(branch) is branch
    assert DropPath(0.0)(branch) is branch


def test_everything_is_dropped_at_rate_one():
    assert not DropPath(1.0)(torch.randn(8, 2)).any()
