"""Fixtures of the tests of callbacks: the command of a short training, and code on ranks."""

import pickle
import socket
from pathlib import Path

import cloudpickle
import pytest

from segformer_pl.data import shapes
from tests.tiny_network import TINY_OPTION

PROGRAM = Path(__file__).with_name("run_on_rank.py")


@pytest.fixture
def fit(tmp_path):
    shapes.generate(tmp_path / "shapes", {"train": 4, "validation": 1})
    settings = {
        "model.network": TINY_OPTION,
        "data.path": tmp_path / "shapes",
        "data.batch_size": 2,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.logger.save_dir": tmp_path / "runs",
        "last_checkpoint.dirpath": tmp_path / "checkpoints",
        "last_checkpoint.every_n_train_steps": 1,
    }
    return ["fit", *(f"--{key}={value}" for key, value in settings.items())]


@pytest.fixture(scope="session")
def torchrun_environments():
    """Function (world size) -> environment variables that torchrun sets, by rank."""

    def environments(world_size):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
        shared |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        shared |= {"TORCHELASTIC_RUN_ID": "1"}
        return [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(world_size)]

    return environments


@pytest.fixture
def on_ranks(torchrun_environments, start_command, tmp_path):
    """Function (function, world size) -> what the function returns on each rank, in processes.

    The trainers in these processes belong to one process group. If the function raises, the result
    is the exception's text.
    """

    def call(function, world_size=2, timeout=120):
        folder = tmp_path / "ranks"
        folder.mkdir()
        pickled = folder / "function"
        pickled.write_bytes(cloudpickle.dumps(function))  # pickle takes no function in a function
        files = [folder / str(rank) for rank in range(world_size)]
        processes = [
            start_command([pickled, rank, files[rank]], program=PROGRAM, **environment)
            for rank, environment in enumerate(torchrun_environments(world_size))
        ]
        for process, file in zip(processes, files):
            process.wait(timeout)
            assert file.exists(), process.output[-3000:]
        return [pickle.loads(file.read_bytes()) for file in files]

    return call
