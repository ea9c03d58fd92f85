"""Makes mmsegmentation 1.2.2 importable with current versions of torch and NumPy.

``make test-references`` installs it with mmcv-lite and mmengine, but without their dependencies.
The patches below replace what is missing or newer than these packages expect. They do not touch the
arithmetic that the tests compare.
"""

import importlib
import sys
import types
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.references)


class _Inert(type):
    """Metaclass of the stand-ins for compiled operators, which cannot be instantiated."""

    def __call__(cls, *arguments, **settings):
        raise NotImplementedError(f"{cls.__name__} stands in for a compiled operator of mmcv")


class _Operators(types.ModuleType):
    """Stand-in for ``mmcv.ops``, from which any name can be imported."""

    def __getattr__(self, name):
        if name.startswith("__"):  # looked up by the import system
            raise AttributeError(name)
        return _Inert(name, (), {})


def need(*packages):
    """Skip a test if a package is not installed. A broken installation fails."""
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed; `make test-references` installs it")


@pytest.fixture(scope="session")
def mmseg():
    """The package mmseg with all modules registered."""
    need("mmseg", "mmcv", "mmengine")
    # mmcv-lite lacks the compiled operators. Heads and losses that are not compared import them.
    sys.modules["mmcv.ops"] = _Operators("mmcv.ops")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the stand-ins and deprecated functions of torch
        importlib.import_module("mmseg.utils").register_all_modules(init_default_scope=True)
    return importlib.import_module("mmseg")


@pytest.fixture(scope="session")
def cityscapes_evaluation():
    """cityscapesscripts' module for pixel-level semantic labelling."""
    need("cityscapesscripts", "pyquaternion")
    return importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")


class Draws:
    """One stream of numbers in [0, 1) behind two interfaces for random numbers.

    The interfaces are NumPy's ``Generator``, which this project uses, and the functions of
    ``numpy.random``, which the reference uses. Each call takes the next number of the stream. So
    two pipelines get the same random numbers if, and only if, they draw in the same order::

        stream      0.31   0.77   0.05   ...
        ours        scale  row    column
        reference   scale  row    column
    """

    def __init__(self, seed):
        self.stream = np.random.default_rng(seed)
        self.count = 0

    def random(self):
        self.count += 1
        return self.stream.random()

    random_sample = random

    def uniform(self, low, high):
        return low + (high - low) * self.random()

    def integers(self, low, high=None):
        low, high = (0, low) if high is None else (low, high)
        return low + int(self.random() * (high - low))

    def randint(self, low, high=None):
        if high is None and low == 2:  # a coin flip, in this project `random() < 0.5`
            return int(self.random() < 0.5)
        return self.integers(low, high)

    def choice(self, options, p):
        return options[int(np.searchsorted(np.cumsum(p), self.random(), side="right"))]


@pytest.fixture
def draws():
    """The class :class:`Draws`."""
    return Draws


@pytest.fixture
def force_draws(monkeypatch):
    """Function Draws -> None that makes ``numpy.random`` use its numbers."""

    def force(draws):
        for name in ("random_sample", "uniform", "randint", "choice"):
            monkeypatch.setattr(np.random, name, getattr(draws, name))

    return force
