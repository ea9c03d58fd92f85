"""The command ``convert``."""

import pytest
import torch

from segformer_pl.checkpoints import load_network
from segformer_pl.models import segformer_b0


@pytest.mark.slow
def test_convert(run, fail, tmp_path):
    network = segformer_b0(3)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    text = run("convert", tmp_path / "w.pth", tmp_path / "hf", "--to", "huggingface")
    assert "segformer_pl segmenter" in text
    assert f"written to '{tmp_path / 'hf'}': layout huggingface" in text
    assert {file.name for file in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    run("convert", tmp_path / "hf", tmp_path / "n.safetensors", "--to", "native")
    for name, tensor in load_network(tmp_path / "n.safetensors")[0].state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name
    message = fail("convert", tmp_path / "w.pth", tmp_path / "hf", "--to", "smp")
    assert "exists already; remove it or give another" in message
    message = fail("convert", tmp_path / "nowhere.pth", tmp_path / "x", "--to", "smp")
    assert "there is no file or folder" in message
    assert "--to" in fail("convert", tmp_path / "w.pth", tmp_path / "x", "--to", "keras")
    assert not (tmp_path / "x").exists()
