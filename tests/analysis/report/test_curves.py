"""Training curves: units, names of losses, curves of one point."""

import re

import numpy as np
import pytest

from segformer_pl.analysis.metrics_table import Series
from segformer_pl.analysis.report.curves import draw_charts, loss_figure


def test_charts_are_inline_with_units(folder):
    folder.finished([0.3, 0.8], ceiling=0.7778)
    page = folder.page()
    assert len(page.all("svg")) == 2
    for label in ("training step", "validation mIoU (%)", "learning rate", "encoder", "head"):
        assert label in page.text
    assert re.search(r"loss \(nats", page.text)
    assert "locality ceiling 77.8 %" in page.text


def part(name):
    return {"class_path": f"segformer_pl.losses.{name}"}


PARTS = {"losses": [part("CrossEntropy"), part("Dice")], "weights": [1.0, 0.5]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (part("Dice"), "Dice"),
        (part("WeightedSum") | {"init_args": PARTS}, "1 CrossEntropy + 0.5 Dice"),
    ],
)
def test_training_loss_other_than_cross_entropy(folder, loss, name):
    folder.finished([0.6])
    config = folder.config
    config["model"]["loss"] = loss
    folder.config = config
    page = folder.page()
    assert f"train: {name}" in page.text
    assert "validation: cross-entropy (nats)" in page.text
    assert "val loss 0.432 cross-entropy, mean over labelled pixels, nats" in page.text
    assert not re.search(r"\bloss \(nats", page.text)


def test_curve_of_one_point_has_a_marker():
    one = Series(np.array([40]), np.array([1.5]))
    columns = {"train/loss": one, "lr-AdamW/encoder": one}
    for axes in loss_figure(columns, "CrossEntropy").axes:
        assert all(line.get_marker() == "o" for line in axes.lines)
    (chart,) = draw_charts(columns | {"train/loss": Series(np.arange(1, 9), np.ones(8))}, "Dice")
    assert "<svg" in chart["svg"]
