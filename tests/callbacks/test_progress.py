"""The progress bar counts the optimiser steps of the whole run."""

import sys

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from segformer_pl.callbacks.progress import StepProgressBar


def fit(folder, max_steps, ckpt_path=None, model=None, **arguments):
    bar = StepProgressBar()
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        logger=False,
        callbacks=[bar],
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **{"limit_val_batches": 0} | arguments,
    )
    trainer.fit(BoringModel() if model is None else model, ckpt_path=ckpt_path)
    return trainer, bar.train_progress_bar


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_resumed_run_shows_its_step_out_of_max_steps(tmp_path, capsys):
    trainer, bar = fit(tmp_path, 3)
    assert (bar.n, bar.total) == (3, 3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    capsys.readouterr()
    _, bar = fit(tmp_path, 5, tmp_path / "last.ckpt")
    assert (bar.initial, bar.n, bar.total) == (3, 5, 5)
    printed = capsys.readouterr().out
    assert "3/5" in printed
    assert "5/5" in printed
    assert "6/" not in printed  # batches
    assert "Epoch" not in printed


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_log_of_a_job_gets_few_bars(is_terminal, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    fit(tmp_path, 60)
    printed = capsys.readouterr().out
    assert "50/60" in printed
    assert "60/60" in printed
    assert ("49/60" in printed) == is_terminal


class Failing(BoringModel):
    """Fails in the first validation."""

    def validation_step(self, batch, batch_idx):
        raise ValueError("a damaged image")


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("in_training", [False, True])
def test_an_error_begins_on_a_line_of_its_own(tmp_path, capsys, monkeypatch, in_training):
    model = Failing()
    if in_training:
        monkeypatch.setattr(model, "training_step", model.validation_step)
    with pytest.raises(ValueError, match="a damaged image"):
        fit(tmp_path, 4, model=model, limit_val_batches=1, val_check_interval=2)
    printed = capsys.readouterr().out
    assert "step:" in printed
    assert printed.endswith("\n")


def test_the_bar_does_not_show_the_end_of_the_run_folders_name(tmp_path):
    logger = CSVLogger(tmp_path, version="second")
    trainer = pl.Trainer(accelerator="cpu", logger=logger, enable_checkpointing=False)
    assert "v_num" not in StepProgressBar().get_metrics(trainer, BoringModel())
