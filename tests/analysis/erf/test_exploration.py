"""Receptive fields of many units: their numbers, and how they are stored."""

import zlib

import numpy as np
import pytest
import torch
from torch import nn

from segformer_pl.analysis.erf import Grid, effective_receptive_field, exploration, explore
from segformer_pl.analysis.erf.exploration import DECADES, block_means, quantize
from segformer_pl.errors import UserError
from segformer_pl.models import MixTransformer, SegFormer
from segformer_pl.normalization import Normalization


@pytest.fixture(scope="module")
def network(randomize):
    encoder = MixTransformer(embed_dims=[4, 8, 8, 16], depths=[1] * 4, num_heads=[1, 2, 2, 4])
    network = SegFormer(encoder=encoder, decoder_dim=16, num_classes=3)
    randomize(network)
    return network.double().eval()


@pytest.fixture(scope="module")
def image():
    return torch.rand(3, 65, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def relative(values):
    """The share of the largest value that bytes stand for."""
    return np.where(values > 0, 10.0 ** (-DECADES * (255 - values.astype(float)) / 254), 0)


@pytest.mark.parametrize("gradient", ["abs", "relu"])
def test_every_unit_is_that_of_the_effective_receptive_field(network, image, gradient):
    normalize = Normalization()
    settings = {"reduction": "l1", "gradient": gradient, "preprocess": normalize}
    fields = explore(network, image, grid=Grid(2, 3), **settings)
    assert [layer.name for layer in fields.layers] == [
        *("stage1", "stage2", "stage3", "stage4", "head")
    ]
    pixels = [(row, column) for row in fields.rows for column in fields.columns]
    assert pixels == [(16, 16), (16, 48), (16, 80), (48, 16), (48, 48), (48, 80)]
    for index, pixel in enumerate(pixels):
        expected = effective_receptive_field(network, image[None], units=[pixel], **settings)
        for layer in fields.layers:
            one = expected[layer.name]
            assert layer.positions[index] == one.position
            assert layer.grid == one.grid
            assert layer.radius[index] == pytest.approx(one.radius(0.5), rel=1e-9)
            assert layer.share[index] == pytest.approx(one.center_share(16), rel=1e-9)
            means = block_means(one.mean, layer.block)
            stored, wanted = relative(layer.values[index]), means / means.max()
            shown = wanted > 1.02 * 10**-DECADES
            np.testing.assert_allclose(stored[shown], wanted[shown], rtol=0.0138)  # half a step
            assert (stored[~shown] <= 1.03 * 10**-DECADES).all()


def test_blocks_at_the_border_are_smaller():
    field = np.arange(15, dtype=np.float64).reshape(3, 5)
    means = [[3, 5, 6.5], [10.5, 12.5, 14]]
    np.testing.assert_array_equal(block_means(field, 2), means)


def test_bytes_are_on_a_logarithmic_scale():
    field = np.array([[1.0, 10**-1.5, 1e-3, 1e-4, 0.0]])
    assert quantize(7 * field).tolist() == [[255, 128, 1, 0, 0]]
    assert not quantize(np.zeros((2, 2))).any()


class Noise(nn.Module):
    """A narrow layer, one whose units depend on every pixel by another weight, and one on none."""

    def __init__(self, height, width):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.rand(height, width, generator=generator) + 0.01)

    def feature_maps(self, images):
        total = (images * self.weight).sum((2, 3), keepdim=True)
        return {"narrow": images, "wide": images + total, "dead": images * 0}


def test_a_layer_is_stored_as_finely_as_it_fits(monkeypatch):
    monkeypatch.setattr(exploration, "LAYER_BYTES", 2_000)
    network, image = Noise(32, 32), torch.rand(3, 32, 32)
    narrow, wide, dead = explore(network, image, grid=Grid(4, 4)).layers
    assert narrow.block == dead.block == 1
    assert wide.block > 1
    assert len(zlib.compress(wide.values.tobytes())) <= 2_000
    assert narrow.values.shape == (16, 32, 32)
    assert wide.values.shape == (16, 32 // wide.block, 32 // wide.block)
    assert (narrow.radius == 0).all()
    assert (narrow.share == 1).all()
    # A unit that no pixel influences has no radius, and does not keep the others from being shown.
    assert np.isnan(dead.radius).all()
    assert not dead.values.any()


def test_the_grid_follows_the_image():
    narrow = explore(Noise(4, 16), torch.rand(3, 4, 16), layers=["narrow"])
    assert narrow.size == (4, 16)
    assert (len(narrow.rows), len(narrow.columns)) == (2, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.rand(2, 3, 16, 16)}, "give one image"),
        ({"grid": Grid(17, 1)}, "has no such grid"),
        ({"gradient": "signed"}, "a signed map has no extent"),
        ({"reduction": "mean"}, "give one of relu"),
        ({"layers": ["stage1"]}, "no layer 'stage1'"),
        ({"image": torch.full((3, 16, 16), torch.nan)}, "not finite"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(UserError, match=message):
        explore(**{"model": Noise(16, 16), "image": torch.rand(3, 16, 16)} | change)
