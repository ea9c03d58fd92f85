"""The figures of a run: files, loggers, and no effect on the training."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader

from segformer_pl.callbacks import (
    EffectiveReceptiveField,
    EvaluationRecord,
    PredictionPanel,
    RunReport,
)
from segformer_pl.callbacks.figures import publish
from segformer_pl.models import segformer_b0
from segformer_pl.task import SegmentationTask

NAMES = ["background", "object"]
PALETTE = [[10, 20, 30], [200, 100, 0]]


def make_task():
    torch.manual_seed(0)
    return SegmentationTask(segformer_b0(2), NAMES, PALETTE, warmup_steps=0)


def samples(count):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.rand(3, 32, 48, generator=generator),
            "label": torch.randint(0, 2, (32, 48), generator=generator),
            "id": f"image-{number}",
        }
        for number in range(count)
    ]


def fit(logger, callbacks, tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=4,
        val_check_interval=2,
        num_sanity_val_steps=1,
        logger=logger,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    task = make_task()
    torch.manual_seed(1)
    trainer.fit(task, DataLoader(samples(8), batch_size=2), DataLoader(samples(5), batch_size=2))
    return task


def test_a_figure_that_fails_is_a_warning(tmp_path):
    """Both when drawing fails and when the file cannot be written."""

    def broken():
        raise RuntimeError("no such glyph")

    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path / "run")
    with pytest.warns(UserWarning, match=r"no figure .*run/erf/step_0000000.png: .*no such glyph"):
        publish(trainer, broken, "erf", 0)
    assert list((tmp_path / "run" / "erf").iterdir()) == []
    (tmp_path / "run" / "worst").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot write"):
        publish(trainer, lambda: Figure(figsize=(1, 1)), "worst", 0)


@pytest.mark.slow
def test_every_validation_writes_a_png_file_to_the_run_folder(tmp_path):
    logger = CSVLogger(tmp_path, name="run")
    fit(logger, [EffectiveReceptiveField(3), PredictionPanel(3)], tmp_path)
    for name in ("erf", "predictions"):
        files = sorted((tmp_path / "run" / "version_0" / name).iterdir())
        assert [file.name for file in files] == ["step_0000002.png", "step_0000004.png"]
        assert np.asarray(Image.open(files[0]).convert("RGB")).std() > 10


@pytest.mark.slow
def test_a_training_continues_when_its_figures_cannot_be_written(tmp_path):
    run_dir = tmp_path / "run" / "version_0"
    run_dir.mkdir(parents=True)
    for name in ("predictions", "worst", "evaluation"):
        (run_dir / name).write_text("a file where the folder should be")
    logger = CSVLogger(tmp_path, name="run", version=0)
    with pytest.warns(UserWarning, match="cannot write") as warned:
        task = fit(logger, [EvaluationRecord(), PredictionPanel(3), RunReport()], tmp_path)
    assert task.trainer.global_step == 4
    text = " ".join(str(warning.message) for warning in warned)
    assert "This evaluation is lost; the run continues" in text
    assert "no figure" in text
    assert (run_dir / "report.html").is_file()


@pytest.mark.slow
def test_drawing_does_not_change_the_training(tmp_path):
    plain = fit(False, [], tmp_path)
    drawn = fit(CSVLogger(tmp_path), [EffectiveReceptiveField(3), PredictionPanel(3)], tmp_path)
    for (name, a), b in zip(plain.state_dict().items(), drawn.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_figures_are_logged_to_an_offline_wandb_run(tmp_path):
    """What else is logged has its test in test_media.py."""
    import wandb

    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    fit(logger, [EffectiveReceptiveField(2), PredictionPanel(2)], tmp_path)
    wandb.finish()
    media = {file.name for file in tmp_path.rglob("media/images/val/*.png")}
    assert len([name for name in media if "erf" in name]) == 2
    assert len([name for name in media if "predictions" in name]) == 2
