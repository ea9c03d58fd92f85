"""Names of the commands' options, old and new."""

import inspect
import re

import pytest

from segformer_pl import models
from segformer_pl.checkpoints import export
from segformer_pl.cli import COMMANDS, TRAINING_COMMANDS, main
from segformer_pl.commands.options import convert
from segformer_pl.commands.options.networks import SEGMENTERS
from segformer_pl.commands.options.parser import OLD_SPELLINGS, current_spelling
from segformer_pl.commands.options.robustness import NUM_EVALUATIONS
from segformer_pl.commands.robustness import SETTINGS


def test_old_option_names_are_replaced_with_one_notice_each(capsys):
    old = ["x", "--data", "shapes", "--path=a-b/--path", "--num-images", "2", "--num_classes=3"]
    new = ["x", "--data.dataset", "shapes", "--data.path=a-b/--path", "--num_images", "2"]
    assert current_spelling(old) == [*new, "--num_classes=3"]
    assert capsys.readouterr().err.splitlines() == [
        "--data is now --data.dataset",
        "--path is now --data.path",
        "--num-images is now --num_images",
    ]


@pytest.mark.parametrize(
    ("arguments", "old", "sentence"),
    [
        (["profile", "segformer_b0", "--num-classes=0"], ["--num-classes"], "at least 1"),
        (
            ["erf", "--model=segformer_b0", "--data=shapes", "--path=nowhere", "--num-images=1"],
            ["--data", "--path", "--num-images"],
            "data.path: there is no folder 'nowhere'",
        ),
        (["erf", "--model=segformer_b0", "--batch-size=x"], ["--batch-size"], "batch_size"),
        (["robustness", "--ckpt=x", "--output=y", "--num-images=0"], ["--num-images"], "num_i"),
        (["robustness", "--ckpt=x", "--output=y", "--num-workers=-1"], ["--num-workers"], "num_w"),
        (["compare", "x", "y", "--block-size=0"], ["--block-size"], "block_size"),
    ],
)
def test_commands_accept_old_option_names_and_print_the_new(
    capsys, tmp_path, monkeypatch, arguments, old, sentence
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert lines[: len(old)] == [f"{option} is now {OLD_SPELLINGS[option]}" for option in old]
    assert sentence in " ".join([*lines[len(old) :], str(exit_.value.code)])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in TRAINING_COMMANDS])
def test_help_shows_only_new_option_names(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out)
    assert "--help" in options
    assert not [option for option in options if option in OLD_SPELLINGS or "-" in option[2:]]


def test_the_lists_in_the_help_are_those_of_the_package():
    """The options repeat names of modules that need torch."""
    functions = [
        name
        for name in models.__all__
        if inspect.isfunction(build := getattr(models, name))
        and "num_classes" in inspect.signature(build).parameters
    ]
    assert list(SEGMENTERS) == functions
    assert list(convert.LAYOUTS) == list(export.LAYOUTS)
    assert len(SETTINGS) == NUM_EVALUATIONS
