"""SeMask-FPN: the semantic layer, its size, and the contract of a segmenter."""

import math
import re

import jsonargparse
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segformer_pl.analysis.complexity import complexity
from segformer_pl.checkpoints import load_network
from segformer_pl.checkpoints.conversion import export_weights
from segformer_pl.errors import UserError
from segformer_pl.losses import CrossEntropy
from segformer_pl.models import SegFormer, mit_b0
from segformer_pl.models.segmenter import check_segmenter
from segformer_pl.models.semask import SemanticLayer, SeMaskFPN, semask_fpn
from segformer_pl.models.swin import SwinEncoder
from segformer_pl.models.timm_models import on_meta
from segformer_pl.optim import parameter_groups
from tests.models.counting import executed_gmacs

SMALL = {"embed_dim": 12, "depths": (2, 2, 3, 2), "num_heads": (1, 2, 3, 4), "window_size": 4}
TINY, BASE = "swin_tiny_patch4_window7_224", "swin_base_patch4_window12_384"
SMALL_224, LARGE = "swin_small_patch4_window7_224", "swin_large_patch4_window12_384"


def small(num_classes=5, **arguments):
    return semask_fpn(num_classes, **{"decoder_dim": 16} | SMALL | arguments)


# The semantic layer


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (2, 3)], ids=str)
@pytest.mark.parametrize("window", [None, (4, 4)], ids=str)
def test_semantic_layer_equals_explicit_attention(randomize, window, size):
    layer = randomize(SemanticLayer(6, 5, window, 0.1)).eval()
    tokens = torch.randn(2, *size, 6, dtype=torch.float64)
    with torch.no_grad():
        result, semantic_map = layer(tokens)
        y = F.layer_norm(tokens, (6,), layer.norm.weight, layer.norm.bias)
        expected, queries = torch.zeros_like(y), y.new_zeros(*y.shape[:3], 5)
        rows, columns = window or size
        # In windows, zeros take the place of the tokens that are missing.
        for top in range(0, size[0], rows):
            for left in range(0, size[1], columns):
                inside = (slice(None), slice(top, top + rows), slice(left, left + columns))
                height, width = y[inside].shape[1:3]
                window_tokens = y.new_zeros(2, rows, columns, 6)
                window_tokens[:, :height, :width] = y[inside]
                x = window_tokens.reshape(2, -1, 6)
                query = x @ layer.query.weight.T + layer.query.bias
                key = x @ layer.key.weight.T + layer.key.bias
                value = x @ layer.value.weight.T + layer.value.bias
                attended = (query @ key.transpose(1, 2)).softmax(2) @ value
                changes = attended @ layer.proj.weight.T + layer.proj.bias
                expected[inside] = changes.view(2, rows, columns, 6)[:, :height, :width]
                queries[inside] = query.view(2, rows, columns, 5)[:, :height, :width]
        expected = y + layer.gamma * expected
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(semantic_map, queries)


def test_semantic_layer_starts_as_a_norm_and_can_learn():
    """Were ``proj`` 0 like gamma, as in the constructor of the authors' code, it never would."""
    layer = SemanticLayer(64, 5, (4, 4), 0.1)
    assert layer.gamma.item() == 0
    for linear in (layer.query, layer.key, layer.value, layer.proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.2)
        assert linear.bias.abs().max() == 0
    tokens = torch.randn(2, 8, 8, 64)
    torch.testing.assert_close(layer(tokens)[0], F.layer_norm(tokens, (64,)))
    targets = torch.randn(2, 8, 8, 64)
    (layer(tokens)[0] * targets).sum().backward()
    assert layer.gamma.grad.abs() > 1e-3
    nn.init.zeros_(layer.proj.weight)
    layer.zero_grad()
    (layer(tokens)[0] * targets).sum().backward()
    assert layer.gamma.grad == 0
    assert layer.proj.weight.grad.abs().max() == 0


def test_a_new_network_trains_its_semantic_layers():
    torch.manual_seed(1)
    network = small().train()
    target = torch.randint(5, (2, 64, 64))
    network.training_loss(torch.randn(2, 3, 64, 64), target, CrossEntropy(), 255).backward()
    for layer in network.semantic_layers:
        assert layer.gamma.grad.abs() > 0
        assert layer.query.weight.grad.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "num_classes", "windows"),
    [  # ADE20K: mixed in Swin-T, S and L; Cityscapes: windows alone
        (TINY, 20, [7, 7, None, None]),
        (TINY, 19, [7, 7, 7, 7]),
        (BASE, 150, [12, 12, 12, 12]),
        (LARGE, 150, [12, 12, None, None]),
    ],
)
def test_rule_of_windows(backbone, num_classes, windows):
    with on_meta():
        network = semask_fpn(num_classes, backbone)
    expected = [None if side is None else (side, side) for side in windows]
    assert [layer.window for layer in network.semantic_layers] == expected


def test_global_stages_are_an_argument(randomize):
    network = small(num_classes=30, global_stages=[3, 0])
    assert [layer.window for layer in network.semantic_layers] == [None, (4, 4), (4, 4), None]
    assert network.init_args()["global_stages"] == (0, 3)
    assert small(num_classes=30).global_stages == (2, 3)


# Size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "num_classes", "num_parameters", "side", "gmacs"),
    [
        (TINY, 150, 34_655_748, 512, 41.5),
        (SMALL_224, 150, 55_973_652, 512, 65.3),
        (BASE, 150, 96_485_826, 512, 114.3),
        (LARGE, 150, 210_791_934, 640, 373.0),
        (TINY, 19, 34_243_753, 768, 85.8),
        (SMALL_224, 19, 55_561_657, 768, 136.5),
        (BASE, 19, 95_948_071, 768, 227.7),
        (LARGE, 19, 210_002_659, 768, 472.1),
    ],
)
def test_parameters_and_multiply_adds(backbone, num_classes, num_parameters, side, gmacs):
    with on_meta():
        network = semask_fpn(num_classes, backbone)
    assert sum(p.numel() for p in network.parameters()) == num_parameters
    assert executed_gmacs(network, (side, side)) == pytest.approx(gmacs, abs=0.051)


@pytest.mark.slow
def test_parameters_of_the_parts():
    with on_meta():
        network = semask_fpn(150)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in network.semantic_layers]
    assert layers == [47_917, 132_397, 411_949, 1_413_421]
    assert sum(p.numel() for p in network.encoder.parameters()) == 27_517_818 + 2_880
    assert sum(p.numel() for p in network.head.branches.parameters()) == 5_090_816
    assert sum(p.numel() for p in network.head.classifier.parameters()) == 38_550


# The contract


def test_logits_are_computed_from_the_feature_maps_at_any_size(randomize):
    network = randomize(small()).eval()
    check_segmenter(network)
    for size in [(64, 96), (65, 97), (18, 131), (3, 5)]:
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            maps, logits = network.feature_maps(images), network(images)
            from_head = network.head.classifier(maps["head"])
        sizes = network.encoder.out_sizes(*size)
        assert {name: tuple(m.shape) for name, m in maps.items()} == {
            **{f"stage{i + 1}": (2, 12 * 2**i, *sizes[i]) for i in range(4)},
            "semantic": (2, 5, *sizes[0]),
            "head": (2, 16, *sizes[0]),
        }
        assert list(maps) == ["stage1", "stage2", "stage3", "stage4", "semantic", "head"]
        torch.testing.assert_close(from_head, logits)
        torch.testing.assert_close(network.head(list(maps.values())[:4]), logits)


@pytest.mark.parametrize("arguments", [{}, {"aux_weight": 0.0}, {"global_stages": (0, 1)}], ids=str)
def test_every_parameter_gets_a_gradient_of_its_strides(arguments):
    network = small(**arguments).train()
    target = torch.randint(5, (2, 65, 97))
    network.training_loss(torch.randn(2, 3, 65, 97), target, CrossEntropy(), 255).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
    # With other strides DistributedDataParallel would copy the gradients in every step.
    assert [n for n, p in network.named_parameters() if p.grad.stride() != p.stride()] == []


def test_every_parameter_changes_the_loss(randomize):
    # With batch statistics, BatchNorm would cancel scales before it, so use the running ones.
    network = randomize(small()).eval()
    images, target = torch.randn(2, 3, 64, 96).double(), torch.randint(5, (2, 64, 96))
    network.training_loss(images, target, CrossEntropy(), 255).backward()
    for name, parameter in network.named_parameters():
        gradient = parameter.grad
        if re.search(r"attn\.qkv\.bias", name):
            # A bias of the keys adds the same number to all logits of a query.
            gradient = torch.cat([gradient.chunk(3)[0], gradient.chunk(3)[2]])
        # ReLU may zero channels of the head. A window holds not every relative position where it
        # is larger than the map. All else has an effect.
        is_partial = name.startswith("head.") or name.endswith("relative_position_bias_table")
        assert gradient.any() if is_partial else (gradient != 0).all(), name


def test_auxiliary_loss_is_weighted(randomize):
    network = randomize(small(aux_weight=0.25)).eval()
    images, target = torch.randn(1, 3, 40, 56).double(), torch.randint(5, (1, 40, 56))
    with torch.no_grad():
        maps = network.feature_maps(images)
        main = CrossEntropy()(network(images), target, 255)
        auxiliary = CrossEntropy()(maps["semantic"], target, 255)
        loss = network.training_loss(images, target, CrossEntropy(), 255)
        network.aux_weight = 0.0
        alone = network.training_loss(images, target, CrossEntropy(), 255)
    torch.testing.assert_close(loss, main + 0.25 * auxiliary)
    torch.testing.assert_close(alone, main)


def test_images_without_labels_give_a_loss_of_zero():
    network = small().train()
    target = torch.full((2, 64, 64), 255)
    loss = network.training_loss(torch.randn(2, 3, 64, 64), target, CrossEntropy(), 255)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_mixed_precision():
    network = small().train()
    target = torch.randint(5, (2, 65, 97))
    with torch.autocast("cpu", torch.bfloat16):
        loss = network.training_loss(torch.randn(2, 3, 65, 97), target, CrossEntropy(), 255)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.slow
def test_native_file_rebuilds_the_network(tmp_path, randomize):
    changes = {"global_stages": (1, 3), "aux_weight": 0.2, "dropout": 0.3, "semantic_dropout": 0.0}
    network = randomize(small(num_classes=4, in_channels=2, **changes)).float().eval()
    file = tmp_path / "network.safetensors"
    export_weights(network, file, "native")
    loaded, _ = load_network(file)
    images = torch.rand(1, 2, 61, 64)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), network(images))
    assert loaded.init_args() == network.init_args()
    assert {key: loaded.init_args()[key] for key in changes} == changes
    assert loaded.init_args()["encoder"]["init_args"]["window_size"] == 4


def test_parameter_groups():
    network = small()
    groups = {g["name"]: g for g in parameter_groups(network, 1.0, 0.1, 10.0)}
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    undecayed = {
        names[id(p)]
        for name, group in groups.items()
        if name.endswith("no_decay")
        for p in group["params"]
    }
    # As in the authors' code: the name holds "norm", which that of a BatchNorm does not.
    assert undecayed == {
        n for n in names.values() if re.search(r"\.norm\d?\.|relative_position_bias_table", n)
    }
    encoder = {name for name in names.values() if name.startswith("encoder.")}
    assert network.layer_ids().keys() == encoder
    assert max(network.layer_ids().values()) == 8
    for path in network.classifier_paths:
        module = network.get_submodule(path)
        assert all(p.shape[0] == 5 for p in module.parameters())
    of_classes = {
        name.rpartition(".")[0] for name, p in network.named_parameters() if p.shape[0] == 5
    }
    assert of_classes == set(network.classifier_paths)


@pytest.mark.slow
def test_complexity_by_part():
    cost = complexity(small(depths=(1, 1, 1, 1)), 64, 96)
    assert [part.name for part in cost.parts] == [
        "stem",
        *(f"{kind}{i}" for i in (1, 2, 3, 4) for kind in ("stage", "semantic")),
        "head",
    ]
    assert sum(part.num_parameters for part in cost.parts) == cost.num_parameters
    assert sum(part.macs for part in cost.parts) == cost.macs
    assert all(part.output_shape for part in cost.parts)
    assert cost.parts[2].query_length == 16


@pytest.mark.slow
def test_experiment_reaches_the_arguments_of_the_backbone():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SeMaskFPN, "network")

    def parse(**arguments):
        init_args = {"num_classes": 5, "decoder_dim": 16, **arguments}
        path = "segformer_pl.models.semask.semask_fpn"
        return parser.parse_object({"network": {"class_path": path, "init_args": init_args}})

    lists = {key: list(SMALL[key]) for key in ("depths", "num_heads")}
    network = parser.instantiate(
        parse(drop_path_rate=0.1, global_stages=[3], **SMALL | lists)
    ).network
    assert network.encoder.init_args()["drop_path_rate"] == 0.1
    assert network.encoder.out_channels == (12, 24, 48, 96)
    assert network.global_stages == (3,)
    for wrong in ({"name": TINY}, {"depth": [1, 1, 1, 1]}, {"aux_weight": "none"}):
        with pytest.raises(jsonargparse.ArgumentError, match=next(iter(wrong))):
            parse(**wrong)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: semask_fpn(5, "resnet50"), "resnet50 is no Swin Transformer, .* choose one of"),
        (lambda: SeMaskFPN(mit_b0(), 5), "a MixTransformer does not give .* take a SwinEncoder"),
        (lambda: small(global_stages=(2, 4)), r"global_stages=\(2, 4\): name each stage .* 0 to 3"),
        (lambda: small(global_stages=(2, 2)), r"global_stages=\(2, 2\): name each stage"),
        (lambda: small(aux_weight=-0.4), "aux_weight=-0.4: give a number of at least 0"),
        (lambda: small(aux_weight=math.nan), "aux_weight=nan: give a number of at least 0"),
    ],
)
def test_wrong_arguments_are_refused(build, sentence):
    with on_meta(), pytest.raises(UserError, match=sentence) as raised:
        build()
    assert "\n" not in str(raised.value)


def test_the_encoder_serves_other_decoders():
    network = SegFormer(SwinEncoder(TINY, **SMALL), 5, 16).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 65, 97)).shape == (1, 5, 17, 25)
