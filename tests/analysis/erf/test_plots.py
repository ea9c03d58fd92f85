"""Figures have the right content, labels and units, and no text overlaps another."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from segformer_pl.analysis.erf import ERF, LayerERF, RadiusMap
from segformer_pl.analysis.erf.moments import Moments
from segformer_pl.analysis.erf.panels import NARROW, WIDTH
from segformer_pl.analysis.erf.plots import (
    plot_area_ratios,
    plot_difference,
    plot_erf,
    plot_radial_profiles,
    plot_radius_map,
    plot_signed,
)
from segformer_pl.errors import UserError

TITLE = "mean of 100 validation images of a data set with a long name, 1024x2048 pixels"
STAGES = ["stage1", "stage2", "stage3", "stage4", "head"]


def erf_of(names, seed=0, gradient="abs", num_images=3, size=(64, 96), position="center"):
    rng = np.random.default_rng(seed)
    if position == "center":
        position = (size[0] // 2, size[1] // 2)
    layers = {}
    for name in names:
        moments = Moments.zeros(*size)
        maps = rng.normal(size=(num_images, *size))
        moments.add(maps if gradient == "signed" else np.exp(maps))
        layers[name] = LayerERF.from_moments(name, moments, position, (8, 12), gradient)
    return ERF(layers, num_images, settings={"gradient": gradient, "image_size": list(size)})


def zero_in(erf, *names):
    layers = {
        name: dataclasses.replace(field, mean=field.mean * 0, groups=field.groups * 0)
        if name in names
        else field
        for name, field in erf.layers.items()
    }
    return dataclasses.replace(erf, layers=layers)


def with_units(erf, positions):
    names = list(erf.layers)
    layers = dict(erf.layers)
    for name, position in zip(names, positions):
        layers[name] = dataclasses.replace(layers[name], position=position)
    return dataclasses.replace(erf, layers=layers)


def maps_of(figure):
    """The axes of whole maps, in order."""
    return [axes for axes in figure.axes if axes.images and not is_zoom(axes)]


def is_zoom(axes):
    left, right = axes.get_xlim()
    return (
        bool(axes.images)
        and right - left < axes.images[0].get_extent()[1] - (axes.images[0].get_extent()[0])
    )


def texts_of(figure):
    """Every visible text of a figure and its box in inches."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = []
    for text in figure.findobj(Text):
        box = text.get_window_extent(renderer)
        if text.get_visible() and text.get_text().strip() and box.width > 0:
            texts.append((text, box.transformed(figure.dpi_scale_trans.inverted())))
    return texts


def assert_readable(figure):
    width, height = figure.get_size_inches()
    assert NARROW <= width <= WIDTH
    # Draw first: ticks depend on the size that the layout gives the axes.
    texts = texts_of(figure)
    ticks = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in (*axis.get_ticklabels(which="both"), axis.get_offset_text())
    }
    drawn = {
        tick.label1
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis._update_ticks()
        if tick.label1.get_visible()
    }
    texts = [(text, box) for text, box in texts if text not in ticks or text in drawn]
    for text, box in texts:
        assert text.get_fontsize() >= 7, text
        assert box.x0 > -0.01, (text, box)
        assert box.y0 > -0.01, (text, box)
        assert box.x1 < width + 0.01, (text, box)
        assert box.y1 < height + 0.01, (text, box)
    for (first, a), (second, b) in combinations(texts, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        along = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across < 0.01 or along < 0.02, (first, second)


CASES = {
    "five layers": erf_of(STAGES),
    "two networks": {
        "SegFormer, best.ckpt (trained, step 1600)": erf_of(STAGES),
        "timm vit_base_patch16_siglip_gap_512 (weights from a file of yours)": erf_of(STAGES, 1),
    },
    "one layer": erf_of(["head"]),
    "nine layers": erf_of([f"encoder.stages.{i}.blocks.1.attn" for i in range(9)]),
    "wide": {"a": erf_of(STAGES, size=(100, 200)), "b": erf_of(STAGES, 1, size=(100, 200))},
    "tall": erf_of(STAGES, size=(160, 80)),
    "corner": erf_of(STAGES, size=(150, 150), position=(1, 147)),
    "class": erf_of(STAGES, position=None),
    "a layer of zeros": zero_in(erf_of(STAGES), "stage2"),
    "zeros": zero_in(erf_of(["stage1"]), "stage1"),
    "one image": erf_of(STAGES, num_images=1),
    "units apart": with_units(erf_of(STAGES, size=(150, 150)), [(64, 64), (70.5, 80.5), (140, 9)]),
    "other sizes": {"a": erf_of(STAGES), "b": erf_of(STAGES, size=(128, 192), num_images=2)},
}


QUICK = ("two networks", "zeros")
EACH = [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CASES]


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", EACH)
def test_no_text_of_figure_3_is_cut_or_overprinted(case):
    assert_readable(plot_erf(CASES[case], TITLE))


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("plot", [plot_radial_profiles, plot_area_ratios])
@pytest.mark.parametrize("case", [case for case in EACH if case.values != ("class",)])
def test_no_text_of_the_curves_is_cut_or_overprinted(case, plot):
    assert_readable(plot(CASES[case], TITLE))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "names",
    [
        ["head"],
        pytest.param(STAGES, marks=pytest.mark.slow),
        pytest.param([f"layer{i}" for i in range(9)], marks=pytest.mark.slow),
    ],
)
def test_no_text_of_signed_figures_is_cut_or_overprinted(names):
    first, second = erf_of(names, size=(32, 64)), erf_of(names, 1, size=(32, 64))
    labels = ("SegFormer, best.ckpt", "timm resnet50")
    assert_readable(plot_difference(first, second, labels, TITLE))
    assert_readable(plot_difference(first, first, labels, TITLE))
    assert_readable(plot_difference(zero_in(first, names[0]), second, labels, TITLE))
    assert_readable(plot_signed(erf_of(names, gradient="signed"), TITLE))


def test_figure_3_has_rows_of_networks_and_columns_of_layers():
    rows = {"one": erf_of(["stage1", "stage4", "head"]), "two": erf_of(["stage1", "stage4"], 1)}
    figure = plot_erf(rows, "three images")
    panels = maps_of(figure)
    assert [axes.get_label().split("\n")[0] for axes in panels] == [
        *("stage1", "stage4", "head"),
        *("stage1", "stage4"),
    ]
    assert figure.get_suptitle() == "Effective receptive field: three images"
    written = [text.get_text() for text in figure.texts]
    assert written.count("pixels to the right of the unit") == 2
    assert any(
        "largest: per unit of the normalised image" in axes.get_xlabel() for axes in figure.axes
    )
    for axes, field in zip(panels, [*rows["one"].layers.values(), *rows["two"].layers.values()]):
        image = axes.images[0]
        assert image.cmap.name == "magma"
        assert image.get_array().max() == 1
        assert image.get_extent() == [-48.5, 47.5, 31.5, -32.5]
        assert f"largest {field.mean.max():.2g}" in axes.get_label()
        area = field.interval(lambda erf: 100 * erf.area_ratio(0.5)).value
        assert f"half in {area:.2g} % of area" in axes.get_label()
    with pytest.raises(ValueError, match="no receptive field to draw"):
        plot_erf({})


@pytest.mark.slow
def test_zooms_are_drawn_where_they_enlarge_and_stay_inside_the_image():
    for position in ((0, 0), (64, 64), (3, 140), (149, 149)):
        figure = plot_erf(erf_of(["stage1", "head"], size=(150, 150), position=position))
        zooms = [axes for axes in figure.axes if is_zoom(axes)]
        assert len(zooms) == 2
        for whole, axes in zip(maps_of(figure), zooms):
            left, right, bottom, top = whole.images[0].get_extent()
            (x0, x1), (y1, y0) = axes.get_xlim(), axes.get_ylim()
            assert left <= x0 <= 0 <= x1 <= right  # with the unit in it
            assert top <= y0 <= 0 <= y1 <= bottom
            assert x1 - x0 == pytest.approx(150 / 8)
            (box,) = whole.patches
            assert box.get_bbox().bounds == pytest.approx((x0, y0, x1 - x0, y1 - y0))
    only = plot_erf(erf_of(["stage1", "head"], size=(150, 150)), zoom=["head"])
    assert sum(map(is_zoom, only.axes)) == 1
    for field in (
        erf_of(["head"], size=(64, 64)),
        erf_of(["head"], size=(256, 256), position=None),
    ):
        assert not any(map(is_zoom, plot_erf(field).axes))


def test_layers_with_units_at_several_positions_share_the_axes_of_the_image():
    positions = [(64, 64), (70.5, 80.5)]
    figure = plot_erf(with_units(erf_of(["stage1", "head"], size=(150, 150)), positions))
    assert "column (pixels; +: the unit)" in [text.get_text() for text in figure.texts]
    zooms = [axes for axes in figure.axes if is_zoom(axes)]
    for axes, zoom, (row, column) in zip(maps_of(figure), zooms, positions):
        assert axes.images[0].get_extent() == [-0.5, 149.5, 149.5, -0.5]
        (unit,) = axes.lines
        assert (unit.get_xdata()[0], unit.get_ydata()[0]) == (column, row)
        (box,) = axes.patches
        assert box.get_center() == pytest.approx((column, row))
        assert zoom.get_xlim() == pytest.approx((-150 / 16, 150 / 16))


def test_headings_name_different_settings():
    first, second = erf_of(["head"]), erf_of(["head"], num_images=2)
    second.settings["reduction"] = "l1"
    texts = [text.get_text() for text in plot_erf({"a": first, "b": second}).texts]
    assert "a (images: 3; reduction: None)" in texts
    assert "b (images: 2; reduction: l1)" in texts
    alike = plot_erf({"a": first, "b": erf_of(["head"], 1)})
    assert {"a", "b"} < {text.get_text() for text in alike.texts}


def test_curves_have_a_line_for_each_layer_and_legends_of_layers_and_of_networks():
    rows = {"one": erf_of(["stage1", "head"]), "two": erf_of(["stage1"], 1)}
    for plot in (plot_radial_profiles, plot_area_ratios):
        figure = plot(rows)
        left, right = figure.axes
        assert len(left.lines) == len(right.lines) == 3
        (layers,), (networks,) = figure.subfigs[0].legends, figure.legends
        assert [text.get_text() for text in layers.get_texts()] == ["stage1", "head"]
        assert [text.get_text() for text in networks.get_texts()] == ["one", "two"]
        assert left.lines[0].get_color() == left.lines[2].get_color() != left.lines[1].get_color()
        assert left.lines[0].get_linestyle() == left.lines[1].get_linestyle() == "-"
        assert left.lines[2].get_linestyle() == "--"
        assert left.get_xlabel()
        assert "%" in right.get_ylabel() + left.get_ylabel()
    alone = plot_radial_profiles(rows["one"])
    assert (len(alone.subfigs[0].legends), len(alone.legends)) == (1, 0)
    with pytest.raises(ValueError, match="plot_area_ratios: there is no receptive field"):
        plot_area_ratios({})


def test_a_difference_has_sum_zero_and_needs_equal_settings():
    first, second = erf_of(["stage1", "head"]), erf_of(["head", "stage2"], 1)
    (panel,) = maps_of(plot_difference(first, second, ("a", "b")))
    a, b = (erf["head"].mean / erf["head"].mean.sum() for erf in (first, second))
    assert panel.get_label() == f"head\n{100 * np.clip(a - b, 0, None).sum():.2g} % would move"
    assert panel.images[0].get_array().sum() == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="measured with different settings"):
        plot_difference(first, erf_of(["head"], gradient="relu"), ("a", "b"))
    with pytest.raises(ValueError, match="no layer in common"):
        plot_difference(first, erf_of(["stage4"]), ("a", "b"))


def test_signed_maps_have_a_separate_figure():
    signed = erf_of(["stage1"], gradient="signed")
    with pytest.raises(ValueError, match="signed map has no extent"):
        plot_erf(signed)
    (panel,) = maps_of(plot_signed(signed))
    assert panel.images[0].norm.vmin == -panel.images[0].norm.vmax


def test_radius_map_has_the_extent_of_the_image():
    radius_map = RadiusMap(
        "head", np.ones((4, 6)), np.zeros((4, 6)), np.arange(4), np.arange(6), (8, 12)
    )
    figure = plot_radius_map(radius_map, np.zeros((8, 12, 3)), TITLE)
    photo, radii = maps_of(figure)
    assert photo.images[0].get_extent() == radii.images[0].get_extent() == [-0.5, 11.5, 7.5, -0.5]
    assert_readable(figure)
    single = plot_radius_map(radius_map, title=TITLE)
    assert len(maps_of(single)) == 1
    assert_readable(single)


def test_receptive_field_of_zeros_is_labelled():
    erf = zero_in(erf_of(["stage1", "head"]), "head")
    labels = [axes.get_label() for axes in maps_of(plot_erf(erf))]
    assert labels[1] == "head\nzero everywhere"
    for plot in (plot_radial_profiles, plot_area_ratios):
        figure = plot({"a": erf, "b": erf_of(["stage1", "head"])})
        texts = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
        assert texts == ["stage1", "head: zero everywhere in a"]
        assert len(figure.axes[0].lines) == 3
    difference = plot_difference(erf, erf_of(["stage1", "head"]), ("a", "b"))
    assert maps_of(difference)[1].get_label() == "head\nzero everywhere in a"
    signed = zero_in(erf_of(["head"], gradient="signed"), "head")
    assert maps_of(plot_signed(signed))[0].get_label() == "head\nzero everywhere"


@pytest.mark.parametrize("positions", [None, [(32, 48), (0, 4), (40.5, 8)]])
def test_an_image_lies_beneath_and_a_cross_marks_the_unit(positions):
    names = STAGES[:3]
    erf = erf_of(names)
    erf = erf if positions is None else with_units(erf, positions)
    image = np.random.default_rng(0).random((64, 96, 1)).repeat(3, axis=2)
    origin = (32, 48) if positions is None else (0, 0)
    for axes, layer in zip(maps_of(erf.plot("title", image)), erf.layers.values()):
        beneath, drawn = axes.images
        assert beneath.get_extent() == drawn.get_extent()
        np.testing.assert_allclose(beneath.get_array(), 0.3 + 0.7 * image[..., 0])
        opacity = drawn.get_alpha()
        assert opacity.shape == layer.mean.shape
        assert opacity.flat[layer.mean.argmax()] == opacity.max() < 1
        assert opacity.flat[layer.mean.argmin()] == opacity.min() < opacity.max()
        (mark,) = (line for line in axes.lines if line.get_marker() == "+")
        (column,), (row,) = mark.get_data()
        assert (row + origin[0], column + origin[1]) == layer.position


def test_results_plot_themselves():
    erf = erf_of(STAGES)
    assert len(maps_of(erf.plot())) == 5
    assert len(maps_of(erf["head"].plot("the head"))) == 1
    assert "Signed gradient" in erf_of(STAGES[:2], gradient="signed").plot("s").get_suptitle()
    radii = RadiusMap("head", np.ones((2, 3)), np.zeros((2, 3)), [0, 4], [0, 4, 8], (8, 12))
    assert len(radii.plot(np.zeros((8, 12, 3)), "t").axes) == 3  # image, radii, colour bar
    with pytest.raises(UserError, match=r"give one of the maps' size, \(64, 96, 3\), not \(64, 64"):
        erf.plot(image=np.zeros((64, 64, 3)))


def test_results_say_in_one_line_what_they_are():
    erf = erf_of(["stage1", "head"], num_images=1)
    assert repr(erf) == "ERF(stage1, head; 1 image of 64x96 pixels)"
    unit = "unit at (32, 48), abs gradient"
    assert repr(erf["head"]) == f"LayerERF('head', {unit}, 1 image of 64x96 pixels)"
    of_class = dataclasses.replace(erf["head"], position=None)
    assert repr(of_class).startswith("LayerERF('head', units of a class, abs gradient, ")
    radii = RadiusMap("head", np.array([[1.25, np.nan]]), np.zeros((1, 2)), [0], [0, 4], (4, 8))
    assert repr(radii) == "RadiusMap('head', 1x2 units, radii 1.2 to 1.2 px, image of 4x8 pixels)"
    nothing = dataclasses.replace(radii, radius=radii.radius * np.nan)
    assert "no radius" in repr(nothing)
