"""Read, load, translate and export weights.

- ``files.py`` reads a file of tensors and checks that it is intact; ``inert.py`` stands for the
  classes of NumPy and mmengine in it;
- ``state_dicts.py`` finds the state dict in a file, and the averaged copy beside it;
- ``sources.py`` reads tensors and their metadata from files, folders (``pretrained_folder.py``) and
  the hub;
- ``facts.py`` compares what a source states about classes and images with the run;
- ``layouts.py`` holds the key names of the published code bases;
- ``matching.py`` brings a source and a network to common keys;
- ``classifier.py`` reorders or re-initialises a classifier for other classes;
- ``loading.py`` copies tensors into a network; ``report.py`` describes the result;
- ``transplant.py`` loads weights into another variant, whose kernels have other sizes;
  ``changed_network.py`` builds a variant that needs no training;
- ``networks.py`` builds the network that weights belong to;
- ``conversion.py`` writes a network in the layout of another code base;
- ``run_checkpoint.py`` reads the checkpoint of a run; ``run_data.py`` opens its data;
- ``training_state.py`` checks the state that a training resumes from.
"""

from segformer_pl.checkpoints.conversion import ExportLayout, export_weights
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
