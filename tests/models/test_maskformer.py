"""MaskFormer: sizes, the contract, gradients, arguments."""

import importlib

import jsonargparse
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segformer_pl.checkpoints.networks import build
from segformer_pl.errors import UserError
from segformer_pl.inference import predict_pixels
from segformer_pl.models import TimmEncoder, ViTEncoder
from segformer_pl.models.maskformer import MaskFormer, Predictions
from segformer_pl.models.maskformer_decoders import sine_positions
from segformer_pl.models.maskformer_loss import MaskClassificationLoss
from segformer_pl.models.segmenter import check_segmenter
from segformer_pl.models.swin import SwinEncoder
from segformer_pl.models.timm_models import on_meta
from segformer_pl.optim import parameter_groups
from tests.models.counting import executed_gmacs

# The package has a function of the same name.
maskformer = importlib.import_module("segformer_pl.models.maskformer")

SWIN, SWIN_S = "swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224"
SWIN_B, SWIN_L = "swin_base_patch4_window12_384", "swin_large_patch4_window12_384"
SMALL = {"num_queries": 7, "decoder_dim": 64, "decoder_layers": 2, "decoder_mlp_dim": 32}
TINY_SWIN = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}
IGNORE = 255


def small_swin(num_classes=5, **arguments):
    encoder = SwinEncoder(SWIN, drop_path_rate=0.1, **TINY_SWIN)
    return MaskFormer(encoder, num_classes, **(SMALL | arguments))


def loss_of(network, images, target):
    return network.training_loss(images, target, nn.CrossEntropyLoss(), IGNORE)


def some_labels(batch, height, width, num_classes=5):
    coarse = torch.randint(num_classes, (batch, 1, 4, 5)).float()
    return F.interpolate(coarse, (height, width))[:, 0].long()


# Counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "backbone", "at_150", "at_19", "size", "gmacs"),
    [
        ("maskformer", "resnet50", 41_307_863, 41_274_196, 512, 50.8),
        ("maskformer", "resnet101", 60_299_991, 60_266_324, 512, 70.1),
        ("maskformer_swin", SWIN, 41_757_009, 41_723_342, 512, 52.9),
        ("maskformer_swin", SWIN_S, 63_074_913, 63_041_246, 512, 76.6),
        ("maskformer_swin", SWIN_B, 101_829_391, 101_795_724, 640, 191.3),
        ("maskformer_swin", SWIN_L, 211_575_627, 211_541_960, 640, 370.9),
    ],
)
def test_cost_of_the_variants(variant, backbone, at_150, at_19, size, gmacs):
    """Parameters of the original's modules, and multiply-adds with the masks of all six layers.

    The multiply-adds of the paper are 1-4 % higher, as they count norms and upsampling.
    """
    with on_meta():
        network = getattr(maskformer, variant)(150, backbone)
    assert sum(p.numel() for p in network.parameters()) == at_150
    executed = executed_gmacs(network, (size, size), lambda x: list(network.predict(x).layers()))
    network.class_head = nn.Linear(256, 20)
    assert sum(p.numel() for p in network.parameters()) == at_19
    assert executed == pytest.approx(gmacs, rel=0.01)


# Contract


def test_scores_are_computed_from_the_feature_maps(randomize):
    network = randomize(small_swin()).eval()
    check_segmenter(network)
    images = torch.randn(2, 3, 133, 101, dtype=torch.float64)
    with torch.no_grad():
        maps, scores = network.feature_maps(images), network(images)
        queries = network.transformer_decoder(maps["stage4"])
        masks = network.mask_head(queries)
        predictions = Predictions(network.class_head(queries), masks, maps["head"])
        class_logits, mask_logits = predictions.layer(-1)
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        "stage1": (2, 8, 34, 26),
        "stage2": (2, 16, 17, 13),
        "stage3": (2, 32, 9, 7),
        "stage4": (2, 64, 5, 4),
        "head": (2, 64, 34, 26),
    }
    assert scores.shape == (2, 5, 34, 26)
    assert (scores >= 0).all()
    assert (scores.sum(1) <= 7).all()
    probabilities = class_logits.softmax(2)
    expected = sum(
        probabilities[:, q, :5, None, None] * mask_logits[:, q, None].sigmoid() for q in range(7)
    )
    torch.testing.assert_close(scores, expected)


def test_confidence_is_the_share_of_the_scores(randomize):
    """A softmax of scores between 0 and Q would be nearly uniform."""
    network = randomize(small_swin()).eval()
    images, target = torch.randn(1, 3, 64, 96, dtype=torch.float64), some_labels(1, 64, 96)
    with torch.no_grad():
        scores = F.interpolate(network(images), size=(64, 96), mode="bilinear")
    share = scores / scores.sum(1, keepdim=True)
    pixels = predict_pixels(network, images, target, IGNORE)
    torch.testing.assert_close(pixels.confidence, share.amax(1))
    assert torch.equal(pixels.labels, scores.argmax(1))
    torch.testing.assert_close(pixels.losses, -share.gather(1, target[:, None])[:, 0].log())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resnet", "swin"])
@pytest.mark.parametrize("has_labels", [True, False])
def test_every_parameter_gets_a_gradient(kind, has_labels):
    """Also if no image of the batch has a label."""
    network = small_swin() if kind == "swin" else MaskFormer(TimmEncoder("test_resnet"), 5, **SMALL)
    target = some_labels(2, 64, 96) if has_labels else torch.full((2, 64, 96), IGNORE)
    loss_of(network.train(), torch.randn(2, 3, 64, 96), target).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    # With other strides DistributedDataParallel would copy the gradients in every step.
    assert [n for n, p in network.named_parameters() if p.grad.stride() != p.stride()] == []


def test_every_parameter_changes_the_scores(randomize):
    network = randomize(small_swin()).eval()
    scores = network(torch.randn(2, 3, 64, 96, dtype=torch.float64))
    F.nll_loss(scores, torch.randint(5, (2, 16, 24))).backward()
    for name, parameter in network.named_parameters():
        gradient = parameter.grad
        if ".layers.0.self_attn.in_proj" in name:
            # The queries are zeros before the first layer, so their values are all its bias.
            if name.endswith("weight"):
                continue
            gradient = gradient[128:]
        assert (gradient != 0).any(), name


@pytest.mark.slow
def test_half_precision_training():
    network = small_swin().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(network, torch.randn(2, 3, 64, 96), some_labels(2, 64, 96))
        with torch.no_grad():
            assert network(torch.randn(1, 3, 64, 96)).isfinite().all()
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.slow
def test_frozen_batch_norm():
    network = MaskFormer(TimmEncoder("test_resnet"), 5, freeze_batch_norm=True, **SMALL)
    norms = [m for m in network.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    before = {key: tensor.clone() for key, tensor in network.encoder.state_dict().items()}
    for mode in (True, False, True):
        network.train(mode)
        assert network.transformer_decoder.training is mode
        assert not any(norm.training for norm in norms)
    loss_of(network, torch.randn(2, 3, 64, 96), some_labels(2, 64, 96)).backward()
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert len(frozen) == 2 * len(norms) == 30
    assert {name for name, p in network.named_parameters() if p.grad is None} == frozen
    groups = parameter_groups(network, 0.1, 0.1, 1.0)
    torch.optim.AdamW(groups).step()
    for key, tensor in network.encoder.state_dict().items():
        is_frozen = f"encoder.{key}" in frozen or "running" in key or "num_batches" in key
        assert torch.equal(tensor, before[key]) == is_frozen, key
    free = MaskFormer(TimmEncoder("test_resnet"), 5, **SMALL)
    free.load_state_dict(network.state_dict())
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(network).train()
    assert not any(m.training for m in synchronized.modules() if isinstance(m, nn.SyncBatchNorm))


def test_parameter_groups():
    network = small_swin()
    names = {name for name, _ in network.named_parameters()}
    undecayed = network.no_weight_decay()
    assert undecayed < names
    assert {"transformer_decoder.query_pos.weight", "pixel_decoder.fusions.0.1.bias"} < undecayed
    assert "transformer_decoder.layers.0.norm2.weight" in undecayed
    assert "encoder.layers.0.blocks.0.attn.relative_position_bias_table" in undecayed
    assert not {name for name in undecayed if "class_head" in name or "mask_head" in name}
    assert {name.split(".")[0] for name in names - network.layer_ids().keys()} == {
        "pixel_decoder",
        "transformer_decoder",
        "class_head",
        "mask_head",
    }
    paths = [f"{path}." for path in network.parts().values()]
    assert all(sum(name.startswith(path) for path in paths) == 1 for name in names)


def test_init_args_rebuild_the_network(randomize):
    settings = {"dropout": 0.3, "mask_weight": 2.0, "dice_weight": 3.0, "no_object_weight": 0.5}
    network = small_swin(decoder_heads=4, ignored_pixels="left_out", **settings)
    again = build(network.spec(), "spec()")
    assert again.init_args() == network.init_args()
    assert again.loss == network.loss == MaskClassificationLoss(5, 2.0, 3.0, 0.5, "left_out")
    randomize(network).eval()
    again.double().eval().load_state_dict(network.state_dict())
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(again(images), network(images))


def test_positions():
    """The formula of DETR, entry by entry."""
    table = sine_positions(3, 4, 8, torch.empty(0, dtype=torch.float64)).unflatten(0, (3, 4))
    row, column = 2 * np.pi * 2 / (3 + 1e-6), 2 * np.pi * 4 / (4 + 1e-6)
    expected = [
        f(a / 10_000 ** (e / 4)) for a in (row, column) for e in (0, 2) for f in (np.sin, np.cos)
    ]
    np.testing.assert_allclose(table[1, 3], expected, atol=1e-14)
    half = sine_positions(3, 4, 8, torch.empty(0, dtype=torch.bfloat16))
    torch.testing.assert_close(half, table.flatten(0, 1).bfloat16(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"decoder_dim": 100}, "decoder_dim=100: give at least 64, and a multiple of 32"),
        ({"decoder_dim": 32}, "decoder_dim=32: give at least 64"),
        ({"decoder_heads": 3}, "of decoder_heads=3"),
        ({"num_queries": 0}, "num_queries=0: give at least 1"),
        ({"decoder_layers": 0}, "decoder_layers=0"),
        (
            {"freeze_batch_norm": True},
            "freeze_batch_norm is true, but SwinEncoder has no BatchNorm",
        ),
        ({"mask_weight": -1.0}, "mask_weight=-1.0"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        small_swin(**settings)


@pytest.mark.slow
def test_an_encoder_with_a_single_map_is_refused():
    encoder = TimmEncoder("test_resnet", out_indices=(4,))
    with pytest.raises(UserError, match=r"strides 16, 16, 16, 16, and .* one of each stride"):
        MaskFormer(ViTEncoder("vit_tiny_patch16_224", 32), 3)
    with pytest.raises(UserError, match="single feature map, of stride 32"):
        MaskFormer(encoder, 5)


@pytest.mark.slow
def test_variants_in_an_experiment_file():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MaskFormer, "network")

    def network(function, **arguments):
        spec = {
            "class_path": f"segformer_pl.models.maskformer.{function}",
            "init_args": {"num_classes": 5, **arguments},
        }
        return parser.instantiate(parser.parse_object({"network": spec})).network

    resnet = network("maskformer", backbone="test_resnet", num_queries=9, in_channels=4)
    assert resnet.encoder.in_channels == resnet.in_channels == 4
    assert resnet.transformer_decoder.query_pos.num_embeddings == 9
    swin = network("maskformer_swin", decoder_dim=64, embed_dim=8, num_heads=[1, 2, 4, 8])
    assert swin.encoder.out_channels == (8, 16, 32, 64)
    for wrong in ({"nam": 1}, {"name": "resnet18"}, {"ignored_pixels": "skip"}):
        with pytest.raises(jsonargparse.ArgumentError, match=next(iter(wrong))):
            network("maskformer", **wrong)
