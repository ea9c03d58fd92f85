"""Confusion matrix and reliability diagram in the report."""

import numpy as np
import pytest


@pytest.mark.slow
def test_confusion_matrix_in_percent_of_each_label(page, folder):
    start, end = page.text.index("Confusion matrix"), page.text.index("Expected calibration")
    matrix = page.text[start:end].split()
    for value in ("85", "10", "5.0", "25", "75", "0"):
        assert value in matrix
    assert matrix.count("25") == matrix.count("75") == 2
    assert "share of the label's pixels (%)" in page.text
    assert folder.names[2] not in page.source


@pytest.mark.slow
@pytest.mark.parametrize(("num_classes", "has_matrix"), [(36, True), (37, False)])
def test_many_classes(folder, num_classes, has_matrix):
    names = [f"class ${number}" for number in range(num_classes)]  # not mathematics
    matrices = np.ones((3, num_classes, num_classes), np.int64)
    matrices[:, 5, 7] = 1000
    folder.evaluated(class_names=names, matrices=matrices)
    page = folder.page()
    assert ("Confusion matrix" in page.text) == has_matrix
    assert len(page.all("svg")) == 1 + has_matrix
    assert any(row.startswith("class $5 class $7 ") for row in page.rows_of("class"))


def test_calibration(page):
    # (|40 - 65| + |152 - 150|) / 260; 192 / 260; 215 / 260
    assert "Expected calibration error 10.38 % ." in page.text
    assert "confidence 73.85 %, accuracy 82.69 %: underconfident by 8.85 points" in page.text
    for label in ("confidence (%)", "accuracy (%)", "pixels (%, log)", "calibrated"):
        assert label in page.text
