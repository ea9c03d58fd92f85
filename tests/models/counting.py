"""Count what a network executes, without values."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def without_norms():
    """Leave out the norms, which count nothing but take half of the time on the meta device."""
    with pytest.MonkeyPatch.context() as patch:
        for norm in ("batch_norm", "layer_norm"):
            patch.setattr(F, norm, lambda features, *arguments, **others: features)
        yield


def executed_gmacs(network, size, run=None):
    """Return the multiply-adds, in billions, of an image in evaluation mode.

    Args:
        network: Network on the meta device, whose mode changes.
        size: Height and width of the image in pixels.
        run: Function of the images (1, 3, H, W) that is counted. Default: the network's forward.
    """
    images = torch.empty(1, 3, *size, device="meta")
    network.eval()
    with without_norms(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        (run or network)(images)
    return counter.get_total_flops() / 2e9
