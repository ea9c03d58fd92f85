"""RepLKNet's published script (``erf/visualize_erf.py``, ``erf/analyze_erf.py``), step by step,
against the numbers that are called RepLKNet's here."""

import numpy as np
import pytest
import torch
from torch import nn

from segformer_pl.analysis.erf import Grid, effective_receptive_field
from segformer_pl.analysis.erf.backbones import TimmStages

pytestmark = pytest.mark.slow

SHARES = (0.2, 0.3, 0.5, 0.99)


def script(model, images):
    """Its map over the images, and its ratio by share (None where it returns no square)."""
    total = np.zeros(images.shape[2:])
    for image in images:
        samples = image[None].clone().requires_grad_()
        outputs = model(samples)
        middle = outputs[:, :, outputs.shape[2] // 2, outputs.shape[3] // 2]
        (gradient,) = torch.autograd.grad(middle.relu().sum(), samples)
        total += gradient.relu().sum((0, 1)).numpy()
    mean = total / len(images)
    logs = np.log10(mean + 1)
    logs = logs / logs.max()
    height, width = logs.shape
    ratios = dict.fromkeys(SHARES)
    for share in SHARES:
        for i in range(1, height // 2):
            square = logs[
                height // 2 - i : height // 2 + 1 + i, width // 2 - i : width // 2 + 1 + i
            ]
            if square.sum() / logs.sum() > share:
                ratios[share] = (2 * i + 1) / height * (2 * i + 1) / width
                break
    return mean, ratios


def images(*size, count=2):
    return torch.randn(count, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize("side", [128, 160])
@pytest.mark.slow
def test_ratios_of_a_resnet(side):
    """At 128 pixels the middle unit of stage 4 lies on pixel 64, at 160 on pixel 64 too, which is
    not the image's middle."""
    network = TimmStages("resnet18").double().eval()
    batch = images(side, side)
    mean, expected = script(lambda image: network.feature_maps(image)["stage4"], batch)
    erf = effective_receptive_field(network, batch, layers=["stage4"], gradient="relu")
    field = erf["stage4"]
    np.testing.assert_allclose(field.mean, mean, rtol=1e-9, atol=1e-12 * mean.max())
    numbers = erf.numbers()["stage4"]
    defined = {share: ratio for share, ratio in expected.items() if ratio is not None}
    assert len(defined) > 2
    for share, ratio in defined.items():
        assert field.area_ratio(share, "replknet") == pytest.approx(ratio, rel=1e-12)
        assert numbers[f"area_replknet_{round(100 * share)}"] == pytest.approx(ratio, rel=1e-12)
        about_the_unit = field.area_ratio(share, "square")
        assert (about_the_unit == pytest.approx(ratio, rel=1e-12)) is (side == 128)


def patches(stride=4):
    """A network that cuts patches: its units lie between pixels, so in no image on the middle."""
    return nn.Sequential(
        nn.Conv2d(3, 4, stride, stride), nn.GELU(), nn.Conv2d(4, 6, 3, padding=1)
    ).double()


@pytest.mark.parametrize("side", [32, 36])
def test_ratios_of_a_patch_network(side):
    network = patches().eval()
    batch = images(side, side)
    mean, expected = script(network, batch)
    erf = effective_receptive_field(network, batch, layers=["output"], gradient="relu")
    field = erf["output"]
    np.testing.assert_allclose(field.mean, mean, rtol=1e-9, atol=1e-12 * mean.max())
    for share in (0.2, 0.5):
        assert field.area_ratio(share, "replknet") == pytest.approx(expected[share], rel=1e-12)
    assert field.area_ratio(0.5, "square") != pytest.approx(expected[0.5], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"gradient": "abs"}, (32, 32), "takes gradient='relu', and this is 'abs'"),
        ({"gradient": "relu"}, (32, 40), "is for square maps, and this one has 32x40"),
        ({"gradient": "relu", "units": [(0, 0)]}, (32, 32), r"\(4, 4\), and this is unit \(0, 0\)"),
        # an odd image with an even map: pixel 16 of 33 belongs to unit 3 of 8
        ({"gradient": "relu"}, (33, 33), r"unit \(4, 4\), and this is unit \(3, 3\)"),
    ],
    ids=str,
)  # fmt: skip
def test_maps_that_the_script_does_not_measure_are_refused(settings, size, message):
    erf = effective_receptive_field(patches().eval(), images(*size), layers=["output"], **settings)
    with pytest.raises(ValueError, match=message):
        erf["output"].area_ratio(0.5, "replknet")
    assert not any(key.startswith("area_replknet") for key in erf.numbers()["output"])


@pytest.mark.parametrize("changes", [{"reduction": "l1"}, {"units": Grid(2, 2)}], ids=str)
def test_no_replknet_numbers_for_other_settings(changes):
    settings = {"gradient": "relu", "layers": ["output"]} | changes
    erf = effective_receptive_field(patches().eval(), images(32, 32), **settings)
    assert "area_square_50" in erf.numbers()["output"]
    assert "area_replknet_50" not in erf.numbers()["output"]
