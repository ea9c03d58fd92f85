"""Fixtures of the tests of the commands."""

import os
import sys
from contextlib import contextmanager

import pytest
import torch

from segformer_pl.cli import main

_watched = {}  # path -> counts of a file whose reads are counted


def _hook(event, arguments):
    if event == "open" and _watched and isinstance(arguments[0], str | os.PathLike):
        counts = _watched.get(os.path.realpath(arguments[0]))
        if counts is not None:
            counts["opened"] += 1


sys.addaudithook(_hook)  # hooks cannot be removed, so it does nothing outside of reads_of


@pytest.fixture
def reads_of(monkeypatch):
    """Context manager that counts how often a file is opened, and the calls of torch.load."""

    @contextmanager
    def count(file):
        counts = {"opened": 0, "loaded": 0}
        original = torch.load

        def load(*arguments, **options):
            counts["loaded"] += 1
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", load)
            _watched[os.path.realpath(file)] = counts
            try:
                yield counts
            finally:
                _watched.clear()

    return count


@pytest.fixture
def run(capsys):
    """Function that runs a command and returns its output."""

    def call(*arguments):
        assert main([str(argument) for argument in arguments]) is None
        return capsys.readouterr().out

    return call
