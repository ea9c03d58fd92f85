"""Radius of every unit: batches equal the loop, probes agree within their error bars."""

import numpy as np
import pytest
import torch
from torch import nn

from segformer_pl.analysis.erf import effective_receptive_field
from segformer_pl.analysis.erf.full_image import radius_map
from segformer_pl.models import segformer_b0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network(randomize):
    torch.manual_seed(0)
    return randomize(segformer_b0(5)).eval()


IMAGE = torch.randn(3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "layer", ["encoder.stages.3.blocks", pytest.param("stage3", marks=pytest.mark.slow)]
)
def test_batched_products_equal_the_loop(network, layer):
    loop = radius_map(network, IMAGE, layer, method="loop")
    batched = radius_map(network, IMAGE, layer, method="vjp", batch_size=5)
    np.testing.assert_allclose(batched.radius, loop.radius, rtol=1e-10)
    assert loop.radius.shape == {"stage3": (4, 4), "encoder.stages.3.blocks": (2, 2)}[layer]
    assert (loop.standard_error == 0).all()


def test_loop_agrees_with_the_gradient_and_with_the_erf_of_one_unit(network):
    radii = radius_map(network, IMAGE, "stage2", every=3, method="loop")
    assert [*radii.rows] == [*radii.columns] == [0, 24, 48]
    x = IMAGE[None].clone().requires_grad_()
    unit = network.feature_maps(x)["stage2"][0, :, 3, 6].relu().sum()
    (gradient,) = torch.autograd.grad(unit, x)
    energy = gradient[0].square().sum(0).numpy()
    rows, columns = np.ogrid[:64, :64]
    square = (energy * ((rows - 24) ** 2 + (columns - 48) ** 2)).sum() / energy.sum()
    assert radii.radius[1, 2] == pytest.approx(np.sqrt(square), rel=1e-10)


@pytest.mark.slow
def test_convolution_has_the_radius_of_its_taps():
    """3x3 ones: four neighbours at 1, four at sqrt 2, itself at 0: 12 / 9; less at the border."""
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    nn.init.ones_(conv.weight)
    model = nn.Sequential(conv)
    image = torch.ones(1, 12, 16, dtype=torch.float64)
    radii = radius_map(model, image, "0", layout="channels_first")
    assert radii.radius[5, 5] == pytest.approx(np.sqrt(12 / 9))
    assert radii.radius[0, 0] == pytest.approx(np.sqrt(4 / 4))
    assert radii.radius[0, 5] == pytest.approx(np.sqrt(7 / 6))
    probed = radius_map(model, image, "0", layout="channels_first", method="probe", num_probes=200)
    assert abs(probed.radius - radii.radius).max() < 0.35


@pytest.fixture(scope="module")
def small(randomize):
    """Two strided layers with a GELU in between: fast and nonlinear."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 5, stride=2, padding=2), nn.GELU(), nn.Conv2d(6, 6, 3, padding=1)]
    return randomize(nn.Sequential(*layers)).eval()


@pytest.mark.slow
def test_error_bars_of_probes_have_their_coverage(small):
    """1.96 standard errors cover the exact radius in about 95 % of the units and seeds."""
    image = IMAGE[:, :24, :32]
    # Not the reduction "relu": units without a positive channel would have no gradient.
    chosen = {"layer": "2", "reduction": "random"}
    exact = radius_map(small, image, **chosen, batch_size=48)
    errors = []
    for seed in range(8):
        probed = radius_map(
            small, image, **chosen, method="probe", num_probes=48, batch_size=144, probe_seed=seed
        )
        errors.append((probed.radius - exact.radius) / probed.standard_error)
    errors = np.array(errors)
    assert errors.shape == (8, 12, 16)
    assert 0.92 < (abs(errors) < 1.96).mean() < 0.98
    assert abs(errors.mean()) < 0.1
    assert probed.standard_error.max() < 0.25 * exact.radius.max()


@pytest.mark.slow
def test_more_probes_give_smaller_errors(small):
    few, many = (
        radius_map(small, IMAGE, "2", reduction="l1", method="probe", num_probes=number)
        for number in (16, 64)
    )
    assert 0.4 < many.standard_error.mean() / few.standard_error.mean() < 0.6


@pytest.mark.slow
def test_probes_of_a_segformer_agree_with_its_exact_radii(network):
    exact = radius_map(network, IMAGE, "head", every=5, method="loop")
    probed = radius_map(network, IMAGE, "head", every=5, method="probe", num_probes=32)
    errors = (probed.radius - exact.radius) / probed.standard_error
    assert (abs(errors) < 4).all()
    assert abs(errors.mean()) < 1


@pytest.mark.slow
def test_network_and_random_state_do_not_change():
    model = segformer_b0(3).train()
    image = torch.rand(3, 64, 64)
    state = torch.get_rng_state()
    for method in ("vjp", "loop", "probe"):
        radius_map(model, image, "stage4", method=method, num_probes=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "guess"}, "give one of vjp, loop, probe"),
        ({"every": 0}, "at least 1"),
        ({"method": "probe", "num_probes": 1}, "at least 2"),
        ({"layer": "stage9"}, "no layer 'stage9'"),
        ({"image": torch.rand(2, 3, 64, 64)}, "give one image"),
        ({"reduction": "sum"}, "'stage4' ends in a LayerNorm"),
        ({"reduction": "sum", "method": "probe"}, "'stage4' ends in a LayerNorm"),
    ],
)
def test_bad_arguments_get_one_sentence(changes, message):
    arguments = {"image": torch.rand(3, 64, 64), "layer": "stage4"} | changes
    with pytest.raises(ValueError, match=message):
        radius_map(segformer_b0(5), **arguments)


def test_radii_count_from_the_positions_of_the_units():
    """3x3 windows of stride 32 on 7x5 units, whose cells of 230 / 8 pixels are no whole ones; and
    patches, whose middles lie between pixels."""
    conv = nn.Conv2d(1, 1, 3, stride=32, padding=1, bias=False)
    patches = nn.Conv2d(1, 1, 4, stride=4, bias=False)
    for layer in (conv, patches):
        nn.init.ones_(layer.weight)
    image = torch.ones(1, 230, 160)
    radii = radius_map(nn.Sequential(conv), image, "0")
    assert [*radii.rows] == [*range(0, 230, 32)]
    assert radii.radius[1:, 1:] == pytest.approx(np.sqrt(12 / 9))
    radii = radius_map(nn.Sequential(patches), image[:, :32, :40], "0")
    assert [*radii.rows[:2]] == [1.5, 5.5]
    assert radii.radius == pytest.approx(np.sqrt(2.5))
    probed = radius_map(nn.Sequential(patches), image[:, :32, :40], "0", method="probe")
    assert abs(probed.radius.mean() - np.sqrt(2.5)) < 0.1


def test_probes_refuse_norms_with_batch_statistics():
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), norm)
    with pytest.raises(ValueError, match=r"'1' has no running statistics.*method='vjp'"):
        radius_map(model, torch.rand(1, 16, 16), "1", method="probe")


def test_units_on_the_grid_are_the_units_of_their_pixels(network):
    """The pixel from which a radius is measured selects that unit."""
    radii = radius_map(network, IMAGE, "stage3", every=2, method="loop")
    pixel = (int(radii.rows[1]), int(radii.columns[0]))
    erf = effective_receptive_field(network, IMAGE[None], layers=["stage3"], units=[pixel])
    x = IMAGE[None].clone().requires_grad_()
    unit = network.feature_maps(x)["stage3"][0, :, 2, 0].relu().sum()
    (gradient,) = torch.autograd.grad(unit, x)
    np.testing.assert_allclose(erf["stage3"].mean, gradient[0].abs().sum(0), rtol=1e-9)
