"""Fixtures of the tests of callbacks: the command of a short training."""

import pytest

from segformer_pl.data import shapes


@pytest.fixture
def fit(tmp_path):
    shapes.generate(tmp_path / "shapes", {"train": 4, "validation": 1})
    settings = {
        "model.network": "segformer_pl.models.segformer_b0",
        "data.path": tmp_path / "shapes",
        "data.batch_size": 2,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.logger.save_dir": tmp_path / "runs",
        "last_checkpoint.dirpath": tmp_path / "checkpoints",
        "last_checkpoint.every_n_train_steps": 1,
    }
    return ["fit", *(f"--{key}={value}" for key, value in settings.items())]
