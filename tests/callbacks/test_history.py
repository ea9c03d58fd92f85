"""The history of a run that is killed and resumed equals that of an uninterrupted run."""

import csv
import json
import os
import resource
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy

from segformer_pl.analysis.run import Run
from segformer_pl.callbacks import LastCheckpoint
from segformer_pl.callbacks.history import RunHistory, RunLogger, keep_history, rewind
from segformer_pl.cli import main
from segformer_pl.data import shapes
from tests.tiny_network import TINY_OPTION


class KillAt(pl.Callback):
    """Kills the process after a step, without any cleanup."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.generate(folder, {"train": 8, "validation": 2})
    return folder


def options(data, runs, **changes):
    settings = {
        "model.network": TINY_OPTION,
        "model.warmup_steps": 2,
        "data.path": data,
        "data.batch_size": 2,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 8,
        "trainer.val_check_interval": 2,
        "trainer.num_sanity_val_steps": 0,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.logger.save_dir": runs,
        "last_checkpoint.every_n_train_steps": 3,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    return [
        *arguments,
        "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor",
        "--trainer.callbacks+=segformer_pl.callbacks.PredictionPanel",
    ]


@pytest.fixture
def killed_run(start_command):
    """Function that starts a run whose process is killed after a step; returns the run folder."""

    def call(data, runs, step):
        kill = {"class_path": "test_history.KillAt", "init_args": {"step": step}}
        callback = f"--trainer.callbacks+={json.dumps(kill)}"
        process = start_command(["fit", *options(data, runs), callback])
        assert process.wait() == -signal.SIGKILL, process.output
        return next(runs.glob("*/version_0"))

    return call


def rows(run_dir):
    """The rows of metrics.csv as numbers, without the epoch and what was measured by a clock."""
    left_out = {"epoch", "train/images_per_second", "train/step_time", "train/data_wait"}
    with (run_dir / "metrics.csv").open(newline="") as stream:
        return [
            {key: float(cell) for key, cell in row.items() if cell and key not in left_out}
            for row in csv.DictReader(stream)
        ]


def files(run_dir):
    outputs = (file for file in run_dir.glob("[!s]*/*") if file.suffix in (".png", ".npz"))
    return sorted(str(file.relative_to(run_dir)) for file in outputs)


@pytest.mark.slow
def test_a_killed_and_resumed_run_leaves_what_an_uninterrupted_one_leaves(
    data, killed_run, tmp_path, caplog
):
    main(["fit", *options(data, tmp_path / "whole")])
    whole = next((tmp_path / "whole").glob("*/version_0"))
    run_dir = killed_run(data, tmp_path / "killed", step=5)
    last = run_dir / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    # All values up to the checkpoint are on the disk, although the logger was not flushed.
    assert Run(run_dir).metrics["train/loss"].step.tolist()[:4] == [1, 2, 3, 4]
    assert (run_dir / "predictions" / "step_0000004.png").is_file()

    resumed = options(data, tmp_path / "killed", trainer__val_check_interval=3)
    with caplog.at_level("INFO"):
        main(["fit", *resumed, f"--ckpt_path={last}"])
    assert f"the run in {run_dir} continues from step 4" in caplog.text
    assert [child.name for child in run_dir.parent.iterdir()] == ["version_0"]
    assert files(run_dir) == [
        f"{folder}/{prefix}step_{step:07d}.{suffix}"
        for folder, prefix, suffix in (
            ("evaluation", "val_", "npz"),
            ("predictions", "", "png"),
            ("worst", "", "png"),
        )
        for step in (2, 4, 6)
    ]
    assert Run(run_dir).metrics["val/miou"].step.tolist() == [2, 4, 6]
    train_rows = [[row for row in rows(run) if "val/miou" not in row] for run in (run_dir, whole)]
    assert train_rows[0] == [pytest.approx(row, rel=1e-6) for row in train_rows[1]]
    first = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert first["ckpt_path"] is None
    (resumption,) = Run(run_dir).resumptions
    assert resumption.step == 4
    assert resumption.changes == {
        "trainer.callbacks.KillAt": ("test_history.KillAt", None),
        "trainer.val_check_interval": (2, 3),
    }
    data_state = torch.load(last, weights_only=True)["StreamingSegmentationData"]
    training_data = json.loads((run_dir / "training_data.json").read_text())
    assert training_data == {key: data_state[key] for key in ("dataset", "num_rows", "fingerprint")}
    page = (run_dir / "report.html").read_text()
    assert "dotted: resumed at 4" in page
    assert "trainer.val_check_interval" in page


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_another_folder_or_an_earlier_checkpoint_starts_a_new_run_folder(data, tmp_path, caplog):
    arguments = options(data, tmp_path, trainer__limit_val_batches=0, trainer__max_steps=4)
    every = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}
    keep = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": every}
    main(["fit", *arguments, f"--trainer.callbacks+={json.dumps(keep)}"])
    run_dir = next(tmp_path.glob("*/version_0"))
    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    last = run_dir / "checkpoints" / "last.ckpt"
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes(last.read_bytes())
    earlier = last.with_name("step=2.ckpt")
    arguments = options(data, tmp_path, trainer__limit_val_batches=0, trainer__max_steps=5)
    for ckpt_path, changes, sentence in (
        (moved, [], "is not in a run folder"),
        (last, ["--trainer.logger.name=other"], "trainer.logger names another folder"),
        (earlier, [], "is of step 2, but its run has continued to step 4"),
    ):
        caplog.clear()
        with caplog.at_level("INFO"):
            cli = main(["fit", *arguments, f"--ckpt_path={ckpt_path}", *changes])
        assert sentence in caplog.text
        assert "a folder and a history of its own" in caplog.text
        assert Path(cli.trainer.log_dir) != run_dir
        assert min(Run(cli.trainer.log_dir).metrics["train/loss"].step) > 1
    after = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    assert after == before


@pytest.mark.slow
def test_a_folder_with_a_history_is_refused_to_another_run(data, tmp_path):
    run_dir = tmp_path / "shapes_SegFormer" / "version_0"
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.csv").write_text("step,train/loss\n0,1.0\n")
    for command in ("fit", "validate"):
        with pytest.raises(SystemExit, match="already holds the history of a run"):
            main([command, *options(data, tmp_path, trainer__logger__version=0)])


def test_a_logger_appends_to_an_existing_file(tmp_path):
    logger = RunLogger(tmp_path, name="demo", version=0)
    logger.log_metrics({"b": 1.0}, step=0)
    logger.save()
    logger.log_metrics({"b": 2.0}, step=1)
    logger.save()
    again = keep_history(CSVLogger(tmp_path, name="demo"), tmp_path / "demo" / "version_0")
    again.log_metrics({"b": 3.0}, step=2)
    again.save()
    again.log_metrics({"a": 4.0}, step=3)  # another column
    again.save()
    columns = Run(tmp_path / "demo" / "version_0").metrics
    assert columns["b"].value.tolist() == [1, 2, 3]
    assert columns["a"].step.tolist() == [4]


def test_values_are_kept_until_the_disk_has_room(tmp_path):
    logger = RunLogger(tmp_path, name="demo", version=0)
    logger.log_metrics({"b": 1.0}, step=0)
    logger.save()
    file = tmp_path / "demo" / "version_0" / "metrics.csv"
    whole = file.read_bytes()
    logger.log_metrics({"b": 2.0}, step=1)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 2, hard))  # stands in for a full disk
    try:
        with pytest.warns(UserWarning, match="File too large"):
            logger.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == whole
    logger.save()
    assert Run(file.parent).metrics["b"].value.tolist() == [1, 2]


def test_rewinding_sets_aside_rows_and_files_of_later_steps(tmp_path):
    (tmp_path / "metrics.csv").write_text('step,"a,\nb"\r\n0,1\r\n1,2\r\n2,3\r\n1,9\r\n2,0.12')
    kept = ["evaluation/val_step_0000002.npz", "worst/notes.png", "config.yaml"]
    removed = ["evaluation/test_step_0000003.npz", "worst/step_0000003.png"]
    removed.append("config_resumed_at_step_0000003.yaml")
    for name in kept + removed:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert Run(tmp_path).metrics["a,\nb"].value.tolist() == [
        1,
        9,
        3,
    ]  # the row of 0.12 is truncated
    aside = tmp_path / "superseded_after_step_0000002"
    assert rewind(tmp_path, 2) == aside
    assert Run(tmp_path).metrics["a,\nb"].value.tolist() == [1, 9]
    assert Run(aside).metrics["a,\nb"].value.tolist() == [3]
    moved = {"metrics.csv", *removed}
    remaining = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert remaining == {"metrics.csv", *kept, *(f"{aside.name}/{name}" for name in moved)}
    assert rewind(tmp_path, 2) is None
    rewind(tmp_path, 1)
    # A second time at the same step, the first folder is kept.
    (tmp_path / removed[0]).touch()
    assert rewind(tmp_path, 2) == tmp_path / "superseded_after_step_0000002_2"
    assert Run(aside).metrics["a,\nb"].value.tolist() == [3]


class Line(pl.LightningModule):
    """A model with one weight that logs in training and validation."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        self.log("train/loss", self.weight[0])
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/miou", float(self.trainer.global_step))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_validation_during_accumulation_has_the_number_of_completed_steps(tmp_path):
    """A regression: one step too many. Validations follow 4, 8 and 12 batches; a step takes 3."""
    trainer = pl.Trainer(
        max_steps=5,
        accumulate_grad_batches=3,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=RunLogger(tmp_path, name="demo", version=0),
        callbacks=[RunHistory()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Line(), torch.zeros(40, 1), torch.zeros(1, 1))
    columns = Run(tmp_path / "demo" / "version_0").metrics
    assert columns["val/miou"].value.tolist() == [1, 2, 4]
    assert columns["val/miou"].step.tolist() == [1, 2, 4]
    assert columns["train/loss"].step.tolist() == [1, 2, 3, 4, 5]


class RestoresLate(SingleDeviceStrategy):
    """A strategy that reads the checkpoint after its setup, as those of FSDP and DeepSpeed do."""

    restore_checkpoint_after_setup = True


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, RestoresLate])
def test_a_named_run_is_resumed_by_a_strategy_that_restores_late(tmp_path, strategy):
    last = tmp_path / "checkpoints" / "last.ckpt"
    for max_steps in (2, 4):
        history = RunHistory()
        history.is_locked = True
        trainer = pl.Trainer(
            max_steps=max_steps,
            accelerator="cpu",
            strategy=strategy("cpu"),
            logger=RunLogger(tmp_path, name="demo", version="first"),
            callbacks=[history, LastCheckpoint(dirpath=last.parent)],
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        begin = str(last) if last.exists() else None
        trainer.fit(Line(), torch.zeros(40, 1), ckpt_path=begin)
    assert begin is not None
    assert trainer.global_step == 4
    assert trainer.model.weight.item() == pytest.approx(-0.4)


class Score(pl.Callback):
    """Logs a fixed metric, which is best after the second step."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/score", float(-abs(trainer.global_step - 2)))


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("moved", [False, True])
def test_a_resumed_run_keeps_its_best_checkpoint(data, tmp_path, monkeypatch, moved):
    """The default folder is a relative path, with which Lightning overwrote the best checkpoint."""
    monkeypatch.chdir(tmp_path)
    best = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            **{"filename": "best", "monitor": "val/score", "mode": "max"},
            "enable_version_counter": False,
        },
    }
    callbacks = [
        f"--trainer.callbacks+={json.dumps(callback)}"
        for callback in ({"class_path": f"{__name__}.Score"}, best)
    ]
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    first = options(data, "runs", trainer__max_steps=4)[:-2]
    main(["fit", *first, *callbacks])
    runs = Path("runs")
    if moved:
        runs = Path("elsewhere")
        Path("runs").rename(runs)
    run_dir = next(runs.glob("*/version_0"))
    kept = (run_dir / "checkpoints" / "best.ckpt").read_bytes()
    again = options(data, runs, trainer__max_steps=6)[:-2]
    if moved:
        again += ["--trainer.logger.version=0"]
    ckpt_path = run_dir / "checkpoints" / "last.ckpt"
    cli = main(["fit", *again, *callbacks, f"--ckpt_path={ckpt_path}"])
    assert Path(cli.trainer.log_dir).resolve() == run_dir.resolve()
    assert cli.trainer.global_step == 6
    assert (run_dir / "checkpoints" / "best.ckpt").read_bytes() == kept
    (callback,) = (c for c in cli.trainer.checkpoint_callbacks if c.monitor)
    assert Path(callback.best_model_path) == (run_dir / "checkpoints" / "best.ckpt").absolute()
    assert list(callback.best_k_models) == [callback.best_model_path]


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_a_resumed_run_continues_its_wandb_run(data, tmp_path):
    import wandb

    logger = [
        "--trainer.logger+=lightning.pytorch.loggers.WandbLogger",
        "--trainer.logger.offline=true",
        f"--trainer.logger.save_dir={tmp_path}",
    ]
    resume = []
    for steps in (1, 2):
        arguments = options(data, tmp_path / "runs", trainer__max_steps=steps)
        main(["fit", *arguments, *logger, "--trainer.limit_val_batches=0", *resume])
        wandb.finish()
        (last,) = tmp_path.rglob("last.ckpt")
        resume = [f"--ckpt_path={last}"]
    ids = [file.stem.removeprefix("run-") for file in tmp_path.rglob("run-*.wandb")]
    assert ids == 2 * [Run.of(last).wandb_id]
