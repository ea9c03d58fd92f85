"""MaskFormer against its authors' code and against transformers, with planted faults."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segformer_pl.checkpoints.maskformer_layout import own_keys
from segformer_pl.inference.engine import predict_probabilities
from segformer_pl.models import Encoder, MaskFormer, SwinEncoder, TimmEncoder, maskformer_decoders
from segformer_pl.models.maskformer_decoders import DecoderLayer, sine_positions
from tests.models import golden_fill as golden

TINY_SWIN = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}
IGNORE = 255


# The original's numbers


def original_key(key):
    """Return the original's name of a parameter of the heads."""
    part, *rest = key.split(".")
    if part == "pixel_decoder":
        if rest[0] == "embedding":
            return f"pixel_decoder.mask_features.{rest[1]}"
        kind, stage, index, name = rest
        module = {"laterals": "adapter", "fusions": "layer"}[kind] + f"_{int(stage) + 1}"
        return f"pixel_decoder.{module}.{'norm.' if index == '1' else ''}{name}"
    if part == "mask_head":
        return f"predictor.mask_embed.layers.{int(rest[0]) // 2}.{rest[1]}"
    names = {
        "class_head": "class_embed",
        "transformer_decoder.projection": "input_proj",
        "transformer_decoder.query_pos": "query_embed",
        "transformer_decoder": "transformer.decoder",
        "cross_attn": "multihead_attn",
        "fc1": "linear1",
        "fc2": "linear2",
    }
    for ours, theirs in names.items():
        key = key.replace(ours, theirs)
    return f"predictor.{key}"


class Maps(Encoder):
    """An encoder that returns given maps."""

    in_channels, out_channels, out_strides = 3, (96, 192, 384, 768), (4, 8, 16, 32)

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, images):
        return self.maps

    def init_args(self):
        return {}


def filled():
    """Return the network of the goldens, whose encoder returns given maps."""
    sizes = [(25, 33), (13, 17), (7, 9), (4, 5)]
    maps = [
        4 * golden.uniform(f"res{s + 2}", (2, channels, *size))
        for s, (channels, size) in enumerate(zip(Maps.out_channels, sizes))
    ]
    return golden.filled(lambda: MaskFormer(Maps(maps), 19), original_key)


@pytest.mark.slow
def test_heads_give_the_numbers_of_the_original_code():
    with torch.no_grad():
        class_logits, mask_logits = filled().predict(torch.zeros(2, 3, 97, 130)).layer(-1)
    assert class_logits.shape == (2, 100, 20)
    assert mask_logits.shape == (2, 100, 25, 33)
    for values, total, digits, probes in (
        (class_logits, 1556.001, 3, [1.54498, -0.48572, -0.02112, 2.25059, 0.36828]),
        (mask_logits, -1244712.84, 2, [1.13768, -7.01633, -0.81026, -6.35511, -9.08278]),
    ):
        flat = values.flatten()
        # 1556.001 is the rounded 1556.0015.
        assert flat.sum().item() == pytest.approx(total, abs=0.51 * 10.0**-digits)
        step = len(flat) // 5 + 3
        assert [round(flat[k * step].item(), 5) for k in range(5)] == probes


# transformers


# Channels of the decoders. The default of 256 takes longer. At 64, which the last map of Swin has,
# transformers leaves out the projection of that map.
DIM = 96
IMAGES = (2, 3, 67, 101)
TOLERANCE = 1e-11


def build(name, randomize):
    """Return a small MaskFormer of transformers and ours with its weights, all tensors random."""
    pytest.importorskip("transformers")
    from transformers import (
        MaskFormerConfig,
        MaskFormerForInstanceSegmentation,
        ResNetConfig,
        SwinConfig,
    )

    stages = [f"stage{n}" for n in range(1, 5)]
    if name == "swin":
        backbone = SwinConfig(**TINY_SWIN, out_features=stages)
        encoder = SwinEncoder("swin_tiny_patch4_window7_224", **TINY_SWIN)
    else:
        backbone = ResNetConfig(
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            out_features=stages,
        )
        encoder = TimmEncoder("resnet18")
    config = MaskFormerConfig(
        backbone_config=backbone, num_labels=5, fpn_feature_size=DIM, mask_feature_size=DIM
    )
    config.decoder_config.d_model = DIM
    config.decoder_config.decoder_layers = 3
    config.decoder_config.num_queries = 7
    config.decoder_config.decoder_ffn_dim = 32
    model = randomize(MaskFormerForInstanceSegmentation(config)).eval()
    model.criterion.empty_weight[:] = 1
    model.criterion.empty_weight[-1] = 0.1
    network = MaskFormer(encoder, 5, 7, DIM, decoder_layers=3, decoder_mlp_dim=32).double().eval()
    tensors, _, unknown = own_keys(model.state_dict())
    assert unknown == []
    network.load_state_dict(tensors)
    return model, network


@pytest.fixture(scope="module")
def reference(randomize):
    """Function name of the backbone -> what :func:`build` returns, and images. Built once."""
    built = {}

    def get(name):
        torch.manual_seed(0)
        if name not in built:
            built[name] = *build(name, randomize), torch.randn(*IMAGES, dtype=torch.float64)
        return built[name]

    return get


def layers_of(model, images):
    """Return class logits and mask logits after each layer of transformers' decoder."""
    outputs = model(images, output_hidden_states=True)
    norm = model.model.transformer_module.decoder.layernorm
    inner = [norm(hidden) for hidden in outputs.transformer_decoder_hidden_states[1:-1]]
    queries = [*inner, outputs.transformer_decoder_last_hidden_state]
    pixels = outputs.pixel_decoder_last_hidden_state
    return [
        (
            model.class_predictor(query),
            torch.einsum("bqc,bchw->bqhw", model.mask_embedder(query), pixels),
        )
        for query in queries
    ]


@pytest.fixture(scope="module")
def layers_of_swin(reference):
    """What :func:`layers_of` returns for the model with Swin."""
    model, _, images = reference("swin")
    with torch.no_grad():
        return layers_of(model, images)


def difference(result, expected):
    return ((result - expected).abs().max() / expected.abs().max()).item()


def compare_layers(network, images, expected):
    """Return the largest relative difference of a network's predictions after every layer."""
    with torch.no_grad():
        found = list(network.predict(images).layers())
    assert len(found) == len(expected) == 3
    return max(
        difference(ours, theirs)
        for pair, other in zip(found, expected)
        for ours, theirs in zip(pair, other)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_predictions_of_all_layers_equal_those_of_transformers(name, reference):
    model, network, images = reference(name)
    with torch.no_grad():
        expected = layers_of(model, images)
    assert compare_layers(network, images, expected) < TOLERANCE


def some_labels():
    coarse = torch.randint(5, (2, 1, 4, 5)).float()
    labels = F.interpolate(coarse, IMAGES[2:])[:, 0].long()
    labels[:, :9] = IGNORE
    return labels


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_loss_and_gradients_equal_those_of_transformers(name, reference):
    model, network, images = reference(name)
    labels = some_labels()
    classes = [image[image != IGNORE].unique() for image in labels]
    masks = [(image == c[:, None, None]).double() for image, c in zip(labels, classes)]
    total = 0
    for class_logits, mask_logits in layers_of(model, images):
        terms = model.criterion(mask_logits, class_logits, masks, classes)
        total = total + terms["loss_cross_entropy"]
        total = total + 20 * terms["loss_mask"] + terms["loss_dice"]
    for module in (model, network):
        module.zero_grad()
    total.backward()
    loss = network.training_loss(images, labels, nn.CrossEntropyLoss(), IGNORE)
    loss.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)
    gradients = {
        key: torch.zeros_like(p) if p.grad is None else p.grad
        for key, p in model.named_parameters()
    }
    wanted, _, _ = own_keys(gradients)
    found = {key: parameter.grad for key, parameter in network.named_parameters()}
    assert found.keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for key, gradient in found.items():
        assert (gradient - wanted[key]).abs().max() < 1e-10 * largest, key


@pytest.mark.slow
def test_scores_equal_those_of_transformers(reference):
    model, network, images = reference("swin")
    from transformers import MaskFormerImageProcessor

    with torch.no_grad():
        outputs = model(images)
    maps = MaskFormerImageProcessor().post_process_semantic_segmentation(
        outputs, target_sizes=[IMAGES[2:]] * 2, return_segmentation_scores=True
    )
    expected = torch.stack([image["segmentation_scores"] for image in maps])
    found = predict_probabilities(network, images, IMAGES[2:])
    torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True))


def swapped_axes(height, width, dim, like):
    table = sine_positions(height, width, dim, like)
    return torch.cat([table[:, dim // 2 :], table[:, : dim // 2]], dim=1)


def bilinear(*arguments, interpolate=F.interpolate, mode=None, **settings):
    return interpolate(*arguments, mode="bilinear", **settings)


def values_with_positions(layer, x, query_pos, keys, values, forward=DecoderLayer.forward):
    return forward(layer, x, query_pos, keys, keys)


def no_query_positions(layer, x, pos, keys, values, forward=DecoderLayer.forward):
    return forward(layer, x, 0 * pos, keys, values)


FAULTS = {
    "rows and columns": (maskformer_decoders, "sine_positions", swapped_axes),
    "bilinear pixel decoder": (F, "interpolate", bilinear),
    "positions in values": (DecoderLayer, "forward", values_with_positions),
    "no query positions": (DecoderLayer, "forward", no_query_positions),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_detected(fault, reference, layers_of_swin, monkeypatch):
    _, network, images = reference("swin")
    assert compare_layers(network, images, layers_of_swin) < TOLERANCE
    monkeypatch.setattr(*FAULTS[fault])
    with torch.no_grad():
        _, mask_logits = network.predict(images).layer(-1)
    assert difference(mask_logits, layers_of_swin[-1][1]) > 1e-6


@pytest.mark.slow
def test_other_planted_faults_are_detected(reference, layers_of_swin):
    _, network, images = reference("swin")
    decoder = network.transformer_decoder
    for module, attribute, value in (
        (decoder, "norm", nn.Identity()),
        (decoder.layers[0].norm1, "eps", 1e-6),
        (network.pixel_decoder.fusions[1][1], "num_groups", 16),
        (network.mask_head, "1", nn.GELU()),
        (decoder.layers[1].self_attn, "num_heads", 4),
    ):
        kept = getattr(module, attribute)
        setattr(module, attribute, value)
        assert compare_layers(network, images, layers_of_swin) > 1e-9, attribute
        setattr(module, attribute, kept)
    assert compare_layers(network, images, layers_of_swin) < TOLERANCE
