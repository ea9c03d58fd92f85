"""Comparison of the metrics with mmsegmentation, cityscapesscripts and netcal."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from segformer_pl.data.catalog import find_dataset
from segformer_pl.metrics import SegmentationMetrics

NUM_CLASSES, IGNORED = 7, 255


def label_maps(seed=0, num_classes=NUM_CLASSES):
    """Random predictions and targets, (4, 40, 50) each; a fifth of the pixels is ignored.

    The last class is absent, the one before is only predicted, and the one before that is only in
    the target.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 40, 50)
    target = torch.randint(num_classes - 2, shape, generator=generator)
    noise = torch.randint(num_classes - 1, shape, generator=generator)
    pred = torch.where(torch.rand(shape, generator=generator) < 0.6, target, noise)
    pred[pred == num_classes - 3] = 0
    target[torch.rand(shape, generator=generator) < 0.2] = IGNORED
    return pred, target


def update(metrics, pred, target, confidence=None):
    """Add a batch with loss 1 and, by default, confidence 1."""
    ones = torch.ones(pred.shape)
    metrics.update(pred, target, ones if confidence is None else confidence, ones)


def our_metrics(pred, target, num_classes=NUM_CLASSES):
    metrics = SegmentationMetrics(num_classes, IGNORED)
    for prediction, label in zip(pred, target):
        update(metrics, prediction[None], label[None])
    return metrics.compute()


@pytest.fixture(scope="module")
def iou_metric(mmseg):
    """Function pred, target -> mmsegmentation's metrics as exact fractions, its rounded
    report in per cent, and its pixel counts."""
    from mmseg.evaluation.metrics import IoUMetric

    def evaluate(pred, target):
        metric = IoUMetric(iou_metrics=["mIoU"], ignore_index=IGNORED)
        metric.dataset_meta = {"classes": [f"class {n}" for n in range(NUM_CLASSES)]}
        for prediction, label in zip(pred, target):
            sample = {"pred_sem_seg": {"data": prediction[None]}, "gt_sem_seg": {"data": label}}
            metric.process({}, [sample])
        # Its float32 counts are exact below 2**24 pixels; divide them in float64.
        sums = [sum(counts).double() for counts in zip(*metric.results)]
        exact = metric.total_area_to_metrics(*sums, metrics=["mIoU"])
        return exact, metric.compute_metrics(metric.results), sums

    return evaluate


def test_metrics_of_mmsegmentation(iou_metric):
    pred, target = label_maps()
    exact, reported, sums = iou_metric(pred, target)
    result = our_metrics(pred, target)
    np.testing.assert_allclose(result["iou"], exact["IoU"], rtol=1e-14)
    assert result["aacc"].item() == pytest.approx(float(exact["aAcc"]), rel=1e-14)
    for name in ("miou", "macc", "aacc"):
        theirs = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}[name]
        assert round(100 * result[name].item(), 2) == pytest.approx(reported[theirs], abs=0.006)
    assert result["miou"].item() == pytest.approx(np.nanmean(exact["IoU"]), rel=1e-14)
    assert result["macc"].item() == pytest.approx(np.nanmean(exact["Acc"]), rel=1e-14)
    # mmsegmentation does not report fwIoU; compute it from its IoU and target counts.
    labelled = sums[3].numpy()
    weighted = np.average(np.nan_to_num(exact["IoU"]), weights=labelled)
    assert result["fwiou"].item() == pytest.approx(weighted, rel=1e-14)


def test_other_definitions_of_miou_are_detected(iou_metric):
    pred, target = label_maps()
    exact, _, _ = iou_metric(pred, target)
    iou = our_metrics(pred, target)["iou"]
    # An absent class counted as 0, and a class that is only predicted left out
    assert iou.nan_to_num().mean().item() != pytest.approx(np.nanmean(exact["IoU"]), rel=1e-3)
    assert iou[iou > 0].mean().item() != pytest.approx(np.nanmean(exact["IoU"]), rel=1e-3)
    # A mean over images instead of over the split, and ignored pixels counted as wrong
    separate = [our_metrics(p[None], y[None])["miou"] for p, y in zip(pred, target)]
    assert torch.stack(separate).mean().item() != pytest.approx(np.nanmean(exact["IoU"]), rel=1e-6)
    counted = target.masked_fill(target == IGNORED, 0)
    wrong = our_metrics(pred, counted)["miou"].item()
    assert wrong != pytest.approx(np.nanmean(exact["IoU"]), rel=1e-3)


def test_iou_of_cityscapesscripts(cityscapes_evaluation, tmp_path):
    """It evaluates files of raw ids; ours, the train ids that the catalogue maps them to."""
    generator = np.random.default_rng(0)
    names = {label.id: label.name for label in cityscapes_evaluation.labels if label.id >= 0}
    entry = find_dataset("cityscapes")
    train_id = {name: number for number, name in enumerate(entry.labels.names)}
    evaluated = sorted(key for key, name in names.items() if name in train_id)
    files = {"prediction": [], "label": []}
    ours = SegmentationMetrics(len(train_id), entry.labels.ignore_index)
    for number in range(3):
        label = generator.choice(sorted(names), (60, 80)).astype(np.uint8)
        noise = generator.choice(evaluated[:-1], label.shape).astype(
            np.uint8
        )  # the last class, bicycle, is never predicted
        is_correct = np.isin(label, evaluated) & (generator.random(label.shape) < 0.7)
        prediction = np.where(is_correct, label, noise).astype(np.uint8)
        label[label == evaluated[0]] = 0  # the first class, road, is not in the target
        for kind, array in (("prediction", prediction), ("label", label)):
            files[kind].append(str(tmp_path / f"{kind}_{number}.png"))
            Image.fromarray(array).save(files[kind][-1])
        train_ids = (
            torch.from_numpy(entry.labels.to_train_ids(array, "here").astype(np.int64))[None]
            for array in (prediction, label)
        )
        update(ours, *train_ids)

    settings = cityscapes_evaluation.args
    arguments = SimpleNamespace(**vars(settings))
    arguments.quiet, arguments.JSONOutput, arguments.evalInstLevelScore = True, False, False
    arguments.evalPixelAccuracy = False
    result = cityscapes_evaluation.evaluateImgLists(files["prediction"], files["label"], arguments)
    theirs = [result["classScores"][name] for name in entry.labels.names]
    metrics = ours.compute()
    np.testing.assert_allclose(metrics["iou"], theirs, rtol=1e-14)
    assert metrics["miou"].item() == pytest.approx(result["averageScoreClasses"], rel=1e-14)
    assert metrics["iou"][0] == 0  # road is predicted but not in the target


def test_calibration_error_of_netcal():
    netcal = pytest.importorskip("netcal.metrics", reason="`make test-references` installs it")
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 30, 40, NUM_CLASSES, generator=generator, dtype=torch.float64)
    probabilities = logits.softmax(3)
    confidence, pred = probabilities.max(3)
    # Overconfident above one half and underconfident below: if the gap had one sign, any number of
    # bins would give the same error.
    accuracy = torch.where(confidence < 0.5, 0.9, 0.4)
    is_right = torch.rand(confidence.shape, generator=generator) < accuracy
    target = torch.where(is_right, pred, (pred + 1) % NUM_CLASSES)
    target[torch.rand(target.shape, generator=generator) < 0.2] = IGNORED
    ours = SegmentationMetrics(NUM_CLASSES, IGNORED)
    update(ours, pred, target, confidence)
    counted = target != IGNORED
    arguments = probabilities[counted].numpy(), target[counted].numpy()
    expected = netcal.ECE(bins=15).measure(*arguments)
    assert expected > 0.01
    assert ours.compute()["ece"].item() == pytest.approx(expected, rel=1e-12)
    # Another number of bins, and counting the ignored pixels, change the result.
    assert netcal.ECE(bins=10).measure(*arguments) != pytest.approx(expected, rel=1e-3)
    with_ignored = SegmentationMetrics(NUM_CLASSES, IGNORED)
    update(with_ignored, pred, target.masked_fill(~counted, 0), confidence)
    assert with_ignored.compute()["ece"].item() != pytest.approx(expected, rel=1e-3)
