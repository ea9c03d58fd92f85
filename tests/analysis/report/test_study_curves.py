"""Curves of several seeds: the mean and range where all of them have values."""

import numpy as np

from segformer_pl.analysis.metrics_table import Series
from segformer_pl.analysis.report.study_curves import erf_figure, layers, mean_and_range, radii
from segformer_pl.analysis.run import Run


def series(steps, values):
    return Series(np.array(steps), np.array(values, np.float64))


def test_mean_and_range_of_the_same_steps():
    step, mean, low, high = mean_and_range([series([1, 5], [1, 4]), series([1, 5], [3, 0])])
    assert step.tolist() == [1, 5]
    assert mean.tolist() == [2, 2]
    assert low.tolist() == [1, 0]
    assert high.tolist() == [3, 4]


def test_curves_with_other_steps_are_interpolated_and_not_extrapolated():
    step, mean, low, high = mean_and_range(
        [series([0, 10, 20], [0, 10, 20]), series([5, 15], [25, 25])]
    )
    assert step.tolist() == [5, 10, 15]
    assert low.tolist() == [5, 10, 15]
    assert high.tolist() == [25, 25, 25]
    assert mean.tolist() == [15, 17.5, 20]


def test_values_that_are_not_finite_are_left_out():
    step, mean, *_ = mean_and_range([series([1, 2, 3], [1, np.nan, 3]), series([1, 3], [1, 3])])
    assert step.tolist() == [1, 3]
    assert mean.tolist() == [1, 3]
    assert all(len(part) == 0 for part in mean_and_range([series([1], [np.nan])]))


def test_radii_are_the_last_ones_of_every_seed(tmp_path):
    runs = {"a": {}}
    for seed, last in ((0, 7.5), (1, 9.5)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "metrics.csv").write_text(
            "step,val/erf/head/radius50,val/erf/stage2/radius50,val/erf/stage10/radius50\n"
            f"3,1.0,1,1\n9,{last},2,3\n"
        )
        runs["a"][seed] = Run(folder)
    assert radii(runs, "head", 50) == {"a": [7.5, 9.5]}
    assert radii(runs, "head", 95) == {"a": []}
    assert layers(runs) == ["stage2", "stage10", "head"]
    figure = erf_figure(runs)
    assert [axes.get_title() for axes in figure.axes] == ["stage2", "stage10", "head"]
    assert erf_figure({"a": {}}) is None
