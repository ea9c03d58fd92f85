"""Two ranks give the same metrics as one, and train."""

import csv

import numpy as np
import pytest

from segformer_pl.analysis.evaluation import load_evaluation
from segformer_pl.data import shapes
from tests.tiny_network import TINY_OPTION

pytestmark = pytest.mark.slow

# ERFs of all images; the maps are averaged over the ranks.
ERF = (
    "--trainer.callbacks+=segformer_pl.callbacks.EffectiveReceptiveField",
    "--trainer.callbacks.num_images=16",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.generate(folder, {"train": 24, "validation": 5})  # 5 images on two ranks: 2 and 3
    return folder


@pytest.fixture
def run(start_command):
    """Function (command, data folder, folder of runs, number of ranks) -> rows of metrics.csv."""

    def call(command, folder, runs, devices, *arguments, timeout=300, **how):
        settings = {
            "model.network": TINY_OPTION,
            "data.path": folder,
            "data.batch_size": 2,
            "data.eval_batch_size": 2,
            "data.num_workers": 1,
            "trainer.accelerator": "cpu",
            "trainer.devices": devices,
            "trainer.strategy": "ddp" if devices > 1 else "auto",
            "trainer.num_sanity_val_steps": 0,
            "trainer.log_every_n_steps": 1,
            "trainer.logger.save_dir": runs,
        }
        options = [f"--{key}={value}" for key, value in settings.items()]
        how = {"figures": False} | how
        process = start_command([command, *options, *arguments], folder.parent, **how)
        assert process.wait(timeout) == 0, process.output[-3000:]
        assert "It is recommended to use `self.log(" not in process.output  # advice of Lightning
        (metrics,) = runs.glob("*/version_0/metrics.csv")
        return list(csv.DictReader(metrics.open()))

    return call


def evaluation_of(runs):
    (file,) = runs.glob("*/version_0/evaluation/*.npz")
    return load_evaluation(file)


def test_validation_on_two_ranks_equals_one(run, folder, tmp_path):
    rows = [run("validate", folder, tmp_path / str(n), n, *ERF)[-1] for n in (1, 2)]
    assert rows[0].keys() == rows[1].keys()
    compared = [key for key in rows[0] if key.startswith("val/") and rows[0][key]]
    assert {"val/miou", "val/loss", "val/iou/disc", "val/erf/head/area50"} <= set(compared)
    for key in compared:
        expected = pytest.approx(float(rows[0][key]), rel=1e-5, nan_ok=True)
        assert float(rows[1][key]) == expected, key
    one, two = (evaluation_of(tmp_path / str(n)) for n in (1, 2))
    assert one.ids == two.ids  # in stored order, independent of the ranks
    assert (one.counts == two.counts).all()
    assert (one.confusion == two.confusion).all()
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-5)
    np.testing.assert_allclose(one.calibration, two.calibration, rtol=1e-5)


def test_a_rank_without_an_image_does_not_hang_validation(run, tmp_path):
    shapes.generate(tmp_path / "one", {"train": 1, "validation": 1})
    rows = [run("validate", tmp_path / "one", tmp_path / str(n), n, *ERF)[-1] for n in (1, 2)]
    assert float(rows[1]["val/erf/head/radius50"]) > 0
    assert float(rows[1]["val/loss"]) == pytest.approx(float(rows[0]["val/loss"]), rel=1e-5)
    one, two = (evaluation_of(tmp_path / str(n)) for n in (1, 2))
    assert one.ids == two.ids
    assert (one.counts == two.counts).all()
    assert (one.confusion == two.confusion).all()
    assert one.confusion.sum() == one.counts[..., 1].sum() > 0
    np.testing.assert_allclose(one.calibration, two.calibration, rtol=1e-5)


def test_a_rank_without_an_image_does_not_hang_fit(run, tmp_path):
    """In ``fit``, a validation step calls DDP's forward, whose first call waits for all ranks."""
    shapes.generate(tmp_path / "one", {"train": 1, "validation": 1})
    steps = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", *ERF]
    rows = run("fit", tmp_path / "one", tmp_path / "2", 2, *steps, timeout=120)
    evaluated = [row for row in rows if row["val/loss"]]
    assert [int(row["step"]) for row in evaluated] == [1, 3]
    # The validation must have used the running statistics that the checkpoint holds.
    (last,) = tmp_path.glob("2/*/version_0/checkpoints/last.ckpt")
    one_rank = run("validate", tmp_path / "one", tmp_path / "1", 1, f"--ckpt_path={last}")[-1]
    assert one_rank["step"] == evaluated[-1]["step"]
    assert evaluation_of(tmp_path / "1").step == 4
    assert float(evaluated[-1]["val/loss"]) == pytest.approx(float(one_rank["val/loss"]), rel=1e-5)


def test_training_on_two_ranks_runs_without_unused_parameters(run, folder, tmp_path):
    """The second rank is started as Lightning does, with a new interpreter."""
    interval = ["--trainer.max_steps=3", "--trainer.val_check_interval=3"]
    rows = run("fit", folder, tmp_path, 2, *interval, forks=False, figures=True)
    assert [int(row["step"]) for row in rows if row["val/miou"]] == [2]
    assert len([row for row in rows if row["train/loss"]]) == 3
    (report,) = tmp_path.glob("*/version_0/report.html")
    assert "not above" in report.read_text()
