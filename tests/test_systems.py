"""SETR, MaskFormer, SeMask and DeepLabv3+ through every command, on tiny backbones."""

import csv
import importlib
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from segformer_pl import models
from segformer_pl.checkpoints import load_network
from segformer_pl.cli import main
from segformer_pl.data import shapes

pytestmark = pytest.mark.slow

VIT = {"backbone": "test_vit", "image_size": 64, "out_indices": [0, 1], "decoder_dim": 8}
SWIN = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
CNN = {"backbone": "test_resnet", "decoder_dim": 32}
DETR = {"decoder_dim": 64, "decoder_layers": 1, "decoder_heads": 2, "decoder_mlp_dim": 16}
SYSTEMS = {
    "setr_naive": VIT,
    "setr_pup": VIT,
    "setr_mla": VIT,
    "maskformer": {"backbone": "test_resnet", "num_queries": 8, **DETR},
    "maskformer_swin": {"num_queries": 8, **DETR, **SWIN},
    "semask_fpn": {"decoder_dim": 8, **SWIN},
    "deeplabv3plus": CNN,
    "deeplabv3plus_mmseg": CNN,
}


@pytest.fixture(scope="module", autouse=True)
def without_figures():
    """Leave out figures and reports, which take most of the time and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segformer_pl.callbacks.report.write_report", lambda run: "none")
        patch.setattr("segformer_pl.callbacks.evaluation.publish", lambda *_: None)
        patch.setattr(importlib.import_module("segformer_pl.commands.erf"), "_save", lambda *_: [])
        yield


def flags(arguments, prefix=""):
    return [f"--{prefix}{key}={value}" for key, value in arguments.items()]


def options(name, data, runs, **changes):
    settings = {
        "model.network": f"segformer_pl.models.{name}",
        **{f"model.network.{key}": value for key, value in SYSTEMS[name].items()},
        "model.warmup_steps": 0,
        "data.path": data,
        "data.batch_size": 2,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.limit_val_batches": 1,
        "trainer.num_sanity_val_steps": 0,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.logger.save_dir": runs,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return flags(settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.generate(folder, {"train": 8, "validation": 2})
    return folder


@pytest.fixture(scope="module", params=SYSTEMS)
def run(request, data, tmp_path_factory):
    """Name of a system, and the folder of a run of two steps."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp(request.param)
    main(["fit", *options(request.param, data, runs)])
    return request.param, next(runs.glob("*/version_0"))


@pytest.fixture
def checkpoint(run):
    return run[1] / "checkpoints" / "last.ckpt"


def test_validate_and_resume(run, checkpoint, data, tmp_path):
    name, folder = run
    cli = main(["validate", *options(name, data, tmp_path), f"--ckpt_path={checkpoint}"])
    (row,) = (row for row in csv.DictReader((folder / "metrics.csv").open()) if row["val/loss"])
    assert cli.trainer.callback_metrics["val/loss"].item() == pytest.approx(float(row["val/loss"]))
    longer = options(name, data, tmp_path, trainer__max_steps=3, trainer__limit_val_batches=0)
    resumed = main(["fit", *longer, f"--ckpt_path={checkpoint}"])
    assert resumed.trainer.global_step == 3


def test_predict_and_convert(run, checkpoint, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    native = tmp_path / "native.safetensors"
    main(["convert", str(checkpoint), str(native), "--to", "native"])
    network, expected = (load_network(file)[0].eval() for file in (native, checkpoint))
    images = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        assert torch.equal(network(images), expected(images))
    files = [f"--input={tmp_path / 'image.png'}", f"--output={tmp_path / 'out'}"]
    main(["predict", f"--ckpt={checkpoint}", *files, "--device=cpu"])
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "image.png"))
    assert mask.shape == (64, 64)
    assert mask.max() < network.num_classes


def test_profile_and_doctor(run, checkpoint, data, tmp_path, capsys, monkeypatch):
    name, _ = run
    command, counted = importlib.import_module("segformer_pl.commands.profile"), []
    quick = partial(command.measure_latency, min_seconds=0.01)
    monkeypatch.setattr(command, "measure_latency", quick)
    complexity = command.complexity
    monkeypatch.setattr(
        command, "complexity", lambda *a: counted.append(complexity(*a)) or counted[0]
    )
    size = ["--size", "64", "64", "--num_classes", "6", "--device", "cpu", "--json"]
    main(["profile", name, *size, *flags(SYSTEMS[name])])
    cost = json.loads(capsys.readouterr().out)
    num_parameters = sum(p.numel() for p in load_network(checkpoint)[0].parameters())
    assert cost["num_parameters"] == num_parameters
    assert sum(part["num_parameters"] for part in cost["parts"]) == num_parameters
    assert 0 < sum(part["macs"] for part in cost["parts"]) <= cost["macs"]
    # The doctor would count the same again, which takes seconds.
    monkeypatch.setattr("segformer_pl.doctor.cost.complexity", lambda *_: counted[0])
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", *options(name, data, tmp_path), "--json"])
    known = json.loads(capsys.readouterr().out)
    assert exit_.value.code == 0, known["findings"]
    assert not [one for one in known["findings"] if one["check"] in ("recipe", "network")]
    assert known["facts"]["cost"]["a step takes (s)"] > 0


def test_erf(checkpoint, tmp_path):
    arguments = ["--num_images", "2", "--device", "cpu", "--output", str(tmp_path / "erf")]
    main(["erf", "--ckpt", str(checkpoint), *arguments])
    known = json.loads((tmp_path / "erf" / "erf.json").read_text())
    network = load_network(checkpoint)[0].eval()
    with torch.no_grad():
        maps = network.feature_maps(torch.zeros(1, 3, 64, 64))
    assert {one["name"]: tuple(one["grid"]) for one in known["layers"]} == {
        name: tuple(feature_map.shape[2:]) for name, feature_map in maps.items()
    }


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("setr_pup --backbone=resnet18", "resnet18 is no plain vision transformer"),
        ("maskformer --backbone=vit_tiny_patch16_224", "16, 16, 16 and not several of 4, 8, 16"),
        ("semask_fpn --backbone=resnet18", "resnet18 is no Swin Transformer"),
        ("deeplabv3plus --backbone=pvt_v2_b0", "give pvt_v2_b0 an output_stride of 16"),
        ("deeplabv3plus --backbone=test_resnet --out_indices=[2,3,4]", "reads a map of stride 4"),
        ("setr_naive --backbone=test_vit --size 60 64", "sides are multiples of 16, and these"),
        ("setr_naive --backbone=test_vit --image_size=60", "image_size=60: .* a multiple of 16"),
    ],
)
def test_backbones_and_sizes_that_do_not_fit_are_refused(fail, command, sentence):
    message = fail("profile", *command.split(), "--device", "cpu")
    assert re.search(sentence, message), message


@pytest.mark.parametrize(
    ("name", "other", "option", "sentence"),
    [
        ("setr_pup", "maskformer", "weights", "no tensor of a MaskFormer .*; give weights that w"),
        ("setr_naive", "setr_pup", "weights", "lacks 32 tensors of the model .*; give the weights"),
        ("semask_fpn", "setr_mla", "encoder_weights", "no tensor of a SETR .*; give weights that"),
    ],
)
def test_weights_of_another_system_are_refused(name, other, option, sentence, data, tmp_path, fail):
    torch.save(getattr(models, name)(6, **SYSTEMS[name]).state_dict(), tmp_path / "weights.pth")
    given = {f"model__{option}": tmp_path / "weights.pth"}
    message = fail("fit", *options(other, data, tmp_path, **given))
    assert re.search(sentence, message), message
