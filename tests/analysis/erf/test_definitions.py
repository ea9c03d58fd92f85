"""Definitions of the ERF, on a network small enough to follow and against published numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from segformer_pl.analysis.erf import effective_receptive_field
from segformer_pl.analysis.erf.definitions import (
    DEFINITIONS,
    NUMBERS,
    Definition,
    Number,
    gradient_maps,
    weighted_maps,
)
from segformer_pl.errors import UserError

SIDE, COUNT = 48, 3


def wave(*shape, phase=0.0):
    """Numbers that any code can make again: sin(k + phase) + sin(k**2 / 7 + phase)."""
    k = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (torch.sin(k + phase) + torch.sin(k**2 / 7 + phase)).reshape(shape)


def network():
    """Three convolutions with GELU; stride 4."""
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 7, 4, 3), nn.GELU(), nn.Conv2d(4, 5, 5, padding=2), nn.GELU(),
        nn.Conv2d(5, 6, 5, padding=2),
    ).double()  # fmt: skip
    with torch.no_grad():
        for phase, tensor in enumerate(layers.parameters()):
            tensor.copy_(wave(*tensor.shape, phase=phase) / tensor[0].numel() ** 0.5)
    return layers.eval()


def images():
    return torch.stack([wave(3, SIDE, SIDE, phase=index + 0.5) for index in range(COUNT)])


def measure(model, batch=None, layer="output", definitions=DEFINITIONS, **settings):
    """Maps (N, H, W) by definition, and the position of the unit."""
    batch = images() if batch is None else batch
    batches = [{"image": batch, "id": [f"image {n}" for n in range(len(batch))]}]
    parts = [
        layers[layer]
        for _, layers in gradient_maps(model, batches, [layer], definitions, **settings)
    ]
    maps = {name: torch.cat([part.maps[name] for part in parts]).numpy() for name in definitions}
    return maps, parts[0].position


def mean(maps, definition):
    return weighted_maps(maps, np.full((1, len(maps)), 1 / len(maps)), definition)[0]


def test_replknet_script():
    """What the published erf/visualize_erf.py and erf/analyze_erf.py (commits 82cf328 and 186ae32)
    gave when their functions ran on this network and these images, in float64."""
    maps, position = measure(network())
    replknet = mean(maps["replknet"], DEFINITIONS["replknet"])
    assert position == (24, 24)
    assert [replknet.sum(), replknet.max(), replknet[20, 29]] == pytest.approx(
        GOLDEN_MAP, rel=1e-12
    )
    for share, area in GOLDEN_AREAS.items():
        number = Number("square", share, "image", log=True)
        assert number.of(replknet, position) == pytest.approx(area, rel=1e-12)


GOLDEN_MAP = [24.61195565346474, 0.15927019134996037, 0.0044277072272033815]
GOLDEN_AREAS = {0.2: 13**2 / 48**2, 0.3: 15**2 / 48**2, 0.5: 21**2 / 48**2, 0.99: 39**2 / 48**2}


def test_magnitude_is_what_this_package_measures():
    model, batch = network(), images()
    erf = effective_receptive_field(model, batch, layers=["output"])["output"]
    maps, position = measure(model, batch)
    magnitude = mean(maps["magnitude"], DEFINITIONS["magnitude"])
    np.testing.assert_allclose(magnitude, erf.mean, rtol=1e-12, atol=1e-15)
    assert NUMBERS["radius_50"].of(magnitude, position) == pytest.approx(erf.radius(0.5))
    assert NUMBERS["area_50"].of(magnitude, position) == pytest.approx(erf.area_ratio(0.5))


def jacobian(model, image):
    """d unit's channels / d image, (C_out, 3, H, W), by torch.autograd.functional."""
    return torch.autograd.functional.jacobian(lambda x: model(x[None])[0, :, 6, 6], image)


def test_maps_from_the_whole_jacobian():
    """Every definition as a formula of the Jacobian of the unit's channels z."""
    model, batch = network(), images()
    maps, _ = measure(model, batch)
    for index, image in enumerate(batch):
        rows = jacobian(model, image)
        is_positive = (model(image[None])[0, :, 6, 6] > 0).double()
        assert 0 < is_positive.sum() < 6
        relu = torch.einsum("c,cihw->ihw", is_positive, rows)
        signed = rows.mean(0)
        expected = {
            "replknet": relu.clamp(min=0).sum(0),
            "openerf": signed.mean(0).clamp(min=0),
            "magnitude": relu.abs().sum(0),
            "energy": (relu**2).sum(0),
            "equal_images": relu.abs().sum(0),
        }
        for name, one in expected.items():
            np.testing.assert_allclose(maps[name][index], one, rtol=1e-9, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("fault", [
    {"openerf": Definition("mean", "relu", "part then sum", "mean")},
    {"openerf": Definition("relu", "relu", "mean then part", "mean")},
    {"replknet": Definition("relu", "abs")},
    {"replknet": Definition("l1", "relu")},
    {"energy": Definition("relu", "abs")},
], ids=str)  # fmt: skip
def test_definitions_differ(fault):
    """On this network every field matters: another value of it gives another map."""
    ((name, other),) = fault.items()
    ours, _ = measure(network(), definitions={name: DEFINITIONS[name]})
    theirs, _ = measure(network(), definitions={name: other})
    ours, theirs = mean(ours[name], DEFINITIONS[name]), mean(theirs[name], other)
    assert np.abs(ours / ours.sum() - theirs / theirs.sum()).sum() > 0.02


def test_forward_runs_once_and_batches_do_not_matter():
    model, calls = network(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    whole, _ = measure(model)
    assert len(calls) == 1
    single, _ = measure(model, batch_size=1)
    for name in DEFINITIONS:
        np.testing.assert_allclose(single[name], whole[name], rtol=1e-10, atol=1e-16)


def test_definitions_share_maps():
    ((ids, layers),) = gradient_maps(
        network(), [{"image": images(), "id": list("abc")}], ["output"]
    )
    assert ids == ["a", "b", "c"]
    assert layers["output"].maps["magnitude"] is layers["output"].maps["equal_images"]


def test_weighted_maps():
    """Two images of sum 1 and 9: raw, the second has nine tenths of the mean."""
    maps = np.zeros((2, 1, 4))
    maps[0, 0, 0], maps[1, 0, 1:] = 1, 3
    both = np.array([[0.5, 0.5], [1.0, 0.0]])
    plain = Definition("relu", "abs")
    np.testing.assert_allclose(
        weighted_maps(maps, both, plain)[:, 0], [[0.5, *[1.5] * 3], [1, 0, 0, 0]]
    )
    one = weighted_maps(maps, both, replace(plain, normalize="mean"))[:, 0]
    np.testing.assert_allclose(one, [[0.1, *[0.3] * 3], [1, 0, 0, 0]])
    equal = weighted_maps(maps, both, replace(plain, normalize="every image"))[:, 0]
    np.testing.assert_allclose(equal, [[0.5, *[1 / 6] * 3], [1, 0, 0, 0]])
    nothing = weighted_maps(0 * maps, both, replace(plain, normalize="every image"))
    assert not nothing.any()


def test_numbers_by_hand():
    """A map with 1 at the unit (2, 2) and 3 at (2, 6), four pixels to the right, of 8x8."""
    erf = np.zeros((8, 8))
    erf[2, 2], erf[2, 6] = 1, 3
    unit = (2.0, 2.0)
    assert Number("outside", 3.9).of(erf, unit) == pytest.approx(0.75)
    assert Number("outside", 4).of(erf, unit) == 0
    # about pixel (4, 4) both are sqrt(8) away
    assert Number("outside", 2.8, "image").of(erf, unit) == 1
    assert Number("outside", 2.9, "image").of(erf, unit) == 0
    assert Number("area", 0.75).of(erf, unit) == pytest.approx(1 / 64)
    # squares about (4, 4): the one of side 5 has both
    assert Number("square", 0.1, "image").of(erf, unit) == pytest.approx(25 / 64)
    # about the unit, side 7 cut to 6x6 has the unit alone, side 9 cut to 7x7 has both
    assert Number("square", 0.2).of(erf, unit) == pytest.approx(9 / 64)
    assert Number("square", 0.5).of(erf, unit) == pytest.approx(49 / 64)
    # log10(1 + map) is 0.301 and 0.602: the unit has a third of it, and a quarter of the map
    assert Number("square", 0.3, log=True).of(erf, unit) == pytest.approx(9 / 64)
    assert Number("square", 0.3).of(erf, unit) == pytest.approx(49 / 64)
    assert Number("outside", 1, log=True).of(erf, unit) == pytest.approx(2 / 3)
    assert Number("radius", 0.9).of(erf, unit) == pytest.approx(4)


def test_scale_matters_to_logarithms_only():
    maps, position = measure(network())
    for name, number in NUMBERS.items():
        small, large = (number.of(scale * maps["magnitude"][0], position) for scale in (1e-3, 1e3))
        if not number.log:
            assert small == pytest.approx(large, rel=1e-9), name
    number = NUMBERS["square_50_log"]
    assert number.of(1e-3 * maps["magnitude"][0], position) < number.of(
        1e3 * maps["magnitude"][0], position
    )


def test_no_gradient_after_a_norm_is_refused():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 8, 4, 4).double(), nn.LayerNorm(8).double()

        def forward(self, x):
            return self.norm(self.convolution(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = Normed()
    with pytest.raises(
        UserError, match=r"layer 'output': the mean of its channels has no gradient"
    ):
        measure(model)
    only = {"openerf": DEFINITIONS["openerf"]}
    with pytest.raises(UserError, match=r"leave out the definitions with this reduction \(openerf"):
        measure(model.float(), definitions=only)
    measure(model, definitions={"replknet": DEFINITIONS["replknet"]})
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5)
    measure(model)


def test_bad_input():
    bad = images()
    bad[1, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="'image 1': the image is not finite"):
        measure(network(), bad)
    # 46 pixels and stride 4: 12 units, of which pixel 23 selects 6; 45 pixels: 12, and pixel 22: 5
    measure(network(), images()[..., :46, :46])
    with pytest.raises(UserError, match="measure another unit than that in the middle"):
        measure(network(), images()[..., :45, :45])
    with pytest.raises(UserError, match="has no layer 'stage9'"):
        measure(network(), layer="stage9")
