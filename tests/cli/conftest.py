"""Fixtures of the tests of the command line: a small data set, options, a failing command."""

import pytest

from segformer_pl.ablation import costs
from segformer_pl.cli import main
from segformer_pl.data import shapes
from tests.tiny_network import TINY_OPTION

NETWORK = ["--model.network", TINY_OPTION]


@pytest.fixture(autouse=True)
def _short_latency_measurements(monkeypatch):
    """Measure latencies in a few rounds, in each plan and report of a study; see fork_server.py."""
    monkeypatch.setattr(costs, "MIN_SECONDS", 0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.generate(folder, {"train": 8, "validation": 4})
    return folder


@pytest.fixture(scope="session")
def options():
    """Function (data folder, folder of runs, changes ...) -> options of a short training."""

    def call(folder, runs, **changes):
        settings = {
            "data.path": folder,
            "data.batch_size": 2,
            "data.num_workers": 0,
            "trainer.accelerator": "cpu",
            "trainer.max_steps": 2,
            "trainer.val_check_interval": 2,
            "trainer.num_sanity_val_steps": 0,
            "trainer.log_every_n_steps": 1,
            "trainer.enable_progress_bar": "false",
            "trainer.logger.save_dir": runs,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return [*NETWORK, *(f"--{key}={value}" for key, value in settings.items())]

    return call


@pytest.fixture(scope="session")
def fail():
    """Function (capsys, arguments) that runs a command that must fail; -> its message."""

    def call(capsys, arguments):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        error = capsys.readouterr().err
        if isinstance(exit_.value.code, str):  # printed by the interpreter at exit, with status 1
            return exit_.value.code
        assert exit_.value.code not in (0, None)
        assert "Traceback" not in error
        return error

    return call
