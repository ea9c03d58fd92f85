"""Comparison of the losses with mmsegmentation's modules on upsampled logits."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from segformer_pl.losses import CrossEntropy, Lovasz, OhemCrossEntropy

IGNORED = 255


@pytest.fixture
def example(mmseg):
    """Logits (2, 5, 7, 9), upsampled logits (2, 5, 26, 37) and target (2, 26, 37), 30 % ignored."""
    logits = (3 * torch.randn(2, 5, 7, 9, dtype=torch.float64)).requires_grad_()
    large = F.interpolate(logits, size=(26, 37), mode="bilinear", align_corners=False)
    target = torch.randint(5, (2, 26, 37))
    target[torch.rand(target.shape) < 0.3] = IGNORED
    return logits, large, target


def are_equal(loss, expected, logits, rtol=1e-12):
    """Whether two losses and their gradients agree."""
    gradients = [
        torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)
    ]
    largest = gradients[1].abs().max().item()
    return torch.allclose(loss.to(expected), expected, rtol=rtol, atol=0) and torch.allclose(
        *gradients, rtol=0, atol=rtol * largest
    )


# mmsegmentation adds a float32 epsilon to the number of pixels, the divisor of the mean.
EPSILON = 1e-9


def test_cross_entropy(example):
    """Without class weights: with them, mmsegmentation treats the ignored label as a class."""
    from mmseg.models.losses import CrossEntropyLoss

    logits, large, target = example
    over_all, over_valid = (
        CrossEntropy(average)(logits, target, IGNORED) for average in ("all", "valid")
    )
    expected = CrossEntropyLoss()(large, target, ignore_index=IGNORED)
    assert are_equal(over_all, expected, logits, EPSILON)
    assert not are_equal(over_valid, expected, logits, 1e-3)
    expected = CrossEntropyLoss(avg_non_ignore=True)(large, target, ignore_index=IGNORED)
    assert are_equal(over_valid, expected, logits, EPSILON)


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.7, 10), (0.05, 400)])
def test_ohem(example, threshold, min_kept):
    """Our loss is the mean over the pixels that mmsegmentation's sampler selects.

    If a batch has fewer labelled pixels than ``min_kept`` times its images, the sampler leaves out
    the easiest pixel and our loss keeps all; that case is not compared.
    """
    from mmseg.structures import OHEMPixelSampler

    logits, large, target = example
    context = SimpleNamespace(ignore_index=IGNORED)
    sampler = OHEMPixelSampler(context, thresh=threshold, min_kept=min_kept)
    selected = sampler.sample(large.detach(), target[:, None]).double()
    losses = F.cross_entropy(large, target, ignore_index=IGNORED, reduction="none")
    expected = (losses * selected).sum() / selected.sum()
    ours = OhemCrossEntropy(threshold, min_kept)(logits, target, IGNORED)
    assert are_equal(ours, expected, logits)
    other = OhemCrossEntropy(threshold * 0.9, min_kept + 1)(logits, target, IGNORED)
    assert not are_equal(other, expected, logits, 1e-6)


def test_lovasz(example):
    """In float32, because mmsegmentation's loss always has float32 weights."""
    from mmseg.models.losses import LovaszLoss

    logits, large, target = example
    theirs = LovaszLoss(reduction="none")(large.float(), target, ignore_index=IGNORED)
    ours = Lovasz()(logits, target, IGNORED)
    assert are_equal(ours, theirs, logits, 1e-4)
    per_image = LovaszLoss(reduction="mean", per_image=True)
    assert not are_equal(ours, per_image(large.float(), target, ignore_index=IGNORED), logits, 1e-3)
