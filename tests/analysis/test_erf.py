import pytest
import torch
from torch import nn

from segformer_pl.analysis.erf import area_share, effective_receptive_field, plot_erf
from segformer_pl.models import segformer_b0


class Features(nn.Module):
    """Named intermediates of a chain of layers."""

    def __init__(self, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def feature_maps(self, images):
        maps = {}
        for name, layer in self.layers.items():
            images = maps[name] = layer(images)
        return maps


def positive_conv(kernel_size, **options):
    conv = nn.Conv2d(3, 3, kernel_size, padding=kernel_size // 2, bias=False, **options)
    nn.init.constant_(conv.weight, 0.1)
    return conv


def extent(erf):
    rows, columns = erf.nonzero(as_tuple=True)
    return (rows.min().item(), rows.max().item()), (columns.min().item(), columns.max().item())


def test_a_lone_3x3_convolution_sees_3x3_pixels_around_the_centre():
    erf = effective_receptive_field(Features(conv=positive_conv(3)), torch.ones(2, 3, 16, 20))
    assert erf["conv"].shape == (16, 20)
    assert extent(erf["conv"]) == ((7, 9), (9, 11))
    assert (erf["conv"] > 0).sum() == 9


def test_a_stack_of_two_gives_the_binomial_weights():
    """Three-tap boxes convolved with themselves: 1 2 3 2 1 in each direction."""
    network = Features(first=positive_conv(3), second=positive_conv(3))
    erf = effective_receptive_field(network, torch.ones(1, 3, 16, 16))
    taps = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0])
    window = erf["second"][6:11, 6:11]
    torch.testing.assert_close(window / window.max(), torch.outer(taps, taps) / 9)
    assert extent(erf["first"]) == ((7, 9), (7, 9))


def test_a_strided_layer_is_centred_on_its_pixel():
    network = Features(c=positive_conv(3, stride=4))
    erf = effective_receptive_field(network, torch.ones(1, 3, 32, 32))
    assert extent(erf["c"]) == ((15, 17), (15, 17))


def test_the_map_is_the_mean_of_the_single_images():
    network = segformer_b0(5).eval()
    images = torch.rand(3, 3, 64, 96)
    together = effective_receptive_field(network, images)
    single = [effective_receptive_field(network, image[None]) for image in images]
    for name, erf in together.items():
        expected = torch.stack([maps[name] for maps in single]).mean(0)
        torch.testing.assert_close(erf, expected, rtol=1e-3, atol=1e-5 * expected.max().item())


def test_no_layer_of_a_fresh_segformer_vanishes():
    """The plain channel sum after a LayerNorm has no gradient; the ReLU before it is the cure."""
    network = segformer_b0(5).eval()
    images = torch.rand(1, 3, 64, 64)
    erf = effective_receptive_field(network, images)
    assert list(erf) == ["stage1", "stage2", "stage3", "stage4", "head"]
    images.requires_grad_()
    naive = network.feature_maps(images)["stage1"][:, :, 8, 8].sum()
    (gradient,) = torch.autograd.grad(naive, images)
    assert gradient.abs().max() < 1e-3 * erf["stage1"].max()


def test_network_gradients_and_randomness_are_left_alone():
    network = segformer_b0(5).train()
    network.head.bn.running_mean.fill_(0.5)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with torch.inference_mode():
        effective_receptive_field(network, torch.rand(1, 3, 64, 64).fill_(0.5))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    effective_receptive_field(network, torch.full((1, 3, 64, 64), 0.5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(torch.rand(4), expected)
    assert network.training
    assert all(module.training for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert (network.head.bn.running_mean == 0.5).all()


def test_a_partly_frozen_network_gets_its_modes_back():
    network = segformer_b0(5).train()
    network.encoder.eval()
    effective_receptive_field(network, torch.rand(1, 3, 64, 64))
    assert network.head.training
    assert not network.encoder.training


def test_area_share():
    erf = torch.zeros(10, 10)
    erf[0, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert area_share(erf.numpy(), 0.4) == 0.01
    assert area_share(erf.numpy(), 0.41) == 0.02
    assert area_share(3 * erf.numpy(), 1.0) == 0.04
    assert area_share(torch.ones(10, 10).numpy(), 0.5) == pytest.approx(0.5)
    assert area_share(torch.zeros(2, 2).numpy(), 0.5) != area_share(torch.zeros(2, 2).numpy(), 0.5)


def test_plot_has_a_panel_per_layer_and_a_colour_bar():
    figure = plot_erf({"stage1": torch.rand(8, 12), "head": torch.zeros(8, 12)}, "two images")
    titles = [axis.get_title().split("\n")[0] for axis in figure.axes]
    assert titles == ["stage1", "head", ""]
    assert "two images" in figure.get_suptitle()
