import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from segformer_pl.models import segformer_b0
from segformer_pl.optim import poly_factor
from segformer_pl.task import SegmentationTask

NAMES = ["background", "left half", "never there"]


def make_task(**arguments):
    palette = [[0, 0, 0], [255, 255, 255], [9, 9, 9]]
    defaults = {"lr": 1e-3, "head_lr_mult": 1.0, "warmup_steps": 2}
    return SegmentationTask(segformer_b0(len(NAMES)), NAMES, palette, **defaults | arguments)


def samples(count=4, size=32):
    """Left half bright and labelled 1, right half dark and labelled 0."""
    image = torch.zeros(3, size, size)
    image[:, :, : size // 2] = 1.0
    label = (image[0] > 0.5).long()
    return [{"image": image, "label": label, "id": str(i)} for i in range(count)]


def make_trainer(tmp_path, **arguments):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**defaults | arguments)


def test_learns_two_samples_and_logs_the_agreed_keys(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=30)
    loader = DataLoader(samples(60), batch_size=2)
    trainer.fit(make_task(), loader, DataLoader(samples(), batch_size=2))
    logged = trainer.callback_metrics
    assert logged["val/miou"] > 0.9
    assert logged["val/aacc"] > 0.9
    assert logged["val/iou/left half"] > 0.9
    assert logged["val/iou/never there"].isnan()
    assert set(logged) == {
        "train/loss",
        *(f"val/{key}" for key in ("loss", "miou", "macc", "aacc")),
        *(f"val/iou/{name}" for name in NAMES),
    }


def test_validation_loss_is_the_mean_over_labelled_pixels_whatever_the_batches(tmp_path):
    task = make_task()
    mixed = samples(3)
    mixed[0]["label"] = torch.full_like(mixed[0]["label"], 255)
    mixed[1]["label"] = mixed[1]["label"].clone()
    mixed[1]["label"][:20] = 255
    values = []
    for batch_size in (1, 3):
        trainer = make_trainer(tmp_path)
        trainer.validate(task, DataLoader(mixed, batch_size=batch_size), verbose=False)
        values.append(trainer.callback_metrics["val/loss"])
    task.eval()
    with torch.no_grad():
        logits = task(torch.stack([sample["image"] for sample in mixed]))
        labels = torch.stack([sample["label"] for sample in mixed])
        upsampled = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)
        expected = F.cross_entropy(upsampled, labels, ignore_index=255)
    torch.testing.assert_close(values[0], expected)
    torch.testing.assert_close(values[1], expected)


def test_test_and_predict(tmp_path):
    task = make_task()
    trainer = make_trainer(tmp_path)
    trainer.test(task, DataLoader(samples(), batch_size=2), verbose=False)
    assert "test/miou" in trainer.callback_metrics
    batches = trainer.predict(task, DataLoader(samples(), batch_size=2))
    assert [tuple(batch.shape) for batch in batches] == [(2, 32, 32)] * 2
    assert batches[0].dtype == torch.int64


def test_images_are_normalised_with_the_given_mean_and_std():
    task = make_task(image_mean=(0.0, 0.5, 1.0), image_std=(1.0, 0.5, 0.25))
    normalized = task.normalize(torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(normalized[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.0]))
    assert not any(key.startswith("image_") for key in task.state_dict())


class Recorder(pl.Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def test_learning_rates_follow_the_schedule_in_every_group(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, max_steps=6, callbacks=[recorder])
    task = make_task(lr=0.01, head_lr_mult=10.0, warmup_steps=3)
    trainer.fit(task, DataLoader(samples(16), batch_size=2))
    base = torch.tensor([0.01, 0.01, 0.1])
    expected = torch.stack([base * poly_factor(step, 6, 3) for step in range(6)])
    torch.testing.assert_close(torch.tensor(recorder.rates), expected)


def test_a_resumed_run_obeys_the_settings_asked_for_now(tmp_path):
    """The checkpoint brings back its own learning rates; those given now must win."""
    loader = DataLoader(samples(16), batch_size=2)
    first = make_trainer(tmp_path, max_steps=3)
    first.fit(make_task(lr=0.01), loader)
    checkpoint = tmp_path / "step3.ckpt"
    first.save_checkpoint(checkpoint)

    recorder = Recorder()
    trainer = make_trainer(tmp_path, max_steps=6, callbacks=[recorder])
    task = make_task(lr=0.002, weight_decay=0.5, head_lr_mult=3.0)
    trainer.fit(task, loader, ckpt_path=checkpoint, weights_only=False)
    base = torch.tensor([0.002, 0.002, 0.006])
    expected = torch.stack([base * poly_factor(step, 6, 2) for step in range(3, 6)])
    torch.testing.assert_close(torch.tensor(recorder.rates), expected)
    decays = [group["weight_decay"] for group in trainer.optimizers[0].param_groups]
    assert decays == [0.5, 0.0, 0.5]


def test_a_run_without_max_steps_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match=r"give --trainer.max_steps N"):
        trainer.fit(make_task(), DataLoader(samples(), batch_size=2))


def test_any_segmenter_can_be_trained(tmp_path):
    """The task knows the contract, not the model."""

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Conv2d(3, 4, 3, stride=2, padding=1)
            self.head = nn.Conv2d(4, 3, 1)

        def forward(self, images):
            return self.head(self.encoder(images))

    trainer = make_trainer(tmp_path, max_steps=2)
    task = SegmentationTask(Tiny(), NAMES, [[0, 0, 0]] * 3)
    trainer.fit(task, DataLoader(samples(), batch_size=2), DataLoader(samples(), batch_size=2))
    assert "val/miou" in trainer.callback_metrics
