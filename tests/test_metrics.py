import cv2
import numpy as np
import pytest
import torch

from segformer_pl.metrics import (
    NUM_BINS,
    BoundaryIoU,
    CalibrationError,
    SegmentationScores,
    as_classes,
    boundary_counts,
    calibration_counts,
    confusion_matrices,
    near_others,
)

IGNORED = 255
NAN = float("nan")

# Four classes. 0: two of three right. 1: one of two right. 2: predicted once, never there.
# 3: neither labelled nor predicted.
LABELS = torch.tensor([[[0, 0, 0], [1, 1, IGNORED]]])
PREDICTIONS = torch.tensor([[[0, 0, 1], [1, 2, 3]]])
CLASSES = as_classes(PREDICTIONS, LABELS, 4, IGNORED)


def sure(predictions):
    return torch.full(predictions.shape, 0.5)


def scores_of(*batches, num_classes=4, ignore_index=IGNORED):
    """All scores of a set, by name."""
    scores, boundary = SegmentationScores(num_classes), BoundaryIoU(num_classes)
    calibration = CalibrationError(num_classes)
    for predictions, labels in batches:
        classes = as_classes(predictions, labels, num_classes, ignore_index)
        scores.update(*classes)
        boundary.update(*classes)
        calibration.update(*classes, sure(predictions))
    found = {"boundary_iou": boundary.compute(), "ece": calibration.compute()}
    return scores.compute() | found


def test_by_hand():
    result = scores_of((PREDICTIONS, LABELS))
    iou = torch.tensor([2 / 3, 1 / 3, 0, NAN], dtype=torch.float64)
    torch.testing.assert_close(result["iou"], iou, equal_nan=True)
    # A class that is only predicted scores 0; one that is nowhere is left out. Accuracy has
    # nothing to divide by for either.
    assert result["miou"].item() == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert result["macc"].item() == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result["aacc"].item() == pytest.approx(3 / 5)
    assert result["fwiou"].item() == pytest.approx((3 * 2 / 3 + 2 * 1 / 3) / 5)
    # All pictures are narrower than the bands: boundary IoU is plain IoU.
    assert result["boundary_iou"].item() == pytest.approx(1 / 3)
    assert result["ece"].item() == pytest.approx(3 / 5 - 0.5)
    assert result["num_labelled"].item() == 5
    assert {value.dtype for value in result.values()} == {torch.float64}


def test_rows_are_labels():
    scores = SegmentationScores(4)
    scores.update(*CLASSES)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    expected[0, 0], expected[0, 1], expected[1, 1], expected[1, 2] = 2, 1, 1, 1
    torch.testing.assert_close(scores.counts, expected)
    counts = [[2, 3, 2], [1, 2, 2], [0, 0, 1], [0, 0, 0]]
    assert scores.picture_counts.tolist() == [counts]


def test_batches_of_any_size_give_the_scores_of_one():
    labels = torch.randint(4, (6, 5, 7))
    # One class lives in a single image: a mean of per-batch scores would differ.
    labels[1:][labels[1:] == 3] = 0
    labels[torch.rand(6, 5, 7) < 0.2] = IGNORED
    predictions = torch.randint(4, (6, 5, 7))
    whole = scores_of((predictions, labels))
    parts = scores_of(*zip(predictions.split([1, 2, 3]), labels.split([1, 2, 3])))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    separate = [scores_of((p[None], y[None]))["miou"] for p, y in zip(predictions, labels)]
    assert not torch.allclose(torch.stack(separate).mean(), whole["miou"])


def test_prediction_under_ignored_pixels_does_not_matter():
    changed = PREDICTIONS.clone()
    changed[LABELS == IGNORED] = 0
    torch.testing.assert_close(
        scores_of((changed, LABELS)), scores_of((PREDICTIONS, LABELS)), equal_nan=True
    )


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # before any update, on purpose
@pytest.mark.parametrize("batches", [[], [(PREDICTIONS, torch.full_like(LABELS, IGNORED))]])
def test_nothing_labelled_has_no_score(batches):
    result = scores_of(*batches)
    assert result.pop("num_labelled").item() == 0
    assert result.keys() == {"miou", "macc", "aacc", "fwiou", "boundary_iou", "ece", "iou"}
    assert all(value.isnan().all() for value in result.values())


def test_ranks_add_up():
    # What a sum over ranks does to the state, without the processes.
    for make in (SegmentationScores, BoundaryIoU, CalibrationError):
        one, other = make(4), make(4)
        for metric, row in ((one, slice(0, 1)), (other, slice(1, 2))):
            parts = [*CLASSES] + [sure(PREDICTIONS)] * (make is CalibrationError)
            metric.update(*(part[:, row] for part in parts))
        both = torch.stack([one.counts, other.counts])
        assert one._reductions["counts"](both).equal(both[0] + both[1])


def test_reset_forgets():
    scores = SegmentationScores(4)
    scores.update(*CLASSES)
    scores.reset()
    assert not scores.counts.any()


@pytest.mark.parametrize("wrong", [4, -1])
def test_label_outside_the_classes_is_not_counted_as_another(wrong):
    # The reference's histogram puts a label equal to num_classes into the last bin.
    labels = torch.where(LABELS == 0, wrong, LABELS)
    with pytest.raises(ValueError, match=f"label {wrong} is not a train id: there are 4 classes"):
        scores_of((PREDICTIONS, labels))
    with pytest.raises(ValueError, match=f"prediction {wrong} is not a train id"):
        scores_of((torch.where(LABELS == 0, wrong, PREDICTIONS), LABELS))


def test_one_class():
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    result = scores_of((labels, labels), num_classes=1)
    assert [result[key].item() for key in ("miou", "macc", "aacc", "fwiou", "boundary_iou")] == [
        1
    ] * 5
    assert result["ece"].item() == 0.5


def test_more_than_255_classes():
    """255 is then a class, and the ignored label lies above all of them."""
    labels = torch.randint(300, (2, 20, 20))
    labels[0, :3] = 255
    predictions = labels.clone()
    predictions[0, 0] = 299
    labels[1, :5] = 300
    result = scores_of((predictions, labels), num_classes=300, ignore_index=300)
    counted = labels != 300
    assert result["num_labelled"].item() == counted.sum()
    assert result["aacc"].item() == pytest.approx(
        (predictions == labels)[counted].double().mean().item()
    )
    truth, found = labels[counted] == 255, predictions[counted] == 255
    assert result["iou"][255].item() == pytest.approx(
        ((truth & found).sum() / (truth | found).sum()).item()
    )


def blobs(*shape, num_classes=4, side=5):
    coarse = torch.randint(num_classes, shape)
    return coarse.repeat_interleave(side, 1).repeat_interleave(side, 2)


def masked_pair():
    labels = blobs(3, 9, 11)
    noise = torch.randint(4, labels.shape)
    predictions = torch.where(torch.rand(labels.shape) < 0.9, labels, noise)
    labels[0, :7] = IGNORED
    return predictions, labels


def test_confusion_of_every_picture():
    predictions, labels = masked_pair()
    matrices = confusion_matrices(*as_classes(predictions, labels, 4, IGNORED), 4)
    for matrix, prediction, label in zip(matrices, predictions, labels):
        expected = torch.zeros(4, 4, dtype=torch.int64)
        for truth, found in zip(label.ravel().tolist(), prediction.ravel().tolist()):
            if truth != IGNORED:
                expected[truth, found] += 1
        assert torch.equal(matrix, expected)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_boundary_bands_are_what_erosion_leaves_out(width):
    """Cheng et al. 2021: a mask without its erosion by a square, the border counting as outside."""
    predictions, labels = masked_pair()
    truth, found = as_classes(predictions, labels, 4, IGNORED)

    def band(mask):
        mask = cv2.copyMakeBorder(mask.numpy().astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT)
        eroded = cv2.erode(mask, np.ones((3, 3), np.uint8), iterations=width)
        return (mask - eroded)[1:-1, 1:-1] > 0

    expected = np.zeros((4, 3), int)
    for one, other in zip(truth, found):
        for train_id in range(4):
            in_truth, in_found = band(one == train_id), band(other == train_id)
            both = (in_truth & in_found).sum()
            expected[train_id] += [both, in_truth.sum(), in_found.sum()]
    assert np.array_equal(boundary_counts(truth, found, 4, width), expected)


def test_boundary_iou_feels_a_shift_that_iou_hardly_does():
    labels = torch.zeros(1, 100, 100, dtype=torch.int64)
    labels[:, 20:80, 20:80] = 1
    result = scores_of((labels.roll(2, 2), labels), num_classes=2)
    assert result["miou"] > 0.9
    assert result["boundary_iou"] < 0.75
    assert scores_of((labels, labels), num_classes=2)["boundary_iou"] == 1


def test_near_others_in_a_plain_picture_is_its_border():
    near = near_others(torch.zeros(1, 7, 9), 2)
    assert not near[:, 2:-2, 2:-2].any()
    near[:, 2:-2, 2:-2] = True
    assert near.all()


def test_calibration_by_hand():
    # Confidence 0.9 and right in 3 of 4; 0.55 and right in 1 of 2; the ignored pixel is not there.
    labels = torch.tensor([[[0, 0, 0, 0, 1, 1, IGNORED]]])
    predictions = torch.tensor([[[0, 0, 0, 1, 1, 0, 0]]])
    confidence = torch.tensor([[[0.9, 0.9, 0.9, 0.9, 0.55, 0.55, 1.0]]], dtype=torch.float64)
    counts = calibration_counts(*as_classes(predictions, labels, 2, IGNORED), confidence, 2)
    expected = torch.zeros(NUM_BINS, 3, dtype=torch.float64)
    expected[13] = torch.tensor([4, 3.6, 3])  # 0.9 * 15 = 13.5
    expected[8] = torch.tensor([2, 1.1, 1])
    torch.testing.assert_close(counts, expected)
    error = CalibrationError(2)
    error.update(*as_classes(predictions, labels, 2, IGNORED), confidence)
    assert error.compute().item() == pytest.approx((0.6 + 0.1) / 6)


@pytest.mark.parametrize("confidence", [0.0, 1.0])
def test_the_ends_of_confidence_have_a_bin(confidence):
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    truth, found = as_classes(labels, labels, 1, IGNORED)
    counts = calibration_counts(truth, found, torch.full(labels.shape, confidence), 1)
    assert counts[-1 if confidence else 0, 0] == 4


def test_a_calibrated_prediction_has_no_error():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(1, 400, 500, generator=generator)
    right = torch.rand(1, 400, 500, generator=generator) < confidence
    labels = torch.where(right, 0, 1)
    classes = as_classes(torch.zeros_like(labels), labels, 2, IGNORED)
    error = CalibrationError(2)
    error.update(*classes, confidence)
    assert error.compute() < 0.006
    error.reset()
    error.update(*classes, confidence.sqrt())  # overconfident
    assert error.compute() > 0.1


# Against libraries


def noisy_maps(num_classes=6):
    """(4, 30, 40) predictions, labels, and the confidence of the predictions; a fifth is ignored,
    one class is only predicted, one only labelled and one nowhere."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 30, 40)
    labels = torch.randint(num_classes - 2, shape, generator=generator)
    predictions = torch.randint(num_classes - 1, shape, generator=generator)
    confidence = torch.rand(shape, generator=generator, dtype=torch.float64)
    # Too sure above one half, not sure enough below it.
    is_right = torch.rand(shape, generator=generator) < torch.where(confidence < 0.5, 0.7, 0.4)
    predictions = torch.where(is_right, labels, predictions)
    predictions[predictions == num_classes - 3] = 0
    labels[torch.rand(shape, generator=generator) < 0.2] = IGNORED
    return predictions, labels, confidence


@pytest.mark.slow
def test_scores_of_scikit_learn():
    from sklearn import metrics

    predictions, labels, _ = noisy_maps()
    counted = labels != IGNORED
    truth, found = labels[counted].numpy(), predictions[counted].numpy()
    scores = SegmentationScores(6)
    for prediction, label in zip(predictions, labels):
        scores.update(*as_classes(prediction[None], label[None], 6, IGNORED))
    assert np.array_equal(scores.counts, metrics.confusion_matrix(truth, found, labels=range(6)))
    result = scores.compute()
    present = sorted({*truth, *found})
    assert present == [0, 1, 2, 3, 4]
    iou = metrics.jaccard_score(truth, found, labels=present, average=None)
    np.testing.assert_allclose(result["iou"][present], iou, rtol=1e-14)
    assert result["iou"][5].isnan()
    assert result["miou"].item() == pytest.approx(
        metrics.jaccard_score(truth, found, labels=present, average="macro"), rel=1e-14
    )
    assert result["fwiou"].item() == pytest.approx(
        metrics.jaccard_score(truth, found, average="weighted"), rel=1e-14
    )
    recall = metrics.recall_score(truth, found, labels=sorted({*truth}), average="macro")
    assert result["macc"].item() == pytest.approx(recall, rel=1e-14)
    assert result["aacc"].item() == pytest.approx(metrics.accuracy_score(truth, found), rel=1e-14)
    # Another mean: with the class that is nowhere as 0.
    wrong = metrics.jaccard_score(truth, found, labels=range(6), average="macro", zero_division=0)
    assert result["miou"].item() != pytest.approx(wrong, rel=1e-3)


@pytest.mark.slow
def test_bins_of_scikit_learns_calibration_curve():
    from sklearn.calibration import calibration_curve

    predictions, labels, confidence = noisy_maps()
    counted = labels != IGNORED
    right = (predictions == labels)[counted].numpy()
    shares, means = calibration_curve(right, confidence[counted].numpy(), n_bins=NUM_BINS)
    counts = calibration_counts(*as_classes(predictions, labels, 6, IGNORED), confidence, 6)
    np.testing.assert_allclose(counts[:, 1] / counts[:, 0], means, rtol=1e-12)
    np.testing.assert_allclose(counts[:, 2] / counts[:, 0], shares, rtol=1e-12)


def test_calibration_error_of_torchmetrics():
    from torchmetrics.functional.classification import binary_calibration_error

    predictions, labels, confidence = noisy_maps()
    counted = labels != IGNORED
    error = CalibrationError(6)
    for prediction, label, sure_of in zip(predictions, labels, confidence):
        error.update(*as_classes(prediction[None], label[None], 6, IGNORED), sure_of[None])
    right = (predictions == labels)[counted].int()

    def theirs(num_bins):
        # Of one probability and whether it came true, whatever the number of classes was.
        return binary_calibration_error(confidence[counted], right, n_bins=num_bins).item()

    # It sums in float32.
    assert error.compute().item() == pytest.approx(theirs(15), rel=1e-5)
    assert error.compute().item() != pytest.approx(theirs(10), rel=1e-3)
