"""Predict the class of every pixel of an image.

``protocol.py`` holds the settings of the test-time protocol, ``engine.py`` computes it, and
``predictor.py`` joins a network with its classes, normalisation and protocol in one object.
``graph.py`` turns a predictor into one graph, ``targets.py`` writes it for other runtimes, and
``exporting.py`` keeps a written file only if it predicts like the predictor.
"""

import importlib
from typing import TYPE_CHECKING, Any

from segformer_pl.inference.protocol import Inference

if TYPE_CHECKING:
    from segformer_pl.inference.engine import (
        PixelPredictions,
        predict_classes,
        predict_pixels,
        predict_probabilities,
        probability_bands,
    )
    from segformer_pl.inference.predictor import Predictor

__all__ = [
    "Inference",
    "PixelPredictions",
    "Predictor",
    "predict_classes",
    "predict_pixels",
    "predict_probabilities",
    "probability_bands",
]


def __getattr__(name: str) -> Any:
    # Only when it is used, because it imports torch, which the settings do without.
    if name in __all__:
        file = "predictor" if name == "Predictor" else "engine"
        return getattr(importlib.import_module(f"segformer_pl.inference.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
