import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from segformer_pl import bands
from segformer_pl.bands import map_bands
from segformer_pl.models.mit_block import Block, NormEps


@pytest.mark.parametrize("shape", [(4, 512, 512, 150), (24, 64, 64, 6), (1, 10, 4096, 1000)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bands_cover_every_row_once(shape, device):
    covered = torch.zeros(shape[:2], dtype=torch.int64)
    for images, rows in bands.bands(*shape, device):
        covered[images, rows] += 1
    assert (covered == 1).all()


def test_small_images_share_a_band():
    assert len(list(bands.bands(24, 64, 64, 6, "cpu"))) == 1


class Recorded(nn.Module):
    """Two depthwise convolutions, so that a row depends on two rows above and below."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 1, 3, 3, dtype=torch.float64))
        self.heights = []

    def forward(self, tokens):
        self.heights.append(tokens.shape[1])
        maps = tokens.permute(0, 3, 1, 2)
        for _ in range(2):
            maps = F.conv2d(maps, self.weight, padding=1, groups=5)
        return tokens + maps.permute(0, 2, 3, 1)


@pytest.fixture(autouse=True)
def _narrow_bands(monkeypatch):
    monkeypatch.setattr(bands, "LEAST_ROWS", 1)


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return Recorded()


@pytest.mark.parametrize(
    ("elements", "heights"),
    [
        (1, [3, 4, 5, 5, 5, 5, 4, 3] * 3),  # bands of one row and its halo
        (3 * 40 * 7, [5, 7, 4] * 3),
        (8 * 40 * 7, [8] * 3),  # one image at a time
        (17 * 40 * 7, [8, 8]),  # two images, then one
        (24 * 40 * 7, [8]),
    ],
)
def test_a_map_is_computed_in_bands(monkeypatch, layers, elements, heights):
    monkeypatch.setattr(bands, "LAYER_ELEMENTS", elements)
    tokens = torch.randn(3, 8, 40, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = layers(tokens)
        layers.heights.clear()
        result = map_bands(layers, tokens, widest=7, halo=2)
        assert layers.heights == heights
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)
        if len(heights) > 3:
            narrow = map_bands(layers, tokens, widest=7, halo=1)
            assert (narrow - expected).abs().max() > 0.1, "a halo that is too small goes unnoticed"


class Banded(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, tokens):
        return map_bands(self.layers, tokens, 7, 2)


def test_a_band_of_a_wide_map_has_some_rows(monkeypatch, layers):
    monkeypatch.setattr(bands, "LAYER_ELEMENTS", 1)
    monkeypatch.setattr(bands, "LEAST_ROWS", 4)
    tokens = torch.randn(1, 8, 40, 5, dtype=torch.float64)
    with torch.no_grad():
        map_bands(layers, tokens, widest=7, halo=2)
    assert layers.heights == [6, 6]


def test_maps_with_gradients_have_no_bands(monkeypatch, layers):
    monkeypatch.setattr(bands, "LAYER_ELEMENTS", 1)
    tokens = torch.randn(1, 8, 40, 5, dtype=torch.float64, requires_grad=True)
    map_bands(layers, tokens, 7, 2).sum().backward()
    assert layers.heights == [8]


def test_graphs_have_no_bands(monkeypatch, layers):
    monkeypatch.setattr(bands, "LAYER_ELEMENTS", 1)
    network = Banded(layers).requires_grad_(False)
    tokens = torch.randn(1, 8, 40, 5, dtype=torch.float64)
    with torch.no_grad():
        exported = torch.export.export(network, (tokens,)).graph_module.graph
        assert sum("conv" in str(node.target) for node in exported.nodes) == 2
        layers.heights.clear()
        torch.jit.trace(network, tokens, check_trace=False)  # OpenVINO's way
    assert layers.heights == [8]


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = Block(8, 2, 4, 2, True, 0.5, NormEps()).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def test_a_block_computes_its_mix_ffn_in_bands(monkeypatch, block):
    tokens = torch.randn(2, 10, 12, 8, dtype=torch.float64)
    block.eval()
    expected = block(tokens).detach()
    hidden = []
    block.mlp.fc1.register_forward_hook(lambda module, args, output: hidden.append(output.shape))
    monkeypatch.setattr(bands, "LAYER_ELEMENTS", 4 * 12 * 32)
    with torch.inference_mode():
        result = block(tokens)
    assert [shape[1] for shape in hidden] == [5, 6, 3] * 2
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)


def test_drop_path_is_drawn_for_images_not_for_bands(monkeypatch, block):
    tokens = torch.randn(2, 10, 12, 8, dtype=torch.float64)
    monkeypatch.setattr(bands, "LAYER_ELEMENTS", 4 * 12 * 32)
    block.train()
    torch.manual_seed(1)
    expected = block(tokens)
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(block(tokens), expected)


def test_derivatives_in_forward_mode_pass_through_bands(monkeypatch, block):
    block.eval()
    tokens, tangents = torch.randn(2, 1, 10, 12, 8, dtype=torch.float64)

    def slopes():
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            return forward_ad.unpack_dual(block(forward_ad.make_dual(tokens, tangents))).tangent

    expected = slopes()
    monkeypatch.setattr(bands, "LAYER_ELEMENTS", 4 * 12 * 32)
    torch.testing.assert_close(slopes(), expected, rtol=0, atol=1e-13)
