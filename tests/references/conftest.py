"""mmsegmentation 1.2.2 made importable beside the present torch and NumPy.

``make test-references`` installs it with mmcv-lite and mmengine, but without their dependencies.
What is patched here is missing or newer than they expect; no arithmetic that the tests compare is
touched.
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
    """Type of the stand-ins for compiled operators: classes that cannot be used."""

    def __call__(cls, *arguments, **settings):
        raise NotImplementedError(f"{cls.__name__} stands in for a compiled operator of mmcv")


class _Operators(types.ModuleType):
    """``mmcv.ops``: any name can be imported from it."""

    def __getattr__(self, name):
        if name.startswith("__"):  # asked for by the import system
            raise AttributeError(name)
        return _Inert(name, (), {})


def need(*packages):
    """Skip where a package is not installed; one that is installed and broken fails."""
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed; `make test-references` installs it")


@pytest.fixture(scope="session")
def mmseg():
    """The package, with its registries filled."""
    need("mmseg", "mmcv", "mmengine")
    # mmcv-lite has no compiled operators; some heads and losses that are not compared name them.
    sys.modules["mmcv.ops"] = _Operators("mmcv.ops")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the stand-ins, and of what torch has deprecated
        importlib.import_module("mmseg.utils").register_all_modules(init_default_scope=True)
    return importlib.import_module("mmseg")


@pytest.fixture(scope="session")
def cityscapes_evaluation():
    """cityscapesscripts' module for pixel-level semantic labelling."""
    need("cityscapesscripts", "pyquaternion")
    return importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")


class Draws:
    """One stream of numbers in [0, 1) behind both ways of drawing: NumPy's generator, which this
    project uses, and the module ``numpy.random``, which the reference uses.

    Every call of either takes the next number of the stream, so that two pipelines that draw for
    the same purposes in the same order draw the same, and two that do not come apart.
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
        if high is None and low == 2:  # a coin, which `random() < 0.5` is in this project
            return int(self.random() < 0.5)
        return self.integers(low, high)

    def choice(self, options, p):
        return options[int(np.searchsorted(np.cumsum(p), self.random(), side="right"))]


@pytest.fixture
def draws():
    """The class."""
    return Draws


@pytest.fixture
def force_draws(monkeypatch):
    """Function Draws -> None: ``numpy.random`` takes its numbers from them."""

    def force(draws):
        for name in ("random_sample", "uniform", "randint", "choice"):
            monkeypatch.setattr(np.random, name, getattr(draws, name))

    return force
