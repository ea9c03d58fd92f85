"""Corruptions have the effect and strength that their constants define, and are reproducible."""

import colorsys
from io import BytesIO

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from segformer_pl.data import corruptions
from segformer_pl.data.corruptions import (
    CORRUPTIONS,
    GROUPS,
    PAPER_SEVERITIES,
    CorruptedImages,
    blur,
    corrupt,
    weather,
)
from segformer_pl.data.decoding import EncodedImage

NOISE_STD = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "speckle_noise": (0.15, 0.20, 0.35, 0.45, 0.60),
}


def photograph(height, width, seed=0):
    """Smooth colours, edges and grain, with black, white and grey in it."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width] / 20
    waves = np.stack([np.sin(rows * f + columns * g + seed) for f, g in ((1, 2), (2, -1), (0, 3))])
    pixels = 128 + 80 * waves.transpose(1, 2, 0) + rng.normal(0, 4, (height, width, 3))
    pixels[height // 4 : height // 2, width // 4 : width // 2] = (200, 30, 40)
    pixels[height // 2 :, : width // 4] *= 0.3
    pixels[: height // 8] = np.linspace(0, 255, width)[:, None]
    return np.clip(pixels, 0, 255).astype(np.uint8)


def flat(color, size=(96, 128)):
    return np.full((*size, 3), color, np.uint8)


def psnr(corrupted, image):
    error = ((corrupted.astype(float) - image) ** 2).mean()
    return 10 * np.log10(255**2 / error)


def run(image, name, severity, *seed):
    return corrupt(image, name, severity, np.random.default_rng([severity, *seed]))


def test_names_and_severities_are_those_of_table_5():
    assert [list(functions) for functions in GROUPS.values()] == [
        ["motion_blur", "defocus_blur", "glass_blur", "gaussian_blur"],
        ["gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"],
        ["brightness", "contrast", "saturate", "jpeg_compression"],
        ["snow", "spatter", "fog", "frost"],
    ]
    assert sum(len(severities) for severities in PAPER_SEVERITIES.values()) == 12 * 5 + 4 * 3
    assert list(PAPER_SEVERITIES["shot_noise"]) == [1, 2, 3]


# Mean PSNR in dB of corrupted copies of `photograph(96, 128, seed)`, seeds 0 to 3, by severity.
# Measured with the package imagecorruptions 1.1.2 over 24 random draws; 8 for glass, 200 for
# motion, 400 for snow, spatter and fog. tests/references/test_corruptions.py runs the package.
# frost is not comparable.
ORIGINAL_PSNR = {
    "motion_blur": (24.07, 20.78, 17.86, 15.82, 14.9),
    "defocus_blur": (27.72, 26.39, 24.29, 22.85, 21.33),
    "glass_blur": (25.08, 25.65, 20.9, 21.87, 21.11),
    "gaussian_blur": (30.57, 27.04, 25.05, 23.48, 20.91),
    "gaussian_noise": (22.08, 18.76, 15.64, 13.0, 10.59),
    "impulse_noise": (20.2, 17.19, 15.43, 12.68, 10.67),
    "shot_noise": (21.5, 17.99, 15.18, 11.97, 10.19),
    "speckle_noise": (22.58, 20.27, 15.98, 14.19, 12.39),
    "brightness": (22.21, 16.2, 13.65, 11.97, 10.78),
    "contrast": (16.4, 15.07, 13.91, 12.88, 12.41),
    "saturate": (14.62, 12.43, 17.41, 15.16, 14.65),
    "jpeg_compression": (29.64, 28.52, 27.83, 26.0, 24.3),
    "snow": (14.85, 10.71, 10.62, 9.0, 7.74),
    "spatter": (30.39, 23.87, 21.88, 18.6, 16.47),
    "fog": (14.49, 13.57, 12.87, 12.77, 12.34),
}
# Tolerance in dB of a mean over few draws, for rounding and for the spread of the draws.
TOLERANCE = {
    "brightness": 0.3,
    "glass_blur": 0.2,
    "motion_blur": 0.3,
    "snow": 0.2,
    "spatter": 0.4,
    "fog": 0.5,
}


@pytest.mark.parametrize("name", ORIGINAL_PSNR)
def test_as_strong_as_the_original(name):
    images = [photograph(96, 128, seed) for seed in range(4)]
    num_draws = {"motion_blur": 40, "spatter": 40, "fog": 50, "snow": 24}.get(name, 4)
    for severity, expected in enumerate(ORIGINAL_PSNR[name], 1):
        values = [
            psnr(run(images[draw % 4], name, severity, draw), images[draw % 4])
            for draw in range(num_draws)
        ]
        rare = (name, severity) == ("spatter", 1)  # one or two drops on an image
        tolerance = 1.5 if rare else TOLERANCE.get(name, 0.12)
        assert np.mean(values) == pytest.approx(expected, abs=tolerance), severity


# Corruptions whose constants do not increase with every severity: glass (shift and iterations
# change in turn), saturate (two scales, pale and vivid), fog and frost (density against detail).
# Only the severities listed are compared, of which 5 is the strongest.
UNORDERED = {"glass_blur": [1, 4, 5], "saturate": [3, 4, 5], "fog": [1, 5], "frost": [1, 2, 3]}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_is_monotone(name):
    images = [photograph(96, 128, seed) for seed in range(4)]
    severities = UNORDERED.get(name, [1, 2, 3, 4, 5])
    ratios = [
        np.mean([psnr(run(image, name, severity, n), image) for n, image in enumerate(images)])
        for severity in severities
    ]
    assert all(np.diff(ratios) < 0), ratios
    assert ratios[-1] < 30


def test_saturate_is_paler_at_1_and_2_and_more_vivid_from_3_on():
    image = photograph(64, 64)

    def saturation(pixels):
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)[..., 1].mean()

    values = [saturation(run(image, "saturate", severity)) for severity in range(1, 6)]
    before = saturation(image)
    assert values[1] < values[0] < before < values[2] < values[3] < values[4]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (33, 64), (120, 70)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_any_size(name, size):
    image = photograph(128, 128)[: size[0], : size[1]]
    before = image.copy()
    for severity in (1, 5):
        corrupted = run(image, name, severity)
        assert corrupted.shape == image.shape
        assert corrupted.dtype == np.uint8
    assert np.array_equal(image, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_results_depend_on_the_generator_alone(name):
    image = photograph(48, 64)
    np.random.seed(1)  # noqa: NPY002 - the global state must have no effect
    first = run(image, name, 3, 7)
    np.random.seed(2)  # noqa: NPY002
    assert np.array_equal(run(image, name, 3, 7), first)
    is_deterministic = name in {*GROUPS["digital"], "defocus_blur", "gaussian_blur"}
    assert np.array_equal(run(image, name, 3, 8), first) == is_deterministic


@pytest.mark.parametrize("severity", range(1, 6))
def test_noise_is_as_strong_as_its_constants(severity):
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


def test_speckle_leaves_black_black_and_gaussian_does_not():
    assert run(flat(0), "speckle_noise", 5).max() == 0
    assert run(flat(0), "shot_noise", 5).max() == 0
    assert run(flat(0), "gaussian_noise", 1).max() > 0


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_brightness_is_in_hsv(severity):
    image = photograph(24, 24)
    image[0, :2] = [(0, 0, 0), (255, 255, 255)]
    added = severity / 10
    for before, after in zip(
        image.reshape(-1, 3) / 255, run(image, "brightness", severity).reshape(-1, 3)
    ):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + added, 1))
        assert after == pytest.approx(np.array(expected) * 255, abs=0.51)


@pytest.mark.parametrize("severity", range(1, 6))
def test_saturation_is_in_hsv(severity):
    image = photograph(24, 24)
    image[0, :3] = [(0, 0, 0), (255, 255, 255), (90, 90, 90)]
    factor, added = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[severity - 1]
    for before, after in zip(
        image.reshape(-1, 3) / 255, run(image, "saturate", severity).reshape(-1, 3)
    ):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        new_saturation = min(saturation * factor + added, 1)
        expected = colorsys.hsv_to_rgb(hue, new_saturation, value)
        assert after == pytest.approx(np.array(expected) * 255, abs=0.51)


def test_contrast_is_about_the_mean_of_each_channel():
    image = photograph(40, 60)
    for severity, factor in enumerate((0.4, 0.3, 0.2, 0.1, 0.05), 1):
        mean = image.mean((0, 1))
        expected = mean + factor * (image - mean)
        assert np.abs(run(image, "contrast", severity) - expected).max() < 0.51


def test_jpeg_equals_pillows():
    image = photograph(40, 60)
    for severity, quality in enumerate((25, 18, 15, 10, 7), 1):
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        expected = np.asarray(Image.open(BytesIO(buffer.getvalue())))
        assert np.array_equal(run(image, "jpeg_compression", severity), expected)


def delta(side=201):
    image = np.zeros((side, side, 3), np.float32)
    image[side // 2, side // 2] = 1
    return image


def moments(kernel):
    """Sum, mean position and standard deviation along rows and columns, relative to the centre."""
    rows, columns = np.indices(kernel.shape) - np.array(kernel.shape).reshape(2, 1, 1) // 2
    total = kernel.sum()
    means = [(kernel * offsets).sum() / total for offsets in (rows, columns)]
    stds = [
        np.sqrt((kernel * (offsets - mean) ** 2).sum() / total)
        for offsets, mean in zip((rows, columns), means)
    ]
    return total, means, stds


@pytest.mark.parametrize("severity", range(1, 6))
def test_blurred_delta(severity):
    rng = np.random.default_rng(severity)
    image = delta()
    sigma = (1, 2, 3, 4, 6)[severity - 1]
    total, means, stds = moments(blur.gaussian_blur(image, severity, rng)[..., 1])
    assert total == pytest.approx(1, abs=1e-5)
    assert means == pytest.approx([0, 0], abs=1e-4)
    assert stds == pytest.approx([sigma, sigma], rel=0.01)

    # A disk of radius r has a standard deviation of r / 2 along each axis.
    radius = (3, 4, 6, 8, 10)[severity - 1]
    alias = (0.1, 0.5, 0.5, 0.5, 0.5)[severity - 1]
    assert blur.disk(radius, alias).sum() == pytest.approx(1, abs=1e-6)
    total, means, stds = moments(blur.defocus_blur(image, severity, rng)[..., 0])
    assert total == pytest.approx(1, abs=1e-5)
    assert means == pytest.approx([0, 0], abs=1e-4)
    assert stds == pytest.approx([radius / 2] * 2, rel=0.06)

    # Each pixel is a mean of the pixels after it on a line, weighted by half a Gaussian.
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    for degrees in (-45, 0, 30):
        blurred = blur.smear(image, radius, sigma, degrees)[..., 2]
        total, means, _ = moments(blurred)
        steps = np.arange(2 * radius + 1)
        weights = np.exp(-(steps**2) / (2 * sigma**2))
        length = (weights * steps).sum() / weights.sum()
        assert total == pytest.approx(1, abs=1e-5)
        angle = np.radians(degrees)
        expected = [-length * np.sin(angle), -length * np.cos(angle)]
        assert means == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("name", GROUPS["blur"])
def test_blur_keeps_a_constant_image(name):
    for severity in range(1, 6):
        assert np.array_equal(run(flat((10, 120, 250)), name, severity), flat((10, 120, 250)))


@pytest.mark.parametrize(("shift", "iterations"), [(1, 2), (2, 3), (4, 2)])
def test_replacements_equal_a_sequential_loop(shift, iterations):
    height, width = 30, 41
    indices = blur.replacements(height, width, shift, iterations, np.random.default_rng(0))
    # As in the original, `slow[here]` is a view, so this swap copies the neighbour and loses the
    # pixel.
    rng = np.random.default_rng(0)
    slow = np.arange(height * width).reshape(height, width, 1)
    rows, columns = (range(side - shift, shift, -1) for side in (height, width))
    for _ in range(iterations):
        right, down = rng.integers(-shift, shift, (2, len(rows), len(columns)), np.int32)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                here, there = (row, column), (row + down[i, j], column + right[i, j])
                slow[here], slow[there] = slow[there], slow[here]
    assert np.array_equal(indices, slow.ravel())
    assert len(np.unique(indices)) < height * width  # some colours are lost


def test_an_image_too_small_for_replacements_is_unchanged():
    indices = blur.replacements(3, 3, 4, 2, np.random.default_rng(0))
    assert np.array_equal(indices, np.arange(9))


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


def test_fog_by_hand(monkeypatch):
    monkeypatch.setattr(weather, "plasma", lambda h, w, decay, rng: np.full((h, w), 0.5, "f4"))
    image = flat(51)
    image[0, 0] = 204  # 0.8, the brightest
    # (0.2 + 1.5 * 0.5) * 0.8 / (0.8 + 1.5)
    assert run(image, "fog", 1)[5, 5] == pytest.approx(255 * 0.95 * 0.8 / 2.3, abs=0.51)


def test_frost_by_hand(monkeypatch):
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


def test_snow_brightens_black_and_adds_white_flakes():
    # Without a flake, black turns to (1 - weight) * 0.5.
    for severity, weight in enumerate((0.8, 0.7, 0.7, 0.65, 0.55), 1):
        snowy = run(flat(0), "snow", severity)
        assert snowy.min() == pytest.approx(255 * (1 - weight) * 0.5, abs=0.51)
        assert snowy.max() > snowy.min() + 50
        assert np.ptp(snowy, axis=2).max() == 0  # white


def test_spatter_covers_the_expected_share_of_the_image():
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


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("gausian_noise", 1, "there is no corruption 'gausian_noise'; did you mean 'gaussian_n"),
        ("rain", 1, "there is no corruption 'rain'; there are: motion_blur, defocus_blur,"),
        ("snow", 0, "snow: there is no severity 0; give 1, 2, 3, 4 or 5"),
        ("snow", 6, "snow: there is no severity 6"),
        ("fog", 1.5, "fog: there is no severity 1.5"),
    ],
)
def test_unknown_corruptions_and_severities_are_refused(name, severity, message):
    for call in (
        lambda: corrupt(flat(0), name, severity, np.random.default_rng(0)),
        lambda: CorruptedImages(name, severity, 0),
    ):
        with pytest.raises(ValueError, match="there is no") as error:
            call()
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_other_than_8_bit_rgb_images_are_refused(image):
    with pytest.raises(ValueError, match=r"give \(H, W, 3\) uint8 RGB"):
        corrupt(image, "fog", 1, np.random.default_rng(0))


# Corruption of samples in a stream.


def encoded(pixels):
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return EncodedImage(buffer.getvalue(), "here")


def sample(name, severity, seed=0, position=0):
    pixels = photograph(20, 30)
    label = np.random.default_rng(0).integers(0, 5, (20, 30)).astype(np.uint8)
    transforms = CorruptedImages(name, severity, seed)
    # the generator that Samples passes to its transforms
    rng = np.random.default_rng(np.random.SeedSequence([0, 0, position]))
    return pixels, label, *transforms(encoded(pixels), label, rng)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_sample_keeps_its_label(name):
    pixels, label, image, ids = sample(name, 2)
    assert image.shape == (3, 20, 30)
    assert image.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert np.array_equal(ids.numpy(), label)
    assert not np.array_equal(image.permute(1, 2, 0).numpy() * 255, pixels)


def test_random_numbers_depend_on_seed_position_corruption_and_severity(monkeypatch):
    drawn = {}

    def spy(image, name, severity, rng):
        drawn[len(drawn)] = rng.random()
        return image

    monkeypatch.setattr(corruptions, "corrupt", spy)
    for arguments in (
        ("fog", 1, 0, 0),
        ("fog", 1, 0, 0),
        ("snow", 1, 0, 0),
        ("fog", 2, 0, 0),
        ("fog", 1, 1, 0),
        ("fog", 1, 0, 1),
    ):
        sample(*arguments)
    assert drawn[0] == drawn[1]
    assert len(set(drawn.values())) == 5
