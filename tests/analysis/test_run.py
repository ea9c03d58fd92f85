"""Reading a run back from its folder: existing, missing and damaged files."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import segformer_pl
from segformer_pl.analysis import run as run_module
from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.analysis.run import Run
from segformer_pl.errors import UserError


def write(folder, name, content):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def evaluate(folder, name, split="val", step=10):
    Evaluation(
        split=split,
        step=step,
        class_names=["road"],
        ids=["image"],
        counts=np.ones((1, 1, 3), np.int64),
        loss=np.zeros(1),
        confusion=np.ones((1, 1), np.int64),
        calibration=np.zeros((15, 3)),
    ).save(folder / "evaluation" / f"{name}.npz")


def test_empty_folder_is_a_run_without_results(tmp_path):
    run = Run(tmp_path / "demo" / "version_0")
    assert run.name == "demo/version_0"
    assert (run.config, run.config_text, run.resumptions, run.hyperparameters) == ({}, "", [], {})
    assert (run.evaluations, run.findings, run.training_data, run.checkpoints) == ([], [], None, [])
    assert run.figures("erf") == {}
    assert run.configuration(10) is None


# Metrics


def test_repeated_steps_and_a_truncated_row(tmp_path):
    rows = ["epoch,step,train/loss", *(f"0,{step},{2 / (step + 1)}" for step in range(5))]
    write(tmp_path, "metrics.csv", "\n".join([*rows, "0,2,7.0"]) + "\n0,5")
    loss = Run(tmp_path).metrics["train/loss"]
    assert loss.step.tolist() == [1, 2, 3, 4, 5]
    assert loss.value[2] == 7.0
    assert Run(tmp_path).num_steps == 5


def test_separate_validation_counts_no_training_steps(tmp_path):
    write(tmp_path, "metrics.csv", "step,val/miou\n1599,0.5\n")
    assert Run(tmp_path).metrics["val/miou"].step.tolist() == [1600]
    assert Run(tmp_path).num_steps == 0
    write(tmp_path, "metrics.csv", "step,val/miou\n799,0.4\n1599,0.5\n")
    assert Run(tmp_path).num_steps == 1600


@pytest.mark.parametrize("line", ["0,2,oops", "0,two,1.0"])
def test_cell_that_is_not_a_number(tmp_path, line):
    write(tmp_path, "metrics.csv", f"epoch,step,train/loss\n0,0,1.5\n0,1,1.0\n{line}\n")
    with pytest.raises(UserError, match=r"metrics\.csv, line 4: expected numbers"):
        _ = Run(tmp_path).metrics


def test_missing_folder_and_missing_metrics(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run folder .*nowhere"):
        _ = Run(tmp_path / "nowhere").metrics
    with pytest.raises(FileNotFoundError, match=r"no metrics\.csv in .*CSVLogger"):
        _ = Run(tmp_path).metrics


def test_files_are_read_once(tmp_path):
    file = write(tmp_path, "metrics.csv", "step,train/loss\n0,1.5\n")
    run = Run(tmp_path)
    assert run.metrics["train/loss"].last == 1.5
    file.unlink()
    assert run.metrics["train/loss"].last == 1.5


# Evaluations


def test_evaluations_are_sorted_by_the_steps_stored_in_them(tmp_path):
    evaluate(tmp_path, "val_step_0000999", step=999)
    evaluate(tmp_path, "val_step_0000000", step=1600)  # of a checkpoint, with its former name
    evaluate(tmp_path, "test_step_0001600", "test", step=1600)
    evaluate(tmp_path, "val_step_10000000", step=3)
    (tmp_path / "evaluation" / "val_step_99999999.npz.part").touch()
    (tmp_path / "evaluation" / "val_step_99999999_old.npz").touch()
    labels = [(one.step, one.split) for one in Run(tmp_path).evaluations]
    assert labels == [(3, "val"), (999, "val"), (1600, "test"), (1600, "val")]
    last = Run(tmp_path).last_evaluation()
    assert (last.step, last.split) == (1600, "val")
    assert Run(tmp_path).evaluations[1].load().step == 999


def test_damaged_evaluation_is_sorted_by_its_name_and_raises_when_loaded(tmp_path):
    evaluate(tmp_path, "val_step_0000010")
    write(tmp_path, "evaluation/val_step_0000020.npz", "PK cut short")
    run = Run(tmp_path)
    assert [one.step for one in run.evaluations] == [10, 20]
    with pytest.raises(ValueError, match=r"val_step_0000020\.npz' is no evaluation .*damaged"):
        run.last_evaluation()


def test_missing_evaluation_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"holds no evaluation/val_step_\*\.npz") as error:
        Run(tmp_path).last_evaluation()
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


# Settings


def test_latest_configuration_counts_and_resumptions_list_their_changes(tmp_path):
    config = {"model": {"lr": 0.1}, "trainer": {"max_steps": 10}}
    write(tmp_path, "config.yaml", config)
    write(tmp_path, "config_resumed_at_step_0000010.yaml", config | {"trainer": {"max_steps": 20}})
    write(tmp_path, "config_resumed_at_step_0000005.yaml", config)
    run = Run(tmp_path)
    assert list(run.configs) == [0, 5, 10]
    assert run.config["trainer"]["max_steps"] == 20
    assert [(part.step, part.changes) for part in run.resumptions] == [
        (5, {}),
        (10, {"trainer.max_steps": (10, 20)}),
    ]
    assert "lr: 0.1" in run.config_text
    assert run.configuration(10).settings["trainer.max_steps"] == 10
    assert run.configuration(11).settings["trainer.max_steps"] == "10, 20 from step 10 on"
    assert run.config["trainer"]["max_steps"] == 20  # unchanged by the merge


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "cannot be read as YAML"), ("words\n", "does not hold the settings of a run")],
)
@pytest.mark.parametrize("name", ["config.yaml", "config_resumed_at_step_0000005.yaml"])
def test_damaged_configuration_is_named(tmp_path, name, content, message):
    write(tmp_path, name, content)
    for read in (lambda run: run.config, lambda run: run.resumptions, lambda run: run.configs):
        with pytest.raises(UserError, match=message) as error:
            read(Run(tmp_path))
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)


def test_damaged_optional_files_read_as_empty(tmp_path):
    for name in ("findings.json", "training_data.json", "hparams.yaml"):
        write(tmp_path, name, "network: !!python/object:torch.nn.Linear {}\n")
    run = Run(tmp_path)
    assert (run.findings, run.training_data, run.hyperparameters) == ([], None, {})
    write(tmp_path, "training_data.json", json.dumps({"dataset": "shapes", "num_rows": 16}))
    assert Run(tmp_path).training_data is None


def test_training_data_are_identified_by_their_contents(tmp_path):
    data = {"dataset": "shapes", "num_rows": 16, "fingerprint": "names-contents"}
    write(tmp_path, "training_data.json", json.dumps(data))
    assert str(Run(tmp_path).training_data) == "16 images of shapes, fingerprint contents"


# Files


def test_figures_and_checkpoints(tmp_path):
    for name in ("step_0000020.png", "step_0000005.png", "notes.png"):
        write(tmp_path, f"worst/{name}", "")
    for name in ("last.ckpt", "best.ckpt", "notes.txt"):
        write(tmp_path, f"checkpoints/{name}", "")
    run = Run(tmp_path)
    assert list(run.figures("worst")) == [5, 20]
    assert [file.name for file in run.checkpoints] == ["best.ckpt", "last.ckpt"]
    assert run.last_checkpoint in run.checkpoints


def test_run_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "demo" / "version_0"
    files = [Path("demo/version_0/checkpoints/last.ckpt"), folder / "evaluation" / "x.npz"]
    assert [Run.of(file) for file in files] == [None, None]  # not yet a run folder
    write(folder, "config.yaml", {})
    assert [Run.of(file).folder for file in files] == [folder, folder]
    assert Run.of(folder / "other" / "last.ckpt") is None


# Run is the only reader of run folders

PACKAGE = Path(segformer_pl.__file__).parent
SUBPACKAGES = ("analysis", "callbacks", "cli", "commands", "doctor")
NAMES = {value for name, value in vars(run_module).items() if name.endswith(("_FILE", "_FOLDER"))}
# These modules write run folders and import the file names from the reader.
WRITERS = {
    "callbacks/history.py",
    "callbacks/evaluation.py",
    "callbacks/provenance.py",
    "callbacks/media.py",
    "callbacks/throughput.py",
}


def readings(path, source):
    """Yield the places in a source file that read a run folder without :class:`Run`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = set(node.value.split("/"))
            if "\n" not in node.value and " " not in node.value and parts & NAMES:
                yield f"{path}:{node.lineno} {node.value!r}"
        elif isinstance(node, ast.ImportFrom) and path not in WRITERS:
            names = [one.name for one in node.names if one.name.endswith(("_FILE", "_FOLDER"))]
            if names and (node.module or "").endswith(("analysis.run", "analysis.evaluation")):
                yield f"{path}:{node.lineno} imports {', '.join(names)}"


def test_nothing_else_reads_a_run_folder():
    files = [file for name in SUBPACKAGES for file in sorted((PACKAGE / name).rglob("*.py"))]
    files = [*files, PACKAGE / "task.py"]
    violations = []
    for file in files:
        path = str(file.relative_to(PACKAGE))
        # The folder name of evaluations is defined with their file format.
        if path not in ("analysis/run.py", "analysis/evaluation.py"):
            violations += readings(path, file.read_text())
    assert len(files) > 30
    assert violations == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("commands/compare.py", "file = folder / 'config.yaml'"),
        ("analysis/report/page.py", "open(f'{folder}/metrics.csv')"),
        ("commands/compare.py", "folder.glob('evaluation/*.npz')"),
        ("commands/x.py", "folder.glob('*/checkpoints/last.ckpt')"),
        ("commands/x.py", "from segformer_pl.analysis.run import METRICS_FILE"),
        ("commands/x.py", "from segformer_pl.analysis.evaluation import EVALUATION_FOLDER"),
    ],
)
def test_planted_reading_is_detected(path, source):
    assert len(list(readings(path, source))) == 1


def test_file_name_in_a_sentence_is_no_reading():
    sentence = "raise ValueError('there is no config.yaml of a training')"
    assert list(readings("commands/x.py", sentence)) == []
