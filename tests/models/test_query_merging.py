"""Merging of queries, compared with loops over squares and tokens in numpy."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from segformer_pl.analysis.complexity import executed_macs
from segformer_pl.errors import UserError
from segformer_pl.models import SegFormer, mit_block
from segformer_pl.models.mit import MixTransformer
from segformer_pl.models.mit_block import EfficientSelfAttention


def attention(sr_ratio=2, share=0.5, dim=6, heads=3):
    return EfficientSelfAttention(dim, heads, sr_ratio, norm_eps=1e-5, merged_queries=share)


def segformer(*shares, **arguments):
    encoder = MixTransformer(
        (4, 4, 8, 8), (1, 2, 1, 1), (1, 1, 2, 2), merged_queries=shares or (0, 0, 0, 0), **arguments
    )
    return SegFormer(encoder, 3, decoder_dim=8).eval()


def by_loops(attn, tokens, share, fault=None):
    """Choose the squares of every image, and attend from one token after the other."""
    batch, height, width, dim = tokens.shape
    head_dim = dim // attn.num_heads
    with torch.no_grad():
        queries = attn.q(tokens).numpy()
        keys, values = (x.numpy() for x in attn.kv(attn.reduce(tokens)).flatten(1, 2).split(dim, 2))
    weight, bias = (parameter.detach().numpy() for parameter in attn.proj.parameters())
    result = np.empty(tokens.shape)
    for image in range(batch):
        source = queries[0 if fault == "squares of the first image" else image]
        means, deviations = {}, {}
        for i in range(height // 2):
            for j in range(width // 2):
                where = [(2 * i + a, 2 * j + b) for a in (0, 1) for b in (0, 1)]
                mean = sum(source[y, x] for y, x in where) / 4
                deviations[i, j] = sum(((source[y, x] - mean) ** 2).sum() for y, x in where)
                means[i, j] = sum(queries[image, y, x] for y, x in where) / 4
                if fault == "first query of a square":
                    means[i, j] = queries[image, 2 * i, 2 * j]
                if fault == "squares compared in one head":
                    head = source[..., :head_dim]
                    center = sum(head[y, x] for y, x in where) / 4
                    deviations[i, j] = sum(((head[y, x] - center) ** 2).sum() for y, x in where)
        ranked = sorted(deviations, key=deviations.get, reverse=fault == "most different squares")
        chosen = ranked[: math.floor(share * len(ranked))]
        for y in range(height):
            for x in range(width):
                query = queries[image, y, x]
                if (y // 2, x // 2) in chosen:
                    query = means[y // 2, x // 2]
                heads = []
                for h in range(attn.num_heads):
                    part = slice(h * head_dim, (h + 1) * head_dim)
                    scores = keys[image][:, part] @ query[part] / math.sqrt(head_dim)
                    weights = np.exp(scores - scores.max())
                    heads.append(weights @ values[image][:, part] / weights.sum())
                result[image, y, x] = weight @ np.concatenate(heads) + bias
    return torch.from_numpy(result)


FAULTS = (
    "squares of the first image",
    "first query of a square",
    "squares compared in one head",
    "most different squares",
)


@pytest.mark.parametrize("sr_ratio", [1, 2])
@pytest.mark.parametrize("grid", [(6, 8), (5, 7), (4, 3)])
def test_merged_queries_are_those_of_the_loops(randomize, sr_ratio, grid):
    attn = randomize(attention(sr_ratio))
    tokens = torch.randn(2, *grid, 6, dtype=torch.float64)
    result = attn(tokens)
    torch.testing.assert_close(result, by_loops(attn, tokens, 0.5), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(result, by_loops(attn, tokens, 0), rtol=1e-4)
    if grid == (6, 8):
        for fault in FAULTS:
            faulty = by_loops(attn, tokens, 0.5, fault)
            assert not torch.allclose(result, faulty, rtol=1e-4), f"not detected: {fault}"


@pytest.mark.parametrize("share", [0.01, 0.29, 1 / 3, 1])
@pytest.mark.parametrize("grid", [(20, 20), (7, 4), (1, 6)])
def test_every_share_of_every_grid(randomize, share, grid):
    attn = randomize(attention(1, share))
    tokens = torch.randn(1, *grid, 6, dtype=torch.float64)
    # In floating point, 0.29 of 100 squares are 28.999999999999996.
    exact = (round(1000 * share) + 1e-9) / 1000
    torch.testing.assert_close(attn(tokens), by_loops(attn, tokens, exact), rtol=1e-10, atol=1e-12)
    merged = math.floor(exact * (grid[0] // 2) * (grid[1] // 2))
    assert attn.num_queries(*grid) == grid[0] * grid[1] - 3 * merged


@pytest.mark.parametrize("grid", [(6, 8), (5, 9)])
def test_equal_queries_are_merged_without_an_error(randomize, grid):
    merging, plain = randomize(attention(1, share=1)), attention(1, share=0).double()
    plain.load_state_dict(merging.state_dict())
    coarse = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    tokens = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, : grid[0], : grid[1]]
    torch.testing.assert_close(merging(tokens), plain(tokens), rtol=1e-12, atol=1e-13)
    assert merging.num_queries(*grid) < plain.num_queries(*grid) / 2


def test_without_merging_nothing_changes(randomize, monkeypatch):
    """Bit for bit what the attention computes without this option, and none of the merging."""
    monkeypatch.setattr(mit_block, "merge_queries", None)
    attn = randomize(attention(share=0)).float()
    tokens = torch.randn(2, 5, 6, 6)
    query = attn.q(tokens).view(2, 30, 3, 2).transpose(1, 2)
    key, value = attn.kv(attn.reduce(tokens)).view(2, -1, 2, 3, 2).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(attn(tokens), attn.proj(attended.transpose(1, 2).reshape(2, 5, 6, 6)))


def test_gradients(randomize):
    attn = randomize(attention(share=0.5, dim=4, heads=2))
    tokens = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*attn.named_parameters())

    def run(tokens, *values):
        return torch.func.functional_call(attn, dict(zip(names, values)), (tokens,))

    assert torch.autograd.gradcheck(run, (tokens, *parameters))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(randomize, autocast):
    attn = randomize(attention(1, share=1))
    tokens = torch.randn(2, 5, 6, 6, dtype=torch.float64)
    expected = attn(tokens)
    if autocast:
        attn, tokens = attn.float(), tokens.float()
    else:
        attn, tokens = attn.bfloat16(), tokens.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = attn(tokens)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), expected, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_merging_is_compiled_as_one_graph(randomize):
    attn = randomize(attention(1, share=0.5))
    compiled = torch.compile(attn, backend="eager", fullgraph=True, dynamic=False)
    tokens = torch.randn(2, 5, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(compiled(tokens), attn(tokens))


def test_fewer_multiply_adds():
    """Each merged square saves three queries: their products with keys and values, and proj."""
    plain, merging = segformer(), segformer(0.5, 1, 0.75, 0)
    # Blocks, merged squares of grids of 16x12, 8x6 and 4x3, keys, channels
    stages = ((1, 0.5 * 48, 2, 4), (2, 12, 2, 4), (1, 1, 2, 8))
    saved = sum(n * 3 * merged * (2 * keys * dim + dim * dim) for n, merged, keys, dim in stages)
    assert executed_macs(plain, 64, 48) - executed_macs(merging, 64, 48) == saved


def test_the_papers_count_has_the_queries_that_are_left():
    plain, merging = segformer(), segformer(1, 0, 0, 0)
    saved = 3 * 8 * 8 * (2 * 4 * 4 + 4 * 4)  # squares, (4 keys and values, proj) of 4 channels
    assert plain.paper_macs(64, 64) - merging.paper_macs(64, 64) == saved


@pytest.mark.parametrize(
    "shares", [(0.5, 0.5, 0.5), (0.5, 0, 0, 1.5), (-0.1, 0, 0, 0), (math.nan, 0, 0, 0)]
)
def test_impossible_shares_are_refused(shares):
    with pytest.raises(UserError, match=r"merged_queries=\(.*\): give a share from 0 to 1 of"):
        segformer(*shares)
