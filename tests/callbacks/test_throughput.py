"""Throughput of the ranks, in the log and in the run folder."""

import csv
import json
import time

import lightning.pytorch as pl
import pytest
from lightning.pytorch.profilers import SimpleProfiler
from torch.utils.data import DataLoader, Dataset

from segformer_pl.analysis.run import Run
from segformer_pl.callbacks import ThroughputRecord
from segformer_pl.callbacks.history import RunLogger
from segformer_pl.cli import main
from segformer_pl.data import shapes
from segformer_pl.task import SegmentationTask
from tests.small_task import NAMES, Tiny, make_trainer, samples
from tests.tiny_network import TINY_OPTION

DELAY = 0.05  # seconds; all else takes a few milliseconds


class Slow(Dataset):
    """Endless images that take their time."""

    def __init__(self, delay):
        self.delay, self.sample = delay, samples(1)[0]

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        time.sleep(self.delay)
        return self.sample


class SlowNetwork(Tiny):
    def __init__(self, delay):
        super().__init__()
        self.delay = delay

    def forward(self, images):
        time.sleep(self.delay)
        return super().forward(images)


def train(folder, data_delay=0.0, compute_delay=0.0, **arguments):
    task = SegmentationTask(SlowNetwork(compute_delay), NAMES, [[0, 0, 0]] * 3, warmup_steps=0)
    trainer = make_trainer(
        folder,
        logger=RunLogger(folder, name="", version="run"),
        log_every_n_steps=4,
        max_steps=12,
        use_distributed_sampler=False,
        callbacks=[ThroughputRecord()],
        **arguments,
    )
    trainer.fit(task, DataLoader(Slow(data_delay), batch_size=2), DataLoader(samples(2)))
    return trainer


@pytest.mark.slow
def test_the_rank_that_others_wait_for_is_named(on_ranks, tmp_path):
    ddp = {"devices": 2, "strategy": "ddp", "limit_val_batches": 0}

    def run(rank):
        train(tmp_path / "data", data_delay=DELAY * (rank == 1), **ddp)
        train(tmp_path / "compute", compute_delay=DELAY * (rank == 0), **ddp)

    assert on_ranks(run) == [None, None]
    data, compute = (Run(tmp_path / name / "run") for name in ("data", "compute"))
    for run in (data, compute):
        assert run.metrics["train/step_time"].step.tolist() == [4, 8, 12]
        assert run.metrics["train/loss"].step.tolist() == [4, 8, 12]
        assert run.throughput.last_step == 12
        assert [rank.batches for rank in run.throughput.ranks] == [11, 11]  # without the first
        assert [rank.images for rank in run.throughput.ranks] == [22, 22]
    # Two images of 50 ms each
    assert data.metrics["train/step_time"].last > 2 * DELAY
    assert data.metrics["train/data_wait"].last > 0.4
    assert data.throughput.ranks[0].data_wait < 0.3 < data.throughput.ranks[1].data_wait
    assert [s.partition(" longer")[0] for s in data.throughput.remarks()][:1] == [
        "Rank 1 waits for data"
    ]
    assert compute.throughput.ranks[0].forward_time > DELAY
    assert compute.throughput.ranks[1].forward_time < DELAY
    assert compute.throughput.remarks()[0].startswith("Rank 0 computes longer than the median")
    assert 0 < compute.metrics["train/images_per_second"].last < 4 / DELAY


def test_validations_and_the_batches_after_them_do_not_count(tmp_path):
    profiler = SimpleProfiler()
    trainer = train(tmp_path, val_check_interval=3, profiler=profiler)
    assert trainer.profiler is profiler
    assert any(action.endswith("train_dataloader_next") for action in profiler.recorded_durations)
    throughput = Run(tmp_path / "run").throughput
    assert len(throughput.ranks) == 1
    assert throughput.ranks[0].batches == 12 - 4  # 1, 4, 7 and 10


def test_accumulated_batches_make_one_step(tmp_path):
    limits = {"limit_val_batches": 0, "limit_train_batches": 48}
    train(tmp_path, accumulate_grad_batches=4, data_delay=0.005, **limits)
    run = Run(tmp_path / "run")
    assert run.metrics["train/step_time"].last > 4 * 2 * 0.005
    assert run.throughput.ranks[0].batches == 47


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == 4:
            raise KeyError("stop")


def test_the_profiler_is_given_back_after_an_error(tmp_path):
    task = SegmentationTask(Tiny(), NAMES, [[0, 0, 0]] * 3, warmup_steps=0)
    callbacks = [ThroughputRecord(), Stop()]
    trainer = make_trainer(tmp_path, max_steps=9, log_every_n_steps=2, callbacks=callbacks)
    before = trainer.profiler
    with pytest.raises(KeyError):
        trainer.fit(task, DataLoader(samples(9)))
    assert trainer.profiler is before
    assert not task._forward_pre_hooks


@pytest.mark.slow
def test_resumed_runs_record_their_own_part(tmp_path, without_figures, monkeypatch):
    shapes.generate(tmp_path / "shapes", {"train": 4, "validation": 1})
    settings = {
        "model.network": TINY_OPTION,
        "model.warmup_steps": 1,
        "data.path": tmp_path / "shapes",
        "data.batch_size": 1,
        "data.num_workers": 0,
        "data.crop_size": "[32,32]",
        "trainer.accelerator": "cpu",
        "trainer.limit_val_batches": 0,
        "trainer.log_every_n_steps": 2,
        "trainer.enable_progress_bar": "false",
        "trainer.logger.save_dir": tmp_path / "runs",
    }
    fit = ["fit", *(f"--{key}={value}" for key, value in settings.items())]
    main([*fit, "--trainer.max_steps=3"])
    (folder,) = (tmp_path / "runs").glob("*/version_0")
    assert Run(folder).throughput.last_step == 2
    last = f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    main([*fit, "--trainer.max_steps=8", last])
    throughput = Run(folder).throughput
    assert (throughput.first_step, throughput.last_step) == (3, 8)
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    logged = [row["step"] for row in rows if row["train/step_time"]]
    assert logged == ["1", "5", "7"]  # with the loss of the same steps: indices of steps 6 and 8
    assert all(row["train/loss"] for row in rows)
    assert json.loads((folder / "throughput.json").read_text())["accumulate"] == 1
