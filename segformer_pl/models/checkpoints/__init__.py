"""Weights from anywhere, and back again.

``sources.py`` reads tensors from files, folders and the hub; ``layouts.py`` knows every code
base's names; ``loading.py`` puts tensors into a network; ``networks.py`` builds the network that
weights are for; ``export.py`` writes a network in another code base's layout.
"""

from segformer_pl.models.checkpoints.export import ExportLayout, export_weights
from segformer_pl.models.checkpoints.loading import LoadReport, load_weights
from segformer_pl.models.checkpoints.networks import load_network
from segformer_pl.models.checkpoints.sources import Weights, WeightsError, read_weights

__all__ = [
    "ExportLayout",
    "LoadReport",
    "Weights",
    "WeightsError",
    "export_weights",
    "load_network",
    "load_weights",
    "read_weights",
]
