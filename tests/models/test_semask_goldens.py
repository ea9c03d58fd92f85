"""SeMask-FPN: numbers of the authors' code (float64, evaluation mode).

All tensors of a network are filled with values that follow from their names in that code.
"""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from segformer_pl.losses import CrossEntropy
from segformer_pl.models import semask
from segformer_pl.models.semask import SemanticLayer, semask_fpn
from tests.models import golden_fill as golden
from tests.models.golden_fill import images, labels, probes

SEMANTIC_NAMES = {
    "norm": "norm1",
    "query": "class_injection.0.mlp_cls_q",
    "key": "class_injection.0.mlp_cls_k",
    "value": "class_injection.0.mlp_v",
    "proj": "class_injection.0.mlp_res",
    "gamma": "class_injection.0.gamma",
}


def original_name(name):
    """Return the name of a tensor in the authors' code."""
    parts = name.split(".")
    if parts[0] == "semantic_layers":
        parts[2] = SEMANTIC_NAMES[parts[2]]
        return ".".join(["backbone.layers", parts[1], "semantic_layer", *parts[2:]])
    if parts[0] == "head":
        if parts[1] == "classifier":
            return f"decode_head.conv_seg.{parts[2]}"
        _, _, level, number, layer, parameter = parts
        kind = ("conv", "bn")[int(layer)]
        # Between two convolutions lies an upsampling, which is numbered there.
        return f"decode_head.scale_heads.{level}.{2 * int(number)}.{kind}.{parameter}"
    if parts[3:4] == ["norm"] and parts[1] == "layers":
        return f"backbone.norm{parts[2]}.{parts[4]}"
    if parts[3:4] == ["downsample"]:  # there at the end of the stage before
        parts[2] = str(int(parts[2]) - 1)
    return ".".join(["backbone", *parts[1:]])


@pytest.fixture(scope="module")
def filled():
    """Function num_classes -> SeMask-T whose tensors are filled."""
    networks = {}

    def get(num_classes):
        if num_classes not in networks:
            build = partial(semask_fpn, num_classes)
            networks[num_classes] = golden.filled(build, original_name)
        return networks[num_classes]

    return get


SEMASK_T_K19 = -368.0387, [-0.05140, -0.78374, -1.29615, 2.46190, -0.16195]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_classes", "total", "expected"),
    [
        (150, -13927.8195, [-0.37412, -3.29106, -1.64734, -0.16516, -4.37489]),
        (19, *SEMASK_T_K19),
    ],
)
def test_logits_of_the_authors_code(filled, num_classes, total, expected):
    with torch.no_grad():
        logits = filled(num_classes)(images(97, 130))
    assert logits.shape == (1, num_classes, 25, 33)
    assert logits.sum().item() == pytest.approx(total, abs=6e-5, rel=0)
    assert probes(logits) == pytest.approx(expected, abs=6e-6, rel=0)


@pytest.mark.slow
def test_semantic_map_of_the_authors_code(filled):
    with torch.no_grad():
        semantic = filled(150).feature_maps(images(97, 130))["semantic"]
    assert semantic.sum().item() == pytest.approx(-3560.1497, abs=6e-5, rel=0)
    expected = [1.54509, 0.75696, -1.05914, -4.60705, -0.97192]
    assert probes(semantic) == pytest.approx(expected, abs=6e-6, rel=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_classes", "total"), [(150, -56034.828592), (19, -1987.399929)], ids=str
)
def test_logits_of_the_authors_code_where_windows_divide_the_maps(filled, num_classes, total):
    with torch.no_grad():
        logits = filled(num_classes)(images(224, 224))
    assert logits.sum().item() == pytest.approx(total, abs=6e-7, rel=0)


@pytest.mark.slow
def test_losses_of_the_authors_code(filled):
    """They are means over all pixels, ignored ones too."""
    network, values = filled(19), []

    def criterion(logits, target, ignore_index):
        values.append(CrossEntropy("all")(logits, target, ignore_index))
        return values[-1]

    with torch.no_grad():
        loss = network.training_loss(images(97, 130), labels(97, 130, 19), criterion, 255)
    main, auxiliary = values
    assert main.item() == pytest.approx(3.700095, abs=6e-7, rel=0)
    assert 0.4 * auxiliary.item() == pytest.approx(1.488267, abs=6e-7, rel=0)
    assert loss.item() == pytest.approx(main.item() + 0.4 * auxiliary.item(), rel=1e-12)


# Errors that these numbers have to catch


def _no_shift(network, patch):
    for stage in network.encoder.stages:
        for block in stage.blocks:
            patch.setattr(block, "shift", (0, 0))


def _global_attention(network, patch):
    for layer in network.semantic_layers[2:]:
        patch.setattr(layer, "window", None)


def _scaled_products(network, patch):
    attention = F.scaled_dot_product_attention

    def scaled(query, key, value, scale=None, **arguments):
        return attention(query, key, value, **arguments)

    patch.setattr(F, "scaled_dot_product_attention", scaled)


def _residual_of_the_input(network, patch):
    forward = SemanticLayer.forward

    def faulty(layer, tokens):
        result, semantic_map = forward(layer, tokens)
        return result - layer.norm(tokens) + tokens, semantic_map

    patch.setattr(SemanticLayer, "forward", faulty)


def _one_upsampling(network, patch):
    patch.setattr(semask, "_upsample_by_2", lambda feature_map: feature_map)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        _no_shift,
        _global_attention,
        _scaled_products,
        _residual_of_the_input,
        _one_upsampling,
    ],
    ids=lambda fault: fault.__name__,
)
def test_faults_are_caught(filled, monkeypatch, fault):
    network = filled(19)
    fault(network, monkeypatch)
    with torch.no_grad():
        logits = network(images(97, 130))
    _, expected = SEMASK_T_K19
    assert max(abs(one - other) for one, other in zip(probes(logits), expected)) > 1e-3
