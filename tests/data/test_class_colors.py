import numpy as np
import pytest

from segformer_pl.data.class_colors import distinct_colors, pack_color, pack_colors, unpack_color


def linear(colors):
    srgb = np.array(colors) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def test_generated_colors_stay_apart_without_red_green_vision():
    # Vienot et al. 1999 in linear RGB: what remains of a colour without the L or the M cones.
    without = {
        "none": np.eye(3),
        "protan": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        "deutan": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    }
    for matrix in without.values():
        seen = np.cbrt((linear(distinct_colors(19)) @ np.transpose(matrix)).clip(0))
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert distances[~np.eye(19, dtype=bool)].min() > 0.05


def test_generated_colors_are_a_function_of_the_class_alone():
    colors = distinct_colors(400)
    assert len(set(colors)) == 400
    assert distinct_colors(19) == colors[:19]
    with pytest.raises(ValueError, match=r"5000 classes; give labels\.colors"):
        distinct_colors(5000)


def test_a_color_is_one_number_and_back():
    assert pack_color((1, 2, 255)) == 0x0102FF
    assert unpack_color(0x0102FF) == (1, 2, 255)
    image = np.array([[(1, 2, 255), (255, 0, 0)]], np.uint8)
    assert pack_colors(image).tolist() == [[0x0102FF, 0xFF0000]]
