"""The record of an evaluation: counts and losses per image that agree with the log."""

import csv

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from segformer_pl.analysis.evaluation import load_evaluation
from segformer_pl.callbacks import EvaluationRecord
from segformer_pl.models import segformer_b0
from segformer_pl.task import SegmentationTask

NAMES = ["background", "object", "absent"]
PALETTE = [[10, 20, 30], [200, 100, 0], [0, 0, 0]]
IGNORED = 255


def samples(count, size=(32, 48)):
    generator = torch.Generator().manual_seed(0)
    images = []
    for number in range(count):
        label = torch.randint(0, 2, size, generator=generator)
        label[:4] = IGNORED
        image = torch.rand(3, *size, generator=generator)
        images.append({"image": image, "label": label, "id": f"image-{number}"})
    images[2]["label"].fill_(IGNORED)
    return images


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


def only_record(run_dir, name):
    """Load the only evaluation of a run folder, whose file must have this name."""
    (file,) = (run_dir / "evaluation").iterdir()
    assert file.name == f"{name}.npz"
    return load_evaluation(file)


def logged_rows(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_record_holds_what_was_logged(tmp_path, task, split, batch_size):
    trainer = make_trainer(tmp_path, EvaluationRecord())
    run = trainer.validate if split == "val" else trainer.test
    run(task, DataLoader(samples(6), batch_size=batch_size), verbose=False)
    logged = trainer.callback_metrics
    record = only_record(tmp_path / "run" / "version_0", f"{split}_step_0000000")
    assert record.split == split
    assert record.step == 0
    assert record.ids == [f"image-{number}" for number in range(6)]
    for name in ("miou", "macc", "aacc", "fwiou"):
        assert getattr(record, name) == pytest.approx(logged[f"{split}/{name}"].item()), name
    total = record.counts.sum(axis=0)
    matrix = record.confusion
    np.testing.assert_array_equal(
        total, np.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)], axis=1)
    )
    assert np.isnan(record.loss[2])  # it has no labelled pixels
    pixels = record.counts[:, :, 1].sum(1)
    mean = np.nansum(record.loss * pixels) / pixels.sum()
    assert mean == pytest.approx(logged[f"{split}/loss"].item(), rel=1e-6)
    count, confidence, correct = record.calibration.T
    assert count.sum() == pixels.sum()
    assert abs(confidence - correct).sum() / count.sum() == pytest.approx(
        logged[f"{split}/ece"].item()
    )


@pytest.mark.slow
@pytest.mark.parametrize("split", ["val", "test"])
def test_an_evaluation_of_a_checkpoint_has_the_step_of_the_checkpoint(tmp_path, task, split):
    """In the record, in the names of files and figures, and in metrics.csv."""
    loader = DataLoader(samples(4), batch_size=2)
    trainer = make_trainer(tmp_path, EvaluationRecord(), max_steps=3, limit_val_batches=0)
    trainer.fit(task, DataLoader(samples(8), batch_size=2))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = make_trainer(tmp_path, EvaluationRecord())
    run = again.validate if split == "val" else again.test
    run(task, loader, ckpt_path=tmp_path / "run.ckpt", verbose=False, weights_only=False)
    run_dir = tmp_path / "run" / "version_1"
    assert only_record(run_dir, f"{split}_step_0000003").step == 3
    figures = [file.name for file in run_dir.glob("worst/*")]
    assert figures == (["step_0000003.png"] if split == "val" else [])
    (row,) = logged_rows(run_dir)
    assert row["step"] == "2"  # as in training, the index of the last completed step
    assert float(row[f"{split}/miou"]) == pytest.approx(again.callback_metrics[f"{split}/miou"])


@pytest.mark.slow
def test_an_evaluation_after_a_training_has_the_step_of_its_weights(tmp_path, task):
    """Of the training, or of a checkpoint that is loaded afterwards."""
    loader = DataLoader(samples(4), batch_size=2)
    trainer = make_trainer(
        tmp_path, EvaluationRecord(0), max_steps=4, val_check_interval=2, limit_val_batches=1
    )
    trainer.fit(task, DataLoader(samples(8), batch_size=2), loader)
    trainer.test(task, loader, verbose=False)
    run_dir = tmp_path / "run" / "version_0"
    names = {"val_step_0000002.npz", "val_step_0000004.npz", "test_step_0000004.npz"}
    assert {file.name for file in (run_dir / "evaluation").iterdir()} == names
    images = {name: str(load_evaluation(run_dir / "evaluation" / name).images) for name in names}
    assert images == {name: "2 of 4 images" if "val" in name else "all 4 images" for name in names}
    steps = [row["step"] for row in logged_rows(run_dir) if row["val/miou"] or row["test/miou"]]
    assert steps == ["1", "3", "3"]

    trainer.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=False)
    torch.save(checkpoint | {"global_step": 1}, tmp_path / "earlier.ckpt")
    trainer.test(task, loader, tmp_path / "earlier.ckpt", verbose=False, weights_only=False)
    assert (run_dir / "evaluation" / "test_step_0000001.npz").is_file()


def test_a_second_evaluation_of_a_step_replaces_the_first(tmp_path, task):
    trainer = make_trainer(tmp_path, EvaluationRecord(0))
    for count in (4, 3):
        trainer.validate(task, DataLoader(samples(count), batch_size=2), verbose=False)
    record = only_record(tmp_path / "run" / "version_0", "val_step_0000000")
    assert len(record.ids) == 3
    assert record.confusion.sum() == record.counts[..., 1].sum()  # of the second alone


def test_skipped_images_are_left_out(tmp_path, task):
    def collate(images):
        batch = torch.utils.data.default_collate(images)
        return batch | {"skipped": {"image-1": "a blank"}}

    loader = DataLoader(samples(4), batch_size=2, collate_fn=collate)
    make_trainer(tmp_path, EvaluationRecord()).validate(task, loader, verbose=False)
    record = only_record(tmp_path / "run" / "version_0", "val_step_0000000")
    assert record.ids == ["image-0", "image-2", "image-3"]
    assert str(record.images) == "3 of 4 images"


@pytest.mark.slow
def test_every_validation_of_a_training_has_a_record(tmp_path, task):
    trainer = make_trainer(
        tmp_path, EvaluationRecord(2), max_steps=4, val_check_interval=2, num_sanity_val_steps=1
    )
    loader = DataLoader(samples(8), batch_size=2)
    trainer.fit(task, loader, DataLoader(samples(3), batch_size=2))
    for folder, suffix in (("evaluation", "npz"), ("worst", "png")):
        files = sorted((tmp_path / "run" / "version_0" / folder).iterdir())
        prefix = "val_step" if folder == "evaluation" else "step"
        assert [f.name for f in files] == [f"{prefix}_000000{n}.{suffix}" for n in (2, 4)]
    for step in (2, 4):
        file = tmp_path / "run" / "version_0" / "evaluation" / f"val_step_000000{step}.npz"
        record = load_evaluation(file)
        assert record.step == step
        # The sanity check and other validations are not included.
        assert record.confusion.sum() == record.counts[..., 1].sum() == 2 * 28 * 48


@pytest.mark.slow
def test_the_worst_images_are_shown_worst_first(tmp_path, task, monkeypatch):
    shown, figures = [], []

    def plot(images, class_names, palette, losses):
        shown.extend(zip(images, losses))
        figures.append(original(images, class_names, palette, losses))
        return figures[-1]

    from segformer_pl.callbacks import evaluation

    original = evaluation.plot_predictions
    monkeypatch.setattr(evaluation, "plot_predictions", plot)
    loader = DataLoader(samples(7, (1024, 64)), batch_size=3)
    make_trainer(tmp_path, EvaluationRecord(3)).validate(task, loader, verbose=False)
    record = only_record(tmp_path / "run" / "version_0", "val_step_0000000")
    order = np.argsort(-np.nan_to_num(record.loss, nan=-1))[:3]
    assert [sample[0] for sample, _ in shown] == [record.ids[index] for index in order]
    assert [loss for _, loss in shown] == pytest.approx(record.loss[order])
    titles = [axis.get_title() for axis in figures[0].axes]
    assert titles[2::3] == [f"prediction: {loss:.2f} nats" for loss in record.loss[order]]
    for (_, image, target, pred), _ in shown:
        assert image.shape == (3, 512, 32)  # shrunk from (3, 1024, 64)
        assert target.shape == pred.shape == (512, 32)
        assert set(target.unique().tolist()) <= {0, 1, IGNORED}


def test_there_is_no_figure_with_num_worst_0(tmp_path, task):
    loader = DataLoader(samples(3), batch_size=3)
    make_trainer(tmp_path, EvaluationRecord(0)).validate(task, loader, verbose=False)
    assert not (tmp_path / "run" / "version_0" / "worst").exists()
