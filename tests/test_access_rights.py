"""Files and folders that the user may not read or write: one sentence that names them."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

import segformer_pl.cli.ablate  # noqa: F401  which an ordinary user may not import from root's home
from segformer_pl.cli import main
from segformer_pl.commands.input_files import find_files
from segformer_pl.data import shapes
from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.sources import open_split
from segformer_pl.errors import UserError
from segformer_pl.models import segformer_b0

NOBODY = 65534


@contextmanager
def ordinary_user():
    """Give up root's right to read and write everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def place():
    """A folder that an ordinary user can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder
        for part in [*folder.rglob("*"), folder]:
            if part.is_dir():
                part.chmod(0o755)


def write_images(place):
    for part in ("images/train", "labels/train"):
        (place / "data" / part).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(place / "data/images/train/a.png")
    Image.new("L", (8, 8)).save(place / "data/labels/train/a.png")


def write_parquet(place):
    shapes.generate(place / "data", {"train": 2, "validation": 1})


@pytest.mark.parametrize("mode", [0o000, 0o300, 0o444], ids=["none", "not listed", "not opened"])
@pytest.mark.parametrize(
    ("write", "denied"),
    [
        (write_images, "data"),
        (write_images, "data/images"),
        (write_images, "data/images/train"),
        (write_images, "data/labels/train"),
        (write_images, "data/images/train/a.png"),
        (write_images, "data/labels/train/a.png"),
        (write_parquet, "data"),
        (write_parquet, "data/train-00000-of-00001.parquet"),
    ],
)
def test_data_that_may_not_be_read(place, write, denied, mode):
    write(place)
    (place / denied).chmod(mode & 0o333 if (place / denied).is_file() else mode)
    with ordinary_user(), pytest.raises(UserError) as error:
        open_split(find_dataset("shapes"), str(place / "data"), "train").read(0)
    assert f"'{place / denied}" in str(error.value)
    assert "Permission denied" in str(error.value)
    assert "access rights" in str(error.value) or "correct the path" in str(error.value)


def refused(capsys, arguments):
    with ordinary_user(), pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return str(exit_.value.code) if isinstance(exit_.value.code, str) else error


@pytest.mark.parametrize("denied", ["secret", "secret/file"], ids=["folder", "file"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--config=FILE.yaml"],
        ["doctor", "FILE.yaml"],
        ["fit", "--data.dataset=FILE.yaml", "--model.network=segformer_pl.models.segformer_b0"],
        ["predict", "--ckpt=FILE.ckpt", "--input=.", "--output=y"],
        ["validate", "--ckpt_path=FILE.ckpt", "--model.network=segformer_pl.models.segformer_b0"],
        ["robustness", "--ckpt=FILE.ckpt", "--output=y"],
        ["erf", "--weights=FILE.safetensors", "--data.dataset=shapes", "--data.path=data"],
        ["convert", "FILE.pth", "x.safetensors", "--to=native"],
        ["compare", "FILE.npz", "FILE.npz"],
        ["ablate", "FILE.yaml"],
        ["recipe", "diff", "FILE.yaml"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_file_that_may_not_be_read(capsys, place, monkeypatch, arguments, denied):
    monkeypatch.chdir(place)
    (place / "secret").mkdir(mode=0o755)
    arguments = [argument.replace("FILE", str(place / "secret" / "file")) for argument in arguments]
    suffix = next(Path(a).suffix for a in arguments if "secret" in a)
    file = place / "secret" / f"file{suffix}"
    torch.save({}, file)
    Image.new("RGB", (8, 8)).save(place / "a.png")
    if "--data.path=data" in arguments:
        write_parquet(place)
    (place / denied if denied == "secret" else file).chmod(0)
    error = refused(capsys, arguments)
    assert str(place / "secret") in error
    assert "Permission denied" in error
    assert error.count("\n") <= 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "w.pth", "secret/x.safetensors", "--to=native"],
        ["fit", "--trainer.logger.save_dir=secret/x", "--trainer.max_steps=1"],
        ["fit", "--run_name=a", "--trainer.logger.save_dir=secret", "--trainer.max_steps=1"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_a_folder_that_may_not_be_written(capsys, place, monkeypatch, arguments, mode):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    if arguments[0] == "fit":
        write_parquet(place)
        arguments = [
            *arguments,
            "--model.network=toy_segmenter.ToySegmenter",
            "--data.path=data",
            "--data.num_workers=0",
            "--trainer.accelerator=cpu",
        ]
    else:
        torch.save(segformer_b0(num_classes=2).state_dict(), place / "w.pth")
    (place / "secret").mkdir()
    (place / "secret").chmod(mode)
    error = refused(capsys, arguments)
    assert "secret" in error
    assert "Permission denied" in error
    assert error.splitlines()[-1].startswith("error: ")


def test_an_input_folder_that_may_not_be_read(place):
    (place / "in").mkdir()
    (place / "in").chmod(0)
    with ordinary_user(), pytest.raises(UserError, match=r"--input: .*in. cannot be read"):
        find_files(str(place / "in"), "--input")


def test_a_cache_folder_of_shapes_that_may_not_be_read(capsys, place, monkeypatch):
    (place / "cache").mkdir()
    (place / "cache").chmod(0)
    monkeypatch.setattr(shapes, "cache_folder", lambda: place / "cache" / "shapes")
    monkeypatch.chdir(place)
    error = refused(capsys, ["erf", "--model=segformer_b0", "--data.dataset=shapes"])
    assert str(place / "cache") in error
    assert "Permission denied" in error
