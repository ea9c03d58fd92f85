"""The effective receptive field (ERF): which input pixels influence an output unit::

    measure.py            images -> ERF, one map per layer
      units.py            which units, and how their channels become one number
      feature_extractor.py  feature maps of any network
      head_units.py       single units of SegFormer's feature maps, without running the head
      moments.py          running mean and variance of the maps
    result.py, layer.py   ERF and LayerERF: numbers, files
      extent.py           radii, areas and shape of one map
      jackknife.py        bias-corrected estimates and confidence intervals
    full_image.py         image -> radius of every unit
    exploration.py        image -> receptive fields of many units, for a page
    plots.py              figures
      panels.py           axes, colour bars and legends of a figure
      captions.py         text of a figure
    definitions.py        definitions in use, their numbers, published protocols
    backbones.py          networks of timm, for comparison

SegFormer's Figures 3 and 6 show the ERF of stage 1 to 4 and of the head. The authors' code for them
was never published, and the paper states neither unit nor reduction. So every result here carries
its settings.
"""

from segformer_pl.analysis.erf.exploration import Exploration, explore
from segformer_pl.analysis.erf.full_image import RadiusMap, radius_map
from segformer_pl.analysis.erf.jackknife import Interval
from segformer_pl.analysis.erf.layer import LayerERF
from segformer_pl.analysis.erf.measure import NoFieldError, effective_receptive_field
from segformer_pl.analysis.erf.result import ERF, load_erf, merge, weights_hash
from segformer_pl.analysis.erf.units import ClassUnits, Grid

__all__ = [
    "ERF",
    "ClassUnits",
    "Exploration",
    "Grid",
    "Interval",
    "LayerERF",
    "NoFieldError",
    "RadiusMap",
    "effective_receptive_field",
    "explore",
    "load_erf",
    "merge",
    "radius_map",
    "weights_hash",
]
