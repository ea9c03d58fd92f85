"""Weights from anywhere, and back again.

- ``files.py`` reads a file whole or not at all;
- ``sources.py`` reads tensors from files, folders and the hub;
- ``facts.py`` compares what they mean;
- ``layouts.py`` knows the names of every code base;
- ``matching.py`` brings a source and a network under the same names;
- ``classifier.py`` gives a classifier other classes;
- ``loading.py`` puts tensors into a network, and ``report.py`` says what that did;
- ``networks.py`` builds the network that weights are for;
- ``export.py`` writes a network in another code base's layout;
- ``run_checkpoint.py`` reads the checkpoint of a run, and ``run_data.py`` opens its data;
- ``training_state.py`` checks what a training continues from.
"""

from segformer_pl.checkpoints.export import ExportLayout, export_weights
from segformer_pl.checkpoints.facts import MatchClasses
from segformer_pl.checkpoints.files import describe_non_finite, load_file, non_finite
from segformer_pl.checkpoints.loading import load_weights
from segformer_pl.checkpoints.networks import load_network
from segformer_pl.checkpoints.report import LoadReport
from segformer_pl.checkpoints.sources import Weights, read_weights

__all__ = [
    "ExportLayout",
    "LoadReport",
    "MatchClasses",
    "Weights",
    "describe_non_finite",
    "export_weights",
    "load_file",
    "load_network",
    "load_weights",
    "non_finite",
    "read_weights",
]
