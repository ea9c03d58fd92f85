"""Sizes, gradients and command-line arguments of SegFormer."""

import jsonargparse
import pytest
import torch
from torch.nn import functional as F

from segformer_pl.models import (
    SegFormer,
    segformer_b0,
    segformer_b1,
    segformer_b2,
    segformer_b3,
    segformer_b4,
    segformer_b5,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "at_150", "at_19"),
    [
        (segformer_b0, 3_752_694, 3_719_027),
        (segformer_b1, 13_715_798, 13_682_131),
        (segformer_b2, 27_461_974, 27_361_235),
        (segformer_b3, 47_337_814, 47_237_075),
        (segformer_b4, 64_108_374, 64_007_635),
        (segformer_b5, 84_708_694, 84_607_955),
    ],
)
def test_variants_have_the_parameters_of_the_paper(variant, at_150, at_19):
    with torch.device("meta"):
        assert sum(p.numel() for p in variant(150).parameters()) == at_150
        assert sum(p.numel() for p in variant(19).parameters()) == at_19
        changed = variant(
            19, decoder_dim=8, in_indices=(1, 3), dropout=0.3, mlp_ratio=2, in_channels=4
        )
    assert changed.head.fuse.weight.shape == (8, 16, 1, 1)
    assert changed.head.dropout.p == 0.3
    assert changed.encoder.stages[0].patch_embed.proj.in_channels == 4
    mlp = changed.encoder.stages[3].blocks[0].mlp
    assert mlp.fc1.out_features == 2 * mlp.fc1.in_features


def test_logits_have_stride_4():
    network = segformer_b0(150).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 512, 512)).shape == (1, 150, 128, 128)


def test_logits_are_computed_from_the_feature_maps(randomize):
    network = randomize(segformer_b0(5, decoder_dim=16)).eval()
    images = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    with torch.no_grad():
        maps = network.feature_maps(images)
        logits = network(images)
        from_head = network.head.classify(maps["head"])
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        "stage1": (2, 32, 17, 25),
        "stage2": (2, 64, 9, 13),
        "stage3": (2, 160, 5, 7),
        "stage4": (2, 256, 3, 4),
        "head": (2, 16, 17, 25),
    }
    assert list(maps) == ["stage1", "stage2", "stage3", "stage4", "head"]
    torch.testing.assert_close(from_head, logits)
    torch.testing.assert_close(network.head(list(maps.values())[:4]), logits)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"in_indices": (3,)},
        {"in_indices": (0, 3)},
        {"sr_ratios": (1, 1, 1, 1)},
        {"pos_encoding": "none"},
        {"pos_encoding": "learned", "image_size": 32},
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient_in_training(arguments):
    network = segformer_b0(5, decoder_dim=16, **arguments).train()
    network(torch.randn(2, 3, 32, 64)).sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "arguments", [{}, {"pos_encoding": "learned", "image_size": 64}], ids=["mix_ffn", "learned"]
)
def test_every_parameter_changes_the_result(randomize, arguments):
    # With batch statistics, BatchNorm would cancel a bias before it, so use the running ones.
    network = randomize(segformer_b0(5, decoder_dim=16, **arguments)).eval()
    logits = network(torch.randn(2, 3, 64, 96, dtype=torch.float64))
    F.cross_entropy(logits, torch.randint(5, (2, 16, 24))).backward()
    for name, parameter in network.named_parameters():
        gradient = parameter.grad
        if name.endswith("attn.kv.bias"):
            # A bias of the keys adds the same number to all attention logits of a query, which
            # softmax ignores. Only rounding remains.
            keys, gradient = gradient.chunk(2)
            assert keys.abs().max() < 1e-12 * gradient.abs().max(), name
        # ReLU may zero channels of the head; in the encoder every entry has an effect.
        has_effect = gradient != 0
        assert has_effect.any() if name.startswith("head.") else has_effect.all(), name


def test_state_dict_round_trip(randomize):
    source = randomize(segformer_b0(5, decoder_dim=16)).eval()
    target = randomize(segformer_b0(5, decoder_dim=16)).eval()
    images = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        assert not torch.allclose(target(images), source(images))
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target(images), source(images), rtol=0, atol=0)


# Variants in an experiment file


@pytest.fixture
def parser():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SegFormer, "network")
    return parser


def experiment(**arguments):
    init_args = {"num_classes": 5, **arguments}
    return {"network": {"class_path": "segformer_pl.models.segformer_b0", "init_args": init_args}}


def test_experiment_reaches_the_arguments_of_the_encoder(parser):
    config = parser.parse_object(
        experiment(sr_ratios=[4, 2, 1, 1], decoder_dim=16, pos_encoding="none")
    )
    network = parser.instantiate(config).network
    assert [stage.blocks[0].attn.sr_ratio for stage in network.encoder.stages] == [4, 2, 1, 1]
    assert network.head.classifier.in_channels == 16
    assert not [name for name, _ in network.named_parameters() if "dwconv" in name]


@pytest.mark.parametrize(
    "arguments",
    [
        {"sr_ratio": [4, 2, 1, 1]},  # misspelt
        {"embed_dims": [32, 64, 160, 256]},  # what makes it B0
        {"depths": [1, 1, 1, 1]},
        {"pos_encoding": "sinusoidal"},
        {"sr_ratios": "many"},
    ],
    ids=str,
)
def test_experiment_with_a_wrong_argument_is_refused(parser, arguments):
    with pytest.raises(jsonargparse.ArgumentError, match=next(iter(arguments))):
        parser.parse_object(experiment(**arguments))


def test_gradients_have_the_strides_of_their_parameters():
    """With other strides DistributedDataParallel copies them in every step, and warns."""
    network = segformer_b0(num_classes=5).train()
    network(torch.rand(2, 3, 64, 64)).sum().backward()
    differing = [n for n, p in network.named_parameters() if p.grad.stride() != p.stride()]
    assert differing == []
