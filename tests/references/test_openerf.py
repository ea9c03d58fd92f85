"""Comparison of the definition ``openerf`` with the package of that name (0.6.1)."""

import importlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from segformer_pl.analysis.erf.definitions import (
    DEFINITIONS,
    Definition,
    Number,
    gradient_maps,
    weighted_maps,
)

RADII = (5, 10, 20)
SIDE = 64


@pytest.fixture(scope="module")
def openerf():
    return pytest.importorskip("openerf", reason="`make test-references` installs it")


@pytest.fixture
def network(randomize):
    """Convolutions of stride 4 with BatchNorm; openerf reads `pretrained_cfg` like timm's."""
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 7, 4, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 12, 5, padding=2)
    )
    layers.pretrained_cfg = {
        **{"input_size": (3, SIDE, SIDE), "crop_pct": 1.0, "interpolation": "bicubic"},
        **{"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)},
    }
    return randomize(layers).eval()


def measure(network, images, definition=DEFINITIONS["openerf"]):
    """Return the mean map (H, W) and the position of the unit."""
    batches = [{"image": images, "id": [str(index) for index in range(len(images))]}]
    ((_, layers),) = gradient_maps(network, batches, ["3"], {"": definition})
    maps = layers["3"].maps[""].numpy()
    weights = np.full((1, len(maps)), 1 / len(maps))
    return weighted_maps(maps, weights, definition)[0], layers["3"].position


def reference(openerf, network, images):
    """The package's map in float64: its gradient of each image, summed and divided by the sum."""
    core = importlib.import_module("openerf.erf")
    maps = [
        core._compute_positive_input_gradients_from_layer(
            network, image[None].clone().requires_grad_(), network[3], "3"
        )
        for image in images
    ]
    return core._normalize_erf_map(torch.stack(maps).sum(0).numpy())


def test_map_and_radial_mass(openerf, network):
    images = torch.randn(4, 3, SIDE, SIDE, dtype=torch.float64)
    expected = reference(openerf, network, images)
    ours, position = measure(network, images)
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-13 * expected.max())
    mass = openerf.compute_erf_metrics(expected, RADII)["radial_cumulative_mass"]
    assert 0 < mass["5"] < mass["20"]
    for radius in RADII:
        number = Number("outside", radius, "image").of(ours, position)
        assert number == pytest.approx(1 - mass[str(radius)], rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("fault", [
    Definition("relu", "relu", "mean then part", "mean"),
    Definition("l1", "relu", "mean then part", "mean"),
    Definition("mean", "abs", "mean then part", "mean"),
    Definition("mean", "square", "mean then part", "mean"),
    Definition("mean", "relu", "part then sum", "mean"),
    Definition("mean", "relu", "mean then part", "never"),
    Definition("mean", "relu", "mean then part", "every image"),
], ids=str)  # fmt: skip
def test_faults_are_noticed(openerf, network, fault):
    # Images of different contrast, so that their weight matters.
    images = torch.randn(4, 3, SIDE, SIDE).double() * torch.tensor([0.1, 1, 3, 9]).view(4, 1, 1, 1)
    expected = reference(openerf, network, images)
    ours, _ = measure(network, images, fault)
    assert np.abs(ours - expected).sum() > 1e-3


def test_the_whole_package(openerf, network, tmp_path):
    """Files in, map out, in the package's float32."""
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    for index, image in enumerate(stored):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    result = openerf.compute_erf(
        network.float(), image_dir=tmp_path, target_layer="3", device="cpu", show_progress=False
    )
    config = network.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = (torch.from_numpy(stored).permute(0, 3, 1, 2) / 255 - mean) / std
    ours, _ = measure(network, images)
    assert result.num_images == 3
    np.testing.assert_allclose(ours, result.erf_map, rtol=1e-3, atol=1e-5 * ours.max())
