"""MaskFormer in transformers' layout: read, written, converted."""

import json

import pytest
import torch
from safetensors.torch import load_file

from segformer_pl.checkpoints import load_network, load_weights
from segformer_pl.checkpoints.conversion import export_weights
from segformer_pl.cli import main
from segformer_pl.errors import UserError
from segformer_pl.models import SegFormer, TimmEncoder
from segformer_pl.models.maskformer import MaskFormer
from segformer_pl.models.mit import mit_b0
from segformer_pl.models.swin import SwinEncoder

pytestmark = pytest.mark.slow  # transformers takes seconds to import

SWIN = "swin_tiny_patch4_window7_224"
TINY_SWIN = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}
SMALL = {"num_queries": 7, "decoder_dim": 64, "decoder_layers": 2, "decoder_mlp_dim": 32}


def small(kind, num_classes=4, **arguments):
    if kind == "swin":
        encoder = SwinEncoder(SWIN, **(TINY_SWIN | {"embed_dim": 16}))
    else:
        encoder = TimmEncoder(kind)
    return MaskFormer(encoder, num_classes, **(SMALL | arguments))


def images():
    return torch.randn(1, 3, 69, 101)


def scores(model, images):
    """Scores of a model of transformers."""
    outputs = model.eval()(images)
    probabilities = outputs.class_queries_logits.softmax(2)[..., :-1]
    return torch.einsum("bqk,bqhw->bkhw", probabilities, outputs.masks_queries_logits.sigmoid())


@pytest.mark.parametrize("kind", ["swin", "resnet18"])
def test_transformers_opens_what_is_written(kind, tmp_path, randomize):
    from transformers import AutoImageProcessor, MaskFormerForInstanceSegmentation

    settings = {"decoder_heads": 4, "mask_weight": 5.0, "no_object_weight": 0.5, "dropout": 0.0}
    network = randomize(small(kind, **settings)).float().eval()
    folder = tmp_path / "network"
    task = {"class_names": ["a", "b", "c", "d"], "ignore_index": 255}
    remarks = export_weights(network, folder, "huggingface", task)
    assert remarks[0] == (
        "preprocessor_config.json normalises and does not resize, while transformers' own default "
        "resizes the shorter side to 800 pixels"
    )
    model, info = MaskFormerForInstanceSegmentation.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.id2label == dict(enumerate("abcd"))
    assert model.config.decoder_config.decoder_attention_heads == 4
    torch.testing.assert_close(model.criterion.empty_weight, torch.tensor([1, 1, 1, 1, 0.5]))
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(scores(model, x), network(x), rtol=1e-4, atol=1e-5)
    assert not AutoImageProcessor.from_pretrained(folder).do_resize

    # What transformers writes is read again, and so is what it holds in memory.
    model.save_pretrained(tmp_path / "theirs")
    again, report = load_network(tmp_path / "theirs")
    assert again.init_args() == network.init_args()
    other = small(kind, **settings)
    load_weights(other, model.state_dict())
    for key, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
        assert torch.equal(other.state_dict()[key], tensor), key
    assert "criterion.empty_weight" in str(report)


def test_published_sizes_are_recognised(tmp_path):
    """Shapes alone determine the network, apart from heads and rates."""
    with torch.device("meta"):
        state = MaskFormer(SwinEncoder(SWIN), 150).state_dict()
    from segformer_pl.checkpoints import maskformer_layout as layout

    with torch.device("meta"):
        theirs = layout.transformers_state(MaskFormer(SwinEncoder(SWIN), 150))
        resnet = layout.transformers_state(MaskFormer(TimmEncoder("resnet50"), 150))
    spec = layout.network_spec("file", theirs, {})["init_args"]
    assert (spec["num_classes"], spec["num_queries"], spec["decoder_layers"]) == (150, 100, 6)
    assert spec["encoder"]["init_args"]["name"] == SWIN
    assert "embed_dim" not in spec["encoder"]["init_args"]
    assert layout.own_keys(theirs)[0].keys() == state.keys()
    spec = layout.network_spec("file", resnet, {"mask_weight": 7})["init_args"]
    assert spec["encoder"]["init_args"]["name"] == "resnet50"
    assert spec["mask_weight"] == 7.0


def test_the_encoder_alone_and_other_classes(tmp_path, randomize):
    network = randomize(small("resnet18")).float()
    export_weights(network, tmp_path / "network", "huggingface")
    other = small("resnet18", 9, freeze_batch_norm=True)
    report = load_weights(other, tmp_path / "network", parts="encoder")
    assert torch.equal(other.encoder.backbone.conv1.weight, network.encoder.backbone.conv1.weight)
    norm, wanted = other.encoder.backbone.layer4[1].bn2, network.encoder.backbone.layer4[1].bn2
    assert torch.equal(norm.running_var, wanted.running_var)
    assert not torch.equal(other.mask_head[0].weight, network.mask_head[0].weight)
    assert "only the encoder was asked for" in str(report)


def test_convert(tmp_path, randomize, capsys):
    network = randomize(small("swin")).float().eval()
    export_weights(network, tmp_path / "native.safetensors", "native")
    main(
        ["convert", str(tmp_path / "native.safetensors"), str(tmp_path / "hf"), "--to=huggingface"]
    )
    main(["convert", str(tmp_path / "hf"), str(tmp_path / "back.safetensors"), "--to=native"])
    assert "layout native" in capsys.readouterr().out
    again, _ = load_network(tmp_path / "back.safetensors")
    x = images()
    with torch.no_grad():
        assert torch.equal(again.eval()(x), network(x))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("backbone_config", "mlp_ratio", 2.0),
        ("backbone_config", "use_absolute_embeddings", True),
        ("decoder_config", "activation_function", "gelu"),
    ],
)
def test_settings_without_an_argument_here_are_refused(section, key, value, tmp_path, randomize):
    folder = tmp_path / "network"
    export_weights(small("swin"), folder, "huggingface")
    config = json.loads((folder / "config.json").read_text())
    config[section][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"states {key} {value} in the {section}"):
        load_network(folder)


def test_another_number_of_heads_is_refused(tmp_path):
    export_weights(small("swin", decoder_heads=4), tmp_path / "network", "huggingface")
    with pytest.raises(UserError, match="trained with decoder_heads 4, and the model has 8"):
        load_weights(small("swin"), tmp_path / "network")


def test_an_incomplete_source_is_refused():
    from segformer_pl.checkpoints.maskformer_layout import transformers_state

    state = transformers_state(small("swin"))
    del state["model.transformer_module.queries_embedder.weight"]
    with pytest.raises(UserError, match=r"lacks 'transformer_decoder.query_pos.weight'"):
        load_network(state)


@pytest.mark.parametrize("parts", ["all", "encoder"])
def test_keys_of_data_parallel(parts, tmp_path, randomize):
    source = randomize(small("swin")).float()
    export_weights(source, tmp_path / "network", "huggingface")
    state = load_file(tmp_path / "network" / "model.safetensors")
    wrapped = {f"module.{key}": tensor for key, tensor in state.items()}
    network = small("swin")
    report = load_weights(network, wrapped, parts=parts)
    expected = source.state_dict()
    same = [
        key for key, tensor in network.state_dict().items() if torch.equal(tensor, expected[key])
    ]
    assert len(same) >= report.num_tensors > 0
    assert (len(same) == len(expected)) == (parts == "all")
    if parts == "all":
        loaded, _ = load_network(wrapped)
        assert all(torch.equal(t, expected[key]) for key, t in loaded.state_dict().items())
    stray = wrapped | {"step": torch.zeros(())}
    with pytest.raises(UserError, match=r"no place for \(step\)"):
        load_weights(small("swin"), stray, parts=parts)


def test_other_systems_are_refused(tmp_path):
    export_weights(small("swin"), tmp_path / "network", "huggingface")
    with pytest.raises(UserError, match="is no SegFormer of a known layout"):
        load_weights(SegFormer(mit_b0(), 4), tmp_path / "network")
    with pytest.raises(UserError, match=r"MaskFormer on Swin and on timm's resnet18.* on convnext"):
        export_weights(small("convnext_atto"), tmp_path / "other", "huggingface")
    with pytest.raises(UserError, match="has no projection of the coarsest map"):
        export_weights(small("swin", decoder_dim=128), tmp_path / "other", "huggingface")
    with pytest.raises(
        UserError, match=r"serves SegFormer .* a MaskFormer on SwinEncoder; use hug"
    ):
        export_weights(small("swin"), tmp_path / "other.pth", "nvlabs")
