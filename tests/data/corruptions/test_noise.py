"""Noise is as strong as its constants."""

import numpy as np
import pytest

NOISE_STD = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "speckle_noise": (0.15, 0.20, 0.35, 0.45, 0.60),
}


@pytest.mark.parametrize("severity", range(1, 6))
def test_noise_is_as_strong_as_its_constants(severity, flat, run):
    grey = 128 / 255
    image = flat(128, (200, 200))

    def values(name):
        return run(image, name, severity).astype(float) / 255

    # At higher severities, clipping at 0 and 1 reduces the standard deviation.
    if severity <= 3:
        assert values("gaussian_noise").std() == pytest.approx(
            NOISE_STD["gaussian_noise"][severity - 1], rel=0.02
        )
        assert values("speckle_noise").std() == pytest.approx(
            grey * NOISE_STD["speckle_noise"][severity - 1], rel=0.02
        )
    rate = (60, 25, 12, 5, 3)[severity - 1]
    shot = values("shot_noise")
    if severity <= 2:
        assert shot.mean() == pytest.approx(grey, rel=0.01)
        assert shot.var() == pytest.approx(grey / rate, rel=0.03)
    counts = np.unique(shot[shot < 1]) * rate  # photon counts are integers
    assert np.abs(counts - np.rint(counts)).max() < rate / 255
    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    impulse = run(image, "impulse_noise", severity)
    assert (impulse == 0).mean() == pytest.approx(amount / 2, rel=0.06)
    assert (impulse == 255).mean() == pytest.approx(amount / 2, rel=0.06)
    assert ((impulse == 0) | (impulse == 255) | (impulse == 128)).all()
    # channels are independent, so the specks are coloured
    hit = impulse != 128
    assert (hit[..., 0] & hit[..., 1]).mean() == pytest.approx(amount**2, rel=0.5)


def test_speckle_leaves_black_black_and_gaussian_does_not(flat, run):
    assert run(flat(0), "speckle_noise", 5).max() == 0
    assert run(flat(0), "shot_noise", 5).max() == 0
    assert run(flat(0), "gaussian_noise", 1).max() > 0
