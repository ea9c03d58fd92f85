"""``--ckpt_path last``, ``best`` and ``hpc`` are files, or errors."""

import os
import shutil

import pytest
import torch

from segformer_pl.cli import main
from segformer_pl.data import shapes


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes.generate(tmp_path / "shapes", {"train": 4, "validation": 1})
    settings = {
        "model.network": "segformer_pl.models.segformer_b0",
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
@pytest.mark.parametrize("name", ["last", "best", "hpc"])
def test_a_name_without_a_file_is_refused(capsys, arguments, tmp_path, command, name):
    """``last`` started from step 0 without a word."""
    error = refused(capsys, command, *arguments, "--trainer.max_steps=2", f"--ckpt_path={name}")
    assert error.startswith("error: ckpt_path: ")
    expected = "hpc_ckpt_" if name == "hpc" else "runs/unnamed/*/checkpoints/last.ckpt"
    assert expected in error
    assert not list(tmp_path.rglob("version_*"))


def test_other_words_are_files(capsys, arguments):
    for word in ("Last", "latest"):
        error = refused(capsys, "validate", *arguments, f"--ckpt_path={word}")
        assert f"there is no file {word!r}" in error
    error = refused(capsys, "validate", *arguments, "--ckpt_path=")
    assert "ckpt_path is empty" in error


@pytest.mark.slow
def test_names_mean_the_newest_run_of_the_configuration(capsys, arguments, tmp_path, caplog):
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
    assert "last is runs/unnamed/version_0/checkpoints/last.ckpt" in caplog.text
    # A moved folder: the paths inside its checkpoints are those of before.
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere" / "runs")
    moved = f"--trainer.logger.save_dir={tmp_path / 'elsewhere' / 'runs'}"
    caplog.clear()
    os.utime(tmp_path / "elsewhere/runs/unnamed/version_0/checkpoints/last.ckpt")
    cli = main(["validate", *arguments, moved, "--ckpt_path=best"])
    assert "unnamed/version_0/checkpoints/best.ckpt" in caplog.text
    assert cli.model.trained_steps == 2


def test_the_newest_requeued_job(capsys, arguments, tmp_path):
    for number in (2, 10):
        torch.save({"state_dict": {}}, tmp_path / f"hpc_ckpt_{number}.ckpt")
    (tmp_path / "hpc_ckpt_old.ckpt").touch()
    from segformer_pl.commands.named_checkpoint import named_checkpoint

    cli = main([*arguments, "--trainer.max_steps=2"], run=False)
    assert named_checkpoint("hpc", cli.config).name == "hpc_ckpt_10.ckpt"
