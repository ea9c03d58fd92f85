"""A resumed run with another global batch, and the learning rate that goes with it."""

from pathlib import Path

import pytest
import torch

from segformer_pl.analysis.run import Run
from segformer_pl.cli import main
from segformer_pl.data import shapes


@pytest.fixture
def fit(tmp_path, without_figures, monkeypatch):
    """Function (settings) that trains on batches of one image and returns the command line."""
    shapes.generate(tmp_path / "shapes", {"train": 6, "validation": 1})
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))

    def call(**settings):
        settings = {
            "model.network": "toy_segmenter.ToySegmenter",
            "model.lr": 0.01,
            "model.min_lr": 0.001,
            "model.warmup_steps": 0,
            "data.path": tmp_path / "shapes",
            "data.batch_size": 1,
            "data.num_workers": 0,
            "data.crop_size": "[32,32]",
            "trainer.accelerator": "cpu",
            "trainer.limit_val_batches": 0,
            "trainer.max_steps": 2,
            "trainer.enable_progress_bar": "false",
            "trainer.logger.save_dir": tmp_path / "runs",
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        return main(["fit", *(f"--{key}={value}" for key, value in settings.items())])

    return call


def lowest_and_base_rates(cli):
    optimizer, schedule = cli.trainer.optimizers[0], cli.trainer.lr_scheduler_configs[0].scheduler
    base = {
        group["name"].partition("_")[0]: group["initial_lr"] for group in optimizer.param_groups
    }
    factor = schedule.lr_lambdas[0](10**9)
    return base["encoder"] * factor, base["encoder"], base["head"]


@pytest.mark.slow
def test_a_resumed_run_with_another_global_batch(fit, tmp_path, caplog, recwarn):
    with caplog.at_level("INFO"):
        assert lowest_and_base_rates(fit()) == pytest.approx((0.001, 0.01, 0.1))
    assert "learning rate" not in caplog.text
    folder = tmp_path / "runs" / "shapes_ToySegmenter" / "version_0"
    last = folder / "checkpoints" / "last.ckpt"
    changes = {"ckpt_path": last, "data__batch_size": 2, "trainer__accumulate_grad_batches": 3}
    cli = fit(**changes, trainer__max_steps=4)
    assert lowest_and_base_rates(cli) == pytest.approx((0.001, 0.01, 0.1))
    said = [str(one.message) for one in recwarn if "samples per step" in str(one.message)]
    assert len(said) == 1
    assert said[0].startswith("the interrupted run trained on 1 samples per step, this one trains")
    assert " trains on 6 (devices x data.batch_size x accumulate_grad_batches)" in said[0]
    assert said[0].endswith("model.lr stays as it is, unless model.reference_batch_size is given")

    recwarn.clear()
    with caplog.at_level("INFO"):
        cli = fit(**changes, trainer__max_steps=6, model__reference_batch_size=2)
    # Of a checkpoint of 6 images per step, and for 2: three times the rates
    assert lowest_and_base_rates(cli) == pytest.approx((0.003, 0.03, 0.3))
    assert not [one for one in recwarn if "samples per step" in str(one.message)]
    sentence = "learning rate: model.lr 0.01 for 2 images per step times 3 is 0.03, as this run has"
    assert caplog.text.count(sentence) == 1
    cli = fit(ckpt_path=last, trainer__max_steps=7, model__reference_batch_size=2)
    said = [str(one.message) for one in recwarn if "samples per step" in str(one.message)]
    assert said[0].endswith("is scaled in proportion (model.reference_batch_size)")
    assert lowest_and_base_rates(cli) == pytest.approx((0.0005, 0.005, 0.05))

    run = Run(folder)
    assert run.ranks == {
        0: {"ranks": 1, "images per step": 1},
        2: {"ranks": 1, "images per step": 6},
        4: {"ranks": 1, "images per step": 6},
        6: {"ranks": 1, "images per step": 1},
    }
    assert run.resumptions[0].changes["images per step"] == (1, 6)
    assert "images per step" not in run.resumptions[1].changes
    assert all("ranks" not in part.changes for part in run.resumptions)
    assert torch.load(last, weights_only=True)["hyper_parameters"]["reference_batch_size"] == 2


@pytest.mark.slow
def test_one_rank_has_no_batch_norm_to_synchronise(fit, caplog):
    with caplog.at_level("INFO"):
        fit(trainer__sync_batchnorm="true")
    sentence = "trainer.sync_batchnorm: trains with plain BatchNorm, since this run has one rank;"
    assert caplog.text.count(sentence) == 1
