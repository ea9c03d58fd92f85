"""The report of an arena shows the numbers of its systems, and what is missing in a sentence."""

import csv
import math
import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Circle

from segformer_pl.analysis.ablation import read_results
from segformer_pl.analysis.arena import (
    Robustness,
    RunMeasurements,
    compare_systems,
    erf_file,
    read_erf,
)
from segformer_pl.analysis.erf import ERF, LayerERF
from segformer_pl.analysis.report.arena_charts import Field, cost_figure, field_figure
from segformer_pl.analysis.report.arena_page import write_arena_report
from segformer_pl.analysis.report.arena_tables import read_frontier

HOSTILE = "<script>alert('|')</script> $x_1$ & \"q\""
LONG = "semask_fpn+efficientnet_lite0=imagenet+decoder_dim=256+image_size=192-256"
SIZE = (24, 32)
MAPS = {"a": ("stage1", "stage2", "fused"), "b": ("stage1", "stage2", "aspp", "head")}


def gaussian(sigma):
    rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
    return np.exp(-((rows - 12) ** 2 + (columns - 16) ** 2) / (2 * sigma**2))


def save_erf(file, names, scale=1.0):
    """Save Gaussian fields that grow from map to map."""
    layers = {}
    for depth, name in enumerate(names, start=1):
        mean = gaussian(scale * depth)
        groups, ones = np.stack([mean, mean]).astype("f4"), np.array([1, 1])
        layers[name] = LayerERF(name, mean, mean, groups, ones, (12, 16), (6, 8), "abs")
    settings = {"units": "center", "reduction": "relu", "gradient": "abs", "image_size": [*SIZE]}
    file.parent.mkdir(parents=True, exist_ok=True)
    ERF(layers, 2, settings=settings).save(file)


@pytest.fixture
def arena(simulate_study, read_page):
    """Function (effects, ...) -> results, systems and the parsed page of a simulated arena."""

    def make(effects, maps=(), costs=None, notes=None, **settings):
        study = simulate_study(effects, **settings)
        results = read_results(study.path, "small")
        measured = {}
        for name, runs in results.runs.items():
            for seed, run in runs.items():
                erf = None
                if name in maps:
                    save_erf(erf_file(run, 2), maps[name], 1 + 0.1 * seed)
                    erf, _ = read_erf(erf_file(run, 2))
                one = Robustness(0.5, 0.2 + 0.1 * seed, 20)
                measured.setdefault(name, {})[seed] = RunMeasurements(one, erf)
        costs = study.costs() if costs is None else costs
        systems = compare_systems(results, measured, costs, {"a": "random"}, notes or {})
        folder = study.path / "arena_small"
        page = read_page(write_arena_report(folder, results, systems, 20))
        page.folder = folder
        return results, systems, page

    return make


@pytest.mark.slow
def test_page_shows_the_numbers_of_the_systems(arena):
    note = "It starts from random weights."
    _, systems, page = arena({"a": 0.0, "b": -0.3}, MAPS, notes={"b": note}, seeds=(0, 1))
    (row,) = page.rows_of("2 b")[:1]
    one = systems[1]
    for measure in ("miou", "worst_decile", "robustness"):
        summary = one.measures[measure]
        half = (summary.high - summary.low) / 2
        assert f"{100 * summary.mean:.2f} ± {100 * half:.2f}" in row
    assert " 3.74 0.70 0.80 14.2 49.2 2 " in row  # costs and number of seeds
    assert one.measures["robustness"].mean == pytest.approx(0.5)
    assert "the same 20 images without corruptions" in page.text
    assert "1 of 2 systems was trained from random weights" in page.text
    assert f"b : {note}" in page.text
    assert "mIoU against costs" in page.text
    assert "2 variants were trained with 2 seeds each" in page.text  # the outcome of the study
    # The radii: mean of both seeds and their range, in the columns of the figure
    radii = page.rows_of("1 a")[-1]
    low, high = (erf.radius_50["fused"].value for erf in one_system(systems, "a").erfs.values())
    assert f"fused: {(low + high) / 2:.1f} ({low:.1f}–{high:.1f})" in radii
    headings = page.rows_of("# system stage1")[0]
    assert headings == "# system stage1 (px) stage2 (px) aspp (px) head (px)"
    assert radii.split()[-4] == "–"  # a has no aspp
    rows = list(csv.DictReader((page.folder / "erf.csv").open()))
    assert len(rows) == 2 * (3 + 4)
    assert float(rows[2]["radius_50"]) == low
    table = list(csv.DictReader((page.folder / "table.csv").open()))
    assert float(table[1]["miou"]) == one.measures["miou"].mean
    assert float(table[1]["robustness_sd"]) == pytest.approx(0.1 * math.sqrt(2))
    assert table[1]["boundary_iou"] == ""
    text = (page.folder / "table.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 + 2 + len(read_frontier().systems)
    assert f"- b: {note}" in text
    assert (page.folder / "erf.png").read_bytes().startswith(b"\x89PNG")
    assert (page.folder / "erf.pdf").read_bytes().startswith(b"%PDF")


def one_system(systems, name):
    return next(system for system in systems if system.name == name)


@pytest.mark.slow
def test_page_is_self_contained_and_escapes_foreign_text(arena):
    effects = {HOSTILE: 0.0, "a\nb": 0.1}
    maps = {HOSTILE: ("stage1", "<i>x"), "a\nb": ("stage1", "$y")}
    notes = {HOSTILE: "<b>note"}
    page = arena(effects, maps, notes=notes, seeds=(0,))[2]
    assert not page.has_foreign_scripts
    assert "<b>note" not in page.source
    assert "<b>note" in page.text
    assert "<i>x" not in page.source
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert tag == "a" or target.startswith(("#", "data:"))
    assert {header["scope"] for header in page.all("th")} == {"col", "row"}
    lines = (page.folder / "table.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table[:4]}) == 1


@pytest.mark.slow
def test_what_was_not_measured_is_a_dash_and_a_sentence(arena):
    costs = [{"variant": "a", "parameters": 7, "failure": "its costs were not measured: no size"}]
    _, systems, page = arena({"a": 0.0, "b": -0.3}, {}, costs, seeds=(0,))
    assert systems[0].missing
    for sentence in (
        "a: its costs were not measured: no size.",
        "b: its costs were not measured.",
        "a, seed 0: its metrics.csv has no val/boundary_iou.",
        "The plot needs the costs and the results of the reference and of at least one other",
        "No receptive field was measured.",
    ):
        assert sentence in page.text
    (row,) = page.rows_of("1 a")
    assert row.count("–") == 4  # MACs, latency, activations, boundary IoU
    assert not (page.folder / "erf.png").exists()
    assert not (page.folder / "erf.csv").exists()
    assert "nan" not in (page.folder / "table.csv").read_text()


@pytest.mark.slow
def test_maps_that_cannot_be_read_are_left_out(arena, read_page):
    results, systems, page = arena({"a": 0.0, "b": -0.3}, MAPS, seeds=(0,))
    next(iter(systems[0].erfs.values())).file.write_bytes(b"no archive")
    page = read_page(write_arena_report(page.folder, results, systems, 20))
    assert "What is missing, and why" in page.text
    assert re.search(r"a: '\S+\.npz' and '\S+' hold no ERF, or are damaged", page.text)
    assert len(page.all("img")) == 1


@pytest.mark.slow
def test_systems_without_maps_share_a_sentence(arena, read_page):
    results, systems, page = arena({"a": 0.0, "b": -0.3}, MAPS, seeds=(0,))
    for system in systems:
        next(iter(system.erfs.values())).file.unlink()
    (page.folder / "erf.csv").unlink()
    report = write_arena_report(page.folder, results, systems, 20)
    page = read_page(report)
    assert page.text.count("the figure has no row, because the maps of receptive fields") == 1
    assert "a, b: the figure has no row" in page.text
    # The radii need no maps.
    assert "Radius that holds half of each receptive field" in report.read_text()
    assert "No receptive field was measured" not in page.text
    assert (report.parent / "erf.csv").exists()


def test_published_results_have_protocol_and_source():
    frontier = read_frontier()
    by_name = {one.system: one for one in frontier.systems}
    assert len(by_name) == len(frontier.systems)
    assert by_name["YOLO26n-sem"].miou == 78.3
    assert by_name["LightlyTrain EoMT, DINOv3 ViT-S/16"].miou == 78.6
    assert by_name["SegFormer-B0"].miou == 76.2
    for system in ("SETR", "MaskFormer", "SeMask", "DeepLabv3+"):
        assert any(name.startswith(system) for name in by_name)
    for one in frontier.systems:
        assert 40 < one.miou < 90
        assert all(len(text) > 8 for text in (one.cost, one.protocol, one.source))


def fields(names, title=""):
    return {
        name: Field(title, gaussian(2 + index), (12, 16), 2.35 * (2 + index))
        for index, name in enumerate(names)
    }


@pytest.mark.slow
@pytest.mark.parametrize(("num_columns", "num_systems"), [(1, 1), (1, 7), (5, 2), (8, 7)])
def test_figure_of_fields_is_readable(num_columns, num_systems):
    columns = [f"stage{i}" for i in range(1, num_columns)] + ["head"]
    names = [LONG, HOSTILE, "a\nb", *(f"system{i}" for i in range(4))][:num_systems]
    rows = {name: fields(columns, "pixel_embeddings" if name == LONG else "") for name in names}
    figure = field_figure(rows, columns)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    width, height = figure.bbox.width, figure.bbox.height
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == num_columns * num_systems
    (bar,) = (axes for axes in figure.axes if not axes.images)
    texts = [*figure.texts, bar.xaxis.label]  # tick labels are matplotlib's business
    boxes = [text.get_window_extent(renderer) for text in texts]
    for box in boxes:
        assert box.x0 >= 0
        assert box.x1 <= width + 1
        assert box.y0 >= 0
        assert box.y1 <= height + 1
        for axes in panels:
            assert not overlap(box, axes.bbox)
    for index, box in enumerate(boxes):
        assert not any(overlap(box, other) for other in boxes[index + 1 :])
    circle = next(patch for patch in panels[0].patches if isinstance(patch, Circle))
    assert circle.radius == 4.7
    assert circle.center == (16, 12)


def overlap(a, b):
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


def test_a_field_without_a_radius_or_columns_of_its_own():
    rows = {
        "a": fields(["stage1"]),
        "b": {"head": Field("", np.zeros(SIZE), (12, 16), math.nan)},
    }
    figure = field_figure(rows, ["stage1", "head"])
    texts = {text.get_text() for text in figure.texts}
    assert {"stage1", "head", "a", "b", "4.7 px", "no radius"} <= texts
    assert sum(bool(axes.images) for axes in figure.axes) == 2


@pytest.mark.slow
def test_costs_are_drawn_with_the_reference_first(arena):
    systems = arena({"a": 0.0, "b": -0.3, "c": 0.2}, seeds=(0,))[1]
    figure = cost_figure(systems)
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["MACs of an image (G)", "latency of an image (ms)"]
    assert cost_figure(systems[1:]) is not None
    assert cost_figure(systems[:1]) is None
