"""The folded decode head, compared with the unfolded formula of the reference."""

import re

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from segformer_pl.models import AllMLPHead, SegFormer, mit_b2
from segformer_pl.models.mit import MixTransformer
from segformer_pl.models.segformer import segformer_b2

CHANNELS = (3, 5, 7, 9)
SIZES = ((9, 13), (5, 7), (3, 4), (2, 2))


def pyramid():
    return [
        torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
        for channels, size in zip(CHANNELS, SIZES)
    ]


def plain_head(head, features, fault=None):
    """The reference's formula: project, upsample, concatenate, fuse, BatchNorm, ReLU, classify.

    Works on copies of the running statistics and returns them with the logits.
    """
    maps = []
    for index, projection in zip(head.in_indices, head.projections):
        weight = projection.weight[:, :, None, None]
        bias = None if fault == "projection bias dropped" else projection.bias
        projected = F.conv2d(features[index], weight, bias)
        maps.append(
            F.interpolate(
                projected,
                size=features[0].shape[2:],
                mode="nearest" if fault == "nearest upsampling" else "bilinear",
                align_corners=None if fault == "nearest upsampling" else fault == "align_corners",
            )
        )
    if fault != "concatenated from fine to coarse":
        maps.reverse()
    fused = torch.cat(maps, dim=1)
    if head.fuse is not None:
        fused = F.conv2d(fused, head.fuse.weight)
    mean, var = head.bn.running_mean.clone(), head.bn.running_var.clone()
    if fault == "BatchNorm statistics dropped":
        mean, var = torch.zeros_like(mean), torch.ones_like(var)
    weight, bias = head.bn.weight, head.bn.bias
    fused = F.batch_norm(fused, mean, var, weight, bias, head.bn.training, 0.1, 1e-5)
    if fault != "no ReLU":
        fused = fused.relu()
    return F.conv2d(fused, head.classifier.weight, head.classifier.bias), (mean, var)


FAULTS = (
    "concatenated from fine to coarse",
    "align_corners",
    "nearest upsampling",
    "projection bias dropped",
    "BatchNorm statistics dropped",
    "no ReLU",
)


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("channels", "decoder_dim", "at_150", "at_19"),
    [
        ((32, 64, 160, 256), 256, 433_302, 399_635),
        ((64, 128, 320, 512), 256, 564_374, 530_707),
        ((64, 128, 320, 512), 768, 3_265_686, 3_164_947),
    ],
    ids=["B0", "B1", "B2-B5"],
)
def test_number_of_parameters(channels, decoder_dim, at_150, at_19):
    with torch.device("meta"):
        assert num_parameters(AllMLPHead(channels, 150, decoder_dim)) == at_150
        assert num_parameters(AllMLPHead(channels, 19, decoder_dim)) == at_19


def test_the_last_stage_alone_has_the_parameters_of_the_paper():
    with torch.device("meta"):
        head = AllMLPHead(mit_b2().out_channels, 150, 768, in_indices=(3,))
        total = num_parameters(segformer_b2(150, in_indices=(3,)))
    assert head.fuse is None
    assert total == 24_707_158
    assert f"{total / 1e6:.2f}" == "24.71"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("in_indices", [(0, 1, 2, 3), (3,), (1, 3)], ids=str)
def test_folded_head_is_the_plain_formula(randomize, in_indices, training):
    head = randomize(AllMLPHead(CHANNELS, 4, 6, in_indices, dropout=0.0)).train(training)
    features = pyramid()
    inputs = dict(head.named_parameters()) | {f"stage {i}": features[i] for i in in_indices}
    weight = torch.randn(2, 4, *SIZES[0], dtype=torch.float64)

    expected, statistics = plain_head(head, features)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), list(inputs.values()))
    logits = head(features)
    gradients = torch.autograd.grad((logits * weight).sum(), list(inputs.values()))

    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    for name, gradient, expected_gradient in zip(inputs, gradients, expected_gradients):
        torch.testing.assert_close(
            gradient,
            expected_gradient,
            rtol=1e-9,
            atol=1e-11,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    torch.testing.assert_close((head.bn.running_mean, head.bn.running_var), statistics)


def backward_operations(tensor):
    """Return the names of the operations that autograd will run for a tensor."""
    names, seen, left = [], set(), [tensor.grad_fn]
    while left:
        operation = left.pop()
        if operation is not None and operation not in seen:
            seen.add(operation)
            names.append(operation.name())
            left += [before for before, _ in operation.next_functions]
    return names


def test_autograd_copies_no_gradient():
    """A sum in place on a view of the first map took a quarter of B2's training step."""
    changed_view = torch.ones(2, 3, requires_grad=True).exp().t()
    changed_view.add_(1)
    assert any("CopySlices" in name for name in backward_operations(changed_view))
    head = AllMLPHead(CHANNELS, 4, 6).double()
    for one in (head, head.eval().folded()):
        names = backward_operations(one.fuse_features(pyramid()))
        assert any("UpsampleBilinear2D" in name for name in names)
        assert not [name for name in names if "CopySlices" in name]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_detects(randomize, fault):
    head = randomize(AllMLPHead(CHANNELS, 4, 6)).eval()
    features = pyramid()
    faulty, _ = plain_head(head, features, fault)
    assert not torch.allclose(head(features), faulty, rtol=1e-3, atol=1e-3)


def test_dropout_takes_whole_channels_before_the_classifier(randomize):
    features = pyramid()
    # With all channels dropped, only the classifier's bias remains.
    head = randomize(AllMLPHead(CHANNELS, 4, 6, dropout=1.0))
    expected = head.classifier.bias.view(1, 4, 1, 1).expand(2, 4, *SIZES[0])
    torch.testing.assert_close(head(features), expected)
    fused = torch.ones(50, 6, 2, 2)
    kept = AllMLPHead(CHANNELS, 4, 6, dropout=0.5).dropout(fused)
    assert set(kept.flatten(2).sum(2).unique().tolist()) == {0.0, 8.0}


def test_fuse_is_initialised_over_its_fan_out():
    head = AllMLPHead((32, 64, 160, 256), 150, 256)
    assert head.fuse.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.01)


@pytest.mark.parametrize("in_indices", [(0, 1, 2, 3), (3,), (1, 3), (2, 3)], ids=str)
def test_logits_have_the_size_of_the_first_stage(in_indices):
    head = AllMLPHead(CHANNELS, 4, 6, in_indices)
    features = [feature.float() for feature in pyramid()]
    assert head(features).shape == (2, 4, *SIZES[0])
    assert head.fuse_features(features).shape == (2, 6, *SIZES[0])


def test_order_of_in_indices_does_not_matter(randomize):
    one, other = (randomize(AllMLPHead(CHANNELS, 4, 6, i)).eval() for i in ((1, 3), (3, 1)))
    other.load_state_dict(one.state_dict())
    features = pyramid()
    torch.testing.assert_close(other(features), one(features), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("in_indices", "texts"),
    [
        ((0, 1, 2), ("in_indices=(0, 1, 2)", "deepest stage, 3", "add 3")),
        ((), ("in_indices=()", "deepest stage, 3", "add 3")),
        ((3, 3), ("in_indices=(3, 3)", "at most once", "0 to 3")),
        ((3, 4), ("in_indices=(3, 4)", "at most once", "0 to 3")),
        ((-1,), ("in_indices=(-1,)", "at most once", "0 to 3")),
    ],
    ids=str,
)
def test_impossible_in_indices_are_refused(in_indices, texts):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, texts))):
        AllMLPHead(CHANNELS, 4, 6, in_indices)


def small_segformer():
    encoder = MixTransformer((4, 8, 8, 16), (1, 1, 1, 1), (1, 2, 2, 4))
    return SegFormer(encoder, 3, decoder_dim=8).eval()


def test_no_product_has_a_vector():
    """Counters of FLOPs such as fvcore read the shapes of two matrices."""
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            called.append(str(op))
            return op(*args, **kwargs or {})

    with Record(), torch.no_grad():
        small_segformer()(torch.zeros(1, 3, 64, 64))
    assert "aten.mm.default" in called
    assert not {"aten.mv.default", "aten.addmv.default", "aten.dot.default"} & set(called)


@pytest.mark.filterwarnings("ignore")
def test_fvcore_counts_the_network():
    analysis = pytest.importorskip("fvcore.nn", reason="not a dependency")
    network, images = small_segformer(), torch.zeros(1, 3, 64, 64)
    counted = analysis.FlopCountAnalysis(network, images).by_operator()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    ours = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in ours.items() if str(op) in ("aten.mm", "aten.addmm", "aten.bmm"))
    # fvcore counts a multiplication and an addition as one.
    assert 2 * counted["conv"] == sum(n for op, n in ours.items() if "convolution" in str(op))
    assert 2 * (counted["linear"] + counted["matmul"]) == products
