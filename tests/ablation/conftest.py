"""Fixtures of the tests of studies: a small study on `shapes`, complete and checked."""

from pathlib import Path

import pytest
import yaml

BASE = {
    "trainer": {
        "max_steps": 4,
        "val_check_interval": 4,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
    },
    "model": {"network": {"class_path": "segformer_pl.models.segformer_b0"}, "warmup_steps": 1},
    "data": {"dataset": "shapes", "batch_size": 2, "eval_batch_size": 2, "num_workers": 0},
}
DROP_PATH = "model.network.init_args.drop_path_rate"
STUDY = {
    "question": "Does it matter?",
    "base": "base.yaml",
    "variants": {"plain": {}, "other": {DROP_PATH: 0.2}},
    "seeds": [0, 1],
    "budgets": {"small": {}},
}


@pytest.fixture
def write_study(tmp_path):
    """Function (settings of the base, entries of the study) -> study file."""

    def write(base=None, **entries):
        merged = {key: {**part, **(base or {}).get(key, {})} for key, part in BASE.items()}
        Path(tmp_path, "base.yaml").write_text(yaml.safe_dump(merged))
        file = Path(tmp_path, "tiny.yaml")
        file.write_text(yaml.safe_dump({**STUDY, **entries}, sort_keys=False))
        return file

    return write


@pytest.fixture
def read(write_study):
    """Function (settings of the base, entries of the study) -> Study."""
    from segformer_pl.ablation.study import read_study
    from segformer_pl.cli.training import resolve

    return lambda base=None, **entries: read_study(write_study(base, **entries), "small", resolve)
