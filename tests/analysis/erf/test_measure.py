"""Receptive fields against closed forms and finite differences, and known pitfalls."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from segformer_pl.analysis.erf import (
    ClassUnits,
    Grid,
    NoFieldError,
    effective_receptive_field,
    merge,
)
from segformer_pl.models import segformer_b0

LAYERS = ["stage1", "stage2", "stage3", "stage4", "head"]


class Features(nn.Module):
    """Named intermediates of a chain of layers; the last is the output."""

    def __init__(self, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def feature_maps(self, images):
        maps = {}
        for name, layer in self.layers.items():
            images = maps[name] = layer(images)
        return maps

    def forward(self, images):
        return list(self.feature_maps(images).values())[-1]


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, images):
        return images * self.factor


def box(channels=1, **options):
    """A 3x3 convolution that sums its window."""
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **options)
    nn.init.ones_(conv.weight)
    return conv


def reference(network, image, layer, pixel, reduction=torch.relu):
    """|gradient| in the simplest way: one image, one unit, one forward and backward pass."""
    image = image[None].clone().requires_grad_()
    feature = network.feature_maps(image)[layer]
    row, column = (p * s // n for p, s, n in zip(pixel, feature.shape[2:], image.shape[2:]))
    (gradient,) = torch.autograd.grad(reduction(feature[0, :, row, column]).sum(), image)
    return gradient[0].abs().sum(0)


@pytest.fixture(scope="module")
def network(randomize):
    torch.manual_seed(0)
    return randomize(segformer_b0(5)).eval()


# Closed forms


def test_stack_of_3x3_convolutions_has_powers_of_its_taps():
    """n boxes in sequence: (1 + x + x^2)^n in each direction, zero beyond 2n + 1 pixels."""
    depth = 4
    network = Features(**{f"conv{n}": box() for n in range(1, depth + 1)}).double()
    erf = effective_receptive_field(network, torch.rand(2, 1, 24, 20, dtype=torch.float64))
    taps = np.ones(1)
    for n in range(1, depth + 1):
        taps = np.convolve(taps, np.ones(3))
        expected = np.zeros((24, 20))
        expected[12 - n : 13 + n, 10 - n : 11 + n] = np.outer(taps, taps)
        np.testing.assert_allclose(erf[f"conv{n}"].mean, expected, rtol=1e-12, atol=0)
        np.testing.assert_allclose(erf[f"conv{n}"].variance, 0, atol=1e-20)
        # The variance of three uniform taps is 2/3 per layer and direction.
        assert erf[f"conv{n}"].rms_radius() == pytest.approx(np.sqrt(2 * n * 2 / 3))


def test_pointwise_network_depends_on_one_pixel():
    erf = effective_receptive_field(Features(same=Scale(-3)), torch.rand(2, 3, 9, 12) - 2)
    expected = np.zeros((9, 12))
    expected[4, 6] = 9.0  # 3 channels x |-3|
    np.testing.assert_allclose(erf["same"].mean, expected)
    assert erf["same"].area_ratio(0.99) == pytest.approx(0.99 / 108)
    assert erf["same"].radius(0.99) == 0


def test_the_theoretical_receptive_field_bounds_the_support_of_a_cnn():
    """3x3 stride 2, 3x3 dilation 2, 5x5: 3, then + 4 * 2, then + 4 * 2 pixels per side: 19."""
    torch.manual_seed(1)
    network = Features(
        body=nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 5, padding=2),
        )
    ).double()
    erf = effective_receptive_field(network, torch.randn(4, 3, 48, 40, dtype=torch.float64))
    rows, columns = erf["body"].mean.nonzero()
    assert (rows.min(), rows.max()) == (24 - 9, 24 + 9)
    assert (columns.min(), columns.max()) == (20 - 9, 20 + 9)


def test_strided_layer_is_centred_on_its_pixel():
    erf = effective_receptive_field(Features(c=box(stride=4)), torch.ones(1, 1, 32, 32))
    rows, columns = erf["c"].mean.nonzero()
    assert {*rows} == {*columns} == {15, 16, 17}


@pytest.mark.slow
def test_positions_of_segformer_units_on_odd_and_even_grids(network):
    """Stage 4 has 3x3 units, so that its middle unit is not at the middle pixel of the image."""
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    erf = effective_receptive_field(network, images)
    assert {name: field.position for name, field in erf.layers.items()} == {
        **dict.fromkeys(("stage1", "stage2", "stage3", "head"), (48, 48)),
        "stage4": (32, 32),
    }


def test_half_pixel_shift_of_the_head():
    """Bilinear upsampling shifts the middle unit by -2, -6 and -14 px for stages 2, 3 and 4."""
    for stride, shift in ((8, -2), (16, -6), (32, -14)):
        sample = nn.Conv2d(1, 1, 1, stride=stride, bias=False)
        nn.init.ones_(sample.weight)
        up = nn.Upsample(scale_factor=stride / 4, mode="bilinear", align_corners=False)
        network = Features(stage=sample, head=up).double()
        erf = effective_receptive_field(network, torch.ones(1, 1, 128, 256, dtype=torch.float64))
        assert erf["stage"].centroid_shift() == (0, 0)
        assert erf["head"].centroid_shift() == pytest.approx((shift, shift))


# Gradients


@pytest.mark.slow
def test_gradients_agree_with_finite_differences(network):
    """A random projection is smooth in the image, and the signed map is its derivative."""
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    erf = effective_receptive_field(
        network, images, layers=["stage2", "head"], reduction="random", gradient="signed", seed=3
    )
    generator = torch.Generator().manual_seed(3)
    step = 1e-5
    for layer in ("stage2", "head"):
        generator.manual_seed(3)
        channels = network.feature_maps(images)[layer].shape[1]
        projection = torch.randn(channels, generator=generator, dtype=torch.float64)
        for pixel in ((32, 32), (3, 60), (40, 10)):
            values = []
            for sign in (1, -1):
                moved = images.clone()
                moved[:, :, pixel[0], pixel[1]] += sign * step
                with torch.no_grad():
                    feature = network.feature_maps(moved)[layer]
                side = feature.shape[2] // 2
                values.append((feature[0, :, side, side] @ projection).item() / channels**0.5)
            slope = (values[0] - values[1]) / (2 * step)
            assert erf[layer].mean[pixel] == pytest.approx(slope, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("reduction", ["relu", pytest.param("l1", marks=pytest.mark.slow)])
def test_every_layer_agrees_with_a_separate_backward_pass(network, reduction):
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    erf = effective_receptive_field(network, images, reduction=reduction)
    assert list(erf.layers) == LAYERS
    of = {"relu": torch.relu, "l1": torch.abs}[reduction]
    for layer in LAYERS:
        each = torch.stack([reference(network, x, layer, (32, 48), of) for x in images])
        np.testing.assert_allclose(erf[layer].mean, each.mean(0), rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(erf[layer].variance, each.var(0), rtol=1e-6, atol=1e-20)


@pytest.mark.slow
def test_relation_of_relu_abs_and_signed_gradients(network):
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    maps = {
        gradient: effective_receptive_field(network, images, layers=["stage3"], gradient=gradient)[
            "stage3"
        ].mean
        for gradient in ("abs", "relu", "signed")
    }
    # relu + relu of the negative = abs; relu - relu of the negative = signed.
    np.testing.assert_allclose(2 * maps["relu"] - maps["abs"], maps["signed"], atol=1e-12)
    assert maps["relu"].sum() < 0.9 * maps["abs"].sum()


def test_one_channel_and_a_class_logit(network):
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    erf = effective_receptive_field(network, images, layers=["stage1", "output"], reduction=4)
    x = images.clone().requires_grad_()
    for layer, value in (
        ("stage1", network.feature_maps(x)["stage1"][0, 4, 8, 8]),
        ("output", network(x)[0, 4, 8, 8]),
    ):
        (gradient,) = torch.autograd.grad(value, x)
        np.testing.assert_allclose(erf[layer].mean, gradient[0].abs().sum(0), rtol=1e-9)
    with pytest.raises(ValueError, match="layer 'output' has channels 0 to 4"):
        effective_receptive_field(network, images, layers=["output"], reduction=5)


# Attention over reduced keys and values


@pytest.mark.slow
def test_every_stage_covers_the_whole_image_with_a_lattice_of_32_pixels():
    """No pixel has zero gradient, and the map far from the unit repeats every 32 px."""
    torch.manual_seed(0)
    network = segformer_b0(5).eval()
    erf = effective_receptive_field(network, torch.randn(4, 3, 192, 192))
    for layer in LAYERS:
        assert (erf[layer].mean > 0).all(), layer
    stage1 = erf["stage1"]
    assert stage1.radius(0.5) < 8
    assert stage1.lattice_share(32) > 0.6
    assert max(stage1.lattice_share(period) for period in (16, 24, 48)) < 0.3
    assert erf["stage2"].lattice_share(32) > 0.6


@pytest.mark.slow
def test_fused_and_plain_attention_give_the_same_field(network):
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    fused = effective_receptive_field(network, images, layers=["stage4"])
    with sdpa_kernel(SDPBackend.MATH):
        plain = effective_receptive_field(network, images, layers=["stage4"])
    np.testing.assert_allclose(fused["stage4"].mean, plain["stage4"].mean, rtol=1e-8)


# Batches, streams, many units


@pytest.mark.slow
def test_result_is_independent_of_batch_size_and_stream(network):
    images = torch.randn(5, 3, 64, 64, dtype=torch.float64)
    one = effective_receptive_field(network, images, batch_size=1)
    stream = ({"image": part, "id": ["a", "b", "c"][: len(part)]} for part in images.split(3))
    for other in (
        effective_receptive_field(network, images, batch_size=5),
        effective_receptive_field(network, stream, batch_size=2),
        merge([effective_receptive_field(network, part) for part in images.split((2, 3))]),
    ):
        assert other.num_images == 5
        for layer in LAYERS:
            np.testing.assert_allclose(other[layer].mean, one[layer].mean, rtol=1e-9, atol=1e-14)
            np.testing.assert_allclose(
                other[layer].variance, one[layer].variance, rtol=1e-6, atol=1e-16
            )
            assert sorted(other[layer].group_counts) == [1] * 5


def test_stream_is_read_only_as_far_as_needed():
    def stream():
        yield torch.rand(2, 3, 16, 16)
        yield torch.rand(2, 3, 16, 16)
        raise AssertionError("read too far")

    erf = effective_receptive_field(Features(conv=box(3)), stream(), num_images=3)
    assert erf.num_images == 3


@pytest.mark.slow
def test_several_units_are_shifted_to_the_middle_and_averaged(network):
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    pixels = [(8, 40), (50, 20)]
    erf = effective_receptive_field(network, images, layers=["stage2"], units=pixels)
    expected = torch.zeros(64, 64, dtype=torch.float64)
    for row, column in pixels:
        one = reference(network, images[0], "stage2", (row, column))
        row, column = row // 8 * 8, column // 8 * 8  # positions of the units
        for r in range(64):
            for c in range(64):
                if 0 <= r + row - 32 < 64 and 0 <= c + column - 32 < 64:
                    expected[r, c] += one[r + row - 32, c + column - 32] / 2
    np.testing.assert_allclose(erf["stage2"].mean, expected, rtol=1e-9, atol=1e-14)
    assert erf["stage2"].position == (32, 32)
    alone = effective_receptive_field(network, images, layers=["stage2"], units=[(8, 40)])
    assert alone["stage2"].position == (8, 40)
    np.testing.assert_allclose(
        alone["stage2"].mean, reference(network, images[0], "stage2", (8, 40)), rtol=1e-9
    )


def test_grid_of_units_of_a_stationary_network_equals_the_middle_unit():
    network = Features(conv=box())
    images = torch.ones(1, 1, 30, 30)
    grid = effective_receptive_field(network, images, units=Grid(3, 2))["conv"]
    np.testing.assert_allclose(
        grid.mean, effective_receptive_field(network, images)["conv"].mean, rtol=1e-6
    )


@pytest.mark.slow
def test_all_pixels_of_a_class_in_the_label_and_in_the_prediction(network):
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    labels = torch.zeros(3, 64, 64, dtype=torch.int64)
    labels[0, :32, :16] = 2
    labels[1, 60:, 60:] = 2  # one unit of stage 1, none of stage 3
    batch = {"image": images, "label": labels, "id": ["a", "b", "c"]}
    erf = effective_receptive_field(network, [batch], layers=["stage1"], units=ClassUnits(2))
    assert erf.without_units == ["c"]
    x = images[:1].clone().requires_grad_()
    of_class = network.feature_maps(x)["stage1"][0, :, :8, :4].relu().sum(0).mean()
    (first,) = torch.autograd.grad(of_class, x)
    second = reference(network, images[1], "stage1", (63, 63))
    expected = (first[0].abs().sum(0) + second) / 2
    np.testing.assert_allclose(erf["stage1"].mean, expected, rtol=1e-9, atol=1e-14)
    with pytest.raises(ValueError, match="has no centre"):
        erf["stage1"].radius()
    assert 0 < erf["stage1"].area_ratio(0.5) < 1

    layers = ["stage1", "stage3"]
    erf = effective_receptive_field(network, [batch], layers=layers, units=ClassUnits(2))
    assert erf.without_units == ["b", "c"]
    with pytest.raises(ValueError, match="need labels"):
        effective_receptive_field(network, images, units=ClassUnits(2))

    with torch.no_grad():
        predicted = network(images).argmax(1)
    counts = predicted.flatten(1).eq(predicted[0, 0, 0]).any(1)
    erf = effective_receptive_field(
        network, images, layers=["head"], units=ClassUnits(int(predicted[0, 0, 0]), "prediction")
    )
    assert erf.num_images == counts.sum()


@pytest.mark.slow
def test_images_without_a_finite_gradient_are_counted_and_named(network):
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    images[1, 0, 5, 5] = torch.nan
    images[3] = torch.inf
    batch = {"image": images, "id": ["w", "x", "y", "z"]}
    erf = effective_receptive_field(network, [batch])
    assert erf.not_finite == ["x", "z"]
    assert erf.num_images == 2
    expected = effective_receptive_field(network, images[[0, 2]])
    for layer in LAYERS:
        np.testing.assert_allclose(erf[layer].mean, expected[layer].mean, rtol=1e-12)
    with pytest.raises(NoFieldError, match="gradient of 1 was not finite"):
        effective_receptive_field(network, images[3:])


@pytest.mark.parametrize("units", ["center", ClassUnits(0)])
def test_image_of_nan_is_left_out_even_if_gradients_are_finite(units):
    """Gradients of linear layers and of |x| do not depend on the values of the image."""
    network = nn.Sequential(nn.Conv2d(3, 5, 9, padding=4))
    images = torch.randn(3, 3, 16, 16)
    images[1] = torch.nan
    batch = {"image": images, "label": torch.zeros(3, 16, 16, dtype=torch.int64), "id": "abc"}
    options = {"layers": ["0"], "layout": "channels_first", "units": units}
    for reduction in ("relu", "l1", "sum"):
        erf = effective_receptive_field(network, [batch], reduction=reduction, **options)
        assert (erf.not_finite, erf.num_images, erf.image_ids) == (["b"], 2, ["a", "c"])
    with pytest.raises(NoFieldError, match="gradient of 3 was not finite"):
        effective_receptive_field(network, [batch | {"image": images * torch.nan}], **options)


def test_images_with_non_finite_features_are_left_out():
    """1 / 0 in a finite image, where the gradient of the positive part is zero."""

    class Inverse(nn.Module):
        def forward(self, images):
            return -1 / images.abs().detach() + images

    images = torch.ones(2, 1, 8, 8)
    images[0, 0, 4, 4] = 0
    erf = effective_receptive_field(Features(x=Inverse()), images, reduction="sum")
    assert erf.not_finite == ["image 0"]


def test_receptive_field_of_zeros_is_reported():
    network = Features(same=Scale(1), dead=nn.Sequential(Scale(-1), nn.ReLU()))
    images = torch.rand(2, 3, 8, 8) + 1
    with pytest.raises(NoFieldError, match=r"the receptive field of dead is zero everywhere.*'l1'"):
        effective_receptive_field(network, images)
    effective_receptive_field(network, images, layers=["same"])


# BatchNorm


def test_batchnorm_uses_its_running_statistics():
    """Statistics of the batch would let images influence each other."""
    network = Features(norm=nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).train()
    together = effective_receptive_field(network, torch.randn(6, 3, 8, 8), batch_size=6)
    assert (together["norm"].mean > 0).sum() == 1


def test_batchnorm_without_running_statistics_needs_batch_size_1():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    network = Features(norm=nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm))
    images = torch.randn(3, 3, 8, 8)
    for batch_size in (None, 2):
        with pytest.raises(ValueError, match=r"'layers.norm.1' has no running.*batch_size=1"):
            effective_receptive_field(network, images, batch_size=batch_size)
    together = effective_receptive_field(network, images, batch_size=1)["norm"]
    alone = [effective_receptive_field(network, x[None], batch_size=1)["norm"] for x in images]
    np.testing.assert_allclose(together.mean, np.mean([a.mean for a in alone], 0), rtol=1e-6)


# Messages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction": "mean"}, "give one of relu, l1, sum, random, or the number of a channel"),
        ({"gradient": "squared"}, "give one of abs, relu, signed"),
        ({"units": "middle"}, "give 'center'"),
        ({"units": []}, "give 'center'"),
        ({"units": (3, 4)}, r"give 'center', a list of \(row, column\) pixels"),
        ({"units": 3}, "give 'center', a list"),
        ({"units": np.array([3, 4])}, "give 'center', a list"),
        ({"units": [(3.5, 4)]}, "give 'center', a list"),
        ({"units": np.array([[3, 64]])}, r"pixel \(3, 64\) lies outside"),
        ({"units": [(3, 64)]}, r"pixel \(3, 64\) lies outside the image of 64x64"),
        ({"units": Grid(0, 2)}, "an image of 64x64 pixels has no such grid"),
        ({"layers": ["stage5"]}, "no layer 'stage5'; close are stage4, stage3, stage2"),
        ({"layers": "stage1"}, "give a list of at least one name"),
        ({"layers": []}, "give a list of at least one name"),
        ({"reduction": True}, "give one of relu, l1, sum, random"),
        ({"batch_size": 0}, "integers of at least 1"),
        ({"images": torch.rand(3, 64, 64)}, "give batches"),
        ({"images": []}, "there was no image"),
        ({"images": [torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 96)]}, "resize or crop"),
    ],
)
def test_bad_arguments_get_one_sentence(changes, message):
    arguments = {"images": torch.rand(1, 3, 64, 64)} | changes
    with pytest.raises(ValueError, match=message):
        effective_receptive_field(segformer_b0(5), arguments.pop("images"), **arguments)


def test_layer_without_gradient_is_refused():
    class Detached(nn.Module):
        def feature_maps(self, images):
            return {"signs": F.relu(images).detach()}

    with pytest.raises(ValueError, match="'signs' does not depend on the image"):
        effective_receptive_field(Detached(), torch.rand(1, 3, 8, 8))
