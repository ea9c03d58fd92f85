"""DeepLabv3+ against mmsegmentation, torchvision and segmentation_models_pytorch, in float64."""

import re
from functools import partial

import pytest
import torch
import torchvision
from segmentation_models_pytorch.decoders.deeplabv3 import decoder as smp
from torch import nn
from torch.nn import functional as F

from segformer_pl.losses import CrossEntropy
from segformer_pl.models import TimmEncoder
from segformer_pl.models.deeplabv3plus import ASPP, DeepLabV3Plus, FCNHead, deeplabv3plus_mmseg
from tests.models.golden_fill import filled, images, labels, probes

# Golden numbers: mmsegmentation 1.2.2, deeplabv3plus_r50-d8, 19 classes, image of 65x97

LOGITS_SUM = 370.9602

MMSEG_NAMES = [
    (r"encoder\.backbone\.conv1\.", "backbone.stem."),
    (r"encoder\.backbone\.bn1\.", "backbone.stem.7."),
    (r"encoder\.backbone\.", "backbone."),
    (r"aspp\.pool\.1\.", "decode_head.image_pool.1.conv."),
    (r"aspp\.pool\.2\.", "decode_head.image_pool.1.bn."),
    (r"aspp\.branches\.([123])\.0\.", r"decode_head.aspp_modules.\1.depthwise_conv."),
    (r"aspp\.branches\.([123])\.1\.", r"decode_head.aspp_modules.\1.pointwise_conv."),
    (r"aspp\.branches\.0\.", "decode_head.aspp_modules.0."),
    (r"aspp\.project\.", "decode_head.bottleneck."),
    (r"low_level\.", "decode_head.c1_bottleneck."),
    (r"decoder\.(\d)\.0\.", r"decode_head.sep_bottleneck.\1.depthwise_conv."),
    (r"decoder\.(\d)\.1\.", r"decode_head.sep_bottleneck.\1.pointwise_conv."),
    (r"classifier\.", "decode_head.conv_seg."),
    (r"aux_head\.conv\.", "auxiliary_head.convs.0."),
    (r"aux_head\.classifier\.", "auxiliary_head.conv_seg."),
]


def mmseg_name(key):
    """Return mmsegmentation's name of a tensor of ``deeplabv3plus_mmseg``."""
    for pattern, replacement in MMSEG_NAMES:
        name, count = re.subn(f"^{pattern}", replacement, key)
        if count:
            break
    if name.startswith("backbone."):
        return name
    return re.sub(r"\.([01])\.(\w+)$", lambda m: f".{('conv', 'bn')[int(m[1])]}.{m[2]}", name)


@pytest.fixture(scope="module")
def golden():
    return filled(partial(deeplabv3plus_mmseg, 19, "resnet50c"), mmseg_name)


@pytest.mark.slow
def test_names_of_mmsegmentation(golden):
    names = {mmseg_name(key) for key in golden.state_dict()}
    assert len(names) == len(golden.state_dict())
    expected = {
        "backbone.stem.0.weight",
        "backbone.stem.6.weight",
        "backbone.stem.7.running_var",
        "backbone.layer3.5.conv2.weight",
        "backbone.layer4.0.downsample.1.bias",
        "decode_head.image_pool.1.conv.weight",
        "decode_head.aspp_modules.0.bn.weight",
        "decode_head.aspp_modules.3.depthwise_conv.conv.weight",
        "decode_head.aspp_modules.3.pointwise_conv.bn.running_mean",
        "decode_head.bottleneck.conv.weight",
        "decode_head.c1_bottleneck.bn.bias",
        "decode_head.sep_bottleneck.1.depthwise_conv.bn.weight",
        "decode_head.sep_bottleneck.0.pointwise_conv.conv.weight",
        "decode_head.conv_seg.bias",
        "auxiliary_head.convs.0.conv.weight",
        "auxiliary_head.convs.0.bn.bias",
        "auxiliary_head.conv_seg.weight",
    }
    assert expected - names == set()


@pytest.mark.slow
def test_golden_numbers_of_mmsegmentation(golden):
    image, target = images(65, 97), labels(65, 97, 19)
    with torch.no_grad():
        features = golden.encoder(image)
        logits, auxiliary = golden.classify(features), golden.aux_head(features[-2])
        loss = CrossEntropy(average="valid")
        losses = [float(loss(maps, target, 255)) for maps in (logits, auxiliary)]
        total = float(golden.training_loss(image, target, loss, 255))
    assert logits.shape == (1, 19, 17, 25)
    assert float(logits.sum()) == pytest.approx(LOGITS_SUM, abs=5.1e-5)
    expected = [0.01362, -0.03086, 0.15825, 0.06671, -0.08267]
    assert probes(logits) == pytest.approx(expected, abs=5.1e-6)
    assert auxiliary.shape == (1, 19, 9, 13)
    assert float(auxiliary.sum()) == pytest.approx(79.6933, abs=5.1e-5)
    expected = [0.20412, 0.05983, 0.05589, -0.78858, 0.21087]
    assert probes(auxiliary) == pytest.approx(expected, abs=5.1e-6)
    assert losses == pytest.approx([2.955557, 2.972195], abs=5.1e-7)
    assert total == pytest.approx(2.955557 + 0.4 * 2.972195, abs=8e-7)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["rate", "concatenation", "align_corners", "pooling"])
def test_golden_numbers_catch_a_fault(golden, fault, monkeypatch):
    if fault == "rate":
        convolution = golden.aspp.branches[3][0][0]
        monkeypatch.setattr(convolution, "dilation", (6, 6))
        monkeypatch.setattr(convolution, "padding", (6, 6))
    elif fault == "concatenation":
        cat = torch.cat
        monkeypatch.setattr(torch, "cat", lambda maps, dim: cat(maps[::-1], dim))
    elif fault == "align_corners":
        resize = F.interpolate
        monkeypatch.setattr(
            F, "interpolate", lambda m, size, mode, align_corners: resize(m, size, None, mode, True)
        )
    else:
        monkeypatch.setattr(golden.aspp.pool[0], "forward", lambda m: m.amax((2, 3), keepdim=True))
    with torch.no_grad():
        assert abs(float(golden(images(65, 97)).sum()) - LOGITS_SUM) > 1e-3


# Parity with random parameters and buffers


def state_of_others(aspp):
    """Return the state of an ASPP under the names and in the order of torchvision and SMP."""
    state = {}
    for key, tensor in aspp.state_dict().items():
        if key.startswith("pool."):  # the last branch there
            key = f"convs.{len(aspp.branches)}.{key.removeprefix('pool.')}"
        elif key == "project.0.weight":
            pool, *others = tensor.chunk(1 + len(aspp.branches), dim=1)
            tensor = torch.cat([*others, pool], dim=1)
        state[key.replace("branches.", "convs.")] = tensor
    return state


@pytest.mark.parametrize(
    "build_reference",
    [
        lambda: torchvision.models.segmentation.deeplabv3.ASPP(20, [2, 4, 6], 8),
        lambda: smp.ASPP(20, 8, [2, 4, 6], separable=False, dropout=0.1),
    ],
    ids=["torchvision", "segmentation_models_pytorch"],
)
def test_aspp_is_that_of_others(randomize, build_reference):
    aspp = randomize(ASPP(20, 8, (2, 4, 6))).eval()
    reference = build_reference().double().eval()
    reference.load_state_dict(state_of_others(aspp))
    features = torch.randn(2, 20, 9, 13, dtype=torch.float64, requires_grad=True)
    outputs = aspp(features), reference(features)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad((weights * o).sum(), features)[0] for o in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_auxiliary_head_is_that_of_torchvision(randomize):
    head = randomize(FCNHead(32, 5, 0.1)).eval()
    reference = torchvision.models.segmentation.fcn.FCNHead(32, 5).double().eval()
    names = {"conv.0.": "0.", "conv.1.": "1.", "classifier.": "4."}
    state = {}
    for key, tensor in head.state_dict().items():
        prefix = next(name for name in names if key.startswith(name))
        state[names[prefix] + key.removeprefix(prefix)] = tensor
    reference.load_state_dict(state)
    features = torch.randn(2, 32, 9, 13, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(head(features), reference(features), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_decoder_is_that_of_segmentation_models_pytorch(randomize):
    """SMP has one 3x3 convolution. Without what SMP adds to the paper the decoders are equal."""
    encoder = TimmEncoder("resnet18", output_stride=16)
    network = randomize(DeepLabV3Plus(encoder, 5, 16, (2, 4, 6), num_convs=1)).eval()
    reference = smp.DeepLabV3PlusDecoder((3, 64, 64, 128, 256, 512), 5, 16, (2, 4, 6), 16, False, 0)
    reference.aspp = reference.aspp[0]  # SMP: a further separable convolution after ASPP
    reference.up.align_corners = False  # SMP: True
    reference.block2[0] = nn.Conv2d(64, 16, 3, padding=1, bias=False)  # SMP: separable
    reference.double().eval()
    state = {f"aspp.{key}": tensor for key, tensor in state_of_others(network.aspp).items()}
    for name, part in {"block1": network.low_level, "block2": network.decoder[0]}.items():
        state |= {f"{name}.{key}": tensor for key, tensor in part.state_dict().items()}
    reference.load_state_dict(state)
    with torch.no_grad():
        image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
        maps = network.encoder(image)
        expected = reference([image, maps[0], *maps])
        actual = network.feature_maps(image)["head"]
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
