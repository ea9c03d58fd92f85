"""Two ranks train a network with frozen BatchNorm as one rank does."""

import os

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from segformer_pl.models import MaskFormer, TimmEncoder
from segformer_pl.task import SegmentationTask

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]

SMALL = {"num_queries": 4, "decoder_dim": 64, "decoder_layers": 1, "decoder_mlp_dim": 16}
NAMES = ["one", "two", "three"]


class Modes(pl.Callback):
    """Checks in every rank that the norms are frozen after the changes between fit and validate."""

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        assert trainer.world_size == 1 or torch.distributed.get_backend() == "gloo"
        assert task.network.transformer_decoder.training
        assert not any(norm.training for norm in norms_of(task.network))


class Data(pl.LightningDataModule):
    """Gives the ranks the samples in turn. Lightning's own sampler would shuffle them."""

    def __init__(self, samples):
        super().__init__()
        self.samples = samples

    def train_dataloader(self):
        size, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(self.samples, size, rank, shuffle=False)
        return DataLoader(self.samples, batch_size=4 // size, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(self.samples[:2])


def norms_of(network):
    return [one for one in network.encoder.modules() if isinstance(one, nn.BatchNorm2d)]


def trained(devices, folder, randomize):
    """Return the initial and the final state of a network, trained on batches of 4 in all."""
    torch.manual_seed(0)
    # Without dropout, which every rank draws from a generator of its own.
    network = MaskFormer(
        TimmEncoder("test_resnet"), len(NAMES), dropout=0.0, freeze_batch_norm=True, **SMALL
    )
    randomize(network).float()
    # Every image has every class: the cross-entropy of a rank is divided by its number of masks.
    label = torch.arange(48).expand(32, -1) // 16
    samples = [{"image": torch.rand(3, 32, 48), "label": label, "id": str(i)} for i in range(12)]
    settings = {"optimizer": "sgd", "lr": 1e-4, "warmup_steps": 0, "weight_decay": 0.0}
    task = SegmentationTask(network, NAMES, [[0, 0, 0]] * 3, **settings)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        max_steps=3,
        val_check_interval=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[Modes()],
    )
    trainer.fit(task, Data(samples))
    return before, network.state_dict(), trainer.callback_metrics["val/loss"].item()


def test_two_ranks_train_as_one(tmp_path, randomize):
    before, one, loss = trained(1, tmp_path, randomize)
    initial, two, loss_of_two = trained(2, tmp_path, randomize)
    assert all(torch.equal(before[key], initial[key]) for key in before)
    frozen = {
        f"encoder.{path}.{name}"
        for path, module in MaskFormer(
            TimmEncoder("test_resnet"), 3, **SMALL
        ).encoder.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for name in module.state_dict()
    }
    for key, tensor in one.items():
        assert torch.equal(two[key], before[key]) == torch.equal(tensor, before[key])
        assert torch.equal(tensor, before[key]) == (key in frozen), key
        change, expected = two[key] - before[key], tensor - before[key]
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-6)
    assert loss_of_two == pytest.approx(loss, rel=1e-5)
