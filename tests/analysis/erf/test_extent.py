"""Numbers of a map against closed forms and against the steps of RepLKNet's script."""

import math

import numpy as np
import pytest

from segformer_pl.analysis.erf.extent import (
    anisotropy,
    centroid_shift,
    energy_radius,
    gaussian_fit,
    lattice_share,
    radial_profile,
    rms_radius,
    smallest_area_ratio,
    square_area_ratio,
)


def gaussian(shape, sigma, center=None):
    row, column = center or (shape[0] // 2, shape[1] // 2)
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    sigma_y, sigma_x = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    return np.exp(-0.5 * (((rows - row) / sigma_y) ** 2 + ((columns - column) / sigma_x) ** 2))


# 9x9, by hand: what the log transform makes of it is 1 at the unit, log10(2) at its neighbours.
SMALL = np.zeros((9, 9))
SMALL[4, 4] = 9.0
SMALL[3:6, 3:6] += np.where(SMALL[3:6, 3:6] == 0, 1.0, 0.0)  # eight ones around the nine
SMALL[0, 0] = SMALL[8, 8] = 9.0


def test_replknet_ratio_by_hand():
    """log10(1 + 9) = 1, log10(1 + 1) = 0.30103; the sum is 3 + 8 * 0.30103 = 5.40824, of which the
    square of side 3 holds 3.40824, 63 %, as do sides 5 and 7; side 9 holds everything."""
    assert square_area_ratio(SMALL, 0.5) == pytest.approx(9 / 81)
    assert square_area_ratio(SMALL, 0.63) == pytest.approx(9 / 81)
    assert square_area_ratio(SMALL, 0.64) == 1.0


def test_square_holds_strictly_more_and_has_at_least_side_3():
    even = np.ones((11, 11))
    assert square_area_ratio(even, 9 / 121 - 1e-9) == pytest.approx(9 / 121)
    assert square_area_ratio(even, 9 / 121 + 1e-9) == pytest.approx(25 / 121)
    one = np.zeros((11, 11))
    one[5, 5] = 1
    assert square_area_ratio(one, 0.2) == pytest.approx(9 / 121)


@pytest.mark.parametrize("side", [8, 9, 32, 33])
def test_replknet_ratio_by_the_published_steps(side):
    field = np.random.default_rng(side).gamma(0.3, size=(side, side))
    logs = np.log10(field + 1)
    logs /= logs.max()
    half = side // 2
    for share in (0.2, 0.3, 0.5, 0.8):
        for i in range(1, half):
            inside = logs[half - i : half + i + 1, half - i : half + i + 1]
            if inside.sum() / logs.sum() > share:
                expected = (2 * i + 1) ** 2 / side**2
                assert square_area_ratio(field, share) == pytest.approx(expected, rel=1e-12)
                break
        else:
            assert square_area_ratio(field, share) > ((2 * half - 1) / side) ** 2


def test_the_square_of_an_even_map_is_asymmetric_as_in_the_script():
    """Side 7 about (4, 4) of 8x8 covers rows 1 to 7; row 0 is only in the last square."""
    even = np.zeros((8, 8))
    even[7, 7] = even[0, 0] = 1
    assert square_area_ratio(even, 0.4) == 49 / 64
    assert square_area_ratio(even, 0.6) == 1.0


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (9, 33)])
def test_square_is_cut_at_the_border_of_maps_that_are_not_square(shape):
    """The script returns nothing at 99 % there, or sums the wrong columns."""
    even = np.ones(shape)
    short, long = min(shape), max(shape)
    assert square_area_ratio(even, 0.99) > 0.95
    side = 2 * short + 1  # beyond the short side on both ends: a strip of that length
    strip = side / long
    assert square_area_ratio(even, strip - 1e-6) == pytest.approx(strip, abs=1.1 * short / long)
    one = np.zeros(shape)
    one[0, 0] = one[-1, -1] = 1
    assert square_area_ratio(one, 0.9) == 1.0
    assert square_area_ratio(np.ones((8, 40)), 0.5) == square_area_ratio(np.ones((40, 8)), 0.5)


def test_the_logarithm_depends_on_the_scale_and_the_smallest_area_does_not():
    """Maps scale with the number of channels, so squares of different layers do not compare."""
    field = gaussian((65, 65), 9.0)
    assert square_area_ratio(1e4 * field, 0.5) > 1.5 * square_area_ratio(field, 0.5)
    assert smallest_area_ratio(1e4 * field, 0.5) == pytest.approx(smallest_area_ratio(field, 0.5))


def test_smallest_area():
    field = np.zeros((10, 10))
    field[0, :4] = 4.0, 3.0, 2.0, 1.0
    assert smallest_area_ratio(field, 0.4) == pytest.approx(0.01)
    assert smallest_area_ratio(field, 0.55) == pytest.approx(0.015)  # half of the second pixel
    assert smallest_area_ratio(3 * field, 0.95) == pytest.approx(0.035)
    assert smallest_area_ratio(np.ones((10, 10)), 0.5) == pytest.approx(0.5)


def test_gaussian():
    """Half lies within sigma sqrt(2 ln 2), and the mean squared distance is 2 sigma^2."""
    field = 3 * gaussian((129, 129), 8.0)
    fit = gaussian_fit(field)
    assert fit.sigma == pytest.approx(8, rel=1e-4)
    assert fit.amplitude == pytest.approx(3, rel=1e-4)
    assert fit.r_squared == pytest.approx(1, abs=1e-6)
    assert energy_radius(field, 0.5) == pytest.approx(8 * math.sqrt(2 * math.log(2)), abs=0.05)
    assert rms_radius(field) == pytest.approx(8 * math.sqrt(2), rel=1e-3)
    assert smallest_area_ratio(field, 0.5) == pytest.approx(
        2 * math.pi * 64 * math.log(2) / 129**2, rel=0.02
    )
    assert gaussian_fit(np.ones((33, 33))).r_squared != gaussian_fit(np.ones((33, 33))).r_squared
    rng = np.random.default_rng(0)
    assert gaussian_fit(rng.random((65, 65))).r_squared < 0.1


@pytest.mark.slow
def test_gaussian_fit_agrees_with_least_squares_of_scipy():
    """The map is not a Gaussian: two of them, off the middle, with noise."""
    from scipy.optimize import curve_fit

    generator = np.random.default_rng(0)
    field = gaussian((65, 81), 5.0) + 0.4 * gaussian((65, 81), 14.0, (36, 37))
    field *= generator.gamma(4.0, 0.25, field.shape)
    rows, columns = np.indices(field.shape)
    squared = ((rows - 32) ** 2 + (columns - 40) ** 2).ravel()

    def curve(at, sigma, amplitude):
        return amplitude * np.exp(-0.5 * at / sigma**2)

    exactly = {"ftol": 1e-14, "xtol": 1e-14, "gtol": 1e-14}
    (sigma, amplitude), _ = curve_fit(curve, squared, field.ravel(), p0=(8, 1), **exactly)
    fit = gaussian_fit(field)
    assert fit.sigma == pytest.approx(abs(sigma), rel=1e-5)
    assert fit.amplitude == pytest.approx(amplitude, rel=1e-5)
    residual = field.ravel() - curve(squared, sigma, amplitude)
    assert fit.r_squared == pytest.approx(1 - (residual**2).mean() / field.var(), rel=1e-9)


def test_radii_are_not_rounded_to_pixels():
    """Half of an even square of 64 pixels lies in a disc of 64 / sqrt(2 pi)."""
    even = np.ones((64, 64))
    assert energy_radius(even, 0.5, (31.5, 31.5)) == pytest.approx(25.53, abs=0.1)
    steps = [energy_radius(even, share) for share in (0.5, 0.501, 0.502)]
    assert steps[0] < steps[1] < steps[2] < steps[0] + 0.2
    # Where there is nothing in between, nothing is made up.
    ring = np.where(abs(np.hypot(*np.ogrid[-20:21, -20:21]) - 15) < 0.1, 1.0, 0.0)
    assert energy_radius(ring, 0.3) == pytest.approx(15, abs=0.5)


def test_unit_between_pixels():
    """A patch of 4x4 ones about (9.5, 13.5), by hand: four pixels at 0.5, eight at 2.5, four at
    4.5 squared."""
    field = np.zeros((20, 24))
    field[8:12, 12:16] = 1
    center = (9.5, 13.5)
    assert rms_radius(field, center) == pytest.approx(math.sqrt((4 * 0.5 + 8 * 2.5 + 4 * 4.5) / 16))
    assert centroid_shift(field, center) == pytest.approx((0, 0))
    assert energy_radius(field, 0.5, center) == pytest.approx(math.sqrt(2.5))
    assert square_area_ratio(field, 0.2, center) == 4 / 480
    assert square_area_ratio(field, 0.5, center) == 16 / 480
    assert gaussian_fit(gaussian((40, 40), 3.0, (19.5, 20.5)), (19.5, 20.5)).sigma == pytest.approx(
        3, rel=1e-4
    )


def test_radii_are_measured_from_the_unit():
    field = gaussian((64, 96), 3.0, center=(10, 80))
    assert energy_radius(field, 0.5, (10, 80)) == pytest.approx(4, abs=1)
    assert energy_radius(field, 0.5) > 30
    profile = radial_profile(field, (10, 80))
    assert profile.radius[0] == 0
    assert profile.mean[0] == pytest.approx(1)
    assert profile.energy[-1] == pytest.approx(1)
    assert (np.diff(profile.mean[:8]) < 0).all()
    # A ring at the border is averaged over its pixels inside the image.
    assert radial_profile(np.ones((64, 96)), (10, 80)).mean == pytest.approx(1)


def test_centroid():
    assert centroid_shift(gaussian((64, 64), 2.0, center=(26, 29))) == pytest.approx((-6, -3))
    assert centroid_shift(np.ones((8, 8))) == pytest.approx((-0.5, -0.5))


def test_isotropic_maps_have_no_direction():
    ratio, angle = anisotropy(np.ones((33, 33)))
    assert ratio == pytest.approx(1)
    assert math.isnan(angle)


@pytest.mark.parametrize(
    ("sigma", "ratio", "angle"), [((4.0, 8.0), 2, 0), ((9.0, 3.0), 3, 90), (5.0, 1, None)]
)
def test_anisotropy(sigma, ratio, angle):
    result = anisotropy(gaussian((129, 129), sigma))
    assert result.ratio == pytest.approx(ratio, rel=1e-3)
    if angle is not None:
        assert result.angle == pytest.approx(angle, abs=0.1)


def test_angle_is_counterclockwise_from_the_right():
    rows, columns = np.ogrid[-30:31, -30:31]
    up_right = np.exp(-((columns + rows) ** 2) / 8 - (columns - rows) ** 2 / 200)
    assert anisotropy(up_right).angle == pytest.approx(45, abs=0.1)
    assert anisotropy(up_right[::-1]).angle == pytest.approx(135, abs=0.1)


def test_lattice_share_is_1_for_a_lattice_under_any_gaussian():
    rng = np.random.default_rng(0)
    lattice = np.tile(rng.random((32, 32)) + 0.1, (8, 8))
    for envelope in (1.0, gaussian((256, 256), 60.0), gaussian((256, 256), 25.0)):
        assert lattice_share(lattice * envelope) == pytest.approx(1, abs=1e-3)
    # A peak at the unit does not count.
    peaked = lattice.copy()
    peaked[124:132, 124:132] += 1e3
    assert lattice_share(peaked) == pytest.approx(1, abs=1e-3)
    noise = rng.normal(scale=0.5, size=(256, 256))
    mixed = lattice_share(lattice * np.exp(noise))
    shorter = np.log(lattice).reshape(16, 16, 16, 16).mean((0, 2))
    own = (np.log(lattice) - np.tile(shorter, (16, 16))).var()
    assert mixed == pytest.approx(own / (own + noise.var()), abs=0.02)


def test_lattice_share_is_0_without_a_lattice_of_that_period():
    rng = np.random.default_rng(1)
    for period in (4, 8, 16):
        shorter = np.tile(rng.random((period, period)) + 0.1, (256 // period,) * 2)
        assert lattice_share(shorter) == 0
        assert lattice_share(shorter * gaussian((256, 256), 60.0)) == 0
        assert lattice_share(shorter, period) == pytest.approx(1, abs=1e-3)
    for other in (24, 48):
        assert lattice_share(np.tile(rng.random((other, other)) + 0.1, (6, 6))) < 0.02
    assert lattice_share(rng.random((192, 128)) + 0.1) < 0.02
    assert lattice_share(gaussian((256, 256), 60.0)) < 0.001
    assert math.isnan(lattice_share(rng.random((95, 128))))
    for period in (0, 1, -4):
        with pytest.raises(ValueError, match="at least 2 pixels"):
            lattice_share(rng.random((95, 128)), period)


def test_numbers_of_a_map_without_gradient_are_nan():
    empty = np.zeros((96, 96))
    numbers = [
        smallest_area_ratio(empty, 0.5),
        square_area_ratio(empty, 0.5),
        energy_radius(empty, 0.5),
        rms_radius(empty),
        gaussian_fit(empty).sigma,
        *centroid_shift(empty),
        *anisotropy(empty),
        lattice_share(empty),
    ]
    assert all(math.isnan(number) for number in numbers)
