from functools import partial

import cv2
import numpy as np
import pytest
import torch

from segformer_pl.metrics import (
    NUM_BINS,
    SegmentationMetrics,
    as_classes,
    boundary_counts,
    boundary_mask,
    calibration_counts,
    class_accuracy,
    class_counts,
    class_iou,
    confusion_matrices,
    expected_calibration_error,
    frequency_weighted_iou,
    mean_present,
    miou,
    miou_c,
    miou_i,
    pixel_accuracy,
)

IGNORED = 255
NAN = float("nan")

# Four classes. 0: two of three pixels correct. 1: one of two correct. 2: predicted once, not in the
# target. 3: in neither.
TARGET = torch.tensor([[[0, 0, 0], [1, 1, IGNORED]]])
PRED = torch.tensor([[[0, 0, 1], [1, 2, 3]]])


def update(metrics, pred, target, confidence=None):
    """Add a batch with loss 1 and, by default, confidence 0.5."""
    if confidence is None:
        confidence = torch.full(pred.shape, 0.5)
    return metrics.update(pred, target, confidence, (target != metrics.ignore_index).float())


def metrics_of(*batches, num_classes=4, ignore_index=IGNORED):
    """Metrics of a whole split, by name."""
    metrics = SegmentationMetrics(num_classes, ignore_index)
    for batch in batches:
        update(metrics, *batch)
    return metrics.compute()


def test_metrics_by_hand():
    result = metrics_of((PRED, TARGET))
    iou = torch.tensor([2 / 3, 1 / 3, 0, NAN], dtype=torch.float64)
    torch.testing.assert_close(result["iou"], iou, equal_nan=True)
    # mIoU: a class that is only predicted has IoU 0, an absent class is left out. mAcc leaves out
    # both, as neither has target pixels.
    assert result["miou"].item() == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert result["macc"].item() == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result["aacc"].item() == pytest.approx(3 / 5)
    assert result["fwiou"].item() == pytest.approx((3 * 2 / 3 + 2 * 1 / 3) / 5)
    # The image is so small that all pixels are near the boundary: boundary IoU is IoU.
    assert result["boundary_iou"].item() == pytest.approx(1 / 3)
    assert result["ece"].item() == pytest.approx(3 / 5 - 0.5)
    assert result["loss"].item() == 1
    assert result["num_labelled"].item() == 5
    assert {value.dtype for value in result.values()} == {torch.float64}


def test_update_returns_the_counts_of_the_batch():
    batch = update(SegmentationMetrics(4, IGNORED), PRED, TARGET)
    expected = torch.zeros(4, 4, dtype=torch.int64)  # rows are the target
    expected[0, 0], expected[0, 1], expected[1, 1], expected[1, 2] = 2, 1, 1, 1
    torch.testing.assert_close(batch["confusion"], expected)
    counts = [[2, 3, 2], [1, 2, 2], [0, 0, 1], [0, 0, 0]]
    assert batch["counts"].tolist() == [counts]
    assert batch["calibration"][7].tolist() == [5, 2.5, 3]  # 0.5 * 15 = 7.5
    assert batch["calibration"].sum(0).tolist() == [5, 2.5, 3]
    assert batch["loss"].tolist() == [1]


def test_loss_of_an_image_is_the_mean_over_its_labelled_pixels():
    metrics = SegmentationMetrics(2, IGNORED)
    target = torch.tensor([[[0, 1, 1]], [[IGNORED, 0, 1]], [[IGNORED] * 3]])
    loss = torch.tensor([[[1.0, 2.0, 6.0]], [[0.0, 1.0, 4.0]], [[0.0] * 3]])
    pred = torch.zeros_like(target)
    batch = metrics.update(pred, target, torch.ones(pred.shape), loss)
    expected = torch.tensor([3, 2.5, NAN], dtype=torch.float64)
    torch.testing.assert_close(batch["loss"], expected, equal_nan=True)
    assert metrics.compute()["loss"].item() == pytest.approx(14 / 5)


def test_counts_of_batches_add_up_to_the_metrics():
    """Evaluations are recorded from the counts that the updates return."""
    metrics = SegmentationMetrics(6, IGNORED)
    pred, target, confidence = noisy_maps()
    batches = [
        update(metrics, pred[part], target[part], confidence[part])
        for part in (slice(0, 1), slice(1, 4))
    ]
    counts = torch.cat([batch["counts"] for batch in batches]).sum(0)
    confusion = sum(batch["confusion"] for batch in batches)
    torch.testing.assert_close(class_counts(confusion), counts)
    result = metrics.compute()
    assert mean_present(class_iou(counts.double())).item() == result["miou"].item()
    calibration = sum(batch["calibration"] for batch in batches)
    assert expected_calibration_error(calibration).item() == result["ece"].item()


@pytest.mark.parametrize("shape", [(5, 3), (7, 5, 3), (0, 5, 3), (150, 3)])
def test_arrays_and_tensors_have_the_same_metrics(shape):
    """Training, the report and the bootstrap share one definition of the metrics."""
    generator = np.random.default_rng(0)
    target, pred = generator.integers(1, 50, (2, *shape[:-1]))
    counts = np.stack([generator.integers(0, np.minimum(target, pred) + 1), target, pred], axis=-1)
    counts[..., 2, :] = 0  # absent
    counts[..., 3, :2] = 0  # only predicted
    tensor = torch.from_numpy(counts).double()
    for metric in (class_iou, class_accuracy, pixel_accuracy, frequency_weighted_iou):
        ours = metric(counts)
        assert ours.dtype == np.float64
        np.testing.assert_allclose(metric(tensor).numpy(), ours, rtol=1e-14)
    means = mean_present(class_iou(counts))
    np.testing.assert_allclose(mean_present(class_iou(tensor)).numpy(), means, rtol=1e-14)
    assert np.isnan(class_iou(counts)[..., 2]).all()
    assert (class_iou(counts)[..., 3] == 0).all()
    assert np.isnan(class_accuracy(counts)[..., 3]).all()


@pytest.mark.filterwarnings("error")
def test_absent_classes_are_left_out_without_a_warning():
    values = np.array([[0.5, NAN, 1.0], [NAN, NAN, NAN]])
    np.testing.assert_array_equal(mean_present(values), [0.75, NAN])
    nothing = np.zeros((4, 3), np.int64)
    assert np.isnan(mean_present(class_iou(nothing)))
    assert np.isnan(pixel_accuracy(nothing))
    assert np.isnan(frequency_weighted_iou(nothing))
    assert np.isnan(expected_calibration_error(np.zeros((15, 3))))


def test_metrics_do_not_depend_on_the_batch_size():
    target = torch.randint(4, (6, 5, 7))
    # One class occurs in a single image, so a mean of per-image mIoU would differ.
    target[1:][target[1:] == 3] = 0
    target[torch.rand(6, 5, 7) < 0.2] = IGNORED
    pred = torch.randint(4, (6, 5, 7))
    whole = metrics_of((pred, target))
    parts = metrics_of(*zip(pred.split([1, 2, 3]), target.split([1, 2, 3])))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    separate = [metrics_of((p[None], y[None]))["miou"] for p, y in zip(pred, target)]
    assert not torch.allclose(torch.stack(separate).mean(), whole["miou"])


def test_prediction_at_ignored_pixels_is_not_counted():
    changed = PRED.clone()
    changed[TARGET == IGNORED] = 0
    torch.testing.assert_close(
        metrics_of((changed, TARGET)), metrics_of((PRED, TARGET)), equal_nan=True
    )


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # called before any update on purpose
@pytest.mark.parametrize("batches", [[], [(PRED, torch.full_like(TARGET, IGNORED))]])
def test_metrics_without_labelled_pixels_are_nan(batches):
    result = metrics_of(*batches)
    assert result.pop("num_labelled").item() == 0
    names = {"miou", "macc", "aacc", "fwiou", "boundary_iou", "ece", "iou", "loss"}
    assert result.keys() == names
    assert all(value.isnan().all() for value in result.values())


def test_states_of_ranks_add_up():
    # Apply the reduction over ranks to the states by hand, without processes.
    one, other, whole = (SegmentationMetrics(4, IGNORED) for _ in range(3))
    update(one, PRED[:, :1], TARGET[:, :1])
    update(other, PRED[:, 1:], TARGET[:, 1:])
    update(whole, PRED, TARGET)
    for name in ("confusion", "boundary", "calibration", "loss"):
        parts = [getattr(metrics, name) for metrics in (one, other, whole)]
        (state,) = parts[0]._reductions
        values = [getattr(part, state) for part in parts]
        summed = parts[0]._reductions[state](torch.stack(values[:2]))
        assert summed.equal(values[0] + values[1])
        if name != "boundary":  # each part is an image with its own border
            assert summed.equal(values[2])


def test_reset_sets_the_counts_to_zero():
    metrics = SegmentationMetrics(4, IGNORED)
    update(metrics, TARGET.masked_fill(TARGET == IGNORED, 0), TARGET)
    metrics.reset()
    assert not metrics.confusion.total.any()
    update(metrics, PRED, TARGET)
    torch.testing.assert_close(metrics.compute(), metrics_of((PRED, TARGET)), equal_nan=True)


def test_metrics_are_not_in_the_state_dict():
    assert not SegmentationMetrics(4, IGNORED).state_dict()


@pytest.mark.parametrize("wrong", [4, -1])
def test_labels_and_predictions_outside_the_classes_are_refused(wrong):
    # The reference's histogram counts a label equal to num_classes in the last bin.
    target = torch.where(TARGET == 0, wrong, TARGET)
    with pytest.raises(ValueError, match=f"label {wrong} is not a train id: there are 4 classes"):
        metrics_of((PRED, target))
    with pytest.raises(ValueError, match=f"prediction {wrong} is not a train id"):
        metrics_of((torch.where(TARGET == 0, wrong, PRED), TARGET))


def test_one_class():
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    result = metrics_of((target, target), num_classes=1)
    assert [result[key].item() for key in ("miou", "macc", "aacc", "fwiou", "boundary_iou")] == [
        1
    ] * 5
    assert result["ece"].item() == 0.5


def test_more_than_255_classes():
    """255 is then a class, and the ignored label is above all classes."""
    target = torch.randint(300, (2, 20, 20))
    target[0, :3] = 255
    pred = target.clone()
    pred[0, 0] = 299
    target[1, :5] = 300
    result = metrics_of((pred, target), num_classes=300, ignore_index=300)
    counted = target != 300
    assert result["num_labelled"].item() == counted.sum()
    assert result["aacc"].item() == pytest.approx((pred == target)[counted].double().mean().item())
    in_target, in_pred = target[counted] == 255, pred[counted] == 255
    assert result["iou"][255].item() == pytest.approx(
        ((in_target & in_pred).sum() / (in_target | in_pred).sum()).item()
    )


def blobs(*shape, num_classes=4, side=5):
    coarse = torch.randint(num_classes, shape)
    return coarse.repeat_interleave(side, 1).repeat_interleave(side, 2)


def masked_pair():
    target = blobs(3, 9, 11)
    noise = torch.randint(4, target.shape)
    pred = torch.where(torch.rand(target.shape) < 0.9, target, noise)
    target[0, :7] = IGNORED
    return pred, target


def test_confusion_matrix_of_each_image():
    pred, target = masked_pair()
    matrices = confusion_matrices(*as_classes(pred, target, 4, IGNORED), 4)
    for matrix, image_pred, image_target in zip(matrices, pred, target):
        expected = torch.zeros(4, 4, dtype=torch.int64)
        for row, column in zip(image_target.ravel().tolist(), image_pred.ravel().tolist()):
            if row != IGNORED:
                expected[row, column] += 1
        assert torch.equal(matrix, expected)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_boundary_region_is_the_mask_minus_its_erosion(width):
    """Cheng et al. 2021; pixels beyond the border of the image are outside the mask."""
    pred, target = masked_pair()
    classes = as_classes(pred, target, 4, IGNORED)

    def band(mask):
        mask = cv2.copyMakeBorder(mask.numpy().astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT)
        eroded = cv2.erode(mask, np.ones((3, 3), np.uint8), iterations=width)
        return (mask - eroded)[1:-1, 1:-1] > 0

    expected = np.zeros((4, 3), int)
    for image_pred, image_target in zip(*classes):
        for train_id in range(4):
            in_pred, in_target = band(image_pred == train_id), band(image_target == train_id)
            both = (in_pred & in_target).sum()
            expected[train_id] += [both, in_target.sum(), in_pred.sum()]
    assert np.array_equal(boundary_counts(*classes, 4, width), expected)


def test_boundary_iou_is_more_sensitive_to_a_shift_than_iou():
    target = torch.zeros(1, 100, 100, dtype=torch.int64)
    target[:, 20:80, 20:80] = 1
    result = metrics_of((target.roll(2, 2), target), num_classes=2)
    assert result["miou"] > 0.9
    assert result["boundary_iou"] < 0.75
    assert metrics_of((target, target), num_classes=2)["boundary_iou"] == 1


def test_boundary_of_a_uniform_image_is_its_border():
    mask = boundary_mask(torch.zeros(1, 7, 9), 2)
    assert not mask[:, 2:-2, 2:-2].any()
    mask[:, 2:-2, 2:-2] = True
    assert mask.all()


def test_calibration_by_hand():
    # Confidence 0.9 with 3 of 4 correct, 0.55 with 1 of 2 correct, and one ignored pixel.
    target = torch.tensor([[[0, 0, 0, 0, 1, 1, IGNORED]]])
    pred = torch.tensor([[[0, 0, 0, 1, 1, 0, 0]]])
    confidence = torch.tensor([[[0.9, 0.9, 0.9, 0.9, 0.55, 0.55, 1.0]]], dtype=torch.float64)
    counts = calibration_counts(*as_classes(pred, target, 2, IGNORED), confidence, 2)
    expected = torch.zeros(NUM_BINS, 3, dtype=torch.float64)
    expected[13] = torch.tensor([4, 3.6, 3])  # 0.9 * 15 = 13.5
    expected[8] = torch.tensor([2, 1.1, 1])
    torch.testing.assert_close(counts, expected)
    assert expected_calibration_error(counts).item() == pytest.approx((0.6 + 0.1) / 6)
    result = metrics_of((pred, target, confidence), num_classes=2)
    assert result["ece"].item() == pytest.approx((0.6 + 0.1) / 6)


@pytest.mark.parametrize("confidence", [0.0, 1.0])
def test_confidence_zero_and_one_have_a_bin(confidence):
    target = torch.zeros(1, 2, 2, dtype=torch.int64)
    classes = as_classes(target, target, 1, IGNORED)
    counts = calibration_counts(*classes, torch.full(target.shape, confidence), 1)
    assert counts[-1 if confidence else 0, 0] == 4


def test_a_calibrated_prediction_has_almost_no_calibration_error():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(1, 400, 500, generator=generator)
    right = torch.rand(1, 400, 500, generator=generator) < confidence
    target = torch.where(right, 0, 1)
    pred = torch.zeros_like(target)
    assert metrics_of((pred, target, confidence), num_classes=2)["ece"] < 0.006
    overconfident = metrics_of((pred, target, confidence.sqrt()), num_classes=2)
    assert overconfident["ece"] > 0.1


# Comparison with libraries


def noisy_maps(num_classes=6):
    """Predictions, targets and confidences, (4, 30, 40) each.

    A fifth of the pixels is ignored; one class is only predicted, one only in the target, and one
    absent.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (4, 30, 40)
    target = torch.randint(num_classes - 2, shape, generator=generator)
    pred = torch.randint(num_classes - 1, shape, generator=generator)
    confidence = torch.rand(shape, generator=generator, dtype=torch.float64)
    # Overconfident above one half, underconfident below.
    is_right = torch.rand(shape, generator=generator) < torch.where(confidence < 0.5, 0.7, 0.4)
    pred = torch.where(is_right, target, pred)
    pred[pred == num_classes - 3] = 0
    target[torch.rand(shape, generator=generator) < 0.2] = IGNORED
    return pred, target, confidence


@pytest.mark.slow
def test_metrics_against_scikit_learn():
    from sklearn import metrics

    pred, target, _ = noisy_maps()
    counted = target != IGNORED
    y_true, y_pred = target[counted].numpy(), pred[counted].numpy()
    ours = SegmentationMetrics(6, IGNORED)
    parts = [update(ours, pred[i : i + 1], target[i : i + 1]) for i in range(len(pred))]
    confusion = sum(part["confusion"] for part in parts)
    assert np.array_equal(confusion, metrics.confusion_matrix(y_true, y_pred, labels=range(6)))
    assert np.array_equal(ours.confusion.total, confusion)
    result = ours.compute()
    present = sorted({*y_true, *y_pred})
    assert present == [0, 1, 2, 3, 4]
    iou = metrics.jaccard_score(y_true, y_pred, labels=present, average=None)
    np.testing.assert_allclose(result["iou"][present], iou, rtol=1e-14)
    assert result["iou"][5].isnan()
    assert result["miou"].item() == pytest.approx(
        metrics.jaccard_score(y_true, y_pred, labels=present, average="macro"), rel=1e-14
    )
    assert result["fwiou"].item() == pytest.approx(
        metrics.jaccard_score(y_true, y_pred, average="weighted"), rel=1e-14
    )
    recall = metrics.recall_score(y_true, y_pred, labels=sorted({*y_true}), average="macro")
    assert result["macc"].item() == pytest.approx(recall, rel=1e-14)
    assert result["aacc"].item() == pytest.approx(metrics.accuracy_score(y_true, y_pred), rel=1e-14)
    # The comparison is sensitive to absent classes: counting one as 0 gives another mean.
    wrong = metrics.jaccard_score(y_true, y_pred, labels=range(6), average="macro", zero_division=0)
    assert result["miou"].item() != pytest.approx(wrong, rel=1e-3)


def test_metrics_against_torchmetrics():
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_confusion_matrix,
        multiclass_jaccard_index,
    )

    pred, target, _ = noisy_maps()
    arguments = (pred, target, 6)
    confusion = confusion_matrices(*as_classes(pred, target, 6, IGNORED), 6).sum(0)
    assert confusion.equal(multiclass_confusion_matrix(*arguments, ignore_index=IGNORED))
    result = metrics_of((pred, target), num_classes=6)
    # torchmetrics computes in float32.
    iou = multiclass_jaccard_index(*arguments, ignore_index=IGNORED, average="none")
    np.testing.assert_allclose(result["iou"][:5], iou[:5], rtol=1e-6)
    weighted = multiclass_jaccard_index(*arguments, ignore_index=IGNORED, average="weighted").item()
    assert result["fwiou"].item() == pytest.approx(weighted, rel=1e-6)
    accuracy = multiclass_accuracy(*arguments, ignore_index=IGNORED, average="micro").item()
    assert result["aacc"].item() == pytest.approx(accuracy, rel=1e-6)


@pytest.mark.slow
def test_calibration_bins_against_scikit_learn():
    from sklearn.calibration import calibration_curve

    pred, target, confidence = noisy_maps()
    counted = target != IGNORED
    right = (pred == target)[counted].numpy()
    shares, means = calibration_curve(right, confidence[counted].numpy(), n_bins=NUM_BINS)
    counts = calibration_counts(*as_classes(pred, target, 6, IGNORED), confidence, 6)
    np.testing.assert_allclose(counts[:, 1] / counts[:, 0], means, rtol=1e-12)
    np.testing.assert_allclose(counts[:, 2] / counts[:, 0], shares, rtol=1e-12)


def test_calibration_error_against_torchmetrics():
    from torchmetrics.functional.classification import binary_calibration_error

    pred, target, confidence = noisy_maps()
    counted = target != IGNORED
    batches = [[maps[i : i + 1] for maps in (pred, target, confidence)] for i in range(len(pred))]
    ece = metrics_of(*batches, num_classes=6)["ece"].item()
    right = (pred == target)[counted].int()

    def theirs(num_bins):
        # Binary: the confidence and whether the prediction is correct, for any number of classes.
        return binary_calibration_error(confidence[counted], right, n_bins=num_bins).item()

    # torchmetrics sums in float32.
    assert ece == pytest.approx(theirs(15), rel=1e-5)
    assert ece != pytest.approx(theirs(10), rel=1e-3)


@pytest.mark.parametrize(
    "metric", [miou, miou_i, miou_c, partial(miou_i, worst=0.1), partial(miou_c, worst=0.1)]
)
def test_weights_are_numbers_of_occurrences(metric):
    generator = np.random.default_rng(0)
    target = generator.integers(0, 20, (30, 4)) * (generator.random((30, 4)) < 0.6)
    intersection = generator.binomial(target, 0.7)
    counts = np.stack([intersection, target, target + 1], axis=-1)
    weights = generator.integers(0, 3, (5, 30))
    expected = [metric(np.repeat(counts, row, axis=0))[0] for row in weights]
    np.testing.assert_allclose(metric(counts, weights), expected, rtol=1e-12)
