"""Overlays and panels show the right colours, borders and names at every image size."""

from io import BytesIO

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from segformer_pl.analysis.overlays import (
    count_pixels,
    draw_classes,
    draw_legend,
    draw_overlay,
    plot_predictions,
    write_overlay,
)

NAMES = ["background", "object", "thing"]
PALETTE = [[10, 20, 30], [200, 100, 0], [0, 200, 255]]


@pytest.fixture
def written(monkeypatch):
    """Texts of legends, recorded while they are drawn."""
    texts = []
    draw = ImageDraw.ImageDraw.text

    def record(self, xy, text, *arguments, **options):
        texts.append(text)
        draw(self, xy, text, *arguments, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return texts


def halves(height, width):
    """Class 0 on the left, class 1 on the right."""
    train_ids = np.zeros((height, width), np.uint8)
    train_ids[:, width // 2 :] = 1
    return train_ids


def test_image_and_class_colours_are_blended_half_and_half():
    image = np.random.default_rng(0).integers(0, 256, (600, 640, 3), dtype=np.uint8)
    overlay = np.asarray(draw_overlay(image, halves(600, 640), NAMES, PALETTE))
    assert overlay.shape[1] == 640
    assert 610 < len(overlay) < 700  # one line of legend
    expected = (image + np.array(PALETTE, float)[halves(600, 640)]) / 2
    off = np.abs(overlay[:600] - expected).max(axis=2) > 0.5
    assert off[:, 319].all()
    assert off.sum() == 600  # the border, one pixel wide
    assert (overlay[600:] == 255).any(axis=2).mean() > 0.5


@pytest.mark.parametrize(("ground", "line"), [(255, 0), (0, 255)])
def test_borders_contrast_with_the_ground(ground, line):
    image = np.full((64, 3200, 3), ground, np.uint8)
    overlay = np.asarray(draw_overlay(image, halves(64, 3200), NAMES, PALETTE))
    drawn = (overlay[:64] == line).all(axis=2)
    assert drawn.sum() == 64 * 2  # 3200 pixels: 2 wide
    assert drawn[:, 1598:1602].sum() == drawn.sum()


@pytest.mark.parametrize("size", [(700, 900), (2100, 530)])
def test_bands_and_file_equal_the_whole_overlay(size, monkeypatch):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
    blocks = generator.integers(0, len(NAMES), (-(-size[0] // 50), -(-size[1] // 50)))
    ids = blocks.repeat(50, 0).repeat(50, 1)[: size[0], : size[1]].astype(np.uint8)
    monkeypatch.setattr("segformer_pl.analysis.overlays.BAND_PIXELS", 1 << 30)
    whole = np.asarray(draw_overlay(image, ids, NAMES, PALETTE))
    monkeypatch.setattr("segformer_pl.analysis.overlays.BAND_PIXELS", 50 * size[1])
    assert np.array_equal(np.asarray(draw_overlay(image, ids, NAMES, PALETTE)), whole)
    file = BytesIO()
    write_overlay(file, image, ids, NAMES, PALETTE)
    with Image.open(file) as decoded:  # Pillow verifies the checksums
        assert (decoded.format, decoded.mode) == ("PNG", "RGB")
        assert np.array_equal(np.asarray(decoded), whole)
    encoded = np.frombuffer(file.getvalue(), np.uint8)
    assert np.array_equal(cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB), whole)


def test_a_single_class_has_no_border(written):
    train_ids = np.ones((600, 600), np.uint8)
    overlay = draw_overlay(np.zeros((600, 600, 3), np.uint8), train_ids, NAMES, PALETTE)
    assert (np.asarray(overlay)[:600] == (100, 50, 0)).all()
    assert written == ["object  100.0 %"]


def test_frames_are_drawn_like_overlays_at_their_own_size(monkeypatch):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (600, 640, 3), dtype=np.uint8)
    ids = generator.integers(0, 3, (6, 8)).astype(np.uint8).repeat(100, 0).repeat(80, 1)
    whole = np.asarray(draw_overlay(image, ids, NAMES, PALETTE))
    assert np.array_equal(draw_classes(image, ids, PALETTE), whole[:600])
    monkeypatch.setattr("segformer_pl.analysis.overlays.BAND_PIXELS", 50 * 640)
    counts = count_pixels(ids, 4)
    assert counts.tolist() == [*np.bincount(ids.ravel()), 0]
    legend = np.asarray(draw_legend(counts, [*NAMES, "none"], [*PALETTE, [0, 0, 0]], 640))
    assert np.array_equal(legend, whole[600:])
    assert draw_classes(image[:9, :7], ids[:9, :7], PALETTE).shape == (9, 7, 3)


def test_small_images_are_enlarged_by_an_integer_factor():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    overlay = np.asarray(draw_overlay(image, np.zeros((40, 60), np.uint8), NAMES, PALETTE))
    assert overlay.shape[1] == 60 * 9
    blocks = overlay[: 40 * 9].reshape(40, 9, 60, 9, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert np.abs(blocks[:, 0, :, 0] - (image + np.array(PALETTE[0], float)) / 2).max() <= 0.5


def test_legend_lists_the_classes_present_largest_first(written):
    train_ids = np.full((100, 100), 2, np.uint8)
    train_ids[:30] = 0
    train_ids[99, 99:] = 1
    overlay = np.asarray(draw_overlay(np.zeros((100, 100, 3), np.uint8), train_ids, NAMES, PALETTE))
    assert written == ["thing  70.0 %", "background  30.0 %", "object  < 0.1 %"]
    legend = overlay[600:].reshape(-1, 3)
    for color in PALETTE:
        assert (legend == color).all(axis=1).sum() > 50


def test_shares_are_of_the_image_and_not_of_its_enlargement(written):
    draw_overlay(np.zeros((3, 1, 3), np.uint8), np.array([[0], [1], [1]]), NAMES, PALETTE)
    assert written == ["object  66.7 %", "background  33.3 %"]


@pytest.mark.parametrize("size", [(1500, 60), (60, 1500), (1, 1), (768, 1024)])
def test_legend_fits_every_shape_and_scales_with_it(size):
    train_ids = np.random.default_rng(0).integers(0, 3, size).astype(np.uint8)
    overlay = np.asarray(draw_overlay(np.zeros((*size, 3), np.uint8), train_ids, NAMES, PALETTE))
    factor = -(-512 // max(size))
    height, width = size[0] * factor, size[1] * factor
    assert overlay.shape[1] >= max(width, 0.15 * height)  # room for the longest text
    legend = overlay[height:]
    assert 0.03 < len(legend) / max(height, width) < 0.12
    assert (legend[:, -5:] == 255).all()  # no text is cut off
    assert (legend[:2] == 255).all()
    assert (legend[-2:] == 255).all()


def test_panel_shows_every_sample_with_a_legend_of_all_classes():
    generator = torch.Generator().manual_seed(0)
    samples = [
        {
            "image": torch.rand(3, 32, 48, generator=generator),
            "label": torch.randint(0, 2, (32, 48), generator=generator),
            "id": f"image-{index}",
        }
        for index in range(3)
    ]
    shown = [
        (s["id"], s["image"], torch.where(s["label"] == 0, 255, 1), s["label"]) for s in samples
    ]
    figure = plot_predictions(shown, NAMES, PALETTE)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == [t for s in samples for t in (s["id"], "label", "prediction")]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*NAMES, "unlabelled"]
    labelled = [(s["id"], s["image"], s["label"], s["label"]) for s in samples]
    (legend,) = plot_predictions(labelled, NAMES, PALETTE).legends
    assert [text.get_text() for text in legend.get_texts()] == NAMES
    label, prediction = figure.axes[1].images[0].get_array(), figure.axes[2].images[0].get_array()
    assert {tuple(color) for color in label.reshape(-1, 3)} == {(255, 255, 255), (200, 100, 0)}
    assert {tuple(color) for color in prediction.reshape(-1, 3)} == {(10, 20, 30), (200, 100, 0)}


@pytest.mark.filterwarnings("error")
def test_legend_of_many_classes_lists_the_largest_shown():
    names = [f"class {n}" for n in range(171)]
    palette = [[n, n, 0] for n in range(171)]
    label = torch.arange(60).repeat_interleave(8).view(20, 24)  # 60 classes of 8 pixels
    label[:10] = 170  # leaves 30 of them
    label[-1, -1] = 255
    shown = [("a", torch.zeros(3, 20, 24), label, torch.full_like(label, 5))]
    figure = plot_predictions(shown, names, palette)
    figure.canvas.draw()
    (legend,) = figure.legends
    listed = [text.get_text() for text in legend.get_texts()]
    assert len(listed) == 32
    assert {"class 5", "class 170", "class 30", "unlabelled"} <= set(listed)
    assert "class 6" not in listed
