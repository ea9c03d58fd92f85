"""Files of classification networks in the encoders of segmenters."""

import re

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.swin_transformer import checkpoint_filter_fn
from torch import nn

from segformer_pl.checkpoints import load_weights
from segformer_pl.checkpoints.sources import Weights
from segformer_pl.errors import UserError
from segformer_pl.models import (
    SETR,
    SegFormer,
    SeMaskFPN,
    SwinEncoder,
    TimmEncoder,
    ViTEncoder,
)

SWIN = "swin_tiny_patch4_window7_224"
SMALL = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}


def vit_file():
    """State dict of a classifier of 160x160 pixels: a class token and 10x10 patches, 6 blocks."""
    return timm.create_model("test_vit", num_classes=7).state_dict()


def setr(image_size=64, **arguments):
    encoder = ViTEncoder("test_vit", image_size, out_indices=(1, 3), **arguments)
    return SETR(encoder, 3, "naive", decoder_dim=8)


@pytest.mark.slow
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("size", [(160, 160), (64, 64), (48, 80)], ids=str)
def test_vision_transformer(class_token, size):
    source = vit_file()
    network = setr(size, class_token=class_token)
    head = network.head.classifier.weight.clone()
    report = load_weights(network, source, parts="encoder")
    assert torch.equal(network.head.classifier.weight, head)
    # An encoder of the file's size resamples its table in the forward pass.
    original = ViTEncoder("test_vit", 160, (1, 3), class_token)
    load_weights(original, source, parts="encoder")
    images = torch.randn(1, 3, *size)
    for one, other in zip(network.encoder.eval()(images), original.eval()(images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    text = str(report)
    assert re.search(r"left out: \S+blocks.4.norm1.weight, .*: the encoder uses 4 blocks", text)
    assert re.search(r"left out: .*norm.weight.*: only the encoder was asked for", text)
    assert ("bilinearly from a grid of 10x10" in text) == (size != (160, 160))
    assert ("without the rows of 1 prefix tokens" in text) != class_token


@pytest.mark.slow
def test_resampled_table_is_that_of_timm():
    source = vit_file()
    network = setr((48, 80))
    load_weights(network, source, parts="encoder")
    expected = resample_abs_pos_embed(
        source["pos_embed"], (3, 5), interpolation="bilinear", antialias=False
    )
    torch.testing.assert_close(network.encoder.backbone.pos_embed, expected)


@pytest.mark.slow
def test_table_of_a_segmenter_at_another_size():
    """The grid of 3x12 is stated; that of 6x6 has as many patches."""
    trained = setr((48, 192))
    torch.nn.init.normal_(trained.encoder.backbone.pos_embed)
    network = setr(96)
    weights = Weights("it", trained.state_dict(), task={"network": trained.spec()})
    report = load_weights(network, weights, parts="encoder")
    (rule,) = report.resampled.values()
    assert rule == "bilinearly from a grid of 3x12 to 6x6 patches"
    expected = resample_abs_pos_embed(
        trained.encoder.backbone.pos_embed,
        (6, 6),
        old_size=(3, 12),
        interpolation="bilinear",
        antialias=False,
    )
    torch.testing.assert_close(network.encoder.backbone.pos_embed, expected)


def swin_file(is_older):
    """State dict of a classifier: timm's, or with the keys and buffers of Microsoft's files."""
    state = timm.create_model(SWIN, num_classes=7, **SMALL).state_dict()
    if not is_older:
        return state
    older = {
        re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", key).replace(
            "head.fc.", "head."
        ): tensor
        for key, tensor in state.items()
    }
    block = "layers.2.blocks.1"
    return older | {
        f"{block}.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
        f"{block}.attn_mask": torch.zeros(4, 16, 16),
    }


@pytest.mark.slow
@pytest.mark.parametrize("is_older", [True, False])
def test_swin(is_older):
    source = swin_file(is_older)
    network = SeMaskFPN(SwinEncoder(SWIN, **SMALL), 3, decoder_dim=8)
    torch.nn.init.constant_(network.encoder.layers[1].norm.weight, 3.0)
    report = load_weights(network, source, parts="encoder")
    model = timm.create_model(SWIN, num_classes=7, **SMALL)
    expected = checkpoint_filter_fn(source, model) if is_older else source
    own = network.encoder.state_dict()
    norms = {f"layers.{s}.norm.{name}" for s in range(4) for name in ("weight", "bias")}
    assert own.keys() - expected.keys() == norms
    assert all(torch.equal(own[key], expected[key]) for key in own.keys() - norms)
    assert torch.equal(own["layers.1.norm.weight"], torch.full((16,), 3.0))
    assert set(report.initialized) == {f"encoder.{key}" for key in norms}
    text = str(report)
    assert "left as initialised: encoder.layers.0.norm.weight" in text
    assert ("it is computed from the size of the window" in text) == is_older


@pytest.mark.slow
def test_norms_of_the_maps_are_not_left_out_where_some_are_there():
    network = SeMaskFPN(SwinEncoder(SWIN, **SMALL), 3, decoder_dim=8)
    state = network.state_dict()
    del state["encoder.layers.1.norm.weight"]
    with pytest.raises(UserError, match=r"lacks 1 tensor of the model .*layers.1.norm.weight"):
        load_weights(network, state, parts="encoder")


@pytest.mark.slow
def test_weights_of_another_backbone_are_refused():
    network = setr()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    for source in (swin_file(False), timm.create_model("resnet18").state_dict()):
        with pytest.raises(UserError, match="give") as raised:
            load_weights(network, source, parts="encoder")
        assert "\n" not in str(raised.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("out_indices", [None, (0, 2)], ids=str)
@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout"])
def test_backbone_whose_sequences_timm_takes_apart(name, out_indices, randomize):
    """ConvNeXt's ``stages.0`` is called ``stages_0`` where timm returns feature maps."""
    model = randomize(timm.create_model(name, num_classes=7)).float().eval()
    network = SegFormer(TimmEncoder(name, out_indices=out_indices), 3, 8)
    indices = network.encoder.out_indices
    report = load_weights(network, model.state_dict(), parts="encoder")
    assert report.num_tensors == len(network.encoder.state_dict())
    assert any(key.startswith("encoder.backbone.head.") for key in report.dropped)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = network.encoder.eval()(images)
        expected = model.forward_intermediates(images, list(indices), intermediates_only=True)
    for one, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_file_that_lacks_tensors_of_such_a_backbone_is_refused():
    source = timm.create_model("test_convnext").state_dict()
    del source["stages.2.blocks.0.conv_dw.weight"]
    network = SegFormer(TimmEncoder("test_convnext"), 3, 8)
    with pytest.raises(
        UserError, match=r"lacks 1 tensor of .*stages_2\.blocks\.0\.conv_dw\.weight"
    ):
        load_weights(network, source, parts="encoder")


@pytest.mark.slow
@pytest.mark.parametrize("is_alone", [True, False])
@pytest.mark.parametrize("kind", ["convnext", "vit", "swin"])
def test_a_backbone_that_was_trained_in_data_parallel(kind, is_alone):
    """The keys start with ``module.``, those of a classifier and those of an encoder alone."""
    name = {"convnext": "test_convnext", "vit": "test_vit", "swin": SWIN}[kind]
    arguments = SMALL if kind == "swin" else {}
    network = {
        "convnext": lambda: SegFormer(TimmEncoder(name), 3, 8),
        "vit": lambda: setr(160),
        "swin": lambda: SeMaskFPN(SwinEncoder(name, **arguments), 3, decoder_dim=8),
    }[kind]
    source = network().encoder if is_alone else timm.create_model(name, **arguments)
    plain, wrapped = network(), network()
    load_weights(plain, source.state_dict(), parts="encoder")
    report = load_weights(wrapped, nn.DataParallel(source).state_dict(), parts="encoder")
    expected = plain.encoder.state_dict()
    assert report.num_tensors == len(expected) - len(report.initialized)
    for key, tensor in wrapped.encoder.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.slow
def test_a_wrapped_backbone_of_another_kind_is_refused():
    other = nn.DataParallel(timm.create_model("resnet18")).state_dict()
    with pytest.raises(UserError, match=r"holds no tensor of a SETR .*such as module\.conv1"):
        load_weights(setr(), other, parts="encoder")
    deeper = nn.DataParallel(SegFormer(TimmEncoder("test_convnext"), 3, 8).encoder).state_dict()
    deeper["module.backbone.stages_9.weight"] = torch.zeros(2)
    with pytest.raises(UserError, match=r"no place for \(encoder\.backbone\.stages_9\.weight\)"):
        load_weights(SegFormer(TimmEncoder("test_convnext"), 3, 8), deeper, parts="encoder")
