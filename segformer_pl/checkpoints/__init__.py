"""Weights from anywhere, and back again.

``files.py`` reads a file whole or not at all; ``sources.py`` reads tensors from files, folders and
the hub; ``facts.py`` compares what they mean; ``layouts.py`` knows every code base's names;
``loading.py`` puts tensors into a network; ``networks.py`` builds the network that weights are for;
``export.py`` writes a network in another code base's layout; ``training_state.py`` checks what a
training goes on from.
"""

from segformer_pl.checkpoints.export import ExportLayout, export_weights
from segformer_pl.checkpoints.facts import MatchClasses
from segformer_pl.checkpoints.files import (
    WeightsError,
    describe_non_finite,
    load_file,
    non_finite,
)
from segformer_pl.checkpoints.loading import LoadReport, load_weights
from segformer_pl.checkpoints.networks import load_network
from segformer_pl.checkpoints.sources import Weights, read_weights

__all__ = [
    "ExportLayout",
    "LoadReport",
    "MatchClasses",
    "Weights",
    "WeightsError",
    "describe_non_finite",
    "export_weights",
    "load_file",
    "load_network",
    "load_weights",
    "non_finite",
    "read_weights",
]
