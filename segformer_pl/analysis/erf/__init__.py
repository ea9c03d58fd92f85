"""The effective receptive field (ERF): which input pixels move an output unit.

``units.py`` says which units and how their channels become one number, ``taps.py`` catches feature
maps of any network, ``measure.py`` takes the gradients, ``moments.py`` averages them,
``result.py``, ``extent.py`` and ``jackknife.py`` turn maps into numbers with uncertainty and into
files, ``full_image.py`` gives the radius of every unit of a picture, ``plots.py`` draws.

SegFormer's Figure 3 and 6 show ERFs of stage 1 to 4 and the head; their code was never published
and the paper states neither unit nor reduction. Every result here carries its recipe.
"""

from segformer_pl.analysis.erf.full_image import RadiusMap, radius_map
from segformer_pl.analysis.erf.measure import NoFieldError, effective_receptive_field
from segformer_pl.analysis.erf.result import (
    ERF,
    Interval,
    LayerERF,
    load_erf,
    merge,
    weights_hash,
)
from segformer_pl.analysis.erf.units import ClassPixels, Grid

__all__ = [
    "ERF",
    "ClassPixels",
    "Grid",
    "Interval",
    "LayerERF",
    "NoFieldError",
    "RadiusMap",
    "effective_receptive_field",
    "load_erf",
    "merge",
    "radius_map",
    "weights_hash",
]
