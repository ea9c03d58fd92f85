"""Error messages and exit statuses."""

import inspect
import subprocess
import sys
import warnings

import pytest
import torch

from segformer_pl.cli import main
from segformer_pl.cli.exits import plain_warnings
from segformer_pl.task import SegmentationTask

NETWORK = ["--model.network", "segformer_pl.models.segformer_b0"]


def test_warnings_of_this_package_are_printed_without_code():
    with plain_warnings():
        own = warnings.formatwarning("an odd label", UserWarning, inspect.getfile(main), 3)
        foreign = warnings.formatwarning("an odd label", UserWarning, __file__, 3)
    assert own == "warning: an odd label\n"
    assert foreign == warnings.formatwarning("an odd label", UserWarning, __file__, 3)
    assert "test_exits.py:3: UserWarning" in foreign


@pytest.mark.slow
def test_images_smaller_than_the_network_accepts(capsys, folder, tmp_path, options, fail):
    error = fail(capsys, ["fit", *options(folder, tmp_path, data__crop_size="[20,20]")])
    assert error.startswith("error: sr_ratio 8 is larger than the 5x5 token grid")


@pytest.mark.slow
def test_other_value_errors_keep_their_traceback(folder, tmp_path, monkeypatch, options):
    def fault(*arguments, **options):
        return torch.zeros(2).numpy().reshape(3)

    monkeypatch.setattr(SegmentationTask, "training_step", fault)
    with pytest.raises(ValueError, match="cannot reshape"):
        main(["fit", *options(folder, tmp_path)])


@pytest.mark.slow
def test_an_unwritable_run_folder_is_refused_in_one_sentence(
    capsys, folder, tmp_path, options, fail
):
    (tmp_path / "runs").write_text("a file")
    error = fail(capsys, ["fit", *options(folder, tmp_path / "runs")])
    assert error.startswith(f"error: cannot write to the folder '{tmp_path / 'runs'}")
    error = fail(capsys, ["fit", *options(folder, tmp_path), "--trainer.val_check_interval=0.5"])
    assert "val_check_interval" in error
    assert "\n" not in error


@pytest.mark.slow
def test_an_error_is_one_line_and_a_non_zero_exit_status(tmp_path):
    command = [sys.executable, "-m", "segformer_pl", "fit", *NETWORK]
    done = subprocess.run(
        [*command, "--data.path=nowhere", "--trainer.max_steps=1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: data.path: there is no folder 'nowhere'")
    assert "Traceback" not in done.stderr
