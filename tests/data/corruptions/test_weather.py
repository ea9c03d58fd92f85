"""Snow, spatter, fog and frost, and the maps that they are made of."""

import numpy as np
import pytest
import torch

from segformer_pl.data.corruptions import weather


@pytest.mark.parametrize("size", [(64, 64), (50, 90), (1, 3)])
def test_plasma(size):
    noise = weather.plasma(*size, 2, np.random.default_rng(0))
    assert noise.shape == size
    assert noise.min() >= 0
    assert noise.max() <= 1
    if size == (64, 64):  # the whole torus
        assert (noise.min(), noise.max()) == (0, 1)


def test_plasma_is_rougher_with_a_smaller_decay():
    def roughness(decay):
        maps = [weather.plasma(128, 128, decay, np.random.default_rng(n)) for n in range(8)]
        return np.mean([np.abs(np.diff(noise)).mean() / noise.std() for noise in maps])

    assert roughness(2) < roughness(1.7) < roughness(1.5) < roughness(1.4)


def test_fog_by_hand(monkeypatch, flat, run):
    monkeypatch.setattr(weather, "plasma", lambda h, w, decay, rng: np.full((h, w), 0.5, "f4"))
    image = flat(51)
    image[0, 0] = 204  # 0.8, the brightest
    # (0.2 + 1.5 * 0.5) * 0.8 / (0.8 + 1.5)
    assert run(image, "fog", 1)[5, 5] == pytest.approx(255 * 0.95 * 0.8 / 2.3, abs=0.51)


def test_frost_by_hand(monkeypatch, flat, run):
    monkeypatch.setattr(weather, "ice", lambda h, w, rng: np.full((h, w, 3), 0.5, "f4"))
    for severity, (image_weight, ice_weight) in enumerate(
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)), 1
    ):
        expected = 255 * (image_weight * 0.2 + ice_weight * 0.5)
        assert run(flat(51), "frost", severity)[5, 5] == pytest.approx(expected, abs=0.51)


def test_ice_is_bluish_and_within_its_range():
    textures = np.stack([weather.ice(80, 120, np.random.default_rng(n)) for n in range(12)])
    assert textures.min() >= 0
    assert textures.max() <= 1
    red, green, blue = textures.mean((0, 1, 2))
    assert red < green < blue
    brightness = textures.mean((1, 2, 3))
    middle = np.mean(weather.FROST_COLOR)
    assert np.abs(brightness - middle).max() < weather.FROST_RANGE + 0.02
    assert np.ptp(brightness) > weather.FROST_RANGE
    assert textures.mean(3).std((1, 2)).mean() == pytest.approx(weather.FROST_STD, rel=0.15)


def test_snow_brightens_black_and_adds_white_flakes(flat, run):
    # Without a flake, black turns to (1 - weight) * 0.5.
    for severity, weight in enumerate((0.8, 0.7, 0.7, 0.65, 0.55), 1):
        snowy = run(flat(0), "snow", severity)
        assert snowy.min() == pytest.approx(255 * (1 - weight) * 0.5, abs=0.51)
        assert snowy.max() > snowy.min() + 50
        assert np.ptp(snowy, axis=2).max() == 0  # white


def test_spatter_covers_the_expected_share_of_the_image(flat, run):
    # A blur by sigma reduces the standard deviation of white noise to std / (2 sigma sqrt(pi)).
    size = (300, 300)
    for severity, (mean, std, sigma, threshold) in enumerate(
        ((0.65, 0.3, 4, 0.69), (0.65, 0.3, 3, 0.68), (0.65, 0.3, 2, 0.68)), 1
    ):
        deviations = (threshold - mean) / (std / (2 * sigma * np.sqrt(np.pi)))
        normal = torch.distributions.Normal(0.0, 1.0)
        expected = 1 - normal.cdf(torch.tensor(deviations)).item()
        wet = run(flat(0, size), "spatter", severity)
        # the faintest edges of drops are below half a level of 8 bits
        assert 0.6 * expected < (wet.max(2) > 0).mean() < 1.3 * expected
        assert wet[wet.sum(2) > 30].mean(0)[0] < wet[wet.sum(2) > 30].mean(0)[1]  # turquoise
    mud = run(flat(255, size), "spatter", 4)
    assert tuple(mud.reshape(-1, 3).min(0)) == (63, 42, 20)
    assert (run(flat(255, size), "spatter", 5) < 250).mean() > (mud < 250).mean() > 0.05
