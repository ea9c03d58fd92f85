"""What the tests of the commands share."""

import os
import sys
from contextlib import contextmanager

import pytest
import torch

_watched = {}  # path -> counts, of the files whose reading is being counted


def _hook(event, arguments):
    if event == "open" and _watched and isinstance(arguments[0], str | os.PathLike):
        counts = _watched.get(os.path.realpath(arguments[0]))
        if counts is not None:
            counts["opened"] += 1


sys.addaudithook(_hook)  # for good, so it does nothing unless a test counts


@pytest.fixture
def reads_of(monkeypatch):
    """Context manager (file) -> how often it is opened, and anything loaded by torch."""

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
