"""timm's plain vision transformers under the contract of an encoder."""

from functools import partial

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from segformer_pl.errors import UserError
from segformer_pl.models.timm_models import on_meta
from segformer_pl.models.vit_encoder import ViTEncoder, evenly_spaced, vit_shape
from segformer_pl.optim import parameter_groups

TINY = "test_vit"  # 6 blocks, 64 channels
# Class token; class and distillation token; registers; a table without rows for tokens; a norm
# before the blocks; a hybrid.
KINDS = {
    TINY: 1,
    "deit_tiny_distilled_patch16_224": 2,
    "test_vit2": 1,
    "vit_wee_patch16_reg1_gap_256": 1,
    "deit3_small_patch16_224": 1,
    "vit_xsmall_patch16_clip_224": 1,
    "vit_tiny_r_s16_p8_224": 1,
}


def timm_model(name, size, encoder):
    """Return timm's own model of this size with the encoder's parameters, in float64."""
    model = timm.create_model(name, num_classes=0, img_size=size).double().eval()
    missing, unexpected = model.load_state_dict(encoder.backbone.state_dict(), strict=False)
    assert unexpected == []
    # What the encoder leaves out: the final norm, and blocks after the last used one.
    last = encoder.backbone.out_indices[-1]
    left_out = [
        key for key in missing if not key.startswith("blocks.") or int(key.split(".")[1]) <= last
    ]
    assert all(key.split(".")[0] in ("norm", "fc_norm") for key in left_out)
    return model


def maps_of(model, images, indices):
    with torch.no_grad():
        return model.forward_intermediates(images, indices, intermediates_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_maps_are_those_of_timm(name, randomize):
    """At the size that the table is stored for, a rectangle."""
    stride, dim = vit_shape(name).stride, vit_shape(name).dim
    size = (2 * stride, 3 * stride)
    encoder = randomize(ViTEncoder(name, size, (1, 3))).eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        maps = encoder(images)
    expected = maps_of(timm_model(name, size, encoder), images, [1, 3])
    assert [tuple(m.shape) for m in maps] == [(2, dim, 2, 3)] * 2
    for ours, theirs in zip(maps, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS)[:4])
def test_another_size_resamples_the_table_and_keeps_the_rows_of_tokens(name, randomize):
    encoder = randomize(ViTEncoder(name, (32, 64), (1, 3))).eval()
    images = torch.randn(1, 3, 80, 48, dtype=torch.float64)
    with torch.no_grad():
        maps = encoder(images)
        table = encoder.backbone.position_table((5, 3))
    num_rows = table.shape[1] - 15
    assert num_rows == encoder.backbone.num_prefix_rows
    assert torch.equal(table[:, :num_rows], encoder.backbone.pos_embed[:, :num_rows])
    by_timm = partial(
        resample_abs_pos_embed,
        encoder.backbone.pos_embed.detach(),
        (5, 3),
        (2, 4),
        num_prefix_tokens=num_rows,
    )
    expected = by_timm(interpolation="bilinear", antialias=False)  # in float32
    torch.testing.assert_close(table, expected, rtol=1e-5, atol=1e-6)
    assert (by_timm() - table).abs().max() > 0.01  # timm's own, bicubic with antialiasing
    # timm's model of the new size, with this table, has the same maps.
    encoder.backbone.resize_table((5, 3))
    for ours, theirs in zip(maps, maps_of(timm_model(name, (80, 48), encoder), images, [1, 3])):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_resampling_by_hand():
    """Bilinear without aligned corners: 2 columns become 4 at -0.25, 0.25, 0.75, 1.25."""
    encoder = ViTEncoder(TINY, (16, 32), (0,))
    with torch.no_grad():
        encoder.backbone.pos_embed[0, :, 0] = torch.tensor([7.0, 0.0, 1.0])
    table = encoder.backbone.position_table((1, 4))
    assert table[0, :, 0].tolist() == [7.0, 0.0, 0.25, 0.75, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS)[:2])
def test_without_class_token_it_is_timms_model_without_one(name, randomize):
    encoder = randomize(ViTEncoder(name, 32, (1, 3), class_token=False)).eval()
    arguments = {"class_token": False, "global_pool": "avg", "img_size": 32, "num_classes": 0}
    plain = {"deit_tiny_distilled_patch16_224": "deit_tiny_patch16_224"}.get(name, name)
    model = timm.create_model(plain, **arguments).double().eval()
    _, unexpected = model.load_state_dict(encoder.backbone.state_dict(), strict=False)
    assert unexpected == []
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        maps = encoder(images)
    for ours, theirs in zip(maps, maps_of(model, images, [1, 3])):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_gets_a_gradient_of_its_own_strides(name, class_token):
    stride = vit_shape(name).stride
    encoder = ViTEncoder(name, 2 * stride, (1, 2), class_token=class_token)
    for size in ((2 * stride, 2 * stride), (3 * stride, stride)):
        encoder.zero_grad()
        sum(m.square().sum() for m in encoder(torch.randn(2, 3, *size))).backward()
        parameters = dict(encoder.named_parameters())
        assert [n for n, p in parameters.items() if p.grad is None] == []
        # With other strides DistributedDataParallel would copy the gradients in every step.
        assert [n for n, p in parameters.items() if p.grad.stride() != p.stride()] == []


@pytest.mark.slow
def test_contract(randomize):
    encoder = randomize(ViTEncoder("deit_tiny_distilled_patch16_224", (32, 48), (2, 5, 7)))
    assert encoder.out_channels == (192,) * 3
    assert encoder.out_strides == (16,) * 3
    assert encoder.min_size == 16
    images = torch.randn(1, 3, 64, 48, dtype=torch.float64)
    maps = encoder(images)
    assert encoder.out_sizes(64, 48) == [tuple(m.shape[2:]) for m in maps] == [(4, 3)] * 3
    names = [name for name, _ in encoder.named_parameters()]
    ids = encoder.layer_ids()
    assert list(ids) == names
    assert sorted(set(ids.values())) == list(range(8))
    first = ("pos_embed", "cls_token", "dist_token", "patch_embed.proj.weight")
    assert all(ids[f"backbone.{name}"] == 0 for name in first)
    assert ids["backbone.blocks.7.mlp.fc2.bias"] == 7
    assert encoder.parts() == {"backbone": "backbone"}
    undecayed = encoder.no_weight_decay()
    norms = [n for n in names if ".norm" in n]
    assert len(norms) == 4 * 8
    assert undecayed == {*norms, *(f"backbone.{name}" for name in first[:3])}
    rates = {g["name"]: g["lr"] for g in parameter_groups(encoder, 1.0, 0.01, 10.0, 0.5)}
    assert rates["encoder_07"] == 1
    assert rates["encoder_00_no_decay"] == 0.5**7
    again = ViTEncoder(**encoder.init_args()).double()
    again.load_state_dict(encoder.state_dict())
    for one, other in zip(again(images), maps):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_default_blocks_are_evenly_spaced():
    assert evenly_spaced(24) == (5, 11, 17, 23)
    assert evenly_spaced(12) == (2, 5, 8, 11)
    assert evenly_spaced(6) == (0, 2, 3, 5)
    assert evenly_spaced(3) == (0, 1, 2)
    assert evenly_spaced(1) == (0,)
    with on_meta():
        assert ViTEncoder("vit_tiny_patch16_224").backbone.out_indices == (2, 5, 8, 11)


@pytest.mark.slow
def test_pretrained_table_is_resampled_bilinearly(monkeypatch, tmp_path, randomize):
    """timm's own loading, from a file instead of the hub."""
    name = "test_vit.r160_in1k"
    source = randomize(timm.create_model(name)).float()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    create = partial(
        timm.create_model, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")}
    )
    monkeypatch.setattr(timm, "create_model", create)
    encoder = ViTEncoder(name, (96, 128), pretrained=True, in_channels=1)
    state = source.state_dict()
    for key, tensor in encoder.backbone.state_dict().items():
        if key not in ("pos_embed", "patch_embed.proj.weight"):
            assert torch.equal(tensor, state[key]), key
    adapted = state["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(encoder.backbone.patch_embed.proj.weight, adapted)
    expected = resample_abs_pos_embed(
        state["pos_embed"], (6, 8), interpolation="bilinear", antialias=False
    )
    torch.testing.assert_close(encoder.backbone.pos_embed, expected)
    assert isinstance(encoder.backbone.pos_embed, nn.Parameter)
    assert encoder.init_args()["pretrained"] is False
    # At the size of the weights the table is theirs.
    encoder = ViTEncoder(name, 160, pretrained=True)
    assert torch.equal(encoder.backbone.pos_embed, state["pos_embed"])
    encoder = ViTEncoder(name, 160, class_token=False, pretrained=True)
    assert torch.equal(encoder.backbone.pos_embed, state["pos_embed"][:, 1:])


@pytest.mark.slow
def test_weights_that_cannot_be_downloaded(monkeypatch):
    """The real download, sent to a port where nobody listens."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"weights of test_vit cannot be loaded.*encoder_weights"):
        ViTEncoder(TINY, pretrained=True)
    with torch.device("meta"):  # without values there is nothing to download
        ViTEncoder(TINY, pretrained=True)


@pytest.mark.slow
def test_initial_weights_depend_on_the_seed_alone():
    """Also if the backbone has been examined before, which happens once for each name."""
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(ViTEncoder("test_vit3", 32).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "vit_tinny_patch16_224"}, r"no model .*did you mean vit_tiny_patch16_224"),
        ({"name": "zzzz"}, r"no model 'zzzz'; see timm.list_models\(\)"),
        ({"name": "resnet18"}, r"resnet18 is no plain vision transformer but a ResNet; choose"),
        ({"name": "swin_tiny_patch4_window7_224"}, r"but a SwinTransformer; choose"),
        ({"name": "test_vit_relpos"}, r"but a VisionTransformerRelPos; choose"),
        ({"name": TINY, "image_size": [64]}, "give the side of a square, or height and width"),
        ({"name": TINY, "image_size": 100}, r"image_size=100: .*give a multiple of 16"),
        ({"name": TINY, "image_size": (64, 8)}, r"patches of 16x16 pixels; give a multiple of 16"),
        ({"name": TINY, "out_indices": (2, 6)}, r"out_indices=\(2, 6\): .*blocks 0 to 5"),
        ({"name": TINY, "out_indices": (-1,)}, r"out_indices=\(-1,\)"),
        ({"name": TINY, "out_indices": (3, 2)}, r"each once, in ascending order"),
        ({"name": TINY, "out_indices": (2, 2)}, r"each once, in ascending order"),
        ({"name": TINY, "out_indices": ()}, r"name at least one"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        ViTEncoder(**arguments)


@pytest.mark.parametrize("size", [(40, 32), (32, 33), (16, 8), (0, 16)])
def test_sides_that_are_no_multiple_of_the_patch_are_refused(size):
    encoder = ViTEncoder(TINY, 32)
    with pytest.raises(UserError, match=rf"multiples of 16, and these have {size[0]}x{size[1]} .*"):
        encoder(torch.zeros(1, 3, *size))
