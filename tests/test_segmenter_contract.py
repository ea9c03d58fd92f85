"""Every command works with a user's segmenter that keeps the contract."""

import csv
import importlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segformer_pl.checkpoints import load_network, load_weights
from segformer_pl.cli import main
from segformer_pl.data import shapes
from segformer_pl.models import SegFormer
from segformer_pl.task import SegmentationTask

TOY = "toy_segmenter.ToySegmenter"


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Make the module of the toy networks importable for the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.generate(folder, {"train": 8, "validation": 2})
    return folder


def options(data, runs, network=TOY, **changes):
    settings = {
        "model.network": network,
        "model.lr": 0.01,
        "model.warmup_steps": 0,
        "model.poly_power": 0,  # a constant learning rate
        "data.path": data,
        "data.batch_size": 2,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.num_sanity_val_steps": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.logger.save_dir": runs,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Folder of a run of two steps, with a width other than the default."""
    torch.manual_seed(0)
    runs = tmp_path_factory.mktemp("runs")
    main(["fit", *options(data, runs, model__network__width=6)])
    return next(runs.glob("*/version_0"))


@pytest.fixture(scope="module")
def checkpoint(run):
    return run / "checkpoints" / "last.ckpt"


@pytest.fixture
def again(data, tmp_path):
    """Options of a command on the run's network."""
    return options(data, tmp_path, model__network__width=6)


@pytest.fixture(scope="module")
def task(checkpoint):
    return SegmentationTask.load_from_checkpoint(checkpoint, weights_only=True).eval()


@pytest.fixture(scope="module")
def network(task):
    return task.network


def test_fit_groups_its_parameters_and_writes_a_report(run, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    assert content["global_step"] == 2
    assert content["hyper_parameters"]["network"]["class_path"] == TOY
    groups = content["optimizer_states"][0]["param_groups"]
    assert [(group["name"], len(group["params"])) for group in groups] == [
        ("encoder", 4),
        ("encoder_no_decay", 2),
        ("head", 2),
    ]
    assert (run / "report.html").is_file()


def test_a_checkpoint_rebuilds_the_network(network):
    assert type(network).__name__ == "ToySegmenter"
    assert network.init_args() == {"num_classes": 6, "width": 6, "in_channels": 3}


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_validate_gives_the_loss_of_the_run(run, checkpoint, again):
    cli = main(["validate", *again, f"--ckpt_path={checkpoint}"])
    (row,) = (row for row in csv.DictReader((run / "metrics.csv").open()) if row["val/loss"])
    assert cli.trainer.callback_metrics["val/loss"].item() == pytest.approx(float(row["val/loss"]))


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_a_resumed_run_equals_an_uninterrupted_one(data, tmp_path, checkpoint):
    width = {"model__network__width": 6}
    longer = options(data, tmp_path, trainer__max_steps=4, **width)
    resumed = main(["fit", *longer, f"--ckpt_path={checkpoint}"])
    assert resumed.trainer.global_step == 4
    straight = main(["fit", *options(data, tmp_path / "other", trainer__max_steps=4, **width)])
    expected = straight.model.network.state_dict()
    for name, tensor in resumed.model.network.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_another_network_is_refused_on_resume(data, tmp_path, checkpoint):
    with pytest.raises(SystemExit, match=r"model\.network\.width is 8 here and was 6 in"):
        main(["fit", *options(data, tmp_path), f"--ckpt_path={checkpoint}"])


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_layer_decay_follows_layer_ids(data, tmp_path):
    changes = {"model__layer_decay": 0.5, "trainer__limit_val_batches": 0}
    cli = main(["fit", *options(data, tmp_path, trainer__max_steps=1, **changes)])
    rates = {g["name"]: g["initial_lr"] for g in cli.trainer.optimizers[0].param_groups}
    assert rates == {
        "encoder_00": 0.005,
        "encoder_00_no_decay": 0.005,
        "encoder_01": 0.01,
        "head": 0.1,
    }


def test_predict_writes_the_masks_of_the_network(tmp_path, checkpoint, task):
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    files = [f"--input={tmp_path / 'image.png'}", f"--output={tmp_path / 'out'}"]
    main(["predict", f"--ckpt={checkpoint}", *files, "--device=cpu"])
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "image.png"))
    images = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        assert (mask == task.predict_step({"image": images}, 0)[0].numpy()).mean() > 0.999


@pytest.mark.slow
def test_profile_counts_the_parts_of_the_network(capsys, monkeypatch):
    command = importlib.import_module("segformer_pl.commands.profile")
    quick = partial(command.measure_latency, min_seconds=0.01)
    monkeypatch.setattr(command, "measure_latency", quick)
    size = ["--size", "32", "48", "--num-classes", "3", "--device", "cpu", "--json"]
    main(["profile", TOY, *size, "--width", "4", "--in_channels", "2"])
    cost = json.loads(capsys.readouterr().out)
    assert cost["image_shape"] == [2, 32, 48]
    assert cost["paper_macs"] is None
    assert {part["name"]: part["output_shape"] for part in cost["parts"]} == {
        "fine": [1, 4, 8, 12],
        "norm": [1, 4, 8, 12],
        "coarse": [1, 4, 4, 6],
        "classes": [1, 3, 4, 6],
    }
    assert cost["head_parameters"] == 3 * (4 + 1)
    assert cost["macs"] == 96 * 4 * 2 * 25 + 24 * 4 * 4 * 9 + 24 * 3 * 4


def test_profile_refuses_other_classes():
    for name, sentence in {
        "toy_segmenter.ToyEncoder": "has no argument num_classes",
        "toy_segmenter.Nothing": "there is no network 'toy_segmenter.Nothing'",
        "tokenize.tokenize": "has no argument num_classes",
        "torchvision.models.resnet18": "has no argument num_classes",
    }.items():
        with pytest.raises(SystemExit, match=sentence):
            main(["profile", name])


@pytest.mark.slow
def test_erf_measures_the_feature_maps(tmp_path, capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(importlib.import_module("segformer_pl.commands.erf"), "DPI", 30)
    arguments = ["--num_images", "2", "--device", "cpu", "--output", str(tmp_path / "erf")]
    main(["erf", "--ckpt", str(checkpoint), *arguments])
    assert "ToySegmenter" in capsys.readouterr().out
    known = json.loads((tmp_path / "erf" / "erf.json").read_text())
    assert [layer["name"] for layer in known["layers"]] == ["fine", "coarse"]
    assert [layer["grid"] for layer in known["layers"]] == [[16, 16], [8, 8]]


def test_recipe_diff_reports_no_recipe(run, capsys):
    main(["recipe", "diff", str(run)])
    text = capsys.readouterr().out
    assert "ToySegmenter" in text
    assert "no published recipe" in text


@pytest.mark.slow
def test_doctor_checks_the_smallest_size(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", *options(data, tmp_path, data__crop_size="[6,64]"), "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert exit_.value.code == 1
    (finding,) = (finding for finding in findings if finding["check"] == "sizes")
    assert (
        "crops of [6, 64] pixels are smaller than the 8 that ToySegmenter needs"
        in (finding["message"])
    )
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", *options(data, tmp_path), "--json"])
    known = json.loads(capsys.readouterr().out)
    assert exit_.value.code == 0, known["findings"]
    assert known["facts"]["cost"]["a step takes (s)"] > 0


@pytest.fixture(scope="module")
def native(checkpoint, tmp_path_factory):
    file = tmp_path_factory.mktemp("native") / "toy.safetensors"
    main(["convert", str(checkpoint), str(file), "--to", "native"])
    return file


def test_a_native_file_rebuilds_the_network(native, network):
    loaded, _ = load_network(native)
    assert type(loaded).__name__ == "ToySegmenter"
    assert loaded.init_args() == network.init_args()
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), network(images))


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_a_run_starts_from_native_weights(data, tmp_path, native, network):
    start = {"model__network__width": 6, "trainer__max_steps": 1, "model__lr": 0}
    start |= {"trainer__limit_val_batches": 0, "model__weights": native}
    cli = main(["fit", *options(data, tmp_path, **start)])
    assert torch.equal(cli.model.network.classes.weight, network.classes.weight)


def test_its_own_state_dict_loads(network):
    other = type(network)(**network.init_args())
    load_weights(other, network.state_dict())
    assert torch.equal(other.coarse.weight, network.coarse.weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "changes"),
    [
        ("toy_segmenter.ToyEncoder", {"encoder.width": 2, "in_indices": "[0,1]"}),
        ("toy_segmenter.toy_encoder", {"encoder.width": 2, "in_indices": "[0,1]"}),
        ("segformer_pl.models.mit_b0", {"encoder.drop_path_rate": 0.3}),
        (
            "segformer_pl.models.MixTransformer",
            {"encoder.embed_dims": "[2,4,5,8]", "encoder.depths": "[1,1,1,1]"},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_segformer_takes_any_encoder_from_the_command_line(data, tmp_path, encoder, changes):
    given = {f"model__network__{key}": value for key, value in changes.items()}
    given |= {"model__network__encoder": encoder, "model__network__decoder_dim": 4}
    # The arguments of the encoder have to follow its class.
    given = dict(sorted(given.items(), key=lambda item: len(item[0].split("."))))
    cli = main(options(data, tmp_path, "segformer_pl.models.SegFormer", **given), run=False)
    network = cli.model.network
    assert type(network) is SegFormer
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 6, 16, 16)
    stated = cli.model.hparams["network"]["init_args"]["encoder"]
    assert stated["class_path"] == encoder
    assert (
        network.encoder.spec()["init_args"].items()
        >= {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in stated["init_args"].items()
        }.items()
    )


def test_other_modules_are_refused_as_encoder_or_network(data, tmp_path, capsys):
    given = {"model__network__encoder": "torch.nn.Identity"}
    with pytest.raises(SystemExit):
        main(options(data, tmp_path, "segformer_pl.models.SegFormer", **given), run=False)
    assert "torch.nn.Identity does not correspond to a subclass of Encoder" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main(options(data, tmp_path, "torch.nn.Identity"), run=False)
    assert "torch.nn.Identity does not correspond to a subclass of Segmenter" in (
        capsys.readouterr().err
    )
