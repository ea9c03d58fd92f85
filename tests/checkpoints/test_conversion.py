"""Exported networks open in other libraries with our logits, and survive round trips."""

import json
import resource

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from segformer_pl.checkpoints import export_weights, load_network, read_weights
from segformer_pl.checkpoints.networks import build
from segformer_pl.errors import UserError
from segformer_pl.models import SegFormer, TimmEncoder, mit_b0, segformer_b0
from segformer_pl.models.mit import MixTransformer
from segformer_pl.models.mit_block import NormEps

FORMS = {"huggingface": "folder", "smp": "folder", "nvlabs": "w.pth", "native": "w.safetensors"}


@pytest.fixture
def network(randomize):
    network = randomize(segformer_b0(3, decoder_dim=24, dropout=0.2)).eval()
    network.encoder.norm_eps = NormEps(1e-5, 1e-5)
    return network


def images(height=64, width=96):
    return torch.randn(1, 3, height, width, dtype=torch.float64)


def tensors_of(path):
    if path.is_dir():
        return load_file(path / "model.safetensors")
    return read_weights(path).tensors


@torch.no_grad()
@pytest.mark.slow
def test_transformers_opens_the_folder_with_our_logits(network, tmp_path):
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

    task = {"class_names": ["a", "b", "c"], "image_mean": [0.1, 0.2, 0.3], "ignore_index": 9}
    remarks = export_weights(network, tmp_path / "out", "huggingface", task)
    theirs, loading = SegformerForSemanticSegmentation.from_pretrained(
        tmp_path / "out", dtype=torch.float64, output_loading_info=True
    )
    assert not any(loading.values())
    batch = images(65, 97)
    torch.testing.assert_close(theirs.eval()(batch).logits, network(batch), rtol=1e-9, atol=1e-9)
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert theirs.config.classifier_dropout_prob == 0.2
    assert theirs.config.semantic_loss_ignore_index == 9
    processor = SegformerImageProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    image = torch.full((3, 40, 50), 255, dtype=torch.uint8)
    pixels = processor(image, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 40, 50)
    torch.testing.assert_close(pixels[0, 0, 0, 0].item(), (1 - 0.1) / 0.229, atol=1e-5, rtol=0)
    assert len(remarks) == 2
    # Grey images, palettes and alpha are converted; the colour below alpha is kept.
    rgba = Image.new("RGBA", (50, 40), (255, 255, 255, 0))
    for image in (rgba, rgba.convert("L"), rgba.convert("RGB").quantize(2)):
        assert torch.equal(processor(image, return_tensors="pt").pixel_values, pixels)
    assert "drops alpha and keeps the colour below it" in remarks[1]


@pytest.mark.slow
@torch.no_grad()
def test_transformers_opens_an_encoder_alone(randomize, tmp_path):
    from transformers import SegformerModel

    encoder = randomize(mit_b0()).eval()
    remarks = export_weights(encoder, tmp_path / "out", "huggingface")
    assert "LayerNorm epsilons are 1e-06" in remarks[-1]
    theirs = SegformerModel.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    encoder.norm_eps = NormEps(1e-5, 1e-5)
    batch = images()
    torch.testing.assert_close(theirs(batch).last_hidden_state, encoder(batch)[-1])


@torch.no_grad()
@pytest.mark.slow
def test_smp_opens_the_folder_with_our_logits(network, tmp_path):
    import segmentation_models_pytorch as smp

    remarks = export_weights(network, tmp_path / "out", "smp")
    assert "align_corners=True" in remarks[0]
    assert "LayerNorm epsilons are 1e-05" in remarks[1]
    theirs = smp.from_pretrained(str(tmp_path / "out")).double().eval()
    batch = images()
    logits = theirs.segmentation_head[0](theirs.decoder(theirs.encoder(batch)))
    network.encoder.norm_eps = NormEps(1e-6, 1e-5)
    # smp reads the weights in float32 before they become float64.
    torch.testing.assert_close(logits, network(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_round_trip_from_transformers(tmp_path, randomize):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    names = ["x", "y", "z"]
    config = SegformerConfig(
        sr_ratios=[4, 4, 2, 1],
        strides=[4, 2, 2, 1],
        id2label=dict(enumerate(names)),
        label2id={name: n for n, name in enumerate(names)},
    )
    theirs = randomize(SegformerForSemanticSegmentation(config)).float().eval()
    theirs.save_pretrained(tmp_path / "in")
    preprocessor = {"image_processor_type": "SegformerImageProcessor", "do_resize": True}
    (tmp_path / "in" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    weights = read_weights(tmp_path / "in")
    network, _ = load_network(weights)
    export_weights(network, tmp_path / "out", "huggingface", weights.task, weights.preprocessor)
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("in", "out"))
    changed = {key for key in old if old[key] != new.get(key)}
    assert changed <= {"transformers_version", "layer_norm_eps"}
    assert new["layer_norm_eps"] == 1e-5
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == {
        "do_convert_rgb": True,
        **preprocessor,
    }
    again = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
    batch = images().float()
    assert torch.equal(again(batch).logits, theirs(batch).logits)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FORMS)
def test_round_trip_through_every_layout(network, tmp_path, layout):
    first, second = tmp_path / f"1{FORMS[layout]}", tmp_path / f"2{FORMS[layout]}"
    export_weights(network, first, layout)
    loaded, report = load_network(first)
    assert loaded.head.classifier.out_channels == 3
    export_weights(loaded, second, layout)
    before, after = tensors_of(first), tensors_of(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    if layout == "native":
        assert loaded.encoder.norm_eps == NormEps(1e-5, 1e-5)
        assert "stated in the source" in str(report)
        assert loaded.head.dropout.p == 0.2


def test_an_nvlabs_file_states_the_class_names(network, tmp_path):
    task = {"class_names": ["a", "b", "c"], "palette": [[0, 0, 0], [1, 1, 1], [2, 2, 2]]}
    export_weights(network, tmp_path / "w.pth", "nvlabs", task)
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    assert content["meta"] == {"CLASSES": task["class_names"], "PALETTE": task["palette"]}
    assert "decode_head.linear_pred.weight" in content["state_dict"]
    assert read_weights(tmp_path / "w.pth").task == task


def test_an_nvlabs_file_has_everything_that_init_segmentor_reads(network, tmp_path):
    """mmsegmentation 0.x takes both entries of ``meta`` without a default."""
    remarks = export_weights(network, tmp_path / "w.pth", "nvlabs")
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    assert content["meta"] == {"CLASSES": ["LABEL_0", "LABEL_1", "LABEL_2"], "PALETTE": None}
    unused = {
        key: tuple(tensor.shape)
        for key, tensor in content["state_dict"].items()
        if "conv_seg" in key and not tensor.any()
    }
    # The reference's configurations give the head 128 channels, whatever the variant.
    assert unused == {
        "decode_head.conv_seg.weight": (3, 128, 1, 1),
        "decode_head.conv_seg.bias": (3,),
    }
    assert "is zero in the file" in remarks[0]
    assert read_weights(tmp_path / "w.pth").task == {}  # placeholders are no names


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"pos_encoding": "learned", "image_size": 64},
        {"pos_encoding": "none"},
        {"patch_sizes": (4, 2, 2, 2), "in_channels": 4, "norm_eps": 0.5},
        {"in_indices": (1, 3), "sr_ratios": (4, 4, 2, 1), "mlp_ratio": 2, "drop_path_rate": 0.0},
    ],
)
def test_ablations_are_exported_in_the_native_layout_only(arguments, tmp_path, randomize):
    network = randomize(segformer_b0(3, **arguments)).float().eval()
    export_weights(network, tmp_path / "w.safetensors", "native")
    loaded, _ = load_network(tmp_path / "w.safetensors")
    batch = torch.randn(1, arguments.get("in_channels", 3), 64, 64)
    assert torch.equal(loaded.eval()(batch), network(batch))
    assert loaded.spec() == network.spec()
    for layout in ("huggingface", "smp", "nvlabs"):
        with pytest.raises(UserError, match="cannot express this network"):
            export_weights(network, tmp_path / f"x{FORMS[layout]}", layout)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_an_encoder_that_is_no_published_variant(tmp_path):
    encoder = MixTransformer((4, 8, 8, 16), (1, 1, 1, 1), num_heads=(1, 2, 2, 4))
    network = SegFormer(encoder, 3, decoder_dim=8)
    assert build(network.spec(), "spec").encoder.out_channels == (4, 8, 8, 16)
    export_weights(network, tmp_path / "hf", "huggingface")
    assert load_network(tmp_path / "hf")[0].spec()["class_path"].endswith("SegFormer")
    with pytest.raises(UserError, match="cannot express this network"):
        export_weights(network, tmp_path / "smp", "smp")
    export_weights(network, tmp_path / "w.safetensors", "native")
    bare = dict(load_file(tmp_path / "w.safetensors"))
    with pytest.raises(UserError, match="none of MiT-B0 to B5"):
        load_network(bare)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("w", "keras", "layout='keras': choose one of"),
        ("/proc/nowhere/w", "smp", "cannot be written"),
        ("there", "huggingface", "exists already"),
        ("w.bin", "nvlabs", r"is a file that ends in \.pth"),
        ("w.pth", "huggingface", "is a folder"),
    ],
)
def test_a_destination_of_the_wrong_form_is_refused(name, layout, message, network, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=message):
        export_weights(network, tmp_path / name, layout)
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_smp_takes_whole_segmenters_only(tmp_path):
    with pytest.raises(UserError, match="an encoder alone"):
        export_weights(mit_b0(), tmp_path / "out", "smp")
    export_weights(mit_b0(), tmp_path / "mit_b0.pth", "nvlabs")
    assert "patch_embed1.proj.weight" in torch.load(tmp_path / "mit_b0.pth", weights_only=True)
    assert isinstance(load_network(tmp_path / "mit_b0.pth")[0], MixTransformer)


SEGFORMER, MASKFORMER = "SegFormer on MiT", "MaskFormer on Swin or ResNet"


@pytest.mark.parametrize(
    ("layout", "serves", "others"),
    [
        ("huggingface", {SEGFORMER, MASKFORMER}, set()),
        ("nvlabs", {SEGFORMER}, {MASKFORMER}),
        ("smp", {SEGFORMER}, {MASKFORMER}),
    ],
)
def test_a_refusal_says_which_networks_the_layout_serves(layout, serves, others, tmp_path):
    """A SegFormer on another encoder has the right class, and is none of them."""
    network = SegFormer(TimmEncoder("test_convnext"), 2, 8)
    with pytest.raises(UserError, match=f"^layout {layout} serves ") as refusal:
        export_weights(network, tmp_path / f"x{FORMS[layout]}", layout)
    message = str(refusal.value)
    assert all(text in message for text in serves)
    assert not any(text in message for text in others)
    assert message.endswith(
        "this is a SegFormer on TimmEncoder; use native, as native serves every network"
    )
    export_weights(network, tmp_path / "n.safetensors", "native")
    assert type(load_network(tmp_path / "n.safetensors")[0].encoder) is TimmEncoder


def test_a_bare_state_dict_of_a_network_that_its_tensors_do_not_show():
    state = SegFormer(TimmEncoder("test_convnext"), 2, 8).state_dict()
    with pytest.raises(UserError, match=r"states no network.*run's checkpoint or a native file"):
        load_network(state)


@pytest.mark.parametrize(
    ("layout", "name"),
    [("native", "w.safetensors"), ("nvlabs", "w.pth"), ("huggingface", "w"), ("smp", "w")],
)
def test_a_full_disk_is_one_sentence_and_leaves_no_file(tmp_path, layout, name):
    network = segformer_b0(2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # acts like a full disk
    try:
        with pytest.raises(UserError, match=r"/w.*' cannot be written \(File too large\); give"):
            export_weights(network, tmp_path / name, layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
