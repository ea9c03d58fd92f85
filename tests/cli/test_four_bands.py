"""Images of four bands through the whole path: settings, training, evaluation, files, figures."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segformer_pl.cli import main
from segformer_pl.inference import Predictor
from segformer_pl.inference.targets import TARGETS
from tests.tiff_writer import write_tiff

MEAN, STD = "--model.image_mean=[0.5,0.5,0.5,0.3]", "--model.image_std=[0.3,0.3,0.3,0.4]"
SIZE = (48, 64)


def network_options(channels):
    network = "--model.network=tests.toy_segmenter.ToySegmenter"
    return [network, f"--model.network.in_channels={channels}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """TIFFs of RGB and a fourth band that is no alpha, their labels, and what describes them."""
    folder = tmp_path_factory.mktemp("four")
    rng = np.random.default_rng(0)
    for split, count in {"train": 4, "validation": 2}.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for name in map(str, range(count)):
            values = rng.integers(0, 256, (*SIZE, 4), np.uint8)
            label = np.kron(rng.integers(0, 2, (3, 4)), np.ones((16, 16))).astype(np.uint8)
            values[..., 3] = 200 * label
            (folder / "images" / split / f"{name}.tif").write_bytes(write_tiff(values, extra=[0]))
            Image.fromarray(label).save(folder / "labels" / split / f"{name}.png")
    description = "image_column: image\nlabel_column: label\nlabels: {names: [bare, plants]}\n"
    (folder / "mine.yaml").write_text(description)
    return folder


@pytest.fixture(scope="module")
def settings(data):
    """Options of a short training, but for the network and the number of bands."""
    options = {
        "data.dataset": data / "mine.yaml",
        "data.path": data,
        "data.batch_size": 2,
        "data.num_workers": 0,
        "data.photometric": "true",
        "data.crop_size": "[64,64]",
        "model.warmup_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.num_sanity_val_steps": 0,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
    }
    return [f"--{key}={value}" for key, value in options.items()]


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    """The folder of a training on four bands."""
    folder = tmp_path_factory.mktemp("run")
    main(
        [
            "fit",
            *settings,
            *network_options(4),
            *("--data.num_bands=4", MEAN, STD, f"--trainer.logger.save_dir={folder}"),
            "--trainer.callbacks+=segformer_pl.callbacks.PredictionPanel",
        ]
    )
    (checkpoint,) = folder.rglob("last.ckpt")
    return checkpoint.parents[1]


def test_a_training_leaves_a_checkpoint_figures_and_a_report(run, data, capsys):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["state_dict"]["network.fine.weight"].shape[1] == 4
    assert content["datamodule_hyper_parameters"]["num_bands"] == 4
    assert content["hyper_parameters"]["image_mean"] == [0.5, 0.5, 0.5, 0.3]
    for figure in ("predictions", "worst"):
        assert list((run / figure).iterdir())
    assert (run / "report.html").is_file()
    main(
        [
            *("validate", f"--config={run / 'config.yaml'}"),
            f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}",
        ]
    )
    assert "val/miou" in capsys.readouterr().out


def test_images_are_predicted_and_shown_in_rgb(run, data, tmp_path, capsys):
    checkpoint = run / "checkpoints" / "last.ckpt"
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "rgb.png")
    images = data / "images" / "validation"
    main(["predict", f"--ckpt={checkpoint}", f"--input={images}", f"--output={tmp_path / 'out'}"])
    assert sorted(f.name for f in (tmp_path / "out" / "masks").iterdir()) == ["0.png", "1.png"]
    assert Image.open(tmp_path / "out" / "masks" / "0.png").size == SIZE[::-1]
    assert Image.open(tmp_path / "out" / "overlays" / "0.png").mode == "RGB"
    given = [f"--input={tmp_path / 'rgb.png'}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(SystemExit):
        main(["predict", f"--ckpt={checkpoint}", *given])
    assert "rgb.png: the image has 3 bands (mode RGB), and 4 are read" in capsys.readouterr().err


def test_every_form_of_an_image_gives_one_mask(run, data, tmp_path):
    predictor = Predictor.load(run / "checkpoints" / "last.ckpt")
    file = data / "images" / "validation" / "0.tif"
    mask = predictor(file)
    values = np.random.default_rng(1).integers(0, 256, (*SIZE, 4), np.uint8)
    Image.fromarray(values).save(tmp_path / "alpha.png")
    masks = [
        predictor(tmp_path / "alpha.png"),
        predictor(Image.open(tmp_path / "alpha.png")),
        predictor(values),
        predictor(torch.from_numpy(values).permute(2, 0, 1)),
    ]
    assert mask.shape == SIZE
    assert all(np.array_equal(other, masks[0]) for other in masks)


@pytest.mark.slow
def test_receptive_fields_and_their_page(run, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("segformer_pl.commands.erf"), "DPI", 40)
    checkpoint = f"--ckpt={run / 'checkpoints' / 'last.ckpt'}"
    given = ["--num_images=1", "--layers=fine", "--explore"]
    main(["erf", checkpoint, *given, f"--output={tmp_path}"])
    assert {"erf.png", "erf.json", "erf_explorer.html"} <= {f.name for f in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match=r"takes images of 3 channels, and those of data set 'm.*"):
        main(["erf", checkpoint, "--against=segformer_b0", f"--output={tmp_path}"])


@pytest.mark.slow
def test_an_exported_graph_takes_four_bands_and_says_so(run, tmp_path, capsys):
    file = tmp_path / "four.pt2"
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    main(["export", checkpoint, "--to=torch-export", f"--output={file}", "--verify=validation"])
    assert "of the pixels of 2 images get the checkpoint's class" in capsys.readouterr().out
    graph = TARGETS["torch-export"].open(file)
    assert json.loads(graph.description["input"]) == (
        "(1, height, width, 4) uint8, RGB and fourth band"
    )
    assert len(json.loads(graph.description["image_mean"])) == 4
    assert graph.run(torch.zeros(1, 64, 96, 4, dtype=torch.uint8)).shape == (1, 64, 96)


def test_the_doctor_prints_the_normalisation(settings, data, capsys):
    with pytest.raises(SystemExit):
        main(["doctor", *settings, *network_options(4), "--data.num_bands=4"])
    error = next(o for o in capsys.readouterr().out.splitlines() if "[normalisation]" in o)
    images = [Image.open(f) for f in sorted((data / "images" / "train").iterdir())]
    rgb = np.stack([np.asarray(image) for image in images]) / 255
    labels = [Image.open(f) for f in sorted((data / "labels" / "train").iterdir())]
    fourth = np.stack([np.asarray(label) for label in labels])[..., None] * 200 / 255
    values = np.concatenate([rgb, fourth], axis=3)
    for option, expected in (
        ("--model.image_mean=", values.mean((0, 1, 2))),
        ("--model.image_std=", values.std((0, 1, 2))),
    ):
        given = json.loads(error.partition(option)[2].split(" ")[0])
        np.testing.assert_allclose(given, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            [*network_options(4), "--data.num_bands=4"],
            "the network takes 4 channels, but model.image_mean has 3 values and model.image_std "
            "3; give one of each for every channel (`doctor` prints those of the training images)",
        ),
        (
            [*network_options(4), MEAN, STD],
            "model.network takes images of 4 channels, but those of the data set are read as RGB, "
            "3; leave in_channels out, or give --data.num_bands 4 for images that store four bands",
        ),
        (
            [*network_options(3), "--data.num_bands=4"],
            "model.network takes images of 3 channels, but those of the data set are read with 4 "
            "bands (data.num_bands); give --model.network.in_channels 4, or leave data.num_bands "
            "out for RGB",
        ),
        ([*network_options(3), "--data.num_bands=5"], "data.num_bands is 5, which is not accepted"),
    ],
)
def test_settings_that_do_not_fit_get_a_sentence(
    settings, tmp_path, capsys, fail, options, sentence
):
    error = fail(capsys, ["fit", *settings, *options, f"--trainer.logger.save_dir={tmp_path}"])
    assert sentence in error
    assert not list(tmp_path.iterdir())


def test_rgb_images_are_refused_where_four_bands_are_read(settings, data, tmp_path, capsys, fail):
    for split in ("train", "validation"):
        for kind in ("images", "labels"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "data" / "images" / split / "a.png")
        Image.new("L", (64, 64)).save(tmp_path / "data" / "labels" / split / "a.png")
    options = [*network_options(4), "--data.num_bands=4", MEAN, STD]
    options += [f"--data.path={tmp_path / 'data'}", f"--trainer.logger.save_dir={tmp_path}"]
    error = fail(capsys, ["fit", *settings, *options])
    assert "sample 'a', column 'image': the image has 3 bands (mode RGB), and 4 are read" in error


def test_an_rgb_network_is_told_of_the_fourth_band(settings, tmp_path, recwarn):
    main(["fit", *settings, *network_options(3), f"--trainer.logger.save_dir={tmp_path}"])
    told = [str(w.message) for w in recwarn if "the image file holds 4 bands" in str(w.message)]
    assert len(told) == 1
    assert Path(tmp_path).rglob("last.ckpt")
