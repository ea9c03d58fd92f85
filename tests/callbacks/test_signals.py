"""Signals to running processes: their checkpoints, messages and exit statuses."""

import csv
import json
import os
import shlex
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from segformer_pl.analysis.run import Run
from segformer_pl.cli import main
from segformer_pl.data import shapes
from tests.tiny_network import TINY_OPTION

pytestmark = pytest.mark.slow


class Slow(pl.Callback):
    """Writes events to a file, and slows validations down."""

    def __init__(self, file, validation=0.0):
        self.file, self.validation = Path(file), validation

    def write(self, trainer, event):
        with self.file.open("a") as file:
            file.write(f"{event} {trainer.global_step}\n")

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.write(trainer, "batch")

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.write(trainer, "validation")
        time.sleep(self.validation)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.generate(folder, {"train": 24, "validation": 21})
    return folder


@pytest.fixture
def run(start_command, folder, tmp_path):
    """Function that starts a command with the callback ``Slow``."""

    def start(command, *arguments, environment=(), validation=0.0, **settings):
        settings = {
            "model.network": TINY_OPTION,
            "data.path": folder,
            "data.batch_size": 2,
            "data.eval_batch_size": 1,
            "data.num_workers": 2,
            "trainer.accelerator": "cpu",
            "trainer.max_steps": 200,
            "trainer.num_sanity_val_steps": 0,
            "trainer.val_check_interval": 1000,
            "trainer.log_every_n_steps": 1,
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "trainer.logger.save_dir": tmp_path / "runs",
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        slow = {"file": str(tmp_path / "events"), "validation": validation}
        callback = {"class_path": "test_signals.Slow", "init_args": slow}
        arguments = [command, *(f"--{key}={value}" for key, value in settings.items()), *arguments]
        if command == "fit":
            arguments.append(f"--trainer.callbacks+={json.dumps(callback)}")
        return start_command(arguments, folder=tmp_path, figures=False, **dict(environment))

    return start


@pytest.fixture
def has_event(tmp_path):
    """Function that returns whether the callback has written an event."""
    file = tmp_path / "events"
    return lambda event: file.exists() and f"{event}\n" in file.read_text()


def last(tmp_path):
    (file,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    return file, checkpoint["global_step"], checkpoint["StreamingSegmentationData"]["consumed"]


@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)],
    ids=["SIGTERM", "Ctrl-C", "SIGUSR1"],
)
def test_fit_ends_after_the_step_and_prints_how_to_resume(run, has_event, tmp_path, signum, status):
    command = run("fit", trainer__accumulate_grad_batches=3)
    command.wait_for(lambda: has_event("batch 2"))
    os.killpg(command.pid, signum)  # to the workers too, as a terminal or a scheduler does
    assert command.wait() == status
    file, step, consumed = last(tmp_path)
    assert step >= 2
    assert consumed == step * 6
    assert "Traceback" not in command.output
    message, how = command.output.splitlines()[-2:]
    name = "Ctrl-C" if signum == signal.SIGINT else signum.name
    assert message == f"{name}: stopped after step {step}, saved in {file}; resume with"
    assert how.startswith("python -m segformer_pl fit '--model.network={")
    (part,) = Run(file.parents[1]).parts
    assert (part.end, part.last_step) == (name, step)
    if signum == signal.SIGTERM:
        again = run("fit", *shlex.split(how)[4:], f"--trainer.max_steps={step + 1}")
        assert again.wait() == 0, again.output


def test_a_second_ctrl_c_ends_at_once(run, has_event, tmp_path):
    command = run("fit", validation=30.0, trainer__val_check_interval=2)
    command.wait_for(lambda: has_event("validation 2"))
    os.killpg(command.pid, signal.SIGINT)
    command.wait_for(lambda: "Ctrl-C now stops at once" in command.output)
    os.killpg(command.pid, signal.SIGINT)
    assert command.wait(20) == 130  # an image takes 30 s
    assert "Traceback" not in command.output


def test_an_interrupted_validation_is_repeated_after_resuming(run, has_event, tmp_path):
    command = run("fit", validation=0.5, trainer__val_check_interval=2)
    command.wait_for(lambda: has_event("validation 2"))
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait() == 143
    cut = (tmp_path / "events").read_text().count("validation 2\n")
    assert cut < 5  # of 21
    file, step, consumed = last(tmp_path)
    assert (step, consumed) == (2, 4)
    metrics = file.parents[1] / "metrics.csv"
    assert not any(row.get("val/miou") for row in csv.DictReader(metrics.open()))
    resumed = ["fit", f"--ckpt_path={file}", "--last_checkpoint.dirpath", str(file.parent)]
    again = run(*resumed, trainer__val_check_interval=2, trainer__max_steps=5)
    assert again.wait() == 0, again.output
    text = (tmp_path / "events").read_text()
    assert text.count("validation 2\n") == cut + 21
    assert text.count("validation 4\n") == 21
    assert last(tmp_path)[1:] == (5, 10)


class SignalIn(pl.Callback):
    """Sends SIGTERM to its own process in every validation."""

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_end_of_an_epoch_is_not_the_end_of_the_training(
    folder, tmp_path, capsys, caplog, monkeypatch
):
    """A regression with limit_train_batches: messages said that all steps were done."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    settings = {
        "model.network": TINY_OPTION,
        "data.path": folder,
        "data.batch_size": 2,
        "data.eval_batch_size": 1,
        "data.num_workers": 0,
        "data.crop_size": "[64,64]",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 6,
        "trainer.limit_train_batches": 2,
        "trainer.num_sanity_val_steps": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.logger.save_dir": tmp_path / "runs",
        "trainer.callbacks+": "test_signals.SignalIn",
    }
    with caplog.at_level("INFO"), pytest.raises(SystemExit, match="143"):
        main(["fit", *(f"--{key}={value}" for key, value in settings.items())])
    message, how = capsys.readouterr().err.splitlines()[-2:]
    assert message.startswith("SIGTERM: stopped after step 2, saved in ")
    assert message.endswith("; resume with")
    assert how.startswith("python -m segformer_pl fit ")
    assert "validation never runs" not in caplog.text


def test_a_signal_before_the_first_step_ends_at_once(run, tmp_path):
    command = run("fit", trainer__num_sanity_val_steps=20, validation=1.0)
    command.wait_for(lambda: (tmp_path / "events").exists())
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait() == 143
    assert command.output.splitlines()[-1] == "SIGTERM: stopped, nothing was trained"
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_validate_ends_at_once_with_one_line(run, has_event, tmp_path, signum, status):
    callback = {"class_path": "test_signals.Slow"}
    callback["init_args"] = {"file": str(tmp_path / "events"), "validation": 0.5}
    command = run("validate", f"--trainer.callbacks+={json.dumps(callback)}")
    command.wait_for(lambda: has_event("validation 0"))
    os.kill(command.pid, signum)
    assert command.wait() == status
    assert (tmp_path / "events").read_text().count("validation") < 10  # of 21
    assert command.output.splitlines()[-1].endswith(": stopped")
    assert "Traceback" not in command.output


def test_other_commands_end_with_one_line_on_ctrl_c(start_command, folder):
    command = start_command(
        [
            "erf",
            "--model=segformer_b5",
            "--data.dataset=shapes",
            f"--data.path={folder}",
            "--size",
            512,
            512,
        ]
    )
    time.sleep(3)
    os.kill(command.pid, signal.SIGINT)
    assert command.wait(30) == 130, command.output
    assert command.output.splitlines()[-1] == "Ctrl-C: stopped"
    assert "Traceback" not in command.output


@pytest.fixture
def ranks(run, torchrun_environments):
    """Function that starts a command on two ranks, as torchrun does."""

    def start(*arguments, **settings):
        settings |= {"trainer__devices": 2, "trainer__strategy": "ddp", "data__num_workers": 1}
        environments = torchrun_environments(2)
        return [run(*arguments, environment=one, **settings) for one in environments]

    return start


def test_two_ranks_end_after_the_same_step(ranks, has_event, tmp_path):
    commands = ranks("fit", trainer__accumulate_grad_batches=2)
    commands[0].wait_for(lambda: has_event("batch 2"))
    os.kill(commands[1].pid, signal.SIGTERM)
    assert [command.wait() for command in commands] == [143, 143]
    _, step, consumed = last(tmp_path)
    assert step >= 2
    assert consumed == step * 8
    assert "resume with" in commands[0].output
    assert "resume with" not in commands[1].output


def test_two_ranks_end_a_validation_of_11_and_10_images(ranks, has_event, tmp_path):
    commands = ranks("fit", validation=0.3, trainer__val_check_interval=2)
    commands[0].wait_for(lambda: has_event("validation 2"))
    os.kill(commands[1].pid, signal.SIGTERM)
    assert [command.wait() for command in commands] == [143, 143]
    assert last(tmp_path)[1:] == (2, 8)


def test_slurm_requeues_after_a_complete_step(run, has_event, tmp_path):
    """Also one task of an array, and beside the checkpoint of another job of Lightning.

    tests/cluster/test_slurm.py does it on a real Slurm.
    """
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    (tools / "scontrol").write_text(f"#!/bin/sh\necho $* >> {calls}\n")
    (tools / "scontrol").chmod(0o755)
    torch.save({"state_dict": {}}, tmp_path / "hpc_ckpt_1.ckpt")
    environment = {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "7"}
    environment |= {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    environment["PATH"] = f"{tools}:{os.environ['PATH']}"
    settings = {"environment": environment, "trainer__accumulate_grad_batches": 3}
    command = run("fit", "--run_name=first", **settings)
    command.wait_for(lambda: has_event("batch 2"))
    os.killpg(command.pid, signal.SIGUSR1)
    assert command.wait() == 138
    file, step, consumed = last(tmp_path)
    assert file == tmp_path / "runs" / "shapes_SegFormer" / "first" / "checkpoints" / "last.ckpt"
    assert step >= 2
    assert consumed == step * 6
    assert command.output.endswith(
        f"SIGUSR1: stopped after step {step}, saved in {file}; the same command resumes\n"
        "requeuing Slurm's job 70_7\n"
    )
    assert calls.read_text() == "requeue 70_7\n"

    (tools / "scontrol").write_text("#!/bin/sh\necho Access denied >&2\nexit 1\n")
    command = run("fit", "--run_name=first", **settings)
    command.wait_for(lambda: has_event(f"batch {step + 1}"))
    os.killpg(command.pid, signal.SIGUSR1)
    assert command.wait() == 138
    assert f"the run in {file.parents[1]} continues from step {step}" in command.output
    assert command.output.endswith("\njob 70_7 is not requeued: Access denied\n")


def test_a_signal_in_the_last_validation_says_how_to_evaluate(run, has_event, tmp_path):
    """A regression: the command contained --run_name, which validate refuses."""
    settings = {"trainer__val_check_interval": 2, "trainer__max_steps": 2}
    command = run("fit", "--run-name", "first", validation=0.3, **settings)
    command.wait_for(lambda: has_event("validation 2"))
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait() == 143
    message, how = command.output.splitlines()[-2:]
    assert message.endswith("; all steps are done, evaluate with")
    _, _, _, name, *arguments = shlex.split(how)
    assert name == "validate"
    assert not [argument for argument in arguments if "run_name" in argument or argument == "first"]
    assert arguments[-1] == f"--ckpt_path={last(tmp_path)[0]}"


def test_sigusr1_in_the_last_validation_is_ignored(run, has_event, tmp_path):
    """A requeued job would have no step left, and no validation."""
    settings = {"trainer__val_check_interval": 2, "trainer__max_steps": 2}
    command = run("fit", "--run_name=first", validation=0.1, **settings)
    command.wait_for(lambda: has_event("validation 2"))
    os.killpg(command.pid, signal.SIGUSR1)
    assert command.wait() == 0
    assert (tmp_path / "events").read_text().count("validation 2\n") == 21


def test_two_ranks_stop_alike_before_the_first_step(ranks, has_event, tmp_path):
    """A rank that ended at once would leave the other waiting in its first step."""
    commands = ranks("fit", validation=0.2, trainer__num_sanity_val_steps=20)
    commands[0].wait_for(lambda: has_event("validation 0"))
    os.kill(commands[1].pid, signal.SIGTERM)
    assert [command.wait() for command in commands] == [143, 143]
    assert commands[0].output.splitlines()[-1] == "SIGTERM: stopped, nothing was trained"
    assert "Traceback" not in commands[0].output + commands[1].output
    assert not has_event("batch 0")
