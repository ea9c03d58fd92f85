"""The figures hold what they should, with labels and units."""

import numpy as np
import pytest

from segformer_pl.analysis.erf import ERF, LayerERF, RadiusMap
from segformer_pl.analysis.erf.moments import Moments
from segformer_pl.analysis.erf.plots import (
    plot_area_ratios,
    plot_difference,
    plot_erf,
    plot_radial_profiles,
    plot_radius_map,
    plot_signed,
)


def erf_of(names, seed=0, gradient="abs", num_images=3):
    rng = np.random.default_rng(seed)
    layers = {}
    for name in names:
        moments = Moments.zeros(32, 48)
        maps = rng.normal(size=(num_images, 32, 48))
        moments.add(maps if gradient == "signed" else np.exp(maps))
        layers[name] = LayerERF.from_moments(name, moments, (16, 24), (8, 12), gradient)
    return ERF(layers, num_images, recipe={"gradient": gradient})


def panels(figure):
    return [axes for axes in figure.axes if axes.get_title()]


def test_figure_3_has_rows_of_networks_columns_of_layers_and_zoom_boxes():
    rows = {"one": erf_of(["stage1", "stage4", "head"]), "two": erf_of(["stage1", "stage4"], 1)}
    figure = plot_erf(rows, "three pictures")
    assert [axes.get_title().split("\n")[0] for axes in panels(figure)] == [
        *("stage1", "stage4", "head"),
        *("stage1", "stage4"),
    ]
    assert "three pictures" in figure.get_suptitle()
    for axes in panels(figure):
        assert "pixels right of the unit" in axes.get_xlabel()
        image = axes.images[0]
        assert image.cmap.name == "magma"
        assert image.get_array().max() == 1
        assert image.get_extent() == [-24.5, 23.5, 15.5, -16.5]
    zooms = [axes for axes in figure.axes if "enlarged" in axes.get_xlabel()]
    assert len(zooms) == 3
    boxes = [axes for axes in panels(figure) if axes.patches]
    assert [axes.get_title().split("\n")[0] for axes in boxes] == ["stage4", "head", "stage4"]
    with pytest.raises(ValueError, match="no field to draw"):
        plot_erf({})


def test_curves_have_a_line_for_each_layer_of_each_network():
    rows = {"one": erf_of(["stage1", "head"]), "two": erf_of(["stage1"], 1)}
    for plot in (plot_radial_profiles, plot_area_ratios):
        figure = plot(rows)
        left, right = figure.axes
        assert len(left.lines) == len(right.lines) == 3
        legend = left.get_legend() or right.get_legend()
        assert [text.get_text() for text in legend.get_texts()] == [
            *("one stage1", "one head", "two stage1")
        ]
        assert left.get_xlabel()
        assert "%" in right.get_ylabel() + left.get_ylabel()


def test_a_difference_has_sum_zero_and_needs_one_recipe():
    first, second = erf_of(["stage1", "head"]), erf_of(["head", "stage2"], 1)
    figure = plot_difference(first, second, ("a", "b"))
    (panel,) = panels(figure)
    assert panel.get_title().startswith("head")
    assert panel.images[0].get_array().sum() == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="measured differently"):
        plot_difference(first, erf_of(["head"], gradient="relu"), ("a", "b"))
    with pytest.raises(ValueError, match="no layer in common"):
        plot_difference(first, erf_of(["stage4"]), ("a", "b"))


def test_signed_maps_have_a_figure_of_their_own():
    signed = erf_of(["stage1"], gradient="signed")
    with pytest.raises(ValueError, match="signed map has no extent"):
        plot_erf(signed)
    (panel,) = panels(plot_signed(signed))
    assert panel.images[0].norm.vmin == -panel.images[0].norm.vmax


def test_radii_lie_over_the_picture():
    found = RadiusMap(
        "head", np.ones((4, 6)), np.zeros((4, 6)), np.arange(4), np.arange(6), (8, 12)
    )
    figure = plot_radius_map(found, np.zeros((8, 12, 3)))
    picture, radii = panels(figure)
    assert picture.images[0].get_extent() == radii.images[0].get_extent() == [-0.5, 11.5, 7.5, -0.5]
    assert len(panels(plot_radius_map(found))) == 1


def test_a_map_of_zeros_can_be_drawn():
    moments = Moments.zeros(8, 8)
    moments.add(np.zeros((2, 8, 8)))
    layer = LayerERF.from_moments("head", moments, (4, 4), (2, 2), "abs")
    plot_erf(ERF({"head": layer}, 2))
