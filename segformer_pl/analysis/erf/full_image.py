"""The radius of the receptive field of every output unit of an image.

The radius of unit u is the root mean square distance d of the pixels p that influence it, weighted
with the squared gradient::

    radius_u^2 = sum_p |dy_u / dx_p|^2 d(u, p)^2 / sum_p |dy_u / dx_p|^2

With the Jacobian J (units x pixels) that is a ratio of two sums along each row of J. The exact
methods need one backward pass for each row. Sums of squares, unlike sums of magnitudes, can also be
estimated without backward passes: for random signs v over the pixels, the expected square of
(J v)_u is the sum of squares of row u, because products of different pixels cancel on average. For
a unit that two pixels influence, with gradients a and b::

    v       (J v)_u    squared
    + +      a + b     a^2 + 2 a b + b^2
    + -      a - b     a^2 - 2 a b + b^2
    mean               a^2         + b^2

With v multiplied by a coordinate of each pixel relative to the unit, r_p - r_u, the same gives the
sum weighted with (r_p - r_u)^2. It follows from two products that all units share:
J (v (r - r_u)) = J (v r) - r_u J v. So three directional derivatives in forward mode (v, v times
the row, v times the column) make one probe: an unbiased draw of numerator and denominator for all
units together, whatever their number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from segformer_pl.analysis.erf.feature_extractor import (
    AxisLayout,
    FeatureExtractor,
    batch_dependent_norms,
    device_and_dtype,
    measuring,
)
from segformer_pl.analysis.erf.units import (
    Reduction,
    check_reduction,
    cuts_patches,
    reduce_channels,
    refuse_sum_after_norm,
    unit_position,
)
from segformer_pl.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Method = Literal["vjp", "loop", "probe"]


@dataclass(frozen=True)
class RadiusMap:
    """Radius of the receptive field of each unit on a grid.

    Attributes:
        layer: Name of the layer.
        radius: (n, m), radii in pixels; nan where a unit has no gradient.
        standard_error: (n, m), error of the estimate by random probes; zeros if it is exact.
        rows: (n,), rows of the units in pixels, see
            :func:`~segformer_pl.analysis.erf.units.unit_position`.
        columns: (m,), columns of the units in pixels.
        size: Height and width of the image.
    """

    layer: str
    radius: npt.NDArray[np.float64]
    standard_error: npt.NDArray[np.float64]
    rows: npt.NDArray[Any]
    columns: npt.NDArray[Any]
    size: tuple[int, int]

    def __repr__(self) -> str:
        units = "{}x{} units".format(*self.radius.shape)
        known = self.radius[np.isfinite(self.radius)]
        radii = f"radii {known.min():.1f} to {known.max():.1f} px" if known.size else "no radius"
        image = "image of {}x{} pixels".format(*self.size)
        return f"RadiusMap({self.layer!r}, {units}, {radii}, {image})"

    def plot(self, image: npt.NDArray[np.floating] | None = None, title: str = "") -> "Figure":
        """Draw the radius of every unit, beside the image if it is given.

        Args:
            image: (H, W, 3) in 0 to 1.
            title: What was measured: weights, image.
        """
        # It imports this module, and matplotlib, which a measurement does not need.
        from segformer_pl.analysis.erf.plots import plot_radius_map

        return plot_radius_map(self, image, title)


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
    layout: AxisLayout = "auto",
    seed: int = 0,
    probe_seed: int = 0,
    progress: str | None = None,
) -> RadiusMap:
    """Return the ERF radius of every output unit on a grid, for one image.

    Args:
        model: Network, as for :func:`~segformer_pl.analysis.erf.effective_receptive_field`, and
            unchanged afterwards.
        image: (C, H, W) or (1, C, H, W), normalised as in training.
        layer: Name of one layer.
        every: Step between measured units, in both directions, from the first unit on.
        method: ``vjp``, exact, ``batch_size`` units in one batched vector-Jacobian product;
            ``loop``, exact, one unit after the other; ``probe``, estimated from ``num_probes``
            random directions for all units together, with error bars.
        reduction: How the channels of a unit become one number.
        batch_size: Units (``vjp``) or directions (``probe``, three for each probe) per pass;
            bounds the memory.
        num_probes: Number of probes; the error falls with its square root.
        layout: Order of the axes of a layer that is a module, where its shape leaves it open.
        seed: Seed of a random projection, as for ``effective_receptive_field``.
        probe_seed: Seed of the random directions; torch's random state does not change.
        progress: Label of a progress bar; none by default.

    Raises:
        UserError: An argument or the layer does not fit.
    """
    check_reduction(reduction, "abs")
    if method not in get_args(Method):
        raise UserError(f"method={method!r}: give one of {', '.join(get_args(Method))}")
    if min(every, batch_size) < 1 or (method == "probe" and num_probes < 2):
        raise UserError("every and batch_size: give at least 1; num_probes: at least 2")
    batch = image[None] if image.dim() == 3 else image
    if batch.dim() != 4 or len(batch) != 1:
        raise UserError(f"image: give one image (C, H, W), not shape {tuple(image.shape)}")
    if method == "probe" and (norms := batch_dependent_norms(model)):
        raise UserError(
            f"{norms[0]!r} has no running statistics and normalises with those of the batch, so "
            "that probes influence each other; take method='vjp'"
        )
    extractor = FeatureExtractor(model, [layer], layout)
    device, dtype = device_and_dtype(model, batch)
    # Fused attention has neither forward-mode nor batched gradients.
    with measuring(model, device), sdpa_kernel(SDPBackend.MATH):
        state = extractor.state(dtype)
        inputs = batch.detach().clone().to(device, dtype)

        def units_of(images: Tensor) -> Tensor:
            """(B, C, H, W) -> (B, n, m), one number per unit."""
            feature = extractor(images, state)[layer].permute(0, 2, 3, 1)
            return reduce_channels(feature[:, ::every, ::every], reduction, layer, seed)

        feature = extractor(inputs.clone().requires_grad_(reduction == "sum"), state)[layer]
        if reduction == "sum":
            refuse_sum_after_norm(feature, layer)
        grid, size = (feature.shape[2], feature.shape[3]), (inputs.shape[2], inputs.shape[3])
        del feature
        rows, columns = _grid_positions(grid, size, every, cuts_patches(model))
        if method == "probe":
            draws = _probes(
                units_of, inputs, rows, columns, num_probes, batch_size, probe_seed, progress
            )
            radius, error = _radius_of_draws(draws)
        else:
            radius = _exact(units_of, inputs, rows, columns, method, batch_size, progress)
            error = np.zeros_like(radius)
    return RadiusMap(layer, radius, error, rows, columns, size)


def _grid_positions(
    grid: tuple[int, int], size: tuple[int, int], every: int, in_patches: bool
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return rows and columns, in pixels, of every n-th unit."""
    rows = [unit_position((i, 0), size, grid, in_patches)[0] for i in range(0, grid[0], every)]
    columns = [unit_position((0, j), size, grid, in_patches)[1] for j in range(0, grid[1], every)]
    return np.array(rows), np.array(columns)


def _exact(
    units_of: Callable[[Tensor], Tensor],
    inputs: Tensor,
    rows: npt.NDArray[Any],
    columns: npt.NDArray[Any],
    method: Method,
    batch_size: int,
    progress: str | None,
) -> npt.NDArray[np.float64]:
    """Return radii (n, m), one row of the Jacobian after the other."""
    inputs.requires_grad_()
    units = units_of(inputs)[0]
    flat = units.flatten()
    # Make the one-hot cotangents in batches: all of them would be a matrix of units x units.
    squared = []
    step = batch_size if method == "vjp" else 1
    bar = _progress(len(flat), "unit", progress)
    for start in range(0, len(flat), step):
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
        bar.update(len(numbers))
    bar.close()
    total, distance = torch.cat(squared, 1).cpu().numpy().reshape(2, *units.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(np.where(total > 0, distance / total, np.nan))


def _progress(total: int, unit: str, label: str | None) -> "tqdm[Any]":
    return tqdm(total=total, desc=label, unit=unit, disable=label is None, leave=False)


def _moments(
    energy: Tensor, rows: npt.NDArray[Any], columns: npt.NDArray[Any], numbers: Tensor
) -> Tensor:
    """Squared gradients (k, H, W) of k units -> (2, k), their sum and their second moment.

    The second moment about the unit separates into rows and columns, so that the gradients are
    summed along either axis first.
    """
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
    rows: npt.NDArray[Any],
    columns: npt.NDArray[Any],
    num_probes: int,
    batch_size: int,
    seed: int,
    progress: str | None,
) -> npt.NDArray[np.float64]:
    """Return (2, K, n, m), draws by K probes of the sum of squares and of the second moment."""
    generator = torch.Generator().manual_seed(seed)
    height, width = inputs.shape[2:]
    options: Any = {"dtype": inputs.dtype, "device": inputs.device}
    # Count from the middle of the image and in units of its longer side: the three derivatives
    # then have one magnitude, and their differences lose fewer digits.
    scale = max(height, width)
    down = (torch.arange(height, **options) - height / 2)[:, None] / scale
    right = (torch.arange(width, **options) - width / 2) / scale
    unit_rows = (torch.as_tensor(rows, device=inputs.device)[:, None] - height / 2) / scale
    unit_columns = (torch.as_tensor(columns, device=inputs.device) - width / 2) / scale
    draws = []
    at_once = max(batch_size // 3, 1)
    bar = _progress(num_probes, "probe", progress)
    for start in range(0, num_probes, at_once):
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
        bar.update(number)
    bar.close()
    return torch.cat(draws, 1).numpy()


def _radius_of_draws(
    draws: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the radius and its standard error from draws (2, K, n, m), by the jackknife.

    It works on the logarithm of the squared radius, whose distribution is closer to a normal one,
    and removes the bias of a ratio of two estimates.
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
