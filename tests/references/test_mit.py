"""Comparison of the encoder's feature maps with those of mmsegmentation for the same weights."""

import pytest
import torch

from segformer_pl.checkpoints import load_weights
from segformer_pl.models import mit
from segformer_pl.models.mit_block import NormEps

TOLERANCE = 1e-11  # rounding errors are about 1e-15, the smallest planted fault is 1e-7
DEPTHS = {"b0": (32, [2, 2, 2, 2]), "b2": (64, [3, 4, 6, 3])}


def theirs(variant):
    from mmseg.models.backbones import MixVisionTransformer

    width, depths = DEPTHS[variant]
    # As in mmsegmentation's configs/_base_/models/segformer_mit-b0.py.
    return MixVisionTransformer(
        in_channels=3,
        embed_dims=width,
        num_stages=4,
        num_layers=depths,
        num_heads=[1, 2, 5, 8],
        patch_sizes=[7, 3, 3, 3],
        sr_ratios=[8, 4, 2, 1],
        out_indices=(0, 1, 2, 3),
        mlp_ratio=4,
        qkv_bias=True,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.1,
    )


def difference(results, expected):
    """Largest difference relative to the largest expected value, maximum over the stages."""
    assert [r.shape for r in results] == [e.shape for e in expected]
    return max(((r - e).abs().max() / e.abs().max()).item() for r, e in zip(results, expected))


@pytest.fixture(scope="module")
def reference(mmseg, randomize):
    """Function variant -> mmsegmentation's encoder and ours with the same weights, in float64."""

    def make(variant):
        torch.manual_seed(0)
        their_encoder = randomize(theirs(variant)).eval()
        encoder = getattr(mit, f"mit_{variant}")().double().eval()
        report = load_weights(encoder, their_encoder.state_dict())
        assert report.layout == "mmsegmentation backbone"
        return their_encoder, encoder

    return make


@pytest.mark.parametrize("variant", DEPTHS)
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (33, 47)])
@torch.no_grad()
def test_feature_maps(reference, variant, size):
    their_encoder, encoder = reference(variant)
    assert encoder.norm_eps == NormEps(1e-6, 1e-6)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    assert difference(encoder(images), their_encoder(images)) < TOLERANCE


def epsilon_of_nvlabs(encoder):
    encoder.norm_eps = NormEps(1e-6, 1e-5)


def keys_and_values_swapped(encoder):
    for stage in encoder.stages:
        for block in stage.blocks:
            rows = block.attn.kv.weight.data
            rows.copy_(torch.cat(rows.chunk(2)[::-1]))


def depthwise_kernels_flipped(encoder):
    for stage in encoder.stages:
        for block in stage.blocks:
            block.mlp.dwconv.weight.data.copy_(block.mlp.dwconv.weight.data.flip(3))


def stage_norm_not_loaded(encoder):
    encoder.stages[0].norm.reset_parameters()


@pytest.mark.parametrize(
    "fault",
    [
        epsilon_of_nvlabs,
        keys_and_values_swapped,
        depthwise_kernels_flipped,
        stage_norm_not_loaded,
    ],
)
@torch.no_grad()
def test_planted_faults_are_detected(reference, fault):
    their_encoder, encoder = reference("b0")
    images = torch.randn(1, 3, 65, 97, dtype=torch.float64)
    fault(encoder)
    assert difference(encoder(images), their_encoder(images)) > 100 * TOLERANCE
