"""A rank that raises, is killed or hangs ends the others with a sentence that names it."""

import json
import os
import pickle
import re
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from segformer_pl.callbacks import RankWatchdog
from segformer_pl.callbacks.hangs import describe_hang, position_of
from segformer_pl.callbacks.rank_status import RankStatus
from segformer_pl.data import shapes

RANK = r"rank {} \(process \d+ on \S+\)"


class Fault(pl.Callback):
    """Lets one rank fail in step 3."""

    def __init__(self, kind: str, rank: int):
        self.kind, self.rank = kind, rank

    def setup(self, trainer, module, stage):
        if self.kind == "loader" and trainer.global_rank == self.rank:
            data = trainer.datamodule
            data.train_transforms = HangingTransforms(data.train_transforms)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank != self.rank or trainer.global_step != 2:
            return
        if self.kind == "raise":
            raise ValueError("planted")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)


class HangingTransforms:
    """Transforms that never return after some samples."""

    def __init__(self, transforms):
        self.transforms, self.num_calls = transforms, 0

    def __call__(self, *arguments):
        self.num_calls += 1
        if self.num_calls > 6:
            time.sleep(1000)
        return self.transforms(*arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.generate(folder, {"train": 12, "validation": 2})
    return folder


@pytest.fixture
def arguments(folder, tmp_path):
    """Function (kind and rank of the fault, number of ranks, settings) -> arguments of ``fit``."""

    def make(kind, rank, devices, timeout=60, **settings):
        settings = {
            "model.network": "toy_segmenter.ToySegmenter",
            "data.path": folder,
            "data.batch_size": 2,
            "data.num_workers": 0,
            "data.crop_size": "[32,32]",
            "trainer.accelerator": "cpu",
            "trainer.devices": devices,
            "trainer.strategy": "ddp",
            "trainer.max_steps": 50,
            "trainer.limit_val_batches": 0,
            "trainer.log_every_n_steps": 1,
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "trainer.logger.save_dir": tmp_path / "runs",
            "last_checkpoint.every_n_train_steps": 1,
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        callbacks = [
            {"class_path": "test_watchdog.Fault", "init_args": {"kind": kind, "rank": rank}},
            {
                "class_path": "segformer_pl.callbacks.RankWatchdog",
                "init_args": {"timeout": timeout},
            },
        ]
        options = [f"--{key}={value}" for key, value in settings.items()]
        return ["fit", *options, *(f"--trainer.callbacks+={json.dumps(c)}" for c in callbacks)]

    return make


@pytest.fixture
def start(start_command, tmp_path):
    """Function that starts a command in the folder of the test, without figures."""
    return partial(start_command, folder=tmp_path, figures=False)


def sentence_and_command(output):
    """Return the one sentence of an error, and the command below it."""
    (match,) = re.finditer(r"^error: (.*); resume with\n(python -m .*)$", output, re.MULTILINE)
    return match[1], match[2]


def is_running(group):
    """Return whether a process of a group runs, other than one that its parent has not reaped."""
    states = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, _, process_group = file.read_text().rpartition(") ")[2].split()[:3]
            states += [state] * (int(process_group) == group)
    return any(state != "Z" for state in states)


@pytest.mark.slow
def test_a_rank_that_raises(start, arguments, tmp_path):
    """Started by Lightning, whose observer would kill rank 0 without a word."""
    strategy = {
        "class_path": "lightning.pytorch.strategies.DDPStrategy",
        "init_args": {"gradient_as_bucket_view": True, "static_graph": True, "timeout": "0:05:00"},
    }
    settings = {"trainer__strategy": json.dumps(strategy), "trainer__sync_batchnorm": "true"}
    command = start(arguments("raise", 1, 2, **settings))
    assert command.wait() == 1, command.output
    sentence, resume = sentence_and_command(command.output)
    assert re.fullmatch(
        RANK.format(1) + " failed in step 3: ValueError: planted; its own output has the traceback",
        sentence,
    )
    (last,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    assert resume.endswith(f"--ckpt_path={last}")
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert command.output.count("ValueError: planted\n") == 1
    assert "Connection closed" not in command.output
    assert "report: none" in command.output  # rank 0 was not killed
    # Lightning's DDPStrategy takes the options of DDP.
    (config,) = tmp_path.glob("runs/*/*/config.yaml")
    assert "static_graph: true" in config.read_text()
    plain = "trainer.sync_batchnorm: trains with plain BatchNorm, since torch synchronises it on "
    assert command.output.count(plain) == 1


@pytest.mark.slow
def test_a_rank_whose_data_loader_hangs(start, arguments):
    command = start(arguments("loader", 1, 2, timeout=3, data__num_workers=1))
    assert command.wait(60) == 1, command.output
    assert not is_running(command.pid)  # not even the worker
    sentence, _ = sentence_and_command(command.output)
    assert re.match(
        RANK.format(1)
        + r" is loading data in step \d \(_try_get_data, torch/utils/data/dataloader.py, line \d+\)"
        r" and has stood still there for \d s; .* wait for it: "
        + RANK.format(0)
        + r" is communicating in step \d \(\w+, torch/nn/parallel/distributed.py, line \d+\)$",
        sentence,
    )
    stack = re.search(RANK.format(1) + " stands still here:\n(.*)", command.output, re.DOTALL)[1]
    assert "_try_get_data" in stack


@pytest.mark.slow
def test_a_rank_that_is_killed(start, arguments, torchrun_environments):
    """Of three, each a process of its own, as under Slurm."""
    commands = [
        start(arguments("kill", 2, 3), **environment) for environment in torchrun_environments(3)
    ]
    assert [command.wait(60) for command in commands] == [1, 1, -signal.SIGKILL]
    sentence, _ = sentence_and_command(commands[0].output)
    assert re.match(RANK.format(2) + r" ended without a message in step \d, as if", sentence)
    assert "error: " not in commands[1].output  # once per machine
    assert "Traceback" not in "".join(command.output for command in commands)


@pytest.mark.slow
def test_torchrun_names_the_rank_that_failed_first(start, arguments):
    torchrun = ["--standalone", "--nproc-per-node=2", "-m", "segformer_pl"]
    command = start([*torchrun, *arguments("raise", 1, 2)], program="torch.distributed.run")
    assert command.wait() == 1
    sentence, _ = sentence_and_command(command.output)
    assert "ValueError: planted" in sentence
    cause = command.output.partition("Root Cause")[2]
    assert re.search(r"rank +: 1 .*ValueError: planted", cause, re.DOTALL)


def test_processes_can_be_spawned_with_it():
    assert pickle.loads(pickle.dumps(RankWatchdog(timeout=7))).timeout == 7


def test_where_a_thread_is():
    release = threading.Event()

    class Samples(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            release.wait(60)
            return 0

    def load():
        next(iter(torch.utils.data.DataLoader(Samples())))

    positions = {}
    for name, target in (("loading", load), ("computing", lambda: release.wait(60))):
        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        time.sleep(0.1)
        found = [position_of(sys._current_frames()[thread.ident]) for _ in range(2)]
        assert found[0].lines == found[1].lines  # it stands still
        positions[name] = found[0]
    release.set()
    assert positions["loading"].activity == "loading data"
    assert positions["loading"].where.startswith("__getitem__, ")
    assert "test_watchdog.py, line" in positions["loading"].where
    assert positions["computing"].activity == "computing"


@pytest.mark.parametrize(
    ("activities", "blamed"),
    [
        (["communicating", "loading data", "communicating"], (1,)),
        (["loading data", "computing", "communicating"], (0,)),
        (["communicating", "communicating", "computing"], (2,)),
        (["communicating", "communicating", "communicating"], ()),
        (["loading data", "loading data", "loading data"], ()),
    ],
)
def test_the_rank_to_blame_for_a_hang(activities, blamed):
    statuses = {
        rank: RankStatus(f"rank {rank}", 600.0 + rank, "in step 8", activity, "wait, a.py, line 1")
        for rank, activity in enumerate(activities)
    }
    failure = describe_hang(statuses)
    assert failure.ranks == blamed
    if blamed:
        first = (
            f"rank {blamed[0]} is {activities[blamed[0]]} in step 8 (wait, a.py, line 1) and has"
        )
        assert failure.sentence.startswith(first)
    else:
        assert failure.sentence.startswith("all ranks have stood still for 600 s: rank 0 is")
