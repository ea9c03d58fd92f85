"""The doctor's checks of training settings and initial weights."""

import pytest

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
