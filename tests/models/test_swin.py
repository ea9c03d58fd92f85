"""Swin as an encoder: parity with transformers and timm, any size, arguments."""

import pytest
import timm
import torch
from torch.nn import functional as F
from transformers import SwinBackbone, SwinConfig

from segformer_pl.errors import UserError
from segformer_pl.models.swin import SwinBlock, SwinEncoder, pad_to_windows, shift_mask
from segformer_pl.models.timm_models import on_meta

TINY = "swin_tiny_patch4_window7_224"
SMALL = {"embed_dim": 12, "depths": (2, 2, 3, 2), "num_heads": (1, 2, 3, 4), "window_size": 4}
NORMS = tuple(f"layers.{s}.norm" for s in range(4))


@pytest.fixture
def encoder(randomize):
    return randomize(SwinEncoder(TINY, **SMALL)).eval()


def reference(encoder, num_heads, depths, window_size):
    """Return transformers' SwinBackbone with the encoder's parameters."""
    config = SwinConfig(
        embed_dim=encoder.out_channels[0],
        depths=list(depths),
        num_heads=list(num_heads),
        window_size=window_size,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    state = {}
    for name, tensor in encoder.state_dict().items():
        name = name.replace("patch_embed.norm", "swin.embeddings.norm")
        name = name.replace("patch_embed.proj", "swin.embeddings.patch_embeddings.projection")
        if name.startswith("layers."):
            _, stage, child, *rest = name.split(".")
            if child == "norm":
                name = f"hidden_states_norms.stage{int(stage) + 1}.{rest[0]}"
            elif child == "downsample":  # there at the end of the stage before
                name = f"swin.encoder.layers.{int(stage) - 1}.downsample.{'.'.join(rest)}"
            else:
                name = f"swin.encoder.{name}"
        name = name.replace(".norm1.", ".layernorm_before.").replace(".norm2.", ".layernorm_after.")
        name = name.replace(".attn.proj.", ".attention.o_proj.")
        name = name.replace(".attn.rel", ".attention.relative_position_bias.rel")
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3)):
                state[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = rows
        else:
            state[name] = tensor
    model = SwinBackbone(config).double().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert {name.partition(".l")[2] for name in missing} == {"ayernorm.weight", "ayernorm.bias"}
    return model


def difference(maps, expected):
    return max((one - other).abs().max().item() for one, other in zip(maps, expected))


SIZES = [(64, 64), (96, 64), (75, 109), (17, 130), (5, 3)]


@pytest.mark.slow
def test_equals_transformers_at_any_size(encoder):
    model = reference(encoder, SMALL["num_heads"], SMALL["depths"], SMALL["window_size"])
    for size in SIZES:
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            maps = encoder(images)
            expected = model(images).feature_maps
        assert [m.shape for m in maps] == [m.shape for m in expected]
        assert [tuple(m.shape[2:]) for m in maps] == encoder.out_sizes(*size)
        assert difference(maps, expected) < 1e-12, size


@pytest.mark.slow
def test_swin_tiny_equals_transformers(randomize):
    """With its depths, heads and window; the width does not matter."""
    encoder = randomize(SwinEncoder(TINY, embed_dim=24)).eval()
    model = reference(encoder, (3, 6, 12, 24), (2, 2, 6, 2), 7)
    images = torch.randn(1, 3, 101, 134, dtype=torch.float64)
    with torch.no_grad():
        assert difference(encoder(images), model(images).feature_maps) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "agrees"), [((224, 224), True), ((448, 224), True), ((256, 256), False)]
)
def test_equals_timm_where_windows_divide_the_maps(randomize, size, agrees):
    """Elsewhere timm shifts before it pads, so its maps differ."""
    arguments = SMALL | {"window_size": 7, "depths": (2, 2, 2, 2)}
    encoder = randomize(SwinEncoder(TINY, **arguments)).eval()
    model = timm.create_model(
        TINY, num_classes=0, always_partition=True, img_size=size, **arguments
    )
    # timm has no norms of maps, but one after the last stage.
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith(NORMS)}
    missing, unexpected = model.double().eval().load_state_dict(state, strict=False)
    assert (unexpected, missing) == ([], ["norm.weight", "norm.bias"])
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True)
        maps = encoder(images)
        normalized = [
            stage.norm(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for stage, m in zip(encoder.stages, expected)
        ]
    assert (difference(maps, normalized) < 1e-12) == agrees


# Errors that parity has to catch


def _shift_then_pad(block, tokens, mask):
    """The order of timm, with the mask of the original."""
    height, width = tokens.shape[1:3]
    rows, columns = block.shift
    shifted = tokens.roll((-rows, -columns), (1, 2))
    padded = pad_to_windows(shifted, block.window)
    unshifted = SwinBlock.__new__(SwinBlock)
    unshifted.__dict__ = block.__dict__ | {"shift": (0, 0)}
    attended = _attend(unshifted, padded, None)[:, :height, :width]
    return attended.roll((rows, columns), (1, 2))


_attend = SwinBlock._attend


@pytest.mark.parametrize("size", [(64, 64), (75, 109)], ids=str)
@pytest.mark.parametrize("fault", ["no shift", "no shift in stage 4", "no mask", "timm's order"])
def test_faults_are_caught(encoder, monkeypatch, fault, size):
    model = reference(encoder, SMALL["num_heads"], SMALL["depths"], SMALL["window_size"])
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    if fault == "no mask":
        monkeypatch.setattr("segformer_pl.models.swin.shift_mask", lambda *arguments: None)
    elif fault == "timm's order":
        monkeypatch.setattr(SwinBlock, "_attend", _shift_then_pad)
    else:
        for stage in encoder.stages[3 if fault.endswith("4") else 0 :]:
            for block in stage.blocks:
                block.shift = (0, 0)
    with torch.no_grad():
        assert difference(encoder(images), model(images).feature_maps) > 1e-3


@pytest.mark.slow
def test_windows_are_shifted_in_every_stage_whatever_the_size():
    """timm leaves stage 4 unshifted, as a window of 7 covers its map at 224 pixels."""
    with on_meta():
        for name, shift in [(TINY, 3), ("swin_base_patch4_window12_384", 6)]:
            shifts = [[b.shift for b in stage.blocks] for stage in SwinEncoder(name).stages]
            assert all(s[::2] == [(0, 0)] * len(s[::2]) for s in shifts)
            assert all(s[1::2] == [(shift, shift)] * len(s[1::2]) for s in shifts)


def test_mask_divides_the_shifted_map_into_regions():
    tokens = torch.zeros(1, 8, 4, 1)
    mask = shift_mask(tokens, (4, 4), (2, 2))
    assert mask.shape == (2, 16, 16)
    row_regions, column_regions = [0, 0, 0, 0, 1, 1, 2, 2], [1, 1, 2, 2]
    for number, rows in enumerate((row_regions[:4], row_regions[4:])):
        labels = [(row, column) for row in rows for column in column_regions]
        expected = [[0.0 if one == other else -100.0 for other in labels] for one in labels]
        assert mask[number].tolist() == expected


# The contract of an encoder


def test_every_parameter_gets_a_gradient_of_its_strides(encoder):
    encoder.train()
    sum(m.square().sum() for m in encoder(torch.randn(2, 3, 65, 97).double())).backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []
    # With other strides DistributedDataParallel would copy the gradients in every step.
    assert [n for n, p in encoder.named_parameters() if p.grad.stride() != p.stride()] == []


def test_layers_parts_and_weight_decay(encoder):
    names = [name for name, _ in encoder.named_parameters()]
    ids = encoder.layer_ids()
    assert sorted(ids) == sorted(names)
    assert ids["patch_embed.proj.weight"] == ids["layers.0.blocks.0.norm1.bias"] == 0
    assert ids["layers.0.norm.weight"] == 1
    assert ids["layers.1.downsample.reduction.weight"] == 2
    assert ids["layers.2.blocks.2.mlp.fc1.weight"] == 6
    assert ids["layers.3.norm.weight"] == max(ids.values()) == 8
    paths = [f"{path}." for path in encoder.parts().values()]
    assert list(encoder.parts()) == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert all(sum(name.startswith(path) for path in paths) == 1 for name in names)
    without = encoder.no_weight_decay()
    assert without == {n for n in names if "norm" in n or "relative_position_bias_table" in n}


@pytest.mark.parametrize("arguments", [{}, {"in_channels": 5, "drop_path_rate": 0.1}], ids=str)
def test_init_args_rebuild_the_encoder(randomize, arguments):
    encoder = randomize(SwinEncoder(TINY, **SMALL, **arguments)).eval()
    again = SwinEncoder(**encoder.init_args()).double().eval()
    again.load_state_dict(encoder.state_dict())
    images = torch.randn(1, encoder.in_channels, 41, 60, dtype=torch.float64)
    with torch.no_grad():
        assert difference(again(images), encoder(images)) == 0
    blocks = [block for stage in again.stages for block in stage.blocks]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    last = arguments.get("drop_path_rate", 0.3)
    assert rates == pytest.approx(torch.linspace(0, last, 9).tolist())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [  # timm's count, less the norm after the last stage, plus those of the four maps
        (TINY, 27_519_354 - 2 * 768 + 2_880),
        ("swin_small_patch4_window7_224", 48_837_258 - 2 * 768 + 2_880),
        ("swin_base_patch4_window12_384", 86_878_584 - 2 * 1024 + 3_840),
        ("swin_base_patch4_window7_224", 86_743_224 - 2 * 1024 + 3_840),
        ("swin_large_patch4_window12_384", 195_198_516 - 2 * 1536 + 5_760),
    ],
)
def test_parameters(name, num_parameters):
    with on_meta():
        encoder = SwinEncoder(name)
    assert sum(p.numel() for p in encoder.parameters()) == num_parameters


def test_mixed_precision(encoder):
    """The tables of relative positions stay in float32, and the mask takes the tokens' type."""
    images = torch.randn(1, 3, 65, 97)
    encoder.float()
    with torch.no_grad():
        expected = encoder(images)
        with torch.autocast("cpu", torch.bfloat16):
            maps = encoder(images)
    for one, other in zip(maps, expected):
        assert F.mse_loss(one.float(), other) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "resnet18"}, "resnet18 is no Swin Transformer, .* such as swin_tiny_patch4"),
        ({"name": "swinv2_tiny_window8_256"}, "swinv2_tiny_window8_256 is no Swin Transformer"),
        ({"name": "swin_tiny"}, "no model 'swin_tiny'; did you mean swin_"),
        ({"name": "zzzz"}, "no model 'zzzz'; see timm.list_models"),
        ({"name": f"{TINY}.nosuch"}, "cannot build .*nosuch .*Invalid pretrained tag"),
        ({"depths": (2, 2, 2)}, r"depths=\(2, 2, 2\): give one integer .* four stages"),
        ({"num_heads": (1, 2, 0, 4)}, r"num_heads=\(1, 2, 0, 4\): give one integer"),
        ({"window_size": 0}, "window_size=0: give an integer of at least 1"),
        ({"embed_dim": 10}, "stage 1: 10 channels are not a multiple of its 3 heads"),
        ({"drop_path_rate": 1.5}, "drop_path_rate=1.5"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments, sentence):
    with on_meta(), pytest.raises(UserError, match=sentence) as raised:
        SwinEncoder(**{"name": TINY} | arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_weights_that_cannot_be_downloaded(monkeypatch):
    """The real download, sent to a port where nobody listens."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"weights of swin_tiny.* cannot be loaded.*encoder_weight"):
        SwinEncoder(TINY, pretrained=True)
    with torch.device("meta"):  # without values there is nothing to download
        SwinEncoder(TINY, pretrained=True)
