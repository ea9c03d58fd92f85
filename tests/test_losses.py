import math

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from segformer_pl import upsampling
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
    labels = torch.randint(num_classes, (batch, *large))
    labels[torch.rand(labels.shape) < 0.3] = IGNORED
    return logits, labels


def upsampled(logits, size):
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def gradient_of(loss, logits):
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


def test_value_by_hand_after_upsampling():
    # Two cells upsampled to four pixels: class 1 leads by 0, 1, 3, 4 (align_corners=False).
    logits = torch.tensor([[[[0.0, 0.0]], [[0.0, 4.0]]]], dtype=torch.float64)
    labels = torch.tensor([[[1, 1, IGNORED, 0]]])
    total = math.log(2) + math.log(1 + math.exp(-1)) + math.log(1 + math.exp(4))
    valid = CrossEntropy("valid")(logits, labels, IGNORED)
    assert valid.item() == pytest.approx(total / 3, rel=1e-12)
    # The paper's code divides by all four.
    assert CrossEntropy()(logits, labels, IGNORED).item() == pytest.approx(total / 4, rel=1e-12)


@pytest.mark.parametrize("band", [60, 2_000, 1_300_000])
@pytest.mark.parametrize("small", [(7, 9), (26, 37), (40, 50)])
@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("average", ["all", "valid"])
def test_equals_interpolate_and_cross_entropy(
    monkeypatch, average, label_smoothing, class_weights, small, band
):
    monkeypatch.setitem(upsampling.BAND_ELEMENTS, "cpu", band)
    logits, labels = example(small=small)
    weights = None if class_weights is None else torch.tensor(class_weights).double()
    settings = {
        "ignore_index": IGNORED,
        "weight": weights,
        "label_smoothing": label_smoothing,
    }
    plain = upsampled(logits, labels.shape[1:])
    if average == "valid":
        expected = F.cross_entropy(plain, labels, **settings)
    else:
        expected = F.cross_entropy(plain, labels, reduction="none", **settings).mean()
    loss = CrossEntropy(average, class_weights, label_smoothing)(logits, labels, IGNORED)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradient_of(loss, logits), gradient_of(expected, logits), rtol=0, atol=1e-12
    )


def test_single_precision_stays_close_at_150_classes():
    logits, labels = example(150, (16, 16), (64, 64), 1, torch.float32)
    loss = CrossEntropy()(logits, labels, IGNORED)
    precise = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(
        upsampled(precise, (64, 64)), labels, ignore_index=IGNORED, reduction="none"
    ).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    wanted = gradient_of(expected, precise)
    difference = (gradient_of(loss, logits).double() - wanted).abs().max() / wanted.abs().max()
    assert difference < 2e-6


def peak_memory(function):
    """Bytes that the allocator held at most, above where it began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.slow
def test_a_quarter_of_the_memory_at_most():
    """At 150 classes, 512x512, batch 4, as the ledger's benchmark measures in the process."""
    logits = torch.randn(4, 150, 128, 128, requires_grad=True)
    labels = torch.randint(150, (4, 512, 512))

    def plain():
        F.cross_entropy(upsampled(logits, (512, 512)), labels, ignore_index=IGNORED).backward()

    def fused():
        CrossEntropy("valid")(logits, labels, IGNORED).backward()

    ratio = peak_memory(plain) / peak_memory(fused)
    assert ratio >= 4, ratio


def test_average_is_over_labelled_pixels_of_the_whole_batch():
    # The second image has one labelled pixel: it counts once, not as much as the whole first.
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    labels = torch.randint(3, (2, 4, 4))
    labels[1] = IGNORED
    labels[1, 0, 0] = 2
    each = -logits.log_softmax(dim=1).gather(1, labels.clamp(max=2)[:, None])[:, 0]
    expected = each[labels != IGNORED].sum() / 17
    torch.testing.assert_close(CrossEntropy("valid")(logits, labels, IGNORED), expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ignore_index", [255, 0, -1, 7])
def test_ignored_pixels_get_no_gradient(name, ignore_index):
    logits = torch.randn(2, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(1, 5, (2, 6, 7))
    ignored = torch.rand(2, 6, 7) < 0.5
    labels[ignored] = ignore_index
    gradient = gradient_of(LOSSES[name](logits, labels, ignore_index), logits).abs().amax(dim=1)
    assert not gradient[ignored].any()
    assert gradient[~ignored].any()


def test_cell_that_only_ignored_pixels_look_at_gets_no_gradient():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels = torch.full((1, 16, 16), IGNORED)
    labels[0, :2] = 1  # above the centre of the first row of cells: nothing to interpolate with
    CrossEntropy()(logits, labels, IGNORED).backward()
    assert logits.grad[:, :, 0].all()
    assert not logits.grad[:, :, 1:].any()


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_labelled(name):
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    loss = LOSSES[name](logits, torch.full((2, 16, 16), IGNORED), IGNORED)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("name", ["cross-entropy", "ohem", "focal", "dice", "lovasz", "sum"])
def test_one_class_is_learned_perfectly_or_not_at_all(name):
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    logits = torch.zeros(1, 1, 2, 2, requires_grad=True)  # nothing to choose from
    loss = LOSSES[name](logits, labels, IGNORED)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert logits.grad.isfinite().all()


def test_more_than_255_classes():
    logits, labels = example(300)
    labels[:, :4] = 299
    labels[:, 4:6] = 255  # a class like any other
    loss = CrossEntropy("valid")(logits, labels, 511)
    expected = F.cross_entropy(upsampled(logits, labels.shape[1:]), labels, ignore_index=511)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_logits_are_summed_in_single(name, autocast):
    loss_module = LOSSES[name]
    logits = torch.randn(1, 5, 8, 8).bfloat16().requires_grad_()
    labels = torch.randint(5, (1, 32, 32))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_module(logits, labels, IGNORED)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, loss_module(logits.float(), labels, IGNORED))
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16
    assert logits.grad.isfinite().all()


def test_gradients_of_the_other_losses():
    """Against finite differences, through the upsampling."""
    logits, labels = example(5, (3, 4), (8, 9), 2)
    for name in ("focal", "dice", "lovasz", "sum"):
        torch.autograd.gradcheck(lambda x, n=name: LOSSES[n](x, labels, IGNORED), logits)


def test_ohem_keeps_the_hard_pixels():
    # Probabilities of the label: 0.9, 0.8, 0.6, 0.2; nothing is upsampled.
    probabilities = torch.tensor([0.9, 0.8, 0.6, 0.2], dtype=torch.float64)
    logits = torch.stack([probabilities.log(), (1 - probabilities).log()]).view(1, 2, 1, 4)
    labels = torch.zeros(1, 1, 4, dtype=torch.int64)
    losses = -probabilities.log()
    for threshold, min_kept, expected in (
        (0.7, 0, losses[2:].mean()),
        (0.7, 3, losses[1:].mean()),  # too few are hard: the three hardest
        (0.1, 1, losses[3]),
        (1.0, 0, losses.mean()),
        (0.1, 0, torch.zeros(()).double()),
    ):
        loss = OhemCrossEntropy(threshold, min_kept)(logits, labels, IGNORED)
        torch.testing.assert_close(loss, expected)


def test_losses_of_single_pixels():
    logits, labels = example()
    losses = pixel_cross_entropy(logits, labels, IGNORED)
    expected = F.cross_entropy(
        upsampled(logits, labels.shape[1:]), labels, ignore_index=IGNORED, reduction="none"
    )
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-13)
    assert not losses.requires_grad


def test_focal_by_hand():
    logits, labels = example(small=(6, 6), large=(6, 6))
    own = logits.softmax(1).gather(1, labels.clamp(max=4)[:, None])[:, 0][labels != IGNORED]
    expected = -((1 - own) ** 1.5 * own.log()).mean()
    torch.testing.assert_close(Focal(1.5)(logits, labels, IGNORED), expected)
    torch.testing.assert_close(
        Focal(0.0)(logits, labels, IGNORED), CrossEntropy("valid")(logits, labels, IGNORED)
    )


def test_dice_by_hand():
    # Class 0 with probabilities 0.75 and 0.5 where it is labelled, 0.25 where class 1 is.
    first = torch.tensor([0.75, 0.5, 0.25, 0.9], dtype=torch.float64)
    logits = torch.stack([first.log(), (1 - first).log()]).view(1, 2, 1, 4)
    labels = torch.tensor([[[0, 0, 1, IGNORED]]])
    of_0 = 2 * 1.25 / (1.5 + 2)
    of_1 = 2 * 0.75 / (1.5 + 1)
    expected = 1 - (of_0 + of_1) / 2
    assert Dice()(logits, labels, IGNORED).item() == pytest.approx(expected)


def test_lovasz_of_certain_predictions_is_one_minus_iou():
    """On the corners of the cube the extension is the set function itself."""
    labels = torch.randint(3, (1, 12, 12))
    predictions = torch.where(torch.rand(1, 12, 12) < 0.6, labels, torch.randint(3, (1, 12, 12)))
    logits = 1e4 * F.one_hot(predictions, 3).movedim(3, 1).double()
    losses = []
    for train_id in range(3):
        truth, found = labels == train_id, predictions == train_id
        losses.append(1 - (truth & found).sum() / (truth | found).sum())
    expected = torch.stack(losses).double().mean()
    assert Lovasz()(logits, labels, IGNORED).item() == pytest.approx(expected.item(), rel=1e-6)


def test_weighted_sum():
    logits, labels = example()
    loss = LOSSES["sum"](logits, labels, IGNORED)
    expected = CrossEntropy()(logits, labels, IGNORED) + 0.5 * Dice()(logits, labels, IGNORED)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="1 losses but 2 weights"):
        WeightedSum([Dice()], [1.0, 2.0])


def test_wrong_number_of_class_weights():
    logits, labels = example(4)
    for average in ("all", "valid"):
        with pytest.raises(ValueError, match="5 class weights but 4 classes"):
            CrossEntropy(average, CLASS_WEIGHTS)(logits, labels, IGNORED)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.0, 0.0], "class_weights are all 0"),
        ([1.0, math.nan], "nan at train id 1 is no weight"),
        ([-1.0, 1.0], "-1.0 at train id 0 is no weight"),
        ([1.0, math.inf], "inf at train id 1 is no weight"),
    ],
)
def test_class_weights_that_are_none(weights, message):
    with pytest.raises(ValueError, match=message):
        CrossEntropy(class_weights=weights)


# Against a library


@pytest.mark.slow
@pytest.mark.parametrize("num_labelled", [5, 3])
def test_dice_and_lovasz_of_segmentation_models_pytorch(num_labelled):
    import segmentation_models_pytorch as smp

    # In single precision, which the weights of its Lovász loss always have.
    logits, labels = example(5, (7, 9), (14, 18), dtype=torch.float32)
    labels[(labels != IGNORED) & (labels >= num_labelled)] = 0
    plain = upsampled(logits, labels.shape[1:])
    lovasz = smp.losses.LovaszLoss("multiclass", ignore_index=IGNORED)(plain, labels)
    dice = smp.losses.DiceLoss("multiclass", ignore_index=IGNORED)(plain, labels)
    # Its mean counts a class without labels as a perfect one; here it is left out.
    dice = dice * 5 / num_labelled
    for loss, expected in ((Lovasz(), lovasz), (Dice(), dice)):
        found = loss(logits, labels, IGNORED)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        gradients = gradient_of(found, logits), gradient_of(expected, logits)
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-5 * gradients[1].abs().max().item())
        everything = loss(logits, labels.masked_fill(labels == IGNORED, 0), IGNORED)
        assert everything.item() != pytest.approx(expected.item(), rel=1e-3)
