"""The command ``robustness``: agreement with validate, interruption, refusals."""

import csv
import json
import re

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from segformer_pl.checkpoints.run_checkpoint import RunCheckpoint
from segformer_pl.checkpoints.run_data import load_data
from segformer_pl.cli import main
from segformer_pl.commands import robustness as command
from segformer_pl.commands.options.robustness import parse
from segformer_pl.commands.robustness import SETTINGS
from segformer_pl.commands.validation_split import TransformedSamples, ValidationSplit
from segformer_pl.data import shapes
from segformer_pl.data.streaming import Samples
from segformer_pl.errors import UserError
from segformer_pl.task import SegmentationTask
from tests.tiny_network import TINY_OPTION

pytestmark = pytest.mark.slow


FEW = [
    ("clean", "clean", 0),
    ("blur", "motion_blur", 1),
    ("noise", "shot_noise", 3),
    ("weather", "fog", 5),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint after one step, with a random classifier so that predictions vary."""
    folder = tmp_path_factory.mktemp("run")
    shapes.generate(folder / "data", {"train": 2, "validation": 6})
    settings = {
        "model.network": TINY_OPTION,
        "data.path": folder / "data",
        "data.batch_size": 2,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 1,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.logger.save_dir": folder,
    }
    main(["fit", *(f"--{key}={value}" for key, value in settings.items())])
    (file,) = folder.rglob("last.ckpt")
    content = torch.load(file, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    content["state_dict"]["network.head.classifier.weight"].normal_(generator=generator)
    del content["optimizer_states"]
    torch.save(content, file)
    return file


@pytest.fixture
def few(monkeypatch):
    """Only four of the settings, and an empty figure to save time."""
    monkeypatch.setattr(command, "SETTINGS", FEW)
    monkeypatch.setattr(command, "plot", lambda result: Figure())


def run(checkpoint, output, *options):
    arguments = [f"--ckpt={checkpoint}", f"--output={output}", "--device=cpu", *options]
    command.run(parse(arguments))


def rows(output):
    with (output / "robustness.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_settings_are_the_papers():
    assert len(SETTINGS) == len(set(SETTINGS)) == 1 + 12 * 5 + 4 * 3
    assert SETTINGS[0] == ("clean", "clean", 0)
    assert SETTINGS[1] == ("blur", "motion_blur", 1)
    assert SETTINGS[-1] == ("weather", "frost", 5)
    assert ("noise", "shot_noise", 4) not in SETTINGS


def test_the_clean_miou_is_that_of_validate(few, checkpoint, tmp_path, capsys):
    run(checkpoint, tmp_path / "out")
    printed = capsys.readouterr().out
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    task = SegmentationTask.load_from_checkpoint(checkpoint, weights_only=True)
    data = load_data(RunCheckpoint.read(checkpoint))
    metrics = trainer.validate(task, datamodule=data, verbose=False)[0]
    results = rows(tmp_path / "out")
    assert [(r["group"], r["corruption"], int(r["severity"])) for r in results] == FEW
    assert float(results[0]["miou"]) == pytest.approx(metrics["val/miou"], abs=1e-7)
    assert 0 < float(results[0]["miou"]) < 1
    assert len({r["miou"] for r in results}) == 4
    assert {r["num_images"] for r in results} == {"6"}
    out = tmp_path / "out"
    assert printed.endswith(f"table: {out / 'robustness.md'}\n")
    assert "mIoU in percent: clean " in printed
    numbers = json.loads((out / "robustness.json").read_text())
    assert numbers["clean"] == float(results[0]["miou"])
    assert numbers["severities"]["weather"]["fog"]["5"] == float(results[3]["miou"])
    assert (out / "robustness.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "robustness.md").read_text().count("| fog |") == 2


def test_the_checkpoint_is_read_once(few, checkpoint, tmp_path, reads_of):
    with reads_of(checkpoint) as reads:
        run(checkpoint, tmp_path / "out", "--num_images=1")
    assert reads == {"opened": 1, "loaded": 1}


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(few, checkpoint, tmp_path):
    run(checkpoint, tmp_path / "a", "--num_images=5")
    run(checkpoint, tmp_path / "b", "--num_images=5", "--data.num_workers=2")
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_an_interrupted_command_continues(few, checkpoint, tmp_path, monkeypatch, capsys):
    run(checkpoint, tmp_path / "whole", "--num_images=3")
    miou, evaluated = command._miou, []

    def interrupted(*arguments):
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        evaluated.append(miou(*arguments))
        return evaluated[-1]

    monkeypatch.setattr(command, "_miou", interrupted)
    options = [f"--ckpt={checkpoint}", f"--output={tmp_path / 'part'}", "--num_images=3"]
    with pytest.raises(SystemExit, match=r"^130$"):
        main(["robustness", *options, "--device=cpu"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"interrupted: 2 of 4 evaluations are in .*; the same command continue", message
    )
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")[:2]
    assert not (tmp_path / "part" / "robustness.md").exists()
    # A missing row in the middle is evaluated again and put back in its place.
    file = tmp_path / "part" / "robustness.csv"
    header, _, last = file.read_text().splitlines()
    file.write_text(f"{header}\n{last}\n")
    evaluated.clear()
    monkeypatch.setattr(command, "_miou", lambda *a: evaluated.append(miou(*a)) or evaluated[-1])
    run(checkpoint, tmp_path / "part", "--num_images=3")
    assert len(evaluated) == 3
    for name in ("robustness.csv", "robustness.md", "robustness.json"):
        assert (tmp_path / "part" / name).read_text() == (tmp_path / "whole" / name).read_text()
    evaluated.clear()
    run(checkpoint, tmp_path / "part", "--num_images=3")
    assert evaluated == []


def test_another_checkpoint_or_number_is_not_mixed_in(few, checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out", "--num_images=2")
    before = rows(tmp_path / "out")
    with pytest.raises(ValueError, match="its number of images is 2, here it is 6; give another"):
        run(checkpoint, tmp_path / "out")
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["network.head.classifier.bias"] += 1
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"its checkpoint \(its SHA-256\) is .*, here it is "):
        run(tmp_path / "other.ckpt", tmp_path / "out", "--num_images=2")
    shapes.generate(tmp_path / "data", {"validation": 7})
    with pytest.raises(ValueError, match="its fingerprint of the shards is "):
        run(checkpoint, tmp_path / "out", "--num_images=2", f"--data.path={tmp_path / 'data'}")
    assert rows(tmp_path / "out") == before


def test_the_corruption_of_an_image_depends_on_the_seed_alone(checkpoint):
    data = load_data(RunCheckpoint.read(checkpoint))
    samples = ValidationSplit(data, None).samples

    def corrupted(settings, seed=0):
        transforms = [command.corrupting_transforms(setting, seed) for setting in settings]
        return TransformedSamples(samples, transforms)

    fog, clean = corrupted(FEW)[3, 4], corrupted(FEW)[0, 4]
    assert fog["id"] == clean["id"]
    assert torch.equal(fog["label"], clean["label"])
    assert not torch.equal(fog["image"], clean["image"])
    assert torch.equal(corrupted(FEW[3:])[0, 4]["image"], fog["image"])
    assert not torch.equal(corrupted(FEW, 1)[3, 4]["image"], fog["image"])
    both = corrupted(FEW)
    noise = [(both[2, n]["image"] - both[0, n]["image"]).numpy() for n in (0, 1)]
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.2


def test_images_are_evenly_spaced_over_the_split(few, checkpoint, tmp_path, monkeypatch):
    positions = []
    getitem = Samples.__getitem__
    monkeypatch.setattr(
        Samples, "__getitem__", lambda self, p: positions.append(p) or getitem(self, p)
    )
    run(checkpoint, tmp_path / "out", "--num_images=3")
    assert positions == [0, 2, 4] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_images=7"], "--num_images 7: the validation split has 6 images; give at most"),
        (["--ckpt=nowhere.ckpt"], "--ckpt: there is no file 'nowhere.ckpt'"),
        (["--data.path=nowhere"], "data.path: there is no folder 'nowhere'"),
    ],
)
def test_refused(checkpoint, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(checkpoint, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [["--num_images=0"], ["--data.num_workers=-1"], ["--severity=9"], ["--device=tpu"]]
)
def test_arguments_are_checked(checkpoint, tmp_path, capsys, options):
    with pytest.raises(SystemExit) as exit_:
        run(checkpoint, tmp_path / "out", *options)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_all_settings(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out", "--num_images=2")
    assert len(rows(tmp_path / "out")) == 73
    table = (tmp_path / "out" / "robustness.md").read_text().splitlines()[4]
    assert table.count("|") == 18
