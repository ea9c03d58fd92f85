"""The training transforms equal the reference's steps, written out in their original order."""

from io import BytesIO

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from segformer_pl.data import transforms
from segformer_pl.data.decoding import EncodedImage
from segformer_pl.data.transforms import TrainTransforms, distort, to_tensors


def photograph(height, width):
    rows, columns = np.mgrid[:height, :width] / 30
    waves = [np.sin(rows * f + columns * g) for f, g in ((1, 2), (2, -1), (0.5, 3))]
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return np.clip(128 + 90 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def encoded(pixels, format="PNG"):
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format=format, quality=95)
    return EncodedImage(buffer.getvalue(), "here", pixels.shape[2])


def blocks(height, width, num_classes=5, side=16):
    ids = np.random.default_rng(1).integers(0, num_classes, (height // side + 1, width // side + 1))
    return np.kron(ids, np.ones((side, side)))[:height, :width].astype(np.uint8)


def pipeline(**arguments):
    settings = {
        "crop_size": None,
        "scale_range": None,
        "base_size": None,
        "photometric": False,
        "ignore_index": 255,
    }
    return TrainTransforms(**settings | arguments)


def bilinear(pixels, height, width):
    """Resize bilinearly with aligned pixel centres, without antialiasing, in float64."""
    result = pixels.astype(np.float64)
    for axis, new in enumerate((height, width)):
        old = pixels.shape[axis]
        source = (np.arange(new) + 0.5) * old / new - 0.5
        low = np.floor(source).astype(int)
        shape = [1, 1, 1]
        shape[axis] = new
        weight = (source - low).reshape(shape)
        below, above = (np.clip(i, 0, old - 1) for i in (low, low + 1))
        result = result.take(below, axis) * (1 - weight) + result.take(above, axis) * weight
    return result


def nearest(label, height, width):
    return cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST)


def reference_order(pixels, label, crop_size, scale_range, base_size, seed, ratio=0.75):
    """Reference order of steps: scale the whole image, crop, flip, pad after normalisation."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(*scale_range)
    height, width = label.shape
    if base_size:
        long, short = int(base_size[0] * scale), int(base_size[1] * scale)
        scale = min(long / max(height, width), short / min(height, width))
    height, width = int(height * scale + 0.5), int(width * scale + 0.5)
    pixels, label = bilinear(pixels, height, width), nearest(label, height, width)
    for _ in range(11):
        top = rng.integers(max(height - crop_size[0], 0) + 1)
        left = rng.integers(max(width - crop_size[1], 0) + 1)
        cropped = label[top : top + crop_size[0], left : left + crop_size[1]]
        values, counts = np.unique(cropped[cropped != 255], return_counts=True)
        if len(values) > 1 and counts.max() / counts.sum() < ratio:
            break
    pixels = pixels[top : top + crop_size[0], left : left + crop_size[1]]
    if rng.random() < 0.5:
        pixels, cropped = pixels[:, ::-1], cropped[:, ::-1]
    below, right = crop_size[0] - cropped.shape[0], crop_size[1] - cropped.shape[1]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalized = np.pad((pixels / 255 - mean) / std, ((0, below), (0, right), (0, 0)))
    return normalized * std + mean, np.pad(cropped, ((0, below), (0, right)), constant_values=255)


CASES = [
    ((60, 90), (32, 48), (0.5, 2.0), None),
    ((60, 90), (32, 48), (0.5, 2.0), (120, 50)),
    ((90, 60), (64, 64), (0.3, 1.0), None),  # often smaller than the crop
    ((61, 83), (32, 32), (2.0, 8.0), None),  # much larger: only the pixels of the crop are computed
    ((64, 64), (64, 64), (1.0, 1.0), None),
]


@pytest.mark.parametrize(("size", "crop_size", "scale_range", "base_size"), CASES)
def test_equals_the_reference_order_of_steps(size, crop_size, scale_range, base_size):
    pixels, label = photograph(*size), blocks(*size)
    label[:20, :30] = 255
    fused = pipeline(crop_size=crop_size, scale_range=scale_range, base_size=base_size)
    for seed in range(25):
        image, ids = fused(encoded(pixels), label, np.random.default_rng(seed))
        expected, expected_ids = reference_order(
            pixels, label, crop_size, scale_range, base_size, seed
        )
        assert image.dtype == torch.float32
        assert ids.dtype == torch.int64
        assert np.array_equal(ids.numpy(), expected_ids)
        # OpenCV rounds to whole levels, with weights of 11 bits when it resizes the whole image
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() * 255 < 0.8


@pytest.mark.parametrize(
    "fault",
    ["half a pixel", "antialias", "black padding", "no tries", "last row lost", "flip of one only"],
)
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    resample, near = transforms._resample, transforms._nearest
    if fault == "half a pixel":
        monkeypatch.setattr(transforms, "_resample", lambda *a: np.roll(resample(*a), 1, axis=1))
    elif fault == "antialias":

        def antialiased(image, height, width, top, left, rows, columns):
            small = Image.fromarray(image.decode()).resize((width, height), Image.BILINEAR)
            return np.array(small)[top : top + rows, left : left + columns]

        monkeypatch.setattr(transforms, "_resample", antialiased)
    elif fault == "black padding":
        monkeypatch.setattr(transforms, "PADDING", (0.0, 0.0, 0.0))
    elif fault == "no tries":
        monkeypatch.setattr(transforms, "CROP_TRIES", 0)
    elif fault == "last row lost":
        monkeypatch.setattr(
            transforms, "_nearest", lambda *a: np.concatenate([near(*a)[1:], near(*a)[-1:]])
        )
    else:
        monkeypatch.setattr(transforms, "_resample", lambda *a: resample(*a)[:, ::-1])
    noticed = 0
    for case in CASES[:3]:
        try:
            test_equals_the_reference_order_of_steps(*case)
        except AssertionError:
            noticed += 1
    assert noticed


@pytest.mark.parametrize("old", [1, 90, 121, 683])
def test_nearest_labels_equal_those_of_opencv(old):
    """Includes sizes such as 90 to 50, where OpenCV's rounding selects the previous pixel."""
    label = np.arange(old, dtype=np.uint16)[None].repeat(2, 0)
    for new in range(1, 2 * old + 2):
        resized = transforms._nearest(label, 2, new, 0, 0, 2, new)
        assert np.array_equal(resized, nearest(label, 2, new)), new


def test_the_limit_for_one_class_is_strict():
    # 3 of 4 pixels are one class: exactly 0.75, which the reference does not accept
    label = np.array([[0, 0], [0, 1]], np.uint8)
    crop = pipeline(crop_size=(2, 2))
    assert not crop._is_mixed(label)
    assert crop._is_mixed(np.array([[0, 0], [1, 1]], np.uint8))
    assert not crop._is_mixed(np.array([[0, 255], [255, 255]], np.uint8))
    # the share is that of labelled pixels
    assert not crop._is_mixed(np.array([[0, 0, 0, 1, 255, 255]], np.uint8))
    for dtype in (np.uint8, np.int32):
        assert crop._is_mixed(np.array([[0, 0, 1, 255]], dtype))


def test_tries_for_a_mixed_crop_succeed_and_end():
    label = np.zeros((64, 64), np.uint8)
    label[:, 60:] = 1
    crop = pipeline(crop_size=(8, 8))
    image = encoded(photograph(64, 64))
    shares = [
        (crop(image, label, np.random.default_rng(seed))[1] == 1).any().item() for seed in range(60)
    ]
    # one try hits the border with probability 11/57, and is mixed enough with probability 3/57
    assert 0.25 < np.mean(shares) < 0.95
    only = crop(image, np.zeros((64, 64), np.uint8), np.random.default_rng(0))[1]
    assert only.shape == (8, 8)


class RecordingGenerator:
    """A generator that records the corners of the crops that it draws."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.corners = []

    def integers(self, *limits):
        self.corners.append(int(self.rng.integers(*limits)))
        return self.corners[-1]

    def random(self):
        return 1.0  # no flip


@pytest.mark.parametrize("mixed_at", [1, 2, 10, 11, None])
def test_the_crop_after_ten_that_are_not_mixed_is_used_unchecked(mixed_at, monkeypatch):
    checked = []

    def is_mixed(self, cropped):
        checked.append(cropped)
        return len(checked) == mixed_at

    monkeypatch.setattr(TrainTransforms, "_is_mixed", is_mixed)
    label = np.arange(64 * 64).reshape(64, 64) % 251
    rng = RecordingGenerator(0)
    _, cropped = pipeline(crop_size=(8, 8))(encoded(photograph(64, 64)), label, rng)
    num_draws = mixed_at if mixed_at and mixed_at <= 10 else 11
    assert len(rng.corners) == 2 * num_draws  # a row and a column each
    assert len(checked) == min(num_draws, 10)
    top, left = rng.corners[-2:]
    assert np.array_equal(cropped.numpy(), label[top : top + 8, left : left + 8])


def reference_distortion(pixels, seed):
    """The reference's distortion: OpenCV's conversions, with order and truncation written out."""
    rng = np.random.default_rng(seed)

    def convert(values, alpha=1.0, beta=0.0):
        return np.clip(values.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    if rng.random() < 0.5:
        pixels = convert(pixels, beta=np.float32(rng.uniform(-32, 32)))
    contrast_first = rng.random() < 0.5
    if contrast_first and rng.random() < 0.5:
        pixels = convert(pixels, alpha=np.float32(rng.uniform(0.5, 1.5)))
    if rng.random() < 0.5:
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = convert(hsv[..., 1], alpha=np.float32(rng.uniform(0.5, 1.5)))
        pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if rng.random() < 0.5:
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-18, 18)) % 180
        pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not contrast_first and rng.random() < 0.5:
        pixels = convert(pixels, alpha=np.float32(rng.uniform(0.5, 1.5)))
    return pixels


def test_photometric_distortion_equals_the_steps_written_out():
    pixels = photograph(24, 40)
    changed = 0
    for seed in range(60):
        distorted = distort(pixels, np.random.default_rng(seed))
        assert np.array_equal(distorted, reference_distortion(pixels, seed))
        changed += not np.array_equal(distorted, pixels)
    assert 50 <= changed <= 60  # unchanged with probability 1/16


def test_rounding_instead_of_truncation_is_noticed(monkeypatch):
    monkeypatch.setattr(transforms, "_truncate", lambda levels: np.rint(np.clip(levels, 0, 255)))
    with pytest.raises(AssertionError):
        test_photometric_distortion_equals_the_steps_written_out()


def test_distortion_is_part_of_the_pipeline_between_flip_and_padding():
    pixels, label = photograph(20, 20), blocks(20, 20, side=4)
    plain, distorted = pipeline(crop_size=(24, 24)), pipeline(crop_size=(24, 24), photometric=True)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        # leaves the generator in the state in which the distortion starts
        expected, _ = plain(encoded(pixels), label, rng)
        levels = (expected[:, :20, :20] * 255).round().byte().permute(1, 2, 0).numpy()
        image, _ = distorted(encoded(pixels), label, np.random.default_rng(seed))
        inner = torch.from_numpy(distort(np.ascontiguousarray(levels), rng)).permute(2, 0, 1) / 255
        assert torch.equal(image[:, :20, :20], inner)
        assert torch.equal(image[:, 20:], expected[:, 20:])


@pytest.mark.parametrize(
    "arguments",
    [
        {"crop_size": (40, 40), "scale_range": (0.5, 2.0)},
        {"crop_size": (24, 20), "scale_range": (2.0, 2.5)},
        {"base_size": (96, 48)},
    ],
    ids=["crop", "warp", "base size"],
)
def test_a_fourth_band_goes_where_rgb_goes_and_keeps_its_values(arguments):
    rgb, label = photograph(50, 70), blocks(50, 70)
    # A band that equals one of RGB has to end up as that one, where colours are not distorted.
    four = np.concatenate([rgb, rgb[..., 1:2]], axis=2)
    plain, distorting = pipeline(**arguments), pipeline(**arguments, photometric=True)
    for seed in range(8):
        expected, ids = distorting(encoded(rgb), label, np.random.default_rng(seed))
        undistorted, _ = plain(encoded(rgb), label, np.random.default_rng(seed))
        image, four_ids = distorting(encoded(four), label, np.random.default_rng(seed))
        assert torch.equal(image[:3], expected)
        assert torch.equal(ids, four_ids)
        is_padding = ids == 255
        assert torch.equal(image[3, ~is_padding], undistorted[1, ~is_padding])
        assert not image[3, is_padding].any()


def test_a_distorted_fourth_band_is_noticed(monkeypatch):
    def distort_all(pixels, rng):
        return np.concatenate([distort(pixels[..., :3].copy(), rng), pixels[..., 3:] // 2], axis=2)

    monkeypatch.setattr(transforms, "_distort_rgb", distort_all)
    with pytest.raises(AssertionError):
        test_a_fourth_band_goes_where_rgb_goes_and_keeps_its_values({"crop_size": (40, 40)})


@pytest.mark.parametrize("factor", [0.5, 0.3, 0.2, 0.11])
def test_a_reduced_jpeg_equals_the_full_one_with_less_aliasing(factor):
    size = (480, 643)
    image = encoded(photograph(*size), "JPEG")
    small = pipeline(scale_range=(factor, factor))
    label = blocks(*size)
    got, ids = small(image, label, np.random.default_rng(3))
    height, width = ids.shape
    plain = bilinear(image.decode(), height, width)
    filtered = np.array(
        Image.fromarray(image.decode()).resize((width, height), Image.BILINEAR), dtype=float
    )
    flipped = np.random.default_rng(3)
    flipped.uniform(), flipped.integers(1), flipped.integers(1)
    if flipped.random() < 0.5:
        got = got.flip(2)
    levels = got.permute(1, 2, 0).numpy() * 255
    # plain sampling picks single pixels of the texture of +-6 levels
    assert np.abs(levels - plain).mean() < 5.0
    assert np.abs(levels - filtered).mean() < 2.5
    assert np.abs(levels - filtered).mean() < np.abs(plain - filtered).mean()


def test_the_same_generator_gives_the_same_sample():
    pixels, label = photograph(50, 40), blocks(50, 40)
    both = pipeline(crop_size=(32, 32), scale_range=(0.5, 2.0), photometric=True)
    one, other = (both(encoded(pixels), label, np.random.default_rng(5)) for _ in range(2))
    assert all(map(torch.equal, one, other))
    another = both(encoded(pixels), label, np.random.default_rng(6))
    assert not torch.equal(one[0], another[0])


def test_scales_are_uniform_over_the_range_and_reach_its_limits():
    label = blocks(100, 200)
    image = encoded(photograph(100, 200))
    scaled = pipeline(scale_range=(0.5, 2.0))
    heights = [
        scaled._draw_size(image.size, np.random.default_rng(seed))[0] for seed in range(2000)
    ]
    assert min(heights) in (50, 51)
    assert max(heights) in (199, 200)
    assert abs(np.mean(heights) - 125) < 3
    assert label.shape == (100, 200)


@pytest.mark.parametrize(
    ("size", "base_size", "expected"),
    [
        ((1024, 2048), (2048, 1024), (1024, 2048)),  # Cityscapes
        ((512, 683), (2048, 512), (512, 683)),  # ADE20K, limited by its short side
        ((300, 1500), (2048, 512), (410, 2048)),  # limited by its long side
        ((683, 512), (2048, 512), (683, 512)),  # portrait format
    ],
)
def test_images_of_any_format_are_fitted_into_the_base_size(size, base_size, expected):
    assert pipeline(base_size=base_size)._draw_size(size, np.random.default_rng(0)) == expected


def test_evaluation_does_not_change_the_image():
    pixels, label = photograph(5, 7), blocks(5, 7)
    image, ids = to_tensors(encoded(pixels), label, np.random.default_rng(0))
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert image.dtype == torch.float32
    assert np.array_equal(ids.numpy(), label)
    assert ids.dtype == torch.int64


@pytest.mark.parametrize("scale_range", [(0.0, 1.0), (2.0, 0.5), (-1.0, 1.0)])
def test_invalid_scale_ranges_are_refused(scale_range):
    with pytest.raises(ValueError, match=r"data.scale_range .*: give two factors above 0"):
        pipeline(scale_range=scale_range)
