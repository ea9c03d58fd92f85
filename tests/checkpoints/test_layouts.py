"""Complete lists of keys and shapes of every layout, on the meta device."""

import pytest
import torch
from torch import nn

from segformer_pl import models
from segformer_pl.checkpoints import load_weights
from segformer_pl.checkpoints.layouts import (
    KNOWN_LAYOUTS,
    MMSEG,
    NATIVE,
    NVLABS,
    SMP,
    TRANSFORMERS_DISK,
    TRANSFORMERS_MEMORY,
    detect,
    from_canonical,
    to_canonical,
)
from segformer_pl.errors import UserError
from segformer_pl.models.mit_block import EfficientSelfAttention

WIDE = (64, 128, 320, 512)
DIMS = {"b0": (32, 64, 160, 256)} | dict.fromkeys(("b1", "b2", "b3", "b4", "b5"), WIDE)
DEPTHS = {
    "b0": (2, 2, 2, 2),
    "b1": (2, 2, 2, 2),
    "b2": (3, 4, 6, 3),
    "b3": (3, 4, 18, 3),
    "b4": (3, 8, 27, 3),
    "b5": (3, 6, 40, 3),
}
WIDTHS = {"b0": 256, "b1": 256} | dict.fromkeys(("b2", "b3", "b4", "b5"), 768)
# Exact parameter counts of the reference encoders.
ENCODER_PARAMETERS = {
    "b0": 3_319_392,
    "b1": 13_151_424,
    "b2": 24_196_288,
    "b3": 44_072_128,
    "b4": 60_842_688,
    "b5": 81_443_008,
}


def with_bias(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def nvlabs_backbone(variant):
    """Keys and shapes of a mit_b*.pth file, without its classification head."""
    shapes = {}
    for i, (dim, depth, sr) in enumerate(
        zip(DIMS[variant], DEPTHS[variant], (8, 4, 2, 1)), start=1
    ):
        before, kernel = (3, 7) if i == 1 else (DIMS[variant][i - 2], 3)
        shapes |= with_bias(f"patch_embed{i}.proj", dim, before, kernel, kernel)
        shapes |= with_bias(f"patch_embed{i}.norm", dim)
        for j in range(depth):
            block = f"block{i}.{j}."
            shapes |= with_bias(block + "norm1", dim)
            shapes |= with_bias(block + "attn.q", dim, dim)
            shapes |= with_bias(block + "attn.kv", 2 * dim, dim)
            shapes |= with_bias(block + "attn.proj", dim, dim)
            if sr > 1:
                shapes |= with_bias(block + "attn.sr", dim, dim, sr, sr)
                shapes |= with_bias(block + "attn.norm", dim)
            shapes |= with_bias(block + "norm2", dim)
            shapes |= with_bias(block + "mlp.fc1", 4 * dim, dim)
            shapes |= with_bias(block + "mlp.dwconv.dwconv", 4 * dim, 1, 3, 3)
            shapes |= with_bias(block + "mlp.fc2", dim, 4 * dim)
        shapes |= with_bias(f"norm{i}", dim)
    return shapes


def nvlabs_head(variant, num_classes):
    width = WIDTHS[variant]
    shapes = with_bias("decode_head.conv_seg", num_classes, 128, 1, 1)
    shapes |= with_bias("decode_head.linear_pred", num_classes, width, 1, 1)
    for i, dim in enumerate(DIMS[variant], start=1):
        shapes |= with_bias(f"decode_head.linear_c{i}.proj", width, dim)
    shapes |= {"decode_head.linear_fuse.conv.weight": (width, 4 * width, 1, 1)}
    norm = "decode_head.linear_fuse.bn."
    shapes |= {norm + key: (width,) for key in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {norm + "num_batches_tracked": ()}


def mmseg_backbone(variant):
    """Keys and shapes of mmsegmentation's converted backbones."""
    shapes = {}
    for s, (dim, depth, sr) in enumerate(zip(DIMS[variant], DEPTHS[variant], (8, 4, 2, 1))):
        before, kernel = (DIMS[variant][s - 1], 3) if s else (3, 7)
        shapes |= with_bias(f"layers.{s}.0.projection", dim, before, kernel, kernel)
        shapes |= with_bias(f"layers.{s}.0.norm", dim)
        for j in range(depth):
            block = f"layers.{s}.1.{j}."
            shapes |= with_bias(block + "norm1", dim)
            shapes |= {
                block + "attn.attn.in_proj_weight": (3 * dim, dim),
                block + "attn.attn.in_proj_bias": (3 * dim,),
            }
            shapes |= with_bias(block + "attn.attn.out_proj", dim, dim)
            if sr > 1:
                shapes |= with_bias(block + "attn.sr", dim, dim, sr, sr)
                shapes |= with_bias(block + "attn.norm", dim)
            shapes |= with_bias(block + "norm2", dim)
            shapes |= with_bias(block + "ffn.layers.0", 4 * dim, dim, 1, 1)
            shapes |= with_bias(block + "ffn.layers.1", 4 * dim, 1, 3, 3)
            shapes |= with_bias(block + "ffn.layers.4", dim, 4 * dim, 1, 1)
        shapes |= with_bias(f"layers.{s}.2", dim)
    return shapes


def meta(shapes, prefix=""):
    return {prefix + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def segmenter(variant, num_classes=19):
    with torch.device("meta"):
        return getattr(models, f"segformer_{variant}")(num_classes)


@pytest.mark.slow
@pytest.mark.parametrize("variant", DIMS)
def test_nvlabs_backbone_loads_with_and_without_classification_head(variant):
    state = meta(nvlabs_backbone(variant))
    assert sum(tensor.numel() for tensor in state.values()) == ENCODER_PARAMETERS[variant]
    network = segmenter(variant)
    assert load_weights(network, state, parts="encoder").dropped == {}
    head = with_bias("head", 1000, DIMS[variant][3])
    report = load_weights(network, state | meta(head), parts="encoder")
    assert report.dropped.keys() == head.keys()
    assert report.layout == "NVlabs backbone"
    # An encoder alone takes the same file.
    assert load_weights(network.encoder, state | meta(head)).num_tensors == report.num_tensors


def test_number_of_tensors_of_b0():
    assert len(nvlabs_backbone("b0")) == 176
    assert len(nvlabs_backbone("b0")) + len(nvlabs_head("b0", 150)) == 192 + 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", DIMS)
def test_nvlabs_segmenter_loads(variant):
    state = meta(nvlabs_backbone(variant), "backbone.") | meta(nvlabs_head(variant, 19))
    network = segmenter(variant)
    report = load_weights(network, {"state_dict": state, "meta": {"CLASSES": ("road",)}})
    assert report.layout == "NVlabs segmenter"
    assert set(report.dropped) == {"decode_head.conv_seg.weight", "decode_head.conv_seg.bias"}
    assert report.num_tensors == len(network.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("variant", DIMS)
def test_mmseg_backbone_loads_and_its_head_is_refused(variant):
    network = segmenter(variant)
    bare = load_weights(network, meta(mmseg_backbone(variant)), parts="encoder")
    assert bare.layout == "mmsegmentation backbone"
    whole = meta(mmseg_backbone(variant), "backbone.")
    head = {
        f"decode_head.{name}": torch.empty(1, device="meta")
        for name in ("convs.0.conv.weight", "fusion_conv.bn.running_mean", "conv_seg.bias")
    }
    with pytest.raises(UserError, match=r"own head .*a different network.*backbone can"):
        load_weights(network, whole | head)
    report = load_weights(network, whole | head, parts="encoder")
    assert report.num_tensors == bare.num_tensors
    assert report.dropped.keys() == head.keys()


@pytest.mark.slow
@pytest.mark.parametrize("layout", KNOWN_LAYOUTS, ids=lambda layout: layout.name)
def test_a_round_trip_through_a_layout_keeps_every_tensor(layout, randomize):
    network = randomize(models.segformer_b0(5))
    everything = to_canonical(NATIVE, "encoder.", network.state_dict())[0]
    encoder = {key: t for key, t in everything.items() if key.startswith("encoder.")}
    for prefix, kind in layout.encoder_prefixes.items():
        tensors = everything if kind == "segmenter" and layout is not MMSEG else encoder
        foreign, inexpressible = from_canonical(layout, prefix, tensors)
        assert inexpressible == []
        assert detect(foreign) == (layout, prefix, "")
        again, dropped, unknown = to_canonical(layout, prefix, foreign)
        assert (dropped, unknown) == ({}, [])
        assert again.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(again[key], tensor), key


@pytest.mark.slow
def test_keys_are_those_of_the_libraries(randomize):
    from segmentation_models_pytorch import Segformer
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerModel

    config = SegformerConfig()
    whole = (SegformerForSemanticSegmentation(config), Segformer("mit_b0", encoder_weights=None))
    for theirs, layout in zip(whole, (TRANSFORMERS_MEMORY, SMP)):
        detected, prefix, _ = detect(theirs.state_dict())
        assert (detected, prefix) == (layout, next(iter(layout.encoder_prefixes)))
        tensors, dropped, unknown = to_canonical(layout, prefix, theirs.state_dict())
        assert (dropped, unknown) == ({}, [])
        assert from_canonical(layout, prefix, tensors)[0].keys() == theirs.state_dict().keys()
    encoder = SegformerModel(config).state_dict()
    assert detect(encoder) == (TRANSFORMERS_MEMORY, "", "")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("patch_embed1.proj.weight", (NVLABS, "", "")),
        ("module.patch_embed1.proj.weight", (NVLABS, "", "module.")),
        ("backbone.patch_embed1.proj.weight", (NVLABS, "backbone.", "")),
        ("module.backbone.patch_embed1.proj.weight", (NVLABS, "backbone.", "module.")),
        ("encoder.patch_embed1.proj.weight", (SMP, "encoder.", "")),
        (
            "segformer.encoder.patch_embeddings.0.proj.weight",
            (TRANSFORMERS_DISK, "segformer.encoder.", ""),
        ),
        ("backbone.layers.0.0.projection.weight", (MMSEG, "backbone.", "")),
        ("network.encoder.stages.0.patch_embed.proj.weight", (NATIVE, "encoder.", "network.")),
        ("my_patch_embed1.proj.weight", None),
        ("layer1.0.conv1.weight", None),
    ],
)
def test_detection(name, expected):
    assert detect({"something.else": 0, name: 0}) == expected


def test_attention_of_mmseg_is_torchs_multi_head_attention(randomize):
    """The joint projection holds queries, keys and values, in this order."""
    dim, heads = 8, 2
    theirs = randomize(nn.MultiheadAttention(dim, heads, batch_first=True))
    ours = EfficientSelfAttention(dim, heads, sr_ratio=1, norm_eps=1e-5).double()
    block = "layers.0.1.0.attn."
    state = {f"{block}attn.{name}": tensor for name, tensor in theirs.state_dict().items()}
    tensors, _, unknown = to_canonical(MMSEG, "", state)
    native, _ = from_canonical(NATIVE, "", tensors)
    assert unknown == []
    prefix = "stages.0.blocks.0.attn."
    ours.load_state_dict({name.removeprefix(prefix): t for name, t in native.items()})
    tokens = torch.randn(2, 3, 4, dim, dtype=torch.float64)
    sequence = tokens.flatten(1, 2)
    expected, _ = theirs(sequence, sequence, sequence)
    torch.testing.assert_close(ours(tokens), expected.view_as(tokens))
