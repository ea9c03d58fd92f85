"""Our metrics on random label maps against those of three code bases, by their own functions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from segformer_pl.data.catalog import find_dataset
from segformer_pl.metrics import SegmentationMetrics

NUM_CLASSES, IGNORED = 7, 255


def label_maps(seed=0, num_classes=NUM_CLASSES):
    """Predictions and labels (4, 40, 50): a fifth is ignored, and of the classes the last is
    absent, the one before is only predicted, and the one before that is only labelled."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 40, 50)
    labels = torch.randint(num_classes - 2, shape, generator=generator)
    noise = torch.randint(num_classes - 1, shape, generator=generator)
    predictions = torch.where(torch.rand(shape, generator=generator) < 0.6, labels, noise)
    predictions[predictions == num_classes - 3] = 0
    labels[torch.rand(shape, generator=generator) < 0.2] = IGNORED
    return predictions, labels


def update(metrics, pred, target, confidence=None):
    """Add a batch, with a confidence and a loss of one where they do not matter."""
    ones = torch.ones(pred.shape)
    metrics.update(pred, target, ones if confidence is None else confidence, ones)


def our_metrics(predictions, labels, num_classes=NUM_CLASSES):
    metrics = SegmentationMetrics(num_classes, IGNORED)
    for prediction, label in zip(predictions, labels):
        update(metrics, prediction[None], label[None])
    return metrics.compute()


@pytest.fixture(scope="module")
def iou_metric(mmseg):
    """Function predictions, labels -> what mmsegmentation reports, fractions, not rounded."""
    from mmseg.evaluation.metrics import IoUMetric

    def score(predictions, labels):
        metric = IoUMetric(iou_metrics=["mIoU"], ignore_index=IGNORED)
        metric.dataset_meta = {"classes": [f"class {n}" for n in range(NUM_CLASSES)]}
        for prediction, label in zip(predictions, labels):
            sample = {"pred_sem_seg": {"data": prediction[None]}, "gt_sem_seg": {"data": label}}
            metric.process({}, [sample])
        # Its float32 counts are exact below 2**24 pixels; what it divides them by is made double.
        sums = [sum(counts).double() for counts in zip(*metric.results)]
        exact = metric.total_area_to_metrics(*sums, metrics=["mIoU"])
        return exact, metric.compute_metrics(metric.results), sums

    return score


def test_mmsegmentation(iou_metric):
    predictions, labels = label_maps()
    exact, reported, sums = iou_metric(predictions, labels)
    scores = our_metrics(predictions, labels)
    np.testing.assert_allclose(scores["iou"], exact["IoU"], rtol=1e-14)
    assert scores["aacc"].item() == pytest.approx(float(exact["aAcc"]), rel=1e-14)
    for name in ("miou", "macc", "aacc"):
        theirs = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}[name]
        assert round(100 * scores[name].item(), 2) == pytest.approx(reported[theirs], abs=0.006)
    assert scores["miou"].item() == pytest.approx(np.nanmean(exact["IoU"]), rel=1e-14)
    assert scores["macc"].item() == pytest.approx(np.nanmean(exact["Acc"]), rel=1e-14)
    # mmsegmentation does not report fwIoU; it is its IoU weighted by its label counts.
    labelled = sums[3].numpy()
    weighted = np.average(np.nan_to_num(exact["IoU"]), weights=labelled)
    assert scores["fwiou"].item() == pytest.approx(weighted, rel=1e-14)


def test_the_comparison_notices_another_rule(iou_metric):
    predictions, labels = label_maps()
    exact, _, _ = iou_metric(predictions, labels)
    iou = our_metrics(predictions, labels)["iou"]
    # A class that is nowhere counted as 0, and one that is only predicted left out.
    assert iou.nan_to_num().mean().item() != pytest.approx(np.nanmean(exact["IoU"]), rel=1e-3)
    assert iou[iou > 0].mean().item() != pytest.approx(np.nanmean(exact["IoU"]), rel=1e-3)
    # Means over images instead of over the set; ignored pixels that count as wrong.
    separate = [our_metrics(p[None], y[None])["miou"] for p, y in zip(predictions, labels)]
    assert torch.stack(separate).mean().item() != pytest.approx(np.nanmean(exact["IoU"]), rel=1e-6)
    counted = labels.masked_fill(labels == IGNORED, 0)
    wrong = our_metrics(predictions, counted)["miou"].item()
    assert wrong != pytest.approx(np.nanmean(exact["IoU"]), rel=1e-3)


def test_cityscapesscripts(cityscapes_evaluation, tmp_path):
    """Predictions and labels as files of raw ids, scored by its ``evaluateImgLists``; ours from
    the train ids that the catalogue makes of the same ids."""
    generator = np.random.default_rng(0)
    names = {label.id: label.name for label in cityscapes_evaluation.labels if label.id >= 0}
    entry = find_dataset("cityscapes")
    train_id = {name: number for number, name in enumerate(entry.labels.names)}
    scored = sorted(key for key, name in names.items() if name in train_id)
    files = {"prediction": [], "label": []}
    ours = SegmentationMetrics(len(train_id), entry.labels.ignore_index)
    for number in range(3):
        label = generator.choice(sorted(names), (60, 80)).astype(np.uint8)
        guess = generator.choice(scored[:-1], label.shape).astype(np.uint8)  # never a bicycle
        known = np.isin(label, scored) & (generator.random(label.shape) < 0.7)
        prediction = np.where(known, label, guess).astype(np.uint8)
        label[label == scored[0]] = 0  # no road labelled, all of it unlabelled
        for kind, array in (("prediction", prediction), ("label", label)):
            files[kind].append(str(tmp_path / f"{kind}_{number}.png"))
            Image.fromarray(array).save(files[kind][-1])
        trained = (
            torch.from_numpy(entry.labels.to_train_ids(array, "here").astype(np.int64))[None]
            for array in (prediction, label)
        )
        update(ours, *trained)

    settings = cityscapes_evaluation.args
    arguments = SimpleNamespace(**vars(settings))
    arguments.quiet, arguments.JSONOutput, arguments.evalInstLevelScore = True, False, False
    arguments.evalPixelAccuracy = False
    result = cityscapes_evaluation.evaluateImgLists(files["prediction"], files["label"], arguments)
    theirs = [result["classScores"][name] for name in entry.labels.names]
    scores = ours.compute()
    np.testing.assert_allclose(scores["iou"], theirs, rtol=1e-14)
    assert scores["miou"].item() == pytest.approx(result["averageScoreClasses"], rel=1e-14)
    assert scores["iou"][0] == 0  # road, predicted and nowhere labelled


def test_calibration_error_of_netcal():
    netcal = pytest.importorskip("netcal.metrics", reason="`make test-references` installs it")
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 30, 40, NUM_CLASSES, generator=generator, dtype=torch.float64)
    probabilities = logits.softmax(3)
    confidence, predictions = probabilities.max(3)
    # Too sure above one half and not sure enough below it: where the gap has one sign, any bins
    # give the same error.
    accuracy = torch.where(confidence < 0.5, 0.9, 0.4)
    is_right = torch.rand(confidence.shape, generator=generator) < accuracy
    labels = torch.where(is_right, predictions, (predictions + 1) % NUM_CLASSES)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORED
    ours = SegmentationMetrics(NUM_CLASSES, IGNORED)
    update(ours, predictions, labels, confidence)
    counted = labels != IGNORED
    given = probabilities[counted].numpy(), labels[counted].numpy()
    expected = netcal.ECE(bins=15).measure(*given)
    assert expected > 0.01
    assert ours.compute()["ece"].item() == pytest.approx(expected, rel=1e-12)
    # Another number of bins, and with the ignored pixels, is another number.
    assert netcal.ECE(bins=10).measure(*given) != pytest.approx(expected, rel=1e-3)
    everything = SegmentationMetrics(NUM_CLASSES, IGNORED)
    update(everything, predictions, labels.masked_fill(~counted, 0), confidence)
    assert everything.compute()["ece"].item() != pytest.approx(expected, rel=1e-3)
