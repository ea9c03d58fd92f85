"""Shared fixtures: seed and threads, random parameters, small shards, command processes."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from io import BytesIO
from itertools import chain
from pathlib import Path

import platformdirs
import pytest
import torch


def pytest_configure():
    # On tensors this small, threads cost more time than they save. Fixtures of modules compute
    # before those of tests, and results depend on the number of threads.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # an earlier test may have changed it


@pytest.fixture(scope="session", autouse=True)
def _small_shapes(tmp_path_factory, worker_id):
    """Put few images of `shapes` into a cache folder of the tests, in place of all 6500.

    All tests and their processes find it by the environment. ``tests/data/test_shapes.py`` tests
    the generator.
    """
    from segformer_pl.data import shapes

    os.environ.setdefault("MPLCONFIGDIR", str(platformdirs.user_cache_path("matplotlib")))
    shared = tmp_path_factory.getbasetemp()
    shared = shared if worker_id == "master" else shared.parent
    os.environ["XDG_CACHE_HOME"] = str(shared / "cache")
    if not shapes.cache_folder().is_dir():
        shapes.generate(shapes.cache_folder(), {"train": 64, "validation": 32})


@pytest.fixture(scope="session")
def randomize():
    """Function module -> the same module in float64 with random parameters and buffers.

    A newly initialised network hides errors: with biases at 0, norm weights at 1 and initial
    running statistics, leaving one of them out changes nothing. Random matrices are scaled to
    preserve the variance of their input, so that softmax and norms do not saturate.
    """

    def fill(module):
        module.double()
        with torch.no_grad():
            for name, tensor in chain(module.named_parameters(), module.named_buffers()):
                if not tensor.is_floating_point():  # num_batches_tracked
                    continue
                if name.endswith("running_var"):
                    tensor.uniform_(0.5, 2.0)
                elif tensor.dim() > 1:
                    tensor.normal_(std=tensor[0].numel() ** -0.5)
                else:
                    tensor.normal_()
        return module

    return fill


@pytest.fixture(scope="session")
def png():
    """Function array -> cell of an ``Image`` column with the array as a PNG."""
    from PIL import Image

    def encode(array):
        buffer = BytesIO()
        Image.fromarray(array).save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    return encode


@pytest.fixture(scope="session")
def row(png):
    """Function (id, label value, (height, width)) -> row of a shard."""
    import numpy as np

    def make(name, label_value=1, size=(8, 8)):
        return {
            "image": png(np.zeros((*size, 3), np.uint8)),
            "label": png(np.full(size, label_value, np.uint8)),
            "id": name,
        }

    return make


@pytest.fixture(scope="session")
def write_shards():
    """Function that writes rows as Parquet shards with hub names, and returns the folder."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Image(), "id": datasets.Value("string")}
    )

    def write(folder, split, shards, row_group_size=4):
        folder.mkdir(exist_ok=True)
        for number, rows in enumerate(shards):
            pq.write_table(
                pa.Table.from_pylist(rows, schema=features.arrow_schema),
                folder / f"{split}-{number:05d}-of-{len(shards):05d}.parquet",
                row_group_size=row_group_size,
            )
        return folder

    return write


class Command:
    """A command line that runs in its own process; ``output`` is what it has printed."""

    def __init__(self, pid, log, status):
        self.pid, self.log, self._status = pid, log, status

    def wait(self, timeout=120):
        """Wait for the end of the process; return its exit status, negative for a signal."""
        deadline = time.monotonic() + timeout
        while (status := self._status(self.pid)) is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                pytest.fail(f"the command has not ended within {timeout} s:\n{self.output}")
            time.sleep(0.02)
        return status

    def wait_for(self, condition, timeout=120):
        """Wait until a condition holds; fail if the process ends before."""
        deadline = time.monotonic() + timeout
        while not condition():
            status = self._status(self.pid)
            if status is not None or time.monotonic() > deadline:
                pytest.fail(f"the command ended early or hangs, status {status}:\n{self.output}")
            time.sleep(0.02)

    @property
    def output(self):
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture(scope="session")
def fork_server(_small_shapes):
    """Function that sends a request to the fork server of all tests and returns the answer."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("fork_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    def request(job):
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield request
    server.terminate()  # a process that a test has left behind may keep the end of its input open
    server.wait()


@pytest.fixture
def start_command(request, fork_server, tmp_path_factory):
    """Function (arguments) that starts ``python -m segformer_pl`` and returns its Command.

    The command and its children can import callbacks from ``imports``, the folder of the test.
    ``program`` is another module, or the path of a script. ``forks=False`` lets the command start
    its own processes, if any, with a new interpreter each; ``figures=False`` leaves out those of a
    run and its report. What is still running at the end of the test is killed.
    """
    logs = tmp_path_factory.mktemp("commands")
    started = []

    def start(
        arguments,
        folder=logs,
        imports=None,
        largest_file=None,
        program="segformer_pl",
        forks=True,
        figures=True,
        **environment,
    ):
        log = logs / f"log{len(started)}"
        imports = str(imports or request.path.parent)
        job = {"command": [str(part) for part in (program, *arguments)], "folder": str(folder)}
        job |= {"log": str(log), "largest_file": largest_file}
        job |= {"forks": forks, "figures": figures}
        paths = os.pathsep.join([imports, str(Path(__file__).parents[1])])  # the root has `tests`
        job["environment"] = {"PYTHONPATH": paths} | environment
        started.append(fork_server(job))
        return Command(started[-1], log, lambda pid: fork_server({"wait": pid}))

    yield start
    for pid in started:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


@pytest.fixture
def without_figures(monkeypatch):
    """Leave out figures and reports of runs in this process, which have tests of their own."""
    from segformer_pl import callbacks

    monkeypatch.setattr(callbacks.report, "write_report", lambda run: "none")
    monkeypatch.setattr(callbacks.evaluation, "publish", lambda *_: None)


@pytest.fixture
def fail(capsys):
    """Function that runs a command that must fail and returns its error message."""
    from segformer_pl.cli import main  # heavy, and most tests do not need it

    def call(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        code = exit_.value.code
        message = code if isinstance(code, str) else capsys.readouterr().err
        assert code not in (0, None)
        assert message.startswith("error: ")
        assert "\n" not in message.rstrip("\n")
        return message

    return call
