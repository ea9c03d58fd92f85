"""Published training recipes as data: one file for each system.

Every value cites its source: the paper, or where the paper does not state it, the released
configurations. ``experiments/recipes`` holds the same recipes as configurations for the command
line; a test checks that the two agree.
"""

from collections.abc import Mapping

from segformer_pl.analysis.recipes import deeplabv3plus, maskformer, segformer, semask, setr
from segformer_pl.analysis.recipes.settings import Recipe

# Function of segformer_pl.models that builds the network -> its recipes, which differ in their
# backbones.
RECIPES: Mapping[str, tuple[Recipe, ...]] = {
    **segformer.RECIPES,
    **setr.RECIPES,
    **maskformer.RECIPES,
    **semask.RECIPES,
    **deeplabv3plus.RECIPES,
}
