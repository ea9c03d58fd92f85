"""Names of the commands' options, old and new."""

import inspect
import re

import pytest

from segformer_pl import models
from segformer_pl.checkpoints import conversion
from segformer_pl.cli import COMMANDS, TRAINING_COMMANDS, main
from segformer_pl.commands.options import convert, export
from segformer_pl.commands.options.networks import SEGMENTERS
from segformer_pl.commands.options.parser import OLD_NAMES, current_names, with_underscores
from segformer_pl.commands.options.robustness import NUM_EVALUATIONS
from segformer_pl.commands.robustness import SETTINGS
from segformer_pl.inference import targets


def test_old_option_names_are_replaced_with_one_notice_each(capsys):
    old = ["x", "--data", "shapes", "--path=a-b/--path", "--num_images", "2"]
    new = ["x", "--data.dataset", "shapes", "--data.path=a-b/--path", "--num_images", "2"]
    assert current_names(old) == new
    assert capsys.readouterr().err.splitlines() == [
        "--data is now --data.dataset",
        "--path is now --data.path",
    ]


def test_hyphens_of_option_names_become_underscores_and_no_others():
    given = ["a-b", "--a-b.c-d=e-f", "--x-y", "z-w", "--l+=m-n", "-1", "--"]
    spelled = ["a-b", "--a_b.c_d=e-f", "--x_y", "z-w", "--l+=m-n", "-1", "--"]
    assert with_underscores(given) == spelled


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--trainer.max-steps=x"],
        ["validate", "--trainer.limit-val-batches=x"],
        ["test", "--data.num-workers=x"],
        ["doctor", "--data.batch-size=x"],
        ["ablate", "study.yaml", "--max-parallel=x"],
        ["arena", "study.yaml", "--num-images=x"],
        ["app", "--weights=a", "--server-port=x"],
        ["compare", "a", "b", "--block-size=x"],
        ["erf", "--batch-size=x"],
        ["predict", "--ckpt=a", "--input=b", "--output=c", "--inference.resize-to=x"],
        ["profile", "segformer_b0", "--decoder-dim=x"],
        ["robustness", "--ckpt=a", "--output=b", "--num-images=x"],
        ["scaling", "segformer_b0", "--global-batch=x"],
        ["test_time", "--ckpt=a", "--output=b", "--settings=c", "--num-images=x"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_accepts_hyphens_in_option_names(capsys, arguments):
    """The value is wrong, so that nothing runs: the error names the option as documented."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    error = capsys.readouterr().err + str(exit_.value.code)
    option = arguments[-1].partition("=")[0].removeprefix("--").replace("-", "_")
    assert option in error
    assert "unrecognized" not in error.lower()
    assert not re.search(r"'[\w.]*' (is not accepted|does not exist)", error)


@pytest.mark.parametrize(
    ("arguments", "old", "sentence"),
    [
        (
            ["erf", "--model=segformer_b0", "--data=shapes", "--path=nowhere", "--num-images=1"],
            ["--data", "--path"],
            "data.path: there is no folder 'nowhere'",
        ),
        (["robustness", "--ckpt=x", "--output=y", "--num-workers=-1"], ["--num_workers"], "num_w"),
    ],
)
def test_commands_accept_old_option_names_and_print_the_new(
    capsys, tmp_path, monkeypatch, arguments, old, sentence
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert lines[: len(old)] == [f"{option} is now {OLD_NAMES[option]}" for option in old]
    assert sentence in " ".join([*lines[len(old) :], str(exit_.value.code)])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in TRAINING_COMMANDS])
def test_help_shows_only_new_option_names(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out)
    assert "--help" in options
    assert not [option for option in options if option in OLD_NAMES or "-" in option[2:]]


# Command -> what the beginning of its help says
BEGINNINGS = {
    "fit": ("--config FILE", "Train a network", "--ckpt_path"),
    "validate": ("--config FILE", "on the validation split", "--ckpt_path"),
    "test": ("--config FILE", "on the test split", "--ckpt_path"),
    "doctor": ("[CONFIG]", "CONFIG is a YAML file of settings", "--json"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_that_of_the_command(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m segformer_pl {command} ")
    assert "%%" not in text
    assert "optimization routine" not in text  # of Lightning's docstring
    beginning = " ".join(" ".join(text.splitlines()[:30]).split())
    assert [part for part in BEGINNINGS.get(command, ()) if part not in beginning] == []


TARGETS = "torch-export, onnx, openvino or aoti"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("predict --weights W --input a.jpg", "--output is not given"),
        ("predict", "--input and --output are not given"),
        ("export", f"CKPT and --to are not given; --to takes {TARGETS}"),
        ("export CKPT", f"--to is not given; --to takes {TARGETS}"),
        ("convert", "SOURCE, DESTINATION and --to are not given; --to takes huggingface, nvlabs, "),
        ("push RUN", "REPOSITORY is not given"),
        ("compare", "RUN is not given"),
        ("recipe", "WHAT and SOURCES are not given; WHAT takes diff"),
        ("scaling segformer_b0", "--global_batch is not given"),
        ("test_time --ckpt CKPT", "--settings and --output are not given"),
    ],
)
def test_missing_arguments_are_named_as_they_are_written(fail, arguments, sentence):
    assert fail(*arguments.split()).startswith(f"error: {sentence}")


def test_the_lists_in_the_help_are_those_of_the_package():
    """The options repeat names of modules that need torch."""
    functions = [
        name
        for name in models.__all__
        if inspect.isfunction(build := getattr(models, name))
        and "num_classes" in inspect.signature(build).parameters
    ]
    assert list(SEGMENTERS) == functions
    assert list(convert.LAYOUTS) == list(conversion.LAYOUTS)
    assert list(export.TARGETS) == list(targets.TARGETS)
    assert len(SETTINGS) == NUM_EVALUATIONS
