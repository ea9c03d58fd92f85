"""Feature maps of any network, which does not change."""

import numpy as np
import pytest
import torch
from torch import nn

from segformer_pl.analysis.erf import effective_receptive_field
from segformer_pl.analysis.erf.feature_extractor import FeatureExtractor, channels_first
from segformer_pl.models import segformer_b0


def feature_maps(model, images, layers, layout="auto"):
    extractor = FeatureExtractor(model.eval(), layers, layout)
    return extractor(images, extractor.state(torch.float32))


def test_feature_maps_modules_and_the_output_in_the_order_asked_for():
    model = segformer_b0(5)
    images = torch.rand(1, 3, 64, 96)
    layers = ["output", "stage2", "encoder.stages.0.blocks", "head.classifier", "stage1"]
    maps = feature_maps(model, images, layers)
    assert list(maps) == layers
    with torch.no_grad():
        expected = model.feature_maps(images)
        torch.testing.assert_close(maps["output"], model(images))
    assert torch.equal(maps["output"], maps["head.classifier"])
    assert torch.equal(maps["stage2"], expected["stage2"])
    # Tokens before the norm, channels last, come out as (B, C, h, w).
    normed = model.encoder.stages[0].norm(maps["encoder.stages.0.blocks"].permute(0, 2, 3, 1))
    torch.testing.assert_close(normed.permute(0, 3, 1, 2), expected["stage1"])


@pytest.mark.slow
@pytest.mark.parametrize("layers", [["head"], ["head", "encoder.stages.0"], ["head", "output"]])
def test_feature_map_takes_precedence_over_the_module_of_its_name(layers):
    """The module ``head`` returns logits."""
    model = segformer_b0(5).eval()
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(
        feature_maps(model, images, layers)["head"], model.feature_maps(images)["head"]
    )
    alone = effective_receptive_field(model, images, layers=layers)["head"]
    together = effective_receptive_field(model, images)["head"]
    assert alone.mean == pytest.approx(together.mean, rel=1e-3, abs=1e-4 * together.mean.max())


def test_one_forward_pass_serves_all_layers():
    model = segformer_b0(5)
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    for layers in (None, ["stage1", "encoder.stages.1"], ["output", "encoder.stages.1"]):
        effective_receptive_field(model, torch.rand(1, 3, 64, 64), layers=layers)
    assert len(calls) == 3


def test_maps_are_not_changed_by_in_place_operations_of_the_next_module():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(feature_maps(model, images, ["0"])["0"], nn.Conv2d.forward(model[0], images))


class VisionTransformer(nn.Module):
    """Patches of 8 pixels as tokens behind one class token."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, stride=8)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.new_zeros(len(tokens), 1, 16), tokens], 1)
        return self.block(tokens)


def test_tokens_with_a_class_token_become_a_grid():
    model = VisionTransformer()
    images = torch.randn(2, 3, 32, 48)
    maps = feature_maps(model, images, ["block"])
    assert maps["block"].shape == (2, 16, 4, 6)
    torch.testing.assert_close(maps["block"][:, :, 1, 2], model.eval()(images)[:, 1 + 6 + 2])
    erf = effective_receptive_field(model, images, layers=["block"])
    assert (erf["block"].mean > 0).all()


def test_layouts():
    size = (64, 96)
    first, last = torch.rand(1, 32, 16, 24), torch.rand(1, 16, 24, 32)
    assert channels_first(first, size, "auto", "x").shape == (1, 32, 16, 24)
    assert channels_first(last, size, "auto", "x").shape == (1, 32, 16, 24)
    assert channels_first(torch.rand(1, 9, 2, 4), size, "auto", "x").shape == (1, 9, 2, 4)
    cube = torch.rand(1, 16, 16, 16)
    with pytest.raises(ValueError, match="channels first or last; say which"):
        channels_first(cube, (64, 64), "auto", "x")
    as_said = channels_first(cube, (64, 64), "channels_last", "x")
    assert torch.equal(as_said[0, :, 2, 3], cube[0, 2, 3])
    for shape in ((1, 5, 40, 3), (4, 5), (1, 500, 8)):
        with pytest.raises(ValueError, match="is no feature map of images of 64x96"):
            channels_first(torch.rand(shape), size, "auto", "x")


def test_ambiguous_numbers_of_tokens_are_refused():
    """Nine tokens of 32x32 pixels: 3x3 of a padded stride, or 2x2 behind five registers."""
    with pytest.raises(ValueError, match="2x2 behind 5 others or 3x3 behind 0 others"):
        channels_first(torch.rand(1, 9, 8), (32, 32), "auto", "x")
    for count, size, grid in (
        (197, (224, 224), (14, 14)),
        (261, (256, 256), (16, 16)),
        (4, (64, 64), (2, 2)),
        (35, (65, 100), (5, 7)),  # padded, of stride 15 or 16
    ):
        assert channels_first(torch.rand(1, count, 8), size, "auto", "x").shape[2:] == grid


def test_class_maps_of_a_segmenter_have_their_channels_first():
    """Four classes on a grid of 4x4 could be read both ways."""

    class Linears(nn.Linear):
        def forward(self, images):
            return super().forward(images[:, :, ::16, ::16].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        def feature_maps(self, images):
            return {}

    model, images = Linears(3, 4), torch.rand(1, 3, 64, 64)
    result = feature_maps(model, images, ["output"])["output"]
    torch.testing.assert_close(result, model(images))


def test_maps_of_convolutions_have_their_channels_first():
    """64 channels of 64x64 units, as in the first layer of a ResNet-18 on 256x256 pixels."""
    layers = [nn.Conv2d(3, 64, 7, 4, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Linear(64, 64)]
    model = nn.Sequential(nn.Sequential(*layers[:3]), *layers)
    model[1] = nn.Identity()
    model[4] = nn.Linear(64, 64)
    images = torch.randn(1, 3, 256, 256)
    feature = feature_maps(model, images, ["0"])["0"]
    torch.testing.assert_close(feature, model[0].eval()(images))
    with pytest.raises(ValueError, match="channels first or last; say which"):
        feature_maps(model, images, ["4"])


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu, self.unused, self.many = nn.ReLU(), nn.ReLU(), segformer_b0(2).encoder

    def forward(self, images):
        self.many(images)
        return self.relu(self.relu(images))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (None, "Odd has no feature_maps, so name modules.*relu, unused, many"),
        (["relu"], "'relu' runs more than once"),
        (["unused"], "'unused' did not run"),
        (["many"], "'many' returns a list and not one tensor"),
        (["rely"], "no layer 'rely'; close are relu"),
        (["relu", "relu"], "each once"),
        ([], "at least one name"),
    ],
)
def test_layers_that_cannot_be_caught(layers, message):
    with pytest.raises(ValueError, match=message):
        effective_receptive_field(Odd(), torch.rand(1, 3, 32, 32), layers=layers)


def test_network_gradients_mode_and_random_state_do_not_change():
    network = segformer_b0(5).train()
    network.encoder.eval()
    network.encoder.stages[0].requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    parameters = dict(network.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    network.head.classifier.bias.grad = gradient = torch.ones(5)
    random_state = torch.get_rng_state()
    with torch.inference_mode():
        effective_receptive_field(network, torch.full((1, 3, 64, 64), 0.5))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert network.head.training
    assert not network.encoder.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for name, parameter in network.named_parameters():
        assert parameter is parameters[name]
        assert parameter.requires_grad == flags[name]
        assert parameter.grad is (gradient if name == "head.classifier.bias" else None)
    assert not any(module._forward_hooks for module in network.modules())


def test_mode_and_hooks_are_restored_when_the_network_fails():
    network = segformer_b0(5).train()
    with pytest.raises(ValueError, match="sr_ratio 8 is larger"):
        effective_receptive_field(network, torch.rand(1, 3, 16, 16), layers=["encoder.stages.0"])
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


def test_half_precision_networks_and_autocast_are_measured_in_float32():
    network = segformer_b0(5).eval()
    images = torch.rand(1, 3, 64, 64)
    expected = effective_receptive_field(network, images)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = effective_receptive_field(network, images)
    np.testing.assert_array_equal(autocast["head"].mean, expected["head"].mean)
    half = effective_receptive_field(network.bfloat16(), images)
    assert half["head"].mean.max() > 0
    assert next(network.parameters()).dtype == torch.bfloat16
    rounded = effective_receptive_field(network.float(), images)
    np.testing.assert_allclose(half["head"].mean, rounded["head"].mean, rtol=1e-5)
