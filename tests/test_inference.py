import pytest
import torch

from segformer_pl.inference import predict_labels


def test_logits_are_upsampled_before_the_decision():
    # Between two confident cells lies a third class that wins in neither. Upsampling decisions
    # would never find it.
    logits = torch.tensor([[[[3.0, 0.0]], [[0.0, 3.0]], [[2.4, 2.4]]]])
    assert logits.argmax(dim=1).tolist() == [[[0, 1]]]
    assert predict_labels(logits, (1, 4)).tolist() == [[[0, 2, 2, 1]]]


def test_cells_are_aligned_by_their_edges():
    # Class 1 leads by -1, -.5, .5, 1 at the quarters; with aligned corners it were -1/3 and 1/3
    # in the middle, which a lead of .4 for class 0 turns round.
    lead = torch.tensor([-1.4, 0.6])
    logits = torch.stack([torch.zeros(2), lead]).view(1, 2, 1, 2)
    assert predict_labels(logits, (1, 4)).tolist() == [[[0, 0, 1, 1]]]


@pytest.mark.parametrize("size", [(65, 97), (17, 25), (3, 200)])
def test_one_class_for_every_pixel(size):
    predictions = predict_labels(torch.randn(2, 5, 17, 25), size)
    assert predictions.shape == (2, *size)
    assert predictions.dtype == torch.int64
    assert set(predictions.unique().tolist()) <= set(range(5))


def test_height_comes_first():
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, 1] = 1  # class 1 below
    logits[0, 0, 0] = 1
    assert predict_labels(logits, (4, 6))[0].tolist() == [[0] * 6] * 2 + [[1] * 6] * 2
