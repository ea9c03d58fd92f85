"""Comparison of the training pipeline with mmsegmentation's transforms.

Both sides use the same stream of random numbers, so images, label maps and the number of random
numbers must be equal.
"""

from io import BytesIO

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from segformer_pl.data import transforms
from segformer_pl.data.decoding import EncodedImage
from segformer_pl.data.transforms import TrainTransforms

CROP, BASE, SCALES, IGNORED = (56, 72), (128, 96), (0.5, 2.0), 255
MEAN = [123.675, 116.28, 103.53]
STD = [58.395, 57.12, 57.375]


def sample(seed, size=(90, 121), num_classes=5):
    """Return an RGB image of smooth noise, and a label map of blobs, some of them ignored."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (8, 10, 3)).astype(np.uint8)
    pixels = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
    pixels = pixels ^ generator.integers(0, 8, pixels.shape).astype(np.uint8)
    classes = generator.integers(0, num_classes, (6, 7)).astype(np.uint8)
    classes[generator.random(classes.shape) < 0.3] = 0  # so that one class dominates some crops
    classes[generator.random(classes.shape) < 0.2] = IGNORED
    return pixels, cv2.resize(classes, size[::-1], interpolation=cv2.INTER_NEAREST)


def ours(pixels, label, draws, photometric=True):
    """Run the training transforms with forced random numbers."""
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    pipeline = TrainTransforms(CROP, SCALES, BASE, photometric, IGNORED)
    return pipeline(EncodedImage(stream.getvalue(), "here"), label, draws)


def theirs(pixels, label, photometric=True):
    """Run the pipeline of mmsegmentation's SegFormer configurations, data preprocessor included."""
    from mmengine.dataset import Compose
    from mmseg.models import SegDataPreProcessor
    from mmseg.structures import SegDataSample

    steps = [
        {"type": "RandomResize", "scale": BASE, "ratio_range": SCALES, "keep_ratio": True},
        {"type": "RandomCrop", "crop_size": CROP, "cat_max_ratio": 0.75},
        {"type": "RandomFlip", "prob": 0.5},
        *([{"type": "PhotoMetricDistortion"}] if photometric else []),
        {"type": "PackSegInputs"},
    ]
    inputs = {
        "img": np.ascontiguousarray(pixels[..., ::-1]),  # BGR
        "gt_seg_map": label.copy(),
        "seg_fields": ["gt_seg_map"],
        "img_shape": label.shape,
        "ori_shape": label.shape,
    }
    packed = Compose(steps)(inputs)
    assert isinstance(packed["data_samples"], SegDataSample)
    preprocess = SegDataPreProcessor(
        mean=MEAN, std=STD, bgr_to_rgb=True, size=CROP, pad_val=0, seg_pad_val=IGNORED
    )
    batch = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
    result = preprocess(batch, training=True)
    return result["inputs"][0], result["data_samples"][0].gt_sem_seg.data[0]


def normalized(image):
    """Normalise an image in 0 to 1 as the task does."""
    mean, std = (torch.tensor(v).view(3, 1, 1) / 255 for v in (MEAN, STD))
    return (image - mean) / std


def difference_in_levels(image, expected):
    """Return the differences (3, H, W) of normalised images, in levels of 0 to 255."""
    return (image - expected).abs() * torch.tensor(STD).view(3, 1, 1)


@pytest.fixture
def compare(mmseg, draws, force_draws):
    """Function seed -> (difference, are_equal, count) of the samples of both pipelines.

    The largest difference of the images in levels; whether the label maps and the counts of random
    numbers are equal; and that count.
    """

    def run(seed, photometric=True, label=None):
        pixels, blobs = sample(seed)
        label = blobs if label is None else label
        mine, reference = draws(seed), draws(seed)
        image, kept = ours(pixels, label, mine, photometric)
        force_draws(reference)
        expected, expected_label = theirs(pixels, label, photometric)
        difference = difference_in_levels(normalized(image), expected).max().item()
        are_equal = torch.equal(kept, expected_label.long()) and mine.count == reference.count
        return difference, are_equal, mine.count

    return run


@pytest.fixture
def scale_whole(monkeypatch):
    """Always scale the whole image, as the reference does.

    Otherwise the crop alone is scaled where that is cheaper, by another function of OpenCV, whose
    rounding differs by one level.
    """
    monkeypatch.setattr(transforms, "WARP_COST", np.inf)


@pytest.mark.usefixtures("scale_whole")
def test_the_same_random_numbers_give_the_same_sample(compare):
    counts = set()
    for seed in range(100):
        difference, are_equal, count = compare(seed)
        assert are_equal, seed
        assert difference < 1e-3, seed  # both normalise in float32
        counts.add(count)
    assert max(counts) - min(counts) > 4  # some samples needed several attempts for a crop


def test_scaling_the_crop_alone_differs_by_at_most_one_level(compare):
    results = [compare(seed, photometric=False) for seed in range(60)]
    assert all(are_equal for _, are_equal, _ in results)
    assert 0.99 < max(difference for difference, _, _ in results) < 1.01


@pytest.mark.usefixtures("scale_whole")
def test_one_class_dominates_every_crop(compare):
    label = np.zeros((90, 121), np.uint8)
    label[0, 0] = 1
    for seed in range(5):
        difference, are_equal, _ = compare(seed, label=label)
        assert are_equal
        assert difference < 1e-3


FAULTS = {
    "no limit for one class": ("CAT_MAX_RATIO", 1.1),
    "nearest by exact fractions": (
        "_nearest_indices",
        lambda old, new: np.arange(new) * old // new,
    ),
    "distortion rounds": ("_truncate", lambda levels: np.rint(np.clip(levels, 0, 255))),
    "black padding": ("PADDING", (0.0, 0.0, 0.0)),
}


@pytest.mark.usefixtures("scale_whole")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_detected(compare, monkeypatch, fault):
    monkeypatch.setattr(transforms, *FAULTS[fault])
    results = [compare(seed) for seed in range(40)]
    assert not all(are_equal and difference < 1e-3 for difference, are_equal, _ in results)
