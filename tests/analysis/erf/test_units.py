"""Positions of units, selection of units, and reductions of their channels."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segformer_pl.analysis.erf import ClassUnits, Grid, effective_receptive_field, merge
from segformer_pl.models import segformer_b0


def box(channels=1, **options):
    """A 3x3 convolution that sums its window."""
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **options)
    nn.init.ones_(conv.weight)
    return conv


def field_of(layer, images, **options):
    return effective_receptive_field(nn.Sequential(layer), images, layers=["0"], **options)["0"]


# Positions


@pytest.mark.parametrize("size", [(224, 224), (256, 256), (96, 160), (230, 500), (65, 97)])
@pytest.mark.parametrize("stride", [4, 32])
def test_distances_count_from_the_unit_and_not_from_the_selecting_pixel(size, stride):
    """Pixel 112 of 224 selects unit 3 of 7, which is centred on pixel 96."""
    field = field_of(box(stride=stride), torch.ones(1, 1, *size))
    unit = tuple(s // 2 * n // s for s, n in zip(size, field.grid))
    assert field.position == tuple(stride * k for k in unit)
    assert field.centroid_shift() == (0, 0)
    assert 1 < field.radius(0.5) < np.sqrt(2)
    assert field.rms_radius() == pytest.approx(np.sqrt(12 / 9))
    assert field.area_ratio(0.5, "square") == pytest.approx(9 / np.prod(size))


@pytest.mark.parametrize("size", [(256, 256), (224, 96), (230, 134)])
def test_patches_without_padding_are_centred_between_pixels(size):
    """Patches of 4x4 and then 2x2 in sequence, and patches of 16x16."""
    cut = {4: nn.Conv2d(1, 1, 4, 4), 8: nn.Sequential(nn.Conv2d(1, 1, 4, 4), nn.AvgPool2d(2))}
    cut[16] = nn.Conv2d(1, 1, 16, 16)
    for stride, layer in cut.items():
        for parameter in layer.parameters():
            nn.init.ones_(parameter)
        field = field_of(layer, torch.ones(1, 1, *size))
        assert field.position[0] % 1 == field.position[1] % 1 == 0.5
        assert field.centroid_shift() == pytest.approx((0, 0))
        assert field.radius(0.99) < stride / np.sqrt(2)


def test_maps_of_a_grid_of_units_are_aligned():
    """Maps are shifted by unit positions, so a 3x3 window stays nine pixels."""
    for size in ((96, 96), (224, 160)):
        one = field_of(box(stride=32), torch.ones(1, 1, *size))
        grid = field_of(box(stride=32), torch.ones(1, 1, *size), units=Grid(3, 3))
        assert (grid.mean > 0).sum() == 9
        assert grid.position == one.position
        assert grid.centroid_shift() == pytest.approx((0, 0), abs=1.0)


# Reductions


def test_a_plain_sum_after_a_layernorm_is_refused_and_would_be_zero():
    """The sum is constant, so its gradient is zero."""
    network = segformer_b0(5).eval()
    images = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"'stage1' ends in a LayerNorm.*no gradient"):
        effective_receptive_field(network, images, reduction="sum")
    x = images.clone().requires_grad_()
    naive = network.feature_maps(x)["stage1"][:, :, 8, 8].sum()
    (gradient,) = torch.autograd.grad(naive, x)
    erf = effective_receptive_field(network, images, layers=["stage1"])
    assert gradient.abs().max() < 1e-3 * erf["stage1"].mean.max()
    before = ["encoder.stages.0.blocks", "head"]  # before the norm, and after a BatchNorm
    erf = effective_receptive_field(network, images, layers=before, reduction="sum")
    assert all(field.mean.max() > 1e-3 for field in erf.layers.values())


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("vit_tiny_patch16_224", "norm"),
        ("convnext_atto", "stem"),
        pytest.param("swin_tiny_patch4_window7_224", "norm", marks=pytest.mark.slow),
    ],
)
def test_a_plain_sum_after_a_layernorm_is_refused_for_any_network(name, layer):
    import timm

    network = timm.create_model(name, num_classes=3).eval()
    image = torch.rand(1, 3, 224, 224)
    for units in ("center", [(8, 9), (99, 100)], Grid(1, 2), ClassUnits(0)):
        batch = {"image": image, "label": torch.zeros(1, 224, 224, dtype=torch.int64)}
        with pytest.raises(ValueError, match=f"'{layer}' ends in a LayerNorm"):
            effective_receptive_field(
                network, [batch], layers=[layer], reduction="sum", units=units
            )


def test_a_plain_sum_of_custom_feature_maps_after_a_layernorm_is_refused():
    class Tokens(nn.Module):
        def feature_maps(self, images):
            return {"x": F.layer_norm(images.permute(0, 2, 3, 1), [3]).permute(0, 3, 1, 2)}

    with pytest.raises(ValueError, match="'x' ends in a LayerNorm"):
        effective_receptive_field(Tokens(), torch.rand(1, 3, 8, 8), reduction="sum")


def test_the_seed_of_a_random_projection_is_in_the_settings():
    images = torch.rand(1, 3, 8, 8)
    kind = {"reduction": "random"}
    one, two = (
        effective_receptive_field(nn.Sequential(box(3)), images, layers=["0"], seed=seed, **kind)
        for seed in (1, 2)
    )
    assert one.settings["seed"] == 1
    with pytest.raises(ValueError, match="equal settings"):
        merge([one, two])
    other = effective_receptive_field(nn.Sequential(box(3)), images, layers=["0"], seed=4)
    assert "seed" not in other.settings


# Messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, "foo"), "give 'label' or 'prediction'"),
        ((True,), "give a train id"),
        ((-1,), "give a train id"),
        ((1.5,), "give a train id"),
    ],
)
def test_invalid_class_units(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassUnits(*arguments)


def test_pixels_can_be_an_array():
    of_array = effective_receptive_field(
        nn.Sequential(box(3)), torch.rand(1, 3, 16, 16), layers=["0"], units=np.array([[3, 4]])
    )
    assert of_array["0"].position == (3, 4)
    assert of_array.settings["units"] == [[3, 4]]
