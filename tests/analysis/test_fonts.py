"""Letters that DejaVu Sans lacks, with and without an installed font that has them."""

import warnings

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from segformer_pl.analysis import fonts
from segformer_pl.analysis.overlays import draw_overlay, plot_predictions

ROAD = "道路"


def write_font(file):
    """Write a font whose only letters are two full squares."""
    names = [".notdef", *(f"uni{ord(letter):04X}" for letter in ROAD)]
    pen = TTGlyphPen(None)
    for n, corner in enumerate([(0, 0), (0, 1000), (1000, 1000), (1000, 0)]):
        (pen.lineTo if n else pen.moveTo)(corner)
    pen.closePath()
    square = pen.glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(letter): name for letter, name in zip(ROAD, names[1:])})
    font.setupGlyf(dict.fromkeys(names, square))
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    font.setupHorizontalHeader(ascent=1000, descent=0)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(file)


@pytest.fixture
def installed(monkeypatch):
    """List of the files of installed fonts, empty at first, beside those of matplotlib."""
    files = []
    own = [font for font in fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(fontManager, "ttflist", own)
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: files)
    for function in (fonts._search, fonts._warn, fontManager._findfont_cached):
        function.cache_clear()
    yield files
    for function in (fonts._search, fonts._warn, fontManager._findfont_cached):
        function.cache_clear()


@pytest.fixture
def squares(installed, tmp_path):
    installed.append(str(tmp_path / "squares.ttf"))
    write_font(installed[0])


def dark_pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return int((np.asarray(canvas.buffer_rgba())[..., :3] < 100).all(axis=2).sum())


def label_of(text):
    figure = Figure(figsize=(2, 1), dpi=100)
    figure.text(0.1, 0.4, text, fontsize=36)  # letters of 50 pixels
    return figure


@pytest.mark.usefixtures("squares")
@pytest.mark.filterwarnings("error")
def test_a_figure_uses_an_installed_font_for_what_its_own_lacks():
    plain = fonts.fit_text(label_of("a é"))
    assert plain.texts[0].get_fontfamily() == Figure().text(0, 0, "").get_fontfamily()
    mixed = fonts.fit_text(label_of(f"a {ROAD}"))
    assert mixed.texts[0].get_text() == f"a {ROAD}"
    assert dark_pixels(mixed) - dark_pixels(plain) > 2 * 48 * 48


def test_a_figure_without_a_font_shows_escapes_and_says_what_to_install(installed):
    with pytest.warns(UserWarning, match="letters '路道'.*package fonts-noto-cjk"):
        figure = fonts.fit_text(label_of(f"a {ROAD}"))
    assert figure.texts[0].get_text() == "a \\u9053\\u8def"
    with warnings.catch_warnings(action="error"):
        fonts.fit_text(label_of(ROAD))  # a warning once
        assert dark_pixels(figure)
    installed.append("damaged.ttf")
    with pytest.warns(UserWarning, match="package fonts-noto of"):
        assert fonts.fit_text(label_of("ไทย")).texts[0].get_text() == "\\u0e44\\u0e17\\u0e22"


def overlay_and_panel():
    image, ids = np.full((60, 80, 3), 255, np.uint8), np.zeros((60, 80), np.uint8)
    overlay = draw_overlay(image, ids, [f"a {ROAD}"], [[255, 255, 255]])
    maps = torch.from_numpy(ids).long()
    panel = plot_predictions([(ROAD, torch.ones(3, 60, 80), maps, maps)], [ROAD], [[255] * 3])
    return np.asarray(overlay), panel


@pytest.mark.usefixtures("squares")
@pytest.mark.filterwarnings("error")
def test_overlays_and_panels_with_an_installed_font():
    overlay, panel = overlay_and_panel()
    size = round(overlay.shape[1] / 44)
    legend = overlay[420:, 2 * size :]  # below the enlarged image, without the swatch
    dark = (legend < 100).all(axis=2)
    assert 2 * (size - 2) ** 2 < dark.sum() < 6 * size**2
    texts = [text.get_text() for text in panel.legends[0].get_texts()]
    assert texts == [ROAD]
    assert [axes.get_title() for axes in panel.axes] == [ROAD, "label", "prediction"]
    assert dark_pixels(panel)


@pytest.mark.usefixtures("installed")
def test_overlays_and_panels_without_a_font():
    with pytest.warns(UserWarning, match="no installed font"):
        overlay, panel = overlay_and_panel()
    assert fonts.split(f"a {ROAD} b") == [("a \\u9053\\u8def b", fonts.OWN)]
    assert panel.axes[0].get_title() == "\\u9053\\u8def"
    dark = (overlay[420:] < 100).all(axis=2)
    assert dark.any(axis=0).nonzero()[0].max() > 150  # the escapes are long
