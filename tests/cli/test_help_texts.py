"""The stored help is that of the parsers, and is shown without torch."""

import subprocess
import sys

import pytest

from segformer_pl.cli import TRAINING_COMMANDS
from segformer_pl.cli.help_texts import build_help, stored_help

PROGRAM = """
import sys
from segformer_pl.cli import main
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "lightning"} & set(sys.modules)
"""


@pytest.mark.parametrize("command", TRAINING_COMMANDS)
def test_the_stored_help_is_that_of_the_parser(command):
    """Write it again after a change, see ``help_texts.py``."""
    assert stored_help(command) == build_help(command)


def test_the_help_of_another_version_is_built(monkeypatch):
    monkeypatch.setattr("segformer_pl.cli.help_texts.version", lambda package: "0.0.1")
    assert stored_help("fit") is None


@pytest.mark.parametrize("command", TRAINING_COMMANDS)
def test_help_needs_no_torch(command):
    arguments = [sys.executable, "-c", PROGRAM, command, "--help"]
    shown = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert f"python -m segformer_pl {command} " in shown
    assert "--data.dataset" in shown
