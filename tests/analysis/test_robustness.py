"""The paper's Table 5 from a results file: means by hand, layout, figure."""

import dataclasses

import numpy as np
import pytest

from segformer_pl.analysis.robustness import (
    CLEAN,
    Score,
    as_dict,
    markdown,
    plot,
    read_scores,
    summarize,
    write_scores,
)

NAMES = {
    "blur": ("motion_blur", "defocus_blur", "glass_blur", "gaussian_blur"),
    "noise": ("gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"),
    "digital": ("brightness", "contrast", "saturate", "jpeg_compression"),
    "weather": ("snow", "spatter", "fog", "frost"),
}
# SegFormer-B5 of the paper's Table 5, in percent.
PUBLISHED = {
    "blur": (69.1, 68.6, 64.1, 69.8),
    "noise": (57.8, 63.4, 52.3, 72.8),
    "digital": (81.0, 77.7, 80.1, 58.8),
    "weather": (40.7, 68.4, 78.5, 49.9),
}


def score(group, corruption, severity, miou):
    return Score(group, corruption, severity, miou, 500, "cityscapes", "f1", "c1")


def published():
    """Severities spread about each published mean, so that only their mean equals it."""
    scores = [score(CLEAN, CLEAN, 0, 0.824)]
    for group, names in NAMES.items():
        count = 3 if group == "noise" else 5
        for name, percent in zip(names, PUBLISHED[group]):
            spread = 0.02 * (np.arange(count) - count // 2)
            scores += [
                score(group, name, severity, percent / 100 - float(lower))
                for severity, lower in enumerate(spread, 1)
            ]
    return scores


def test_means_equal_the_published_row():
    robustness = summarize(published())
    for group, names in NAMES.items():
        assert list(robustness.corruptions[group]) == list(names)
        assert [*robustness.corruptions[group].values()] == pytest.approx(
            [percent / 100 for percent in PUBLISHED[group]]
        )
    # Means of the published row.
    rounded = {group: round(100 * mean, 1) for group, mean in robustness.groups.items()}
    assert rounded == {"blur": 67.9, "noise": 61.6, "digital": 74.4, "weather": 59.4}
    assert round(100 * robustness.mean, 1) == 65.8


def test_corruptions_have_equal_weight():
    # In a mean over all 72 settings, noise would have 12 and the other groups 60.
    scores = [
        score(group, name, severity, 0.2 if group == "noise" else 0.6)
        for group, names in NAMES.items()
        for name in names
        for severity in range(1, 4 if group == "noise" else 6)
    ]
    assert summarize([score(CLEAN, CLEAN, 0, 1.0), *scores]).mean == pytest.approx(0.5)


def test_markdown_page():
    lines = markdown(summarize(published())).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    header, row = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in (tables[0], tables[2])
    )
    assert header == ["clean", *(n.replace("_", " ") for names in NAMES.values() for n in names)]
    assert [float(cell) for cell in row] == [82.4, *(p for ps in PUBLISHED.values() for p in ps)]
    assert tables[3] == "| clean | blur | noise | digital | weather | all 16 | of clean |"
    assert tables[5] == "| 82.4 | 67.9 | 61.6 | 74.4 | 59.4 | 65.8 | 79.9 % |"
    assert tables[6] == "|  | 1 | 2 | 3 | 4 | 5 |"
    assert "| shot noise | 54.3 | 52.3 | 50.3 |  |  |" in tables
    assert "| fog | 82.5 | 80.5 | 78.5 | 76.5 | 74.5 |" in tables
    notes = "\n".join(line for line in lines if line.startswith("- "))
    assert "UNVERIFIED" in notes
    assert "Frost" in notes
    assert {line.count("|") for line in tables[:3]} == {18}


def test_as_dict():
    numbers = as_dict(summarize(published()))
    assert numbers["clean"] == 0.824
    assert numbers["num_images"] == 500
    assert numbers["checkpoint"] == "c1"
    assert numbers["severities"]["noise"]["shot_noise"][2] == pytest.approx(0.523)
    assert "severity" not in numbers


def test_round_trip(tmp_path):
    file = tmp_path / "robustness.csv"
    assert read_scores(file) == []
    scores = [*published(), score("blur", "motion_blur", 5, float(np.float32(0.1)) / 3)]
    write_scores(file, scores)
    assert read_scores(file) == scores
    assert [f.name for f in tmp_path.iterdir()] == ["robustness.csv"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("motion_blur,1,", "motion_blur,one,", 1),
        lambda text: text[:-40],
        lambda text: text.replace("miou", "iou"),
        lambda text: "some other file\n1\n",
    ],
)
def test_damaged_file_is_refused(tmp_path, damage):
    file = tmp_path / "robustness.csv"
    write_scores(file, published())
    file.write_text(damage(file.read_text()))
    with pytest.raises(
        ValueError, match=r"line \d+: not a row of robustness results .*; remove the file"
    ):
        read_scores(file)


def test_table_needs_clean_and_corrupted_results():
    scores = published()
    for part in (scores[1:], scores[:1], []):
        with pytest.raises(ValueError, match="needs the clean mIoU and at least one corruption"):
            summarize(part)


@pytest.mark.slow
def test_figure_shows_every_number(tmp_path):
    figure = plot(summarize(published()))
    bars, *panels = [axes for part in figure.subfigs for axes in part.axes]
    heights = [round(patch.get_height(), 1) for patch in bars.patches]
    assert heights == [p for ps in PUBLISHED.values() for p in ps]
    assert [panel.get_title(loc="left") for panel in panels] == list(NAMES)
    for panel, group in zip(panels, NAMES):
        assert len(panel.lines) == 4
        for line, percent in zip(panel.lines, PUBLISHED[group]):
            severities, values = line.get_data()
            assert list(severities) == list(range(4 if group == "noise" else 6))
            assert values[0] == pytest.approx(82.4)
            assert np.mean(values[1:]) == pytest.approx(percent)
        assert panel.get_xlabel() == "severity (0: clean)"
    assert "(%)" in bars.get_ylabel()
    figure.savefig(tmp_path / "figure.png")


@pytest.mark.slow
def test_table_and_figure_without_a_labelled_pixel(tmp_path):
    scores = [dataclasses.replace(s, miou=float("nan")) for s in published()]
    robustness = summarize(scores)
    plot(robustness).savefig(tmp_path / "figure.png")
    assert "| nan | nan |" in markdown(robustness)
    assert "| – |" in markdown(robustness)


@pytest.mark.parametrize(("factor", "is_given"), [(0.0, False), (0.0121, False), (0.0122, True)])
def test_no_ratio_to_a_clean_miou_below_one_percent(factor, is_given):
    """The published clean mIoU is 82.4 %; times 0.0121 that is 0.997 %."""
    text = markdown(summarize([dataclasses.replace(s, miou=factor * s.miou) for s in published()]))
    lines = text.splitlines()
    row = next(lines[n + 2] for n, line in enumerate(lines) if line.endswith("| of clean |"))
    assert row.endswith("| 79.9 % |" if is_given else "| – |")
    assert ("- Of clean: not given, because the clean mIoU is below 1 %" in text) != is_given
    assert "nan" not in text
