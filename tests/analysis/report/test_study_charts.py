"""Figures of a study: the Pareto front, labels beside points, and the rows of differences."""

import numpy as np
import pytest
from matplotlib.text import Annotation

from segformer_pl.analysis.report.study_charts import Point, front, pareto_figure

pytestmark = pytest.mark.slow


def points(costs, values):
    return [
        Point(number, f"variant {number}", float(cost), 0.1, float(value), 0.3)
        for number, (cost, value) in enumerate(zip(costs, values), start=1)
    ]


def test_front_is_that_of_the_definition():
    """A point is on the front if none is at least as good in both, and better in one."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        some = points(rng.integers(1, 6, 9), rng.integers(1, 6, 9))
        expected = {
            (one.cost, one.value)
            for one in some
            if not any(
                (other.cost <= one.cost and other.value >= one.value)
                and (other.cost, other.value) != (one.cost, one.value)
                for other in some
            )
        }
        assert {(one.cost, one.value) for one in front(some)} == expected


@pytest.mark.parametrize("number", [3, 20])
def test_labels_beside_points_do_not_overlap(number):
    rng = np.random.default_rng(number)
    costs = rng.uniform(1, 10, number)
    some = points(costs, 50 + costs + rng.normal(0, 1.5, number))
    figure = pareto_figure({"MACs (G)": some, "latency (ms)": some}, "mIoU (%)")
    for axes in figure.axes:
        labels = [child for child in axes.get_children() if isinstance(child, Annotation)]
        boxes = [label.get_window_extent() for label in labels]
        assert len(boxes) == number
        crossings = [
            (a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.padded(-1).overlaps(b)
        ]
        assert crossings == []
    texts = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    is_numbered = any(text.endswith("variant 2") and text[0] == "2" for text in texts)
    assert is_numbered == (number > 6)
