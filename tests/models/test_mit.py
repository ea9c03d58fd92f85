"""The Mix Transformer, compared with the formulas of the paper and the reference code."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segformer_pl.models import MixTransformer, mit_b0, mit_b1, mit_b2, mit_b3, mit_b4, mit_b5
from segformer_pl.models.mit import (
    Block,
    EfficientSelfAttention,
    NormEps,
    OverlapPatchEmbed,
    Stage,
)

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


# Attention and block against their formulas


def plain_attention(attn, tokens, fault=None):
    """softmax(Q K^T / sqrt(d)) V, one head and one sample at a time."""
    batch, height, width, dim = tokens.shape
    r, head_dim = attn.sr_ratio, dim // attn.num_heads
    source = tokens
    if r > 1:
        rows, columns = height // r, width // r
        squares = tokens[:, : rows * r, : columns * r].reshape(batch, rows, r, columns, r, dim)
        source = torch.einsum("bhrwsc,ocrs->bhwo", squares, attn.sr.weight) + attn.sr.bias
        if fault != "no norm after reduction":
            source = F.layer_norm(source, (dim,), attn.norm.weight, attn.norm.bias, 1e-5)
    query, source = attn.q(tokens).flatten(1, 2), source.flatten(1, 2)
    key = source @ attn.kv.weight[:dim].T + attn.kv.bias[:dim]
    value = source @ attn.kv.weight[dim:].T + attn.kv.bias[dim:]
    if fault == "keys and values swapped":
        key, value = value, key
    heads = []
    for h in range(attn.num_heads):
        part = slice(h * head_dim, (h + 1) * head_dim)
        if fault == "channels interleaved over the heads":
            part = slice(h, None, attn.num_heads)
        scores = query[..., part] @ key[..., part].transpose(1, 2)
        scores = scores / math.sqrt(dim if fault == "scale of all heads" else head_dim)
        if fault == "softmax over queries":
            heads.append(scores.softmax(dim=1) @ value[..., part])
        else:
            heads.append(scores.softmax(dim=2) @ value[..., part])
    return attn.proj(torch.cat(heads, dim=2)).view(batch, height, width, dim)


ATTENTION_FAULTS = (
    "keys and values swapped",
    "channels interleaved over the heads",
    "scale of all heads",
    "softmax over queries",
)


@pytest.mark.parametrize("sr_ratio", [1, 2, 3])
def test_attention_is_the_plain_formula(randomize, sr_ratio):
    attn = randomize(EfficientSelfAttention(12, 3, sr_ratio, norm_eps=1e-5))
    tokens = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    result = attn(tokens)
    torch.testing.assert_close(result, plain_attention(attn, tokens), rtol=1e-10, atol=1e-12)
    for fault in ATTENTION_FAULTS + ("no norm after reduction",) * (sr_ratio > 1):
        faulty = plain_attention(attn, tokens, fault)
        assert not torch.allclose(result, faulty, rtol=1e-4), f"not detected: {fault}"


@pytest.mark.parametrize("grid", [(8, 12), (7, 9), (5, 4), (3, 2)])
def test_a_kept_border_scales_incomplete_squares_up(randomize, grid):
    """Square by square: the sum over its tokens, scaled to a complete one, then bias and norm."""
    attn = randomize(EfficientSelfAttention(6, 2, 4, norm_eps=1e-5, kv_border="keep"))
    tokens = torch.randn(2, *grid, 6, dtype=torch.float64)
    weight = attn.sr.weight.permute(2, 3, 1, 0)  # (r, r, C_in, C_out)
    rows, columns = (math.ceil(side / 4) for side in grid)
    expected = torch.empty(2, rows, columns, 6, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            square = tokens[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            height, width = square.shape[1:3]
            total = torch.einsum("bhwc,hwcd->bd", square, weight[:height, :width])
            expected[:, i, j] = total * 16 / (height * width) + attn.sr.bias
    torch.testing.assert_close(attn.reduce(tokens), attn.norm(expected))


def test_a_kept_border_changes_nothing_at_multiples_of_32(randomize):
    dropped, kept = randomize(tiny()), tiny(kv_border="keep").double()
    kept.load_state_dict(dropped.state_dict())
    for size, equal in (((64, 96), True), ((64, 80), False)):
        images = torch.randn(1, 3, *size, dtype=torch.float64)
        same = [torch.equal(a, b) for a, b in zip(dropped.eval()(images), kept.eval()(images))]
        assert all(same) == equal


def test_border_tokens_affect_the_others_only_if_kept(randomize):
    """In the reference code, rows beyond the last complete square give no key or value."""
    for kv_border, has_effect in (("drop", False), ("keep", True)):
        attn = randomize(EfficientSelfAttention(8, 2, 4, norm_eps=1e-5, kv_border=kv_border))
        tokens = torch.randn(1, 7, 8, 8, dtype=torch.float64)
        changed = tokens.clone()
        changed[:, 4:] += 1
        assert torch.equal(attn(tokens)[:, :4], attn(changed)[:, :4]) == (not has_effect)


def test_with_a_kept_border_the_grid_may_be_smaller_than_the_reduction():
    assert mit_b0(kv_border="keep")(torch.zeros(1, 3, 20, 28))[3].shape == (1, 256, 1, 1)


def test_unknown_kv_border_is_refused():
    with pytest.raises(ValueError, match="kv_border='pad': choose one of drop, keep"):
        tiny(kv_border="pad")


def test_a_dropped_border_has_no_effect_on_other_tokens(randomize):
    attn = randomize(EfficientSelfAttention(8, 2, sr_ratio=2, norm_eps=1e-5))
    tokens = torch.randn(1, 5, 7, 8, dtype=torch.float64)
    inside = (slice(None), slice(0, 4), slice(0, 6))  # 4 = floor(5/2) * 2, 6 = floor(7/2) * 2
    before = attn(tokens)

    border_changed = tokens + torch.randn_like(tokens)
    border_changed[inside] = tokens[inside]
    after = attn(border_changed)
    torch.testing.assert_close(after[inside], before[inside], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[:, 4], before[:, 4])

    last_inside_changed = tokens.clone()
    last_inside_changed[:, 3, 5] += 1
    assert not torch.allclose(attn(last_inside_changed)[:, 0, 0], before[:, 0, 0])


def plain_block(block, tokens, fault=None):
    dim = tokens.shape[-1]

    def norm(module, x):
        return F.layer_norm(x, (dim,), module.weight, module.bias, 1e-6)

    if fault == "norm after attention":
        tokens = norm(block.norm1, tokens + plain_attention(block.attn, tokens))
    else:
        tokens = tokens + plain_attention(block.attn, norm(block.norm1, tokens))
    hidden = block.mlp.fc1(
        norm(block.norm1 if fault == "one norm for both" else block.norm2, tokens)
    )
    if fault == "gelu before the convolution":
        hidden = F.gelu(hidden)
    window = F.pad(hidden, (0, 0, 1, 1, 1, 1))
    height, width = tokens.shape[1:3]
    kernel = block.mlp.dwconv.weight[:, 0]
    mixed = block.mlp.dwconv.bias + sum(
        window[:, i : i + height, j : j + width]
        * (kernel[:, j, i] if fault == "convolution transposed" else kernel[:, i, j])
        for i in range(3)
        for j in range(3)
    )
    if fault == "residual inside the FFN":
        mixed = mixed + hidden
    if fault == "tanh gelu":
        mixed = F.gelu(mixed, approximate="tanh")
    elif fault != "gelu before the convolution":
        mixed = mixed * 0.5 * (1 + torch.erf(mixed / math.sqrt(2)))
    return tokens + block.mlp.fc2(mixed)


BLOCK_FAULTS = (
    "norm after attention",
    "one norm for both",
    "gelu before the convolution",
    "convolution transposed",
    "residual inside the FFN",
    "tanh gelu",
)


def test_block_is_the_plain_formula(randomize):
    block = randomize(Block(8, 2, 3, 2, depthwise=True, drop_path_rate=0.0, eps=NormEps()))
    tokens = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    result = block(tokens)
    torch.testing.assert_close(result, plain_block(block, tokens), rtol=1e-10, atol=1e-12)
    for fault in BLOCK_FAULTS:
        faulty = plain_block(block, tokens, fault)
        assert not torch.allclose(result, faulty, rtol=1e-5, atol=1e-6), f"not detected: {fault}"


def test_drop_path_drops_both_branches_while_training(randomize):
    block = randomize(Block(8, 2, 4, 1, depthwise=True, drop_path_rate=1.0, eps=NormEps()))
    tokens = torch.randn(2, 3, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(block.train()(tokens), tokens, rtol=0, atol=0)
    torch.testing.assert_close(block.eval()(tokens), plain_block(block, tokens))


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
