"""Fixtures of the report's tests: folders of runs and studies to fill, and parsed reports."""

import csv
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from segformer_pl.analysis.configuration import (
    TrainingData,
    settings_digest,
    training_configuration,
)
from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.analysis.report import write_report
from segformer_pl.analysis.run import Run
from tests.browser import start_browser


class Page(HTMLParser):
    """Visible text, rows of the tables, and all tags with their attributes.

    The contents repeat the headings and are not part of the text.
    """

    def __init__(self, report):
        super().__init__()
        self.source = report.read_text(encoding="utf-8")
        self.tags = []
        self.rows = []
        self.is_in_row = self.is_in_contents = False
        self.pieces = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append("")
            self.is_in_row = True
        if tag == "nav":
            self.is_in_contents = True

    def handle_data(self, data):
        if self.is_in_contents or (self.tags and self.tags[-1][0] in ("style", "script")):
            return
        self.pieces.append(data)
        if self.is_in_row:
            self.rows[-1] += data

    def handle_endtag(self, tag):
        if tag == "tr":
            self.is_in_row = False
        if tag == "nav":
            self.is_in_contents = False

    @property
    def links(self):
        """Addresses of the links that leave the page."""
        addresses = [attributes["href"] for attributes in self.all("a")]
        return [address for address in addresses if not address.startswith("#")]

    @property
    def has_foreign_scripts(self):
        """Whether there are scripts other than the page's own, which is part of its file."""
        return self.all("script") != [{"type": "module"}] or self.source.count("<script") != 1

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


@pytest.fixture(scope="session")
def run_folder():
    """Class of a run folder to fill, see RunFolder."""
    return RunFolder


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


class StudyFolder:
    """A simulated ablation study: folders of finished runs without any training.

    The images, their labels and their difficulty are shared by all runs. Variant, class and seed
    shift the share of pixels that are predicted correctly, and so does the pair of variant and
    image, which is the spread over images of a paired difference.

    Args:
        path: Folder of the study.
        effects: Shift of each variant in logits, by name; the first one is the reference.
        seeds: Seeds of every variant.
        class_names: Names of the classes; the last one is in no label and in no prediction if
            ``has_absent_class``.
        layers: Layers whose receptive field was measured.
        evaluations: Shift of each named evaluation in logits, by name.
    """

    budget = "small"
    steps = 60
    data = {"dataset": "shapes", "num_rows": 400, "fingerprint": "0-1"}  # noqa: RUF012

    def __init__(
        self,
        path,
        effects,
        seeds=(0, 1, 2),
        class_names=("road", "sky", "car", "sign"),
        num_images=12,
        layers=("stage1", "stage2", "stage3", "stage4", "head"),
        evaluations=None,
        has_absent_class=False,
    ):
        self.path, self.effects, self.seeds = path, effects, tuple(seeds)
        self.names, self.layers = list(class_names), layers
        self.evaluations = evaluations or {}
        self.num_images, self.has_absent_class = num_images, has_absent_class
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(50, 2000, (num_images, len(self.names)))
        if has_absent_class:
            self.pixels[:, -1] = 0
        self.difficulty = rng.normal(0, 0.6, (num_images, len(self.names)))
        self.difficulty += np.linspace(1.8, -0.4, len(self.names))

    def config(self, variant, seed):
        arguments = {"sr_ratios": [list(self.effects).index(variant) + 1] * 4}
        network = {"class_path": "segformer_pl.models.segformer_b0", "init_args": arguments}
        return {
            "seed_everything": seed,
            "trainer": {"max_steps": self.steps},
            "model": {"network": network},
            "data": {"dataset": "shapes"},
        }

    def folder(self, variant, seed):
        # A variant's name may hold characters that a path may not.
        name = "".join(c if c.isalnum() or c in "-_=+.," else "_" for c in variant)
        return self.path / f"{name}.seed{seed}.{self.budget}.{self.digest(variant)}"

    def digest(self, variant):
        data = TrainingData(**self.data)
        parts = {0: self.config(variant, 0)}
        return settings_digest(training_configuration(parts, data, None))

    def simulate(self, variant, seed, shift=0.0):
        """Return the evaluation of one run."""
        index = list(self.effects).index(variant)
        by_variant = np.random.default_rng([1, index])
        by_seed = np.random.default_rng([2, index, seed])
        shape = self.pixels.shape
        logits = self.difficulty + self.effects[variant] + shift
        logits = logits + by_variant.normal(0, 0.15, shape[1]) * (index > 0)
        logits = logits + by_variant.normal(0, 0.12, shape)
        logits = logits + by_seed.normal(0, 0.05) + by_seed.normal(0, 0.05, shape[1])
        correct = (self.pixels / (1 + np.exp(-logits))).astype(np.int64)
        confusion = np.zeros((shape[1], shape[1]), np.int64)
        counts = np.zeros((*shape, 3), np.int64)
        present = np.flatnonzero(self.pixels.any(axis=0))
        for place, c in enumerate(present):
            mistaken = present[(place + 1) % len(present)]  # wrong pixels go to the next class
            wrong = self.pixels[:, c] - correct[:, c]
            confusion[c, c] += correct[:, c].sum()
            confusion[c, mistaken] += wrong.sum()
            counts[:, c, 0] = correct[:, c]
            counts[:, c, 1] = self.pixels[:, c]
            counts[:, c, 2] += correct[:, c]
            counts[:, mistaken, 2] += wrong
        right, total = confusion.trace(), confusion.sum()
        return Evaluation(
            split="val",
            step=self.steps,
            class_names=self.names,
            ids=[f"image{i:03d}" for i in range(self.num_images)],
            counts=counts,
            loss=np.full(self.num_images, 0.5),
            confusion=confusion,
            calibration=np.array([[total, 0.8 * total, right]]),
        )

    def write_run(self, variant, seed, **changes):
        """Write one finished run; ``changes`` replace entries of ``ablation.json``."""
        folder = self.folder(variant, seed)
        evaluation = self.simulate(variant, seed)
        config = self.config(variant, seed)
        self._write_folder(folder, evaluation, config, self._rows(variant, seed, evaluation.miou))
        for name, shift in self.evaluations.items():
            moved = self.simulate(variant, seed, shift)
            rows = [{"epoch": 0, "step": self.steps - 1, "val/miou": moved.miou}]
            self._write_folder(folder / "evaluations" / name, moved, config, rows)
        (folder / "training_data.json").write_text(json.dumps(self.data))
        arguments = config["model"]["network"]["init_args"]
        is_reference = variant == next(iter(self.effects))
        record = {
            "study": self.path.name,
            "question": "Does a larger reduction ratio cost the classes that need long context?",
            "budget": self.budget,
            "variant": variant,
            "variants": list(self.effects),
            "changes": {}
            if is_reference
            else {f"model.network.init_args.{k}": v for k, v in arguments.items()},
            "reference": next(iter(self.effects)),
            "seed": seed,
            "digest": self.digest(variant),
            "max_steps": self.steps,
            "evaluations": list(self.evaluations),
            "environment": {
                "python": "3.11.7",
                "torch": "2.11.0",
                "lightning": "2.6.6",
                "segformer_pl": "0.1.0",
                "device": "cpu",
                "num_threads": 1,
                "platform": "Linux",
            },
            "transplanted": [],
        }
        (folder / "ablation.json").write_text(json.dumps(record | changes))
        (folder / "report.html").write_text("<!doctype html><title>run</title>")
        return folder

    def write(self):
        for seed in self.seeds:
            for variant in self.effects:
                self.write_run(variant, seed)
        return self.path

    def costs(self):
        """Return costs of all variants, as ``ablate`` measures them."""
        return [
            {
                "variant": variant,
                "parameters": 3_700_000 + 40_000 * index,
                "macs": int(5.2e8 * (1 + 0.35 * index)),
                "paper_macs": int(5.9e8 * (1 + 0.35 * index)),
                "activation_bytes": int(41e6 * (1 + 0.2 * index)),
                "latency_median_ms": 12.5 + 1.7 * index,
                "latency_iqr_ms": 0.8,
                "stages": [
                    {"keys": 64 * (index + 1), "attention_macs": 1_200_000 * (index + 1)}
                    for _ in range(4)
                ],
            }
            for index, variant in enumerate(self.effects)
        ]

    def _rows(self, variant, seed, miou):
        index = list(self.effects).index(variant)
        rng = np.random.default_rng([3, index, seed])
        rows = []
        for step in range(self.steps):
            loss = 0.3 + 1.8 * math.exp(-step / 15) + rng.normal(0, 0.05)
            rows.append({"epoch": 0, "step": step, "train/loss": loss})
            if (step + 1) % (self.steps // 6) == 0:
                progress = 1 - math.exp(-(step + 1) / (self.steps / 4))
                last = step + 1 == self.steps
                row = {"epoch": 0, "step": step, "val/loss": loss}
                noise = 0 if last else rng.normal(0, 0.01)
                row["val/miou"] = miou * (1 if last else progress) + noise
                for depth, layer in enumerate(self.layers):
                    radius = (3 + 4 * depth**1.5) * (1 + 0.04 * index) + rng.normal(0, 0.4)
                    row[f"val/erf/{layer}/radius50"] = radius
                    row[f"val/erf/{layer}/radius95"] = 2.6 * radius
                rows.append(row)
        return rows

    @staticmethod
    def _write_folder(folder, evaluation, config, rows):
        evaluation.save(folder / "evaluation" / f"val_step_{evaluation.step:07d}.npz")
        with (folder / "metrics.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, sorted({key for row in rows for key in row}))
            writer.writeheader()
            writer.writerows(rows)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        hparams = {"class_names": evaluation.class_names}
        (folder / "hparams.yaml").write_text(yaml.safe_dump(hparams))


@pytest.fixture(scope="session")
def study_folder():
    """Class of a simulated study, see StudyFolder."""
    return StudyFolder


@pytest.fixture
def simulate_study(tmp_path):
    """Function (effects, ...) -> StudyFolder whose runs are all written."""

    def make(effects, **settings):
        study = StudyFolder(tmp_path / "ablations" / "reduction_ratio", effects, **settings)
        study.write()
        return study

    return make


@pytest.fixture(scope="session")
def page_class():
    """Class of a parsed page, see Page."""
    return Page


@pytest.fixture
def read_page():
    """Function (file) -> parsed page."""
    return Page


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A browser; the test skips where none is installed."""
    browser = start_browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
