import pytest
import torch

from segformer_pl.metrics import SegmentationScores

IGNORED = 255
NAN = float("nan")

# Four classes. 0: two of three right. 1: one of two right. 2: predicted once, never there.
# 3: neither labelled nor predicted.
LABELS = torch.tensor([[[0, 0, 0], [1, 1, IGNORED]]])
PREDICTIONS = torch.tensor([[[0, 0, 1], [1, 2, 3]]])


def scores_of(*batches, num_classes=4):
    scores = SegmentationScores(num_classes, IGNORED)
    for predictions, labels in batches:
        scores.update(predictions, labels)
    return scores.compute()


def test_by_hand():
    result = scores_of((PREDICTIONS, LABELS))
    iou = torch.tensor([2 / 3, 1 / 3, 0, NAN], dtype=torch.float64)
    torch.testing.assert_close(result["iou"], iou, equal_nan=True)
    # A class that is only predicted scores 0; one that is nowhere is left out. Accuracy has
    # nothing to divide by for either.
    assert result["miou"].item() == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert result["macc"].item() == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result["aacc"].item() == pytest.approx(3 / 5)
    assert result["num_labelled"].item() == 5
    assert {value.dtype for value in result.values()} == {torch.float64}


def test_rows_are_labels():
    scores = SegmentationScores(4, IGNORED)
    scores.update(PREDICTIONS, LABELS)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    expected[0, 0], expected[0, 1], expected[1, 1], expected[1, 2] = 2, 1, 1, 1
    torch.testing.assert_close(scores.confusion, expected)


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
    assert result.keys() == {"miou", "macc", "aacc", "iou"}
    assert all(value.isnan().all() for value in result.values())


def test_ranks_add_up():
    # What a sum over ranks does to the state, without the processes.
    one, other = SegmentationScores(4, IGNORED), SegmentationScores(4, IGNORED)
    one.update(PREDICTIONS[:, :1], LABELS[:, :1])
    other.update(PREDICTIONS[:, 1:], LABELS[:, 1:])
    assert one._reductions["confusion"](torch.stack([one.confusion, other.confusion])).equal(
        one.confusion + other.confusion
    )


def test_reset_forgets():
    scores = SegmentationScores(4, IGNORED)
    scores.update(PREDICTIONS, LABELS)
    scores.reset()
    assert not scores.confusion.any()


@pytest.mark.parametrize("wrong", [4, -1])
def test_label_outside_the_classes_is_not_counted_as_another(wrong):
    # The reference's histogram puts a label equal to num_classes into the last bin.
    labels = torch.where(LABELS == 0, wrong, LABELS)
    with pytest.raises(RuntimeError):
        scores_of((PREDICTIONS, labels))
