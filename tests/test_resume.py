"""A killed run resumes, also on another world size, with the samples of an uninterrupted run."""

import json
import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from segformer_pl.data import shapes
from tests.tiny_network import TINY_OPTION

pytestmark = pytest.mark.slow


class WriteIds(pl.Callback):
    """Appends ids, seeds and loss of each training batch to a file per rank, without buffering."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        batch_number = trainer.fit_loop.epoch_loop.batch_progress.total.processed - 1
        line = {"batch": batch_number, "id": batch["id"], "seed": batch["seed"], "loss": loss}
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.generate(folder, {"train": 26, "validation": 3})
    return folder


def command(folder, run, devices, accumulate, max_steps):
    run.mkdir(exist_ok=True)
    settings = {
        "model.network": TINY_OPTION,
        "model.warmup_steps": 2,
        "model.lr": 1e-3,
        "data.path": folder,
        "data.batch_size": 2,
        "data.num_workers": 2,
        "data.crop_size": "[64,64]",
        "data.scale_range": "[0.5,2.0]",
        "data.photometric": "true",
        "trainer.accelerator": "cpu",
        "trainer.devices": devices,
        "trainer.strategy": "ddp" if devices > 1 else "auto",
        "trainer.accumulate_grad_batches": accumulate,
        "trainer.max_steps": max_steps,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.logger.save_dir": run,
        "last_checkpoint.every_n_train_steps": 5,
        "last_checkpoint.dirpath": run,
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    ids = {"class_path": "test_resume.WriteIds", "init_args": {"folder": str(run)}}
    arguments.append(f"--trainer.callbacks+={json.dumps(ids)}")
    return ["fit", *arguments]


def finish(process, timeout=300):
    assert process.wait(timeout) == 0, process.output[-3000:]


def trained_samples(run, world_size):
    """Read (id, seed) of all samples, by batch and rank, and the losses of the batches."""
    ranks = []
    for rank in range(world_size):
        lines = [json.loads(line) for line in (run / f"rank{rank}.jsonl").open()]
        ranks.append({line["batch"]: line for line in lines})
    batches = sorted(set.intersection(*map(set, ranks)))  # a killed rank may be one batch ahead
    samples = [
        sample
        for batch in batches
        for rank in ranks
        for sample in zip(rank[batch]["id"], rank[batch]["seed"])
    ]
    return samples, [rank[batch]["loss"] for batch in batches for rank in ranks]


def test_a_killed_run_on_two_ranks_resumes_on_one_and_on_two(folder, tmp_path, start_command):
    whole = tmp_path / "whole"
    finish(start_command(command(folder, whole, 2, 1, 16), figures=False))
    samples, losses = trained_samples(whole, 2)
    assert len(samples) == 16 * 4
    assert len(set(samples)) == 16 * 4

    killed = tmp_path / "killed"
    process = start_command(command(folder, killed, 2, 1, 16), figures=False)
    last = killed / "last.ckpt"
    process.wait_for(last.exists, 240)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    consumed = torch.load(last, weights_only=True)["StreamingSegmentationData"]["consumed"]
    assert 0 < consumed < len(samples)
    assert consumed % 20 == 0
    before, _ = trained_samples(killed, 2)
    assert before == samples[: len(before)]

    for devices in (2, 1):
        resumed = tmp_path / f"resumed_on_{devices}"
        arguments = command(folder, resumed, devices, 2 // devices, 16)
        finish(start_command([*arguments, f"--ckpt_path={last}"], figures=False))
        resumed_samples, resumed_losses = trained_samples(resumed, devices)
        assert resumed_samples == samples[consumed:]
        # One rank sums the gradients in another order than two, so rounding differs.
        assert resumed_losses == pytest.approx(losses[-len(resumed_losses) :], rel=1e-5)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_a_chain_of_random_kills_loses_and_repeats_no_samples(start_command):
    script = Path(__file__).parents[1] / "experiments" / "resilience" / "kill_chains.py"
    process = start_command(["--kills=4", "--seed=3"], program=script, figures=False)
    finish(process)
    assert "4 kills in 1 chains of 24 steps" in process.output
    assert "no sample lost, none repeated in the final weights" in process.output
