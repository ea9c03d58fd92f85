"""The reach of every output unit of a picture at once.

The radius of a unit is here the root mean square distance, weighted with the squared gradient, of
the pixels that move it:

    radius_u^2 = sum_p |dy_u / dx_p|^2 d(u, p)^2 / sum_p |dy_u / dx_p|^2

because squares can be had without a backward pass for each unit. For random signs v over the
picture, (J v)_u^2 is in expectation the unit's sum of squared gradients; with signs that are
multiplied by the row or the column of their pixel it is the sum weighted with that coordinate
squared. So three directional derivatives (forward mode) give one unbiased draw of numerator and
denominator of all units together, whatever their number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from segformer_pl.analysis.erf.taps import (
    Layout,
    Taps,
    norms_of_the_batch,
    place_of,
    undisturbed,
)
from segformer_pl.analysis.erf.units import (
    Reduction,
    check_reduction,
    cuts_patches,
    place_of_unit,
    reduce_channels,
    refuse_sum_after_norm,
)

Method = Literal["vjp", "loop", "probe"]


@dataclass(frozen=True)
class RadiusMap:
    """Radius of the receptive field of each unit on a grid.

    Attributes:
        layer: Of the units.
        radius: (n, m), in pixels; nan where a unit has no gradient.
        standard_error: (n, m), of the estimate by random probes; zeros where it is exact.
        rows, columns: (n,) and (m,), pixel coordinates that distances are measured from: each
            unit's own place, :func:`~segformer_pl.analysis.erf.units.place_of_unit`; whole numbers
            where units lie on pixels.
        size: (height, width) of the picture.
    """

    layer: str
    radius: npt.NDArray[np.float64]
    standard_error: npt.NDArray[np.float64]
    rows: npt.NDArray[Any]
    columns: npt.NDArray[Any]
    size: tuple[int, int]


def radius_map(
    model: nn.Module,
    image: Tensor,
    layer: str,
    *,
    every: int = 1,
    method: Method = "vjp",
    reduction: Reduction = "relu",
    batch_size: int = 8,
    num_probes: int = 64,
    layout: Layout = "auto",
    seed: int = 0,
    probe_seed: int = 0,
    progress: bool = False,
) -> RadiusMap:
    """The ERF radius of every output unit on a grid, for one picture.

    Args:
        model: As for :func:`~segformer_pl.analysis.erf.effective_receptive_field`, and left alone
            likewise.
        image: (C, H, W) or (1, C, H, W), normalised as in training.
        layer: Name of one layer.
        every: Take every n-th unit in both directions, from the first.
        method: ``vjp``: exact, ``batch_size`` units in one batched vector-Jacobian product;
            ``loop``: exact, one unit after the other; ``probe``: estimated from ``num_probes``
            random directions for all units at once, with error bars.
        reduction: How a unit's channels become one number.
        batch_size: Units (``vjp``) or directions (``probe``, three for each probe) at a time;
            bounds the memory.
        num_probes: Random directions; the error falls with the root of their number.
        layout: Of a layer that is a module, where its shape leaves it open.
        seed: Of a random projection, as for ``effective_receptive_field``.
        probe_seed: Of the random directions; torch's own state is left alone.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: an argument or a layer that does not fit; one sentence says which.
    """
    check_reduction(reduction, "abs")
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}: give one of {', '.join(get_args(Method))}")
    if min(every, batch_size) < 1 or (method == "probe" and num_probes < 2):
        raise ValueError("every and batch_size: give at least 1; num_probes: at least 2")
    picture = image[None] if image.dim() == 3 else image
    if picture.dim() != 4 or len(picture) != 1:
        raise ValueError(f"image: give one picture (C, H, W), not shape {tuple(image.shape)}")
    if method == "probe" and (norms := norms_of_the_batch(model)):
        raise ValueError(
            f"{norms[0]!r} has no running statistics and normalises with those of the batch, so "
            "that probes change each other; take method='vjp'"
        )
    taps = Taps(model, [layer], layout)
    device, dtype = place_of(model, picture)
    # Fused attention has neither forward-mode nor batched gradients.
    with undisturbed(model, device), sdpa_kernel(SDPBackend.MATH):
        state = taps.state(dtype)
        inputs = picture.detach().clone().to(device, dtype)

        def units_of(pictures: Tensor) -> Tensor:
            """(B, C, H, W) -> (B, n, m), one number a unit."""
            feature = taps(pictures, state)[layer].permute(0, 2, 3, 1)
            return reduce_channels(feature[:, ::every, ::every], reduction, layer, seed)

        feature = taps(inputs.clone().requires_grad_(reduction == "sum"), state)[layer]
        if reduction == "sum":
            refuse_sum_after_norm(feature, layer)
        grid, size = (feature.shape[2], feature.shape[3]), (inputs.shape[2], inputs.shape[3])
        del feature
        rows, columns = _places(grid, size, every, cuts_patches(model))
        if method == "probe":
            places = (rows, columns)
            draws = _probes(units_of, inputs, places, num_probes, batch_size, probe_seed, progress)
            radius, error = _ratio(draws)
        else:
            radius = _exact(units_of, inputs, rows, columns, method, batch_size, progress)
            error = np.zeros_like(radius)
    return RadiusMap(layer, radius, error, rows, columns, size)


def _places(
    grid: tuple[int, int], size: tuple[int, int], every: int, in_patches: bool
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows and columns of every n-th unit; whole numbers where they lie on pixels."""
    rows = [place_of_unit((i, 0), size, grid, in_patches)[0] for i in range(0, grid[0], every)]
    columns = [place_of_unit((0, j), size, grid, in_patches)[1] for j in range(0, grid[1], every)]
    return np.array(rows), np.array(columns)


def _exact(
    units_of: Callable[[Tensor], Tensor],
    inputs: Tensor,
    rows: npt.NDArray[Any],
    columns: npt.NDArray[Any],
    method: Method,
    batch_size: int,
    progress: bool,
) -> npt.NDArray[np.float64]:
    inputs.requires_grad_()
    units = units_of(inputs)[0]
    flat = units.flatten()
    # One-hot rows, made in batches: together they would be as many as units squared.
    squared = []
    step = batch_size if method == "vjp" else 1
    for start in tqdm(range(0, len(flat), step), disable=not progress, leave=False):
        numbers = torch.arange(start, min(start + step, len(flat)), device=flat.device)
        if method == "vjp":
            cotangents = torch.zeros(len(numbers), len(flat), dtype=flat.dtype, device=flat.device)
            cotangents[torch.arange(len(numbers)), numbers] = 1
            (slopes,) = torch.autograd.grad(
                flat, inputs, cotangents, retain_graph=True, is_grads_batched=True
            )
            slopes = slopes[:, 0]
        else:
            (slopes,) = torch.autograd.grad(flat[start], inputs, retain_graph=True)
        squared.append(_moments(slopes.double().square().sum(1), rows, columns, numbers))
    total, distance = torch.cat(squared, 1).cpu().numpy().reshape(2, *units.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(np.where(total > 0, distance / total, np.nan))


def _moments(
    energy: Tensor, rows: npt.NDArray[Any], columns: npt.NDArray[Any], numbers: Tensor
) -> Tensor:
    """Squared gradients (k, H, W) of k units -> (2, k): their sum, and that times distance^2."""
    height, width = energy.shape[1:]
    at = numbers.cpu().numpy()
    unit_rows = torch.as_tensor(rows[at // len(columns)], device=energy.device)
    unit_columns = torch.as_tensor(columns[at % len(columns)], device=energy.device)
    down = torch.arange(height, device=energy.device) - unit_rows[:, None]
    right = torch.arange(width, device=energy.device) - unit_columns[:, None]
    along_rows, along_columns = energy.sum(2), energy.sum(1)
    distance = (along_rows * down**2).sum(1) + (along_columns * right**2).sum(1)
    return torch.stack([along_rows.sum(1), distance])


def _probes(
    units_of: Callable[[Tensor], Tensor],
    inputs: Tensor,
    places: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    num_probes: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> npt.NDArray[np.float64]:
    """(2, K, n, m): each probe's draw of the sum of squares, and of that times distance^2."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = places
    height, width = inputs.shape[2:]
    options: Any = {"dtype": inputs.dtype, "device": inputs.device}
    # From the middle and not from the corner, and in units of the picture: three numbers of one
    # size lose fewer digits to each other.
    scale = max(height, width)
    down = (torch.arange(height, **options) - height / 2)[:, None] / scale
    right = (torch.arange(width, **options) - width / 2) / scale
    unit_rows = (torch.as_tensor(rows, device=inputs.device)[:, None] - height / 2) / scale
    unit_columns = (torch.as_tensor(columns, device=inputs.device) - width / 2) / scale
    draws = []
    at_once = max(batch_size // 3, 1)
    for start in tqdm(range(0, num_probes, at_once), disable=not progress, leave=False):
        number = min(at_once, num_probes - start)
        shape = (number, *inputs.shape[1:])
        signs = (2.0 * torch.randint(0, 2, shape, generator=generator) - 1).to(inputs)
        tangents = torch.cat([signs, signs * down, signs * right])
        with torch.no_grad(), forward_ad.dual_level():
            primals = inputs.expand(len(tangents), -1, -1, -1).contiguous()
            slopes = forward_ad.unpack_dual(units_of(forward_ad.make_dual(primals, tangents)))
            plain, by_row, by_column = (slopes.tangent.double()).chunk(3)
        total = plain.square()
        distance = (by_row - unit_rows * plain).square()
        distance += (by_column - unit_columns * plain).square()
        draws.append(torch.stack([total, distance * scale**2]).cpu())
    return torch.cat(draws, 1).numpy()


def _ratio(
    draws: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Radius and its standard error from draws (2, K, n, m), by the jackknife.

    Both are taken on the logarithm of the mean square: its distribution is nearer to a normal one,
    and the ratio's bias is removed.
    """
    total, distance = draws
    num_probes = len(total)
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = np.log(distance.sum(0) / total.sum(0))
        without = np.log((distance.sum(0) - distance) / (total.sum(0) - total))
        unbiased = num_probes * whole - (num_probes - 1) * without.mean(0)
        variance = (num_probes - 1) * without.var(0)
        radius = np.exp(unbiased / 2)
        return radius, radius * np.sqrt(variance) / 2
