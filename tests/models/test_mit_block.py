"""Attention and block against their formulas in the paper and the reference code."""

import math

import pytest
import torch
from torch.nn import functional as F

from segformer_pl.models.mit_block import Block, EfficientSelfAttention, NormEps


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


def test_border_tokens_affect_the_others_only_if_kept(randomize):
    """In the reference code, rows beyond the last complete square give no key or value."""
    for kv_border, has_effect in (("drop", False), ("keep", True)):
        attn = randomize(EfficientSelfAttention(8, 2, 4, norm_eps=1e-5, kv_border=kv_border))
        tokens = torch.randn(1, 7, 8, 8, dtype=torch.float64)
        changed = tokens.clone()
        changed[:, 4:] += 1
        assert torch.equal(attn(tokens)[:, :4], attn(changed)[:, :4]) == (not has_effect)


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
