"""The progress bar counts the optimiser steps of the whole run."""

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from segformer_pl.callbacks.progress import StepProgressBar


def fit(folder, max_steps, ckpt_path=None):
    bar = StepProgressBar()
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        logger=False,
        callbacks=[bar],
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(BoringModel(), ckpt_path=ckpt_path)
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
