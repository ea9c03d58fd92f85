"""Captions name the settings in plain words."""

import pytest

from segformer_pl.analysis.erf.captions import describe_settings


@pytest.mark.parametrize(
    ("settings", "caption"),
    [
        (
            {"units": "center", "reduction": "relu", "gradient": "abs"},
            "middle unit, sum of positive channels, absolute gradient",
        ),
        (
            {"units": [[3, 5]], "reduction": 7, "gradient": "relu"},
            "unit at row 3, column 5, channel 7, positive part of the gradient",
        ),
        (
            {"units": [[3, 5], [4, 6]], "reduction": "random", "gradient": "signed"},
            "2 units, random projection of channels, signed gradient",
        ),
        (
            {"units": "class 2 in the label", "reduction": "l1", "gradient": "abs"},
            "class 2 in the label, sum of channel magnitudes, absolute gradient",
        ),
    ],
)
def test_settings_in_words(settings, caption):
    assert describe_settings(settings) == caption
