"""State dicts as OpenMMLab's code bases name them."""

from segformer_pl.checkpoints.layouts import MMSEG, NVLABS, from_canonical
from segformer_pl.checkpoints.matching import canonical_tensors


def mmseg_state(encoder):
    """State dict of a backbone, with the shapes of mmsegmentation."""
    state, _ = from_canonical(MMSEG, "", canonical_tensors(encoder))
    return {
        key: tensor[..., None, None] if "ffn.layers" in key and key.endswith("0.weight") else tensor
        for key, tensor in state.items()
    }


def nvlabs_state(segmenter):
    """State dict of a segmenter in NVlabs' layout."""
    return from_canonical(NVLABS, "backbone.", canonical_tensors(segmenter))[0]
