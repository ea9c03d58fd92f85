import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segformer_pl import bands, models
from segformer_pl.analysis.complexity import (
    as_dict,
    complexity,
    executed_macs,
    measure_latency,
    table,
)
from segformer_pl.models import MixTransformer, SegFormer
from segformer_pl.models.mit_block import EfficientSelfAttention
from segformer_pl.models.segmenter import Segmenter

# Table 1a of the paper: GFLOPs on ADE20K, Cityscapes, COCO-Stuff.
TABLE_1A = {
    "b0": (8.4, 125.5, 8.4),
    "b1": (15.9, 243.7, 15.9),
    "b2": (62.4, 717.1, 62.4),
    "b3": (79.0, 962.9, 79.0),
    "b4": (95.7, 1240.6, 95.7),
    "b5": (183.3, 1460.4, 111.6),
}


def small(**arguments):
    encoder = MixTransformer(
        embed_dims=(4, 8, 8, 16), depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), **arguments
    )
    return SegFormer(encoder, num_classes=3, decoder_dim=8)


@pytest.mark.slow
@pytest.mark.parametrize("variant", TABLE_1A)
def test_flops_of_the_paper(variant):
    with torch.device("meta"):
        network = getattr(models, f"segformer_{variant}")(num_classes=150)
    side = 640 if variant == "b5" else 512
    sizes = [(side, side), (1024, 2048), (512, 512)]
    counted = tuple(round(network.paper_macs(*size) / 1e9, 1) for size in sizes)
    assert counted == TABLE_1A[variant]


@pytest.mark.parametrize(
    ("variant", "size", "integer"),
    # Printed by NVlabs' tools/get_flops.py with the counter of mmcv 1. For the other variants, only
    # the rounded values of Table 1a are known.
    [("b0", (512, 512), 8_403_746_816)],
)
def test_exact_count_of_the_reference_code(variant, size, integer):
    with torch.device("meta"):
        network = getattr(models, f"segformer_{variant}")(num_classes=150)
    assert network.paper_macs(*size) == integer


def macs_by_hand(network, images):
    """Count the multiply-adds of a forward pass from the input shapes of its layers."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Linear):
            total += inputs[0].numel() * module.out_features
        elif isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        else:
            _, height, width, dim = inputs[0].shape
            keys = (height // module.sr_ratio) * (width // module.sr_ratio)
            total += 2 * height * width * keys * dim

    for module in network.encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | EfficientSelfAttention):
            module.register_forward_hook(count)
    features = network.encoder(images)
    width = network.head.classifier.in_channels
    for feature in features:  # folded head: fold the weights, then project each stage
        total += width * width * feature.shape[1] + width * width
        total += width * feature[0].numel()
    return total + network.head.classifier.weight.numel() * features[0][0, 0].numel()


@pytest.mark.parametrize("size", [(64, 64), (70, 101)])
@pytest.mark.slow
def test_executed_macs_equal_the_sum_over_layers(size):
    network = small().eval()
    cost = complexity(network, *size)
    assert cost.macs == macs_by_hand(network, torch.zeros(1, 3, *size))
    assert sum(part.macs for part in cost.parts) == cost.macs


@pytest.mark.slow
def test_parts():
    cost = complexity(small(sr_ratios=(4, 4, 2, 1)), 64, 96)
    assert [part.name for part in cost.parts] == ["stage1", "stage2", "stage3", "stage4", "head"]
    assert [part.output_shape for part in cost.parts] == [
        (1, 4, 16, 24),
        (1, 8, 8, 12),
        (1, 8, 4, 6),
        (1, 16, 2, 3),
        (1, 3, 16, 24),
    ]
    assert [part.query_length for part in cost.parts] == [384, 96, 24, 6, None]
    assert [part.key_length for part in cost.parts] == [24, 6, 6, 6, None]
    # 2 N N_kv C in each block; the second stage has two blocks.
    expected = [2 * 384 * 24 * 4, 2 * (2 * 96 * 6 * 8), 2 * 24 * 6 * 8, 2 * 6 * 6 * 16, 0]
    assert [part.attention_macs for part in cost.parts] == expected
    assert sum(part.num_parameters for part in cost.parts) == cost.num_parameters
    assert cost.encoder_parameters + cost.head_parameters == cost.num_parameters


@pytest.mark.slow
def test_activation_memory_equals_what_autograd_saves():
    network = small().train()
    stored = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        stored[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.randn(2, 3, 64, 96))
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    buffers = {b.untyped_storage().data_ptr() for b in network.buffers()}
    kept = sum(size for key, (size, _) in stored.items() if key not in parameters | buffers) // 2
    cost = complexity(network, 64, 96)
    assert cost.activation_bytes == kept
    # SegFormer computes nothing outside of its parts but a change of the images' memory format.
    image_bytes = 4 * 3 * 64 * 96
    assert kept - image_bytes <= sum(part.activation_bytes for part in cost.parts) <= kept


def test_activation_memory_where_one_image_cannot_be_trained_on():
    """BatchNorm after a global pooling needs two images; half of their memory is counted."""

    class Pooling(Convolutions):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, images):
            mixed = self.stem(images)
            pooled = self.norm(mixed.mean((2, 3), keepdim=True))
            return self.classifier(mixed + pooled)

    cost = complexity(Pooling(), 8, 8)
    stem = cost.parts[0]
    assert stem.activation_bytes == 4 * 2 * 64
    # The image, the sum, and the pooled values; BatchNorm also keeps mean and deviation of a batch.
    assert cost.activation_bytes == 4 * (2 * 64 + 4 * 64 + 4) + 4 * 2 * 4 // 2


def test_activation_memory_of_a_part():
    """ReLU saves its output, a convolution its input; each tensor counts once."""

    class Chain(Convolutions):
        def feature_maps(self, images):
            return {"mixed": self.stem(images)}

        def forward(self, images):
            return self.classifier(self.feature_maps(images)["mixed"])

    stem, classifier, auxiliary = complexity(Chain(), 8, 8).parts
    # The stem saves the image (2 channels), the classifier the stem's output (4 channels).
    assert (stem.activation_bytes, classifier.activation_bytes) == (4 * 2 * 64, 4 * 4 * 64)
    assert auxiliary.activation_bytes == 0
    assert stem.query_length is None
    # In Convolutions attention runs between the parts, and its tensors belong to none.
    cost = complexity(Convolutions(), 8, 8)
    assert sum(part.attention_macs for part in cost.parts) == 0
    assert cost.activation_bytes > sum(part.activation_bytes for part in cost.parts)


@pytest.mark.slow
def test_counting_leaves_the_network_as_it_was(randomize):
    network = randomize(small()).train()
    network.head.dropout.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random = torch.get_rng_state()
    complexity(network, 64, 64)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert network.training
    assert not network.head.dropout.training
    assert all(not module._forward_hooks for module in network.modules())


class Convolutions(Segmenter):
    """A segmenter without stages, with attention, two input channels, and a part used in training
    only."""

    def __init__(self):
        super().__init__()
        self.in_channels, self.num_classes = 2, 2
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.classifier = nn.Conv2d(4, 2, 1, bias=False)
        self.auxiliary = nn.Conv2d(4, 2, 1, bias=False)

    def feature_maps(self, images):
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return {"mixed": mixed.transpose(1, 2).unflatten(2, images.shape[2:])}

    def forward(self, images):
        return self.classifier(self.feature_maps(images)["mixed"])

    def init_args(self):
        return {}

    def layer_ids(self):
        return {"stem.weight": 0}


@pytest.mark.slow
def test_attention_of_a_transformer_decoder():
    """Of 2 layers with 8 queries and 64 channels, on a map of 2x3 pixels."""
    arguments = {"decoder_dim": 64, "decoder_heads": 2, "decoder_mlp_dim": 16, "decoder_layers": 2}
    network = models.maskformer(3, "test_resnet", num_queries=8, **arguments)
    parts = {part.name: part for part in complexity(network, 64, 96).parts}
    decoder = parts["transformer_decoder"]
    assert decoder.attention_macs == 2 * 2 * 64 * (8 * 8 + 8 * 6)
    assert (decoder.query_length, decoder.key_length) == (8, 8)
    # A 1x1 convolution of 6 pixels; in both layers six projections of queries, two of pixels, MLP.
    projections = 6 * network.encoder.out_channels[-1] * 64
    projections += 2 * (6 * 8 * 64 * 64 + 2 * 6 * 64 * 64 + 2 * 8 * 64 * 16)
    assert decoder.macs == projections + decoder.attention_macs


def test_any_segmenter():
    cost = complexity(Convolutions(), 8, 8)
    assert cost.paper_macs is None
    assert cost.image_shape == (2, 8, 8)
    assert [part.name for part in cost.parts] == ["stem", "classifier", "auxiliary"]
    assert [part.output_shape for part in cost.parts] == [(1, 4, 8, 8), (1, 2, 8, 8), None]
    assert (cost.encoder_parameters, cost.head_parameters) == (72, 16)
    assert cost.num_classes == 2
    assert cost.macs == 64 * 2 * 4 * 9 + 2 * 64 * 64 * 4 + 64 * 4 * 2
    latency = measure_latency(Convolutions(), 8, 8, min_seconds=0.01)
    assert "paper" not in table("it", cost, latency)


@pytest.mark.slow
def test_parts_can_be_nested_modules():
    network = small()
    network.parts = lambda: {"first block": "encoder.stages.0.blocks.0", "rest": "head"}
    first, rest = complexity(network, 64, 64).parts
    block = network.encoder.stages[0].blocks[0]
    assert first.num_parameters == sum(p.numel() for p in block.parameters())
    assert first.output_shape == (1, 16, 16, 4)
    assert rest.output_shape == (1, 3, 16, 16)


def test_table_and_dictionary_state_what_was_measured():
    network = small()
    cost = complexity(network, 64, 64)
    latency = measure_latency(network, 64, 64, min_seconds=0.01)
    assert latency.num_runs >= 1
    assert latency.median_ms > 0
    assert (latency.dtype, latency.num_threads) == ("float32", 1)
    text = table("small", cost, latency)
    assert max(map(len, text.splitlines())) <= 100
    for part in ("64x64 pixels", "3 classes", "float32", "1 threads", "stage4", "head"):
        assert part in text
    data = json.loads(json.dumps(as_dict(cost, latency)))
    assert data["paper_gflops"] == round(cost.paper_macs / 1e9, 1)
    assert data["latency"]["num_warmup"] == 3
    assert data["parts"][0]["key_length"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_counts_do_not_depend_on_the_bands_of_inference(monkeypatch, frozen):
    """Bands compute the rows around them twice, also in a network that needs no gradients."""
    network = small().requires_grad_(not frozen)
    expected = complexity(network, 64, 96).macs
    monkeypatch.setattr(bands, "LAYER_ELEMENTS", 1)
    monkeypatch.setattr(bands, "LEAST_ROWS", 2)
    assert complexity(network, 64, 96).macs == executed_macs(network, 64, 96) == expected


def test_executed_macs_are_those_of_the_whole_count():
    network = small(sr_ratios=(8, 8, 2, 1)).train()
    assert executed_macs(network, 64, 96) == complexity(network, 64, 96).macs
    assert network.training
