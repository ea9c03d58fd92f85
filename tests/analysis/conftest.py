"""Evaluations, and run folders of studies as `ablate` and `fit` leave them behind."""

import json

import numpy as np
import pytest
import yaml

from segformer_pl.analysis.configuration import settings_digest, training_configuration
from segformer_pl.analysis.evaluation import Evaluation

TRAINING = {"trainer": {"max_steps": 10, "logger": False}, "data": {"path": "here"}}


def _evaluation(counts, step=10, **changes):
    counts = np.asarray(counts, np.int64)
    num_images, num_classes, _ = counts.shape
    values = {
        "split": "val",
        "step": step,
        "class_names": [f"class {c}" for c in range(num_classes)],
        "ids": [f"image {n}" for n in range(num_images)],
        "counts": counts,
        "loss": np.full(num_images, 0.5),
        "confusion": np.zeros((num_classes, num_classes), np.int64),
        "calibration": np.zeros((15, 3)),
    }
    return Evaluation(**values | changes)


def _write_run(
    folder,
    variant,
    seed,
    counts=None,
    changes=None,
    budget="small",
    fingerprint="a-b",
    max_steps=10,
    step=10,
    named=(),
    written=None,
    **entries,
):
    """Write a run folder and return its path; it has no evaluation if ``counts`` is None.

    Args:
        written: Evaluation to store instead of one of ``counts``.
        entries: Further entries of ``ablation.json``.
    """
    config = {"seed_everything": seed, **TRAINING, "model": {"lr": 0.1, "variant": changes}}
    config["trainer"] = config["trainer"] | {"max_steps": max_steps}
    digest = settings_digest(training_configuration({0: config}, None))
    run = folder / f"{variant}.seed{seed}.{budget}.{digest}"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    entry = {
        "study": "demo",
        "question": "Does it help?",
        "budget": budget,
        "variant": variant,
        "changes": changes or {},
        "reference": "base",
        "seed": seed,
        "digest": digest,
        "max_steps": max_steps,
        "evaluations": list(named),
        "environment": {},
        "transplanted": [],
    }
    (run / "ablation.json").write_text(json.dumps(entry | entries))
    data = {"dataset": "shapes", "num_rows": 4, "fingerprint": fingerprint}
    (run / "training_data.json").write_text(json.dumps(data))
    if counts is not None or written is not None:
        result = written or _evaluation(counts, step)
        result.save(run / "evaluation" / f"val_step_{step:07d}.npz")
        for name in named:
            # A separate validation counts as step 0 in the name of its file.
            result.save(run / "evaluations" / name / "evaluation" / "val_step_0000000.npz")
    return run


@pytest.fixture(scope="session")
def make_evaluation():
    """Function (counts (N, C, 3), step, further fields) -> Evaluation."""
    return _evaluation


@pytest.fixture(scope="session")
def write_run():
    """Function (folder of a study, variant, seed, counts, ...) that writes a run folder."""
    return _write_run
