"""Single units of a network against its whole feature maps, and the choice between both."""

import numpy as np
import pytest
import torch

from segformer_pl.analysis.erf import Grid, effective_receptive_field
from segformer_pl.analysis.erf.feature_extractor import FeatureExtractor
from segformer_pl.analysis.erf.head_units import (
    adapter_for,
    bilinear_neighbours,
    segformer_units,
)
from segformer_pl.models import segformer_b0
from segformer_pl.models.segformer import SegFormer


@pytest.mark.slow
@pytest.mark.parametrize("in_indices", [(0, 1, 2, 3), (1, 3), (3,)])
@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
def test_single_units_are_those_of_the_feature_maps(in_indices, size, randomize):
    """At the corners too, where bilinear upsampling has only one neighbour."""
    network = randomize(segformer_b0(5, in_indices=in_indices)).eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)

    def choose(grid):
        height, width = grid
        return [0, 0, height // 2, height - 1, 1], [0, width - 1, width // 2, width - 1, 1]

    with torch.no_grad():
        units = segformer_units(network, images, choose)
        maps = network.feature_maps(images)
    assert list(units) == list(maps)
    for name, feature in maps.items():
        rows, columns = choose(feature.shape[2:])
        torch.testing.assert_close(units[name], feature[:, :, rows, columns], rtol=1e-10, atol=0)


class Subclass(SegFormer):
    """A subclass has no adapter, because its feature maps can differ."""


@pytest.mark.slow
@pytest.mark.parametrize("units", ["center", [(0, 0), (63, 95)], Grid(2, 3)], ids=str)
def test_adapter_and_feature_maps_give_the_same_receptive_field(units, randomize):
    network = randomize(segformer_b0(5)).eval()
    general = randomize(segformer_b0(5)).eval()
    general.load_state_dict(network.state_dict())
    general.__class__ = Subclass
    assert adapter_for(network) is segformer_units
    assert adapter_for(general) is None
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    fast, slow = (
        effective_receptive_field(model, images, units=units) for model in (network, general)
    )
    assert list(fast.layers) == list(slow.layers) == list(network.feature_maps(images))
    for name, layer in slow.layers.items():
        scale = layer.mean.max()
        np.testing.assert_allclose(fast[name].mean, layer.mean, rtol=1e-9, atol=1e-13 * scale)
        assert fast[name].position == layer.position


def test_adapter_does_not_run_the_head(randomize, monkeypatch):
    network = randomize(segformer_b0(5)).eval()
    monkeypatch.setattr(network.head, "fuse_features", lambda features: pytest.fail("computed"))
    effective_receptive_field(network, torch.randn(1, 3, 64, 64, dtype=torch.float64))


def test_modules_and_output_do_not_use_the_adapter():
    network = segformer_b0(5)
    assert FeatureExtractor(network).adapter is segformer_units
    assert FeatureExtractor(network, ["head", "stage1"]).adapter is segformer_units
    for layers in (["output"], ["head", "encoder.stages.0"]):
        assert FeatureExtractor(network, layers).adapter is None
    assert adapter_for(torch.nn.Identity()) is None


@pytest.mark.parametrize(("fine", "coarse"), [(8, 2), (17, 9), (5, 5), (7, 1)])
def test_neighbours_are_those_of_bilinear_upsampling(fine, coarse):
    values = torch.randn(coarse, dtype=torch.float64)
    first, second, weight = bilinear_neighbours(range(fine), fine, coarse, values)
    interpolated = values[first] * (1 - weight[:, 0]) + values[second] * weight[:, 0]
    expected = torch.nn.functional.interpolate(
        values[None, None, None], size=(1, fine), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(interpolated, expected[0, 0, 0], rtol=1e-12, atol=1e-12)
