"""Fixtures of the report's tests: a run folder to fill, and the parsed page of its report."""

import csv
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.analysis.report import write_report
from segformer_pl.analysis.run import Run


class Page(HTMLParser):
    """Visible text, rows of the tables, and all tags with their attributes."""

    def __init__(self, report):
        super().__init__()
        self.source = report.read_text(encoding="utf-8")
        self.tags = []
        self.rows = []
        self.is_in_row = False
        self.pieces = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append("")
            self.is_in_row = True

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "style":
            return
        self.pieces.append(data)
        if self.is_in_row:
            self.rows[-1] += data

    def handle_endtag(self, tag):
        if tag == "tr":
            self.is_in_row = False

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def row(self, name):
        (row,) = [row.split() for row in self.rows if row.strip().startswith(name)]
        return row[len(name.split()) :]

    def rows_of(self, start):
        return [text for row in self.rows if (text := " ".join(row.split())).startswith(start)]


class RunFolder:
    """A run folder as LightningCLI and CSVLogger write it."""

    def __init__(self, path):
        self.path = path
        self.names = ["road", "Traffic Light", "<b>bold & co</b>", "absent thing"]
        # Confusion matrix of each image: rows label, columns prediction. The third image has no
        # labelled pixel.
        self.matrices = np.zeros((3, 4, 4), np.int64)
        self.matrices[0, :2, :2] = [[80, 20], [5, 15]]
        self.matrices[1, ::2, ::2] = [[90, 10], [10, 30]]

    @property
    def run(self):
        """The run with the files as they are now."""
        return Run(self.path)

    def page(self):
        return Page(write_report(self.run))

    def metrics(self, split, miou, ceiling=None):
        values = {"loss": 0.4321, "miou": miou, "macc": 0.7, "aacc": 0.9}
        if ceiling is not None:
            values["locality_ceiling"] = ceiling
        ious = [0.912, 0.345, 0.678, math.nan]
        values |= {f"iou/{name}": iou for name, iou in zip(self.names, ious)}
        return {f"{split}/{name}": value for name, value in values.items()}

    def plant(self, rows, max_steps=40):
        """Write ``metrics.csv`` with columns sorted by name, and the configuration files."""
        self.path.mkdir(parents=True)
        with (self.path / "metrics.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, sorted({key for row in rows for key in row}))
            writer.writeheader()
            writer.writerows(rows)
        config = {
            "seed_everything": 3,
            "trainer": {"max_steps": max_steps},
            "model": {"network": {"class_path": "segformer_pl.models.segformer_b0"}},
            "data": {"dataset": "<script>alert(1)</script>"},
        }
        (self.path / "config.yaml").write_text(yaml.safe_dump(config))
        palette = [[128, 64, 128], [250, 170, 30], [0, 0, 0], [1, 2, 3]]
        hparams = {"class_names": self.names, "palette": palette}
        (self.path / "hparams.yaml").write_text(yaml.safe_dump(hparams))

    @property
    def config(self):
        return yaml.safe_load((self.path / "config.yaml").read_text())

    @config.setter
    def config(self, config):
        (self.path / "config.yaml").write_text(yaml.safe_dump(config))

    @staticmethod
    def training(steps, lr=True):
        rows = []
        for step in range(steps):
            if lr:
                rows.append({"step": step, "lr-AdamW/encoder": 1e-3, "lr-AdamW/head": 1e-2})
            rows.append({"epoch": 0, "step": step, "train/loss": 2.0 / (step + 1)})
        return rows

    def finished(self, mious, ceiling=None):
        rows = self.training(10 * len(mious))
        for index, miou in enumerate(mious):
            rows.append({"epoch": 0, "step": 10 * index + 9, **self.metrics("val", miou, ceiling)})
        self.plant(rows, max_steps=10 * len(mious))

    def evaluation(self, **changes):
        matrices = changes.pop("matrices", self.matrices)
        counts = [matrices.diagonal(axis1=1, axis2=2), matrices.sum(axis=2), matrices.sum(axis=1)]
        values = {
            "split": "val",
            "step": 0,
            "class_names": self.names,
            "ids": ["first", "second <i>", "blank"],
            "counts": np.stack(counts, axis=-1),
            "loss": np.array([0.5, 1.25, np.nan]),
            "confusion": matrices.sum(axis=0),
            "calibration": np.array([[100, 40.0, 65], [160, 152, 150]]),
        }
        return Evaluation(**(values | changes))

    def evaluated(self, **changes):
        """Write the files of a separate validation or test."""
        evaluation = self.evaluation(**changes)
        self.plant([{"epoch": 0, "step": 0, **self.metrics(evaluation.split, 0.8)}])
        evaluation.save(self.path / "evaluation" / f"{evaluation.split}_step_0000000.npz")


@pytest.fixture
def folder(tmp_path):
    """A run folder that does not exist yet."""
    return RunFolder(tmp_path / "demo" / "version_0")


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """Page of a finished run with evaluation and figures."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "demo" / "version_0")
    folder.finished([0.3, 0.8])
    folder.evaluation(step=20).save(folder.path / "evaluation" / "val_step_0000020.npz")
    (folder.path / "worst").mkdir()
    for step in (10, 20):
        Figure(figsize=(1, 1)).savefig(folder.path / "worst" / f"step_{step:07d}.png")
    return folder.page()
