"""Logits and gradients equal those of transformers and segmentation_models_pytorch.

In float64, with every parameter and buffer random. Every planted fault is detected.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segformer_pl.checkpoints import load_weights
from segformer_pl.checkpoints.layouts import detect, to_canonical
from segformer_pl.checkpoints.matching import canonical_tensors
from segformer_pl.models import decode_head, mit, segformer
from segformer_pl.models.mit_block import NormEps

NUM_CLASSES = 5
# embed_dims, depths, decoder_dim of the published variants
WIDE = (64, 128, 320, 512)
VARIANTS = {
    "b0": ((32, 64, 160, 256), (2, 2, 2, 2), 256),
    "b1": (WIDE, (2, 2, 2, 2), 256),
    "b2": (WIDE, (3, 4, 6, 3), 768),
    "b3": (WIDE, (3, 4, 18, 3), 768),
    "b4": (WIDE, (3, 8, 27, 3), 768),
    "b5": (WIDE, (3, 6, 40, 3), 768),
}
# The blocks of a stage are alike, so two widths and depths stand for all. Those of the others are
# compared as names and shapes of tensors.
COMPUTED = ["b0", pytest.param("b2", marks=pytest.mark.slow)]
# Rounding changes the logits by about 1e-15 of their size; the smallest planted fault, an epsilon,
# by 1e-7.
TOLERANCE = 1e-11


def empty(build):
    """Build a network in float64 without spending time on initial values, which are replaced."""
    with torch.device("meta"):
        network = build().double()
    network.to_empty(device="cpu")
    for name, buffer in network.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return network


def ours(variant, **arguments):
    return empty(lambda: getattr(segformer, f"segformer_{variant}")(NUM_CLASSES, **arguments))


def transformers_model(variant, **settings):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    dims, depths, decoder_dim = VARIANTS[variant]
    config = SegformerConfig(
        hidden_sizes=list(dims),
        depths=list(depths),
        decoder_hidden_size=decoder_dim,
        num_labels=NUM_CLASSES,
        **settings,
    )
    return empty(lambda: SegformerForSemanticSegmentation(config))


def smp_model(variant):
    import segmentation_models_pytorch as smp

    return smp.Segformer(
        f"mit_{variant}",
        encoder_weights=None,
        decoder_segmentation_channels=VARIANTS[variant][2],
        classes=NUM_CLASSES,
    )


def smp_logits(model, images):
    """Logits before the upsampling that smp builds into the network."""
    return model.segmentation_head[0](model.decoder(model.encoder(images)))


def difference(result, expected):
    """Largest absolute difference, relative to the largest expected value."""
    return ((result - expected).abs().max() / expected.abs().max()).item()


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize("variant", COMPUTED)
@torch.no_grad()
def test_logits_of_transformers(variant, randomize):
    theirs = randomize(transformers_model(variant)).eval()
    network = ours(variant).eval()
    report = load_weights(network, theirs.state_dict())
    assert report.num_tensors == len(network.state_dict())
    assert report.constants == {"norm_eps": 1e-5, "conv_norm_eps": 1e-5}
    sizes = [(65, 97), (64, 64), (33, 47)]
    # The variants differ in widths and depths, which have nothing to do with sizes and batches.
    for size in sizes if variant == "b0" else sizes[:1]:
        batch = images(*size, batch=2 if variant == "b0" else 1)
        expected = theirs(batch).logits
        assert expected.abs().max() > 0.1
        assert difference(network(batch), expected) < TOLERANCE, size


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_of_smp(variant):
    """smp's depths and widths are its own, and those of transformers come from this file."""
    with torch.device("meta"):
        network = getattr(segformer, f"segformer_{variant}")(NUM_CLASSES)
    theirs = smp_model(variant)
    layout, prefix, _ = detect(theirs.state_dict())
    expected = to_canonical(layout, prefix, theirs.state_dict())[0]
    found = canonical_tensors(network)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize("variant", COMPUTED)
@torch.no_grad()
def test_logits_of_smp(variant, randomize):
    theirs = randomize(smp_model(variant)).eval()
    network = ours(variant).eval()
    network.encoder.norm_eps = NormEps(0.5, 0.5)
    report = load_weights(network, theirs.state_dict())
    assert report.constants == {"norm_eps": 1e-6, "conv_norm_eps": 1e-5}
    batch = images(64, 96, batch=2 if variant == "b0" else 1)
    assert difference(network(batch), smp_logits(theirs, batch)) < TOLERANCE


@pytest.mark.parametrize("library", ["transformers", "smp"])
def test_training_mode_gives_the_same_gradients_and_running_statistics(library, randomize):
    if library == "transformers":
        theirs = transformers_model("b0", drop_path_rate=0.0, classifier_dropout_prob=0.0)
        forward, size = (lambda batch: theirs(batch).logits), (65, 97)
    else:
        theirs = smp_model("b0")
        forward, size = partial(smp_logits, theirs), (64, 96)
        for module in theirs.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
    randomize(theirs).train()
    network = ours("b0", drop_path_rate=0.0, dropout=0.0).train()
    load_weights(network, theirs.state_dict())
    batch = images(*size)
    expected = forward(batch)
    result = network(batch)
    assert difference(result, expected) < TOLERANCE
    towards = torch.randn_like(expected)
    (expected * towards).sum().backward()
    (result * towards).sum().backward()

    layout, prefix, _ = detect(theirs.state_dict())
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    their_gradients = to_canonical(layout, prefix, gradients)[0]
    our_gradients = canonical_tensors(_Gradients(network))
    assert our_gradients.keys() == their_gradients.keys()
    largest = max(gradient.abs().max() for gradient in their_gradients.values())
    for name, gradient in their_gradients.items():
        # The gradient of a bias of the keys is rounding alone, because softmax ignores it.
        close = torch.allclose(our_gradients[name], gradient, rtol=1e-9, atol=1e-12 * largest)
        assert close, name

    their_state = to_canonical(layout, prefix, theirs.state_dict())[0]
    for name in ("head.bn.running_mean", "head.bn.running_var", "head.bn.num_batches_tracked"):
        torch.testing.assert_close(network.state_dict()[name], their_state[name])


class _Gradients:
    """A network whose state dict holds gradients."""

    def __init__(self, network):
        self.gradients = {name: p.grad for name, p in network.named_parameters()}

    def state_dict(self):
        return self.gradients


def swap_keys_and_values(parameter):
    def fault(network, monkeypatch):
        for stage in network.encoder.stages:
            for block in stage.blocks:
                rows = getattr(block.attn.kv, parameter).data
                rows.copy_(torch.cat(rows.chunk(2)[::-1]))

    return fault


def interleave_heads_of_keys_and_values(network, monkeypatch):
    """Order rows as (heads, 2, C / heads). Stage 1 has one head and stays the same."""
    for stage in network.encoder.stages:
        for block in stage.blocks:
            rows = block.attn.kv.weight.data
            heads = block.attn.num_heads
            shape = rows.shape
            rows.copy_(rows.view(2, heads, -1, shape[1]).transpose(0, 1).reshape(shape))


def forget_batch_norm_statistics(network, monkeypatch):
    network.head.bn.reset_running_stats()


def gelu_by_tanh(network, monkeypatch):
    monkeypatch.setattr(mit.F, "gelu", partial(F.gelu, approximate="tanh"))


def epsilon(**changed):
    def fault(network, monkeypatch):
        network.encoder.norm_eps = network.encoder.norm_eps._replace(**changed)

    return fault


def concatenate_from_fine_to_coarse(network, monkeypatch):
    weight = network.head.fuse.weight.data
    weight.copy_(torch.cat(weight.chunk(4, dim=1)[::-1], dim=1))


def align_corners(network, monkeypatch):
    aligned = partial(F.interpolate, mode="bilinear", align_corners=True)
    monkeypatch.setattr(
        decode_head.F, "interpolate", lambda x, size, mode, align_corners: aligned(x, size=size)
    )


def swap_block_norms(network, monkeypatch):
    for stage in network.encoder.stages:
        for block in stage.blocks:
            block.norm1, block.norm2 = block.norm2, block.norm1


def lose_depthwise_bias(network, monkeypatch):
    for stage in network.encoder.stages:
        for block in stage.blocks:
            block.mlp.dwconv.bias.data.zero_()


def transpose_reduction_kernels(network, monkeypatch):
    for stage in list(network.encoder.stages)[:3]:
        for block in stage.blocks:
            block.attn.sr.weight.data.copy_(block.attn.sr.weight.data.mT.clone())


def pass_on_stages_without_their_norm(network, monkeypatch):
    network.encoder.stages[1].norm = nn.Identity()


def leave_dropout_on(network, monkeypatch):
    network.head.dropout.train()


FAULTS = {
    "key and value biases swapped": swap_keys_and_values("bias"),
    "key and value weights swapped": swap_keys_and_values("weight"),
    "heads interleaved": interleave_heads_of_keys_and_values,
    "no BatchNorm statistics": forget_batch_norm_statistics,
    "GELU by tanh": gelu_by_tanh,
    "epsilon of block norms": epsilon(norm=1e-6),
    "epsilon of convolution norms": epsilon(conv_norm=1e-6),
    "concatenation order": concatenate_from_fine_to_coarse,
    "align_corners": align_corners,
    "block norms swapped": swap_block_norms,
    "no depthwise bias": lose_depthwise_bias,
    "reduction kernels transposed": transpose_reduction_kernels,
    "no stage norm": pass_on_stages_without_their_norm,
    "dropout on": leave_dropout_on,
}


@pytest.fixture(scope="module")
def reference(randomize):
    """State dict of a transformers model, a batch and its logits."""
    torch.manual_seed(0)
    theirs = randomize(transformers_model("b0")).eval()
    batch = images(65, 97)
    with torch.no_grad():
        return theirs.state_dict(), batch, theirs(batch).logits


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@torch.no_grad()
def test_every_planted_fault_is_detected(fault, reference, monkeypatch):
    state, batch, expected = reference
    network = ours("b0").eval()
    load_weights(network, state)
    assert difference(network(batch), expected) < TOLERANCE
    FAULTS[fault](network, monkeypatch)
    assert difference(network(batch), expected) > 100 * TOLERANCE
