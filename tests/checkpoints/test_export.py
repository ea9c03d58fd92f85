"""The way out: what other libraries open, with our logits; and round trips."""

import json
import resource
import sys

import pytest
import torch
from safetensors.torch import load_file

from segformer_pl.checkpoints import export_weights, load_network, read_weights
from segformer_pl.checkpoints.networks import build
from segformer_pl.checkpoints.sources import weights_from_content
from segformer_pl.errors import UserError
from segformer_pl.models import SegFormer, mit_b0, segformer_b0
from segformer_pl.models.mit import MixTransformer, NormEps

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
def test_transformers_opens_its_folder_and_gives_our_logits(network, tmp_path):
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
    picture = torch.full((3, 40, 50), 255, dtype=torch.uint8)
    pixels = processor(picture, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 40, 50)
    torch.testing.assert_close(pixels[0, 0, 0, 0].item(), (1 - 0.1) / 0.229, atol=1e-5, rtol=0)
    assert len(remarks) == 1


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
def test_smp_opens_its_folder_and_gives_our_logits(network, tmp_path):
    import segmentation_models_pytorch as smp

    remarks = export_weights(network, tmp_path / "out", "smp")
    assert "align_corners=True" in remarks[0]
    assert "LayerNorm epsilons are 1e-05" in remarks[1]
    theirs = smp.from_pretrained(str(tmp_path / "out")).double().eval()
    batch = images()
    logits = theirs.segmentation_head[0](theirs.decoder(theirs.encoder(batch)))
    network.encoder.norm_eps = NormEps(1e-6, 1e-5)
    # smp reads into float32 first
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
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == preprocessor
    again = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
    batch = images().float()
    assert torch.equal(again(batch).logits, theirs(batch).logits)


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


def test_nvlabs_file_names_the_classes(network, tmp_path):
    task = {"class_names": ["a", "b", "c"], "palette": [[0, 0, 0], [1, 1, 1], [2, 2, 2]]}
    export_weights(network, tmp_path / "w.pth", "nvlabs", task)
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    assert content["meta"] == {"CLASSES": task["class_names"], "PALETTE": task["palette"]}
    assert "decode_head.linear_pred.weight" in content["state_dict"]
    assert read_weights(tmp_path / "w.pth").task == task


@pytest.mark.parametrize(
    "arguments",
    [
        {"pos_encoding": "learned", "image_size": 64},
        {"pos_encoding": "none"},
        {"patch_sizes": (4, 2, 2, 2), "in_channels": 4, "norm_eps": 0.5},
        {"in_indices": (1, 3), "sr_ratios": (4, 4, 2, 1), "mlp_ratio": 2, "drop_path_rate": 0.0},
    ],
)
def test_ablations_travel_in_the_native_layout_only(arguments, tmp_path, randomize):
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


def test_an_unnamed_encoder(tmp_path):
    encoder = MixTransformer((4, 8, 8, 16), (1, 1, 1, 1), num_heads=(1, 2, 2, 4))
    network = SegFormer(encoder, 3, decoder_dim=8)
    assert build(network.spec(), "it").encoder.out_channels == (4, 8, 8, 16)
    export_weights(network, tmp_path / "hf", "huggingface")
    assert load_network(tmp_path / "hf")[0].spec()["class_path"].endswith("SegFormer")
    with pytest.raises(UserError, match="cannot express this network"):
        export_weights(network, tmp_path / "smp", "smp")
    export_weights(network, tmp_path / "w.safetensors", "native")
    bare = dict(load_file(tmp_path / "w.safetensors"))
    with pytest.raises(UserError, match="none of MiT-B0 to B5"):
        load_network(bare)


def returns_a_network(num_classes: int) -> SegFormer:
    return SegFormer(mit_b0(), num_classes, decoder_dim=24)


def returns_what_it_is_not_said(num_classes):
    raise AssertionError("it was called")


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("os.system", r"os\.system, which is no class of torch\.nn\.Module and no function"),
        ("subprocess.Popen", r"subprocess\.Popen, which is no class of torch\.nn\.Module"),
        (f"{__name__}.returns_what_it_is_not_said", "and no function that is annotated to return"),
        (
            "segformer_pl.models.segformer_b9",
            r"segformer_b9, which cannot be imported here \(Attri",
        ),
        ("nowhere.Network", r"nowhere\.Network, which cannot be imported here \(ModuleNotFound"),
        ("Network", r"a Network, which cannot be imported here"),
        ("", "which cannot be imported here"),
    ],
)
def test_code_that_is_no_network_is_not_chosen_by_a_file(tmp_path, network, class_path, message):
    spec = {"class_path": class_path, "init_args": {}}
    for chosen in (
        spec,
        {"class_path": "segformer_pl.models.SegFormer", "init_args": {"encoder": spec}},
    ):
        content = {
            "state_dict": network.state_dict(),
            "hyper_parameters": {"network": chosen},
        }
        torch.save(content, tmp_path / "w.ckpt")
        with pytest.raises(UserError, match=message) as error:
            load_network(tmp_path / "w.ckpt")
        assert "\n" not in str(error.value)


def test_networks_outside_the_package_are_built(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "a_users_module", sys.modules[__name__])
    spec = {"class_path": "a_users_module.returns_a_network", "init_args": {"num_classes": 3}}
    content = {"state_dict": network.state_dict(), "hyper_parameters": {"network": spec}}
    loaded, _ = load_network(weights_from_content("it", content))
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_descriptions_that_do_not_fit(tmp_path, network):
    """Settings that contradict the tensors, or that this version does not know."""
    unknown = {
        "class_path": "segformer_pl.models.segformer_b0",
        "init_args": {"num_classes": 3, "width": 1},
    }
    content = {"state_dict": network.state_dict(), "hyper_parameters": {"network": unknown}}
    torch.save(content, tmp_path / "w.ckpt")
    with pytest.raises(UserError, match=r"cannot be built here \(.*'width'"):
        load_network(tmp_path / "w.ckpt")
    task = {"class_names": ["only one"]}
    remarks = export_weights(network, tmp_path / "hf", "huggingface", task)
    assert "names 1 classes and has 3" in remarks[0]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["id2label"] == {str(n): f"LABEL_{n}" for n in range(3)}
    config["num_attention_heads"] = [1, 2]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="num_heads"):
        load_network(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a list, not settings by name"):
        load_network(tmp_path / "hf")


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
def test_destination_of_the_wrong_form(name, layout, message, network, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=message):
        export_weights(network, tmp_path / name, layout)
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_smp_wants_a_whole_segmenter(tmp_path):
    with pytest.raises(UserError, match="an encoder alone"):
        export_weights(mit_b0(), tmp_path / "out", "smp")
    export_weights(mit_b0(), tmp_path / "mit_b0.pth", "nvlabs")
    assert "patch_embed1.proj.weight" in torch.load(tmp_path / "mit_b0.pth", weights_only=True)
    assert isinstance(load_network(tmp_path / "mit_b0.pth")[0], MixTransformer)


@pytest.mark.parametrize(
    ("layout", "name"),
    [("native", "w.safetensors"), ("nvlabs", "w.pth"), ("huggingface", "w"), ("smp", "w")],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, layout, name):
    network = segformer_b0(2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a disk with as much room
    try:
        with pytest.raises(UserError, match=r"/w.*' cannot be written \(File too large\); give"):
            export_weights(network, tmp_path / name, layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
