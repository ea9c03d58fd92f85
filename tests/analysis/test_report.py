import csv
import html
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from torch import Tensor, nn

from segformer_pl.analysis.charts import _loss_figure, draw_charts
from segformer_pl.analysis.comparison import miou_interval
from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.analysis.report import summary, write_report
from segformer_pl.analysis.run_history import read_resumptions
from segformer_pl.analysis.run_metrics import Series, read_metrics
from segformer_pl.atomic import WriteError
from segformer_pl.callbacks.report import RunReport

NAMES = ["road", "Traffic Light", "<b>bold & co</b>", "absent thing"]


def scores(split: str, miou: float, ceiling: float | None = None) -> dict[str, float]:
    values = {"loss": 0.4321, "miou": miou, "macc": 0.7, "aacc": 0.9}
    if ceiling is not None:
        values["locality_ceiling"] = ceiling
    ious = [0.912, 0.345, 0.678, math.nan]
    values |= {f"iou/{name}": iou for name, iou in zip(NAMES, ious)}
    return {f"{split}/{name}": value for name, value in values.items()}


def plant(run_dir: Path, rows: list[dict[str, float]], max_steps: int = 40) -> Path:
    """A run folder as LightningCLI and CSVLogger leave it, columns sorted by name."""
    run_dir.mkdir(parents=True)
    with (run_dir / "metrics.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)
    config = {
        "seed_everything": 3,
        "trainer": {"max_steps": max_steps},
        "model": {"network": {"class_path": "segformer_pl.models.segformer_b0"}},
        "data": {"dataset": "<script>alert(1)</script>"},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    palette = [[128, 64, 128], [250, 170, 30], [0, 0, 0], [1, 2, 3]]
    hparams = {"class_names": NAMES, "palette": palette}
    (run_dir / "hparams.yaml").write_text(yaml.safe_dump(hparams))
    return run_dir


def training(steps: int, lr: bool = True) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(steps):
        if lr:
            rows.append({"step": step, "lr-AdamW/encoder": 1e-3, "lr-AdamW/head": 1e-2})
        rows.append({"epoch": 0, "step": step, "train/loss": 2.0 / (step + 1)})
    return rows


def finished(run_dir: Path, mious: list[float], ceiling: float | None = None) -> Path:
    rows = training(10 * len(mious))
    for number, miou in enumerate(mious):
        rows.append({"epoch": 0, "step": 10 * number + 9, **scores("val", miou, ceiling)})
    return plant(run_dir, rows, max_steps=10 * len(mious))


# Confusion of each picture, rows label, columns prediction; the third has no labelled pixel.
PICTURES = np.zeros((3, 4, 4), np.int64)
PICTURES[0, :2, :2] = [[80, 20], [5, 15]]
PICTURES[1, ::2, ::2] = [[90, 10], [10, 30]]


def evaluation(**changes: Any) -> Evaluation:
    matrices = changes.pop("matrices", PICTURES)
    counts = [matrices.diagonal(axis1=1, axis2=2), matrices.sum(axis=2), matrices.sum(axis=1)]
    values: dict[str, Any] = {
        "split": "val",
        "step": 0,
        "class_names": NAMES,
        "ids": ["first", "second <i>", "blank"],
        "counts": np.stack(counts, axis=-1),
        "loss": np.array([0.5, 1.25, np.nan]),
        "confusion": matrices.sum(axis=0),
        "calibration": np.array([[100, 40.0, 65], [160, 152, 150]]),
    }
    return Evaluation(**(values | changes))


def evaluated(run_dir: Path, **changes: Any) -> Path:
    """A pass of its own, and the evaluation that it leaves."""
    record = evaluation(**changes)
    plant(run_dir, [{"epoch": 0, "step": 0, **scores(record.split, 0.8)}])
    record.save(run_dir / "evaluation" / f"{record.split}_step_0000000.npz")
    return run_dir


class Page(HTMLParser):
    """The text a reader sees, the rows of the tables, and every tag with its attributes."""

    def __init__(self, report: Path) -> None:
        super().__init__()
        self.source = report.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[str] = []
        self.is_in_row = False
        self.pieces: list[str] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append("")
            self.is_in_row = True

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "style":
            return
        self.pieces.append(data)
        if self.is_in_row:
            self.rows[-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self.is_in_row = False

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def row(self, name: str) -> list[str]:
        (row,) = [row.split() for row in self.rows if row.strip().startswith(name)]
        return row[len(name.split()) :]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "demo" / "version_0"


def test_finished_run(run_dir: Path) -> None:
    finished(run_dir, [0.3, 0.8312, 0.7954])
    report = write_report(run_dir)
    page = Page(report)
    assert report == run_dir / "report.html"
    assert "demo/version_0" in page.text
    assert "79.5 % last, at step 30 best 83.1 % at step 20" in page.text
    assert "mAcc 70.0 %" in page.text
    assert "aAcc 90.0 %" in page.text
    assert "val loss 0.432" in page.text
    assert "steps trained 30 of 30" in page.text
    assert "not finished" not in page.text
    assert summary(run_dir) == "mIoU 79.5 % (best 83.1 % at step 20)"


def test_nothing_is_loaded_from_elsewhere(run_dir: Path) -> None:
    finished(run_dir, [0.3, 0.8])
    page = Page(write_report(run_dir))
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("iframe")
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), (tag, name, target)
    assert "@import" not in page.source
    assert not re.search(r"url\((?!#)", page.source)


def test_charts_are_inline_with_units(run_dir: Path) -> None:
    finished(run_dir, [0.3, 0.8], ceiling=0.7778)
    page = Page(write_report(run_dir))
    assert len(page.all("svg")) == 2
    for label in ("training step", "validation mIoU (%)", "learning rate", "encoder", "head"):
        assert label in page.text
    assert re.search(r"loss \(nats", page.text)
    assert "locality ceiling 77.8 %" in page.text


@pytest.mark.parametrize(
    ("miou", "verdict", "points"),
    [(0.8312, "above", "+5.3"), (0.5, "not above", "\u221227.8"), (0.7778, "not above", "+0.0")],
)
def test_ceiling_verdict(run_dir: Path, miou: float, verdict: str, points: str) -> None:
    finished(run_dir, [0.9, miou], ceiling=0.7778)  # it is the last that counts, not the best
    page = Page(write_report(run_dir))
    assert f"is {verdict} the locality ceiling of 77.8 %" in page.text
    assert f"({points} points)" in page.text
    assert summary(run_dir) == (
        f"mIoU {100 * miou:.1f} % (locality ceiling 77.8 %, best 90.0 % at step 10)"
    )


def test_no_ceiling_no_verdict(run_dir: Path) -> None:
    finished(run_dir, [0.3])
    assert "ceiling" not in Page(write_report(run_dir)).text


def test_classes_in_order_escaped_and_absent(run_dir: Path) -> None:
    finished(run_dir, [0.3, 0.6])
    page = Page(write_report(run_dir))
    listed = [row.strip() for row in page.rows if row.strip().startswith(tuple(NAMES))]
    assert [name for row in listed for name in NAMES if row.startswith(name)] == NAMES
    assert page.row("road") == ["91.2", "%", "highest"]
    assert page.row("Traffic Light") == ["34.5", "%", "lowest"]
    assert page.row("absent thing") == ["absent"]
    assert html.escape(NAMES[2]) in page.source
    assert NAMES[2] not in page.source
    assert "<script>" not in page.source
    assert "background:#804080" in page.source


def test_classes_without_hparams(run_dir: Path) -> None:
    finished(run_dir, [0.6])
    (run_dir / "hparams.yaml").write_text("network: !!python/object:torch.nn.Linear {}\n")
    page = Page(write_report(run_dir))
    assert page.row("road")[:2] == ["91.2", "%"]


def test_before_the_first_validation(run_dir: Path) -> None:
    plant(run_dir, training(7), max_steps=40)
    page = Page(write_report(run_dir))
    assert "No validation has run yet" in page.text
    assert "steps trained 7 of 40: not finished" in page.text
    assert "mIoU" not in page.text
    assert len(page.all("svg")) == 1
    assert summary(run_dir) == ""


def test_training_loss_that_became_nan(run_dir: Path) -> None:
    rows = training(9, lr=False)
    rows[5]["train/loss"] = math.nan
    page = Page(write_report(plant(run_dir, rows)))
    assert "not finite, first at step 6" in page.text


def test_test_pass_only(run_dir: Path) -> None:
    plant(run_dir, [{"epoch": 0, "step": 0, **scores("test", 0.6421, 0.6)}])
    page = Page(write_report(run_dir))
    assert "mIoU 64.2 %" in page.text
    assert "test loss 0.432" in page.text
    assert "test mIoU 64.2 % is above the locality ceiling of 60.0 %" in page.text
    assert page.row("Traffic Light")[:2] == ["34.5", "%"]
    assert not page.all("svg")
    assert "steps trained" not in page.text
    assert "at step" not in page.text
    assert "No validation" not in page.text
    assert summary(run_dir) == "test mIoU 64.2 % (locality ceiling 60.0 %)"


def test_validation_pass_only(run_dir: Path) -> None:
    plant(run_dir, [{"epoch": 0, "step": 0, **scores("val", 0.6421)}])
    page = Page(write_report(run_dir))
    assert "mIoU 64.2 %" in page.text
    assert not page.all("svg")
    assert "steps trained" not in page.text
    assert "at step" not in page.text


def test_last_figures_are_shown_and_first_ones_folded(run_dir: Path) -> None:
    finished(run_dir, [0.3, 0.8])
    for folder, steps in {"erf": [20], "predictions": [10, 15, 20]}.items():
        (run_dir / folder).mkdir()
        for step in steps:
            Figure(figsize=(1, 1)).savefig(run_dir / folder / f"step_{step:07d}.png")
    page = Page(write_report(run_dir))
    images = page.all("img")
    assert [image["alt"] for image in images] == [
        "Predictions at step 20",
        "Predictions at step 10",
        "Effective receptive field at step 20",
    ]
    assert all((image["src"] or "").startswith("data:image/png;base64,iVBOR") for image in images)
    assert page.text.count("How it began") == 1
    opened = [index for index, (tag, _) in enumerate(page.tags) if tag == "details"]
    placed = [index for index, (tag, _) in enumerate(page.tags) if tag == "img"]
    assert placed[0] < opened[0] < placed[1]
    assert all("open" not in attributes for attributes in page.all("details"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Of a finished run with all that it leaves after validation."""
    run_dir = finished(tmp_path_factory.mktemp("runs") / "demo" / "version_0", [0.3, 0.8])
    evaluation(step=20).save(run_dir / "evaluation" / "val_step_0000020.npz")
    (run_dir / "worst").mkdir()
    for step in (10, 20):
        Figure(figsize=(1, 1)).savefig(run_dir / "worst" / f"step_{step:07d}.png")
    return Page(write_report(run_dir))


def rows_of(page: Page, start: str) -> list[str]:
    return [text for row in page.rows if (text := " ".join(row.split())).startswith(start)]


def test_tiles_of_what_was_logged(run_dir: Path) -> None:
    values = {"fwiou": 0.8772, "boundary_iou": 0.4321, "ece": 0.01234}
    logged = {f"{split}/{name}": x for split in ("val", "test") for name, x in values.items()}
    plant(run_dir, [{"step": 0, **scores("val", 0.6), **scores("test", 0.5), **logged}])
    page = Page(write_report(run_dir))
    for tile in ("fwIoU 87.7 %", "boundary IoU 43.2 %", "ECE 1.23 %"):
        assert page.text.count(tile) == 2, tile
    old = Page(write_report(finished(run_dir.parent / "old", [0.6])))
    assert not any(name in old.text for name in ("fwIoU", "boundary IoU", "ECE"))


def test_interval_of_miou(page: Page) -> None:
    low, high = miou_interval(evaluation())
    assert low < high
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    assert f"{interval} by the choice of the 3 pictures" in page.text


def test_one_picture_has_no_interval(run_dir: Path) -> None:
    evaluated(run_dir, matrices=PICTURES[:1], ids=["only"], loss=np.array([0.5]))
    page = Page(write_report(run_dir))
    assert "95 %" not in page.text
    assert "nan" not in page.text
    assert rows_of(page, "only") == ["only 0.500 56.8 %"]


def test_accuracy_and_pixels_of_each_class(page: Page) -> None:
    assert "road 91.2 % 85.0 % 76.92 % highest" in rows_of(page, "road")
    assert "Traffic Light 34.5 % 75.0 % 7.69 % lowest" in rows_of(page, "Traffic Light")
    assert rows_of(page, "absent thing") == ["absent thing absent"]


def test_most_common_confusions_by_pixels(page: Page) -> None:
    (start,) = [n for n, row in enumerate(page.rows) if "taken for" in row][:1]
    # In two columns: two rows, a second head, two rows.
    assert [" ".join(row.split()) for row in page.rows[start + 1 : start + 6]] == [
        "road Traffic Light 10.00 % 20",
        "road <b>bold & co</b> 5.00 % 10",
        "label taken for of its pixels pixels",
        "<b>bold & co</b> road 25.00 % 10",
        "Traffic Light road 25.00 % 5",
    ]


def test_confusion_matrix_in_percent_of_the_label(page: Page) -> None:
    start, end = page.text.index("Confusion matrix"), page.text.index("Expected calibration")
    matrix = page.text[start:end].split()
    for value in ("85", "10", "5.0", "25", "75", "0"):
        assert value in matrix
    assert matrix.count("25") == matrix.count("75") == 2
    assert "share of the label's pixels (%)" in page.text
    assert NAMES[2] not in page.source


@pytest.mark.parametrize(("num_classes", "has_matrix"), [(36, True), (37, False)])
def test_many_classes(run_dir: Path, num_classes: int, has_matrix: bool) -> None:
    names = [f"class ${number}" for number in range(num_classes)]  # not mathematics
    matrices = np.ones((3, num_classes, num_classes), np.int64)
    matrices[:, 5, 7] = 1000
    evaluated(run_dir, class_names=names, matrices=matrices)
    page = Page(write_report(run_dir))
    assert ("Confusion matrix" in page.text) == has_matrix
    assert len(page.all("svg")) == 1 + has_matrix
    assert any(row.startswith("class $5 class $7 ") for row in rows_of(page, "class"))


def test_calibration(page: Page) -> None:
    # (|40 - 65| + |152 - 150|) / 260; 192 / 260; 215 / 260
    assert "Expected calibration error 10.38 % ." in page.text
    assert "confidence 73.85 %, accuracy 82.69 %: underconfident by 8.85 points" in page.text
    for label in ("confidence (%)", "accuracy (%)", "pixels (%, log)", "calibrated"):
        assert label in page.text


def test_worst_pictures(page: Page) -> None:
    # (90 / 110 + 30 / 50) / 2 and (80 / 105 + 15 / 40) / 2
    wanted = ["second <i> 1.250 70.9 %", "first 0.500 56.8 %"]
    assert [row for name in ("second", "first") for row in rows_of(page, name)] == wanted
    assert page.text.index("second <i>") < page.text.index("first 0.500")
    assert rows_of(page, "blank") == []
    assert "second <i>" not in page.source
    assert [image["alt"] for image in page.all("img")] == [
        "Pictures with the highest loss at step 20",
        "Pictures with the highest loss at step 10",
    ]


def test_only_the_ten_worst(run_dir: Path) -> None:
    ids = [f"picture{number:02d}" for number in range(13)]
    evaluated(run_dir, matrices=PICTURES[[0] * 13], ids=ids, loss=np.arange(13.0))
    rows = rows_of(Page(write_report(run_dir)), "picture")
    listed = [row.split()[0] for row in rows if row[7].isdigit()]
    assert listed == [f"picture{number:02d}" for number in range(12, 2, -1)]


def test_evaluation_of_another_step_or_split_is_not_shown(run_dir: Path) -> None:
    finished(run_dir, [0.3, 0.8])
    evaluation(step=10).save(run_dir / "evaluation" / "val_step_0000010.npz")
    evaluation(split="test").save(run_dir / "evaluation" / "test_step_0000020.npz")
    page = Page(write_report(run_dir))
    assert "Calibration" not in page.text
    assert "95 % interval" not in page.text


def test_evaluation_of_a_test_pass(run_dir: Path) -> None:
    page = Page(write_report(evaluated(run_dir, split="test")))
    assert "by the choice of the 3 pictures" in page.text
    assert len(page.all("svg")) == 2
    assert rows_of(page, "second") == ["second <i> 1.250 70.9 %"]


def test_nothing_labelled(run_dir: Path) -> None:
    nothing = {"matrices": 0 * PICTURES, "loss": np.full(3, np.nan)}
    page = Page(write_report(evaluated(run_dir, **nothing, calibration=np.zeros((15, 3)))))
    assert not page.all("svg")
    assert "mIoU 80.0 %" in page.text


def test_damaged_evaluation_is_named_and_the_rest_shown(run_dir: Path) -> None:
    evaluated(run_dir)
    (run_dir / "evaluation" / "val_step_0000000.npz").write_bytes(b"PK cut short")
    page = Page(write_report(run_dir))
    assert re.search(r"Left out .*val_step_0000000\.npz' is no evaluation .*damaged", page.text)
    assert "mIoU 80.0 %" in page.text


def test_headers_have_a_scope_and_nothing_comes_from_elsewhere(page: Page) -> None:
    assert {header["scope"] for header in page.all("th")} == {"col", "row"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), (tag, name, target)


def test_departures_from_the_recipe(run_dir: Path) -> None:
    finished(run_dir, [0.6])
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["model"] |= {"lr": 0.003, "weight_decay": 0.01}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    page = Page(write_report(run_dir))
    assert "The paper does not have the data set <script>alert(1)</script>" in page.text
    assert page.row("model.lr") == ["6e-05", "0.003", "reference,", "local_configs/segformer"]
    assert rows_of(page, "model.weight_decay") == []
    assert "The reference trains unseeded" in page.text
    summaries = [n for n, (tag, _) in enumerate(page.tags) if tag == "summary"]
    assert page.text.index("What no setting changes") < page.text.index("trains unseeded")
    assert len(summaries) == 2  # the remarks, the configuration


def test_without_configuration_there_is_nothing_to_compare(run_dir: Path) -> None:
    (finished(run_dir, [0.6]) / "config.yaml").unlink()
    assert "recipe" not in Page(write_report(run_dir)).text


def part(name: str) -> dict[str, Any]:
    return {"class_path": f"segformer_pl.losses.{name}"}


PARTS = {"losses": [part("CrossEntropy"), part("Dice")], "weights": [1.0, 0.5]}


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (part("Dice"), "Dice"),
        (part("WeightedSum") | {"init_args": PARTS}, "1 CrossEntropy + 0.5 Dice"),
    ],
)
def test_training_loss_that_is_not_cross_entropy(
    run_dir: Path, loss: dict[str, Any], name: str
) -> None:
    finished(run_dir, [0.6])
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["model"]["loss"] = loss
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    page = Page(write_report(run_dir))
    assert f"train: {name}" in page.text
    assert "validation: cross-entropy (nats)" in page.text
    assert "val loss 0.432 cross-entropy, mean over labelled pixels, nats" in page.text
    assert not re.search(r"\bloss \(nats", page.text)


@pytest.mark.parametrize("loss", [None, part("CrossEntropy")])
def test_loss_of_the_paper_needs_no_name(run_dir: Path, loss: dict[str, Any] | None) -> None:
    plant(run_dir, training(7))
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["model"]["loss"] = loss
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    page = Page(write_report(run_dir))
    assert "CrossEntropy, the loss that is trained" in page.text
    assert "train:" not in page.text


def test_repeated_steps_and_a_row_cut_short(run_dir: Path) -> None:
    rows = [*training(5, lr=False), {"epoch": 0, "step": 2, "train/loss": 7.0}]
    plant(run_dir, rows)
    with (run_dir / "metrics.csv").open("a") as stream:
        stream.write("0,5")
    loss = read_metrics(run_dir)["train/loss"]
    assert loss.step.tolist() == [1, 2, 3, 4, 5]
    assert loss.value[2] == 7.0


def test_cell_that_is_no_number(run_dir: Path) -> None:
    plant(run_dir, training(2, lr=False))
    with (run_dir / "metrics.csv").open("a") as stream:
        stream.write("0,2,oops\n")
    with pytest.raises(ValueError, match=r"metrics\.csv, line 4: expected numbers"):
        write_report(run_dir)


def test_a_curve_of_one_point_is_seen() -> None:
    one = Series(np.array([40]), np.array([1.5]))
    columns = {"train/loss": one, "lr-AdamW/encoder": one}
    for axes in _loss_figure(columns, "CrossEntropy").axes:
        assert all(line.get_marker() == "o" for line in axes.lines)
    (chart,) = draw_charts(columns | {"train/loss": Series(np.arange(1, 9), np.ones(8))}, "Dice")
    assert "<svg" in chart["svg"]


def test_resumptions_are_marked_and_their_changes_listed(run_dir: Path) -> None:
    finished(run_dir, [0.3, 0.8])
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["trainer"]["max_steps"] = 90
    config["ckpt_path"] = "last.ckpt"
    for step in (8, 15):
        resumed = run_dir / f"config_resumed_at_step_{step:07d}.yaml"
        resumed.write_text(yaml.safe_dump(config))
    page = Page(write_report(run_dir))
    assert page.text.count("dotted: resumed at 8, 15") == 2
    assert page.row("8") == ["trainer.max_steps", "20", "90"]
    assert page.row("15") == ["no", "setting", "changed"]
    assert "steps trained 20 of 90: not finished" in page.text


def test_changes_of_callbacks_are_single_settings(run_dir: Path) -> None:
    finished(run_dir, [0.3])
    config = yaml.safe_load((run_dir / "config.yaml").read_text())

    def callback(name: str, **arguments: Any) -> dict[str, Any]:
        return {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": arguments}

    ema = {"device": None, "decay": 0.99, "note": "x" * 500}
    config["trainer"]["callbacks"] = [callback("EMAWeightAveraging", **ema)]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    config["trainer"]["callbacks"] = [
        callback("LearningRateMonitor", logging_interval=None, log_momentum=False),
        callback("EMAWeightAveraging", **ema | {"decay": 0.9, "note": "y" * 500}),
    ]
    (run_dir / "config_resumed_at_step_0000008.yaml").write_text(yaml.safe_dump(config))
    changes = read_resumptions(run_dir)[0].changes
    assert list(changes) == [
        "trainer.callbacks.EMAWeightAveraging.decay",
        "trainer.callbacks.EMAWeightAveraging.note",
        "trainer.callbacks.LearningRateMonitor",
    ]
    page = Page(write_report(run_dir))
    assert "EMAWeightAveraging.decay 0.99 0.9" in page.text
    assert "x" * 50 not in page.text.split("config.yaml")[0]


def test_what_was_said_at_the_start_stands_in_the_report(run_dir: Path) -> None:
    finished(run_dir, [0.3])
    (run_dir / "findings.json").write_text('["warm-up is <b>long</b>"]')
    assert "Said when training started: warm-up is <b>long</b>." in Page(write_report(run_dir)).text


def test_missing_folder_and_missing_metrics(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run folder .*nowhere"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no metrics\.csv in .*CSVLogger"):
        write_report(tmp_path)


class TinyTask(pl.LightningModule):
    """Logs what the segmentation task logs; fails in training step ``fail_at``."""

    def __init__(self, fail_at: int = -1, failure: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.fail_at = fail_at
        self.failure = failure

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step == self.fail_at:
            raise self.failure("the run's own failure")
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log_dict(scores("val", 0.8312, 0.7778))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log_dict(scores("test", 0.5))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data() -> torch.utils.data.DataLoader[Tensor]:
    return torch.utils.data.DataLoader(torch.ones(4, 4), batch_size=1)  # type: ignore[arg-type]


def trainer(tmp_path: Path, **arguments: Any) -> pl.Trainer:
    arguments = {
        "accelerator": "cpu",
        "max_steps": 2,
        "val_check_interval": 2,
        "log_every_n_steps": 1,
        "logger": CSVLogger(tmp_path, name="demo"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "callbacks": [RunReport()],
    } | arguments
    return pl.Trainer(**arguments)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("segformer_pl.callbacks.report.rank_zero_info", lines.append)
    return lines


def test_fit_writes_a_report(tmp_path: Path, said: list[str]) -> None:
    trainer(tmp_path).fit(TinyTask(), data(), data())
    report = tmp_path / "demo" / "version_0" / "report.html"
    page = Page(report)
    assert "last, at step 2" in page.text  # not 1, which is what Lightning writes into the file
    assert "steps trained 2" in page.text
    assert said == [f"mIoU 83.1 % (locality ceiling 77.8 %)   report: {report}"]


def test_validate_and_test_write_a_report(tmp_path: Path, said: list[str]) -> None:
    trainer(tmp_path).validate(TinyTask(), data(), verbose=False)
    trainer(tmp_path).test(TinyTask(), data(), verbose=False)
    assert "mIoU 83.1 %" in Page(tmp_path / "demo" / "version_0" / "report.html").text
    assert "mIoU 50.0 %" in Page(tmp_path / "demo" / "version_1" / "report.html").text
    assert [line.split("   ")[0] for line in said] == [
        "mIoU 83.1 % (locality ceiling 77.8 %)",
        "test mIoU 50.0 %",
    ]


def test_without_a_report_the_advice_is_that_of_the_command(
    tmp_path: Path, said: list[str]
) -> None:
    none = {"limit_val_batches": 0, "limit_test_batches": 0, "log_every_n_steps": 50}
    trainer(tmp_path, **none).validate(TinyTask(), data(), verbose=False)
    trainer(tmp_path, **none).test(TinyTask(), data(), verbose=False)
    trainer(tmp_path, **none).fit(TinyTask(), data())
    assert [line.split("; ")[1].split(", with")[0] for line in said] == [
        "score at least one batch (trainer.limit_val_batches)",
        "score at least one batch (trainer.limit_test_batches)",
        "train for at least trainer.log_every_n_steps steps",
    ]


def test_failing_run_keeps_its_report_and_its_exception(tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(RuntimeError, match="the run's own failure"):
        trainer(tmp_path, max_steps=4).fit(TinyTask(fail_at=3), data(), data())
    report = tmp_path / "demo" / "version_0" / "report.html"
    assert "steps trained 3" in Page(report).text
    assert len(said) == 1


def test_interrupted_run_leaves_a_report(tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(SystemExit):
        trainer(tmp_path).fit(TinyTask(fail_at=1, failure=KeyboardInterrupt), data(), data())
    assert "No validation" in Page(tmp_path / "demo" / "version_0" / "report.html").text


def test_failure_of_the_report_does_not_hide_the_failure_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run_dir: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr("segformer_pl.callbacks.report.write_report", broken)
    with (
        pytest.warns(UserWarning, match="report could not be written: disk full"),
        pytest.raises(RuntimeError, match="the run's own failure"),
    ):
        trainer(tmp_path).fit(TinyTask(fail_at=1), data(), data())


def test_failure_before_the_first_value_is_left_to_speak(tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(RuntimeError, match="the run's own failure"):
        trainer(tmp_path).fit(TinyTask(fail_at=0), data(), data())
    assert list(tmp_path.rglob("report.html")) == []
    assert said == []


def test_without_csv_logger_the_run_goes_on(tmp_path: Path, said: list[str]) -> None:
    trainer(tmp_path, logger=False, default_root_dir=tmp_path).fit(TinyTask(), data(), data())
    assert not (tmp_path / "report.html").exists()
    assert len(said) == 1
    assert "nothing was logged to" in said[0]
    assert "with a CSVLogger as the first logger" in said[0]


def test_a_report_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run_dir: Path) -> Path:
        raise WriteError("cannot write 'report.html': disk full")

    monkeypatch.setattr("segformer_pl.callbacks.report.write_report", broken)
    with pytest.warns(UserWarning, match="report could not be written: cannot write"):
        trainer(tmp_path).fit(TinyTask(), data(), data())


def test_fast_dev_run_leaves_nothing(tmp_path: Path, said: list[str]) -> None:
    trainer(tmp_path, fast_dev_run=True, default_root_dir=tmp_path).fit(TinyTask(), data(), data())
    assert said == []
    assert list(tmp_path.iterdir()) == []
