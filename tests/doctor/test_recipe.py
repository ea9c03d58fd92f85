"""The doctor's checks of training settings and initial weights."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from segformer_pl.doctor import examine_settings
from segformer_pl.models import maskformer
from segformer_pl.task import SegmentationTask

pytestmark = pytest.mark.slow

FAULTS = {
    # fault: (how it is planted, pattern of the expected finding)
    "no number of steps": ({"trainer": {"max_steps": -1}}, "error recipe trainer.max_steps is not"),
    "a warm-up longer than the training": (
        {"model": {"warmup_steps": 1500}},
        "error recipe the learning rate warms up for 1500 steps, but training ends after 50",
    ),
    "no validation before the end": (
        {"trainer": {"val_check_interval": 80}},
        "warning recipe validation runs every 80 batches",
    ),
    "a learning rate of another optimiser": (
        {"model": {"lr": 0.05}},
        "warning recipe learning rates of 0.05 in the encoder and 0.5",
    ),
    "a learning rate above SGD's": (
        {"model": {"lr": 0.2, "optimizer": "sgd"}},
        "warning recipe learning rates of 0.2 in the encoder and 2 outside it .* sgd .1e-3 to 1e-1",
    ),
    "a mean of 0 to 255": (
        {"model": {"image_mean": (123.7, 116.3, 103.5)}},
        "error recipe model.image_mean and model.image_std are for pixel values of 0 to 255",
    ),
    "one image per batch": (
        {"data": {"batch_size": 1}},
        "warning recipe with --data.batch_size 1, BatchNorm computes its statistics over one image",
    ),
    "weights that do not exist": (
        {"model": {"weights": "nowhere.pth"}},
        "error weights there is no file or folder 'nowhere.pth'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported(fault, check_fault):
    check_fault(*FAULTS[fault])


@pytest.mark.parametrize("is_frozen", [True, False])
def test_only_batch_norm_that_is_trained_needs_several_images(is_frozen):
    """The rate is one of SGD in published recipes."""
    with torch.device("meta"):
        network = maskformer(2, "resnet18", freeze_batch_norm=is_frozen, decoder_layers=1)
    task = SegmentationTask(network, ["a", "b"], [[0] * 3] * 2, optimizer="sgd", lr=0.01)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2000, val_check_interval=10, logger=False, max_epochs=-1
    )
    findings = examine_settings(task, SimpleNamespace(batch_size=1), trainer).findings
    assert ["BatchNorm" in one.message for one in findings] == ([] if is_frozen else [True])
    assert network.encoder.backbone.bn1.training != is_frozen
