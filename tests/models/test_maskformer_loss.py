"""MaskFormer's assignment and losses, against the original's numbers and against transformers."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from segformer_pl.errors import UserError
from segformer_pl.models import maskformer_loss
from segformer_pl.models.maskformer_loss import MaskClassificationLoss, MaskTargets, mean_num_masks
from tests.models import golden_fill as golden

K = 19
IGNORE = 255


def golden_layers():
    """Class logits and mask logits of six decoder layers."""
    class_shape, mask_shape = (2, 100, K + 1), (2, 100, 16, 24)
    return [
        (8 * golden.uniform(f"class{j}", class_shape), 12 * golden.uniform(f"mask{j}", mask_shape))
        for j in range(6)
    ]


def golden_labels():
    first = golden.labels(64, 96, K)
    second = torch.where(first == IGNORE, IGNORE, (first + 7) % K)
    return torch.cat([first, second])


def all_terms(loss, class_logits, mask_logits, labels):
    targets = loss.targets(labels, IGNORE)
    return loss.terms(class_logits, mask_logits, targets, mean_num_masks(targets, labels.device))


def test_terms_of_the_original_code():
    terms = all_terms(MaskClassificationLoss(K), *golden_layers()[5], golden_labels())
    assert [round(term.item(), 6) for term in terms] == [4.091239, 0.521101, 0.877226]


@pytest.mark.parametrize(
    ("without_labels", "expected"), [([], 94.068088), ([1], 94.478211), ([0, 1], 27.841368)]
)
def test_total_of_the_original_code(without_labels, expected):
    labels = golden_labels()
    labels[without_labels] = IGNORE
    total = MaskClassificationLoss(K)(golden_layers(), labels, IGNORE)
    assert round(total.item(), 6) == expected


# transformers


def random_case(num_queries=9, num_classes=5, size=(29, 43), small=(8, 11)):
    """Predictions of two images, and labels whose second image lacks some of the classes."""
    labels = torch.randint(num_classes, (2, 5, 7))
    labels[1] = labels[1].clamp(max=1)
    labels = F.interpolate(labels[:, None].float(), size)[:, 0].long()
    labels[:, :5] = IGNORE
    class_logits = 3 * torch.randn(2, num_queries, num_classes + 1, dtype=torch.float64)
    mask_logits = 5 * torch.randn(2, num_queries, *small, dtype=torch.float64)
    return class_logits.requires_grad_(), mask_logits.requires_grad_(), labels


def theirs(labels, num_classes=5):
    """Criterion of transformers, and the labels in its form."""
    from transformers.models.maskformer.modeling_maskformer import (
        MaskFormerHungarianMatcher,
        MaskFormerLoss,
    )

    matcher = MaskFormerHungarianMatcher(1.0, 20.0, 1.0)
    criterion = MaskFormerLoss(num_classes, matcher, {}, 0.1).double()
    criterion.empty_weight[-1] = 0.1  # rounded to float32 before
    classes = [image[image != IGNORE].unique() for image in labels]
    masks = [(image == c[:, None, None]).double() for image, c in zip(labels, classes)]
    return criterion, masks, classes


def compare_with_transformers():
    """Return the largest differences of assignments, losses and gradients from transformers."""
    differences = []
    for seed in range(3):
        torch.manual_seed(seed)
        class_logits, mask_logits, labels = random_case()
        criterion, masks, classes = theirs(labels)
        expected = criterion(mask_logits, class_logits, masks, classes)
        total = expected["loss_cross_entropy"] + 20 * expected["loss_mask"] + expected["loss_dice"]
        wanted = torch.autograd.grad(total, (class_logits, mask_logits))
        loss = MaskClassificationLoss(5)
        terms = all_terms(loss, class_logits, mask_logits, labels)
        result = loss([(class_logits, mask_logits)], labels, IGNORE)
        found = torch.autograd.grad(result, (class_logits, mask_logits))
        assigned = criterion.matcher(mask_logits, class_logits, masks, classes)
        for index, target in enumerate(loss.targets(labels, IGNORE)):
            pairs = loss.match(class_logits[index], mask_logits[index], target)
            differences += [
                float(not torch.equal(ours, other)) for ours, other in zip(pairs, assigned[index])
            ]
        names = {"classes": "cross_entropy", "focal": "mask", "dice": "dice"}
        values = [(getattr(terms, name), expected[f"loss_{n}"]) for name, n in names.items()]
        values += [(result, total), *zip(found, wanted)]
        differences += [(ours - other).abs().max().item() for ours, other in values]
    return max(differences)


TOLERANCE = 1e-12


@pytest.mark.slow
def test_assignment_losses_and_gradients_equal_those_of_transformers():
    pytest.importorskip("transformers")
    assert compare_with_transformers() < TOLERANCE


def squared(logits, masks, focal=maskformer_loss._focal):
    return focal(logits, masks) ** 2


def bilinear(labels, like):
    size = like.shape[-2:]
    resized = F.interpolate(labels[None, None].double(), size, mode="bilinear")[0, 0]
    return resized.round().to(labels)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALPHA", 0.75),
        ("GAMMA", 1),
        ("_focal", squared),
        ("_resize_labels", bilinear),
        ("mean_num_masks", lambda *_: torch.tensor(3.0)),
    ],
)
def test_planted_faults_are_detected(name, value, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(maskformer_loss, name, value)
    assert compare_with_transformers() > 1e4 * TOLERANCE


@pytest.mark.parametrize(
    "settings", [{"mask_weight": 19.0}, {"dice_weight": 0.9}, {"no_object_weight": 0.2}], ids=str
)
def test_weights_matter(settings):
    usual = MaskClassificationLoss(K)(golden_layers()[:1], golden_labels(), IGNORE)
    changed = MaskClassificationLoss(K, **settings)(golden_layers()[:1], golden_labels(), IGNORE)
    assert abs(usual - changed) > 1e-2


# Invariances


def test_order_of_queries_and_of_targets_does_not_matter():
    class_logits, mask_logits, labels = random_case()
    loss = MaskClassificationLoss(5)
    expected = all_terms(loss, class_logits, mask_logits, labels)
    order = torch.randperm(class_logits.shape[1])
    permuted = all_terms(loss, class_logits[:, order], mask_logits[:, order], labels)
    torch.testing.assert_close(permuted, expected)
    targets = [
        image._replace(classes=image.classes.flip(0)) for image in loss.targets(labels, IGNORE)
    ]
    number = mean_num_masks(targets, labels.device)
    torch.testing.assert_close(loss.terms(class_logits, mask_logits, targets, number), expected)


def test_renaming_classes_does_not_matter():
    class_logits, mask_logits, labels = random_case()
    loss = MaskClassificationLoss(5)
    expected = all_terms(loss, class_logits, mask_logits, labels)
    order = torch.randperm(5)
    names = torch.cat([order, torch.full((251,), IGNORE)])
    renamed = torch.empty_like(class_logits)
    renamed[..., order], renamed[..., 5] = class_logits[..., :5], class_logits[..., 5]
    torch.testing.assert_close(all_terms(loss, renamed, mask_logits, names[labels]), expected)


# Precision


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    """The focal cost of one mask sums to more than 65504 over the pixels."""
    class_logits, mask_logits, labels = random_case(size=(512, 512), small=(128, 128))
    mask_logits = (2 * mask_logits + 10).detach().to(dtype).requires_grad_()
    class_logits = class_logits.detach().to(dtype).requires_grad_()
    loss = MaskClassificationLoss(5)
    assert not (F.softplus(mask_logits[0, 0].detach()).sum().half()).isfinite()
    with torch.autocast("cpu", dtype):
        result = loss([(class_logits, mask_logits)], labels, IGNORE)
    assert result.dtype == torch.float32
    result.backward()
    expected = loss([(class_logits.detach().float(), mask_logits.detach().float())], labels, IGNORE)
    assert result.item() == expected.item()
    assert class_logits.grad.isfinite().all()
    assert mask_logits.grad.isfinite().all()
    target = loss.targets(labels, IGNORE)[0]
    assert loss.match(class_logits[0], mask_logits[0], target)[0].shape == target.classes.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_queries_that_are_not_finite_are_assigned_last(value):
    class_logits, mask_logits, labels = random_case()
    loss = MaskClassificationLoss(5)
    target = loss.targets(labels, IGNORE)[0]
    mask_logits = mask_logits.detach().clone()
    mask_logits[:, :4] = value
    queries, indices = loss.match(class_logits[0], mask_logits[0], target)
    assert queries.tolist() == sorted({*range(4, 9)} & {*queries.tolist()})
    assert sorted(indices.tolist()) == list(range(len(target.classes)))
    mask_logits[:] = value
    assert len(loss.match(class_logits[0], mask_logits[0], target)[0]) == len(target.classes)


def test_large_logits_have_finite_losses_and_gradients():
    class_logits, mask_logits, labels = random_case()
    masks = (1e4 * mask_logits.detach().float()).requires_grad_()
    result = MaskClassificationLoss(5)([(class_logits.float(), masks)], labels, IGNORE)
    result.backward()
    assert result.isfinite()
    assert masks.grad.isfinite().all()


# Labels


def test_a_batch_without_labels_trains_no_object_alone():
    class_logits, mask_logits, labels = random_case()
    labels[:] = IGNORE
    terms = all_terms(MaskClassificationLoss(5), class_logits, mask_logits, labels)
    expected = torch.full(class_logits.shape[:2], 5)
    torch.testing.assert_close(
        terms.classes, F.cross_entropy(class_logits.flatten(0, 1), expected.flatten())
    )
    assert terms.focal == terms.dice == 0
    (terms.focal + terms.dice).backward()
    assert (mask_logits.grad == 0).all()


def test_classes_outside_of_the_crop_have_no_mask():
    labels = torch.full((1, 8, 8), 3)
    (target,) = MaskClassificationLoss(5).targets(labels, IGNORE)
    assert target.classes.tolist() == [3]


def test_more_classes_than_queries():
    """The queries take the classes that cost least, and the divisor counts all classes."""
    num_classes, num_queries = 13, 10
    labels = torch.arange(num_classes).repeat_interleave(4)[None, None].expand(1, 8, -1)
    class_logits = torch.randn(1, num_queries, num_classes + 1)
    mask_logits = torch.randn(1, num_queries, 8, 52)
    loss = MaskClassificationLoss(num_classes)
    (target,) = loss.targets(labels, IGNORE)
    queries, indices = loss.match(class_logits[0], mask_logits[0], target)
    assert queries.tolist() == list(range(num_queries))
    assert len(set(indices.tolist())) == num_queries
    terms = all_terms(loss, class_logits, mask_logits, labels)
    probabilities, masks = mask_logits[0, queries].sigmoid(), labels == indices[:, None, None]
    overlap, sizes = (probabilities * masks).sum((1, 2)), (probabilities + masks).sum((1, 2))
    dice = (1 - (2 * overlap + 1) / (sizes + 1)).sum() / num_classes
    torch.testing.assert_close(terms.dice, dice)


@pytest.mark.parametrize("value", [5, 151, -1])
def test_labels_outside_of_the_classes_are_refused(value):
    class_logits, mask_logits, labels = random_case()
    labels[1, 10, 10] = value
    sentence = (
        f"value {value}, which is neither one of the 5 classes of .* nor the ignored value 255"
    )
    with pytest.raises(UserError, match=sentence):
        MaskClassificationLoss(5)([(class_logits, mask_logits)], labels, IGNORE)


def test_an_ignored_value_may_be_a_class_number():
    labels = torch.arange(3).expand(1, 3, 3)
    (target,) = MaskClassificationLoss(5).targets(labels, 0)
    assert target.classes.tolist() == [1, 2]


def half_ignored():
    """Predictions at the labels' size, whose right half has no labels."""
    class_logits, mask_logits, _ = random_case(small=(12, 20))
    labels = torch.randint(5, (2, 3, 5)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[..., 10:] = IGNORE
    return class_logits, mask_logits, labels


def test_ignored_pixels_left_out():
    class_logits, mask_logits, labels = half_ignored()
    loss = MaskClassificationLoss(5, ignored_pixels="left_out")
    terms = all_terms(loss, class_logits, mask_logits, labels)
    left = all_terms(
        MaskClassificationLoss(5), class_logits, mask_logits[..., :10], labels[..., :10]
    )
    torch.testing.assert_close(terms, left)
    (terms.focal + terms.dice).backward()
    assert (mask_logits.grad[..., 10:] == 0).all()
    assert (mask_logits.grad[..., :10] != 0).any()


def test_ignored_pixels_as_background():
    class_logits, mask_logits, labels = half_ignored()
    terms = all_terms(MaskClassificationLoss(5), class_logits, mask_logits, labels)
    background = all_terms(
        MaskClassificationLoss(6), F.pad(class_logits, (0, 1)), mask_logits, labels
    )
    torch.testing.assert_close(terms.focal, background.focal)
    terms.focal.backward()
    assert (mask_logits.grad[..., 10:] > 0).any()  # pushed below 0


@pytest.mark.parametrize("ignored_pixels", ["background", "left_out"])
def test_labels_smaller_than_the_masks(ignored_pixels):
    class_logits, mask_logits, labels = random_case(size=(5, 6))
    loss = MaskClassificationLoss(5, ignored_pixels=ignored_pixels)
    assert loss([(class_logits, mask_logits)], labels, IGNORE).isfinite()


def test_nothing_is_left_of_labels_at_the_size_of_the_masks():
    """Nearest neighbours skip the only pixel that counts."""
    labels = torch.full((1, 8, 8), IGNORE)
    labels[0, 3, 3] = 2
    loss = MaskClassificationLoss(5, ignored_pixels="left_out")
    layer = (torch.randn(1, 4, 6), torch.randn(1, 4, 2, 2))
    assert loss([layer], labels, IGNORE).isfinite()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mask_weight": -1.0}, "mask_weight=-1.0: give a finite number of at least 0"),
        ({"dice_weight": float("nan")}, "dice_weight=nan"),
        ({"no_object_weight": float("inf")}, "no_object_weight=inf"),
        ({"ignored_pixels": "skip"}, "ignored_pixels='skip': choose one of background, left_out"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        MaskClassificationLoss(5, **settings)


# Several ranks


def uneven_labels():
    """Labels of two images with different numbers of classes."""
    labels = golden_labels()
    labels[1, :, 32:] = IGNORE
    return labels


def mean_over_ranks(rank, store, pipe):
    """Write the mean of the mask losses of two ranks, one of which is this process."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    here = slice(rank, rank + 1)
    class_logits, mask_logits = (tensor[here] for tensor in golden_layers()[0])
    loss = MaskClassificationLoss(K)
    terms = all_terms(loss, class_logits, mask_logits, uneven_labels()[here])
    values = torch.stack([terms.focal, terms.dice])
    dist.all_reduce(values)
    os.write(pipe, (values / 2).numpy().tobytes())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(tmp_path):
    """The images have different numbers of masks, which the ranks average."""
    labels = uneven_labels()
    assert len(labels[0].unique()) != len(labels[1].unique())
    ends = [os.pipe() for _ in range(2)]
    children = []
    for rank, (_, writer) in enumerate(ends):
        if (child := os.fork()) == 0:
            mean_over_ranks(rank, tmp_path / "store", writer)
            os._exit(0)
        children.append(child)
    results = [np.frombuffer(os.read(reader, 16)) for reader, _ in ends]
    for child in children:
        os.waitpid(child, 0)
    terms = all_terms(MaskClassificationLoss(K), *golden_layers()[0], labels)
    for result in results:
        np.testing.assert_allclose(result, [terms.focal.item(), terms.dice.item()], rtol=1e-12)


def test_the_number_of_masks_is_at_least_one():
    target = MaskTargets(torch.empty(0, dtype=torch.int64), torch.full((4, 4), IGNORE), None)
    assert mean_num_masks([target, target], torch.device("cpu")) == 1
