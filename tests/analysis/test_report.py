import csv
import html
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from torch import Tensor, nn

from segformer_pl.analysis.report import summary, write_report
from segformer_pl.analysis.run_metrics import read_metrics
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


def test_fast_dev_run_leaves_nothing(tmp_path: Path, said: list[str]) -> None:
    trainer(tmp_path, fast_dev_run=True, default_root_dir=tmp_path).fit(TinyTask(), data(), data())
    assert said == []
    assert list(tmp_path.iterdir()) == []
