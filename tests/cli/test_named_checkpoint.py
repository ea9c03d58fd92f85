"""``--ckpt_path last`` and ``best``, and ``--run_name``: the file they stand for, or an error."""

import os
import shutil
import sys

import pytest
import torch

from segformer_pl.analysis.run import Run
from segformer_pl.cli import main
from segformer_pl.data import shapes
from tests.tiny_network import TINY_OPTION

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_figures")]


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes.generate(tmp_path / "shapes", {"train": 4, "validation": 1})
    settings = {
        "model.network": TINY_OPTION,
        "data.path": tmp_path / "shapes",
        "data.batch_size": 2,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.num_sanity_val_steps": 0,
        "trainer.val_check_interval": 2,
        "trainer.enable_progress_bar": "false",
    }
    return [f"--{key}={value}" for key, value in settings.items()]


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    assert "Traceback" not in capsys.readouterr().err
    return str(exit_.value.code)


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
@pytest.mark.parametrize("name", ["last", "best"])
def test_a_name_without_a_file_is_refused(capsys, arguments, tmp_path, command, name):
    """A regression: ``last`` started from step 0 without an error."""
    error = refused(capsys, command, *arguments, "--trainer.max_steps=2", f"--ckpt_path={name}")
    assert error.startswith("error: ckpt_path: ")
    assert "runs/shapes_SegFormer/*/checkpoints/last.ckpt" in error
    assert not list(tmp_path.rglob("version_*"))


def test_other_names_are_paths(capsys, arguments):
    for name in ("Last", "latest"):
        error = refused(capsys, "validate", *arguments, f"--ckpt_path={name}")
        assert f"there is no file {name!r}" in error
    error = refused(capsys, "validate", *arguments, "--ckpt_path=")
    assert "ckpt_path is empty" in error


@pytest.mark.slow
def test_names_stand_for_the_newest_run_of_the_configuration(capsys, arguments, tmp_path, caplog):
    monitor = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.monitor=val/miou",
        "--trainer.callbacks.mode=max",
        "--trainer.callbacks.filename=best",
    ]
    fit = ["fit", *arguments, *monitor]
    main([*fit, "--trainer.max_steps=2"])
    main([*fit, "--trainer.max_steps=4", "--trainer.logger.name=other"])
    caplog.set_level("INFO")
    assert main([*fit, "--trainer.max_steps=3", "--ckpt_path=last"]).trainer.global_step == 3
    assert "last is runs/shapes_SegFormer/version_0/checkpoints/last.ckpt" in caplog.text
    # In a moved folder, the paths inside the checkpoints are outdated.
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere" / "runs")
    moved = f"--trainer.logger.save_dir={tmp_path / 'elsewhere' / 'runs'}"
    caplog.clear()
    os.utime(tmp_path / "elsewhere/runs/shapes_SegFormer/version_0/checkpoints/last.ckpt")
    cli = main(["validate", *arguments, moved, "--ckpt_path=best"])
    assert "shapes_SegFormer/version_0/checkpoints/best.ckpt" in caplog.text
    assert cli.model.trained_steps == 2


def test_run_name_starts_a_run_and_then_continues_it(capsys, arguments, tmp_path, caplog):
    caplog.set_level("INFO")
    run_dir = tmp_path / "runs" / "shapes_SegFormer" / "007"  # a name, and no number
    fit = ["fit", *arguments, "--run_name=007", "--trainer.log_every_n_steps=1"]
    # A start that was killed before its first checkpoint has left logged values.
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.csv").write_text("epoch,step,train/loss\n0,0,99.0\n")
    assert main([*fit, "--trainer.max_steps=2"]).trainer.global_step == 2
    assert "the run in runs/shapes_SegFormer/007 begins" in caplog.text
    assert "99.0" not in (run_dir / "metrics.csv").read_text()
    assert "99.0" in (run_dir / "superseded_after_step_0000000" / "metrics.csv").read_text()
    # The same global batch, divided as for two devices
    divided = ["--data.batch_size=1", "--trainer.accumulate_grad_batches=2"]
    cli = main([*fit, "--trainer.max_steps=3", *divided])
    assert cli.trainer.global_step == 3
    assert "the run in runs/shapes_SegFormer/007 continues from step 2" in caplog.text
    assert [path.name for path in run_dir.parent.iterdir()] == ["007"]
    assert Run(run_dir).resumptions[0].step == 2
    assert list(Run(run_dir).metrics["train/loss"].step) == [1, 2, 3]
    assert Run(run_dir).config["run_name"] is None
    # Where the last checkpoint is damaged, it continues from the one before.
    last = run_dir / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"last.ckpt.1, .* is used instead"):
        cli = main([*fit, "--trainer.max_steps=4", *divided])
    assert cli.trainer.global_step == 4
    assert list(Run(run_dir).metrics["train/loss"].step) == [1, 2, 3, 4]
    # Its configuration, which names no run, is that of other commands too.
    main(["validate", f"--config={run_dir / 'config.yaml'}", f"--ckpt_path={last}"])
    assert (run_dir.parent / "version_0" / "evaluation").is_dir()


def test_run_names_that_cannot_be_used_are_refused(capsys, arguments, earlier_runs, tmp_path):
    fit = ["fit", *arguments, "--trainer.max_steps=2"]
    error = refused(capsys, *fit, "--run_name=version_0", "--model.lr=0.5")
    assert error.startswith(
        "error: run_name: the run of this name, 'runs/shapes_SegFormer/version_0', is "
    )
    assert "another experiment: model.lr is 0.5 here and 6e-05 there; give another" in error
    assert "ckpt_path" not in error
    (tmp_path / "runs/shapes_SegFormer/version_0/checkpoints/last.ckpt").write_text("damaged")
    error = refused(capsys, *fit, "--run_name=version_0")
    assert error.startswith(
        "error: run_name: 'runs/shapes_SegFormer/version_0/checkpoints/last.ckpt' is no"
    )
    error = refused(capsys, *fit, "--run_name=x", "--ckpt_path=last")
    assert "'x' continues from its own checkpoint, but ckpt_path is 'last'" in error
    error = refused(capsys, *fit, "--run_name=x", "--trainer.logger.version=y")
    assert "'x' here and 'y' in trainer.logger.init_args.version" in error
    for name in ("../x", "..", ".", ""):
        assert "is no name of a folder" in refused(capsys, *fit, f"--run_name={name}")
    assert "that is no CSVLogger" in refused(capsys, *fit, "--run_name=x", "--trainer.logger=false")
    error = refused(capsys, "validate", *arguments, "--run_name=x")
    assert "name of a training; leave it out of validate" in error


@pytest.fixture
def earlier_runs(arguments, tmp_path):
    """Two runs of the arguments, each with a configuration and a checkpoint, in two folders."""
    cli = main([*arguments, "--trainer.max_steps=2"], run=False)
    text = cli.parser.dump(cli.config, skip_none=False)
    for number, folder in enumerate(("root", "runs")):  # the newer one in the default folder
        run_dir = tmp_path / folder / "shapes_SegFormer" / "version_0"
        last = run_dir / "checkpoints" / "last.ckpt"
        last.parent.mkdir(parents=True)
        (run_dir / "config.yaml").write_text(text)
        torch.save({"state_dict": {}}, last)
        os.utime(last, (number, number))


def test_another_experiment_of_the_same_name_is_not_resumed(
    capsys, arguments, earlier_runs, tmp_path, monkeypatch
):
    """A regression: its folder and history were continued."""
    monkeypatch.setattr(
        "segformer_pl.cli.training.read_checkpoint", lambda file, _: sys.exit(f"is {file}")
    )
    here = ["--trainer.max_steps=9", "--data.num_workers=1", "--trainer.log_every_n_steps=1"]
    arguments = [*arguments, "--ckpt_path=last"]
    last = "runs/shapes_SegFormer/version_0/checkpoints/last.ckpt"
    assert refused(capsys, "fit", *arguments, *here) == f"is {last}"
    error = refused(capsys, "fit", *arguments, *here, "--data.crop_size=[32,64]", "--model.lr=0.5")
    assert "data.crop_size is [32, 64] here and" in error
    assert "model.lr is 0.5 here and " in error
    assert "num_workers" not in error
    assert error.endswith(f"such as {last}")
    loss = "--model.loss=segformer_pl.losses.Dice"
    assert "model.loss is segformer_pl.losses.Dice" in refused(capsys, "fit", *arguments, loss)
    assert refused(capsys, "validate", *arguments, "--model.lr=0.5") == f"is {last}"
    b1 = ["--model.network=segformer_pl.models.segformer_b1"]
    assert "there is no 'runs/shapes_segformer_b1/*" in refused(capsys, "fit", *arguments, *b1)
    b1.append("--trainer.logger.name=shapes_SegFormer")
    assert "segformer_b1 here" in refused(capsys, "validate", *arguments, *b1)


def test_names_are_looked_up_below_the_root(capsys, arguments, earlier_runs, tmp_path, monkeypatch):
    """A regression: they were looked up in the default folder, which may hold another run."""
    monkeypatch.setattr(
        "segformer_pl.cli.training.read_checkpoint", lambda file, _: sys.exit(f"is {file}")
    )
    root = tmp_path / "root"
    for command in ("fit", "validate"):
        given = [f"--trainer.default_root_dir={root}", "--ckpt_path=last"]
        error = refused(capsys, command, *arguments, *given)
        assert error == f"is {root}/shapes_SegFormer/version_0/checkpoints/last.ckpt"
