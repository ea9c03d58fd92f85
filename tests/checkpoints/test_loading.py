"""load_weights refuses, adapts and reports, and never leaves a model half loaded."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from segformer_pl.checkpoints import load_weights
from segformer_pl.checkpoints.layouts import (
    NATIVE,
    NVLABS,
    SMP,
    TRANSFORMERS_DISK,
    from_canonical,
)
from segformer_pl.checkpoints.matching import canonical_tensors
from segformer_pl.errors import UserError
from segformer_pl.models import SegFormer, mit_b0, segformer_b0, segformer_b1
from segformer_pl.models.mit import MixTransformer
from segformer_pl.models.mit_block import NormEps

STEM = "encoder.stages.0.patch_embed.proj.weight"


def small(num_classes=3, **arguments):
    """A small SegFormer. The number of heads changes no shape, so any will do."""
    encoder = MixTransformer(
        embed_dims=(4, 8, 8, 16), depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), **arguments
    )
    return SegFormer(encoder, num_classes, decoder_dim=8)


def snapshot(network):
    eps = {name: m.eps for name, m in network.named_modules() if hasattr(m, "eps")}
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}, eps


def is_unchanged(network, before):
    tensors, eps = snapshot(network)
    return eps == before[1] and all(torch.equal(tensors[n], t) for n, t in before[0].items())


@pytest.fixture
def source(randomize):
    return randomize(small()).float()


def foreign(network, layout=NVLABS):
    return from_canonical(layout, next(iter(layout.encoder_prefixes)), canonical_tensors(network))[
        0
    ]


def refuse(network, source, **arguments):
    before = snapshot(network)
    with pytest.raises(UserError) as error:
        load_weights(network, source, **arguments)
    assert is_unchanged(network, before)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("source", [123, None, ["mit_b0.pth"]])
def test_an_object_of_another_type_is_refused(source):
    with pytest.raises(UserError, match=r"^weights cannot come from a \w+; give a file, a fol"):
        load_weights(segformer_b0(5), source)


def test_weights_of_a_diverged_training_are_refused():
    model, state = segformer_b0(5), segformer_b0(5).state_dict()
    state["encoder.stages.0.norm.weight"][3] = torch.nan
    before = model.encoder.stages[0].norm.bias.clone()
    state["encoder.stages.0.norm.bias"] += 1
    with pytest.raises(UserError, match=r"nan or infinity in 1 value of encoder\.stages\.0\.norm"):
        load_weights(model, state)
    assert torch.equal(model.encoder.stages[0].norm.bias, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.int8), "head.classifier.weight as int8, and the model computes with"),
        (lambda t: t.to(torch.complex64), "head.classifier.weight as complex64"),
        (lambda t: t.to("meta"), "head.classifier.weight as a tensor that is without values"),
        (lambda t: t.to_sparse(), "head.classifier.weight as a tensor that is sparse or nested"),
    ],
)
def test_tensors_that_cannot_be_weights_are_refused(source, change, message):
    state = source.state_dict()
    state["head.classifier.weight"] = change(state["head.classifier.weight"])
    assert message in refuse(small(), state)


def test_a_negative_variance_is_refused(source):
    state = source.state_dict()
    (name,) = (name for name in state if name.endswith("running_var"))
    state[name] = -state[name].abs()
    assert f"negative variance in {name}" in refuse(small(), state)


class Malicious:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, legacy):
    file, trace = tmp_path / "weights.pth", tmp_path / "code ran"
    content = {"state_dict": {}, "hook": Malicious(trace)}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    message = refuse(small(), file)
    assert f"'{file}' holds code (posix.mkdir)" in message
    assert not trace.exists()
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Malicious(trace)))
    assert "is no file of tensors" in refuse(small(), plain)
    assert not trace.exists()


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(small(), tmp_path / "model.pth")
    assert "holds code (segformer_pl.models" in refuse(small(), tmp_path / "model.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, source, suffix, share):
    file = tmp_path / f"weights{suffix}"
    state = foreign(source)
    if suffix == ".pth":
        torch.save(state, file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    message = refuse(small(), file)
    assert f"'{file}' is no file of tensors, or is cut short" in message


def test_a_file_of_another_network_is_refused(tmp_path):
    file = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}, file)
    message = refuse(small(), file)
    assert f"'{file}' is no SegFormer" in message
    assert "conv1.weight, fc.bias" in message


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, torch.zeros(2)])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    file = tmp_path / "weights.pth"
    torch.save(content, file)
    message = refuse(small(), file)
    assert "no state dict in it" in message or "is no SegFormer" in message


def test_another_variant_is_refused():
    message = refuse(segformer_b0(3), segformer_b1(3).state_dict())
    assert "holds MiT-B1 (embed_dims 64,128,320,512; depths 2,2,2,2)" in message
    assert "the model is MiT-B0 (embed_dims 32,64,160,256; depths 2,2,2,2)" in message


def test_shapes_of_other_arguments_are_refused(source):
    assert "attn.sr.weight as 4x4x8x8, the model as 4x4x4x4" in refuse(
        small(sr_ratios=(4, 4, 2, 1)), foreign(source)
    )
    wider = SegFormer(small().encoder, 3, decoder_dim=12)
    assert "head.projections.0.weight as 8x4, the model as 12x4, and" in refuse(
        wider, foreign(source)
    )


def test_missing_and_unexpected_keys_are_listed(source):
    state = foreign(source)
    gap = {k: v for k, v in state.items() if k != "backbone.block2.1.attn.q.bias"}
    message = refuse(small(), gap)
    assert "lacks 1 tensor of the model (encoder.stages.1.blocks.1.attn.q.bias)" in message
    extra = state | {"backbone.block2.1.attn.gate": torch.zeros(1)}
    message = refuse(small(), extra)
    assert "1 tensor that the model has no place for (backbone.block2.1.attn.gate)" in message

    del extra["backbone.norm3.bias"]
    network = small()
    kept = network.encoder.stages[2].norm.bias.data.fill_(0.125).clone()
    report = load_weights(network, extra, strict=False)
    assert report.missing == ("encoder.stages.2.norm.bias",)
    assert report.unexpected == ("backbone.block2.1.attn.gate",)
    assert report.num_tensors == len(network.state_dict()) - 1
    assert torch.equal(network.encoder.stages[2].norm.bias, kept)
    for line in ("NOT in the source", "NOT in the model", "block2.1.attn.gate"):
        assert line in str(report)


def test_loading_the_encoder_alone_leaves_the_head_unchanged(source):
    network = small(num_classes=7)
    network.head.bn.num_batches_tracked.fill_(5)
    before = {name: t.clone() for name, t in network.head.state_dict().items()}
    report = load_weights(network, foreign(source), parts="encoder")
    assert all(torch.equal(t, before[name]) for name, t in network.head.state_dict().items())
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(tensor, source.encoder.state_dict()[name]), name
    assert set(report.dropped.values()) == {"only the encoder was asked for"}


def test_a_backbone_alone_does_not_fill_a_segmenter(source):
    backbone = from_canonical(NVLABS, "", canonical_tensors(source.encoder))[0]
    assert "no decode head; load it with parts='encoder'" in refuse(small(), backbone)
    assert "whole segmenter" in refuse(small().encoder, source.state_dict())
    load_weights(small().encoder, source.state_dict(), parts="encoder")


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_the_stem_is_adapted_to_other_input_channels(source, channels):
    network = small(in_channels=channels)
    report = load_weights(network, foreign(source))
    rgb, stem = source.state_dict()[STEM], network.state_dict()[STEM]
    if channels == 1:
        expected = rgb.sum(1, keepdim=True)
    else:
        expected = torch.stack([rgb[:, c % 3] * 3 / channels for c in range(channels)], dim=1)
    torch.testing.assert_close(stem, expected)
    assert f"from 3 to {channels} input channels" in report.inflated[STEM]
    # The reverse, from another number of channels to three, is refused.
    message = refuse(small(), network.state_dict())
    assert f"patch_embed.proj.weight as 4x{channels}x7x7, the model as 4x3x7x7" in message


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (NVLABS, NormEps(1e-6, 1e-5)),
        (SMP, NormEps(1e-6, 1e-5)),
        (TRANSFORMERS_DISK, NormEps(1e-5, 1e-5)),
        (NATIVE, NormEps(0.25, 0.5)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_epsilons_are_those_of_the_layout(source, layout, expected):
    network = small(norm_eps=0.25, conv_norm_eps=0.5)
    report = load_weights(network, foreign(source, layout))
    assert network.encoder.norm_eps == expected
    assert report.constants == {"norm_eps": expected.norm, "conv_norm_eps": expected.conv_norm}
    assert f"norm_eps {expected.norm:g}, conv_norm_eps {expected.conv_norm:g}: " in str(report)
    for name, module in network.encoder.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            after_convolution = "patch_embed" in name or "attn" in name
            assert module.eps == expected[after_convolution], name


def test_epsilons_of_a_run_are_its_arguments(source):
    encoder = {"class_path": "any", "init_args": {"norm_eps": 0.125}}
    for spec in (encoder, {"class_path": "any", "init_args": {"encoder": encoder}}):
        content = {
            "state_dict": {f"network.{k}": v for k, v in source.state_dict().items()},
            "hyper_parameters": {"network": spec},
        }
        network = small(norm_eps=0.25, conv_norm_eps=0.5)
        report = load_weights(network, content)
        assert report.constants == {"norm_eps": 0.125, "conv_norm_eps": 1e-5}
        assert network.encoder.norm_eps == NormEps(0.125, 1e-5)


def test_wrapped_state_dicts_are_loaded(source, tmp_path):
    """Prefixed by DistributedDataParallel, and nested as training scripts save them."""
    wrapped = {f"module.{name}": tensor for name, tensor in foreign(source).items()}
    for content in (wrapped, {"state_dict": wrapped}, {"model": wrapped, "epoch": 3}):
        network = small()
        torch.save(content, tmp_path / "weights.pth")
        load_weights(network, tmp_path / "weights.pth")
        assert torch.equal(network.state_dict()[STEM], source.state_dict()[STEM])
    stray = wrapped | {"step": torch.zeros(())}
    assert "no place for (step)" in refuse(small(), stray)


def test_unknown_parts_are_refused():
    assert "choose one of all, encoder" in refuse(small(), {}, parts="head")


def test_a_model_without_the_contract_is_refused():
    for source in (mit_b0().state_dict(), torch.nn.Linear(2, 2).state_dict()):
        message = refuse(torch.nn.Linear(2, 2), source)
        assert (
            "keeps the contract of segformer_pl.models.segmenter, and a Linear does not" in message
        )


def test_dtype_and_memory_format_of_the_model_are_kept(source):
    network = small().double()
    load_weights(network, foreign(source))
    stem = network.state_dict()[STEM]
    assert stem.dtype == torch.float64
    assert stem.is_contiguous(memory_format=torch.channels_last)


def test_a_state_dict_without_values_loads_on_the_meta_device_only():
    network = segformer_b0(num_classes=2)
    with torch.device("meta"):
        state = segformer_b0(num_classes=2).state_dict()
    with pytest.raises(UserError, match="without values"):
        load_weights(network, state)
    with torch.device("meta"):
        load_weights(segformer_b0(num_classes=2), state)
