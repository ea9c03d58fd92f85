import math

import pytest
import torch

from segformer_pl.losses import cross_entropy

IGNORED = 255


def test_value_by_hand_after_upsampling():
    # Two cells upsampled to four pixels: class 1 leads by 0, 1, 3, 4 (align_corners=False).
    logits = torch.tensor([[[[0.0, 0.0]], [[0.0, 4.0]]]], dtype=torch.float64)
    labels = torch.tensor([[[1, 1, IGNORED, 0]]])
    expected = (math.log(2) + math.log(1 + math.exp(-1)) + math.log(1 + math.exp(4))) / 3
    assert cross_entropy(logits, labels, IGNORED).item() == pytest.approx(expected, rel=1e-12)


def test_average_is_over_labelled_pixels_of_the_whole_batch():
    # The second image has one labelled pixel: it counts once, not as much as the whole first.
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    labels = torch.randint(3, (2, 4, 4))
    labels[1] = IGNORED
    labels[1, 0, 0] = 2
    each = -logits.log_softmax(dim=1).gather(1, labels.clamp(max=2)[:, None])[:, 0]
    expected = each[labels != IGNORED].sum() / 17
    torch.testing.assert_close(cross_entropy(logits, labels, IGNORED), expected)


@pytest.mark.parametrize("ignore_index", [255, 0, -1])
def test_ignored_pixels_get_no_gradient(ignore_index):
    logits = torch.randn(2, 3, 5, 7, requires_grad=True)
    labels = torch.randint(1, 3, (2, 5, 7))
    ignored = torch.rand(2, 5, 7) < 0.5
    labels[ignored] = ignore_index
    loss = cross_entropy(logits, labels, ignore_index)
    by_pixel = logits.detach().log_softmax(dim=1).movedim(1, -1)[~ignored]
    torch.testing.assert_close(loss, -by_pixel[range(len(by_pixel)), labels[~ignored]].mean())
    loss.backward()
    per_pixel = logits.grad.abs().amax(dim=1)
    assert not per_pixel[ignored].any()
    assert per_pixel[~ignored].all()


def test_cell_that_only_ignored_pixels_look_at_gets_no_gradient():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels = torch.full((1, 16, 16), IGNORED)
    labels[0, :2] = 1  # above the centre of the first row of cells: nothing to interpolate with
    cross_entropy(logits, labels, IGNORED).backward()
    assert logits.grad[:, :, 0].all()
    assert not logits.grad[:, :, 1:].any()


def test_nothing_labelled():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 16, 16), IGNORED), IGNORED)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_half_precision_logits_are_summed_in_single():
    logits = torch.randn(1, 3, 8, 8).bfloat16().requires_grad_()
    labels = torch.randint(3, (1, 32, 32))
    loss = cross_entropy(logits, labels, IGNORED)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(logits.float(), labels, IGNORED), rtol=0, atol=0)
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16
    assert logits.grad.isfinite().all()
