"""Notebooks run from top to bottom without a display and are committed with small outputs."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.browser import NAMES, Browser

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# By notebook: lines of its settings that are replaced, and what the executed one must print.
SMALL = {
    "erf_analysis": {
        "CKPT = CKPT if CKPT.is_file() else None": "CKPT = None",
        "NUM_IMAGES = 16": "NUM_IMAGES = 2",
        "UNITS_EVERY = 2": "UNITS_EVERY = 8",
    },
    "ablations": {},
}
LARGEST = {"erf_analysis": 3_000_000, "ablations": 450_000}  # letters; the first embeds a page
PRINTED = {
    "erf_analysis": (
        "random weights; 2 images of shapes, 64x64 pixels",
        "Along the border of the images (64x64 px) the gradient is",
    ),
    "ablations": (
        "reduction_and_overlap, budget gpu: 18 finished runs",
        "1 is resolved (Holm-corrected p < 0.05): “k4-2-2-2” is 2.97 points higher",
    ),
}


def test_there_are_notebooks():
    assert [file.name for file in NOTEBOOKS] == ["ablations.ipynb", "erf_analysis.ipynb"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_outputs_are_small_and_contain_no_absolute_paths(file):
    nbformat = pytest.importorskip("nbformat")
    text = file.read_text()
    assert len(text) < LARGEST[file.stem]
    assert not re.search(r"/(home|root|Users|tmp)/|site-packages", text)
    notebook = nbformat.reads(text, 4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
    assert all(output.output_type != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)


@pytest.mark.slow
def test_the_embedded_page_works_in_a_browser(tmp_path):
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("there is no Chromium")
    cells = json.loads(NOTEBOOKS[1].read_text())["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    (html,) = ("".join(data["text/html"]) for data in outputs if "text/html" in data)
    (tmp_path / "page.html").write_text(html)
    browser = Browser(program, tmp_path / "profile")
    try:
        browser.resize(1200, 900)
        browser.open(tmp_path / "page.html")
        inside = "document.querySelector('iframe').contentDocument"
        browser.wait_for(f"{inside}?.querySelectorAll('.panel .radius').length === 5")
        browser.wait_for(f"{inside}.querySelector('.panel .radius').textContent.includes('px')")
        before = browser.run(f"{inside}.querySelector('.place').textContent")
        browser.mouse("mouseMoved", 60, 340)
        browser.wait_for(f"{inside}.querySelector('.place').textContent !== {before!r}")
        assert browser.errors() == []
    finally:
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_runs_from_top_to_bottom(file, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    # The kernel runs in its own process and must be able to import this package.
    monkeypatch.setenv("PYTHONPATH", str(file.parents[1]))
    notebook = nbformat.read(file, 4)
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for line, smaller in SMALL[file.stem].items():
        assert line in settings.source
        settings.source = settings.source.replace(line, smaller)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(file.parent)}}
    ).execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert all(expected in text for expected in PRINTED[file.stem])
