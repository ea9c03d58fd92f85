"""The pages in a real browser: sorting, saving, enlarging, contents, dark mode, narrow windows."""

import csv
import json
import time

import numpy as np
import pytest
from matplotlib.figure import Figure

from segformer_pl.analysis.report import write_report
from segformer_pl.analysis.report.study_page import write_study_report

pytestmark = pytest.mark.slow

CLASSES = ["road, wet", '=1+1 "x"', "道路", "absent <b>"]
CLASS_TABLE = "[aria-label^='IoU of each class']"

# Contrast (WCAG 2) of every text of the charts with the card that it is on. Numbers on the cells of
# a matrix have a ground of their own, so they are left out by their colours.
CONTRASTS = """Array.from(document.querySelectorAll('figure svg text'), (text) => {
  const rgb = (color) => color.match(/\\d+/g).slice(0, 3).map(Number);
  const luminance = (color) => rgb(color).map((value) => value / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const fill = getComputedStyle(text).fill;
  const card = getComputedStyle(text.closest('.card')).backgroundColor;
  const [low, high] = [luminance(fill), luminance(card)].sort((a, b) => a - b);
  return { fill, contrast: (high + 0.05) / (low + 0.05) };
})"""
ON_CELLS = {"rgb(34, 34, 34)", "rgb(254, 254, 254)"}
WIDTH = "document.documentElement.scrollWidth"


@pytest.fixture(scope="module")
def shown(browser, run_folder, tmp_path_factory):
    """The report of a run, opened once for all tests."""
    folder = run_folder(tmp_path_factory.mktemp("runs") / "demo" / "version_0")
    folder.names = CLASSES
    folder.finished([0.3, 0.8])
    record = folder.evaluation(step=20, class_names=CLASSES, split_size=101)
    record.save(folder.path / "evaluation" / "val_step_0000020.npz")
    finding = "a warning of some length; lower --trainer.log_every_n_steps, " * 3
    (folder.path / "findings.json").write_text(json.dumps([finding]))
    (folder.path / "worst").mkdir()
    for step in (10, 20):
        figure = Figure(figsize=(12, 1))
        figure.savefig(folder.path / "worst" / f"step_{step:07d}.png")
    browser.resize(1280, 900)
    browser.messages.clear()
    browser.open(write_report(folder.run))
    browser.wait_for("document.querySelector('th button') !== null")
    return browser


def column(browser, table, number):
    cells = f"{table} tbody tr > :nth-child({number})"
    return browser.run(f"Array.from(document.querySelectorAll({cells!r}), c => c.textContent)")


def order(browser, table):
    headings = f"{table} thead th[aria-sort]"
    return browser.run(f"Array.from(document.querySelectorAll({headings!r}), h => h.ariaSort)")


def focus(browser, selector):
    browser.run(f"document.querySelector({selector!r}).focus()")


def test_tables_are_sorted_by_the_buttons_of_their_headings(shown):
    assert column(shown, CLASS_TABLE, 1) == CLASSES
    assert order(shown, CLASS_TABLE) == ["none"] * 4  # class, IoU, accuracy, pixels; not the bars
    focus(shown, f"{CLASS_TABLE} th:nth-child(2) button")
    shown.press("Enter")
    assert column(shown, CLASS_TABLE, 2) == ["34.5\xa0%", "67.8\xa0%", "91.2\xa0%", "absent"]
    assert order(shown, CLASS_TABLE) == ["none", "ascending", "none", "none"]
    shown.press("Enter")
    assert column(shown, CLASS_TABLE, 1) == [CLASSES[0], CLASSES[2], CLASSES[1], CLASSES[3]]
    assert order(shown, CLASS_TABLE) == ["none", "descending", "none", "none"]
    shown.press("Enter")
    assert column(shown, CLASS_TABLE, 1) == CLASSES
    assert order(shown, CLASS_TABLE) == ["none"] * 4
    # From heading to heading by the keyboard
    shown.press("Tab")
    shown.press("Enter")
    assert order(shown, CLASS_TABLE) == ["none", "none", "ascending", "none"]
    assert column(shown, "[aria-label^='Most common']", 4) == ["20", "10", "10", "5"]


def test_a_table_is_saved_as_csv_with_all_digits(shown, tmp_path):
    shown.save_downloads(tmp_path)
    shown.run(f'document.querySelector("{CLASS_TABLE} + .tools button").click()')
    file = tmp_path / "demo_version_0_IoU_of_each_class_validation_step_20_3_of_101_images.csv"
    end = time.monotonic() + 20
    while not file.is_file() and time.monotonic() < end:
        time.sleep(0.05)
    rows = list(csv.reader(file.read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["class", "IoU", "accuracy", "pixels"]
    by_name = {row[0]: row[1:] for row in rows[1:]}
    # A spreadsheet would run a text that begins with "=".
    assert set(by_name) == {CLASSES[0], f"'{CLASSES[1]}", CLASSES[2], CLASSES[3]}
    assert by_name[CLASSES[0]] == ["0.912", str(170 / 200), str(200 / 260)]
    assert by_name[CLASSES[3]] == ["absent", "", ""]


def test_figures_are_enlarged_and_escape_closes_them(shown):
    buttons = shown.run("Array.from(document.querySelectorAll('.zoom > button'), b => b.ariaLabel)")
    assert len(set(buttons)) == len(buttons) == 6  # loss, mIoU, matrix, calibration, two images
    for selector, picture in ((".figure .zoom > button", "img"), ("figure .zoom > button", "svg")):
        focus(shown, selector)
        shown.press("Enter")
        assert shown.run("document.querySelector('dialog').open")
        box = f"document.querySelector('dialog {picture}').getBoundingClientRect()"
        assert shown.run(f"{box}.width") > 1100
        shown.press("Escape")
        shown.wait_for("!document.querySelector('dialog').open")
        assert shown.run(f"document.activeElement === document.querySelector({selector!r})")


def test_contents_lead_to_all_headings(shown):
    links = shown.run("Array.from(document.querySelectorAll('nav a'), a => a.hash.slice(1))")
    assert links == shown.run("Array.from(document.querySelectorAll('h2'), h => h.id)")
    assert len(set(links)) == len(links) > 5
    assert all(shown.run(f"document.querySelectorAll('#{link}').length === 1") for link in links)
    focus(shown, "nav a[href='#errors-val']")
    shown.press("Enter")
    top = "document.getElementById('errors-val').getBoundingClientRect().top"
    shown.wait_for(f"Math.abs({top}) < 40")


def test_a_part_of_the_images_is_said(shown):
    text = shown.run("document.querySelector('main').innerText")
    assert "Validation on 3 of 101 images of the split" in text


@pytest.mark.parametrize("width", [1280, 700, 500, 360])
def test_lines_break_neither_in_an_option_nor_before_a_single_heading(shown, width):
    shown.resize(width, 900)
    tops = "(selector, of) => Array.from(document.querySelectorAll(selector), of)"
    heights = shown.run(f"({tops})('.verdict .option', (o) => o.offsetHeight)")
    assert len(heights) == 3
    assert max(heights) < 30  # one line
    rows = shown.run(f"({tops})('nav li', (entry) => entry.offsetTop)")
    assert rows.count(max(rows)) > 1 or width < 500


def test_figures_are_dimmed_on_dark_pages_only(shown):
    filters = []
    for dark in (False, True):
        shown.resize(1280, 900, dark=dark)
        filters.append(shown.run("getComputedStyle(document.querySelector('.zoom img')).filter"))
    shown.resize(1280, 900)
    assert filters == ["none", "brightness(0.8)"]


@pytest.mark.parametrize("width", [1600, 1280, 500, 360])
def test_the_page_fits_the_window(shown, width):
    shown.resize(width, 900)
    assert shown.run(WIDTH) <= width
    box = "document.querySelector('{}').getBoundingClientRect()"
    is_beside = shown.run("getComputedStyle(document.querySelector('nav')).position === 'fixed'")
    assert is_beside == (width == 1600)
    if is_beside:
        assert shown.run(f"{box.format('nav')}.right < {box.format('main > .tiles')}.left")


def check_colors(browser):
    """Check that text is readable on light and on dark pages; return the colours on cells."""
    on_cells = []
    for dark in (False, True):
        browser.resize(1280, 900, dark=dark)
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (int(ground.split("(")[1].split(",")[0]) < 50) == dark
        texts = browser.run(CONTRASTS)
        assert len(texts) > 20
        on_cells.append([text["fill"] for text in texts if text["fill"] in ON_CELLS])
        poor = [text for text in texts if text["fill"] not in ON_CELLS and text["contrast"] < 4.5]
        assert poor == []
    browser.resize(1280, 900)
    assert on_cells[0] == on_cells[1]
    return on_cells[0]


def test_charts_are_readable_on_light_and_on_dark_pages(shown):
    assert check_colors(shown)


def test_nothing_failed_and_nothing_was_loaded(shown):
    assert shown.errors() == []
    assert {url.partition(":")[0] for url in shown.requests()} <= {"file", "data", "blob"}


def test_the_page_of_a_study_has_the_same(browser, study_folder, tmp_path):
    study = study_folder(tmp_path / "ratio", {"r1": 0.0, "r2 <b>": -0.3}, seeds=(0, 1))
    study.write()
    report = write_study_report(study.path, "small", study.costs())
    browser.messages.clear()
    browser.open(report)
    table = "[aria-label='Results of all variants']"
    browser.wait_for("document.querySelector('th button') !== null")
    assert check_colors(browser)
    results = np.array([float(cell.split()[0]) for cell in column(browser, table, 8)])
    browser.run(f'document.querySelector("{table} th:nth-child(8) button").click()')
    after = [float(cell.split()[0]) for cell in column(browser, table, 8)]
    assert after == sorted(results)
    assert after != list(results)
    for width in (1280, 500):
        browser.resize(width, 900)
        assert browser.run(WIDTH) <= width
    assert browser.errors() == []
