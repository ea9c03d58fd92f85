"""Brightness, contrast, saturation and JPEG compression."""

import colorsys
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image


def test_saturate_is_paler_at_1_and_2_and_more_vivid_from_3_on(photograph, run):
    image = photograph(64, 64)

    def saturation(pixels):
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)[..., 1].mean()

    values = [saturation(run(image, "saturate", severity)) for severity in range(1, 6)]
    before = saturation(image)
    assert values[1] < values[0] < before < values[2] < values[3] < values[4]


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_brightness_is_in_hsv(severity, photograph, run):
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
def test_saturation_is_in_hsv(severity, photograph, run):
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


def test_contrast_is_about_the_mean_of_each_channel(photograph, run):
    image = photograph(40, 60)
    for severity, factor in enumerate((0.4, 0.3, 0.2, 0.1, 0.05), 1):
        mean = image.mean((0, 1))
        expected = mean + factor * (image - mean)
        assert np.abs(run(image, "contrast", severity) - expected).max() < 0.51


def test_jpeg_equals_pillows(photograph, run):
    image = photograph(40, 60)
    for severity, quality in enumerate((25, 18, 15, 10, 7), 1):
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        expected = np.asarray(Image.open(BytesIO(buffer.getvalue())))
        assert np.array_equal(run(image, "jpeg_compression", severity), expected)
