"""``ablate --launcher slurm`` with two ranks per run, on a real Slurm."""

import subprocess
from pathlib import Path

import pytest
import yaml

from segformer_pl.analysis.run import Run

TRAINER = {
    "max_steps": 4,
    "val_check_interval": 4,
    "limit_val_batches": 1,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "accelerator": "cpu",
    "devices": 2,
    "strategy": "ddp",
    "enable_model_summary": False,
}


def has_slurm():
    try:
        done = subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return bool(done.stdout.strip())


@pytest.mark.slow
@pytest.mark.skipif(not has_slurm(), reason="needs a running Slurm")
def test_each_device_is_a_task_of_slurm(folder, tmp_path, start_command):
    base = {
        "trainer": TRAINER,
        "model": {"network": {"class_path": "arena_networks.Small"}, "warmup_steps": 1},
        "data": {"path": str(folder), "batch_size": 2, "eval_batch_size": 4, "num_workers": 0},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    study = {
        "question": "Does it matter?",
        "base": "base.yaml",
        "variants": {"plain": {}},
        "seeds": [0],
        "evaluations": {"at_96": {"model.inference.base_size": [96, 96]}},
        "budgets": {"small": {}},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(study))
    options = ["--launcher=slurm", "--slurm={timeout_min: 60, cpus_per_task: 1}", "--output=out"]
    process = start_command(
        ["ablate", "tiny.yaml", *options], folder=tmp_path, imports=Path(__file__).parent
    )
    assert process.wait(500) == 0, process.output
    assert "1 of 1 runs done" in process.output
    (run,) = (tmp_path / "out" / "tiny").glob("plain.seed0.*")
    assert Run(run).named_evaluations["at_96"].evaluations[-1].step == 4
    for rank in ("", ".rank1"):
        log = (tmp_path / "out" / "tiny" / ".jobs" / f"{run.name}{rank}.log").read_text()
        assert log.count("$ python -m segformer_pl fit") == 1
        assert log.count("$ python -m segformer_pl validate") == 1
    assert "MEMBER: 1/2" in (run.parent / ".jobs" / f"{run.name}.log").read_text()
