"""Comparison of the corruptions with the package ``imagecorruptions`` 1.1.2.

The package runs at all severities. It was written for older libraries, so names that NumPy 2,
SciPy and scikit-image have removed are restored while it runs; its computations are not changed.
``frost`` is not compared, because the package blends photographs into the image and this project
draws ice.

Where both sides can use the same random numbers, the results are compared pixel by pixel. Otherwise
the mean PSNR against the clean image is compared, over several images and random numbers.
"""

import sys
from types import ModuleType

import numpy as np
import pytest

from segformer_pl.data.corruptions import CORRUPTIONS, blur, corrupt, weather

pytestmark = pytest.mark.references

# Largest difference of the mean PSNR in dB. The small ones are rounding, because the package
# truncates decimals, also between its blurs. The others are random variation: fog varies by 0.9 dB
# from draw to draw. The package truncates the defocus kernel at radius 8 and 10, which brightens
# images.
TOLERANCE = dict.fromkeys(CORRUPTIONS, 0.1) | {
    "brightness": 0.3,
    "glass_blur": 0.2,
    "motion_blur": 0.25,
    "snow": 0.15,
    "spatter": 0.25,
    "fog": 0.4,
}
NUM_DRAWS = {"fog": 300, "motion_blur": 100, "spatter": 60, "glass_blur": 4}


@pytest.fixture(scope="module")
def original():
    """Function (image, severity, name) -> image of the package."""
    ndimage = pytest.importorskip("scipy.ndimage")
    filters = pytest.importorskip("skimage.filters")
    util = pytest.importorskip("skimage.util")
    with pytest.MonkeyPatch.context() as patch:
        interpolation = ModuleType("scipy.ndimage.interpolation")
        interpolation.map_coordinates = ndimage.map_coordinates
        resources = ModuleType("pkg_resources")
        resources.resource_filename = None  # used by frost only
        patch.setitem(sys.modules, interpolation.__name__, interpolation)
        patch.setitem(sys.modules, resources.__name__, resources)
        patch.setattr(np, "float_", np.float64, raising=False)
        package = pytest.importorskip("imagecorruptions")

        def gaussian(image, sigma, multichannel=False):
            channel_axis = -1 if multichannel else None
            return filters.gaussian(image, sigma=sigma, channel_axis=channel_axis)

        random_noise, rng = util.random_noise, np.random.default_rng(0)
        patch.setattr(package.corruptions, "gaussian", gaussian)
        # The package does not seed this function.
        patch.setattr(util, "random_noise", lambda *a, **k: random_noise(*a, rng=rng, **k))
        yield package.corrupt


def make_image(height, width, seed=0):
    """Generate an image with smooth colours, edges, noise, black, white and grey."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width] / 20
    waves = np.stack([np.sin(rows * f + columns * g + seed) for f, g in ((1, 2), (2, -1), (0, 3))])
    pixels = 128 + 80 * waves.transpose(1, 2, 0) + rng.normal(0, 4, (height, width, 3))
    pixels[height // 4 : height // 2, width // 4 : width // 2] = (200, 30, 40)
    pixels[height // 2 :, : width // 4] *= 0.3
    pixels[: height // 8] = np.linspace(0, 255, width)[:, None]
    return np.clip(pixels, 0, 255).astype(np.uint8)


def psnr(corrupted, image):
    return 10 * np.log10(255**2 / ((corrupted.astype(float) - image) ** 2).mean())


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "frost"])
def test_psnr_equals_the_original(original, name):
    number = NUM_DRAWS.get(name, 12)
    images = [make_image(160, 208, seed) for seed in range(4)]
    for severity in range(1, 6):
        np.random.seed(severity)  # noqa: NPY002 - the package uses numpy.random
        rng = np.random.default_rng(severity)
        theirs, ours = [], []
        for draw in range(number):
            image = images[draw % len(images)]
            theirs.append(psnr(original(image, severity, name), image))
            ours.append(psnr(corrupt(image, name, severity, rng), image))
        # Few drops vary strongly between random numbers; below they are compared pixel by pixel.
        if (name, severity) != ("spatter", 1):
            assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=TOLERANCE[name]), severity


# Corruptions that depend, or could depend, on the size of the image
@pytest.mark.parametrize("name", ["contrast", "defocus_blur", "snow", "jpeg_compression"])
def test_psnr_equals_the_original_on_a_large_image(original, name):
    image = make_image(1024, 2048)
    for severity in (1, 3, 5):
        np.random.seed(severity)  # noqa: NPY002
        theirs = psnr(original(image, severity, name), image)
        ours = psnr(corrupt(image, name, severity, np.random.default_rng(severity)), image)
        assert ours == pytest.approx(theirs, abs=0.25), severity


@pytest.mark.parametrize("severity", range(1, 6))
def test_glass_blur_equals_the_original_pixel_by_pixel(original, severity, monkeypatch):
    image = make_image(72, 90)
    shift, iterations = ((1, 2), (2, 1), (2, 3), (3, 2), (4, 2))[severity - 1]
    rng = np.random.default_rng(severity)
    shape = (2, 72 - 2 * shift, 90 - 2 * shift)
    shifts = [rng.integers(-shift, shift, shape, np.int32) for _ in range(iterations)]
    pairs = iter(np.concatenate([shift_pair.reshape(2, -1).T for shift_pair in shifts]))
    monkeypatch.setattr(np.random, "randint", lambda low, high, size: next(pairs))
    theirs = original(image, severity, "glass_blur").astype(int)
    assert next(pairs, None) is None
    ours = corrupt(image, "glass_blur", severity, np.random.default_rng(severity))
    # The package truncates decimals twice.
    assert (ours - theirs).min() >= 0
    assert (ours - theirs).max() <= 3


@pytest.mark.parametrize("size", [(160, 208), (1024, 2048)])
@pytest.mark.parametrize("severity", range(1, 6))
def test_spatter_equals_the_original_pixel_by_pixel(original, severity, size, monkeypatch):
    image = make_image(*size)
    noises = []

    def normal(size, loc, scale):
        rng = np.random.default_rng(severity)
        noises.append(weather._normal(size, loc, scale, rng))
        return noises[-1].astype(np.float64)

    monkeypatch.setattr(np.random, "normal", normal)
    theirs = original(image, severity, "spatter").astype(int)
    ours = corrupt(image, "spatter", severity, np.random.default_rng(severity))
    assert len(noises) == 1
    # A few pixels are wet on one side only, because of rounding of the noise. The package also
    # truncates decimals.
    far = np.abs(ours - theirs).max(axis=2) > 2
    assert far.mean() < 1e-3
    # Where few pixels are wet, rounding is a large part of the difference.
    assert psnr(ours, image) == pytest.approx(psnr(theirs, image), abs=0.3)


def test_motion_blur_equals_the_original_pixel_by_pixel(original, monkeypatch):
    image = make_image(96, 128)
    for severity in range(1, 6):
        for angle in (-45, -20.5, 0, 7, 44):
            monkeypatch.setattr(np.random, "uniform", lambda low, high, angle=angle: angle)
            theirs = original(image, severity, "motion_blur").astype(int)
            radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
            smeared = blur.smear(image.astype(np.float32), radius, sigma, angle)
            assert np.abs(np.floor(smeared + 1e-3) - theirs).max() <= 1
