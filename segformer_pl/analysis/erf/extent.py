"""How far a receptive field reaches: numbers from one map.

A map is (H, W) and not negative. ``center`` is the position (row, column) of the measured unit,
which may lie between pixels; it defaults to (H // 2, W // 2). Lengths are in pixels of the image.
All numbers except :func:`square_area_ratio` are the same for a map and for a multiple of it. A map
without any gradient gives nan.
"""

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from segformer_pl.analysis.erf.units import Position
from segformer_pl.errors import UserError

ERFMap = npt.NDArray[np.floating]  # (H, W)
AreaDefinition = Literal["smallest", "square", "replknet"]


def smallest_area_ratio(erf: ERFMap, share: float) -> float:
    """Return the area, as a share of the image, of the strongest pixels that hold ``share``.

    Share 0.5 gives the smallest area that holds half of the gradient, wherever it lies. Of the
    weakest of these pixels only a part may be needed: of the map [4, 3, 2, 1], with sum 10, a share
    of 0.55 takes the first pixel and half of the second.

    Noise makes the strongest pixels stronger, so the area of a mean over few images is smaller than
    over many. Compare areas over equal numbers of images, or use the bias-corrected value of
    :meth:`LayerERF.interval`.
    """
    ordered = np.sort(erf, axis=None)[::-1]
    cumulative = np.cumsum(ordered, dtype=np.float64)
    if not cumulative[-1] > 0:
        return math.nan
    wanted = share * cumulative[-1]
    whole = min(int(np.searchsorted(cumulative, wanted)), erf.size - 1)
    before = cumulative[whole - 1] if whole else 0.0
    part = (wanted - before) / (cumulative[whole] - before)
    return float(min(whole + part, erf.size)) / erf.size


def square_area_ratio(erf: ERFMap, share: float, center: Position | None = None) -> float:
    """Return RepLKNet's high-contribution area ratio (Ding et al. 2022).

    It is the area, as a share of the image, of the smallest square about ``center`` that holds more
    than ``share`` of the sum of log10(1 + map). The side is 3, 5, 7, ... pixels, or 2, 4, 6, ...
    where ``center`` lies between pixels::

        . . . . .
        . o o o .     side 3 about the pixel x; the next square is the whole
        . o x o .
        . o o o .
        . . . . .

    RepLKNet's published script always takes the square about pixel (H // 2, W // 2), whichever unit
    it measured. With the default ``center`` this function returns the script's ratio on square
    maps. About the position of the unit the ratio differs wherever that is another pixel: with an
    odd number of units (unit 2 of 5 is at pixel 64 of 160), and in networks that cut patches
    (:mod:`~segformer_pl.analysis.erf.units`).

    In the script, squares that reach beyond the image have no meaning: on wide maps it returns
    nothing, on tall ones it sums the wrong columns, and it never reaches shares that only the whole
    map holds. Here the square is cut at the border of the image and goes on growing.

    Because of the logarithm, the ratio depends on the scale of the map (normalisation of the image,
    channels of the layer). Compare only maps that were measured with the same settings.
    """
    height, width = erf.shape
    row, column = (height // 2, width // 2) if center is None else center
    logs = np.log10(erf + 1.0)
    if not logs.max() > 0:
        return math.nan
    logs = logs / logs.max()
    total = logs.sum()
    table = np.zeros((height + 1, width + 1))
    table[1:, 1:] = logs.cumsum(0).cumsum(1)
    for reach in range(1, max(height, width) + 1):  # up to the far side of the image
        top, bottom = max(math.ceil(row - reach), 0), min(math.floor(row + reach) + 1, height)
        left, right = max(math.ceil(column - reach), 0), min(math.floor(column + reach) + 1, width)
        inside = table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
        is_all = (bottom - top, right - left) == (height, width)
        if inside / total > share or is_all:
            return (bottom - top) / height * ((right - left) / width)
    raise AssertionError("the last square is the whole image")


@lru_cache(maxsize=4)  # the jackknife asks for the same ones for every group
def distances(shape: tuple[int, ...], center: Position | None = None) -> npt.NDArray[np.float64]:
    """Return the distance (H, W) of every pixel from the unit, read-only."""
    row, column = (shape[0] // 2, shape[1] // 2) if center is None else center
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    distance = np.hypot(rows - row, columns - column)
    distance.flags.writeable = False
    return distance


@lru_cache(maxsize=4)
def _rings(shape: tuple[int, ...], center: Position | None) -> npt.NDArray[np.int64]:
    return np.rint(distances(shape, center)).astype(np.int64).ravel()


class _Circles(NamedTuple):
    """The distinct distances of pixels from the unit.

    About a pixel of a 3x3 map there are three: 0 (1 pixel), 1 (4 pixels) and sqrt(2) (4 pixels).

    Attributes:
        squares: (K,), squared distances in increasing order: 0, 1, 2.
        circle: (H * W,), index of the distance of every pixel: 2 1 2 1 0 1 2 1 2.
        counts: (K,), number of pixels at each: 1, 4, 4.
    """

    squares: npt.NDArray[np.float64]
    circle: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


@lru_cache(maxsize=4)
def _circles(shape: tuple[int, ...], center: Position | None) -> _Circles:
    # A unit lies on a pixel or half way between two, so squares are whole numbers of quarters.
    quarters = np.rint(4 * distances(shape, center) ** 2).astype(np.int64).ravel()
    distinct, circle, counts = np.unique(quarters, return_inverse=True, return_counts=True)
    return _Circles(distinct / 4, circle, counts)


class RadialProfile(NamedTuple):
    """A map by the distance from the unit, in rings one pixel wide.

    Attributes:
        radius: (R,), radius of each ring in pixels.
        mean: (R,), mean of the map over the pixels of each ring that lie in the image.
        energy: (R,), share of the sum within each ring and all inner ones.
    """

    radius: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    energy: npt.NDArray[np.float64]


def radial_profile(erf: ERFMap, center: Position | None = None) -> RadialProfile:
    """Return the map as a function of the distance from the unit, rounded to whole pixels."""
    rings = _rings(erf.shape, center)
    sums = np.bincount(rings, weights=erf.ravel().astype(np.float64))
    counts = np.bincount(rings)
    present = counts > 0
    total = sums.sum()
    energy = np.cumsum(sums[present]) / (total if total > 0 else math.nan)
    return RadialProfile(
        np.flatnonzero(present).astype(np.float64), sums[present] / counts[present], energy
    )


def energy_radius(erf: ERFMap, share: float, center: Position | None = None) -> float:
    """Return the radius in pixels of the disc about the unit that holds ``share`` of the sum.

    Half of each circle of pixels lies within the disc of its radius. Between two circles the sum
    grows linearly with the area of the disc. On a 3x3 map of ones (see ``_Circles``) the discs of
    radius 0, 1 and sqrt(2) hold 0.5, 3 and 7 of 9 pixels, so half of the sum, 4.5, lies within
    sqrt(1 + (4.5 - 3) / (7 - 3)) = 1.17 pixels.
    """
    circles = _circles(erf.shape, center)
    sums = np.bincount(circles.circle, weights=erf.ravel().astype(np.float64))
    if not sums.sum() > 0:
        return math.nan
    sums = sums[: np.flatnonzero(sums)[-1] + 1]
    energy = sums.cumsum() - sums / 2
    wanted = share * sums.sum()
    index = int(np.searchsorted(energy, wanted))
    if index in (0, len(energy)):
        return math.sqrt(circles.squares[min(index, len(energy) - 1)])
    part = (wanted - energy[index - 1]) / (energy[index] - energy[index - 1])
    inner, outer = circles.squares[index - 1 : index + 1]
    return math.sqrt(inner + part * (outer - inner))


def rms_radius(erf: ERFMap, center: Position | None = None) -> float:
    """Return the root mean square distance from the unit in pixels, weighted with the map."""
    total = erf.sum(dtype=np.float64)
    if not total > 0:
        return math.nan
    return float(np.sqrt((erf * distances(erf.shape, center) ** 2).sum() / total))


class GaussianFit(NamedTuple):
    """``amplitude * exp(-r^2 / (2 sigma^2))`` about the unit.

    Attributes:
        sigma: Standard deviation along one axis in pixels.
        amplitude: Value at the unit.
        r_squared: Share of the variance of the map over the pixels that the Gaussian explains. Luo
            et al. 2016 observe Gaussians in deep CNNs; far below 1, the map is not one.
    """

    sigma: float
    amplitude: float
    r_squared: float


def gaussian_fit(erf: ERFMap, center: Position | None = None) -> GaussianFit:
    """Fit a Gaussian about the unit by least squares over the pixels.

    For a given sigma the best amplitude has a closed form, so only sigma is searched for: on a
    logarithmic grid, because a map can have several local optima, then between the neighbours of
    the best grid point.
    """
    values = erf.astype(np.float64)
    variance = ((values - values.mean()) ** 2).sum()
    if not variance > 0:
        return GaussianFit(math.nan, math.nan, math.nan)
    # A Gaussian has one value for all pixels at one distance.
    circles = _circles(erf.shape, center)
    distinct, counts = circles.squares, circles.counts
    sums = np.bincount(circles.circle, weights=values.ravel())

    def explained(log_sigma: float) -> tuple[float, float]:
        """Return the sum of squares that this Gaussian explains, and its amplitude."""
        gaussian = np.exp(-0.5 * distinct * math.exp(-2 * log_sigma))
        overlap, energy = (sums * gaussian).sum(), (counts * gaussian**2).sum()
        return overlap**2 / energy, overlap / energy

    grid = np.linspace(math.log(0.2), math.log(4 * max(erf.shape)), 80)
    best = int(np.argmax([explained(log_sigma)[0] for log_sigma in grid]))
    log_sigma = minimize_scalar(
        lambda log_sigma: -explained(log_sigma)[0],
        bounds=(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]),
        method="bounded",
        options={"xatol": 1e-10},
    ).x
    gain, amplitude = explained(log_sigma)
    residual = (values**2).sum() - gain
    return GaussianFit(math.exp(log_sigma), float(amplitude), float(1 - residual / variance))


def centroid_shift(erf: ERFMap, center: Position | None = None) -> tuple[float, float]:
    """Return (rows, columns) from the unit to the centre of mass, in pixels.

    In SegFormer's head it points to the top left. Bilinear upsampling without aligned corners
    interpolates the unit in the middle from points 2, 6 and 14 pixels above and to the left of it,
    in stage 2, 3 and 4.
    """
    row, column = (erf.shape[0] // 2, erf.shape[1] // 2) if center is None else center
    total = erf.sum(dtype=np.float64)
    if not total > 0:
        return math.nan, math.nan
    rows, columns = np.ogrid[: erf.shape[0], : erf.shape[1]]
    return float((erf * (rows - row)).sum() / total), float(
        (erf * (columns - column)).sum() / total
    )


class Anisotropy(NamedTuple):
    """Shape of the ellipse of second moments.

    Attributes:
        ratio: Longer over shorter axis, at least 1.
        angle: Direction of the longer axis in degrees, in [0, 180): 0 for horizontal, 90 for
            vertical, 45 from bottom left to top right; nan where the axes are equal.
    """

    ratio: float
    angle: float


def anisotropy(erf: ERFMap) -> Anisotropy:
    """Return the direction of the map, from its second moments about the centre of mass."""
    total = erf.sum(dtype=np.float64)
    if not total > 0:
        return Anisotropy(math.nan, math.nan)
    down, right = centroid_shift(erf, (0, 0))
    rows, columns = np.ogrid[: erf.shape[0], : erf.shape[1]]
    up, right_ = -(rows - down), columns - right
    xx = (erf * right_**2).sum() / total
    yy = (erf * up**2).sum() / total
    xy = (erf * (right_ * up)).sum() / total
    (small, large), axes = np.linalg.eigh([[xx, xy], [xy, yy]])
    angle = math.degrees(math.atan2(axes[1, 1], axes[0, 1])) % 180
    if math.isclose(small, large, rel_tol=1e-9):
        return Anisotropy(1.0, math.nan)
    ratio = math.sqrt(large / small) if small > 0 else math.inf
    return Anisotropy(float(ratio), 0.0 if math.isclose(angle, 180) else angle)


def lattice_share(erf: ERFMap, period: int = 32, center: Position | None = None) -> float:
    """Return the share of the fine structure of a map that repeats every ``period`` pixels.

    Keys and values of every stage of SegFormer lie on a lattice of 32 pixels (``sr_ratio`` times
    stride), which shows in its receptive fields. Fine structure is the logarithm of the map minus
    its mean over a window of one period, which removes what is smooth: of a Gaussian nothing is
    left. Pixels within one period of the unit do not count.

    The share is the variance of the phase means over the total variance. With period 3, along one
    axis::

        fine structure   a b c | a'b'c'| a"b"c"
        phase means      (a+a'+a")/3   (b+b'+b")/3   (c+c'+c")/3

    It is 1 for a lattice, also under a Gaussian. It is about 0 for noise, because the variance that
    phase means have by chance is subtracted, and 0 for shorter periods that divide this one, such
    as the strides of patches. Other periods show in part, by the phases that they have in common.
    It is nan for an image with fewer than three periods a side, because the window needs one.

    Raises:
        UserError: The period is less than 2.
    """
    if period < 2:
        raise UserError(f"lattice_share: period={period}: give one of at least 2 pixels")
    if min(erf.shape) < 3 * period or not erf.max() > 0:
        return math.nan
    logs = np.log(np.maximum(erf.astype(np.float64), erf.max() * 1e-30))
    fine = logs[period // 2 :, period // 2 :]
    smooth = _windowed(_windowed(logs, period).T, period).T
    fine = fine[: smooth.shape[0], : smooth.shape[1]] - smooth
    far = (distances(erf.shape, center) > period)[period // 2 :, period // 2 :]
    far = far[: smooth.shape[0], : smooth.shape[1]]
    rows, columns = (side // period * period for side in fine.shape)
    fine, far = fine[:rows, :columns], far[:rows, :columns]

    def folded(array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return array.reshape(rows // period, period, columns // period, period).sum((0, 2))

    counts = folded(far.astype(np.float64))
    if counts.min() < 2:
        return math.nan
    fine = fine - fine[far].mean()
    total = rest = (fine[far] ** 2).sum()
    means = folded(np.where(far, fine, 0.0)) / counts
    freedom, left = period**2, int(far.sum()) - 1
    for divisor in _prime_divisors(period):
        # Subtract what already repeats at a divisor of the period.
        part = period // divisor
        shorter = means.reshape(divisor, part, divisor, part).mean((0, 2))
        shorter = np.tile(shorter, (divisor, divisor))
        means = means - shorter
        rest -= (counts * shorter**2).sum()
        left -= freedom // divisor**2
        freedom -= freedom // divisor**2
    if rest <= 1e-9 * max(total, 1e-9 * (logs**2).sum()):
        return 0.0
    between = (counts * means**2).sum() / rest
    # What phase means of noise would explain by chance, as in the effect size epsilon squared.
    chance = freedom / left
    return float(np.clip((between - chance) / (1 - chance), 0, 1))


def _windowed(array: npt.NDArray[np.float64], length: int) -> npt.NDArray[np.float64]:
    """(n, m) -> (n - length, m), mean over windows of ``length`` rows.

    The first window is centred on row ``length // 2``. An even window has ``length + 1`` rows, of
    which the two outermost count half, so that it has a row in the middle.
    """
    sums = np.concatenate([np.zeros((1, array.shape[1])), array.cumsum(0)])
    plain = sums[length:] - sums[:-length]
    return (plain[:-1] + plain[1:]) / (2 * length) if length % 2 == 0 else plain[:-1] / length


def _prime_divisors(number: int) -> list[int]:
    return [
        n
        for n in range(2, number + 1)
        if number % n == 0 and all(n % smaller for smaller in range(2, n))
    ]
