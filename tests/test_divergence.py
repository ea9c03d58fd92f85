"""A diverged training stops at once, and earlier checkpoints stay as they are."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from segformer_pl.divergence import PATIENCE
from segformer_pl.errors import UserError
from segformer_pl.models.segmenter import Segmenter
from segformer_pl.task import SegmentationTask

NAMES = ["background", "left half", "never there"]


def samples(count):
    """Images with a bright left half of class 1 and a dark right half of class 0."""
    image = torch.zeros(3, 16, 16)
    image[:, :, :8] = 1.0
    label = (image[0] > 0.5).long()
    return [{"image": image, "label": label, "id": str(n)} for n in range(count)]


def make_trainer(tmp_path, **arguments):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        **arguments,
    )


class Tiny(Segmenter):
    def __init__(self):
        super().__init__()
        self.in_channels, self.num_classes = 3, 3
        self.encoder = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, images):
        return self.head(self.feature_maps(images)["encoder"])

    def feature_maps(self, images):
        return {"encoder": self.encoder(images)}

    def init_args(self):
        return {}

    def layer_ids(self):
        return {"encoder.weight": 0, "encoder.bias": 0}


def make_task(**arguments):
    palette = [[0, 0, 0]] * 3
    return SegmentationTask(Tiny(), NAMES, palette, **{"warmup_steps": 0} | arguments)


class Poison(pl.Callback):
    """Callback that sets one weight to nan after a step, as a bad update would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            with torch.no_grad():
                module.network.head.weight[1, 2] = torch.nan


class WriteCheckpoint(pl.Callback):
    """Callback that writes a checkpoint after every step."""

    def __init__(self, file):
        self.file = file

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.file)


def loader(count=40):
    return DataLoader(samples(count), batch_size=2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_weight_ends_the_training_at_its_step(tmp_path, accumulate):
    trainer = make_trainer(
        tmp_path,
        max_steps=9,
        accumulate_grad_batches=accumulate,
        callbacks=[Poison(3)],
    )
    with pytest.raises(UserError) as error:
        trainer.fit(make_task(lr=1e-3), loader(), DataLoader(samples(2), batch_size=2))
    message = str(error.value)
    assert trainer.global_step == 4
    assert message.startswith(
        "the training diverged: after step 4 (loss nan, largest learning rate 0.00"
    )
    assert "nan or infinity in " in message
    assert "or restart if there is none, with a smaller --model.lr" in message
    assert "\n" not in message


def test_a_finite_checkpoint_is_not_replaced_by_one_with_nan(tmp_path):
    file = tmp_path / "last.ckpt"
    trainer = make_trainer(tmp_path, max_steps=9, callbacks=[Poison(3), WriteCheckpoint(file)])
    with pytest.raises(UserError, match=r"there is nan or infinity in .*, in the weights or in"):
        trainer.fit(make_task(), loader())
    content = torch.load(file, weights_only=False)
    assert content["global_step"] == 3
    assert all(tensor.isfinite().all() for tensor in content["state_dict"].values())


def test_an_infinite_optimiser_moment_is_not_saved(tmp_path):
    """Its parameter would never change again, although the weights stay finite."""
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(make_task(), loader())
    state = trainer.optimizers[0].state
    next(iter(state.values()))["exp_avg_sq"].view(-1)[0] = torch.inf
    with pytest.raises(UserError, match=r"optimizer_states.*exp_avg_sq"):
        trainer.save_checkpoint(tmp_path / "w.ckpt")
    assert not (tmp_path / "w.ckpt").exists()


def test_a_far_too_large_learning_rate_ends_the_training(tmp_path):
    file = tmp_path / "last.ckpt"
    trainer = make_trainer(tmp_path, max_steps=9, callbacks=[WriteCheckpoint(file)])
    with pytest.raises(UserError, match=r"largest learning rate 8\.8\d*e\+30"):
        trainer.fit(make_task(lr=1e30), loader())
    assert trainer.global_step < 5
    content = torch.load(file, weights_only=False)
    assert all(tensor.isfinite().all() for tensor in content["state_dict"].values())


def test_steps_skipped_by_a_gradient_scaler_are_not_a_divergence(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = make_trainer(tmp_path, max_steps=30, plugins=[precision], callbacks=[])
    task = make_task(lr=1e-3)
    before = task.network.head.weight.detach().clone()
    trainer.fit(task, loader(80))
    assert trainer.global_step == 30
    assert scaler.get_scale() < 2.0**40  # steps were skipped
    assert not torch.equal(task.network.head.weight, before)  # and others were taken
    trainer.save_checkpoint(tmp_path / "w.ckpt")


class NanLoss(nn.Module):
    """A loss of nan with a gradient of 0, so that the weights do not change."""

    def forward(self, logits, target, ignore_index):
        return logits.sum() * 0 + torch.nan * (logits.sum().detach() * 0 + 1)


def test_many_nan_losses_in_a_row_end_the_training(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=PATIENCE + 9)
    with pytest.raises(UserError, match=f"the last {PATIENCE} losses were nan or infinite"):
        trainer.fit(make_task(loss=NanLoss(), weight_decay=0.0), loader(4 * PATIENCE))
    assert trainer.global_step == PATIENCE
