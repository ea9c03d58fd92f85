"""Corruptions have the effect and strength that their constants define, and are reproducible."""

from io import BytesIO

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
    corrupt,
)
from segformer_pl.data.decoding import EncodedImage


def psnr(corrupted, image):
    error = ((corrupted.astype(float) - image) ** 2).mean()
    return 10 * np.log10(255**2 / error)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ORIGINAL_PSNR)
def test_as_strong_as_the_original(name, photograph, run):
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
def test_severity_is_monotone(name, photograph, run):
    images = [photograph(96, 128, seed) for seed in range(4)]
    severities = UNORDERED.get(name, [1, 2, 3, 4, 5])
    ratios = [
        np.mean([psnr(run(image, name, severity, n), image) for n, image in enumerate(images)])
        for severity in severities
    ]
    assert all(np.diff(ratios) < 0), ratios
    assert ratios[-1] < 30


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (33, 64), (120, 70)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_any_size(name, size, photograph, run):
    image = photograph(128, 128)[: size[0], : size[1]]
    before = image.copy()
    for severity in (1, 5):
        corrupted = run(image, name, severity)
        assert corrupted.shape == image.shape
        assert corrupted.dtype == np.uint8
    assert np.array_equal(image, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_results_depend_on_the_generator_alone(name, photograph, run):
    image = photograph(48, 64)
    np.random.seed(1)  # noqa: NPY002 - the global state must have no effect
    first = run(image, name, 3, 7)
    np.random.seed(2)  # noqa: NPY002
    assert np.array_equal(run(image, name, 3, 7), first)
    is_deterministic = name in {*GROUPS["digital"], "defocus_blur", "gaussian_blur"}
    assert np.array_equal(run(image, name, 3, 8), first) == is_deterministic


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
def test_unknown_corruptions_and_severities_are_refused(name, severity, message, flat):
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


@pytest.fixture(scope="session")
def sample(photograph):
    """Function (name, severity, seed, position) -> pixels, label, corrupted image, train ids."""

    def call(name, severity, seed=0, position=0):
        pixels = photograph(20, 30)
        label = np.random.default_rng(0).integers(0, 5, (20, 30)).astype(np.uint8)
        transforms = CorruptedImages(name, severity, seed)
        # the generator that Samples passes to its transforms
        rng = np.random.default_rng(np.random.SeedSequence([0, 0, position]))
        return pixels, label, *transforms(encoded(pixels), label, rng)

    return call


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_sample_keeps_its_label(name, sample):
    pixels, label, image, ids = sample(name, 2)
    assert image.shape == (3, 20, 30)
    assert image.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert np.array_equal(ids.numpy(), label)
    assert not np.array_equal(image.permute(1, 2, 0).numpy() * 255, pixels)


def test_random_numbers_depend_on_seed_position_corruption_and_severity(monkeypatch, sample):
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
