"""Results of test-time settings: paired differences, sentences, table and figure."""

import json

import numpy as np
import pytest

from segformer_pl.analysis.comparison import compare_evaluations
from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.analysis.results_file import read_rows, write_rows
from segformer_pl.analysis.test_time import (
    TestTimeRow,
    as_dict,
    conclusions,
    markdown,
    plot,
    with_differences,
)
from segformer_pl.errors import UserError


def evaluation(accuracy, num_images=40):
    """Two classes of 100 pixels in every image, of which a share is correct."""
    rng = np.random.default_rng(0)
    correct = np.minimum(rng.integers(40, 60, (num_images, 2)) + round(100 * accuracy), 100)
    wrong = 100 - correct
    counts = np.stack([correct, np.full_like(correct, 100), correct + wrong[:, ::-1]], axis=-1)
    confusion = np.diag(correct.sum(0)) + np.diag(wrong.sum(0))[:, ::-1]
    ids = [f"image {n}" for n in range(num_images)]
    loss = np.zeros(num_images)
    return Evaluation("val", 4, ["a", "b"], ids, counts, loss, confusion, np.zeros((15, 3)))


CHANGES = {
    "as_trained": {"network": {}, "inference": {}},
    "fewer keys": {"network": {"sr_ratios": [16, 8, 2, 1]}, "inference": {}},
    "equal": {"network": {"kv_border": "keep"}, "inference": {}},
    "flip": {"network": {}, "inference": {"flip": True}},
}
EVALUATIONS = {
    "as_trained": evaluation(0.2),
    "fewer keys": evaluation(0.1),
    "equal": evaluation(0.2),
    "flip": evaluation(0.25),
}


@pytest.fixture(scope="module")
def rows():
    measured = {
        "as_trained": (10.0, 100),
        "fewer keys": (4.0, 50),
        "equal": (7.0, 90),
        "flip": (20.0, 200),
    }
    unpaired = [
        TestTimeRow(
            setting=name,
            changes=json.dumps(CHANGES[name]),
            num_images=40,
            dataset="toy",
            fingerprint="a-b",
            checkpoint="0123",
            miou=EVALUATIONS[name].miou,
            agreement=1 - latency / 1000,
            macs=macs * 10**6,
            height=64,
            width=96,
            latency_ms=latency,
            latency_iqr_ms=1.0,
            timed_on="cpu with 1 thread, float32",
        )
        for name, (latency, macs) in measured.items()
    ]
    return with_differences(unpaired, EVALUATIONS)


def test_differences_are_those_of_compare_and_corrected_by_holm(rows):
    for row in rows[1:]:
        expected = compare_evaluations(EVALUATIONS["as_trained"], EVALUATIONS[row.setting])
        assert (row.difference, row.low, row.high) == (
            expected.difference.value,
            expected.difference.low,
            expected.difference.high,
        )
    assert rows[0].difference == 0
    smallest = 1 / 10_001
    assert [row.p_value for row in rows[1:]] == pytest.approx([3 * smallest, 1, 3 * smallest])
    assert [row.is_resolved for row in rows] == [False, True, False, True]


def test_the_conclusions_name_the_fastest_setting_without_a_loss(rows):
    _, fastest, gain = conclusions(rows)
    assert fastest == (
        "The fastest setting without a resolved loss is equal: 30 % less time and 10 % less "
        "compute at +0.00 points of mIoU (95 % CI +0.00 to +0.00)."
    )
    assert gain.startswith("The largest resolved gain is that of flip: +")
    assert gain.endswith("points of mIoU at 200 % of the time.")
    _, none = conclusions(rows[:2])
    assert none.startswith("No setting is faster than as_trained by more than the interquartile")


def test_table_and_numbers(rows):
    text = markdown(rows)
    assert "64x96 pixels; latency is the median, measured in turn on cpu with 1 thread" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| fewer keys"))
    assert " * | " in line
    assert line.endswith("| 99.60 | 0.05 | 50 % | 4.0 | 40 % | sr_ratios [16, 8, 2, 1] |")
    assert "UNVERIFIED" in text
    numbers = json.loads(json.dumps(as_dict(rows), allow_nan=False))
    assert numbers["num_images"] == 40
    assert numbers["settings"][3]["changes"] == {"network": {}, "inference": {"flip": True}}
    assert numbers["settings"][1]["difference"] == rows[1].difference


def test_the_figure_has_a_point_and_a_bar_for_every_setting(rows):
    (axes,) = plot(rows).axes
    points = [container[0].get_xydata()[0] for container in axes.containers]
    expected = [(row.latency_ms, 100 * row.miou) for row in rows]
    assert np.allclose(points, expected)
    bars = [container[2][-1].get_segments()[0][:, 1] for container in axes.containers[1:]]
    miou = rows[0].miou
    bounds = [(100 * (miou + row.low), 100 * (miou + row.high)) for row in rows[1:]]
    assert np.allclose(bars, bounds)


def test_rows_are_stored_exactly(rows, tmp_path):
    file = tmp_path / "rows.csv"
    write_rows(file, rows, TestTimeRow)
    assert read_rows(file, TestTimeRow, "test_time") == rows
    file.write_text(file.read_text().replace("toy,a-b", "toy", 1))
    with pytest.raises(UserError, match=r"line 2: not a row of test_time results"):
        read_rows(file, TestTimeRow, "test_time")
