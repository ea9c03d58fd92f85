"""Every file under experiments/ states what it is for, parses and trains."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from segformer_pl.cli import main
from segformer_pl.data.catalog import find_dataset

EXPERIMENTS = sorted(Path(__file__).parents[1].glob("experiments/**/*.yaml"))


@pytest.fixture
def tiny_copy(tmp_path, png, write_shards):
    """Shards in a data set's layout, with random pictures and every label value it knows."""

    def write(name):
        entry = find_dataset(name)
        values = [*range(entry.labels.num_classes), *entry.labels.ignored]
        rng = np.random.default_rng(0)
        for split in ("train", "validation"):
            rows = [
                {
                    entry.image_column: png(rng.integers(0, 256, (48, 64, 3), np.uint8)),
                    entry.label_column: png(rng.choice(values, (48, 64)).astype(np.uint8)),
                    entry.id_column: f"{split}-{number}",
                }
                for number in range(4)
            ]
            write_shards(tmp_path, split, [rows])
        return tmp_path

    return write


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_states_question_command_hardware_and_expectation(file):
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    stated = [line.split()[1] for line in header if len(line.split()) > 1]
    for word in ("question", "command", "hardware", "expectation"):
        assert word in stated, f"{file.name} does not state its {word}"


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_trains_one_tiny_step_and_is_validated(file, tiny_copy, tmp_path):
    data = yaml.safe_load(file.read_text())["data"]
    changes = {
        "data.path": tiny_copy(data["dataset"]),
        "data.batch_size": 2,
        "data.eval_batch_size": 2,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.logger.init_args.save_dir": tmp_path / "runs",
    }
    if data.get("crop_size"):
        changes["data.crop_size"] = "[32,64]"
    main(["fit", f"--config={file}", *(f"--{key}={value}" for key, value in changes.items())])
    (run,) = (tmp_path / "runs").glob("*/version_0")
    assert "val/miou" in (run / "metrics.csv").read_text()
    assert {"report.html", "config.yaml", "predictions", "erf"} <= {p.name for p in run.iterdir()}


def test_there_are_experiments():
    assert {"demo", "camvid_b0"} <= {file.stem for file in EXPERIMENTS}
