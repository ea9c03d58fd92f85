"""Warnings of the DataModule: training without labels or on one class, palettes, orientations."""

import warnings
from io import BytesIO

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from segformer_pl.data import StreamingSegmentationData, datamodule
from segformer_pl.data.catalog import find_dataset
from segformer_pl.errors import UserError


class Recorder(pl.LightningModule):
    """Trains one parameter and records the ids of the training samples."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.ids = []

    def training_step(self, batch, batch_idx):
        self.ids += batch["id"]
        return (self.scale - batch["image"].mean()) ** 2

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, max_steps, ckpt_path=None, save_to=None, data_arguments=None, **trainer_arguments):
    """Train on a folder, save a checkpoint at the end, and return the ids of the samples."""
    settings = {"batch_size": 2, "num_workers": 0, "crop_size": (8, 8), "photometric": True}
    data = StreamingSegmentationData("shapes", folder, **settings | (data_arguments or {}))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"limit_val_batches": 0} | trainer_arguments,
    )
    module = Recorder()
    trainer.fit(module, data, ckpt_path=ckpt_path)
    if save_to:
        trainer.save_checkpoint(save_to)
    return module.ids


def unlabelled(folder, row, write_shards, labelled=()):
    """A folder of 40 training images, of which only the ones in ``labelled`` have labels."""
    rows = [row(f"u{i:02d}", 1 if i in labelled else 255, (12, 10)) for i in range(40)]
    return write_shards(folder, "train", [rows])


@pytest.mark.parametrize("num_steps", [3, 200])
def test_training_on_labels_that_are_all_ignored_fails(tmp_path, row, write_shards, num_steps):
    folder = unlabelled(tmp_path / "set", row, write_shards)
    expected = min(2 * num_steps, datamodule.UNLABELLED_SAMPLES)
    message = rf"none of the first {expected} training samples has a labelled pixel, so there"
    with pytest.raises(UserError, match=message):
        fit(folder, num_steps)


def one_class_warnings(folder, num_steps, **arguments):
    """Train, and return the warnings about training on one class."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(folder, num_steps, **arguments)
    messages = [str(warning.message) for warning in caught]
    return [message for message in messages if "every labelled pixel of the first" in message]


@pytest.mark.parametrize("num_steps", [3, 130])
def test_training_on_one_class_warns_once(tmp_path, row, write_shards, num_steps):
    rows = [row(f"u{i:02d}", 255 if i % 3 else 1, (12, 10)) for i in range(6)]
    folder = write_shards(tmp_path / "set", "train", [rows])
    expected = min(2 * num_steps, datamodule.UNLABELLED_SAMPLES)
    (message,) = one_class_warnings(folder, num_steps)
    name = find_dataset("shapes").labels.names[1]
    assert f"the first {expected} training samples is {name!r}, so the network" in message
    assert "labels.ignored" in message


def test_no_one_class_warning_for_two_classes_or_a_resumed_run(tmp_path, row, write_shards):
    rows = [row(f"u{i:02d}", 2 if i == 3 else 1, (12, 10)) for i in range(6)]
    folder = write_shards(tmp_path / "set", "train", [rows])
    assert one_class_warnings(folder, 4) == []
    constant = write_shards(tmp_path / "constant", "train", [[row("a", 1, (12, 10))] * 4])
    file = tmp_path / "last.ckpt"
    assert one_class_warnings(constant, 2, save_to=file) != []
    assert one_class_warnings(constant, 4, ckpt_path=file) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_palettes_of_train_and_validation_are_compared(tmp_path, row, write_shards, num_workers):
    for split, colors in (("train", [9, 9, 9, 1, 2, 3]), ("validation", [9, 9, 9, 3, 2, 1])):
        label = Image.fromarray(np.tile(np.uint8([0, 1]), (12, 5)), "P")
        label.putpalette(colors)
        buffer = BytesIO()
        label.save(buffer, "PNG")
        cell = {"bytes": buffer.getvalue(), "path": None}
        rows = [row(f"{split}{i}", size=(12, 10)) | {"label": cell} for i in range(3)]
        write_shards(tmp_path / "set", split, [rows])
    message = (
        r"'validation0' of the validation split: index 1 of the label's palette is the colour "
        r"\(3, 2, 1\), but \(1, 2, 3\) in .*'train\d' of the train split; classes are read"
    )
    run = {"limit_val_batches": None, "num_sanity_val_steps": 0, "val_check_interval": 1}
    with pytest.warns(UserWarning, match=message) as caught:
        fit(
            tmp_path / "set",
            2,
            data_arguments={"num_workers": num_workers, "crop_size": None},
            check_val_every_n_epoch=None,
            **run,
        )
    assert len([warning for warning in caught if "palette" in str(warning.message)]) == 1


def test_a_few_images_without_labels_do_not_stop_training(tmp_path, row, write_shards, monkeypatch):
    monkeypatch.setattr(datamodule, "UNLABELLED_SAMPLES", 41)  # more than an epoch
    folder = unlabelled(tmp_path / "set", row, write_shards, [17])
    assert len(fit(folder, 30)) == 60


def test_notices_are_shown_once(tmp_path, row, write_shards):
    rows = [row(f"s{i}", size=(12, 10)) for i in range(6)]
    image = Image.new("RGB", (10, 12))
    exif = Image.Exif()
    exif[0x0112] = 3
    buffer = BytesIO()
    image.save(buffer, "PNG", exif=exif)
    for number in (2, 4):
        rows[number]["image"] = {"bytes": buffer.getvalue(), "path": None}
    folder = write_shards(tmp_path / "set", "train", [rows])
    with pytest.warns(UserWarning, match=r"'s\d': the image has the EXIF orientation 3") as caught:
        fit(folder, 6)
    assert len([warning for warning in caught if "EXIF" in str(warning.message)]) == 1
