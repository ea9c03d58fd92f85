"""From an image to one class per pixel.

``protocol.py`` holds the settings, ``engine.py`` computes, ``predictor.py`` puts a network and what
its predictions mean into one object.
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
