"""The commands ``profile`` and ``convert``."""

import json

import pytest
import torch

from segformer_pl.checkpoints import load_network
from segformer_pl.cli import main
from segformer_pl.models import segformer_b0


@pytest.fixture
def run(capsys):
    """Function that runs a command and returns its output."""

    def call(*arguments):
        assert main([str(argument) for argument in arguments]) is None
        return capsys.readouterr().out

    return call


@pytest.fixture
def fail(capsys):
    """Function that runs a command that must fail and returns its error message."""

    def call(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        code = exit_.value.code
        message = code if isinstance(code, str) else capsys.readouterr().err
        assert code not in (0, None)
        assert message.startswith("error: ")
        assert "\n" not in message.rstrip("\n")
        return message

    return call


@pytest.mark.slow
def test_profile_in_json(run):
    text = run(
        *["profile", "segformer_b0", "--size", "512", "512", "--num_classes", "150", "--json"]
    )
    results = json.loads(text)
    assert results["paper_gflops"] == 8.4
    assert results["gmacs"] == 4.1
    assert results["num_parameters"] == 3_752_694
    assert [part["key_length"] for part in results["parts"]] == [256, 256, 256, 256, None]
    assert results["latency"]["num_threads"] == 1


@pytest.mark.slow
def test_profile_of_an_ablation(run):
    text = run(
        *[
            "profile",
            "segformer_b1",
            "--size",
            "64",
            "96",
            "--num_classes",
            "3",
            "--sr_ratios",
            "[4,4,2,1]",
        ],
        *["--in_channels", "4", "--decoder_dim", "32"],
    )
    assert text.startswith("segformer_b1, one image of 64x96 pixels, 3 classes")
    stage1 = next(line for line in text.splitlines() if line.startswith("stage1"))
    assert stage1.split()[-2:] == ["384", "24"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("segformer_b9", "there is no network 'segformer_b9'"),
        ("segformer_b0 --size 20 20", "sr_ratio 8 is larger than the 5x5 token grid"),
        ("segformer_b0 --size 0 64", "give integers of at least 1"),
        ("segformer_b0 --sr_ratio [1,1,1,1]", "unrecognized arguments: --sr_ratio"),
        ("segformer_b0 --sr_ratios [1,1]", "one integer of at least 1 for each"),
        ("--json segformer_b0", "give MODEL first"),
        ("", "model"),
    ],
)
def test_profile_refuses(fail, arguments, message):
    assert message in fail("profile", *arguments.split())


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
