import dataclasses
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from segformer_pl.analysis.evaluation import Evaluation, load_evaluation
from segformer_pl.metrics import SegmentationMetrics

NAN = float("nan")

# Intersection, target, prediction of two images and four classes. Class 0 is in both images, class
# 1 in the first, class 2 is only predicted, class 3 is absent.
COUNTS = [
    [[2, 3, 2], [1, 2, 2], [0, 0, 1], [0, 0, 0]],
    [[5, 5, 5], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
]
CONFUSION = [[7, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def evaluation(counts=COUNTS, **changes):
    counts = np.asarray(counts)
    values = {
        "split": "val",
        "step": 1600,
        "class_names": [f"class {c}" for c in range(counts.shape[1])],
        "ids": [f"image {n}" for n in range(len(counts))],
        "counts": counts,
        "loss": np.linspace(0.1, 0.9, len(counts)),
        "confusion": np.zeros((counts.shape[1],) * 2, np.int64),
        "calibration": np.zeros((15, 3)),
    }
    return Evaluation(**values | changes)


def test_metrics_by_hand():
    result = evaluation(confusion=np.array(CONFUSION))
    np.testing.assert_allclose(result.iou, [7 / 8, 1 / 3, 0, NAN])
    assert result.miou == pytest.approx((7 / 8 + 1 / 3 + 0) / 3)
    assert result.macc == pytest.approx((7 / 8 + 1 / 2) / 2)
    assert result.aacc == pytest.approx(8 / 10)
    assert result.fwiou == pytest.approx(8 / 10 * 7 / 8 + 2 / 10 * 1 / 3)
    np.testing.assert_allclose(result.image_miou, [(2 / 3 + 1 / 3) / 2, 1])
    assert result.image_miou.mean() > result.miou + 0.2  # another quantity


def test_fine_grained_metrics_equal_those_of_pixel_masks():
    """scikit-learn computes each IoU of each image from its pixels; the worst are sorted here."""
    num_images, num_classes, ignored = 25, 4, 255
    target = torch.randint(num_classes, (num_images, 6, 5))
    target[::3][target[::3] == 2] = 0  # classes that an image lacks
    target[1::2][target[1::2] == 3] = 1
    target[torch.rand(target.shape) < 0.1] = ignored
    target[7] = ignored  # an image without labelled pixels counts nowhere
    pred = torch.where(torch.rand(target.shape) < 0.6, target % num_classes, target * 7 % 4)
    counts = SegmentationMetrics(num_classes, ignored).update(
        pred, target, torch.rand(target.shape), torch.rand(target.shape)
    )["counts"]
    iou = np.full((num_images, num_classes), NAN)
    for row, (labels, classes) in enumerate(zip(target.numpy(), pred.numpy())):
        known = labels != ignored
        for c in np.unique(labels[known]):
            iou[row, c] = jaccard_score(labels[known] == c, classes[known] == c)
    images = np.array([row[~np.isnan(row)].mean() for row in iou if not np.isnan(row).all()])
    columns = [np.sort(column[~np.isnan(column)]) for column in iou.T]
    result = evaluation(counts.numpy())
    np.testing.assert_allclose(np.delete(result.image_miou, 7), images)
    assert np.isnan(result.image_miou[7])
    assert result.miou_i == pytest.approx(images.mean())
    assert result.miou_c == pytest.approx(np.mean([column.mean() for column in columns]))
    # A tenth of 24 images is 2; a class in fewer than 10 images has 1.
    assert result.worst_miou_i == pytest.approx(np.sort(images)[:2].mean())
    worst = [column[: max(1, len(column) // 10)].mean() for column in columns]
    assert result.worst_miou_c == pytest.approx(np.mean(worst))


def test_metrics_equal_those_of_the_task():
    num_classes, ignored = 5, 255
    target = torch.randint(4, (6, 9, 7))
    target[2:][target[2:] == 3] = 0
    target[torch.rand(6, 9, 7) < 0.2] = ignored
    target[5] = ignored
    pred = torch.randint(num_classes, (6, 9, 7))
    metrics = SegmentationMetrics(num_classes, ignored)
    batch = metrics.update(pred, target, torch.rand(6, 9, 7), torch.rand(6, 9, 7))
    result, expected = evaluation(batch["counts"].numpy()), metrics.compute()
    np.testing.assert_allclose(result.iou, expected["iou"], rtol=1e-14)
    for name in ("miou", "macc", "aacc", "fwiou"):
        assert getattr(result, name) == pytest.approx(expected[name].item(), rel=1e-14)
    assert np.isnan(result.image_miou[5])


@pytest.mark.parametrize("counts", [np.zeros((2, 3, 3), np.int64), np.zeros((0, 3, 3), np.int64)])
def test_metrics_are_nan_without_labelled_pixels(counts):
    result = evaluation(counts)
    assert np.isnan([result.miou, result.macc, result.aacc, result.fwiou]).all()
    assert np.isnan(result.iou).all()
    assert np.isnan(result.image_miou).all()
    fine = [result.miou_i, result.miou_c, result.worst_miou_i, result.worst_miou_c]
    assert np.isnan(fine).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": ["a"]},
        {"class_names": ["a", "b"]},
        {"loss": np.zeros((2, 1))},
        {"confusion": np.zeros((4, 3), np.int64)},
        {"calibration": np.zeros(3)},
    ],
)
def test_shapes_that_do_not_match_are_refused(changes):
    with pytest.raises(ValueError, match=r"has shape .* ask for"):
        evaluation(**changes)


@pytest.mark.parametrize("ids", [["0001TP_008550", "Z\u00fcrich/\u8857 1"], []])
def test_round_trip(tmp_path, ids):
    saved = evaluation(
        np.array(COUNTS)[: len(ids)],
        ids=ids,
        split="test",
        confusion=np.array(CONFUSION),
        loss=np.array([0.25, NAN])[: len(ids)],
        calibration=np.random.default_rng(0).random((15, 3)),
        split_size=1234,
    )
    file = tmp_path / "run" / "evaluation" / "val_step_0001600.npz"
    saved.save(file)
    assert list(file.parent.iterdir()) == [file]
    loaded = load_evaluation(file)
    for field in dataclasses.fields(Evaluation):
        expected, actual = getattr(saved, field.name), getattr(loaded, field.name)
        assert type(actual) is type(expected), field.name
        np.testing.assert_array_equal(actual, expected, err_msg=field.name)
    assert loaded.counts.dtype == loaded.confusion.dtype == np.int64
    assert loaded.loss.dtype == loaded.calibration.dtype == np.float64


def test_the_number_of_images_says_how_many_are_missing(tmp_path):
    one = evaluation(split_size=1234)
    num_images = len(one.ids)
    assert str(one.images) == f"{num_images} of 1,234 images"
    whole = evaluation(split_size=num_images)
    assert str(whole.images) == f"all {num_images} images"
    # Files of earlier versions do not state the size of the split.
    evaluation().save(tmp_path / "earlier.npz")
    with np.load(tmp_path / "earlier.npz") as archive:
        assert "split_size" not in archive
    assert str(load_evaluation(tmp_path / "earlier.npz").images) == f"{num_images} images"


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "evaluation" / "val_step_0000010.npz"
    evaluation(step=10).save(file)

    def interrupt(stream, **arrays):
        stream.write(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluation(step=11).save(file)
    assert load_evaluation(file).step == 10


def error_message(path):
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        load_evaluation(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_file(tmp_path):
    assert "there is no run folder or file" in error_message(tmp_path / "nowhere")


def without(name, **changes):
    arrays = dataclasses.asdict(evaluation()) | changes
    return {key: value for key, value in arrays.items() if key != name}


@pytest.mark.parametrize(
    "arrays",
    [
        without("loss"),
        without("", ids=np.array(["a", 1], dtype=object)),  # a pickle
        without("", counts=np.zeros((2, 4, 3))),
        without("", counts=np.zeros((2, 4), np.int64)),
        without("", step=np.array([1, 2])),
        {},
    ],
    ids=["key", "pickle", "fractions", "shape", "steps", "empty"],
)
def test_foreign_npz(tmp_path, arrays):
    file = tmp_path / "foreign.npz"
    np.savez(file, **arrays)
    assert "is no evaluation of a run, or is damaged" in error_message(file)


def test_damaged_file(tmp_path):
    file = tmp_path / "val_step_0000001.npz"
    evaluation(np.random.default_rng(0).integers(9, size=(50, 4, 3))).save(file)
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 0xFF
    array = tmp_path / "array.npy"
    np.save(array, np.zeros(3))
    for damaged in (b"", b"step,miou\n1,0.5\n", content[:-200], bytes(flipped), array.read_bytes()):
        file.write_bytes(damaged)
        assert "is no evaluation of a run, or is damaged" in error_message(file)
