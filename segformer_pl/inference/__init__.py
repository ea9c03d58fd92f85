"""Predict the class of every pixel of an image.

``protocol.py`` holds the settings of the test-time protocol, ``engine.py`` computes it, and
``predictor.py`` joins a network with its classes, normalisation and protocol in one object.
``graph.py`` turns a predictor into one graph, ``targets.py`` writes it for other runtimes, and
``exporting.py`` keeps a written file only if it predicts like the predictor.
"""

from segformer_pl.inference.engine import (
    PixelPredictions,
    predict_classes,
    predict_pixels,
    predict_probabilities,
    probability_bands,
)
from segformer_pl.inference.predictor import Predictor
from segformer_pl.inference.protocol import Inference

__all__ = [
    "Inference",
    "PixelPredictions",
    "Predictor",
    "predict_classes",
    "predict_pixels",
    "predict_probabilities",
    "probability_bands",
]
