"""transplant: each rule against what it promises, computed independently, and what it reports."""

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from segformer_pl.checkpoints import export_weights, load_network, load_weights, read_weights
from segformer_pl.checkpoints.layouts import NVLABS, from_canonical
from segformer_pl.checkpoints.matching import canonical_tensors
from segformer_pl.checkpoints.transplant import (
    pool_sr_kernel,
    resample_patch_kernel,
    resize_sr_kernel,
    transplant,
    write_transplanted,
)
from segformer_pl.errors import UserError
from segformer_pl.models import SegFormer, mit_b0, segformer_b0
from segformer_pl.models.mit import MixTransformer
from segformer_pl.models.tokens import to_channels_first, to_tokens

pytestmark = pytest.mark.slow

DIMS = (4, 8, 8, 16)


def small(num_classes=3, decoder_dim=8, in_indices=None, **arguments):
    encoder = MixTransformer(
        embed_dims=DIMS, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), **arguments
    )
    return SegFormer(encoder, num_classes, decoder_dim, in_indices)


@pytest.fixture
def trained(randomize):
    """Function arguments -> network in float64 with random parameters, and its weights."""

    def build(**arguments):
        network = randomize(small(**arguments)).eval()
        content = {
            "state_dict": {f"network.{k}": v for k, v in network.state_dict().items()},
            "hyper_parameters": {"network": network.spec()},
        }
        return network, content

    return build


def into(content, **arguments):
    """Transplant into a new network in float64; return it and the report."""
    network = small(**arguments).double().eval()
    return network, transplant(network, content)


def images(size=64):
    return torch.rand(2, 3, size, size, dtype=torch.float64)


class Pooled(nn.Module):
    """Average pooling of the results of a reduction, which the LayerNorm follows."""

    def __init__(self, sr, factor):
        super().__init__()
        self.sr, self.factor = sr, factor

    def forward(self, tokens):
        return F.avg_pool2d(self.sr(tokens), self.factor)


@pytest.mark.parametrize("factor", [2, 3])
def test_the_pooled_kernel_equals_pooling_before_the_norm_in_every_stage(trained, factor):
    source, content = trained(sr_ratios=(4, 2, 2, 1))
    ratios = (4 * factor, 2 * factor, 2 * factor, 1)
    network, report = into(content, sr_ratios=ratios)
    pooled, _ = trained(sr_ratios=(4, 2, 2, 1))
    pooled.load_state_dict(source.state_dict())
    for stage in pooled.encoder.stages[:3]:
        for block in stage.blocks:
            block.attn.sr = Pooled(block.attn.sr, factor)
    batch = images(32 * 2 * factor)
    expected, found = pooled.feature_maps(batch), network.feature_maps(batch)
    before = source.feature_maps(batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)
        assert (found[name] - before[name]).abs().max() > 1e-3  # the change has an effect
    assert report.untrained == ()
    assert report.num_copied == len(network.state_dict()) - 4
    assert len(report.resampled) == 3
    assert report.resampled[0] == (
        f"Stage 1, kernels of the sequence reduction: from sr_ratio 4 to {4 * factor}, pooled; "
        f"each result is the mean of the {factor**2} of the smaller window."
    )


def test_a_wrongly_pooled_kernel_is_detected(trained):
    """The comparison above fails for a kernel that is stretched instead of tiled."""
    source, _ = trained(sr_ratios=(4, 2, 2, 1))
    attention = source.encoder.stages[1].blocks[0].attn
    tokens = torch.rand(1, DIMS[1], 8, 8, dtype=torch.float64)
    expected = F.avg_pool2d(attention.sr(tokens), 2)
    kernel = attention.sr.weight
    stretched = kernel.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    for weight, is_right in ((pool_sr_kernel(kernel, 2), True), (stretched, False)):
        found = F.conv2d(tokens, weight, attention.sr.bias, stride=4)
        assert torch.allclose(found, expected) == is_right


@pytest.mark.parametrize(("r", "size"), [(2, 3), (4, 6), (3, 4)])
def test_a_kernel_resized_to_a_larger_window_is_exact_on_resized_windows(r, size):
    kernel = torch.randn(5, 5, r, r, dtype=torch.float64)
    window = torch.randn(7, 5, r, r, dtype=torch.float64)
    larger = F.interpolate(window, size=size, mode="bilinear", align_corners=False)
    found = F.conv2d(larger, resize_sr_kernel(kernel, size))
    torch.testing.assert_close(found, F.conv2d(window, kernel))
    bilinear = F.interpolate(kernel, size=size, mode="bilinear") * (r / size) ** 2
    assert not torch.allclose(F.conv2d(larger, bilinear), F.conv2d(window, kernel))


def test_a_kernel_resized_to_a_smaller_window_is_exact_on_piecewise_constant_windows():
    kernel = torch.randn(5, 5, 8, 8, dtype=torch.float64)
    cells = torch.randn(7, 5, 4, 4, dtype=torch.float64)
    window = cells.repeat_interleave(2, 2).repeat_interleave(2, 3)
    resized = resize_sr_kernel(kernel, 4)
    torch.testing.assert_close(F.conv2d(cells, resized), F.conv2d(window, kernel))
    # Not a divisor: the least-squares solution over independent tokens, found by lstsq.
    basis = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
    area = F.adaptive_avg_pool2d(basis, (2, 2)).flatten(1)
    best = torch.linalg.lstsq(area, kernel[0, 0].reshape(64, 1)).solution.view(2, 2)
    torch.testing.assert_close(resize_sr_kernel(kernel, 2)[0, 0], best)
    constant = torch.ones(1, 5, 5, 5, dtype=torch.float64)
    found = F.conv2d(constant, resize_sr_kernel(kernel, 5)).ravel()
    torch.testing.assert_close(found, kernel.sum((1, 2, 3)))


def patches(image, kernel, stride, padding):
    return F.conv2d(image, kernel.to(image), stride=stride, padding=padding)


@pytest.mark.parametrize(
    ("k", "padding", "new", "new_padding"), [(4, 0, 7, 3), (7, 3, 9, 4), (3, 1, 5, 2)]
)
def test_a_larger_patch_kernel_changes_nothing(k, padding, new, new_padding):
    kernel = torch.randn(6, 3, k, k, dtype=torch.float64)
    image = images(32)
    found = patches(image, resample_patch_kernel(kernel, padding, new, new_padding), 4, new_padding)
    expected = patches(image, kernel, 4, padding)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("k", "padding", "new", "new_padding"), [(7, 3, 4, 0), (7, 3, 5, 2)])
def test_a_smaller_patch_kernel_is_exact_where_the_image_ends_with_the_window(
    k, padding, new, new_padding
):
    """Images whose rows and columns repeat the border of the new window around token (2, 2)."""
    kernel = torch.randn(6, 3, k, k, dtype=torch.float64)
    resampled = resample_patch_kernel(kernel, padding, new, new_padding)
    inner = torch.rand(2, 3, new, new, dtype=torch.float64)
    left = 8 - new_padding
    image = F.pad(inner, (left, 20 - left - new, left, 20 - left - new), mode="replicate")
    found = patches(image, resampled, 4, new_padding)[:, :, 2, 2]
    expected = patches(image, kernel, 4, padding)[:, :, 2, 2]
    torch.testing.assert_close(found, expected)
    cropped = kernel[:, :, padding - new_padding :, padding - new_padding :][:, :, :new, :new]
    wrong = patches(image, cropped, 4, new_padding)[:, :, 2, 2]
    assert not torch.allclose(wrong, expected)


def test_a_network_whose_windows_grow_computes_the_same(trained):
    source, content = trained(patch_sizes=(4, 2, 2, 2))
    network, report = into(content, patch_sizes=(7, 3, 3, 3))
    batch = images()
    torch.testing.assert_close(network(batch), source(batch))
    assert report.untrained == ()
    assert report.resampled[0] == (
        "Stage 1, patch embedding: resampled from kernel 4 and padding 0 to 7 and 3; pixels that "
        "only the new window sees have the weight 0, which changes no result."
    )
    network, report = into(content, patch_sizes=(7, 2, 2, 2))
    assert len(report.resampled) == 1
    torch.testing.assert_close(network(batch), source(batch))


def test_the_paddings_are_those_that_the_source_states(trained):
    source, content = trained(patch_sizes=(4, 3, 3, 3), paddings=(2, 1, 1, 1))
    network, report = into(content, patch_sizes=(7, 3, 3, 3))
    expected = F.pad(source.encoder.stages[0].patch_embed.proj.weight, (1, 2, 1, 2))
    assert torch.equal(network.encoder.stages[0].patch_embed.proj.weight, expected)
    assert "from kernel 4 and padding 2 to 7 and 3" in report.resampled[0]
    assert any(
        sentence.startswith("Argument paddings is (3, 1, 1, 1) here")
        for sentence in report.sentences
    )


def test_a_depthwise_convolution_that_the_source_lacks_is_the_identity(trained):
    source, content = trained(pos_encoding="none")
    for arguments in ({}, {"pos_encoding": "learned", "image_size": 64}):
        network, report = into(content, **arguments)
        batch = images()
        torch.testing.assert_close(network(batch), source(batch))
        assert report.untrained == ()
        assert len(report.resampled) == 4


def test_position_tables_are_those_that_the_network_itself_computes(trained):
    source, content = trained(pos_encoding="learned", image_size=64)
    network, report = into(content, pos_encoding="learned", image_size=96)
    batch = images(96)
    torch.testing.assert_close(network(batch), source(batch))
    assert "position table: interpolated from 16x16 to 24x24 tokens." in report.resampled[0]


def test_what_has_no_place_is_left_out_and_said(trained):
    _, content = trained()
    for arguments in ({"pos_encoding": "none"}, {"pos_encoding": "learned", "image_size": 64}):
        _, report = into(content, **arguments)
        assert len(report.left_out) == 4
        assert "the trained depthwise convolutions were left out" in report.left_out[0]
        assert report.untrained
    _, content = trained(pos_encoding="learned", image_size=64)
    _, report = into(content, pos_encoding="none")
    assert "Stage 4: the trained position table was left out" in report.left_out[3]


def test_reductions_that_appear_or_vanish_are_untrained(trained):
    source, content = trained(sr_ratios=(8, 4, 2, 1))
    network, report = into(content, sr_ratios=(8, 4, 1, 2))
    (left_out,), (initialised,) = report.left_out, report.initialised
    assert left_out.startswith("Stage 3: sr_ratio is 1 here and was larger in the source")
    assert initialised.startswith("Stage 4: sr_ratio is 1 in the source and 2 here")
    assert report.untrained == (initialised, left_out)
    attention = network.encoder.stages[3].blocks[0].attn
    tokens = torch.rand(1, 4, 4, 16, dtype=torch.float64)
    pooled = F.avg_pool2d(to_channels_first(tokens), 2)
    torch.testing.assert_close(attention.reduce(tokens), attention.norm(to_tokens(pooled)))
    assert report.initialised_keys == {
        f"encoder.stages.3.blocks.0.attn.{name}"
        for name in ("sr.weight", "sr.bias", "norm.weight", "norm.bias")
    }
    ours = network.encoder.stages[3].blocks[0].attn.q.weight
    assert torch.equal(ours, source.encoder.stages[3].blocks[0].attn.q.weight)


def test_another_head_is_initialised_as_a_whole(trained):
    _, content = trained()
    torch.manual_seed(1)
    fresh = small(decoder_dim=12)
    torch.manual_seed(1)
    network, report = into(content, decoder_dim=12)
    for name, tensor in fresh.head.state_dict().items():
        assert torch.equal(network.head.state_dict()[name].to(tensor.dtype), tensor), name
    assert report.initialised == (
        "The decode head is untrained, because the state dict has another one.",
    )
    _, report = into(content, in_indices=(3,))
    assert report.left_out == ("The trained decode head was left out, as it is another one here.",)


def test_other_classes_initialise_the_classifier_alone(trained):
    source, content = trained()
    network, report = into(content, num_classes=5)
    assert torch.equal(network.head.bn.weight, source.head.bn.weight)
    assert report.initialised == (
        "head.classifier.weight, head.classifier.bias: initialised, because of 3 classes in the "
        "source, 5 in the model.",
    )


def test_weights_of_another_code_base_and_other_channels(randomize):
    source = randomize(mit_b0()).float()
    state = from_canonical(NVLABS, "", canonical_tensors(source))[0]
    network = segformer_b0(4, patch_sizes=(4, 2, 2, 2), in_channels=1)
    report = transplant(network, state)
    stem = resample_patch_kernel(source.stages[0].patch_embed.proj.weight, 3, 4, 0)
    found = network.encoder.stages[0].patch_embed.proj.weight
    torch.testing.assert_close(found, stem.sum(1, keepdim=True).float())
    assert report.load.constants == {"norm_eps": 1e-6, "conv_norm_eps": 1e-5}
    assert report.initialised == (
        "The decode head is untrained, because the state dict holds none.",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"patch_sizes": (9, 3, 3, 3), "strides": (8, 2, 2, 2)},
            "stage 1: the patch embedding has kernel 7 and stride 4 in .*, and kernel 9 and stride "
            "8 here; a kernel can be resampled at the same stride only",
        ),
    ],
)
def test_refused(trained, arguments, message):
    _, content = trained()
    network = small(**arguments)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=message):
        transplant(network, content)
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())


def test_other_widths_heads_and_networks_are_refused(trained):
    _, content = trained()
    with pytest.raises(UserError, match=r"embed_dims 4,8,8,16; depths 1,2,1,1\), but the model is"):
        transplant(segformer_b0(3), content)
    heads = MixTransformer(embed_dims=DIMS, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 2))
    with pytest.raises(UserError, match=r"num_heads .*1, 2, 2, 4.*1, 2, 2, 2"):
        transplant(SegFormer(heads, 3, 8), content)
    with pytest.raises(UserError, match="weights cannot be transplanted into a Linear"):
        transplant(nn.Linear(2, 2), content)
    # Tensors alone do not show the padding and the stride of an unpublished encoder.
    with pytest.raises(UserError, match="tensors show neither its heads nor its strides"):
        transplant(small(patch_sizes=(4, 3, 3, 3)), content["state_dict"])


def test_equal_variants_are_copied_as_load_weights_does(trained):
    source, content = trained()
    network, report = into(content)
    expected = small().double()
    load_weights(expected, content)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert report.sentences == [
        f"{len(source.state_dict())} tensors were copied from the state dict."
    ]


def test_the_written_file_starts_a_training_of_its_network(trained, tmp_path):
    _, content = trained(sr_ratios=(4, 2, 2, 1))
    facts = {"class_names": ["a", "b", "c"], "image_mean": [0.1] * 3, "image_std": [0.5] * 3}
    content["hyper_parameters"] |= facts
    content["state_dict"]["loss.weight"] = torch.ones(3)
    torch.save(content, tmp_path / "last.ckpt")
    file = tmp_path / "run" / "start_weights.safetensors"
    network = small(sr_ratios=(8, 4, 2, 1)).double()
    for _ in range(2):  # a file of an interrupted run is replaced
        sentences = write_transplanted(tmp_path / "last.ckpt", network, file)
    assert sentences[0].endswith("tensors were copied from '{}'.".format(tmp_path / "last.ckpt"))
    assert len(sentences) == 3
    loaded, report = load_network(file)
    batch = images()
    assert torch.equal(loaded.eval()(batch), network.eval()(batch))
    assert report.changed == ()
    stated = read_weights(file).task
    assert {key: stated[key] for key in facts} == facts
    assert {p.name for p in file.parent.iterdir()} == {file.name}
    # A classifier for other classes does not state the names of the source's.
    write_transplanted(tmp_path / "last.ckpt", small(num_classes=4), file)
    assert "class_names" not in read_weights(file).task
    with safe_open(file, framework="pt") as opened:
        assert "loss.weight" not in opened.keys()  # noqa: SIM118


def test_a_native_file_can_be_transplanted(trained, tmp_path):
    source, _ = trained(patch_sizes=(4, 2, 2, 2))
    export_weights(source, tmp_path / "source.safetensors", "native")
    network, report = into(tmp_path / "source.safetensors")
    batch = images()
    torch.testing.assert_close(network(batch), source(batch))
    assert "Stage 4, patch embedding: resampled from kernel 2 and padding 0" in str(report)
