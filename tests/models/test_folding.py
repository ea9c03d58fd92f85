"""A network that is folded for inference computes the same, and the original stays as it is."""

import copy

import pytest
import torch
from torch import nn

from segformer_pl import models
from segformer_pl.models import SegFormer
from segformer_pl.models.folding import fold_batch_norms, fold_layer_norm
from segformer_pl.models.mit import MixTransformer

VIT = {"backbone": "test_vit", "image_size": 32, "out_indices": [0, 1], "decoder_dim": 8}
SWIN = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
DETR = {"decoder_dim": 64, "decoder_layers": 1, "decoder_heads": 2, "decoder_mlp_dim": 16}


def segformer(in_indices=(0, 1, 2, 3), **arguments):
    encoder = MixTransformer((4, 4, 8, 8), (1, 1, 1, 1), (1, 1, 2, 2), **arguments)
    return SegFormer(encoder, 3, 8, in_indices)


NETWORKS = {
    "segformer": segformer,
    "segformer, border kept": lambda: segformer(kv_border="keep"),
    "segformer, merged queries": lambda: segformer(merged_queries=(0.5, 0.5, 1, 0)),
    "segformer, two stages": lambda: segformer(in_indices=(1, 3)),
    "segformer, one stage": lambda: segformer(in_indices=(3,)),
    "setr_pup": lambda: models.setr_pup(3, **VIT),
    "semask_fpn": lambda: models.semask_fpn(3, decoder_dim=8, **SWIN),
    "maskformer": lambda: models.maskformer(3, backbone="test_resnet", num_queries=4, **DETR),
    "deeplabv3plus": lambda: models.deeplabv3plus(3, backbone="test_resnet", decoder_dim=8),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_equal_and_the_network_stays(name, randomize):
    network = randomize(NETWORKS[name]())
    state = copy.deepcopy(network.state_dict())
    size = (32, 48) if name == "setr_pup" else (37, 53)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    folded = network.for_inference()
    assert network.training
    assert not folded.training
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    network.eval()
    with torch.no_grad():
        expected, found = network(images), folded(images)
        maps, folded_maps = network.feature_maps(images), folded.feature_maps(images)
        again = folded.for_inference()(images)
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    assert torch.equal(again, found)
    assert list(maps) == list(folded_maps)
    for key, feature_map in maps.items():
        assert torch.allclose(folded_maps[key], feature_map, 1e-9, 1e-9), key


def norms(network):
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_what_is_folded():
    network = segformer()
    folded = network.for_inference()
    assert norms(folded) == []
    assert sum(p.numel() for p in folded.head.parameters()) < 0.6 * sum(
        p.numel() for p in network.head.parameters()
    )
    weighted = [
        name
        for name, module in folded.encoder.named_modules()
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine
    ]
    # The maps of these are added to, or padded by the next stage.
    assert sorted(weighted) == sorted(
        f"stages.{s}.{norm}" for s in range(4) for norm in ("norm", "patch_embed.norm")
    )
    assert norms(models.deeplabv3plus(3, backbone="test_resnet").for_inference().decoder) == []


@torch.no_grad()
def test_a_bias_behind_a_padding_must_not_be_folded(randomize):
    """The planted fault of folding a LayerNorm into a padded convolution is seen at the border."""
    norm, reader = randomize(nn.LayerNorm(4)), randomize(nn.Conv2d(4, 4, 3, padding=1))
    x = torch.randn(1, 6, 6, 4, dtype=torch.float64)
    expected = reader(norm(x).permute(0, 3, 1, 2))
    fold_layer_norm(norm, reader)
    errors = (reader(norm(x).permute(0, 3, 1, 2)) - expected).abs().amax((0, 1))
    assert errors[1:-1, 1:-1].max() < 1e-12
    assert errors[0].min() > 1e-3


@torch.no_grad()
def test_a_batch_norm_is_folded_only_behind_a_convolution(randomize):
    module = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    module.append(nn.BatchNorm2d(4))
    randomize(module).eval()
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    expected = module(x)
    fold_batch_norms(module)
    assert [type(child) for child in module] == [
        *(nn.BatchNorm2d, nn.ReLU, nn.BatchNorm2d, nn.Conv2d, nn.Identity)
    ]
    assert (module(x) - expected).abs().max() < 1e-12
