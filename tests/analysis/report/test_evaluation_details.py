"""Details of one evaluation in the report, against values by hand."""

import numpy as np

from segformer_pl.analysis.comparison import miou_interval


def test_interval_of_miou(page, folder):
    low, high = miou_interval(folder.evaluation())
    assert low < high
    interval = f"95 % CI {100 * low:.1f} to {100 * high:.1f} %"
    assert f"{interval} over 3 images (bootstrap)" in page.text


def test_single_image_has_no_interval(folder):
    folder.evaluated(matrices=folder.matrices[:1], ids=["only"], loss=np.array([0.5]))
    page = folder.page()
    assert "95 %" not in page.text
    assert "nan" not in page.text
    assert page.rows_of("only") == ["only 0.500 56.8 %"]


def test_accuracy_and_pixels_of_each_class(page):
    assert "road 91.2 % 85.0 % 76.92 % highest" in page.rows_of("road")
    assert "Traffic Light 34.5 % 75.0 % 7.69 % lowest" in page.rows_of("Traffic Light")
    assert page.rows_of("absent thing") == ["absent thing absent"]


def test_most_common_confusions_by_pixels(page):
    (start,) = [n for n, row in enumerate(page.rows) if "predicted as" in row][:1]
    assert [" ".join(row.split()) for row in page.rows[start + 1 : start + 5]] == [
        "road Traffic Light 10.00 % 20",
        "road <b>bold & co</b> 5.00 % 10",
        "<b>bold & co</b> road 25.00 % 10",
        "Traffic Light road 25.00 % 5",
    ]


def test_worst_images(page):
    # (90 / 110 + 30 / 50) / 2 and (80 / 105 + 15 / 40) / 2
    expected = ["second <i> 1.250 70.9 %", "first 0.500 56.8 %"]
    assert [row for name in ("second", "first") for row in page.rows_of(name)] == expected
    assert page.text.index("second <i>") < page.text.index("first 0.500")
    assert page.rows_of("blank") == []
    assert "second <i>" not in page.source
    assert [image["alt"] for image in page.all("img")] == [
        "Images with the highest loss at step 20",
        "Images with the highest loss at step 10",
    ]


def test_only_the_ten_worst(folder):
    ids = [f"sample{index:02d}" for index in range(13)]
    folder.evaluated(matrices=folder.matrices[[0] * 13], ids=ids, loss=np.arange(13.0))
    rows = folder.page().rows_of("sample")
    listed = [row.split()[0] for row in rows if row[6].isdigit()]
    assert listed == [f"sample{index:02d}" for index in range(12, 2, -1)]


def test_evaluation_of_the_test_split(folder):
    folder.evaluated(split="test")
    page = folder.page()
    assert "over 3 images (bootstrap)" in page.text
    assert len(page.all("svg")) == 2
    assert page.rows_of("second") == ["second <i> 1.250 70.9 %"]


def test_nothing_labelled(folder):
    nothing = {"matrices": 0 * folder.matrices, "loss": np.full(3, np.nan)}
    folder.evaluated(**nothing, calibration=np.zeros((15, 3)))
    page = folder.page()
    assert not page.all("svg")
    assert "mIoU 80.0 %" in page.text
