"""Colours of classes, as arrays and in CSS."""

import numpy as np
import pytest

from segformer_pl.analysis.style import colorize, css_color

PALETTE = [[10, 20, 30], [200, 100, 0], [0, 200, 255]]


def test_css_colors_have_two_digits_per_channel():
    assert [css_color(color) for color in PALETTE] == ["#0a141e", "#c86400", "#00c8ff"]


def test_colorize_by_train_id_with_white_for_unlabelled():
    train_ids = np.array([[0, 2], [255, 3]])
    colors = [PALETTE[0], PALETTE[2], [255] * 3, [255] * 3]
    assert np.array_equal(colorize(train_ids, PALETTE).reshape(4, 3), colors)


@pytest.mark.parametrize(("num_classes", "dtype"), [(256, np.uint8), (300, np.uint16)])
def test_colorize_many_classes(num_classes, dtype):
    palette = np.random.default_rng(0).integers(0, 256, (num_classes, 3))
    train_ids = np.arange(num_classes, dtype=dtype)[None]
    assert np.array_equal(colorize(train_ids, palette.tolist())[0], palette)
