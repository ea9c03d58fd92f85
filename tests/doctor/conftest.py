"""Fixtures of the tests of the doctor: sound rows, their examination, planted faults."""

import re

import lightning.pytorch as pl
import numpy as np
import pytest
import yaml

from segformer_pl.data import StreamingSegmentationData
from segformer_pl.doctor import examine
from segformer_pl.models import MixTransformer, SegFormer
from segformer_pl.task import SegmentationTask

NAMES = ["road", "car", "tree"]


@pytest.fixture
def healthy(tmp_path, png):
    """Rows of both splits, with every class and some unlabelled pixels."""
    rng = np.random.default_rng(0)

    def row(split, number):
        blocks = rng.choice([0, 1, 2, 255], (6, 8), p=[0.4, 0.3, 0.25, 0.05])
        label = np.kron(blocks, np.ones((8, 8))).astype(np.uint8)
        image = rng.integers(0, 256, (48, 64, 3), np.uint8)
        return {"image": png(image), "label": png(label), "id": f"{split}{number}"}

    counts = {"train": 60, "validation": 50}
    return {split: [row(split, i) for i in range(n)] for split, n in counts.items()}


def network(num_classes=3):
    encoder = MixTransformer(
        embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)
    )
    return SegFormer(encoder, num_classes, decoder_dim=16)


@pytest.fixture
def visit(tmp_path, healthy, write_shards):
    """Function (rows, settings ...) -> the doctor's examination of them."""

    def run(rows=healthy, data=(), model=(), trainer=(), spec=(), break_folder=None):
        folder = tmp_path / "set"
        for split, cells in rows.items():
            write_shards(folder, split, [cells], row_group_size=10)
        if break_folder:
            break_folder(folder)
        description = {
            "image_column": "image",
            "label_column": "label",
            "id_column": "id",
            "labels": {"names": NAMES, "ignored": [255]},
        } | dict(spec)
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(description))
        module = StreamingSegmentationData(
            str(file),
            folder,
            **{"batch_size": 4, "num_workers": 1, "crop_size": (32, 32)} | dict(data),
        )
        task = SegmentationTask(
            network(),
            class_names=NAMES,
            palette=[list(color) for color in module.entry.labels.colors],
            **{"lr": 1e-3, "warmup_steps": 5} | dict(model),
        )
        settings = {"max_steps": 50, "val_check_interval": 10, "max_epochs": -1} | dict(trainer)
        runner = pl.Trainer(
            accelerator="cpu",
            check_val_every_n_epoch=None,
            logger=False,
            enable_checkpointing=False,
            **settings,
        )
        return examine(task, module, runner)

    return run


@pytest.fixture
def check_fault(visit, healthy):
    """Function (how a fault is planted, pattern) that expects a finding of that pattern."""

    def check(planted, expected):
        if "rows" in planted:
            planted["rows"](healthy)
        examination = visit(
            break_folder=planted.get("folder"),
            **{key: value for key, value in planted.items() if key not in ("rows", "folder")},
        )
        findings = [f"{one.level} {one.check} {one.message}" for one in examination.findings]
        assert any(re.match(expected, line) for line in findings), findings
        assert examination.has_errors == any(line.startswith("error") for line in findings)

    return check
