import math

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from segformer_pl import bands
from segformer_pl.losses import (
    CrossEntropy,
    Dice,
    Focal,
    Lovasz,
    OhemCrossEntropy,
    WeightedSum,
    pixel_cross_entropy,
)

IGNORED = 255
CLASS_WEIGHTS = [0.5, 2.0, 0.0, 1.25, 3.0]
LOSSES = {
    "cross-entropy": CrossEntropy(),
    "valid": CrossEntropy("valid", CLASS_WEIGHTS, 0.1),
    "ohem": OhemCrossEntropy(0.3, 5),
    "focal": Focal(),
    "dice": Dice(),
    "lovasz": Lovasz(),
    "sum": WeightedSum([CrossEntropy(), Dice()], [1.0, 0.5]),
}


def example(num_classes=5, small=(7, 9), large=(26, 37), batch=3, dtype=torch.float64):
    logits = (3 * torch.randn(batch, num_classes, *small, dtype=dtype)).requires_grad_()
    target = torch.randint(num_classes, (batch, *large))
    target[torch.rand(target.shape) < 0.3] = IGNORED
    return logits, target


def upsampled(logits, size):
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def gradient_of(loss, logits):
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


def test_value_by_hand_after_upsampling():
    # Two cells upsampled to four pixels: class 1 leads by 0, 1, 3, 4 (align_corners=False).
    logits = torch.tensor([[[[0.0, 0.0]], [[0.0, 4.0]]]], dtype=torch.float64)
    target = torch.tensor([[[1, 1, IGNORED, 0]]])
    total = math.log(2) + math.log(1 + math.exp(-1)) + math.log(1 + math.exp(4))
    valid = CrossEntropy("valid")(logits, target, IGNORED)
    assert valid.item() == pytest.approx(total / 3, rel=1e-12)
    # The reference code divides by all four pixels.
    assert CrossEntropy()(logits, target, IGNORED).item() == pytest.approx(total / 4, rel=1e-12)


@pytest.mark.parametrize("band", [60, 2_000, 1_300_000])
@pytest.mark.parametrize("small", [(7, 9), (26, 37), (40, 50)])
@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("average", ["all", "valid"])
def test_equals_interpolate_and_cross_entropy(
    monkeypatch, average, label_smoothing, class_weights, small, band
):
    monkeypatch.setitem(bands.BAND_ELEMENTS, "cpu", band)
    logits, target = example(small=small)
    weights = None if class_weights is None else torch.tensor(class_weights).double()
    settings = {
        "ignore_index": IGNORED,
        "weight": weights,
        "label_smoothing": label_smoothing,
    }
    plain = upsampled(logits, target.shape[1:])
    if average == "valid":
        expected = F.cross_entropy(plain, target, **settings)
    else:
        expected = F.cross_entropy(plain, target, reduction="none", **settings).mean()
    loss = CrossEntropy(average, class_weights, label_smoothing)(logits, target, IGNORED)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradient_of(loss, logits), gradient_of(expected, logits), rtol=0, atol=1e-12
    )


def test_single_precision_stays_close_at_150_classes():
    logits, target = example(150, (16, 16), (64, 64), 1, torch.float32)
    loss = CrossEntropy()(logits, target, IGNORED)
    precise = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(
        upsampled(precise, (64, 64)), target, ignore_index=IGNORED, reduction="none"
    ).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    wanted = gradient_of(expected, precise)
    difference = (gradient_of(loss, logits).double() - wanted).abs().max() / wanted.abs().max()
    assert difference < 2e-6


def peak_memory(function):
    """Peak of the allocated bytes, minus those allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    allocated = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


@pytest.mark.slow
def test_memory_is_at_most_a_quarter_of_the_plain_loss():
    """At 150 classes, 512x512, batch 4, as in experiments/benchmarks/upsampled_loss.py."""
    logits = torch.randn(4, 150, 128, 128, requires_grad=True)
    target = torch.randint(150, (4, 512, 512))

    def plain():
        F.cross_entropy(upsampled(logits, (512, 512)), target, ignore_index=IGNORED).backward()

    def fused():
        CrossEntropy("valid")(logits, target, IGNORED).backward()

    ratio = peak_memory(plain) / peak_memory(fused)
    assert ratio >= 4, ratio


def test_average_is_over_labelled_pixels_of_the_whole_batch():
    # The second image has a single labelled pixel, which weighs as much as one of the first image.
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    target = torch.randint(3, (2, 4, 4))
    target[1] = IGNORED
    target[1, 0, 0] = 2
    each = -logits.log_softmax(dim=1).gather(1, target.clamp(max=2)[:, None])[:, 0]
    expected = each[target != IGNORED].sum() / 17
    torch.testing.assert_close(CrossEntropy("valid")(logits, target, IGNORED), expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ignore_index", [255, 0, -1, 7])
def test_ignored_pixels_get_no_gradient(name, ignore_index):
    logits = torch.randn(2, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    target = torch.randint(1, 5, (2, 6, 7))
    ignored = torch.rand(2, 6, 7) < 0.5
    target[ignored] = ignore_index
    gradient = gradient_of(LOSSES[name](logits, target, ignore_index), logits).abs().amax(dim=1)
    assert not gradient[ignored].any()
    assert gradient[~ignored].any()


def test_logits_that_only_ignored_pixels_interpolate_get_no_gradient():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    target = torch.full((1, 16, 16), IGNORED)
    target[0, :2] = 1  # above the centres of the first row, so interpolated from that row alone
    CrossEntropy()(logits, target, IGNORED).backward()
    assert logits.grad[:, :, 0].all()
    assert not logits.grad[:, :, 1:].any()


@pytest.mark.parametrize("name", LOSSES)
def test_loss_without_labelled_pixels_is_zero(name):
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    loss = LOSSES[name](logits, torch.full((2, 16, 16), IGNORED), IGNORED)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("name", ["cross-entropy", "ohem", "focal", "dice", "lovasz", "sum"])
def test_loss_of_a_single_class_is_zero(name):
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    logits = torch.zeros(1, 1, 2, 2, requires_grad=True)  # softmax over one class is 1
    loss = LOSSES[name](logits, target, IGNORED)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert logits.grad.isfinite().all()


def test_more_than_255_classes():
    logits, target = example(300)
    target[:, :4] = 299
    target[:, 4:6] = 255  # an ordinary class here
    loss = CrossEntropy("valid")(logits, target, 511)
    expected = F.cross_entropy(upsampled(logits, target.shape[1:]), target, ignore_index=511)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_logits_are_computed_in_float32(name, autocast):
    loss_module = LOSSES[name]
    logits = torch.randn(1, 5, 8, 8).bfloat16().requires_grad_()
    target = torch.randint(5, (1, 32, 32))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_module(logits, target, IGNORED)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, loss_module(logits.float(), target, IGNORED))
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16
    assert logits.grad.isfinite().all()


@pytest.mark.slow
def test_gradients_against_finite_differences():
    """Through the upsampling, too."""
    logits, target = example(5, (3, 4), (8, 9), 2)
    for name in ("focal", "dice", "lovasz", "sum"):
        torch.autograd.gradcheck(lambda x, n=name: LOSSES[n](x, target, IGNORED), logits)


def test_ohem_keeps_the_hard_pixels():
    # Probabilities of the label: 0.9, 0.8, 0.6, 0.2; nothing is upsampled.
    probabilities = torch.tensor([0.9, 0.8, 0.6, 0.2], dtype=torch.float64)
    logits = torch.stack([probabilities.log(), (1 - probabilities).log()]).view(1, 2, 1, 4)
    target = torch.zeros(1, 1, 4, dtype=torch.int64)
    losses = -probabilities.log()
    for threshold, min_kept, expected in (
        (0.7, 0, losses[2:].mean()),
        (0.7, 3, losses[1:].mean()),  # only two are hard, so keep the three hardest
        (0.1, 1, losses[3]),
        (1.0, 0, losses.mean()),
        (0.1, 0, torch.zeros(()).double()),
    ):
        loss = OhemCrossEntropy(threshold, min_kept)(logits, target, IGNORED)
        torch.testing.assert_close(loss, expected)


def test_pixel_cross_entropy_equals_interpolate_and_cross_entropy():
    logits, target = example()
    losses = pixel_cross_entropy(logits, target, IGNORED)
    expected = F.cross_entropy(
        upsampled(logits, target.shape[1:]), target, ignore_index=IGNORED, reduction="none"
    )
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-13)
    assert not losses.requires_grad


def test_focal_by_hand():
    logits, target = example(small=(6, 6), large=(6, 6))
    p = logits.softmax(1).gather(1, target.clamp(max=4)[:, None])[:, 0][target != IGNORED]
    expected = -((1 - p) ** 1.5 * p.log()).mean()
    torch.testing.assert_close(Focal(1.5)(logits, target, IGNORED), expected)
    torch.testing.assert_close(
        Focal(0.0)(logits, target, IGNORED), CrossEntropy("valid")(logits, target, IGNORED)
    )


def test_dice_by_hand():
    # Probabilities of class 0: 0.75 and 0.5 at its own two pixels, 0.25 at the pixel of class 1.
    first = torch.tensor([0.75, 0.5, 0.25, 0.9], dtype=torch.float64)
    logits = torch.stack([first.log(), (1 - first).log()]).view(1, 2, 1, 4)
    target = torch.tensor([[[0, 0, 1, IGNORED]]])
    dice_0 = 2 * 1.25 / (1.5 + 2)
    dice_1 = 2 * 0.75 / (1.5 + 1)
    expected = 1 - (dice_0 + dice_1) / 2
    assert Dice()(logits, target, IGNORED).item() == pytest.approx(expected)


def test_lovasz_of_certain_predictions_is_one_minus_iou():
    """At hard predictions, the Lovász extension equals the set function that it extends."""
    target = torch.randint(3, (1, 12, 12))
    pred = torch.where(torch.rand(1, 12, 12) < 0.6, target, torch.randint(3, (1, 12, 12)))
    logits = 1e4 * F.one_hot(pred, 3).movedim(3, 1).double()
    losses = []
    for train_id in range(3):
        in_target, in_pred = target == train_id, pred == train_id
        losses.append(1 - (in_target & in_pred).sum() / (in_target | in_pred).sum())
    expected = torch.stack(losses).double().mean()
    assert Lovasz()(logits, target, IGNORED).item() == pytest.approx(expected.item(), rel=1e-6)


def test_weighted_sum():
    logits, target = example()
    loss = LOSSES["sum"](logits, target, IGNORED)
    expected = CrossEntropy()(logits, target, IGNORED) + 0.5 * Dice()(logits, target, IGNORED)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="1 losses but 2 weights"):
        WeightedSum([Dice()], [1.0, 2.0])


def test_wrong_number_of_class_weights_is_refused():
    logits, target = example(4)
    for average in ("all", "valid"):
        with pytest.raises(ValueError, match="5 class weights but 4 classes"):
            CrossEntropy(average, CLASS_WEIGHTS)(logits, target, IGNORED)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.0, 0.0], "class_weights are all 0"),
        ([1.0, math.nan], "nan at train id 1 is not a valid weight"),
        ([-1.0, 1.0], "-1.0 at train id 0 is not a valid weight"),
        ([1.0, math.inf], "inf at train id 1 is not a valid weight"),
    ],
)
def test_invalid_class_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        CrossEntropy(class_weights=weights)


# Comparison with a library


@pytest.mark.slow
@pytest.mark.parametrize("num_labelled", [5, 3])
def test_dice_and_lovasz_against_segmentation_models_pytorch(num_labelled):
    import segmentation_models_pytorch as smp

    # float32, because its Lovász loss always has float32 weights.
    logits, target = example(5, (7, 9), (14, 18), dtype=torch.float32)
    target[(target != IGNORED) & (target >= num_labelled)] = 0
    plain = upsampled(logits, target.shape[1:])
    lovasz = smp.losses.LovaszLoss("multiclass", ignore_index=IGNORED)(plain, target)
    dice = smp.losses.DiceLoss("multiclass", ignore_index=IGNORED)(plain, target)
    # Its mean includes absent classes with a loss of 0; ours leaves them out.
    dice = dice * 5 / num_labelled
    for loss, expected in ((Lovasz(), lovasz), (Dice(), dice)):
        value = loss(logits, target, IGNORED)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
        gradients = gradient_of(value, logits), gradient_of(expected, logits)
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-5 * gradients[1].abs().max().item())
        with_ignored = loss(logits, target.masked_fill(target == IGNORED, 0), IGNORED)
        assert with_ignored.item() != pytest.approx(expected.item(), rel=1e-3)
