"""Short names of networks in every place where a network is named, and what a typo suggests."""

import pytest
import yaml

from segformer_pl.cli.training import parser, resolve

TINY_DATA = ["--data.dataset=shapes", "--trainer.max_steps=2"]


def class_path(*arguments):
    """Class path and arguments of the network that `fit` would train."""
    network = parser("fit").parse_args(["fit", *TINY_DATA, *arguments]).fit.model.network
    return network.class_path.rpartition(".")[2], network.init_args


@pytest.mark.parametrize("form", ["=segformer_b1", ".class_path=segformer_b1"])
def test_the_command_line_takes_short_names(form):
    name, arguments = class_path(f"--model.network{form}", "--model.network.decoder_dim=24")
    assert name == "segformer_b1"
    assert arguments.decoder_dim == 24


@pytest.mark.parametrize(
    "network", ["setr_pup", {"class_path": "setr_pup", "init_args": {"image_size": 256}}]
)
def test_files_take_short_names(tmp_path, network):
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump({"model": {"network": network}}))
    name, arguments = class_path(f"--config={file}")
    assert name == "setr_pup"
    if isinstance(network, dict):
        assert arguments.image_size == 256
    # What is saved has the whole path, and is read again.
    settings = resolve([str(file)])
    assert settings["model"]["network"]["class_path"].startswith("segformer_pl.models.")


def test_another_network_on_the_command_line_replaces_that_of_a_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump({"model": {"network": {"class_path": "setr_pup"}}}))
    assert class_path(f"--config={file}", "--model.network=segformer_b0")[0] == "segformer_b0"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["fit", "--model.network=segfomer_b0"],
            "'segfomer_b0' (did you mean segformer_b0?); give",
        ),
        (["profile", "segfomer_b0"], "did you mean segformer_b0?); give an import path"),
        (["erf", "--model=setr_pop", "--data.dataset=shapes"], "did you mean setr_pup?); give"),
        (["predic", "--ckpt=x"], "there is no command 'predic' (did you mean predict?); give one"),
        (["vaildate"], "did you mean validate?"),
    ],
)
def test_a_typo_suggests_the_name(fail, capsys, arguments, sentence):
    assert sentence in fail(capsys, arguments)


def test_a_name_like_no_other_suggests_none(fail, capsys):
    assert "did you mean" not in fail(capsys, ["quux"])
    assert "did you mean" not in fail(capsys, ["fit", "--model.network=resnet.Wrong"])
