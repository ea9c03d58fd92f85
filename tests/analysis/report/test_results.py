"""The metrics at the top of a report, and the evaluation that belongs to them."""

import html

import pytest

from segformer_pl.analysis.report import summary
from segformer_pl.analysis.report.results import last_results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("miou", "verdict", "points"),
    [(0.8312, "above", "+5.3"), (0.5, "not above", "\u221227.8"), (0.7778, "not above", "+0.0")],
)
def test_ceiling_verdict(folder, miou, verdict, points):
    folder.finished([0.9, miou], ceiling=0.7778)  # the last mIoU counts, not the best
    page = folder.page()
    assert f"is {verdict} the locality ceiling of 77.8 %" in page.text
    assert f"({points} points)" in page.text
    assert summary(folder.run) == (
        f"mIoU {100 * miou:.1f} % (locality ceiling 77.8 %, best 90.0 % at step 10)"
    )
    assert summary(folder.run, step=20) == summary(folder.run)
    assert summary(folder.run, step=25).startswith(f"mIoU {100 * miou:.1f} % at step 20 (")


def test_no_verdict_without_a_ceiling(folder):
    folder.finished([0.3])
    assert "ceiling" not in folder.page().text


@pytest.mark.slow
def test_classes_in_order_escaped_and_absent(folder):
    folder.finished([0.3, 0.6])
    page = folder.page()
    listed = [row.strip() for row in page.rows if row.strip().startswith(tuple(folder.names))]
    assert [name for row in listed for name in folder.names if row.startswith(name)] == folder.names
    assert page.row("road") == ["91.2", "%", "highest"]
    assert page.row("Traffic Light") == ["34.5", "%", "lowest"]
    assert page.row("absent thing") == ["absent"]
    assert html.escape(folder.names[2]) in page.source
    assert folder.names[2] not in page.source
    assert "<script>" not in page.source
    assert "background:#804080" in page.source


def test_classes_without_hparams(folder):
    folder.finished([0.6])
    (folder.path / "hparams.yaml").write_text("network: !!python/object:torch.nn.Linear {}\n")
    page = folder.page()
    assert page.row("road")[:2] == ["91.2", "%"]


def test_before_the_first_validation(folder):
    folder.plant(folder.training(7), max_steps=40)
    page = folder.page()
    assert "No validation has finished" in page.text
    assert "steps trained 7 of 40: not finished" in page.text
    assert "mIoU" not in page.text
    assert len(page.all("svg")) == 1
    assert summary(folder.run) == ""


def test_test_split_only(folder):
    folder.plant([{"epoch": 0, "step": 0, **folder.metrics("test", 0.6421, 0.6)}])
    page = folder.page()
    assert "mIoU 64.2 %" in page.text
    assert "test loss 0.432" in page.text
    assert "test mIoU 64.2 % is above the locality ceiling of 60.0 %" in page.text
    assert page.row("Traffic Light")[:2] == ["34.5", "%"]
    assert not page.all("svg")
    assert "steps trained" not in page.text
    assert "at step" not in page.text
    assert "No validation" not in page.text
    assert summary(folder.run) == "test mIoU 64.2 % (locality ceiling 60.0 %)"


def test_validation_only(folder):
    folder.plant([{"epoch": 0, "step": 0, **folder.metrics("val", 0.6421)}])
    page = folder.page()
    assert "mIoU 64.2 %" in page.text
    assert not page.all("svg")
    assert "steps trained" not in page.text
    assert "at step" not in page.text


def test_tiles_of_logged_metrics_only(folder):
    values = {"fwiou": 0.8772, "boundary_iou": 0.4321, "ece": 0.01234}
    logged = {f"{split}/{name}": x for split in ("val", "test") for name, x in values.items()}
    folder.plant(
        [{"step": 0, **folder.metrics("val", 0.6), **folder.metrics("test", 0.5), **logged}]
    )
    page = folder.page()
    for tile in ("fwIoU 87.7 %", "boundary IoU 43.2 %", "ECE 1.23 %"):
        assert page.text.count(tile) == 2, tile
    old = type(folder)(folder.path.parent / "old")
    old.finished([0.6])
    old = old.page()
    assert not any(name in old.text for name in ("fwIoU", "boundary IoU", "ECE"))


def test_evaluation_of_another_step_or_split_is_not_shown(folder):
    folder.finished([0.3, 0.8])
    folder.evaluation(step=10).save(folder.path / "evaluation" / "val_step_0000010.npz")
    folder.evaluation(split="test").save(folder.path / "evaluation" / "test_step_0000020.npz")
    page = folder.page()
    assert "Calibration" not in page.text
    assert "95 % CI" not in page.text


@pytest.mark.slow
@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("named", [0, 1600])
def test_evaluation_is_labelled_by_the_step_stored_in_it(folder, split, named):
    """Lightning counts a separate evaluation as step 0, and old files are named so."""
    folder.plant([{"epoch": 0, "step": 0, **folder.metrics(split, 0.8)}])
    file = folder.path / "evaluation" / f"{split}_step_{named:07d}.npz"
    folder.evaluation(split=split, step=1600).save(file)
    page = folder.page()
    kind = {"val": "validation", "test": "test"}[split]
    titles = ("IoU of each class", "Confusions and calibration", "Images with the highest loss")
    for title in titles:
        assert f"{title} {kind}, step 1,600" in page.text
    assert "after 1,600 training steps" in page.text
    assert "at step" not in page.text
    assert "steps trained" not in page.text
    (results,) = last_results(folder.run)
    assert (results.step, results.best_step) == (1600, None)


@pytest.mark.slow
def test_test_after_training_has_the_step_of_its_network(folder):
    folder.plant([*folder.training(20), {"epoch": 0, "step": 20, **folder.metrics("test", 0.6)}])
    folder.evaluation(split="test", step=20).save(folder.path / "evaluation/test_step_0000020.npz")
    (results,) = last_results(folder.run)
    assert results.step == 20
    assert "Calibration" in folder.page().text
