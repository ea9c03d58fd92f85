"""The effective receptive field (ERF): which input pixels move an output unit (Luo et al. 2016).

For a unit y in the middle of a feature map, the ERF is |dy / dx| at every input pixel, summed over
the input channels and averaged over images. SegFormer's Figure 3 shows it for the four stages and
the head.

A unit has many channels, and one number must be made of them. A plain sum would be constant after
a LayerNorm, so its gradient would vanish; following RepLKNet's published procedure the channels
go through a ReLU first.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn


class FeatureNetwork(Protocol):
    """An ``nn.Module`` with named intermediates."""

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) -> name -> (B, C_i, H_i, W_i), in order."""
        ...

    def modules(self) -> Iterator[nn.Module]: ...


def effective_receptive_field(network: FeatureNetwork, images: Tensor) -> dict[str, Tensor]:
    """The ERF of the centre unit of every named feature map, averaged over the images.

    One forward pass serves all layers; each unit costs one backward pass through the part of the
    network below it. Runs in evaluation mode and leaves the network's mode, gradients and the
    random state as they were.

    Args:
        network: Module with ``feature_maps``.
        images: (B, C, H, W), normalised as in training.

    Returns:
        Layer name -> (H, W) map on the CPU, float32, not normalised.
    """
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        # Validation runs in inference mode, whose tensors cannot carry gradients.
        with torch.inference_mode(False), torch.enable_grad():
            inputs = images.detach().clone().float().requires_grad_()
            with torch.autocast(inputs.device.type, enabled=False):
                features = network.feature_maps(inputs)
            maps = {}
            for name, feature in features.items():
                row, column = feature.shape[2] // 2, feature.shape[3] // 2
                unit = feature[:, :, row, column].relu().sum()
                (gradient,) = torch.autograd.grad(unit, inputs, retain_graph=True)
                maps[name] = gradient.abs().sum(dim=1).mean(dim=0).cpu()
    finally:
        for module in training:
            module.training = True
    return maps


def area_share(erf: npt.NDArray[np.floating], energy: float) -> float:
    """Share of the picture that the strongest pixels with this share of the sum take up.

    0.5 for ``energy`` gives the smallest area that holds half of the gradient. Does not depend on
    the scale of the map.
    """
    ordered = np.sort(erf, axis=None)[::-1]
    cumulative = np.cumsum(ordered, dtype=np.float64)
    if cumulative[-1] == 0:
        return float("nan")
    return float(np.searchsorted(cumulative, energy * cumulative[-1]) + 1) / erf.size


def plot_erf(maps: dict[str, Tensor], subtitle: str) -> Figure:
    """One panel per layer, in the layout of the paper's Figure 3, each scaled to its maximum.

    Args:
        maps: Layer name -> (H, W).
        subtitle: What was measured: weights, images.
    """
    figure = Figure(figsize=(2.6 * len(maps) + 0.9, 3.3), layout="constrained")
    axes: Sequence = figure.subplots(1, len(maps), squeeze=False)[0]
    for axis, (name, erf) in zip(axes, maps.items()):
        values = erf.numpy()
        height, width = values.shape
        picture = axis.imshow(
            values / max(values.max(), np.finfo(np.float32).tiny),
            norm=LogNorm(1e-3, 1, clip=True),
            cmap="magma",
            extent=(-width / 2, width / 2, height / 2, -height / 2),
        )
        axis.set_title(
            f"{name}\nhalf of it in {100 * area_share(values, 0.5):.2g} % of the area",
            fontsize=9,
        )
        axis.set_xlabel("pixels right of the centre", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("pixels below the centre", fontsize=8)
    figure.colorbar(picture, ax=axes, label="|gradient| / maximum", shrink=0.8)
    figure.suptitle(f"Effective receptive field of the centre unit, {subtitle}", fontsize=10)
    return figure
