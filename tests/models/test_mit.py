"""The Mix Transformer, compared with the formulas of the paper and the reference code."""

import math
import re

import pytest
import torch
from torch import nn

from segformer_pl.models import MixTransformer, mit_b0, mit_b1, mit_b2, mit_b3, mit_b4, mit_b5
from segformer_pl.models.mit import OverlapPatchEmbed, Stage

# Parameters of each stage, the same in the reference code and in transformers.
STAGE_PARAMETERS = {
    mit_b0: (164_096, 255_296, 930_080, 1_969_920),
    mit_b1: (639_488, 1_006_208, 3_682_880, 7_822_848),
    mit_b2: (954_368, 1_938_048, 10_308_160, 10_995_712),
    mit_b3: (954_368, 1_938_048, 30_184_000, 10_995_712),
    mit_b4: (954_368, 3_801_728, 45_090_880, 10_995_712),
    mit_b5: (954_368, 2_869_888, 66_623_040, 10_995_712),
}
ENCODER_PARAMETERS = {
    mit_b0: 3_319_392,
    mit_b1: 13_151_424,
    mit_b2: 24_196_288,
    mit_b3: 44_072_128,
    mit_b4: 60_842_688,
    mit_b5: 81_443_008,
}
EVERY_VARIANT = pytest.mark.parametrize("variant", list(STAGE_PARAMETERS))


def tiny(**kwargs):
    """The smallest encoder with every mechanism of the large ones: several heads, reduction."""
    arguments = {
        "embed_dims": (4, 8, 12, 16),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 3, 4),
        "drop_path_rate": 0.0,
    }
    return MixTransformer(**(arguments | kwargs))


def blocks_of(encoder):
    return [block for stage in encoder.stages for block in stage.blocks]


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def sizes(features):
    return [tuple(feature.shape[2:]) for feature in features]


# Variants


@pytest.mark.slow
@EVERY_VARIANT
def test_number_of_parameters(variant):
    with torch.device("meta"):
        encoder = variant()
    assert tuple(num_parameters(stage) for stage in encoder.stages) == STAGE_PARAMETERS[variant]
    assert num_parameters(encoder) == ENCODER_PARAMETERS[variant]


@pytest.mark.parametrize(
    ("variant", "step"), [(mit_b0, 0.0142857), (mit_b2, 0.0066667), (mit_b5, 0.0019608)]
)
def test_drop_path_ramps_over_all_blocks(variant, step):
    with torch.device("meta"):
        rates = [block.drop_path.drop_prob for block in blocks_of(variant())]
        doubled = [block.drop_path.drop_prob for block in blocks_of(variant(drop_path_rate=0.2))]
    assert rates == pytest.approx([i * step for i in range(len(rates))], abs=1e-5)
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(0.1)
    assert doubled == pytest.approx([2 * rate for rate in rates])


@pytest.mark.slow
@EVERY_VARIANT
def test_epsilons_of_every_norm(variant):
    with torch.device("meta"):
        default, changed = variant(), variant(norm_eps=0.5)
    epsilons = {n: m.eps for n, m in default.named_modules() if isinstance(m, nn.LayerNorm)}
    after_a_convolution = {n for n in epsilons if "patch_embed" in n or "attn" in n}
    assert len(after_a_convolution) == 4 + len(blocks_of(default)) - len(default.stages[3].blocks)
    for name, module in changed.named_modules():
        if isinstance(module, nn.LayerNorm):
            expected = (1e-5, 1e-5) if name in after_a_convolution else (1e-6, 0.5)
            assert (epsilons[name], module.eps) == expected, name


def test_initialisation():
    encoder = mit_b0()
    modules = list(encoder.modules())
    linear = torch.cat([m.weight.flatten() for m in modules if isinstance(m, nn.Linear)])
    depthwise = torch.cat([block.mlp.dwconv.weight.flatten() for block in blocks_of(encoder)])
    stem = encoder.stages[0].patch_embed.proj.weight
    assert linear.std().item() == pytest.approx(0.02, rel=0.01)
    assert depthwise.std().item() == pytest.approx(0.4714, rel=0.02)
    assert stem.std().item() == pytest.approx(0.0357, rel=0.05)
    assert encoder.stages[1].patch_embed.proj.weight.std().item() == pytest.approx(
        math.sqrt(2 / (9 * 64)), rel=0.03
    )
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name


# Pyramid


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((65, 97), [(17, 25), (9, 13), (5, 7), (3, 4)]),
        ((96, 64), [(24, 16), (12, 8), (6, 4), (3, 2)]),
        ((29, 29), [(8, 8), (4, 4), (2, 2), (1, 1)]),
    ],
)
def test_shapes_of_the_pyramid(image, expected):
    encoder = mit_b0()
    with torch.no_grad():
        features = encoder(torch.randn(2, 3, *image))
    assert sizes(features) == expected
    assert [f.shape[:2] for f in features] == [(2, c) for c in (32, 64, 160, 256)]
    assert encoder.out_channels == (32, 64, 160, 256)
    assert encoder.out_strides == (4, 8, 16, 32)


def test_an_image_below_the_smallest_size_is_refused():
    with pytest.raises(ValueError, match=r"sr_ratio 8 is larger than the 7x10 token grid.*smaller"):
        mit_b0()(torch.zeros(1, 3, 28, 40))


def test_patches_without_overlap_tile_the_image():
    cut = {"patch_sizes": (4, 2, 2, 2), "strides": (4, 2, 2, 2)}
    images = torch.zeros(1, 3, 512, 512, device="meta")
    with torch.device("meta"):
        assert sizes(mit_b0(**cut)(images)) == [(n, n) for n in (128, 64, 32, 16)]
        assert sizes(mit_b0(**cut, paddings=(2, 1, 1, 1))(images))[0] == (129, 129)
        assert sizes(mit_b0()(images)) == [(n, n) for n in (128, 64, 32, 16)]


def test_four_channel_images():
    encoder = tiny(in_channels=4)
    images = torch.randn(1, 4, 32, 32)
    before = encoder(images)[0]
    images[:, 3] += 1
    assert not torch.allclose(encoder(images)[0], before)


def test_feature_maps_are_channels_last():
    for feature in tiny()(torch.randn(2, 3, 64, 96)):
        assert feature.is_contiguous(memory_format=torch.channels_last)


# Border of the token grid


def test_a_kept_border_changes_nothing_at_multiples_of_32(randomize):
    dropped, kept = randomize(tiny()), tiny(kv_border="keep").double()
    kept.load_state_dict(dropped.state_dict())
    for size, equal in (((64, 96), True), ((64, 80), False)):
        images = torch.randn(1, 3, *size, dtype=torch.float64)
        same = [torch.equal(a, b) for a, b in zip(dropped.eval()(images), kept.eval()(images))]
        assert all(same) == equal


def test_with_a_kept_border_the_grid_may_be_smaller_than_the_reduction():
    assert mit_b0(kv_border="keep")(torch.zeros(1, 3, 20, 28))[3].shape == (1, 256, 1, 1)


def test_unknown_kv_border_is_refused():
    with pytest.raises(ValueError, match="kv_border='pad': choose one of drop, keep"):
        tiny(kv_border="pad")


# Positional signal


def test_parameters_of_each_positional_encoding():
    with torch.device("meta"):
        networks = {
            "mix_ffn": tiny(),
            "learned": tiny(pos_encoding="learned", image_size=64),
            "none": tiny(pos_encoding="none"),
        }
    names = {kind: {n for n, _ in net.named_parameters()} for kind, net in networks.items()}
    depthwise = {n for n in names["mix_ffn"] if "dwconv" in n}
    tables = {n for n in names["learned"] if "pos_embed" in n}
    assert len(depthwise) == 2 * 4
    assert tables == {f"stages.{s}.pos_embed" for s in range(4)}
    assert names["mix_ffn"] - depthwise == names["none"] == names["learned"] - tables
    assert [tuple(stage.pos_embed.shape) for stage in networks["learned"].stages] == [
        (1, 4, 16, 16),
        (1, 8, 8, 8),
        (1, 12, 4, 4),
        (1, 16, 2, 2),
    ]


@pytest.mark.parametrize(
    ("pos_encoding", "image_size", "commutes"),
    [("none", None, True), ("mix_ffn", None, False), ("learned", 4, False)],
)
def test_only_a_positional_signal_depends_on_the_order_of_tokens(
    randomize, pos_encoding, image_size, commutes
):
    # With patches of one pixel and no reduction, only the positional signal depends on position.
    # Without it, shuffling the pixels shuffles the features and changes none of them.
    encoder = randomize(
        tiny(
            patch_sizes=(1, 1, 1, 1),
            strides=(1, 1, 1, 1),
            sr_ratios=(1, 1, 1, 1),
            pos_encoding=pos_encoding,
            image_size=image_size,
        )
    )
    images = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    order = torch.randperm(20)
    shuffled = encoder(images.flatten(2)[..., order].view_as(images))
    for feature, expected in zip(shuffled, encoder(images)):
        same = torch.allclose(feature.flatten(2), expected.flatten(2)[..., order], rtol=1e-9)
        assert same == commutes


def test_learned_tables_are_resized_to_the_token_grid(randomize):
    norm = nn.LayerNorm(6, eps=1e-6)
    stage = randomize(Stage(OverlapPatchEmbed(3, 6, 1, 1, 0, norm_eps=1e-5), [], norm, pos_grid=3))

    def check(table, height, width):
        images = torch.randn(1, 3, height, width, dtype=torch.float64)
        expected = norm(stage.patch_embed(images) + table)
        torch.testing.assert_close(stage(images).permute(0, 2, 3, 1), expected)

    check(stage.pos_embed.permute(0, 2, 3, 1), 3, 3)

    # A table that depends on the row only, with 0, 4, 8 at the centres of its rows. With twice the
    # rows, centres lie a quarter of a row beside these; the number of columns has no effect.
    scale = torch.arange(6.0, dtype=torch.float64)
    rows = torch.tensor([0.0, 4.0, 8.0], dtype=torch.float64)
    stage.pos_embed.data = (rows[:, None] * scale[:, None, None]).repeat(1, 1, 1, 3)
    doubled = torch.tensor([0.0, 1.0, 3.0, 5.0, 7.0, 8.0], dtype=torch.float64)
    check(doubled[:, None, None] * scale, 6, 4)


def test_learned_encoder_takes_another_image_size():
    encoder = tiny(pos_encoding="learned", image_size=64)
    assert sizes(encoder(torch.randn(1, 3, 32, 97))) == [(8, 25), (4, 13), (2, 7), (1, 4)]
    assert all(stage.pos_embed.any() for stage in encoder.stages)


# Refusals name the value, the limit and the remedy


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (
            {"patch_sizes": (7, 1, 3, 3)},
            ("stage 2", "patch_size 1", "stride 2", "use a patch_size of at least 2"),
        ),
        (
            {"paddings": (4, 1, 1, 1)},
            ("stage 1", "padding 4", "patch_size 7", "use at most 3"),
        ),
        (
            {"num_heads": (1, 2, 5, 8)},
            ("stage 3", "embed_dim 12", "5 heads", "change embed_dims or num_heads"),
        ),
        ({"depths": (2, 2, 2)}, ("depths=(2, 2, 2)", "at least 1", "four stages")),
        ({"strides": (4, 2, 2)}, ("strides=(4, 2, 2)", "at least 1", "four stages")),
        ({"paddings": (3, 1, 1, 1, 1)}, ("paddings=(3, 1, 1, 1, 1)", "at least 0", "four stages")),
        ({"paddings": (-1, 1, 1, 1)}, ("paddings=(-1, 1, 1, 1)", "at least 0")),
        ({"sr_ratios": (8, 4, 2, 0)}, ("sr_ratios=(8, 4, 2, 0)", "at least 1")),
        ({"pos_encoding": "learned"}, ("learned", "needs image_size", "training crops")),
        (
            {"image_size": 512},
            ("image_size=512", "pos_encoding='mix_ffn'", "only learned tables", "leave it out"),
        ),
        (
            {"image_size": 512, "pos_encoding": "none"},
            ("image_size=512", "pos_encoding='none'", "leave it out"),
        ),
    ],
)
def test_impossible_arguments_are_refused(arguments, texts):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, texts))):
        tiny(**arguments)


def test_a_misspelt_pos_encoding_is_refused():
    with pytest.raises(ValueError, match=r"'Learned': choose one of mix_ffn, learned, none"):
        mit_b0(pos_encoding="Learned")


def test_an_image_size_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"image_size=16 leaves no token in stage 4; use larger"):
        mit_b0(
            patch_sizes=(4, 2, 2, 2), sr_ratios=(1, 1, 1, 1), pos_encoding="learned", image_size=16
        )
