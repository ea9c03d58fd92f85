"""Folders with shards and variants are read, and a file in a folder with the facts beside it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from segformer_pl.checkpoints import load_network, read_weights
from segformer_pl.errors import UserError

STATE = {"a.weight": torch.ones(2), "b.weight": torch.zeros(3)}
CONFIG = {"id2label": {"0": "road", "1": "tree"}}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def write(folder, name, tensors=STATE):
    (torch.save if name.endswith(".bin") else save_file)(dict(tensors), folder / name)


def write_shards(folder, stem, suffix, index):
    names = [f"{stem}-{n:05d}-of-00002.{suffix}" for n in (1, 2)]
    for name, key in zip(names, STATE):
        write(folder, name, {key: STATE[key]})
    (folder / index).write_text(json.dumps({"weight_map": dict(zip(STATE, names))}))


def check(source, expected=STATE):
    weights = read_weights(source)
    assert weights.tensors.keys() == expected.keys()
    assert all(torch.equal(weights.tensors[key], expected[key]) for key in expected)
    assert weights.task["class_names"] == ["road", "tree"]
    assert weights.config == CONFIG


@pytest.mark.parametrize(
    ("stem", "suffix", "index"),
    [
        ("model", "safetensors", "model.safetensors.index.json"),
        ("model.fp16", "safetensors", "model.safetensors.index.fp16.json"),
        ("pytorch_model", "bin", "pytorch_model.bin.index.json"),
        ("pytorch_model.fp16", "bin", "pytorch_model.bin.index.fp16.json"),
    ],
)
def test_shards_are_joined(folder, stem, suffix, index):
    write_shards(folder, stem, suffix, index)
    check(folder)
    (folder / f"{stem}-00002-of-00002.{suffix}").unlink()
    with pytest.raises(UserError, match=r"lacks .*-00002-of-00002\.\w+, which its index names"):
        read_weights(folder)
    for content in ("[]", "{", '{"weight_map": {"a": "../b"}}', '{"weight_map": {}}'):
        (folder / index).write_text(content)
        with pytest.raises(UserError, match=r"is no index of shards|names no files beside it"):
            read_weights(folder)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.fp16.bin"])
def test_a_variant_is_read_where_it_is_alone(folder, name):
    write(folder, name)
    check(folder)
    other = {key: tensor + 1 for key, tensor in STATE.items()}
    write(folder, name.replace("fp16", "bf16"), other)
    with pytest.raises(UserError, match=r"holds the variants bf16, fp16; give the file of one"):
        read_weights(folder)
    check(folder / name)
    check(folder / name.replace("fp16", "bf16"), other)
    write(folder, "pytorch_model.bin")  # without a variant
    check(folder)


def test_a_file_without_a_config_beside_it_is_read_alone(tmp_path):
    write(tmp_path, "model.safetensors")
    assert read_weights(tmp_path / "model.safetensors").config == {}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"max_shard_size": "20KB"}, {"variant": "fp16"}, {}])
def test_what_save_pretrained_writes_is_read(tmp_path, options):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        hidden_sizes=[8, 16, 16, 32],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16,
        id2label={0: "road", 1: "tree"},
    )
    theirs = SegformerForSemanticSegmentation(config).eval()
    both = options | {"variant": "fp16", "max_shard_size": "20KB"}
    for number, one in enumerate((options, both)):
        theirs.save_pretrained(tmp_path / str(number), **one)
        assert len(list((tmp_path / str(number)).glob("*.safetensors"))) > ("max_shard_size" in one)
        network, _ = load_network(tmp_path / str(number))
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(network.eval()(images), theirs(images).logits)
