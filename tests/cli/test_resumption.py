"""Settings of a run that is resumed or evaluated from a checkpoint."""

import logging

import pytest

from segformer_pl.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_figures")]


def test_on_resume_the_command_line_takes_precedence(folder, tmp_path, caplog, options):
    main(["fit", *options(folder, tmp_path), "--model.lr=0.01"])
    (checkpoint,) = tmp_path.glob("*/version_0/checkpoints/last.ckpt")
    resumed = [*options(folder, tmp_path, trainer__max_steps=4), "--model.lr=0.002"]
    with caplog.at_level(logging.INFO):
        cli = main(["fit", *resumed, f"--ckpt_path={checkpoint}"])
    assert (
        f"model.lr is 0.002 here and was 0.01 in {checkpoint}: the value here is used"
        in caplog.text
    )
    assert caplog.text.count("is used") == 1
    assert cli.model.lr == 0.002
    assert cli.trainer.global_step == 4
    assert cli.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.002


def test_checkpoints_that_are_missing_truncated_or_of_another_network(
    capsys, folder, tmp_path, options, fail
):
    main(["fit", *options(folder, tmp_path)])
    capsys.readouterr()
    (checkpoint,) = tmp_path.glob("*/version_0/checkpoints/last.ckpt")
    validate = ["validate", *options(folder, tmp_path)]
    error = fail(capsys, [*validate, "--ckpt_path=nowhere.ckpt"])
    assert error == "error: ckpt_path: there is no file 'nowhere.ckpt'; give a run's checkpoint"
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(checkpoint.read_bytes()[:1000])
    error = fail(capsys, [*validate, f"--ckpt_path={broken}"])
    assert f"'{broken}' is no file of tensors, or is cut short" in error
    b1 = ["--model.network=segformer_pl.models.segformer_b1", f"--ckpt_path={checkpoint}"]
    error = fail(capsys, [*validate, *b1])
    assert "contains a segformer_pl.models.SegFormer, but model.network is a " in error
