"""The command ``test_time``: agreement with validate, interruption and continuation, refusals."""

import csv
import importlib
import json
import os
import re
import signal
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from segformer_pl.ablation.test_time import Timing, read_settings
from segformer_pl.analysis.evaluation import load_evaluation
from segformer_pl.checkpoints.run_checkpoint import RunCheckpoint
from segformer_pl.checkpoints.run_data import load_data
from segformer_pl.cli import main
from segformer_pl.data import shapes
from segformer_pl.inference import Inference, Predictor
from segformer_pl.metrics import TARGET
from segformer_pl.task import SegmentationTask
from tests.tiny_network import TINY_OPTION

pytestmark = pytest.mark.slow

command = importlib.import_module("segformer_pl.commands.test_time")

SHIPPED = Path(__file__).parents[2] / "experiments/ablations"
SETTINGS = """
settings:
  pooled: {network: {sr_ratios: [16, 8, 2, 1]}}
  kept: {network: {kv_border: keep}}
  flip: {inference: {flip: true}}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint after one step, with a random classifier so that predictions vary."""
    folder = tmp_path_factory.mktemp("run")
    shapes.generate(folder / "data", {"train": 2, "validation": 6})
    settings = {
        "model.network": TINY_OPTION,
        "data.path": folder / "data",
        "data.batch_size": 2,
        "data.eval_batch_size": 4,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 1,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.logger.save_dir": folder,
    }
    main(["fit", *(f"--{key}={value}" for key, value in settings.items())])
    (file,) = folder.rglob("last.ckpt")
    content = torch.load(file, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    state = content["state_dict"]
    state["network.head.classifier.weight"].normal_(generator=generator)
    for name, tensor in state.items():  # keys that matter, so that pooling them has an effect
        if name.endswith(("attn.kv.weight", "attn.q.weight", "attn.proj.weight")):
            tensor.normal_(std=0.3, generator=generator)
    del content["optimizer_states"]
    torch.save(content, file)
    return file


@pytest.fixture
def settings_file(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(SETTINGS)
    return file


@pytest.fixture
def no_timing(monkeypatch):
    """Constant latencies, to save time."""
    calls = []

    def constant(functions, seconds):
        calls.append(list(functions))
        return {name: Timing(5.0 + n, 0.5, 10) for n, name in enumerate(functions)}

    monkeypatch.setattr(command, "time_interleaved", constant)
    return calls


def arguments(checkpoint, settings, output, *options):
    values = {"ckpt": checkpoint, "settings": settings, "output": output, "device": "cpu"}
    return ["test_time", *(f"--{key}={value}" for key, value in values.items()), *options]


def rows(output):
    with (output / "test_time.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_the_evaluations_are_those_of_validate(
    no_timing, checkpoint, settings_file, tmp_path, capsys
):
    out = tmp_path / "out"
    main(arguments(checkpoint, settings_file, out))
    printed = capsys.readouterr().out
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    task = SegmentationTask.load_from_checkpoint(checkpoint, weights_only=True)
    stored = {row["setting"]: row for row in rows(out)}
    assert list(stored) == ["as_trained", "pooled", "kept", "flip"]
    for name, protocol in {"as_trained": Inference(), "flip": Inference(flip=True)}.items():
        task.inference = protocol
        data = load_data(RunCheckpoint.read(checkpoint))
        metrics = trainer.validate(task, datamodule=data, verbose=False)[0]
        evaluation = load_evaluation(out / "counts" / f"{name}.npz")
        assert evaluation.step == 1
        assert len(evaluation.ids) == 6
        assert evaluation.miou == float(stored[name]["miou"])
        assert evaluation.miou == pytest.approx(metrics["val/miou"], abs=1e-7)
        labelled = evaluation.counts[..., TARGET].sum(axis=1)
        loss = np.average(evaluation.loss, weights=labelled)
        assert loss == pytest.approx(metrics["val/loss"], rel=1e-5)
        confusion, pixels = evaluation.confusion, evaluation.calibration[:, 0]
        assert confusion.sum() == pixels.sum() == labelled.sum()
    assert stored["pooled"]["miou"] != stored["as_trained"]["miou"]
    assert stored["kept"]["miou"] == stored["as_trained"]["miou"]  # no border to keep in 64x64
    assert float(stored["pooled"]["macs"]) < float(stored["as_trained"]["macs"])
    assert int(stored["flip"]["macs"]) == 2 * int(stored["as_trained"]["macs"])
    images = torch.cat([batch["image"] for batch in data.val_dataloader()])
    pooled = Predictor.load(checkpoint, changes={"sr_ratios": [16, 8, 2, 1]})
    equal = pooled.predict_batch(images) == Predictor.load(checkpoint).predict_batch(images)
    assert float(stored["pooled"]["agreement"]) == pytest.approx(equal.float().mean().item())
    assert 0.1 < float(stored["pooled"]["agreement"]) < 1
    assert [stored[name]["agreement"] for name in ("as_trained", "kept")] == ["1.0", "1.0"]
    assert no_timing == [list(stored)]
    numbers = json.loads((out / "test_time.json").read_text())
    difference = float(stored["pooled"]["miou"]) - float(stored["as_trained"]["miou"])
    assert numbers["settings"][1]["difference"] == pytest.approx(difference)
    assert (out / "test_time.png").read_bytes().startswith(b"\x89PNG")
    assert printed.endswith(f"table: {out / 'test_time.md'}\n")
    # `compare` reads the stored counts.
    main(["compare", *(str(out / "counts" / f"{n}.npz") for n in ("as_trained", "pooled"))])
    assert "points of mIoU" in capsys.readouterr().out


def test_an_interrupted_command_continues(
    no_timing, checkpoint, settings_file, tmp_path, monkeypatch, capsys
):
    whole, part = tmp_path / "whole", tmp_path / "part"
    main(arguments(checkpoint, settings_file, whole))
    evaluate, evaluated = command._evaluate, []

    def interrupted(*given):
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        evaluated.append(evaluate(*given))
        return evaluated[-1]

    monkeypatch.setattr(command, "_evaluate", interrupted)
    with pytest.raises(SystemExit, match=r"^130$"):
        main(arguments(checkpoint, settings_file, part))
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("interrupted: 2 of 4 evaluations are in ")
    assert [row["setting"] for row in rows(part)] == ["as_trained", "pooled"]
    assert not (part / "test_time.md").exists()
    monkeypatch.setattr(
        command, "_evaluate", lambda *a: evaluated.append(evaluate(*a)) or evaluated[-1]
    )
    main(arguments(checkpoint, settings_file, part))
    assert len(evaluated) == 4
    for name in ("test_time.csv", "test_time.md", "test_time.json"):
        assert (part / name).read_text() == (whole / name).read_text()
    # All is there: nothing is evaluated or timed again.
    no_timing.clear()
    main(arguments(checkpoint, settings_file, part))
    assert (len(evaluated), no_timing) == (4, [])
    # A setting that changed and a new one are evaluated, and all settings are timed together.
    settings_file.write_text(
        SETTINGS.replace("16, 8, 2, 1", "16, 4, 2, 1")
        + SETTINGS.splitlines()[2].replace("pooled", "again")
    )
    main(arguments(checkpoint, settings_file, part))
    assert len(evaluated) == 6
    assert no_timing == [["as_trained", "pooled", "kept", "flip", "again"]]


def test_a_killed_process_continues(
    start_command, checkpoint, settings_file, tmp_path, monkeypatch
):
    """A real process, killed after its first evaluation."""
    out = tmp_path / "out"
    command_line = arguments(checkpoint, settings_file, out, "--num_images=4")
    process = start_command(command_line)
    process.wait_for((out / "test_time.csv").exists)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = [row["setting"] for row in rows(out)]
    assert done[0] == "as_trained"
    times = {name: (out / "counts" / f"{name}.npz").stat().st_mtime_ns for name in done}
    monkeypatch.setattr(command, "SECONDS", 0.0)
    main(command_line)
    for name, written in times.items():
        assert (out / "counts" / f"{name}.npz").stat().st_mtime_ns == written
    stored = rows(out)
    assert [row["setting"] for row in stored] == ["as_trained", "pooled", "kept", "flip"]
    assert all(float(row["latency_ms"]) > 0 for row in stored)
    assert (out / "test_time.md").exists()


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ("{network: {sr_ratios: [8, 4, 2, 2]}}", [], "setting 'a' needs training"),
        ("{network: {sr_ratios: [32, 4, 2, 1]}}", [], "'a': its images or windows of 64x64"),
        ("{inference: {scales: [0.25]}}", [], r"'a': its images .* 16x16 .*29 pix"),
        ("{inference: {window: [16, 16]}}", [], "'a': its images or windows of 16x16"),
        ("{inference: {flip: true}}", ["--num_images=7"], "--num_images 7: the validation split"),
        ("{inference: {flip: true}}", ["--data.path=nowhere"], "data.path: there is no folder"),
    ],
)  # fmt: skip
def test_refused_before_anything_runs(checkpoint, tmp_path, settings, options, message, fail):
    file = tmp_path / "settings.yaml"
    file.write_text(f"settings:\n  a: {settings}\n")
    assert re.search(message, fail(*arguments(checkpoint, file, tmp_path / "out", *options)))
    assert not (tmp_path / "out").exists()


def test_results_of_another_number_of_images_are_not_mixed_in(
    no_timing, checkpoint, settings_file, tmp_path
):
    out = tmp_path / "out"
    main(arguments(checkpoint, settings_file, out, "--num_images=2"))
    before = rows(out)
    with pytest.raises(SystemExit, match="its number of images is 2, here it is 3; give another"):
        main(arguments(checkpoint, settings_file, out, "--num_images=3"))
    assert rows(out) == before


@pytest.mark.parametrize(
    ("name", "num_settings"), [("test_time.yaml", 13), ("query_merging.yaml", 11)]
)
def test_the_shipped_settings_work_on_small_images(
    no_timing, checkpoint, tmp_path, name, num_settings
):
    main(arguments(checkpoint, SHIPPED / name, tmp_path / "out", "--num_images=2"))
    assert len(rows(tmp_path / "out")) == len(read_settings(SHIPPED / name)) == num_settings
