"""Numbers of one layer, and their intervals over images."""

import numpy as np
import pytest

from segformer_pl.analysis.erf import LayerERF
from segformer_pl.analysis.erf.moments import Moments


def layer_of(maps, gradient="abs", num_groups=16):
    moments = Moments.zeros(*maps.shape[1:], num_groups)
    moments.add(maps)
    return LayerERF.from_moments("x", moments, (4, 4), (2, 2), gradient)


def test_coverage_of_intervals():
    """The mean of one pixel of the map, whose sampling distribution is known."""
    rng = np.random.default_rng(1)
    for num_images in (5, 40):
        covered = 0
        for _ in range(200):
            layer = layer_of(rng.normal(5.0, 1.0, (num_images, 1, 1)))
            value, low, high = layer.interval(lambda erf: float(erf.mean[0, 0]))
            assert value == pytest.approx(layer.mean[0, 0], rel=1e-4)
            covered += low <= 5.0 <= high
        assert 0.91 < covered / 200 < 0.99


def speckled(rng, num_images, shape):
    """A Gaussian of sigma 10 under noise that differs in every image and pixel."""
    rows, columns = np.ogrid[:64, :64]
    envelope = np.exp(-((rows - 32) ** 2 + (columns - 32) ** 2) / 200)
    return layer_of(envelope * rng.gamma(shape, size=(num_images, 64, 64)))


def area_50(erf):
    return 100 * erf.area_ratio(0.5)


@pytest.mark.parametrize("num_images", [16, 50])
@pytest.mark.slow
def test_intervals_of_areas_cover_the_area_in_the_limit_of_many_images(num_images):
    """2 pi ln 2 sigma^2 / 64^2 = 10.6 %. The area of the mean map is nearly one below."""
    rng = np.random.default_rng(num_images)
    truth = 100 * 2 * np.pi * np.log(2) * 100 / 64**2
    plain, corrected = [], []
    for _ in range(40):
        layer = speckled(rng, num_images, 0.5)
        plain.append(area_50(layer))
        corrected.append(layer.interval(area_50))
    values, low, high = np.array(corrected).T
    assert ((low <= values) & (values <= high)).all()
    assert 0.8 <= ((low <= truth) & (truth <= high)).mean() <= 1
    assert abs(values.mean() - truth) < 0.1 < truth - np.mean(plain)


def test_areas_over_different_numbers_of_images_agree():
    rng = np.random.default_rng(0)
    few, many = speckled(rng, 12, 1.0), speckled(rng, 100, 1.0)
    assert area_50(many) - area_50(few) > 0.4
    assert few.interval(area_50).value == pytest.approx(many.interval(area_50).value, abs=0.3)


def test_interval_is_deterministic_and_needs_two_images():
    maps = np.random.default_rng(0).random((6, 16, 16))
    layer = layer_of(maps)
    assert layer.interval(LayerERF.rms_radius) == layer.interval(LayerERF.rms_radius)
    curve = layer.band(lambda erf: erf.radial_profile().energy)
    assert curve.value.shape == curve.low.shape == (17,)
    assert (curve.low <= curve.high).all()
    value, low, high = layer_of(maps[:1]).interval(LayerERF.rms_radius)
    assert value > 0
    assert np.isnan([low, high]).all()


def test_invalid_arguments_are_refused():
    maps = np.random.default_rng(0).normal(size=(2, 8, 8))
    with pytest.raises(ValueError, match="a signed map has no extent"):
        layer_of(maps, "signed").radius()
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        layer_of(abs(maps)).area_ratio(50)
    for share in (0, 50):
        with pytest.raises(ValueError, match="a share between 0 and 1"):
            layer_of(abs(maps)).radius(share)
    with pytest.raises(ValueError, match="a radius of at least 0"):
        layer_of(abs(maps)).center_share(-1)
    with pytest.raises(ValueError, match="a confidence between 0 and 1"):
        layer_of(abs(maps)).interval(LayerERF.rms_radius, level=95)
    with pytest.raises(ValueError, match="give 'smallest', 'square' or 'replknet'"):
        layer_of(abs(maps)).area_ratio(0.5, "round")
