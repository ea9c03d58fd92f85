"""A small data set, and the record of an uninterrupted training on two ranks."""

import pytest

from segformer_pl.data import shapes
from tests.cluster.tiny_training import read_records, write_config


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.generate(folder, {"train": 50, "validation": 5})
    return folder


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("uninterrupted") / "run"


@pytest.fixture
def uninterrupted(data, whole_folder, start_command):
    """The record of each rank of an uninterrupted training."""
    if not whole_folder.is_dir():
        config = write_config(whole_folder, data)
        process = start_command(["fit", f"--config={config}", "--trainer.devices=2"], figures=False)
        assert process.wait(120) == 0, process.output
    return read_records(whole_folder, 2)
