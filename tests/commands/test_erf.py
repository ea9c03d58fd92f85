"""The command ``erf``: files, table, refusals."""

import importlib
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from segformer_pl import __version__
from segformer_pl.analysis.erf import NoFieldError, exploration, load_erf, weights_hash
from segformer_pl.checkpoints import export_weights
from segformer_pl.cli import main
from segformer_pl.models import mit_b0, segformer_b0
from segformer_pl.normalization import IMAGENET_MEAN, IMAGENET_STD

FIGURES = ("png", "pdf")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with six training and six validation images and their labels."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for number in range(6):
            for kind, shape, ending in (
                ("images", (64, 96, 3), "png"),
                ("labels", (64, 96), "png"),
            ):
                file = folder / kind / split / f"{number}.{ending}"
                file.parent.mkdir(parents=True, exist_ok=True)
                high = 255 if kind == "images" else 6
                Image.fromarray(rng.integers(0, high, shape, np.uint8)).save(file)
    return folder


@pytest.fixture
def run(images, tmp_path, capsys, monkeypatch):
    """Function that runs the command on these images; returns its output and its folder."""
    monkeypatch.setattr(importlib.import_module("segformer_pl.commands.erf"), "DPI", 40)

    def call(*arguments):
        data = ["--data.dataset", "shapes", "--data.path", str(images)]
        main(["erf", *data, "--output", str(tmp_path / "out"), *arguments])
        return capsys.readouterr().out, tmp_path / "out"

    return call


@pytest.mark.slow
def test_random_weights(run):
    text, folder = run("--model", "segformer_b0", "--num_images", "3")
    assert {file.name for file in folder.iterdir()} == {
        *(f"{name}.{kind}" for name in ("erf", "erf_profile", "erf_area") for kind in FIGURES),
        *("erf.npz", "erf.json"),
    }
    description = json.loads((folder / "erf.json").read_text())
    assert description["num_images"] == 3
    assert description["about"]["weights"] == "random weights"
    assert description["about"]["data"] == "shapes"
    assert list(description["numbers"]) == ["stage1", "stage2", "stage3", "stage4", "head"]
    assert (
        description["numbers"]["stage4"]["radius_50"][0]
        > description["numbers"]["stage1"]["radius_50"][0]
    )
    assert load_erf(folder / "erf")["head"].mean.shape == (64, 96)
    assert "segformer_b0 (random weights), 3 images of 64x96 pixels" in text
    assert "stage4, head are wider than the image" in text
    assert "radius of 50 % (px)" in text
    assert "[95 % CI over images]" in text
    numbers = [name.split("/")[-1].split(".")[0] for name in description["image_ids"]]
    assert numbers == ["0", "2", "4"]
    assert description["about"]["source"] == "segformer_b0"
    assert description["about"]["segformer_pl"] == __version__
    assert description["about"]["mean"] == list(IMAGENET_MEAN)
    assert description["about"]["std"] == list(IMAGENET_STD)
    assert np.asarray(Image.open(folder / "erf.png").convert("RGB")).std() > 10


@pytest.mark.slow
def test_a_model_can_be_an_import_path(run, tmp_path, monkeypatch):
    (tmp_path / "network_of_erf.py").write_text(
        "from segformer_pl.models import segformer_b0\n\n\n"
        "def small(num_classes):\n"
        "    return segformer_b0(num_classes, decoder_dim=16)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--num_images", "1", "--layers", "stage1"]
    text, folder = run("--model", "network_of_erf.small", *options)
    assert text.startswith("network_of_erf.small (random weights), 1 image of 64x96 pixels")
    assert load_erf(folder / "erf").about["source"] == "network_of_erf.small"


@pytest.mark.slow
def test_a_checkpoint_against_a_network_of_timm(run, tmp_path, images, reads_of):
    main(
        [
            *("fit", "--model.network", "segformer_pl.models.segformer_b0"),
            *("--data.dataset", "shapes", "--data.path", str(images), "--data.num_workers", "0"),
            *("--trainer.max_steps", "1", "--trainer.accelerator", "cpu"),
            *("--trainer.logger.init_args.save_dir", str(tmp_path / "runs")),
            *("--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0"),
        ]
    )
    (ckpt,) = (tmp_path / "runs").rglob("last.ckpt")
    with reads_of(ckpt) as reads:
        text, folder = run(
            *("--ckpt", str(ckpt), "--against", "timm:resnet18", "--num_images", "2"),
            *("--size", "128", "128", "--gradient", "relu", "--layers", "stage2", "stage4"),
        )
    assert reads == {"opened": 1, "loaded": 1}
    assert all((folder / f"erf_difference.{kind}").is_file() for kind in FIGURES)
    first, second = load_erf(folder / "erf"), load_erf(folder / "against")
    assert list(first.layers) == list(second.layers) == ["stage2", "stage4"]
    assert first.settings == second.settings
    assert first.settings["image_size"] == [128, 128]
    assert first.about["weights"] == "trained, step 1"
    assert first.about["mean"] == list(IMAGENET_MEAN)
    assert second.about["weights"] == "random weights"
    assert "timm resnet18 (random weights)" in text


@pytest.mark.slow
def test_the_explorer_shows_both_networks(run, monkeypatch):
    monkeypatch.setattr(exploration, "LONGER_SIDE", 2)
    text, folder = run(
        *("--model", "segformer_b0", "--against", "timm:resnet18", "--num_images", "2"),
        *("--layers", "stage1", "stage2", "--explore"),
    )
    page = (folder / "erf_explorer.html").read_text()
    assert text.splitlines()[-1] == f"written: {folder / 'erf_explorer.html'}"
    (data,) = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(data)
    assert data["size"] == [64, 96]
    assert (data["rows"], data["columns"]) == ([32], [24, 72])
    assert [network["name"] for network in data["networks"]] == [
        *("segformer_b0 (random weights)", "timm resnet18 (random weights)")
    ]
    for network in data["networks"]:
        assert [layer["name"] for layer in network["layers"]] == ["stage1", "stage2"]


def test_images_are_evenly_spaced_over_the_split(run, monkeypatch):
    """The first images of a split may all show one class or one street."""
    ids = []

    def measure(network, batches, **settings):
        for batch in batches:
            ids.extend(batch["id"])
        raise NoFieldError("enough")

    module = importlib.import_module("segformer_pl.commands.erf")
    monkeypatch.setattr(module, "effective_receptive_field", measure)
    with pytest.raises(SystemExit, match="enough"):
        run("--model", "segformer_b0", "--num_images", "3")
    # The command measures the first image alone before the others.
    assert [name.split("/")[-1].split(".")[0] for name in ids] == ["0", "0", "2", "4"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --ckpt, --weights and --model"),
        (["--model", "segformer_b0", "--ckpt", "x"], "give one of --ckpt, --weights and --model"),
        (["--ckpt", "nowhere.ckpt"], "there is no file 'nowhere.ckpt'"),
        (["--model", "segformer_b9"], "there is no network 'segformer_b9'"),
        (["--model", "segformer_pl.models.SegFormer"], "cannot be built from num_classes alone"),
        (["--model", "segformer_b0", "--against", "timm:resnet1"], "no network 'resnet1'"),
        (["--model", "segformer_b0", "--num_images", "0"], "an integer of at least 1"),
        (["--model", "segformer_b0", "--reduction", "mean"], "give one of relu, l1, sum, random"),
        (["--model", "segformer_b0", "--size", "0", "64"], "at least 1 pixel"),
        (["--model", "segformer_b0", "--state", "ema"], "--state is for --weights"),
        (
            ["--model", "segformer_b0", "--data.num_bands", "4"],
            "takes images of 3 channels, and those of data set 'shapes' are read with 4; give ",
        ),
        (["--model", "segformer_b0", "--num_images", "1", "--layers", "x"], "no layer 'x'"),
        (
            ["--model", "segformer_b0", "--data.path", "nowhere"],
            "data.path: there is no folder 'nowhere",
        ),
    ],
)
def test_refusals_are_one_sentence(run, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        run(*arguments)
    assert isinstance(exit_.value.code, str)
    assert exit_.value.code.startswith("error: ")
    assert message in exit_.value.code


def refusal_before_measuring(run, monkeypatch, *arguments):
    """The error message of the command, which measures at most one image of each network."""
    module = importlib.import_module("segformer_pl.commands.erf")
    measure = module._measure

    def measure_one(subject, data, options, num_images):
        assert num_images == 1
        return measure(subject, data, options, num_images)

    monkeypatch.setattr(module, "_measure", measure_one)
    with pytest.raises(SystemExit) as exit_:
        run("--model", "segformer_b0", "--num_images", "5", *arguments)
    return exit_.value.code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "head", "--against", "timm:resnet18"], "no layer 'head'"),
        (
            ["--against", "timm:maxvit_tiny_tf_224"],
            "timm:maxvit_tiny_tf_224 accepts no images of 64x96 pixels",
        ),
        (["--reduction", "sum"], "ends in a LayerNorm"),
        (["--reduction", "40", "--layers", "stage4", "stage1"], "has channels 0 to 31"),
    ],
)
def test_what_cannot_be_measured_is_refused_after_one_image(run, monkeypatch, arguments, message):
    assert message in refusal_before_measuring(run, monkeypatch, *arguments)


@pytest.mark.parametrize("inside", ["", "folder"])
def test_a_file_in_place_of_the_output_folder_is_refused_before_measuring(
    run, monkeypatch, tmp_path, inside
):
    (tmp_path / "file").write_text("x")
    output = str(tmp_path / "file" / inside)
    module = importlib.import_module("segformer_pl.commands.erf")
    monkeypatch.setattr(module, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as exit_:
        run("--model", "segformer_b0", "--output", output)
    assert f"--output: cannot write to the folder '{output}'" in exit_.value.code
    assert f"'{tmp_path / 'file'}' is a file; give a folder" in exit_.value.code


def test_a_data_set_without_a_path_asks_for_the_option_of_this_command(tmp_path):
    with pytest.raises(SystemExit) as exit_:
        main(
            [
                "erf",
                "--model",
                "segformer_b0",
                "--data.dataset",
                "camvid",
                "--output",
                str(tmp_path),
            ]
        )
    assert "give --data.path with a folder" in exit_.value.code
    assert "--path" not in exit_.value.code


@pytest.mark.slow
def test_one_image_has_no_intervals(run):
    text, _ = run("--model", "segformer_b0", "--num_images", "1", "--layers", "stage1")
    assert "1 image of 64x96 pixels, no intervals" in text
    assert "nan" not in text


@pytest.mark.slow
def test_images_of_different_sizes_need_the_option_size(run, images, tmp_path):
    other = tmp_path / "mixed"
    shutil.copytree(images, other)
    for kind, shape in (("images", (32, 64, 3)), ("labels", (32, 64))):
        Image.fromarray(np.zeros(shape, np.uint8)).save(other / kind / "validation" / "0.png")
    with pytest.raises(SystemExit) as exit_:
        run("--data.path", str(other), "--model", "segformer_b0")
    assert "have different sizes" in exit_.value.code
    run(
        "--data.path",
        str(other),
        "--model",
        "segformer_b0",
        "--size",
        "64",
        "64",
        "--num_images",
        "2",
    )


@pytest.mark.slow
def test_random_weights_are_the_same_each_time(run):
    hashes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        _, folder = run("--model", "segformer_b0", "--num_images", "1", "--layers", "stage1")
        hashes.append(load_erf(folder / "erf").about["weights_hash"])
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("build", [mit_b0, partial(segformer_b0, 3)])
def test_weights_for_other_than_three_channels_are_refused(run, tmp_path, build):
    export_weights(build(in_channels=1), tmp_path / "one.safetensors", "native")
    with pytest.raises(SystemExit, match="takes images of 1 channels, and those of data set 'sha"):
        run("--weights", str(tmp_path / "one.safetensors"))


def test_an_average_beside_the_weights_is_chosen(run, tmp_path):
    network = segformer_b0(3)
    average = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    for tensor in average.values():
        tensor.mul_(2)
    torch.save({"state_dict": network.state_dict(), "ema": average}, tmp_path / "w.pth")
    arguments = ["--weights", str(tmp_path / "w.pth"), "--num_images", "1", "--layers", "stage1"]
    with pytest.raises(SystemExit, match="choose one: --state ema, of"):
        run(*arguments)
    _, folder = run(*arguments, "--state", "ema")
    network.load_state_dict(average)
    assert load_erf(folder / "erf").about["weights_hash"] == weights_hash(network)
