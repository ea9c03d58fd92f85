"""How far a receptive field reaches: numbers from one map.

A map is (H, W), not negative; ``center`` is the (row, column) of the unit that was measured, which
may lie between pixels, by default (H // 2, W // 2). Lengths are in pixels of the picture.
Everything but the :func:`square_area_ratio` is the same for a map and a multiple of it. A map
without any gradient gives nan.
"""

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Map = npt.NDArray[np.floating]
Center = tuple[float, float] | None
AreaDefinition = Literal["smallest", "square", "replknet"]


def smallest_area_ratio(erf: Map, share: float) -> float:
    """Share of the picture that the strongest pixels with this share of the sum take up, the
    weakest of them in part.

    0.5 gives the smallest area that holds half of the gradient, wherever it lies. Noise makes the
    strongest pixels stronger: the area of a mean over few pictures is smaller than over many, and
    two compare only over equally many (:meth:`LayerERF.interval` takes that off).
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


def square_area_ratio(erf: Map, share: float, center: Center = None) -> float:
    """RepLKNet's high-contribution area ratio (Ding et al. 2022): the smallest square about
    ``center``, of side 3, 5, 7 ... pixels (2, 4, 6 ... where it lies between pixels), with more
    than ``share`` of the sum of log10(1 + map), over the image's area.

    RepLKNet's published script takes the square about pixel (H // 2, W // 2), whatever unit it
    measured: with the default ``center`` this is its ratio on square maps. About the unit's own
    place it is another number wherever that is another pixel: with an odd number of units (unit 2
    of 5 lies on pixel 64 of 160), and in networks that cut patches (:mod:`.units`).

    In the script, a square that reaches beyond the image has no meaning: on wide maps it finds
    nothing, on tall ones it counts the wrong columns, and shares that only the whole map holds it
    does not reach. Here the square is cut at the image's border and goes on growing.

    Depends on the scale of the map (normalisation of the picture, channels of the layer), because
    of the logarithm: compare only what was measured alike.
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
    for reach in range(1, max(height, width) + 1):  # from a unit in the picture, to its far side
        top, bottom = max(math.ceil(row - reach), 0), min(math.floor(row + reach) + 1, height)
        left, right = max(math.ceil(column - reach), 0), min(math.floor(column + reach) + 1, width)
        inside = table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
        is_all = (bottom - top, right - left) == (height, width)
        if inside / total > share or is_all:
            return (bottom - top) / height * ((right - left) / width)
    raise AssertionError("the last square is the picture")


@lru_cache(maxsize=4)  # asked for again with every group left out
def distances(shape: tuple[int, ...], center: Center = None) -> npt.NDArray[np.float64]:
    """(H, W), distance of every pixel from the unit's; not to be written to."""
    row, column = (shape[0] // 2, shape[1] // 2) if center is None else center
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    found = np.hypot(rows - row, columns - column)
    found.flags.writeable = False
    return found


@lru_cache(maxsize=4)
def _rings(shape: tuple[int, ...], center: Center) -> npt.NDArray[np.int64]:
    return np.rint(distances(shape, center)).astype(np.int64).ravel()


class _Circles(NamedTuple):
    """Pixels by their distance: squares of the distinct ones, in order, the number of each
    pixel's, and how many pixels lie at each."""

    squares: npt.NDArray[np.float64]
    number: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


@lru_cache(maxsize=4)
def _circles(shape: tuple[int, ...], center: Center) -> _Circles:
    # Squares are whole numbers of quarters where the unit lies on a pixel or half way between two.
    quarters = np.rint(4 * distances(shape, center) ** 2).astype(np.int64).ravel()
    distinct, number, counts = np.unique(quarters, return_inverse=True, return_counts=True)
    return _Circles(distinct / 4, number, counts)


class RadialProfile(NamedTuple):
    """Around the unit, in rings of one pixel.

    Attributes:
        radius: (R,) of each ring, in pixels.
        mean: (R,) of the map over the ring's pixels that are in the picture.
        energy: (R,) share of the sum within the ring and all inner ones.
    """

    radius: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    energy: npt.NDArray[np.float64]


def radial_profile(erf: Map, center: Center = None) -> RadialProfile:
    """The map as a function of the distance from the unit, rounded to whole pixels."""
    rings = _rings(erf.shape, center)
    sums = np.bincount(rings, weights=erf.ravel().astype(np.float64))
    counts = np.bincount(rings)
    present = counts > 0
    total = sums.sum()
    energy = np.cumsum(sums[present]) / (total if total > 0 else math.nan)
    return RadialProfile(
        np.flatnonzero(present).astype(np.float64), sums[present] / counts[present], energy
    )


def energy_radius(erf: Map, share: float, center: Center = None) -> float:
    """Radius in pixels of the disc about the unit that holds this share of the sum.

    The pixels at one distance lie half within the disc of that radius; between two distances the
    sum grows with the disc's area.
    """
    circles = _circles(erf.shape, center)
    sums = np.bincount(circles.number, weights=erf.ravel().astype(np.float64))
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


def rms_radius(erf: Map, center: Center = None) -> float:
    """Root of the mean squared distance from the unit, weighted with the map."""
    total = erf.sum(dtype=np.float64)
    if not total > 0:
        return math.nan
    return float(np.sqrt((erf * distances(erf.shape, center) ** 2).sum() / total))


class GaussianFit(NamedTuple):
    """``amplitude * exp(-r^2 / (2 sigma^2))`` about the unit.

    Attributes:
        sigma: In pixels.
        amplitude: Of the map at the unit.
        r_squared: Share of the map's variance over the pixels that the Gaussian explains. Luo et
            al. find Gaussians in deep CNNs; far from 1, this is no such field.
    """

    sigma: float
    amplitude: float
    r_squared: float


def gaussian_fit(erf: Map, center: Center = None) -> GaussianFit:
    """The Gaussian about the unit with the least squared error over the pixels.

    For a given sigma the best amplitude is known, so one number is searched for: on a grid of
    logarithms first, then by golden section.
    """
    values = erf.astype(np.float64)
    variance = ((values - values.mean()) ** 2).sum()
    if not variance > 0:
        return GaussianFit(math.nan, math.nan, math.nan)
    # Pixels at one distance share a Gaussian's value.
    circles = _circles(erf.shape, center)
    distinct, counts = circles.squares, circles.counts
    sums = np.bincount(circles.number, weights=values.ravel())

    def explained(log_sigma: float) -> tuple[float, float]:
        """Sum of squares that this Gaussian takes away, and its amplitude."""
        gaussian = np.exp(-0.5 * distinct * math.exp(-2 * log_sigma))
        overlap, energy = (sums * gaussian).sum(), (counts * gaussian**2).sum()
        return overlap**2 / energy, overlap / energy

    grid = np.linspace(math.log(0.2), math.log(4 * max(erf.shape)), 80)
    best = int(np.argmax([explained(log_sigma)[0] for log_sigma in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if explained(left)[0] < explained(right)[0]:
            low = left
        else:
            high = right
    log_sigma = (low + high) / 2
    gain, amplitude = explained(log_sigma)
    residual = (values**2).sum() - gain
    return GaussianFit(math.exp(log_sigma), float(amplitude), float(1 - residual / variance))


def centroid_shift(erf: Map, center: Center = None) -> tuple[float, float]:
    """(rows, columns) from the unit's pixel to the centre of mass, in pixels.

    Bilinear upsampling without aligned corners gives SegFormer's head one towards the top left:
    its unit in the middle draws stage 2, 3 and 4 from places 2, 6 and 14 pixels off.
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
    """Attributes:
    ratio: Longer over shorter axis of the ellipse of second moments, at least 1.
    angle: Of the longer axis in degrees, 0 for horizontal, 90 for vertical, 45 from bottom left
        to top right; in [0, 180). nan where no axis is longer.
    """

    ratio: float
    angle: float


def anisotropy(erf: Map) -> Anisotropy:
    """Direction of the map, from its second moments about its centre of mass."""
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


def lattice_share(erf: Map, period: int = 32, center: Center = None) -> float:
    """Share of the map's fine structure, further than one period from the unit, that repeats
    itself every ``period`` pixels in both directions, of what does not at a divisor of it.

    Keys and values of every stage of SegFormer lie on a lattice of 32 pixels (``sr_ratio`` x
    stride), which shows in its receptive fields. Fine structure is the variance of the logarithm
    about its mean over a window of one period, which takes off what is smooth: a Gaussian leaves
    nothing. 1 for a lattice, also under a Gaussian; 0 for noise in expectation, as what phase means
    explain by chance is taken off, and for shorter periods that divide this one, such as the
    strides of the patches; other periods show in part, by the phases that they have in common. nan
    in a picture with fewer than three periods a side, of which the window leaves two.

    Raises:
        ValueError: the period is less than 2.
    """
    if period < 2:
        raise ValueError(f"lattice_share: period={period}: give one of at least 2 pixels")
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
        # The part that repeats at a divisor of the period already.
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
    # What phase means of noise would explain by chance (as in epsilon squared).
    chance = freedom / left
    return float(np.clip((between - chance) / (1 - chance), 0, 1))


def _windowed(array: npt.NDArray[np.float64], length: int) -> npt.NDArray[np.float64]:
    """(n, m) -> (n - length, m): mean over windows about the rows from ``length // 2`` on, of so
    many rows; an even window's two outermost count half, that it has a middle."""
    sums = np.concatenate([np.zeros((1, array.shape[1])), array.cumsum(0)])
    plain = sums[length:] - sums[:-length]
    return (plain[:-1] + plain[1:]) / (2 * length) if length % 2 == 0 else plain[:-1] / length


def _prime_divisors(number: int) -> list[int]:
    return [
        n
        for n in range(2, number + 1)
        if number % n == 0 and all(n % smaller for smaller in range(2, n))
    ]
