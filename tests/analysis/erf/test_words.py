"""Recipes are told in plain words."""

import pytest

from segformer_pl.analysis.erf.words import recipe_in_words


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            {"units": "center", "reduction": "relu", "gradient": "abs"},
            "unit in the middle, sum of its positive channels, magnitude of the gradient",
        ),
        (
            {"units": [[3, 5]], "reduction": 7, "gradient": "relu"},
            "unit at row 3, column 5, its channel 7, positive part of the gradient",
        ),
        (
            {"units": [[3, 5], [4, 6]], "reduction": "random", "gradient": "signed"},
            "2 units, random projection of its channels, signed gradient",
        ),
        (
            {"units": "class 2 in the label", "reduction": "l1", "gradient": "abs"},
            "class 2 in the label, sum of its channels' magnitudes, magnitude of the gradient",
        ),
    ],
)
def test_a_recipe_in_words(recipe, words):
    assert recipe_in_words(recipe) == words
