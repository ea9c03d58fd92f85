"""The command ``recipe diff``: files, run folders, refusals."""

from functools import partial
from pathlib import Path

import pytest
import yaml

from segformer_pl.analysis.run import resumed_config_name
from segformer_pl.cli import main
from segformer_pl.commands import recipe
from segformer_pl.commands.options.recipe import parse

RECIPES = Path(__file__).parents[2] / "experiments" / "recipes"
BASE, DELTA = RECIPES / "ade20k.yaml", RECIPES / "segformer_b0_ade20k_512_160k.yaml"


@pytest.fixture
def diff(capsys):
    """Function that runs ``recipe diff`` and returns the printed lines."""

    def call(*sources):
        assert main(["recipe", "diff", *map(str, sources)]) is None
        return capsys.readouterr().out.splitlines()

    return call


@pytest.fixture
def fail(fail):
    """Function that runs ``recipe`` with arguments that must fail and returns the message."""
    return partial(fail, "recipe")


@pytest.mark.slow
def test_files_are_merged_as_the_command_line_merges_them(diff, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "model: {encoder_weights: mit_b0.pth, lr: 1.0e-4}\ntrainer: {devices: auto}\n"
    )
    lines = diff(BASE, DELTA, tmp_path / "mine.yaml")
    assert lines[0] == "Compared with the paper's recipe for SegFormer-B0 on ADE20K."
    assert lines[1].split() == ["setting", "paper", "here", "source"]
    assert lines[2].split()[:3] == ["model.lr", "6e-05", "0.0001"]
    assert lines[3].startswith("data.batch_size  16 samples per step  batch_size 2 x devices auto")
    assert lines[4] == "2 departures; independent of the settings:"
    assert all(line.startswith("- ") for line in lines[5:])


def test_the_file_of_a_run_folder_is_not_completed_with_todays_defaults(tmp_path, capsys):
    resolved = []

    def resolve(files):
        resolved.append(files)
        return yaml.safe_load(Path(files[0]).read_text())

    run = tmp_path / "version_0"
    run.mkdir()
    network = {"class_path": "segformer_pl.models.segformer_b0"}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"network": network, "lr": 1e-3}}))
    recipe.run(parse(["diff", str(run)]), resolve)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model.lr", "6e-05", "0.001"] in [line[:3] for line in lines]
    # The version that trained this run did not have the setting, and may have behaved differently.
    assert ["model.schedule", "paper", "not", "stated"] in [line[:4] for line in lines]
    assert resolved == []
    # With another file the settings are those of a new run, completed by the command line.
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {lr: 1.0}\n")
    recipe.run(parse(["diff", str(run), str(mine)]), resolve)
    assert resolved == [[str(run / "config.yaml"), str(mine)]]


@pytest.mark.slow
def test_bad_input_gets_one_sentence(fail, tmp_path):
    assert f"'{tmp_path}' contains no config.yaml; give the folder of one run" in fail(
        "diff", tmp_path
    )
    assert "nowhere.yaml" in fail("diff", tmp_path / "nowhere.yaml")
    (tmp_path / "config.yaml").write_text("a: !!python/object:os.path {}\n")
    assert "config.yaml' cannot be read as YAML" in fail("diff", tmp_path)
    (tmp_path / "config.yaml").write_text("just words\n")
    assert "does not hold the settings of a run" in fail("diff", tmp_path)
    (tmp_path / "mine.yaml").write_text("model: {learning_rate: 0.1}\n")
    assert "learning_rate" in fail("diff", BASE, DELTA, tmp_path / "mine.yaml")
    assert "invalid choice: 'differences'" in fail("differences", BASE)
    assert "SOURCES is not given" in fail("diff")


TOY = """
from torch import nn

from segformer_pl.models.segmenter import Segmenter


class ToySegmenter(Segmenter):
    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, num_classes, 3, stride=4)

    def forward(self, images):
        return self.layer(images)

    def feature_maps(self, images):
        return {"images": images}

    def init_args(self):
        return {"num_classes": self.layer.out_channels}
"""


@pytest.mark.slow
def test_a_network_that_is_not_in_the_paper_has_no_recipe(diff, tmp_path, monkeypatch):
    (tmp_path / "toy_of_recipe.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    toy = {"class_path": "toy_of_recipe.ToySegmenter", "init_args": {"width": 4}}
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"model": {"network": toy}, "data": {"dataset": "ade20k"}}))
    sentence = (
        "The network is toy_of_recipe.ToySegmenter: there is no published recipe for it, "
        "nothing is compared."
    )
    assert diff(mine) == [sentence]
    run = tmp_path / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(mine.read_text())
    assert diff(run) == [sentence]
    (run / "checkpoints" / "last.ckpt").touch()
    assert diff(run / "checkpoints" / "last.ckpt") == [sentence]
    encoder = {"class_path": "segformer_pl.models.MixTransformer"}
    custom = {"class_path": "segformer_pl.models.SegFormer", "init_args": {"encoder": encoder}}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"network": custom}}))
    assert diff(run) == [sentence.replace("toy_of_recipe.ToySegmenter", custom["class_path"])]


def test_a_checkpoint_outside_of_a_run_folder_is_refused(fail, tmp_path):
    file = tmp_path / "last.ckpt"
    file.write_bytes(b"PK\x03\x04\x80\xff")
    message = fail("diff", file)
    assert f"'{file}', line 1: not UTF-8 text (byte 0x80); give" in message
    assert "a checkpoint in one" in message
    assert "nowhere.ckpt" in fail("diff", tmp_path / "checkpoints" / "nowhere.ckpt")


def test_a_resumed_run_is_compared_with_its_last_settings(diff, tmp_path):
    network = {"class_path": "segformer_pl.models.segformer_b0"}
    for name, lr in (("config.yaml", 1e-3), (resumed_config_name(400), 5e-4)):
        (tmp_path / name).write_text(yaml.safe_dump({"model": {"network": network, "lr": lr}}))
    assert ["model.lr", "6e-05", "0.0005"] in [line.split()[:3] for line in diff(tmp_path)]
