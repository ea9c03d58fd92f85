"""What an evaluation leaves: the same numbers as the log, picture by picture."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from segformer_pl.analysis.run import Run
from segformer_pl.callbacks import EvaluationRecord
from segformer_pl.models import segformer_b0
from segformer_pl.task import SegmentationTask

NAMES = ["background", "object", "never there"]
PALETTE = [[10, 20, 30], [200, 100, 0], [0, 0, 0]]
IGNORED = 255


def samples(count, size=(32, 48)):
    generator = torch.Generator().manual_seed(0)
    pictures = []
    for number in range(count):
        label = torch.randint(0, 2, size, generator=generator)
        label[:4] = IGNORED
        image = torch.rand(3, *size, generator=generator)
        pictures.append({"image": image, "label": label, "id": f"picture-{number}"})
    pictures[2]["label"].fill_(IGNORED)
    return pictures


@pytest.fixture
def task():
    torch.manual_seed(0)
    return SegmentationTask(segformer_b0(3), NAMES, PALETTE, warmup_steps=0)


def make_trainer(tmp_path, callback, **arguments):
    return pl.Trainer(
        accelerator="cpu",
        logger=CSVLogger(tmp_path, name="run"),
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_record_holds_what_was_logged(tmp_path, task, split, batch_size):
    trainer = make_trainer(tmp_path, EvaluationRecord())
    run = trainer.validate if split == "val" else trainer.test
    run(task, DataLoader(samples(6), batch_size=batch_size), verbose=False)
    logged = trainer.callback_metrics
    record = Run(tmp_path / "run" / "version_0").last_evaluation()
    assert record.split == split
    assert record.ids == [f"picture-{number}" for number in range(6)]
    for name in ("miou", "macc", "aacc", "fwiou"):
        assert getattr(record, name) == pytest.approx(logged[f"{split}/{name}"].item()), name
    total = record.counts.sum(axis=0)
    matrix = record.confusion
    np.testing.assert_array_equal(
        total, np.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)], axis=1)
    )
    assert np.isnan(record.loss[2])  # nothing is labelled in it
    pixels = record.counts[:, :, 1].sum(1)
    mean = np.nansum(record.loss * pixels) / pixels.sum()
    assert mean == pytest.approx(logged[f"{split}/loss"].item(), rel=1e-6)
    count, confidence, right = record.calibration.T
    assert count.sum() == pixels.sum()
    assert abs(confidence - right).sum() / count.sum() == pytest.approx(
        logged[f"{split}/ece"].item()
    )


@pytest.mark.slow
def test_a_pass_of_its_own_says_how_long_its_checkpoint_was_trained(tmp_path, task):
    loader = DataLoader(samples(4), batch_size=2)
    trainer = make_trainer(tmp_path, EvaluationRecord(), max_steps=3, limit_val_batches=0)
    trainer.fit(task, DataLoader(samples(8), batch_size=2))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = make_trainer(tmp_path, EvaluationRecord())
    again.validate(task, loader, ckpt_path=tmp_path / "run.ckpt", verbose=False, weights_only=False)
    assert Run(tmp_path / "run" / "version_1").last_evaluation().step == 3


def test_skipped_pictures_are_left_out(tmp_path, task):
    def collate(pictures):
        batch = torch.utils.data.default_collate(pictures)
        return batch | {"skipped": {"picture-1": "a blank"}}

    loader = DataLoader(samples(4), batch_size=2, collate_fn=collate)
    make_trainer(tmp_path, EvaluationRecord()).validate(task, loader, verbose=False)
    assert Run(tmp_path / "run/version_0").last_evaluation().ids == [
        "picture-0",
        "picture-2",
        "picture-3",
    ]


@pytest.mark.slow
def test_a_file_for_each_validation_of_a_training(tmp_path, task):
    trainer = make_trainer(
        tmp_path, EvaluationRecord(2), max_steps=4, val_check_interval=2, num_sanity_val_steps=1
    )
    loader = DataLoader(samples(8), batch_size=2)
    trainer.fit(task, loader, DataLoader(samples(3), batch_size=2))
    for folder, suffix in (("evaluation", "npz"), ("worst", "png")):
        files = sorted((tmp_path / "run" / "version_0" / folder).iterdir())
        prefix = "val_step" if folder == "evaluation" else "step"
        assert [f.name for f in files] == [f"{prefix}_000000{n}.{suffix}" for n in (2, 4)]
    assert Run(tmp_path / "run" / "version_0").last_evaluation().step == 4


@pytest.mark.slow
def test_the_worst_pictures_are_shown_worst_first(tmp_path, task, monkeypatch):
    shown = []

    def plot(pictures, class_names, palette):
        shown.extend(pictures)
        return original(pictures, class_names, palette)

    from segformer_pl.callbacks import evaluation

    original = evaluation.plot_predictions
    monkeypatch.setattr(evaluation, "plot_predictions", plot)
    loader = DataLoader(samples(7, (1024, 64)), batch_size=3)
    make_trainer(tmp_path, EvaluationRecord(3)).validate(task, loader, verbose=False)
    record = Run(tmp_path / "run" / "version_0").last_evaluation()
    order = np.argsort(-np.nan_to_num(record.loss, nan=-1))[:3]
    assert [title.split(":")[0] for title, *_ in shown] == [record.ids[index] for index in order]
    for _, image, label, prediction in shown:
        assert image.shape == (3, 512, 32)  # large ones are shown smaller
        assert label.shape == prediction.shape == (512, 32)
        assert set(label.unique().tolist()) <= {0, 1, IGNORED}


def test_none_of_the_worst_if_none_are_asked_for(tmp_path, task):
    loader = DataLoader(samples(3), batch_size=3)
    make_trainer(tmp_path, EvaluationRecord(0)).validate(task, loader, verbose=False)
    assert not (tmp_path / "run" / "version_0" / "worst").exists()
