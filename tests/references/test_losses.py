"""Our losses against mmsegmentation's, by their own modules, on logits of the label's size."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from segformer_pl.losses import CrossEntropy, Lovasz, OhemCrossEntropy

IGNORED = 255


@pytest.fixture
def example(mmseg):
    """Logits (2, 5, 7, 9), the same at 26x37, and labels of that size, a third ignored."""
    logits = (3 * torch.randn(2, 5, 7, 9, dtype=torch.float64)).requires_grad_()
    large = F.interpolate(logits, size=(26, 37), mode="bilinear", align_corners=False)
    labels = torch.randint(5, (2, 26, 37))
    labels[torch.rand(labels.shape) < 0.3] = IGNORED
    return logits, large, labels


def same(found, expected, logits, rtol=1e-12):
    """Whether losses and gradients agree."""
    gradients = [
        torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected)
    ]
    largest = gradients[1].abs().max().item()
    return torch.allclose(found.to(expected), expected, rtol=rtol, atol=0) and torch.allclose(
        *gradients, rtol=0, atol=rtol * largest
    )


# It adds an epsilon of float32 to the number of pixels that it divides by.
EPSILON = 1e-9


def test_cross_entropy(example):
    """Without class weights, with which theirs takes the ignored label for a class."""
    from mmseg.models.losses import CrossEntropyLoss

    logits, large, labels = example
    every, valid = (CrossEntropy(average)(logits, labels, IGNORED) for average in ("all", "valid"))
    expected = CrossEntropyLoss()(large, labels, ignore_index=IGNORED)
    assert same(every, expected, logits, EPSILON)
    assert not same(valid, expected, logits, 1e-3)
    expected = CrossEntropyLoss(avg_non_ignore=True)(large, labels, ignore_index=IGNORED)
    assert same(valid, expected, logits, EPSILON)


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.7, 10), (0.05, 400)])
def test_ohem(example, threshold, min_kept):
    """Its sampler chooses pixels, of which ours is the mean loss. (It leaves the easiest pixel out
    where there are fewer than ``min_kept`` in all; ours takes all of them.)"""
    from mmseg.structures import OHEMPixelSampler

    logits, large, labels = example
    context = SimpleNamespace(ignore_index=IGNORED)
    sampler = OHEMPixelSampler(context, thresh=threshold, min_kept=min_kept)
    chosen = sampler.sample(large.detach(), labels[:, None]).double()
    losses = F.cross_entropy(large, labels, ignore_index=IGNORED, reduction="none")
    expected = (losses * chosen).sum() / chosen.sum()
    ours = OhemCrossEntropy(threshold, min_kept)(logits, labels, IGNORED)
    assert same(ours, expected, logits)
    other = OhemCrossEntropy(threshold * 0.9, min_kept + 1)(logits, labels, IGNORED)
    assert not same(other, expected, logits, 1e-6)


def test_lovasz(example):
    """In single precision, which its weights always have."""
    from mmseg.models.losses import LovaszLoss

    logits, large, labels = example
    theirs = LovaszLoss(reduction="none")(large.float(), labels, ignore_index=IGNORED)
    ours = Lovasz()(logits, labels, IGNORED)
    assert same(ours, theirs, logits, 1e-4)
    per_image = LovaszLoss(reduction="mean", per_image=True)
    assert not same(ours, per_image(large.float(), labels, ignore_index=IGNORED), logits, 1e-3)
