import datasets
import numpy as np
import pytest
import torch

from segformer_pl.data import shapes
from segformer_pl.metrics import (
    as_classes,
    class_counts,
    class_iou,
    confusion_matrices,
    mean_present,
)

NUM_CLASSES = len(shapes.CLASS_NAMES)
BLUE, ORANGE = (shapes.CLASS_NAMES.index(name) for name in shapes.BEACON_COLORS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "small"
    shapes.generate(folder, {"train": 20, "validation": 120})
    return folder


@pytest.fixture(scope="module")
def samples():
    return [shapes.draw(np.random.default_rng(i)) for i in range(60)]


@pytest.mark.slow
def test_generation_repeats_bit_for_bit(folder, tmp_path):
    shapes.generate(tmp_path / "again", {"train": 20, "validation": 120})
    files = sorted(file.name for file in folder.iterdir())
    assert len(files) == 3
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_others_can_read_what_the_umask_allows(folder, tmp_path):
    (tmp_path / "usual").mkdir()
    assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shapes.generate(tmp_path / "folder", {"train": 1})
    assert list(tmp_path.iterdir()) == []


def test_shards_stream_like_a_hub_data_set(folder):
    stream = datasets.load_dataset(
        "parquet", data_files=str(folder / "train*.parquet"), split="train", streaming=True
    )
    assert isinstance(stream.features["image"], datasets.Image)
    rows = list(stream)
    assert [row["id"] for row in rows] == [f"train-{i:05d}" for i in range(20)]
    size = (shapes.IMAGE_SIZE, shapes.IMAGE_SIZE)
    assert rows[0]["image"].size == rows[0]["label"].size == size
    expected = shapes.draw(np.random.default_rng([shapes.SEED, 0, 0]))
    np.testing.assert_array_equal(np.asarray(rows[0]["label"]), expected.label)
    np.testing.assert_array_equal(np.asarray(rows[0]["image"]), expected.image)


def test_splits_differ(folder):
    rows = {
        split: next(
            iter(
                datasets.load_dataset(
                    "parquet",
                    data_files={split: str(folder / f"{split}*.parquet")},
                    split=split,
                    streaming=True,
                )
            )
        )
        for split in ("train", "validation")
    }
    assert (np.asarray(rows["train"]["image"]) != np.asarray(rows["validation"]["image"])).any()


def test_every_class_and_unlabelled_pixels_occur(samples):
    values = np.unique(np.stack([sample.label for sample in samples]))
    assert set(values) == {*range(NUM_CLASSES), shapes.UNLABELLED}


def test_rings_of_one_image_share_a_class_and_keep_their_distance_from_the_beacon(samples):
    for sample in samples:
        present = set(np.unique(sample.label)) & {BLUE, ORANGE}
        assert present <= {shapes.CLASS_NAMES.index(sample.ring)}
        assert (sample.ring_distances >= shapes.BEACON_DISTANCE).all()
        assert sample.ring_distances.size == np.isin(sample.label, list(present)).sum()


def test_the_two_ring_classes_differ_only_in_the_beacon(monkeypatch):
    """With beacon colours swapped, the same random numbers give other pixels in the beacon only."""
    swapped = dict(zip(shapes.BEACON_COLORS, reversed(shapes.BEACON_COLORS.values())))
    for seed in range(10):
        sample = shapes.draw(np.random.default_rng(seed))
        monkeypatch.setattr(shapes, "BEACON_COLORS", swapped)
        other = shapes.draw(np.random.default_rng(seed))
        monkeypatch.undo()
        differs = (sample.image != other.image).any(axis=-1)
        near_a_ring = np.isin(sample.label, [BLUE, ORANGE])
        assert differs.any()
        assert not (differs & near_a_ring).any()
        # the differing pixels fit into the beacon, a disc of known radius
        assert differs.sum() <= np.pi * (shapes.BEACON_RADIUS + 1) ** 2


def test_shapes_have_the_area_of_the_unit_disc():
    y, x = np.mgrid[-2:2:800j, -2:2:800j]
    for name, outline in shapes.OUTLINES.items():
        area = (outline(x, y) < 0).sum() * (4 / 799) ** 2
        assert area == pytest.approx(np.pi, rel=0.01), name


@pytest.mark.slow
def test_object_classes_have_the_same_mean_color():
    """Classes differ in shape only: their mean colours agree up to sampling noise."""
    samples = [shapes.draw(np.random.default_rng([1, i])) for i in range(200)]
    images = np.stack([s.image for s in samples]) / 255
    labels = np.stack([s.label for s in samples])
    means = [images[labels == c].mean(axis=0) for c in range(1, NUM_CLASSES)]
    assert np.ptp(means, axis=0).max() < 0.06


def miou_of_guessing(folder, share_blue, seed=0):
    """mIoU of a predictor that is perfect except that it calls a random share of rings blue."""
    rng = np.random.default_rng(seed)
    stream = datasets.load_dataset(
        "parquet", data_files=str(folder / "validation*.parquet"), split="train", streaming=True
    )
    confusion = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64)
    for row in stream:
        label = np.asarray(row["label"]).astype(np.int64)
        rings = np.isin(label, [BLUE, ORANGE])
        pred = np.where(label == shapes.UNLABELLED, 0, label)
        guess = np.where(rng.random(label.shape) < share_blue, BLUE, ORANGE)
        pred[rings] = guess[rings]
        pair = torch.from_numpy(pred)[None], torch.from_numpy(label)[None]
        classes = as_classes(*pair, NUM_CLASSES, shapes.UNLABELLED)
        confusion += confusion_matrices(*classes, NUM_CLASSES)[0]
    return mean_present(class_iou(class_counts(confusion.double()))).item()


@pytest.mark.slow
def test_ceiling_equals_the_best_guess(folder):
    ceiling = shapes.locality_ceiling(folder, "validation")
    mious = [miou_of_guessing(folder, share) for share in np.linspace(0, 1, 11)]
    assert max(mious) == pytest.approx(ceiling, abs=0.003)
    assert ceiling == pytest.approx((NUM_CLASSES - 2 + 2 / 3) / NUM_CLASSES, abs=0.02)


def test_ceiling_rises_with_the_radius_to_one(folder):
    radii = [0, shapes.BEACON_DISTANCE, 35, 50, 2 * shapes.IMAGE_SIZE]
    ceilings = [shapes.locality_ceiling(folder, "validation", radius) for radius in radii]
    assert ceilings == sorted(ceilings)
    assert ceilings[0] == ceilings[1] < ceilings[2] < ceilings[3] <= ceilings[4] == 1


def test_the_data_set_is_generated_once_into_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shapes, "NUM_IMAGES", {"train": 2, "validation": 1})
    folder = shapes.prepare()
    assert tmp_path in folder.parents
    written = (folder / shapes.STATISTICS_FILE).stat().st_mtime_ns
    assert shapes.prepare() == folder
    assert (folder / shapes.STATISTICS_FILE).stat().st_mtime_ns == written
