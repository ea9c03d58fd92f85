"""The figures of a run: where they go, and that drawing them changes nothing."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image
from torch.utils.data import DataLoader

from segformer_pl.callbacks import EffectiveReceptiveField, PredictionPanel, PredictionWriter
from segformer_pl.callbacks.predictions import plot_predictions
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
            "id": f"picture-{number}",
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


def test_png_files_lie_beside_the_run_one_for_each_validation(tmp_path):
    logger = CSVLogger(tmp_path, name="run")
    fit(logger, [EffectiveReceptiveField(3), PredictionPanel(3)], tmp_path)
    for name in ("erf", "predictions"):
        files = sorted((tmp_path / "run" / "version_0" / name).iterdir())
        assert [file.name for file in files] == ["step_0000002.png", "step_0000004.png"]
        assert np.asarray(Image.open(files[0]).convert("RGB")).std() > 10


@pytest.mark.slow
def test_drawing_does_not_change_the_training(tmp_path):
    plain = fit(False, [], tmp_path)
    drawn = fit(CSVLogger(tmp_path), [EffectiveReceptiveField(3), PredictionPanel(3)], tmp_path)
    for (name, a), b in zip(plain.state_dict().items(), drawn.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_figures_reach_an_offline_wandb_run(tmp_path):
    import wandb

    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    fit(logger, [EffectiveReceptiveField(2), PredictionPanel(2)], tmp_path)
    wandb.finish()
    media = {file.parent.name + "/" + file.name for file in tmp_path.rglob("media/**/*.png")}
    assert len([name for name in media if "erf" in name]) == 2
    assert len([name for name in media if "predictions" in name]) == 2


def test_panel_shows_every_picture_with_a_legend_of_all_classes():
    shown = [
        (s["id"], s["image"], torch.where(s["label"] == 0, 255, 1), s["label"]) for s in samples(3)
    ]
    figure = plot_predictions(shown, NAMES, PALETTE)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == [t for s in samples(3) for t in (s["id"], "label", "prediction")]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*NAMES, "unlabelled"]
    label, prediction = figure.axes[1].images[0].get_array(), figure.axes[2].images[0].get_array()
    assert {tuple(color) for color in label.reshape(-1, 3)} == {(255, 255, 255), (200, 100, 0)}
    assert {tuple(color) for color in prediction.reshape(-1, 3)} == {(10, 20, 30), (200, 100, 0)}


def test_an_id_that_leads_out_of_the_folder_is_refused(tmp_path):
    writer = PredictionWriter(tmp_path / "masks")
    batch = {"id": ["../evil"]}
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"'../evil' leads out of predictions.output_dir"):
        writer.write_on_batch_end(None, make_task(), labels, None, batch, 0, 0)
    assert not (tmp_path / "evil.png").exists()


def test_masks_of_predict_are_indexed_with_the_palette(tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[PredictionWriter(tmp_path / "masks")],
    )
    task = make_task()
    trainer.predict(task, DataLoader(samples(3), batch_size=2), return_predictions=False)
    files = sorted((tmp_path / "masks").iterdir())
    assert [file.name for file in files] == [f"picture-{n}.png" for n in range(3)]
    mask = Image.open(files[0])
    assert mask.mode == "P"
    with torch.no_grad():
        batch = {"image": samples(1)[0]["image"][None]}
        np.testing.assert_array_equal(np.asarray(mask), task.eval().predict_step(batch, 0)[0])
    assert mask.getpalette()[:6] == [10, 20, 30, 200, 100, 0]
