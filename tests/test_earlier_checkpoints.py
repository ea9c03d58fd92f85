"""A checkpoint of an earlier version opens: it holds ``norm_eps`` in place of weight constants.

``fixtures/norm_eps_run.ckpt.xz`` was written by ``fit`` at commit c4d03b3 after three steps from
weights with LayerNorm epsilons of 0.02 and 0.001. ``norm_eps_run.json`` holds the results of that
version.
"""

import json
import lzma
from pathlib import Path

import pytest
import torch

from segformer_pl.checkpoints import load_network, load_weights
from segformer_pl.cli import main
from segformer_pl.data import shapes
from segformer_pl.task import SegmentationTask

FIXTURES = Path(__file__).parent / "fixtures"
EPS = {"norm_eps": 0.02, "conv_norm_eps": 0.001}


@pytest.fixture(scope="module")
def expected():
    return json.loads((FIXTURES / "norm_eps_run.json").read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    file = tmp_path_factory.mktemp("old") / "last.ckpt"
    file.write_bytes(lzma.decompress((FIXTURES / "norm_eps_run.ckpt.xz").read_bytes()))
    assert "norm_eps" in torch.load(file, weights_only=True)
    return file


@pytest.fixture
def options(tmp_path):
    shapes.generate(tmp_path / "shapes", {"train": 8, "validation": 4})
    settings = {
        "model.network": "segformer_pl.models.SegFormer",
        "model.network.encoder": "segformer_pl.models.MixTransformer",
        "model.network.encoder.embed_dims": "[2,4,4,4]",
        "model.network.encoder.depths": "[1,1,1,1]",
        "model.network.encoder.num_heads": "[1,1,1,1]",
        "model.network.encoder.sr_ratios": "[4,1,1,1]",
        "model.network.encoder.mlp_ratio": 1,
        "model.network.decoder_dim": 4,
        "model.weights": "not read again",
        "model.lr": 0.003,
        "model.warmup_steps": 0,
        "data.path": tmp_path / "shapes",
        "data.batch_size": 2,
        "data.num_workers": 0,
        "data.crop_size": "[32,32]",
        "trainer.accelerator": "cpu",
        "trainer.val_check_interval": 3,
        "trainer.num_sanity_val_steps": 0,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.logger.save_dir": tmp_path / "runs",
    }
    return [f"--{key}={value}" for key, value in settings.items()]


def logits_of(network, task):
    image = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32).sin()
    with torch.no_grad():
        return network.eval()(task.normalize(image))[0].flatten().tolist()


def test_it_loads_in_python(checkpoint, expected):
    task = SegmentationTask.load_from_checkpoint(checkpoint, weights_only=True)
    assert task.network.weight_constants() == EPS
    assert logits_of(task.network, task) == pytest.approx(expected["logits"], abs=1e-5)
    # With other epsilons the network computes another function.
    task.network.set_weight_constants({"norm_eps": 1e-6, "conv_norm_eps": 1e-5})
    assert logits_of(task.network, task) != pytest.approx(expected["logits"], abs=1e-2)
    # It also loads as weights, into the network that it describes and into an existing one.
    network, _ = load_network(checkpoint)
    assert network.weight_constants() == EPS
    load_weights(task.network, checkpoint)
    for loaded in (network, task.network):
        assert logits_of(loaded, task) == pytest.approx(expected["logits"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_it_is_validated(checkpoint, expected, options):
    cli = main(["validate", *options, f"--ckpt_path={checkpoint}"])
    metrics = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
    assert metrics.pop("step") == 2  # the last of its three steps, which earlier versions left out
    assert metrics == pytest.approx(expected["validate"], rel=1e-4, nan_ok=True)


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_it_is_resumed(checkpoint, expected, options, tmp_path):
    cli = main(["fit", *options, "--trainer.max_steps=6", f"--ckpt_path={checkpoint}"])
    metrics = {name: cli.trainer.callback_metrics[name].item() for name in expected["resumed"]}
    # After three steps, processors that round differently disagree on a few of 16,384 pixels.
    assert metrics.pop("val/aacc") == pytest.approx(expected["resumed"].pop("val/aacc"), abs=5e-3)
    assert metrics == pytest.approx(expected["resumed"], rel=1e-3)
    groups = cli.trainer.optimizers[0].param_groups
    assert [[g["name"], len(g["params"]), g["weight_decay"]] for g in groups] == (
        expected["groups"]
    )
    # The new checkpoint stores the constants by name.
    (last,) = tmp_path.glob("runs/*/version_0/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["weight_constants"] == EPS
    assert SegmentationTask.load_from_checkpoint(last).network.weight_constants() == EPS
