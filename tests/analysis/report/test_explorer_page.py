"""The page of receptive fields: its numbers, and how it behaves in a real browser."""

import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch

from segformer_pl.analysis.erf import Grid, effective_receptive_field, explore
from segformer_pl.analysis.erf.exploration import block_means, quantize
from segformer_pl.analysis.report.explorer_page import write_explorer
from segformer_pl.errors import UserError
from segformer_pl.models import MixTransformer, SegFormer

LAYERS = ["stage1", "stage2", "stage3", "stage4", "head"]
ID = 'road <7> & "co"</script>'


@pytest.fixture(scope="module")
def measured(randomize):
    """Two networks, an image (3, 50, 66), and the units of a grid by network."""
    networks = {}
    for name in ("first <b>", "second"):
        encoder = MixTransformer(embed_dims=[4, 8, 8, 16], depths=[1] * 4, num_heads=[1, 2, 2, 4])
        networks[name] = SegFormer(encoder=encoder, decoder_dim=16, num_classes=3)
        randomize(networks[name])
    image = torch.rand(3, 50, 66, generator=torch.Generator().manual_seed(0))
    grid = Grid(3, 4)
    return networks, image, {name: explore(net, image, grid=grid) for name, net in networks.items()}


@pytest.fixture(scope="module")
def page(measured, tmp_path_factory):
    _, image, explorations = measured
    file = tmp_path_factory.mktemp("page") / "page.html"
    write_explorer(file, image, ID, explorations)
    return file


def data_of(page):
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL
    )
    return json.loads(text)


def test_numbers_are_those_of_the_effective_receptive_field(measured, page):
    networks, image, _ = measured
    data = data_of(page)
    assert [network["name"] for network in data["networks"]] == list(networks)
    place = (2, 1)
    index = place[0] * len(data["columns"]) + place[1]
    pixel = (data["rows"][place[0]], data["columns"][place[1]])
    for network, stored in zip(networks.values(), data["networks"]):
        expected = effective_receptive_field(network, image[None], units=[pixel])
        assert [layer["name"] for layer in stored["layers"]] == list(expected.layers) == LAYERS
        for layer in stored["layers"]:
            one = expected[layer["name"]]
            assert layer["radius"][index] == pytest.approx(one.radius(0.5), abs=0.006)
            assert layer["share"][index] == pytest.approx(one.center_share(16), abs=6e-5)
            assert tuple(layer["positions"][index]) == one.position
            assert tuple(layer["grid"]) == one.grid
            content = zlib.decompress(base64.b64decode(layer["values"]))
            values = np.frombuffer(content, np.uint8).reshape(12, *layer["shape"])
            exact = quantize(block_means(one.mean, layer["block"]))
            assert np.abs(values[index].astype(int) - exact).max() <= 1  # rounding in float32


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert "default-src 'none'" in text
    assert "http://www.w3.org/2000/svg" in text  # a name, not an address that is loaded
    assert set(re.findall(r"https?://[^\"')\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "first &lt;b&gt;" in text
    assert "<b>" not in json.dumps(data_of(page)["networks"][1])
    assert text.count("</script>") == 2  # the name of the image ends none


def test_refusals(measured, tmp_path):
    networks, image, explorations = measured
    file = tmp_path / "page.html"
    with pytest.raises(UserError, match="no network to show"):
        write_explorer(file, image, ID, {})
    with pytest.raises(UserError, match="give the image that was measured"):
        write_explorer(file, image[:, 1:], ID, explorations)
    other = explore(networks["second"], image, grid=Grid(1, 1), layers=["stage1"])
    with pytest.raises(UserError, match="on other grids"):
        write_explorer(file, image, ID, {**explorations, "other": other})
    assert not file.exists()


PIXELS = """(() => {
  const canvas = document.querySelectorAll('.panel canvas:not(.inset)')[INDEX];
  const drawn = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return Array.from(drawn.data);
})()"""


class Page:
    """What a reader sees of the page."""

    def __init__(self, browser):
        self.browser = browser

    @property
    def place(self):
        return self.browser.run("document.getElementById('place').textContent")

    @property
    def radii(self):
        script = "Array.from(document.querySelectorAll('.panel .radius'), p => p.textContent)"
        return self.browser.run(script)

    @property
    def insets(self):
        script = "Array.from(document.querySelectorAll('.panel .inset'), c => c.offsetWidth > 0)"
        return self.browser.run(script)

    def pixels(self, index):
        return np.array(self.browser.run(PIXELS.replace("INDEX", str(index)))).reshape(-1, 4)

    def point(self, selector, row, column):
        """Return the coordinates of a pixel of the image in the window."""
        script = f"document.querySelector('{selector}').getBoundingClientRect().toJSON()"
        box = self.browser.run(script)
        return (
            box["left"] + box["width"] * (column + 0.5) / 66,
            box["top"] + box["height"] * (row + 0.5) / 50,
        )


@pytest.fixture
def shown(browser, page):
    browser.resize(1280, 1400)
    browser.open(page)
    browser.wait_for("document.querySelector('.radius').textContent !== ''")
    return Page(browser)


def radius_texts(data, index):
    radii = [layer["radius"][index] for network in data["networks"] for layer in network["layers"]]
    return [f"half within {r:.1f} px" if r < 9.95 else f"half within {r:.0f} px" for r in radii]


@pytest.mark.slow
def test_another_unit_has_another_field_and_other_numbers(browser, page, shown):
    data = data_of(page)
    seen = []
    for row, column, index in ((2, 3, 0), (45, 60, 11), (24, 30, 5)):
        browser.mouse("mouseMoved", *shown.point("#image", row, column))
        pixel = f"row {data['rows'][index // 4]}, column {data['columns'][index % 4]} "
        assert pixel in shown.place
        assert shown.radii == radius_texts(data, index)
        # Narrow fields are enlarged.
        radii = [layer["radius"][index] for net in data["networks"] for layer in net["layers"]]
        assert shown.insets == [radius < 66 / 24 for radius in radii]
        head = data["networks"][1]["layers"][4]
        values = np.frombuffer(zlib.decompress(base64.b64decode(head["values"])), np.uint8)
        values = values.reshape(12, -1)[index]
        drawn = shown.pixels(9)
        colors = np.frombuffer(base64.b64decode(data["colors"]), np.uint8).reshape(256, 3)
        strong = values > 200  # opaque, so that the browser returns the exact colour
        assert strong.any()
        np.testing.assert_array_equal(drawn[strong, :3], colors[values[strong]])
        assert (drawn[values == 0, 3] == 0).all()
        seen.append(drawn)
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[1], seen[2])
    # A panel is pointed at like the image.
    browser.mouse("mouseMoved", *shown.point(".panel .view", 2, 3))
    assert shown.radii == radius_texts(data, 0)
    assert browser.errors() == []
    assert {url.partition(":")[0] for url in browser.requests()} <= {"file", "data", "about"}


@pytest.mark.slow
def test_keys_clicks_and_fingers(browser, page, shown):
    assert "place 2 of 3 down, 3 of 4 across" in shown.place
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft", "ArrowLeft"):
        browser.press(key)
    assert "place 1 of 3 down, 1 of 4 across" in shown.place  # and no further
    browser.press("ArrowDown")
    browser.press("ArrowRight")
    assert "place 2 of 3 down, 2 of 4 across" in shown.place
    assert shown.radii == radius_texts(data_of(page), 5)
    there, elsewhere = shown.point("#image", 2, 3), shown.point("#image", 45, 60)
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        browser.mouse(kind, *there)
    browser.mouse("mouseMoved", *elsewhere)
    assert "place 1 of 3 down, 1 of 4 across), held" in shown.place
    browser.press("Escape")
    browser.mouse("mouseMoved", *shown.point("#image", 44, 61))
    assert "place 3 of 3 down, 4 of 4 across" in shown.place
    browser.tap(*there)
    assert "place 1 of 3 down, 1 of 4 across" in shown.place


@pytest.mark.slow
def test_the_page_fits_a_narrow_window(browser, shown):
    browser.resize(360, 800, mobile=True)
    assert browser.run("document.documentElement.scrollWidth") <= 360


@pytest.mark.slow
def test_the_page_is_dark_where_the_reader_asks_for_it(browser, shown):
    script = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert min(browser.run(script)) > 200
    browser.resize(1280, 1400, dark=True)
    assert max(browser.run(script)) < 50
