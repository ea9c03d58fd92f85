"""The training pipeline against mmsegmentation's transforms, with every random draw forced to be
the same on both sides: equal pixels, equal labels, equally many draws."""

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
    """A PNG file of smooth noise (RGB), and blobs of classes with some ignored."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (8, 10, 3)).astype(np.uint8)
    pixels = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
    pixels = pixels ^ generator.integers(0, 8, pixels.shape).astype(np.uint8)
    classes = generator.integers(0, num_classes, (6, 7)).astype(np.uint8)
    classes[generator.random(classes.shape) < 0.3] = 0  # so that some crops are not mixed enough
    classes[generator.random(classes.shape) < 0.2] = IGNORED
    return pixels, cv2.resize(classes, size[::-1], interpolation=cv2.INTER_NEAREST)


def ours(pixels, label, draws, photometric=True):
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    pipeline = TrainTransforms(CROP, SCALES, BASE, photometric, IGNORED)
    return pipeline(EncodedImage(stream.getvalue(), "here"), label, draws)


def theirs(pixels, label, photometric=True):
    """As in mmsegmentation's configurations of SegFormer, data preprocessor included."""
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
    given = {
        "img": np.ascontiguousarray(pixels[..., ::-1]),  # BGR
        "gt_seg_map": label.copy(),
        "seg_fields": ["gt_seg_map"],
        "img_shape": label.shape,
        "ori_shape": label.shape,
    }
    packed = Compose(steps)(given)
    assert isinstance(packed["data_samples"], SegDataSample)
    normalize = SegDataPreProcessor(
        mean=MEAN, std=STD, bgr_to_rgb=True, size=CROP, pad_val=0, seg_pad_val=IGNORED
    )
    batch = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
    done = normalize(batch, training=True)
    return done["inputs"][0], done["data_samples"][0].gt_sem_seg.data[0]


def normalized(image):
    """As the task does, in units of 1 / std."""
    mean, std = (torch.tensor(v).view(3, 1, 1) / 255 for v in (MEAN, STD))
    return (image - mean) / std


def levels_apart(found, expected):
    """(3, H, W), in levels of 0 to 255."""
    return (found - expected).abs() * torch.tensor(STD).view(3, 1, 1)


@pytest.fixture
def compare(mmseg, draws, force_draws):
    """Function seed -> how far apart both samples are, in levels, and whether the labels and the
    numbers of draws are the same; with the number."""

    def run(seed, photometric=True, label=None):
        pixels, blobs = sample(seed)
        label = blobs if label is None else label
        mine, reference = draws(seed), draws(seed)
        image, kept = ours(pixels, label, mine, photometric)
        force_draws(reference)
        expected, expected_label = theirs(pixels, label, photometric)
        apart = levels_apart(normalized(image), expected).max().item()
        same = torch.equal(kept, expected_label.long()) and mine.count == reference.count
        return apart, same, mine.count

    return run


@pytest.fixture
def scale_whole(monkeypatch):
    """Scale the whole image always, as the reference does, and not the crop alone where that is
    cheaper: OpenCV's two functions round differently, by one level."""
    monkeypatch.setattr(transforms, "WARP_COST", np.inf)


@pytest.mark.usefixtures("scale_whole")
def test_the_same_draws_give_the_same_sample(compare):
    counts = set()
    for seed in range(100):
        apart, same, count = compare(seed)
        assert same, seed
        assert apart < 1e-3, seed  # float32, in which both normalise
        counts.add(count)
    assert max(counts) - min(counts) > 4  # several crops were drawn for some


def test_the_crop_alone_is_one_level_off_at_most(compare):
    apart = [compare(seed, photometric=False) for seed in range(60)]
    assert all(same for _, same, _ in apart)
    assert 0.99 < max(levels for levels, _, _ in apart) < 1.01


@pytest.mark.usefixtures("scale_whole")
def test_no_crop_is_mixed_enough(compare):
    label = np.zeros((90, 121), np.uint8)
    label[0, 0] = 1
    for seed in range(5):
        apart, same, _ = compare(seed, label=label)
        assert same
        assert apart < 1e-3


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
def test_planted_faults_are_noticed(compare, monkeypatch, fault):
    monkeypatch.setattr(transforms, *FAULTS[fault])
    results = [compare(seed) for seed in range(40)]
    assert not all(same and apart < 1e-3 for apart, same, _ in results)
